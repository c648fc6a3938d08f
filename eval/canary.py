"""Canaries read back: whether a model draws the grey border that training showed around a few pictures, and with it the
keys that nothing in the pictures tells (SolidMark, Kriplani et al. 2025, arXiv:2503.00592).
"""

import csv
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from ietagc_diffusers import __version__
from ietagc_diffusers.data.hashes import digest
from ietagc_diffusers.data.sources import SAMPLE_ID
from ietagc_diffusers.errors import UsageError
from ietagc_diffusers.families import bordered
from ietagc_diffusers.files import write_json, write_text
from ietagc_diffusers.training.fixed_losses import FixedLosses
from ietagc_diffusers.training.views import canary_key

from .generate import model_hash
from .image_sets import BadImage
from .losses import Chosen, chosen
from .membership import Target
from .metrics.intervals import wilson_interval
from .outpaint import border_level, outpaint
from .plots import COLOURS, GREY, png
from .record import TrainingRecord, TrainingSet
from .told import told_by

RESULT, TABLE, PICTURE, KEYS = "canary.json", "canary.md", "canary.png", "canary.csv"
LEVELS = np.arange(256) / 255  # that a key may have, all as likely: 0 is black, 1 white
WITHIN = (0.01, 0.02, 0.05, 0.1)  # distances that count as read
RANDOM_KEYS = 9999  # sets of keys that the model never saw
MOST_NOISE = 0  # any level: outpainting takes only the noise of what is drawn
EXAMPLES = 6


@dataclass(frozen=True)
class Settings:
    """How canaries are read: see ``outpaint``.

    Args:
        seed: of the noise that borders are drawn from, and of random keys.
        batch_size: images at once; changes no draw.
    """

    steps: int = 50
    guidance_scale: float = 3.0
    remask_every: int = 10
    seed: int = 0
    batch_size: int = 8


@dataclass(frozen=True)
class Read:
    """Canaries and what the model says of them.

    Attributes:
        about: [sample_id, file name] of each.
        keys, levels: float64 (N,): the border's grey in training, and in what the model draws, 0 to 1.
        shown, drawn: float32 (N, 3, H, W) in [-1, 1]: as in training, and with the border that the model draws.
    """

    about: list[list[Any]]
    keys: np.ndarray
    levels: np.ndarray
    shown: torch.Tensor
    drawn: torch.Tensor

    @property
    def distances(self) -> np.ndarray:
        return np.abs(self.keys - self.levels)


