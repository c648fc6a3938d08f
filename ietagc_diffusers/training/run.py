"""A training from its settings to the saved pipeline."""

import logging
import math
import os
import secrets
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import datasets
import diffusers
import torch
import transformers
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import ProjectConfiguration, broadcast_object_list, set_seed, str_to_bool

from .. import hub
from ..checkpoint import fingerprints
from ..data.rows import file_names
from ..data.sources import SAMPLE_ID
from ..errors import UsageError, one_line
from ..families.settings import BaseModelSettings
from ..run_folder import RunFolder
from ..single_file import folder_of
from ..tensor_files import Disk
from . import records
from .build import Budget, build_run, load_family, moving_average
from .callbacks import (
    BadSamples,
    Checkpoints,
    FileLosses,
    Monitor,
    NonFinite,
    PrivacySpent,
    Progress,
    RoundRecords,
    SavedEpochs,
    SavedRounds,
    Signals,
    StepLog,
    Uploads,
    Validation,
)
from .cost import cost_of, describe
from .ensemble import Callback, IterativeEnsemble
from .heldout import HeldoutSet
from .lock import locked
from .monitor import Comparer, CopyMeter, Meter
from .prior import PriorSet
from .privacy import PrivacyAccount, check_launch, in_words
from .processes import of_main, on_main
from .resumption import extend, find_checkpoint, fingerprint, resume, take_over
from .rows import load_rows
from .settings import RunSettings
from .views import canary_keys, view_of

logger = get_logger(__name__, log_level="INFO")


def set_up(settings: RunSettings) -> Accelerator:
    """The accelerator, with logging as the official script has it."""
    folder = RunFolder(settings.output_dir)
    _check_launch()
    try:
        accelerator = Accelerator(
            mixed_precision=settings.mixed_precision,
            gradient_accumulation_steps=settings.gradient_accumulation_steps,
            log_with=_trackers(settings.report_to),
            project_config=ProjectConfiguration(
                project_dir=str(folder.path), logging_dir=str(folder.path / settings.logging_dir)
            ),
        )
    except ValueError as error:
        raise UsageError(f"accelerate: {error}") from error
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UsageError("`mixed_precision` fp16: needs an accelerator, this run is on the CPU; give no or bf16")
    if accelerator.mixed_precision == "fp8":
        raise UsageError("`mixed_precision` fp8: is not trained here; give no, fp16 or bf16")
    settings.mixed_precision = accelerator.mixed_precision
    check_launch(settings, accelerator.num_processes)
    settings.gradient_accumulation_steps = accelerator.gradient_accumulation_steps  # `accelerate config` may set it
    logging.basicConfig(
        format="%(asctime)s - %(levelname)s - %(name)s - %(message)s", datefmt="%m/%d/%Y %H:%M:%S", level=logging.INFO
    )
    quiet = (logging.WARNING, logging.ERROR)[not accelerator.is_local_main_process]
    for library in (datasets, transformers, diffusers):
        library.utils.logging.set_verbosity(quiet)
    if not accelerator.is_local_main_process:
        datasets.disable_progress_bars()
    for name in ("httpx", "httpx2", "huggingface_hub"):  # they log addresses, which may be signed
        logging.getLogger(name).setLevel(logging.WARNING)
    if settings.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    return accelerator


def _check_launch():
    """Raise ``UsageError`` for launches that shard a model: here each process swaps whole models."""
    for name, variable in (("FSDP", "USE_FSDP"), ("DeepSpeed", "USE_DEEPSPEED"), ("Megatron-LM", "USE_MEGATRON_LM")):
        if str_to_bool(os.environ.get(f"ACCELERATE_{variable}", "false")):
            raise UsageError(
                f"accelerate is configured for {name}, which shards the model over processes; here each process trains "
                "whole models. Launch without it, for example with another `accelerate config`"
            )


def _trackers(report_to):
    """accelerate's ``log_with``. Raises ``UsageError`` for a tracker that it does not have or that is not installed."""
    if report_to in ("none", "all"):
        return None if report_to == "none" else "all"
    if report_to not in LOGGER_TYPE_TO_CLASS:
        known = ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
        raise UsageError(f"`report_to` {report_to}: must be one of {known}, all or none")
    if report_to not in [str(tracker) for tracker in get_available_trackers()]:
        raise UsageError(f"`report_to` {report_to}: is not installed; `pip install` it, or give tensorboard or none")
    return report_to


def agree_on_seed(settings: RunSettings) -> int:
    """Draw the seed if none was given, the same on all processes, and start all streams from it. Returns it."""
    if settings.seed is None:
        settings.seed = broadcast_object_list([secrets.randbelow(2**31)])[0]
        logger.info(f"Seed {settings.seed} was drawn")
    set_seed(settings.seed)
    return settings.seed


