"""What a finished run leaves behind: pipeline, images, records."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from accelerate.logging import get_logger
from diffusers import StableDiffusionPipeline

from ..arguments import effective_flags
from ..data.samples import SAMPLE_ID
from ..method.config import METHOD_FIELDS

logger = get_logger(__name__)


def build_pipeline(args, models):
    """The base pipeline with the trained UNet in it."""
    return StableDiffusionPipeline.from_pretrained(
        args.pretrained_model_name_or_path,
        vae=models.vae,
        text_encoder=models.text_encoder,
        tokenizer=models.tokenizer,
        unet=models.unet,
        revision=args.revision,
        variant=args.variant,
        cache_dir=args.cache_dir,
    )


class averaged_weights:
    """Within it, the UNet has the moving average's weights, if there is one."""

    def __init__(self, models):
        self.models = models

    def __enter__(self):
        if self.models.ema is not None:
            self.models.ema.store(self.models.unet.parameters())
            self.models.ema.copy_to(self.models.unet.parameters())

    def __exit__(self, *_):
        if self.models.ema is not None:
            self.models.ema.restore(self.models.unet.parameters())


def draw_validation_images(args, accelerator, models):
    """One image a validation prompt, from the seed alone. Leaves the random streams as they are."""
    pipeline = build_pipeline(args, models)
    pipeline.safety_checker = None
    pipeline.set_progress_bar_config(disable=True)
    device = accelerator.device
    generator = torch.Generator(device=device).manual_seed(args.seed)
    images = []
    with torch.autocast(device.type, enabled=models.dtype != torch.float32, dtype=models.dtype):
        for prompt in args.validation_prompts:
            images.append(pipeline(prompt, num_inference_steps=20, generator=generator).images[0])
    return images


def track_images(accelerator, images, prompts, step):
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            stack = np.stack([np.asarray(image) for image in images])
            tracker.writer.add_images("validation", stack, step, dataformats="NHWC")
        elif tracker.name == "wandb":
            import wandb

            pictures = [wandb.Image(image, caption=prompt) for image, prompt in zip(images, prompts, strict=True)]
            tracker.log({"validation": pictures}, step=step)
        else:
            logger.warning(f"Validation images are not sent to {tracker.name}")


def save_pipeline(args, models, folder):
    """The trained pipeline as a folder that diffusers loads, with the moving average's weights if there is one."""
    with averaged_weights(models):
        build_pipeline(args, models).save_pretrained(folder)


def write_config(args):
    """``ietagc/config.yaml``: every effective value, the method's first; itself a recipe that repeats the run."""
    method = [option.name for option in METHOD_FIELDS]
    flags = effective_flags(args)
    others = sorted(flags.keys() - set(method) - {"config", "local_rank", "resume_from_checkpoint"})
    values = {key: flags[key] for key in [*method, *others]}
    shown = {key: list(v) if isinstance(v, tuple) else v for key, v in values.items() if v not in (None, ())}
    (Path(args.output_dir) / "ietagc" / "config.yaml").write_text(yaml.safe_dump(shown, sort_keys=False))


def write_sample_counts(args, ensemble, rows):
    """``ietagc/skip_counts.parquet``: which of the training images are easily memorized. Called by all processes."""
    visits, skips = ensemble.sample_counts()
    if not ensemble.layout.is_main:
        return
    shard = np.full(len(rows), -1)
    for k, samples in enumerate(ensemble.plan.shards):
        shard[samples] = k
    table = {SAMPLE_ID: rows[SAMPLE_ID], "visits": visits.numpy(), "skips": skips.numpy(), "shard": shard}
    pq.write_table(pa.table(table), Path(args.output_dir) / "ietagc" / "skip_counts.parquet")


def save_shards(args, ensemble, rows):
    """Each shard of the final plan as a dataset of its own."""
    for k, samples in enumerate(ensemble.plan.shards):
        rows.select(samples).save_to_disk(Path(args.output_dir) / "ietagc" / "shards" / f"shard-{k}")
