"""A training from its settings to the saved pipeline."""

import logging
import secrets
from collections.abc import Callable

import datasets
import diffusers
import torch
import transformers
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import ProjectConfiguration, broadcast_object_list, set_seed

from .. import hub
from ..data.rows import SAMPLE_ID
from ..errors import UsageError
from ..run_folder import RunFolder
from . import records
from .build import build_run, load_family, load_rows, moving_average
from .callbacks import (
    BadSamples,
    Checkpoints,
    NonFinite,
    Progress,
    RoundRecords,
    SavedRounds,
    Signals,
    StepLog,
    Validation,
)
from .resumption import fingerprint, resume
from .settings import TrainingSettings

logger = get_logger(__name__, log_level="INFO")


def set_up(settings: TrainingSettings) -> Accelerator:
    """The accelerator, with logging as the official script has it."""
    folder = RunFolder(settings.output_dir)
    try:
        accelerator = Accelerator(
            mixed_precision=settings.mixed_precision,
            log_with=settings.report_to,
            project_config=ProjectConfiguration(
                project_dir=str(folder.path), logging_dir=str(folder.path / settings.logging_dir)
            ),
        )
    except ValueError as error:
        raise UsageError(f"accelerate: {error}") from error
    settings.mixed_precision = accelerator.mixed_precision
    logging.basicConfig(
        format="%(asctime)s - %(levelname)s - %(name)s - %(message)s", datefmt="%m/%d/%Y %H:%M:%S", level=logging.INFO
    )
    quiet = (logging.WARNING, logging.ERROR)[not accelerator.is_local_main_process]
    for library in (datasets, transformers, diffusers):
        library.utils.logging.set_verbosity(quiet)
    if not accelerator.is_local_main_process:
        datasets.disable_progress_bars()
    for name in ("httpx", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if settings.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    return accelerator


def agree_on_seed(settings: TrainingSettings) -> None:
    """Draw the seed if none was given, the same on all processes, and start all streams from it."""
    if settings.seed is None:
        settings.seed = broadcast_object_list([secrets.randbelow(2**31)])[0]
        logger.info(f"Seed {settings.seed} was drawn")
    set_seed(settings.seed)


def train(settings: TrainingSettings, say: Callable[[str], None] = print) -> None:
    """Train, and write what a run leaves behind.

    Args:
        say: takes what the user must read whatever the log shows.

    Raises:
        UsageError: settings, rows or a checkpoint that will not do.
        Diverged: the losses stopped being finite.
    """
    accelerator = set_up(settings)
    agree_on_seed(settings)
    folder = RunFolder(settings.output_dir)
    repo_id = None
    if accelerator.is_main_process:
        try:
            folder.records.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"`output_dir` {folder.path}: {error.strerror}") from error
        if settings.push_to_hub:
            repo_id = hub.create(settings)
    family = load_family(settings, accelerator)
    average = moving_average(family, settings, accelerator.device)
    condition = family.condition(settings, settings.method)
    rows, groups = load_rows(settings, condition, accelerator)
    run, budget = build_run(settings, accelerator, family, average, condition, rows, groups)
    marks = fingerprint(settings, rows, condition, run)
    resume(settings, run, marks, folder)
    if accelerator.is_main_process:
        values = settings.values().items()
        simple = {key: value for key, value in values if isinstance(value, (bool, int, float, str))}
        accelerator.init_trackers(settings.tracker_project_name, simple)
        records.write_config(settings, folder)
    rounds = run.rounds
    logger.info(
        f"{settings.method.mitigation}: {len(rows)} samples in {settings.method.num_shards} shards, "
        f"{rounds.num_rounds} rounds of {rounds.steps_per_round} steps per proxy, {rounds.total_steps} steps in all"
    )
    validation = None
    if settings.validation_prompts:
        validation = Validation(
            accelerator,
            settings.validation_prompts,
            settings.validation_epochs,
            budget.steps_per_epoch,
            settings.seed,
        )
    sample_ids = rows[SAMPLE_ID]
    progress = Progress(accelerator.is_local_main_process)
    checkpoints = Checkpoints(folder, marks, settings.checkpointing_steps, settings.checkpoints_total_limit)
    callbacks = [
        progress,
        StepLog(accelerator, progress, settings.log_every),
        NonFinite(sample_ids, settings.max_nonfinite),
        BadSamples(folder, sample_ids),
        RoundRecords(folder),
        *([validation] if validation else []),
        *([SavedRounds(folder)] if settings.save_rounds else []),
        checkpoints,
        Signals(checkpoints, settings.log_every, say),
    ]
    if run.run(callbacks):
        records.write_sample_counts(run, rows, folder)
        if accelerator.is_main_process:
            if settings.save_shards:
                records.save_shards(run, rows, folder)
            checkpoints.save_pipeline(run)
            if validation:
                validation.draw(run)
            if settings.push_to_hub:
                images = validation.images if validation else []
                hub.write_card(settings, repo_id, images, run.rows, family.tags)
                hub.upload(settings, repo_id)
            logger.info(f"Saved to {folder.path}")
    accelerator.end_training()