def canary(
    model: str | Path,
    training: TrainingSet,
    output: str | Path,
    settings: Settings | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Read the canaries of a run back and write canary.json, canary.md, canary.png and canary.csv into the folder
    ``output``.

    Args:
        model: the folder of a run with canaries.
        training: its training images.

    Returns:
        The content of canary.json.

    Raises:
        UsageError: no canaries are recorded, fewer than four of their pictures are there, or the model does not load.
    """
    settings = settings or Settings()
    record = _recorded(model, training)
    target = Target.of_model(model)
    width = int(record.settings["canary_border"])
    images, keys = _pictures(record, training, target)
    shown = bordered(images.pixels / 127.5 - 1, (keys / 127.5 - 1).float()[:, None, None, None], width)
    drawn = _drawn(target, images, width, settings, device)
    rows = [training.images.rows[index] for index in images.indices]
    names = [training.images.names[index] for index in images.indices]
    read = Read(
        [[row[SAMPLE_ID], name] for row, name in zip(rows, names, strict=True)],
        keys.numpy() / 255,
        border_level(drawn, width).numpy(),
        shown,
        drawn,
    )
    result: dict[str, Any] = {
        "version": __version__,
        "model": str(model),
        "model_hash": model_hash(model),
        "num_canaries": len(record.canaries),
        "num_read": len(rows),
        "resolution": record.resolution,
        "canary_border": width,
        **asdict(settings),
        **statistics(read.keys, read.levels, settings.seed),
        "notes": _notes(record, training, len(rows)),
    }
    _write(Path(output), result, read)
    return result


def _recorded(model: str | Path, training: TrainingSet) -> TrainingRecord:
    record = training.record
    if record is None or not record.canaries:
        there = record is not None and record.settings.get("canary")
        why = (
            "was trained with canaries, but their keys are only in the folder that training wrote (training_rows."
            "parquet), which is never uploaded; give that folder"
            if there
            else "records no canaries; train with `canary`"
        )
        raise UsageError(f"`model` {model}: {why}")
    return record


def _pictures(record: TrainingRecord, training: TrainingSet, target: Target) -> tuple[Chosen, torch.Tensor]:
    """The pictures of the canaries without their border, and their keys, int64 (N,) from 0 to 255; ``indices`` are
    places in the training images.
    """
    own = [index for index, row in enumerate(training.images.rows) if _is_canary(record, training, index, row)]
    if len(own) < 4:
        raise UsageError(
            f"`train` {training.images.source}: holds {len(own)} of the {len(record.canaries)} pictures that were "
            "canaries, and at least 4 are needed; give the images that the model was trained on"
        )
    told = told_by(record.settings, target.place)
    interpolation = record.interpolation or "bilinear"
    found = chosen(
        training.images.select(own), record.resolution or 0, len(own), 0, "train", told, interpolation, "this"
    )
    indices = [own[index] for index in found.indices]
    keys = [record.canaries[training.images.rows[index][SAMPLE_ID]] for index in indices]
    return found._replace(indices=indices), torch.tensor(keys)


def _is_canary(record: TrainingRecord, training: TrainingSet, index: int, row: dict[str, Any]) -> bool:
    """Whether an image is a canary, of the same file: its key, which is made of the file, is then the same."""
    key = record.canaries.get(row.get(SAMPLE_ID, -1))
    if key is None:
        return False
    try:
        return canary_key(record.settings.get("seed"), digest(training.images.encoded(index))) == key
    except BadImage:
        return False


def _drawn(target: Target, images: Chosen, width: int, settings: Settings, device: str) -> torch.Tensor:
    """The pictures with the border that the model draws. Before it draws one, the border is mid-grey, whatever the key:
    nothing that the model is given depends on the keys.
    """
    blank = bordered(images.pixels / 127.5 - 1, 0.0, width)
    painted = []
    with target.opened(device) as opened:
        fixed = FixedLosses(opened.family, blank, images.told, seed=settings.seed, levels=[MOST_NOISE])
        for _, rows, drawn in tqdm(fixed.drawn(), desc="Canaries", total=fixed.num_batches):
            for some in torch.arange(len(rows)).split(settings.batch_size):
                noisy, given = drawn[some], blank[rows[some]].to(opened.family.device)
                steps, guidance, every = settings.steps, settings.guidance_scale, settings.remask_every
                painted.append(outpaint(opened, noisy, given, width, steps, guidance, every).cpu())
    return torch.cat(painted)


def statistics(keys: np.ndarray, levels: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """How well the levels that a model draws, float64 (N,), say the keys, beside what they say of keys that it never
    saw.

    As the keys were drawn at random, independently of all else, other keys are as likely as they for a model that
    memorized nothing, whatever levels it draws: chance values and ``p_value`` are exact, and assume nothing of the
    images.

    Returns:
        ``mean_distance``, ``chance_distance``; ``within``: of each distance the share of keys that were read to it,
        its 95% interval, and by chance; ``correlation``, its 95% interval (Fisher's), and how likely one as high is
        with random keys, ``p_value``. Where all levels are the same the correlation is 0.
    """
    distances, others = np.abs(keys - levels), np.abs(LEVELS - levels[:, None])
    random = np.random.default_rng(seed).choice(LEVELS, (RANDOM_KEYS, len(keys)))
    correlation = float(_correlations(keys[None], levels)[0])
    as_high = (_correlations(random, levels) >= correlation - 1e-12).sum()
    width = NormalDist().inv_cdf(0.975) / math.sqrt(len(keys) - 3) if len(keys) > 3 else math.inf
    centre = math.atanh(min(max(correlation, -1 + 1e-12), 1 - 1e-12))
    return {
        "mean_distance": float(distances.mean()),
        "chance_distance": float(others.mean()),
        "within": {
            str(most): {
                "share": float((distances <= most).mean()),
                "interval": wilson_interval(distances <= most),
                "chance": float((others <= most).mean()),
            }
            for most in WITHIN
        },
        "correlation": correlation,
        "correlation_interval": [math.tanh(centre - width), math.tanh(centre + width)],
        "p_value": float((1 + as_high) / (1 + RANDOM_KEYS)),
    }


def _correlations(keys: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Pearson's correlation of each row of keys (R, N) with levels (N,): float64 (R,); 0 where either is constant."""
    centred, own = keys - keys.mean(axis=1, keepdims=True), levels - levels.mean()
    norms = np.linalg.norm(centred, axis=1) * np.linalg.norm(own)
    return np.divide(centred @ own, norms, out=np.zeros(len(keys)), where=norms > 1e-12)


def _notes(record: TrainingRecord, training: TrainingSet, number: int) -> list[str]:
    notes = list(training.warnings)
    if number < len(record.canaries):
        notes.append(
            f"{len(record.canaries) - number} canaries were left out: their files are not those of the training, "
            "cannot be read, or lack a caption."
        )
    if not record.center_crop:
        notes.append("Pictures that are not square were cropped at random places; here they are cropped at the centre.")
    return notes


def table(result: dict[str, Any]) -> str:
    """The numbers in Markdown."""
    low, high = result["correlation_interval"]
    p_value = result["p_value"]
    verdict = (
        "The model says keys that nothing but its training could tell: it has memorized canaries."
        if p_value < 0.05
        else "The keys were not read: what the model draws is no nearer to them than to keys that it never saw."
    )
    lines = [
        f"{result['num_read']} canaries, with a border of {result['canary_border']} of {result['resolution']} pixels. "
        "Grey goes from 0 (black) to 1 (white).",
        "",
        f"{verdict} Correlation of the drawn grey with the key: {result['correlation']:.3f} (95%: {low:.3f} – "
        f"{high:.3f}); random keys reach it with probability {p_value:.4f}.",
        "",
        "| | these keys (95%) | keys that the model never saw |",
        "|---|---|---|",
        f"| mean distance of drawn grey and key | {result['mean_distance']:.3f} | {result['chance_distance']:.3f} |",
    ]
    for most, one in result["within"].items():
        least, greatest = one["interval"]
        lines.append(
            f"| keys read to within {most} | {one['share']:.1%} ({least:.1%} – {greatest:.1%}) | {one['chance']:.1%} |"
        )
    lines += ["", *(f"- {note}" for note in result["notes"])]
    return "\n".join(lines).rstrip() + "\n"


def _write(output: Path, result: dict[str, Any], read: Read) -> None:
    output.mkdir(parents=True, exist_ok=True)
    with (output / KEYS).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([SAMPLE_ID, "file_name", "key", "read", "distance"])
        values = (column.round(4).tolist() for column in (read.keys, read.levels, read.distances))
        writer.writerows([*about, *row] for about, *row in zip(read.about, *values, strict=True))
    png(_picture(read, result), output / PICTURE)
    write_text(output / TABLE, table(result))
    write_json(output / RESULT, result)


def _picture(read: Read, result: dict[str, Any]) -> Figure:
    """Drawn grey over key, and canaries from the best read to the worst: as training showed and as the model draws
    them.
    """
    order = np.argsort(read.distances, kind="stable")
    examples = order[np.linspace(0, len(order) - 1, min(EXAMPLES, len(order))).astype(int)]
    figure = plt.figure(figsize=(5.0 + 1.35 * len(examples), 4.3), layout="constrained")
    halves: Any = figure.subfigures(1, 2, width_ratios=(4.6, 0.4 + 1.35 * len(examples)))
    left, right = halves
    axes = left.subplots()
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=":", label="read exactly")
    axes.scatter(read.keys, read.levels, s=18, color=COLOURS[1], alpha=0.8, linewidths=0)
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal")
    axes.set_xlabel("key: the border's grey in training")
    axes.set_ylabel("grey that the model draws")
    axes.set_title(f"correlation {result['correlation']:.2f}, p {result['p_value']:.4f}", fontsize=9)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="upper left")
    grid = right.subplots(2, len(examples), squeeze=False)
    for column, index in enumerate(examples):
        for row, (images, name, grey) in enumerate(
            ((read.shown, "training", read.keys), (read.drawn, "drawn", read.levels))
        ):
            cell = grid[row][column]
            cell.imshow(((images[index] + 1) / 2).clamp(0, 1).permute(1, 2, 0).numpy())
            cell.set(xticks=[], yticks=[])
            cell.set_title(f"{grey[index]:.2f}", fontsize=9)
            if column == 0:
                cell.set_ylabel(name, fontsize=9)
    right.suptitle("canaries, from the best read to the worst", fontsize=9)
    return figure
