"""The paper's Figs. 3, 6, 7, 8 and 9, from scored models and a training run."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pyarrow.parquet as pq
import torch
from matplotlib.figure import Figure
from PIL import Image

from ietagc_diffusers.errors import UsageError
from ietagc_diffusers.families import family_of
from ietagc_diffusers.run_folder import RunFolder
from ietagc_diffusers.training.fixed_losses import FixedLosses

from .adapters import base_of_run
from .features import Pixels, embed
from .image_sets import BadImage, ImageSet
from .losses import shown
from .neighbours import nearest_l2
from .plots import COLOURS, GREY, as_label, plot_similarities, png
from .report import Scored, same_prompt_and_seed
from .score import images_of
from .told import told_by

GROUP = 256  # images in a group of Figs. 3 and 8
LEVELS = 20  # noise levels in Fig. 3
COLUMNS = 8


def draw_all(
    output: Path,
    scored: list[Scored],
    run: Path | None = None,
    training: ImageSet | None = None,
    device: str = "cpu",
) -> dict[str, str | None]:
    """Draw every figure that the inputs allow into ``output``.

    Args:
        scored: scored models; the first is the one of Fig. 3.
        run: a training run's folder; training: the images that it was trained on.

    Returns:
        {file name: None, or why it was not drawn}.
    """
    output.mkdir(parents=True, exist_ok=True)
    first = scored[0] if scored else None
    # Of each figure the function, and its arguments by the settings that give them.
    wanted: dict[str, tuple[Callable[..., Figure], dict[str, Any]]] = {
        "fig3.png": (partial(fig3, device=device), {"scores": first, "run": run, "train": training}),
        "fig6.png": (fig6, {"scores": scored}),
        "fig7.png": (fig7, {"scores": scored}),
        "fig8.png": (fig8, {"run": run, "train": training}),
        "fig9.png": (fig9, {"run": run}),
    }
    return {name: _draw(draw, needed, output / name) for name, (draw, needed) in wanted.items()}


def _draw(draw: Callable[..., Figure], needed: dict[str, Any], path: Path) -> str | None:
    """Draw one figure if its arguments are there. Returns None, or why it was not drawn."""
    missing = [f"`{setting}`" for setting, value in needed.items() if not value]
    if missing:
        return f"needs {' and '.join(missing)}"
    try:
        png(draw(*needed.values()), path)
    except (UsageError, BadImage) as error:
        return str(error)
    return None


def fig3(scored: Scored, run: Path, training: ImageSet, device: str = "cpu") -> Figure:
    """Loss at each timestep of the training images that generations are most similar to, and of others.

    Up to 256 of each; the same noise for all. With fewer than 512 training images, a quarter of them each.
    """
    config = RunFolder(run).config()
    resolution, told = config.get("resolution", 512), told_by(config, run)
    closest: dict[str, float] = {}
    for name, similarity in zip(scored.nearest["nearest"], scored.nearest["similarity"], strict=True):
        closest[name] = max(similarity, closest.get(name, -1))
    order = sorted((i for i, _ in told.of_training(training)), key=lambda i: -closest.get(training.names[i], -1))
    size = min(GROUP, len(order) // 4)
    if size < 2:
        raise UsageError(f"`train` {training.source}: Fig. 3 needs at least 8 images{told.needed}")
    others = np.random.default_rng(0).choice(order[len(order) // 2 :], size, replace=False).tolist()
    base = base_of_run(run)  # of a run that left an adapter
    family = family_of(base or run, setting="run").load_frozen(str(base or run), device=device, setting="run")
    denoiser = family.load_adapted(base, run) if base else family.load_denoiser(run, family.denoiser_name)
    denoiser = denoiser.to(device).eval()
    figure, axes = plt.subplots(figsize=(6.4, 4))
    for label, rows, colour in (("memorized", order[:size], COLOURS[0]), ("not memorized", others, COLOURS[1])):
        images, values = shown(training.select(rows), resolution, size, told=told)
        with family.text_adapted(run) if base else nullcontext():
            losses = FixedLosses(family, images, values, draws=LEVELS, sweep=True)
        by_level = losses.by_draw(denoiser).numpy()
        mean, error = by_level.mean(axis=1), by_level.std(axis=1) / len(rows) ** 0.5
        levels = losses.levels[:, 0]
        axes.plot(levels, mean, color=colour, marker="o", markersize=3, label=f"{label} ({len(rows)})")
        axes.fill_between(levels, mean - error, mean + error, color=colour, alpha=0.2, linewidth=0)
    axes.set_xlabel(family.objective.level_name)
    axes.set_ylabel("loss (band: standard error)")
    axes.set_yscale("log")
    axes.grid(alpha=0.25)
    axes.legend()
    return figure


def fig6(scored: list[Scored]) -> Figure:
    """Histograms of similarity."""
    figure, axes = plt.subplots(figsize=(7, 4))
    plot_similarities(axes, scored)
    return figure


def fig7(scored: list[Scored]) -> Figure:
    """Training images, and the images that each model drew for the same prompt (or label) and seed, where the first
    model copies most.
    """
    by_training_image: dict[str, list] = {}
    for _, drawn in same_prompt_and_seed(scored):
        model, row = drawn[0]
        by_training_image.setdefault(model.nearest["nearest"][row], drawn)
    chosen = list(by_training_image.values())[:COLUMNS]
    if not chosen:
        raise UsageError("`scores`: the models share no prompt and seed")
    sets = {}

    def image(scores: dict[str, Any], side: str, name: str) -> Image.Image:
        source = scores[side]
        if source not in sets:
            sets[source] = images_of(scores, side)
        if name not in sets[source].names:
            raise UsageError(f"`scores`: {source} no longer has {name}")
        return sets[source].image(sets[source].names.index(name))

    models = [model for model, _ in chosen[0]]
    lines = [[image(drawn[0][0].scores, "train", drawn[0][0].nearest["nearest"][drawn[0][1]]) for drawn in chosen]]
    for number, model in enumerate(models):
        names = [model.nearest["file_name"][drawn[number][1]] for drawn in chosen]
        lines.append([image(model.scores, "generated", name) for name in names])
    size = (1.4 * len(chosen), 1.45 * len(lines))
    figure, axes = plt.subplots(len(lines), len(chosen), figsize=size, squeeze=False)
    for label, line, cells in zip(["training", *(m.name for m in models)], lines, axes, strict=True):
        for cell, picture in zip(cells, line, strict=True):
            cell.imshow(np.asarray(picture))
            cell.set_xticks([])
            cell.set_yticks([])
        cells[0].set_ylabel(as_label(label))
    figure.subplots_adjust(wspace=0.04, hspace=0.04)
    return figure


def _skips(run: Path) -> dict[str, list]:
    """How often each sample of a run was visited and skipped."""
    path = RunFolder(run).skip_counts_file
    if not path.is_file():
        raise UsageError(f"`run` {run}: has no ietagc/skip_counts.parquet: not a finished run")
    table = pq.read_table(path).to_pydict()
    if not any(table["skips"]):
        raise UsageError(f"`run` {run}: skipped no sample")
    return table


def energy(pixels: torch.Tensor) -> torch.Tensor:
    """Mean energy of the Fourier coefficients of each image in grey, except the constant one: uint8 (N, 3 * s * s) ->
    (N,).

    By Parseval's theorem this is the variance of its pixels: the greater, the more complex the image.
    """
    side = int((pixels.shape[1] / 3) ** 0.5)
    grey = pixels.float().view(-1, 3, side, side).mean(dim=1) / 255
    spectrum = torch.fft.fft2(grey, norm="ortho").abs().pow(2)
    spectrum[:, 0, 0] = 0
    return spectrum.mean(dim=(1, 2))


def fig8(run: Path, training: ImageSet) -> Figure:
    """Distance to the nearest other training image, and Fourier energy, of the images skipped most and least often."""
    counts = _skips(run)
    rate = np.array(counts["skips"]) / np.maximum(counts["visits"], 1)
    visited = np.flatnonzero(np.array(counts["visits"]) > 0)
    order = visited[np.argsort(-rate[visited], kind="stable")]
    rows = np.array(counts["sample_id"])[order]
    place = {row["sample_id"]: index for index, row in enumerate(training.rows) if row.get("sample_id") is not None}
    if not set(rows.tolist()) <= place.keys():
        raise UsageError(f"`train` {training.source}: has no rows with the run's sample ids; it was trained on others")
    size = min(GROUP, len(rows) // 4)
    if size < 2:
        raise UsageError(f"`train` {training.source}: Fig. 8 needs at least 8 images")
    embedded = embed(training, {"pixels": Pixels(64)}, desc="Reading training images")
    kept = {index: i for i, index in enumerate(embedded.kept)}
    pixels = embedded.features["pixels"]
    distances, _ = nearest_l2(pixels, pixels, 2)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    for label, group, colour in (
        ("skipped most", rows[:size], COLOURS[0]),
        ("skipped least", rows[-size:], COLOURS[1]),
    ):
        chosen = [kept[place[row]] for row in group.tolist() if place[row] in kept]
        style = {"bins": 25, "histtype": "step", "linewidth": 1.8, "color": colour, "label": f"{label} ({len(chosen)})"}
        left.hist(distances[chosen, 1].numpy(), **style)
        right.hist(energy(pixels[chosen]).clamp(min=1e-9).log10().numpy(), **style)
    left.set_xlabel("l2 distance to the nearest other training image")
    right.set_xlabel("log10 of the Fourier energy")
    left.set_ylabel("images")
    left.legend()
    figure.tight_layout()
    return figure


def fig9(run: Path) -> Figure:
    """How often images were skipped."""
    counts = _skips(run)
    skips = np.array(counts["skips"])
    figure, axes = plt.subplots(figsize=(6.4, 4))
    axes.hist(skips, bins=40, color=COLOURS[1])
    ninety = np.percentile(skips, 90)
    axes.axvline(ninety, color=GREY, linestyle="--", label=f"90% of the images are skipped at most {ninety:.0f} times")
    axes.set_xlabel(f"times skipped (of {np.mean(counts['visits']):.0f} visits on average)")
    axes.set_ylabel("images")
    axes.legend()
    return figure