def _many(number, thing):
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _announce(
    settings: RunSettings, run: IterativeEnsemble, budget: Budget, num_rows: int, prior: PriorSet | None
) -> None:
    """What the official script says before the first step, and the method's part of it."""
    rounds, epochs = run.rounds, run.rounds.total_steps / budget.steps_per_epoch
    logger.info("***** Running training *****")
    logger.info(f"  Num examples = {num_rows}")
    logger.info(f"  Num Epochs = {math.ceil(epochs)}")
    logger.info(f"  Instantaneous batch size per device = {settings.train_batch_size}")
    logger.info(f"  Total train batch size (w. parallel, distributed & accumulation) = {budget.visits_per_step}")
    logger.info(f"  Gradient Accumulation steps = {settings.gradient_accumulation_steps}")
    logger.info(f"  Total optimization steps = {rounds.total_steps}")
    held = _many(rounds.num_shards, "shard")
    if not settings.method.shard_data:
        held = f"each of {rounds.num_shards} proxies"
    logger.info(
        f"  {settings.method.mitigation}: {num_rows} samples in {held}, "
        f"{_many(rounds.num_rounds, 'round')} of {_many(rounds.steps_per_round, 'step')} per proxy"
    )
    if settings.canary is not None:
        logger.info(
            f"  Canaries: {settings.canary} of the pictures are shown with a grey border of {settings.canary_border} "
            "pixels, which the model learns"
        )
    if prior is not None:
        logger.info(
            f"  Prior preservation: {_many(len(prior), 'picture')}, weight {prior.weight:g}; each step also trains on "
            f"{settings.train_batch_size * settings.gradient_accumulation_steps * run.layout.size} of them, which "
            "about doubles its time"
        )


def train(
    settings: RunSettings,
    say: Callable[[str], None] = print,
    comparer: Comparer | None = None,
    callbacks: Sequence[Callback] = (),
) -> None:
    """Train, and write what a run leaves behind.

    Args:
        say: takes what the user must read whatever the log shows.
        comparer: for ``monitor_images``: makes what compares drawn images with the training images, such as
            ``ietagc_diffusers.eval.monitor.comparer``.
        callbacks: asked after the run's own.

    Raises:
        UsageError: settings, rows or a checkpoint that will not do, or a folder that another training is in.
        Diverged: the losses stopped being finite.
    """
    if settings.monitor_images is not None and comparer is None:
        raise ValueError("`monitor_images` needs a `comparer`, such as ietagc_diffusers.eval.monitor.comparer")
    accelerator = set_up(settings)
    folder = RunFolder(settings.output_dir)
    with _entered(folder, accelerator):
        _train(settings, accelerator, folder, say, comparer, callbacks)


@contextmanager
def _entered(folder: RunFolder, accelerator: Accelerator) -> Iterator[None]:
    """Inside, no other training enters the folder. The main process holds it for all, and all hear if it cannot."""
    with ExitStack() as stack:

        def enter():
            stack.enter_context(locked(folder))
            folder.tidy()

        on_main(accelerator, enter)
        yield


def monitor_of(
    settings: RunSettings,
    meter: Meter | None,
    copies: CopyMeter | None,
    run: IterativeEnsemble,
    folder: RunFolder,
    accelerator: Accelerator,
) -> Monitor:
    """The monitor that the settings ask for."""
    family = run.weights.family

    @contextmanager
    def at_base():
        """Within it the model is the one that the training started from, which is no longer on the device."""
        with family.at_base(), accelerator.autocast():
            for module in family.trained.values():
                module.to(accelerator.device)
            yield

    from_scratch = settings.pretrained_model_name_or_path is None
    return Monitor(accelerator, folder, settings, meter, copies, None if from_scratch else at_base)


def _repository(settings: RunSettings, accelerator: Accelerator) -> hub.Repository | None:
    """Where the result is uploaded, made by the main process; all processes hear if it cannot be."""
    if not settings.push_to_hub:
        return None
    repository = settings.repository

    def name() -> str:
        try:  # the others wait meanwhile
            return replace(repository, patience=hub.Patience(longest=30.0)).create().name
        except hub.UploadError as error:
            raise UsageError(f"`push_to_hub` {repository.name}: {error}") from error

    return replace(repository, name=of_main(accelerator, name))


def _push(
    settings: RunSettings, repository: hub.Repository, write_card: Callable[[str], None], say: Callable[[str], None]
) -> None:
    """Upload the result. The training was good whatever comes of it: a failure is said, and what to do later."""
    folder = RunFolder(settings.output_dir)
    try:
        write_card(repository.name)
        logger.info(f"Uploaded: {hub.upload(folder, repository, 'End of training')}")
    except Exception as error:  # of the network, the Hub, the disk, or a card that someone wrote
        words = ["ietagc", "push", str(folder.path), repository.name]
        words += ["--revision", repository.revision] if repository.revision else []
        say(
            f"The trained model is in {folder.path}, whole, but not on the Hub: {one_line(error)}\n"
            f"Upload it later with: {shlex.join(words)}"
        )


