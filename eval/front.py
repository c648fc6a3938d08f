"""The front: held-out denoising loss (quality) against its gap to the training loss (memorization), along the course of
a run.

Sampling-free and precise: noise and timesteps are fixed. Plain training stopped at any point is the control that
every claim must beat.
"""

import csv
import json
import re
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from tqdm.auto import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from ietagc_diffusers.objectives import TextToImageObjective

GOLDEN_RATIO = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class FrontPoint:
    """A model on the front: mean losses over the training images and over held-out images.

    gap: held-out minus training loss, less the base model's, which is no memorization but the two sets' unequal
    difficulty: a run starts at gap 0.
    """

    run: str
    step: int
    train_loss: float
    heldout_loss: float
    gap: float


class FixedLosses:
    """Denoising losses of images under fixed noise and timesteps, so that models can be compared to a few
    ten-thousandths.

    Args:
        base: folder or Hub id of the pipeline whose VAE, text encoder and scheduler the models share.
        images: float32 (N, 3, H, W) in [-1, 1]; captions: N strings.
        draws: noise draws an image, each at another timestep.
        prediction_type: the scheduler's, if the runs were trained with another than the base's.
    """

    def __init__(self, base, images, captions, draws=3, seed=0, prediction_type=None, device="cpu", batch_size=100):
        scheduler = DDPMScheduler.from_pretrained(base, subfolder="scheduler")
        if prediction_type is not None:
            scheduler.register_to_config(prediction_type=prediction_type)
        tokenizer = CLIPTokenizer.from_pretrained(base, subfolder="tokenizer")
        text_encoder = CLIPTextModel.from_pretrained(base, subfolder="text_encoder").to(device, torch.float32)
        vae = AutoencoderKL.from_pretrained(base, subfolder="vae").to(device, torch.float32)
        self.objective = TextToImageObjective(vae, text_encoder, scheduler)
        tokens = tokenizer(
            captions, max_length=tokenizer.model_max_length, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        # Timesteps spread evenly over the range: fewer draws for the same precision than random ones.
        timesteps = (np.arange(draws * len(images)) * GOLDEN_RATIO % 1 * self.objective.num_timesteps).astype(np.int64)
        timesteps = torch.from_numpy(timesteps).view(draws, len(images))
        self.batches = []
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for draw in range(draws):
                for rows in torch.arange(len(images)).split(batch_size):
                    batch = {"pixel_values": images[rows].to(device), "input_ids": tokens[rows].to(device)}
                    drawn = self.objective.draw(batch)
                    drawn.timesteps.copy_(timesteps[draw, rows])
                    self.batches.append((rows, drawn))
        self.num_images, self.draws = len(images), draws

    @torch.no_grad()
    def __call__(self, unet):
        """Mean loss of each image over its draws: float32 (N,)."""
        losses = torch.zeros(self.num_images)
        for rows, drawn in self.batches:
            losses[rows] += self.objective.losses(unet, drawn).cpu()
        return losses / self.draws


def saved_models(run_dir):
    """The models a run left behind along its way: [(step, UNet folder)], in order.

    Rounds saved with ``--save_rounds`` if there are any, else checkpoints; moving averages where there are any.
    """
    run_dir = Path(run_dir)
    rounds = sorted((run_dir / "rounds").glob("round-*"))
    if rounds:
        rows = map(json.loads, (run_dir / "ietagc" / "rounds.jsonl").read_text().splitlines())
        step_of = {row["round"]: row["global_step"] for row in rows}
        return [(step_of[int(path.name.split("-")[1])], path / "unet") for path in rounds]
    checkpoints = {
        int(m[1]): p for p in run_dir.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))
    }
    return [
        (step, path / ("unet_ema" if (path / "unet_ema").is_dir() else "unet"))
        for step, path in sorted(checkpoints.items())
    ]


def measure(base, runs, train, heldout, draws=3, seed=0, device="cpu", prediction_type=None):
    """The front of each run.

    Args:
        base: the pipeline all runs started from; it is every run's first point.
        runs: {name: run folder}.
        train, heldout: pairs (images, captions), see ``FixedLosses``; held-out images come from the same distribution.

    Returns:
        List of ``FrontPoint``.
    """
    options = {"draws": draws, "seed": seed, "device": device, "prediction_type": prediction_type}
    train_losses, heldout_losses = FixedLosses(base, *train, **options), FixedLosses(base, *heldout, **options)
    models = [(name, step, folder) for name, run_dir in runs.items() for step, folder in saved_models(run_dir)]

    def losses(folder, **where):
        unet = UNet2DConditionModel.from_pretrained(folder, **where).to(device).eval()
        return train_losses(unet).mean().item(), heldout_losses(unet).mean().item()

    start = losses(base, subfolder="unet")
    difficulty = start[1] - start[0]
    points = [FrontPoint(name, 0, *start, gap=0.0) for name in runs]
    for name, step, folder in tqdm(models, desc="Front"):
        train_loss, heldout_loss = losses(folder)
        points.append(FrontPoint(name, step, train_loss, heldout_loss, heldout_loss - train_loss - difficulty))
    return points


def at_gap(points, gap):
    """Held-out loss of a run where it first reaches ``gap``, linearly between its points; None if it never does."""
    points = sorted(points, key=lambda p: p.step)
    for before, after in pairwise(points):
        if before.gap <= gap <= after.gap:
            share = (gap - before.gap) / (after.gap - before.gap) if after.gap > before.gap else 1.0
            return before.heldout_loss + share * (after.heldout_loss - before.heldout_loss)
    return None


def by_run(points):
    runs = {}
    for point in points:
        runs.setdefault(point.run, []).append(point)
    return runs


def write_csv(points, path):
    with Path(path).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["run", "step", "train_loss", "heldout_loss", "gap"])
        for p in points:
            writer.writerow(asdict(p).values())
