"""The front: held-out denoising loss (quality) against its gap to the training loss (memorization), along the course of
a run.

Sampling-free and precise: noise and timesteps are fixed. Plain training stopped at any point is the control that
every claim must beat.
"""

import csv
import hashlib
import json
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from tqdm.auto import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from ietagc_diffusers.errors import UsageError
from ietagc_diffusers.families.text_to_image import TextToImageObjective
from ietagc_diffusers.files import read_json_lines

from .generate import model_hash

GOLDEN_RATIO = (5**0.5 - 1) / 2
DRAWN_TOGETHER = 100  # images whose noise is one draw


@dataclass(frozen=True)
class FrontPoint:
    """A model on the front: mean losses over the training images and over held-out images.

    gap: held-out minus training loss, less the base model's, which is no memorization but the two sets' unequal
    difficulty: a run starts at gap 0. replicate: which of the run's seeds. sampled: scores of images that the model
    drew, if it was asked to.
    """

    run: str
    step: int
    train_loss: float
    heldout_loss: float
    gap: float
    replicate: int = 0
    sampled: dict | None = None


def _centred(images):
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images


class FixedLosses:
    """Denoising losses of images under fixed noise and timesteps, so that models can be compared to a few
    ten-thousandths.

    Args:
        base: folder or Hub id of the pipeline whose VAE, text encoder and scheduler the models share.
        images: float32 (N, 3, H, W) in [-1, 1], or uint8; captions: N strings.
        draws: noise draws an image, each at another timestep.
        prediction_type: the scheduler's, if the runs were trained with another than the base's.
        batch_size: images at once; the draws do not depend on it.
        sweep: each draw is at one timestep for all images, over the range; ``self.sweep`` has them.
    """

    def __init__(
        self, base, images, captions, draws=3, seed=0, prediction_type=None, device="cpu", batch_size=100, sweep=False
    ):
        try:
            scheduler = DDPMScheduler.from_pretrained(base, subfolder="scheduler")
            tokenizer = CLIPTokenizer.from_pretrained(base, subfolder="tokenizer")
            text_encoder = CLIPTextModel.from_pretrained(base, subfolder="text_encoder", dtype=torch.float32)
            vae = AutoencoderKL.from_pretrained(base, subfolder="vae", dtype=torch.float32)
        except (OSError, ValueError) as error:
            raise UsageError(
                f"--base {base}: no Stable Diffusion that loads: {' '.join(str(error).split())}"
            ) from error
        if prediction_type is not None:
            scheduler.register_to_config(prediction_type=prediction_type)
        vae.enable_slicing()  # one image at a time: the widest activations are its encoder's
        self.objective = TextToImageObjective(vae.to(device), text_encoder.to(device), scheduler)
        self.device, self.batch_size = device, batch_size
        tokens = tokenizer(
            captions, max_length=tokenizer.model_max_length, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        # Timesteps spread evenly over the range: fewer draws for the same precision than random ones.
        timesteps = (np.arange(draws * len(images)) * GOLDEN_RATIO % 1 * self.objective.num_timesteps).astype(np.int64)
        timesteps = torch.from_numpy(timesteps).view(draws, len(images))
        if sweep:
            self.sweep = torch.linspace(0, self.objective.num_timesteps - 1, draws).round().long()
            timesteps = self.sweep[:, None].expand(draws, len(images))
        self.batches = []
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for draw in range(draws):
                for rows in torch.arange(len(images)).split(DRAWN_TOGETHER):
                    batch = {"pixel_values": _centred(images[rows]).to(device), "input_ids": tokens[rows].to(device)}
                    drawn = self.objective.draw(batch)
                    drawn.timesteps.copy_(timesteps[draw, rows])
                    self.batches.append((draw, rows, drawn.to("cpu")))
        self.num_images, self.draws = len(images), draws

    @torch.no_grad()
    def by_draw(self, unet):
        """Loss of each image at each draw: float32 (draws, N)."""
        losses = torch.zeros(self.draws, self.num_images)
        for draw, rows, drawn in self.batches:
            for some in torch.arange(len(rows)).split(self.batch_size):
                losses[draw, rows[some]] = self.objective.losses(unet, drawn[some].to(self.device)).cpu()
        return losses

    def __call__(self, unet):
        """Mean loss of each image over its draws: float32 (N,)."""
        return self.by_draw(unet).mean(dim=0)


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


class Losses:
    """Mean training and held-out loss of a UNet under fixed noise; measured models are remembered in a file.

    Args:
        base: the pipeline all runs started from.
        train, heldout: pairs (images, captions), see ``FixedLosses``; held-out images come from the same distribution.
        memory: JSON-lines file, or None.
        options: of ``FixedLosses``.
    """

    def __init__(self, base, train, heldout, memory=None, **options):
        self.sets = [FixedLosses(base, *images, **options) for images in (train, heldout)]
        self.device = options.get("device", "cpu")
        shown = {k: str(v) for k, v in options.items() if k != "batch_size"}
        origin = model_hash(base) if Path(base).is_dir() else str(base)
        digest = hashlib.blake2b(json.dumps([origin, shown]).encode())
        for images, captions in (train, heldout):
            for image in images:
                digest.update(image.numpy().tobytes())
            digest.update(json.dumps(captions).encode())
        self.conditions = digest.hexdigest()[:16]
        self.memory = memory
        rows = [] if memory is None else read_json_lines(memory)
        self.known = {key: tuple(losses) for key, *losses in rows}

    def __call__(self, folder, subfolder=None):
        """(training loss, held-out loss) of the UNet in a folder, or in a pipeline's subfolder."""
        key = self.conditions + weights_hash(Path(folder) / (subfolder or "."))
        if key not in self.known:
            where = {} if subfolder is None else {"subfolder": subfolder}
            unet = UNet2DConditionModel.from_pretrained(folder, **where).to(self.device).eval()
            self.known[key] = tuple(losses(unet).mean().item() for losses in self.sets)
            if self.memory is not None:
                with Path(self.memory).open("a") as file:
                    file.write(json.dumps([key, *self.known[key]]) + "\n")
        return self.known[key]


def weights_hash(folder):
    """A hash of the weight files in a folder; of its name if it is a Hub id."""
    digest = hashlib.blake2b(digest_size=8)
    files = sorted(path for path in Path(folder).glob("*") if path.suffix in (".safetensors", ".bin"))
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest() if files else str(folder)


def measure(base, runs, train, heldout, memory=None, points=None, **options):
    """The front of each run.

    Args:
        base: the pipeline all runs started from; it is every run's first point.
        runs: {name: run folder, or a list of them, one a seed}.
        train, heldout, memory, options: of ``Losses``.
        points: at most so many models of a run, evenly spread, the last among them; None is all.

    Returns:
        List of (``FrontPoint``, UNet folder or None for the base).
    """
    losses = Losses(base, train, heldout, memory, **options)
    start = losses(base, subfolder="unet")
    difficulty = start[1] - start[0]
    folders = [
        (name, replicate, run_dir)
        for name, run_dirs in runs.items()
        for replicate, run_dir in enumerate(run_dirs if isinstance(run_dirs, (list, tuple)) else [run_dirs])
    ]
    models = [(*run, *model) for *run, run_dir in folders for model in spread(saved_models(run_dir), points)]
    measured = [(FrontPoint(name, 0, *start, 0.0, replicate), None) for name, replicate, _ in folders]
    for name, replicate, step, folder in tqdm(models, desc="Front"):
        train_loss, heldout_loss = losses(folder)
        gap = heldout_loss - train_loss - difficulty
        measured.append((FrontPoint(name, step, train_loss, heldout_loss, gap, replicate), folder))
    return measured


def spread(models, points):
    """``points`` of a list, evenly spread, its last among them."""
    if points is None or len(models) <= points:
        return models
    return [models[round((i + 1) * len(models) / points) - 1] for i in range(points)]


def crossing(points, x, y, value):
    """``y`` of one run where its ``x`` first reaches ``value``, linearly between its points; None if it never does.

    x, y: functions of a point.
    """
    points = sorted(points, key=lambda p: p.step)
    for before, after in pairwise(points):
        low, high = x(before), x(after)
        if min(low, high) <= value <= max(low, high):
            share = (value - low) / (high - low) if high != low else 1.0
            return y(before) + share * (y(after) - y(before))
    return None


def _gap(point):
    return point.gap


def _heldout(point):
    return point.heldout_loss


def at_gap(points, gap):
    """Held-out loss of one run where it first reaches ``gap``, or None."""
    return crossing(points, _gap, _heldout, gap)


def at_loss(points, loss):
    """Gap of one run where its held-out loss first reaches ``loss``, or None."""
    return crossing(points, _heldout, _gap, loss)


def by_run(points):
    """{run: its points}, of all its seeds."""
    runs = {}
    for point in points:
        runs.setdefault(point.run, []).append(point)
    return runs


def replicates(points):
    """The points of one run, seed by seed: a list of lists."""
    seeds = {}
    for point in points:
        seeds.setdefault(point.replicate, []).append(point)
    return list(seeds.values())


def over_seeds(points, find, value):
    """``find(points of a seed, value)`` of each seed of a run: a list, or None if some seed has none."""
    found = [find(seed, value) for seed in replicates(points)]
    return None if None in found else found


@dataclass(frozen=True)
class Comparison:
    """A run against the control: differences of seeds' means, where below zero is better.

    at_gap: {gap: held-out loss less the control's}; at_loss: {held-out loss: gap less the control's}.
    """

    run: str
    at_gap: dict
    at_loss: dict


def compare(points, control, steps=8):
    """Each run against the run ``control``, at ``steps`` gaps and at as many held-out losses that both reach."""
    runs = by_run(points)
    plain = runs[control]
    comparisons = []
    for name, run in runs.items():
        if name == control:
            continue
        widest = min(max(p.gap for p in seed) for group in (run, plain) for seed in replicates(group))
        lowest = max(min(p.heldout_loss for p in seed) for group in (run, plain) for seed in replicates(group))
        start = min(p.heldout_loss for p in plain if p.step == 0)
        gaps = [widest * (i + 1) / steps for i in range(steps)] if widest > 0 else []
        losses = [lowest + (start - lowest) * i / (2 * steps) for i in range(steps)] if lowest < start else []
        comparisons.append(
            Comparison(name, _differences(run, plain, at_gap, gaps), _differences(run, plain, at_loss, losses))
        )
    return comparisons


def _differences(run, plain, find, values):
    found = {}
    for value in values:
        ours, theirs = over_seeds(run, find, value), over_seeds(plain, find, value)
        if ours is not None and theirs is not None:
            found[value] = sum(ours) / len(ours) - sum(theirs) / len(theirs)
    return found


SAMPLED = ("sim_score", "copy_rate", "memorized_quantity_0.4", "frechet", "kernel")


def write_csv(points, path):
    """One row a point: losses and gap, then what was sampled, if anything was."""
    with Path(path).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["run", "replicate", "step", "train_loss", "heldout_loss", "gap", *SAMPLED])
        for p in points:
            sampled = [(p.sampled or {}).get(key, "") for key in SAMPLED]
            writer.writerow([p.run, p.replicate, p.step, p.train_loss, p.heldout_loss, p.gap, *sampled])
