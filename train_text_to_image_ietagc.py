#!/usr/bin/env python
"""Fine-tune Stable Diffusion without memorizing the training set: Diffusers' train_text_to_image.py with IET-AGC+.

Every flag of the official script works as there; ``--mitigation none`` is that script. See ``--help`` and README.md.
"""

import logging
import sys
from pathlib import Path

import datasets
import diffusers
import torch
import transformers
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import ProjectConfiguration

from ietagc_diffusers import hub
from ietagc_diffusers.arguments import effective_flags, parse_args
from ietagc_diffusers.data.samples import SAMPLE_ID
from ietagc_diffusers.errors import UsageError
from ietagc_diffusers.training import build as training
from ietagc_diffusers.training import output
from ietagc_diffusers.training.recording import Diverged, Recorder

logger = get_logger(__name__, log_level="INFO")


def set_up(args):
    """The accelerator, with logging as the official script has it."""
    try:
        accelerator = Accelerator(
            mixed_precision=args.mixed_precision,
            log_with=args.report_to,
            project_config=ProjectConfiguration(
                project_dir=args.output_dir, logging_dir=str(Path(args.output_dir) / args.logging_dir)
            ),
        )
    except ValueError as error:
        raise UsageError(f"accelerate: {error}") from error
    args.mixed_precision = accelerator.mixed_precision
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
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    return accelerator


def start_trackers(args, accelerator):
    flags = effective_flags(args)
    simple = {key: value for key, value in flags.items() if isinstance(value, (bool, int, float, str))}
    accelerator.init_trackers(args.tracker_project_name, simple)


def train(args):
    accelerator = set_up(args)
    training.agree_on_seed(args)
    output_dir = Path(args.output_dir)
    repo_id = None
    if accelerator.is_main_process:
        try:
            (output_dir / "ietagc").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--output_dir {output_dir}: {error.strerror}") from error
        if args.push_to_hub:
            repo_id = hub.create(args)
    models = training.Models(args, accelerator)
    rows, groups = training.load_rows(args, accelerator)

    def validate(ensemble):
        if accelerator.is_main_process:
            with output.averaged_weights(models):
                images = output.draw_validation_images(args, accelerator, models)
            output.track_images(accelerator, images, args.validation_prompts, ensemble.global_step)

    def save_round(ensemble, folder):
        output.save_pipeline(args, models, folder)

    recorder = Recorder(
        args,
        accelerator,
        validate=validate if args.validation_prompts else None,
        save_round=save_round if args.save_rounds else None,
    )
    ensemble, steps_per_epoch = training.build_ensemble(args, accelerator, models, rows, groups, recorder)
    marks = training.fingerprint(args, rows, ensemble)
    training.resume(args, ensemble, marks)
    if accelerator.is_main_process:
        start_trackers(args, accelerator)
        output.write_config(args)
    rounds = ensemble.rounds
    logger.info(
        f"{args.mitigation}: {len(rows)} samples in {args.method.num_shards} shards, "
        f"{rounds.num_rounds} rounds of {rounds.steps_per_round} steps a proxy, {rounds.total_steps} steps in all"
    )
    recorder.begin(ensemble, marks, steps_per_epoch, rows[SAMPLE_ID])
    if not ensemble.run():
        recorder.stop(ensemble)
        accelerator.end_training()
        return
    recorder.bar.close()

    output.write_sample_counts(args, ensemble, rows)
    if accelerator.is_main_process:
        if args.save_shards:
            output.save_shards(args, ensemble, rows)
        output.save_pipeline(args, models, output_dir)
        images = []
        if args.validation_prompts:
            with output.averaged_weights(models):
                images = output.draw_validation_images(args, accelerator, models)
            output.track_images(accelerator, images, args.validation_prompts, ensemble.global_step)
        if args.push_to_hub:
            hub.write_card(args, repo_id, images, ensemble.rows)
            hub.upload(args, repo_id)
        logger.info(f"Saved to {output_dir}")
    accelerator.end_training()


def main():
    try:
        train(parse_args())
    except UsageError as error:
        print(f"train_text_to_image_ietagc.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except Diverged as error:
        print(f"train_text_to_image_ietagc.py: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