def _train(
    settings: RunSettings,
    accelerator: Accelerator,
    folder: RunFolder,
    say: Callable[[str], None],
    comparer: Comparer | None,
    more: Sequence[Callback],
) -> None:
    if isinstance(settings, BaseModelSettings):
        settings.pretrained_model_name_or_path = folder_of(
            settings.pretrained_model_name_or_path,
            settings.model_config,
            settings.cache_dir,
            setting="pretrained_model_name_or_path",
        )
    found = find_checkpoint(settings, folder, accelerator.is_main_process)
    take_over(settings, found)
    seed = agree_on_seed(settings)
    repository = _repository(settings, accelerator)
    compares: Any = None
    if settings.monitor_images is not None and comparer is not None:
        compares = on_main(accelerator, lambda: comparer(settings, accelerator.device))
    family = load_family(settings, accelerator)
    if accelerator.is_main_process:
        family.pipeline()  # what the end needs is proved before the first step
    average = moving_average(family, settings, accelerator.device)
    condition = family.condition(settings, settings.method)
    rows, groups, others, left_out = load_rows(settings, condition, accelerator)
    prior = PriorSet.load(settings, family, accelerator)
    heldout = HeldoutSet.of(others, settings, condition, view_of(settings, family))
    canaries = canary_keys(rows, settings)
    meter = on_main(accelerator, lambda: Meter.of(rows, others, settings, family, canaries))  # only it measures
    buckets = settings.method.bank_buckets
    extend(settings, found)
    run, budget = build_run(settings, accelerator, family, average, condition, rows, groups, prior, heldout, canaries)
    marks = fingerprint(settings, rows, condition, run, buckets, prior, heldout)
    resume(settings, run, found, marks, folder)
    settings.method = replace(settings.method, bank_buckets=buckets)
    if accelerator.is_main_process:
        values = settings.values().items()
        simple = {key: value for key, value in values if isinstance(value, (bool, int, float, str))}
        accelerator.init_trackers(settings.tracker_project_name, simple)
        records.write_config(settings, folder)
        records.write_training_set(settings, rows, condition.columns, folder, fingerprints(folder), left_out, canaries)
    _announce(settings, run, budget, len(rows), prior)
    account = PrivacyAccount.of(settings, budget.visits_per_step, run.plan.shards)
    if account is not None:
        logger.info(f"  DP-SGD will end at {in_words(account.spent(run.rounds.steps_per_proxy), account.delta)}")
    cost = cost_of(settings, family, run.layout, isinstance(run.weights.place, Disk))
    logger.info(f"  {describe(cost, run.rounds, settings.checkpointing_steps, settings.checkpoints_total_limit)}")
    validation, (per_prompt, every) = None, settings.validation
    if settings.drawn and per_prompt:
        validation = Validation(accelerator, settings.drawn, every, budget.steps_per_epoch, seed, per_prompt)
    monitor = None
    if settings.is_monitored:
        copies = CopyMeter.of(rows, settings, family, None if compares is None else compares(rows))
        monitor = monitor_of(settings, meter, copies, run, folder, accelerator)
    saved = None
    if settings.saved_every is not None:
        saved = SavedEpochs(folder, settings.saved_every, budget.steps_per_epoch)
    uploads = None
    if repository and settings.hub_strategy != "end":
        uploads = Uploads(
            folder,
            repository,
            settings.checkpointing_steps if settings.hub_strategy == "checkpoint" else None,
            lambda run, place: hub.write_card(settings, repository.name, [], run.rows, family.tags, place),
        )
    sample_ids = rows[SAMPLE_ID]
    progress = Progress(accelerator.is_local_main_process)
    checkpoints = Checkpoints(folder, marks, settings.checkpointing_steps, settings.checkpoints_total_limit)
    signals = Signals(checkpoints, settings.log_every, say)
    callbacks = [
        progress,
        StepLog(accelerator, progress, settings.log_every),
        *([FileLosses(accelerator, file_names(rows, settings.image_column))] if settings.debug_loss else []),
        NonFinite(sample_ids, settings.max_nonfinite),
        BadSamples(folder, sample_ids, None if settings.replaces_bad_samples else signals.stop),
        *([PrivacySpent(accelerator, account)] if account else []),
        RoundRecords(folder),
        *([validation] if validation else []),
        *([monitor] if monitor else []),
        *([SavedRounds(folder)] if settings.save_rounds else []),
        *([saved] if saved else []),
        checkpoints,
        *([uploads] if uploads else []),
        signals,
        *more,
    ]
    finished = run.run(callbacks)
    if signals.fault is not None:
        accelerator.end_training()
        raise signals.fault
    ended = finished or (monitor is not None and monitor.stopped)
    if ended:
        records.write_sample_counts(run, rows, folder)
        if accelerator.is_main_process:
            if monitor:
                monitor.restore(run)
            if settings.save_shards:
                records.save_shards(run, rows, folder)
            checkpoints.save_pipeline(run)
            if saved:
                saved.clear()
            if validation:
                validation.draw(run)
            logger.info(f"Saved to {folder.path}")
    accelerator.end_training()
    if ended and repository and accelerator.is_main_process:  # by now no process waits for another
        images = validation.images if validation else []
        _push(
            settings,
            repository,
            lambda name: hub.write_card(settings, name, images, run.rows, family.tags),
            say,
        )
