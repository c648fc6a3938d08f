"""How well membership attacks tell a model's training images from held-out ones: measured, and written as a table, a
picture and files.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure

from ietagc_diffusers import __version__
from ietagc_diffusers.data.sources import SAMPLE_ID
from ietagc_diffusers.errors import UsageError
from ietagc_diffusers.families import Unconditional
from ietagc_diffusers.files import write_json, write_text
from ietagc_diffusers.training.fixed_losses import FixedLosses

from .generate import model_hash
from .heldout import check_held_out_files
from .image_sets import ImageSet
from .losses import Chosen, chosen
from .membership import ATTACKS, Answers, Target, ask, check_base, middles
from .metrics.intervals import wilson_interval
from .pipelines import num_classes, pipeline_folder
from .plots import COLOURS, GREY, png
from .record import TrainingRecord, TrainingSet
from .roc import FALSE_POSITIVES, Curve, auc_interval, by_label, roc_auc, roc_curve, threshold_at
from .told import NOTHING, Told, told_by

RESULT, TABLE, PICTURE, CURVES, IMAGES = "attack.json", "attack.md", "roc.png", "roc.csv", "images.csv"
BASE = "base"  # the row of the base's own loss


@dataclass(frozen=True)
class Settings:
    """How a model is attacked.

    Args:
        attacks: names of ``ATTACKS``; () is all that are defined for the model.
        draws: noise draws of each image, in the middle of as many equal parts of the noise levels, for the attacks that
            use losses.
        seed: of the noise, and of which images are taken where there are more than ``max_images`` of a set.
        resolution: of the images; None is what the model was trained at.
        batch_size: images at once; changes no draw.
    """

    attacks: tuple[str, ...] = ()
    draws: int = 10
    seed: int = 0
    resolution: int | None = None
    max_images: int = 1000
    batch_size: int = 8


@dataclass(frozen=True)
class Asked:
    """What the model and its base said of the images of both sets, by ``train`` and ``heldout``, in this order.

    sets: those that were asked about, of ``images``; base: {} if there is none.
    """

    sets: dict[str, Chosen]
    images: dict[str, ImageSet]
    model: Answers
    base: Answers

    @property
    def labels(self) -> np.ndarray:
        """Whether each image was trained on: bool (N,)."""
        return np.repeat([True, False], [len(one.indices) for one in self.sets.values()])


def attack(
    model: str | Path,
    training: TrainingSet,
    heldout: ImageSet,
    output: str | Path,
    settings: Settings | None = None,
    base: str | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Attack a model and write attack.json, attack.md, roc.png, roc.csv and images.csv into the folder ``output``.

    Args:
        model: a pipeline's folder, a run's or a LoRA run's, a checkpoint in a single file, or a Hub id.
        training: images that the model was trained on; heldout: others, that differ from them in nothing else.
        base: the pipeline that the model was trained from; None is what the model records, if it does.

    Returns:
        The content of attack.json.

    Raises:
        UsageError: an attack by name that is not defined for the model, a base of another kind, held-out files that are
            also training files, fewer than two images in a set, or models that do not load.
    """
    settings = settings or Settings()
    target = Target.of_model(model)
    record = training.record
    resolution = settings.resolution or (None if record is None else record.resolution)
    if resolution is None:
        raise UsageError(f"`resolution`: {model} does not record at which it was trained; give it")
    reference, without_base = _base(base, record, target, settings.attacks)
    check_held_out_files(heldout, training.images)
    images = {"train": training.images, "heldout": heldout.decoded_like(training.images)}
    told = _told(record, target)
    with target.opened(device) as opened:
        left_out = {name: why for name, one in ATTACKS.items() if (why := one.missing(opened.family))}
        left_out |= {name: without_base for name, one in ATTACKS.items() if one.base and without_base}
        names = _names(settings.attacks, left_out)
        interpolation = (None if record is None else record.interpolation) or "bilinear"
        sets = {
            name: chosen(one, resolution, settings.max_images, settings.seed, name, told, interpolation, "an attack")
            for name, one in images.items()
        }
        levels = middles(settings.draws, opened.family.objective.num_levels)
        asks = dict.fromkeys(question for name in names for question in ATTACKS[name].asks)
        answers = ask(opened, _fixed(opened.family, sets, settings, levels), asks)
    del opened  # the base takes its room
    of_base: Answers = {}
    if reference is not None:
        with reference.opened(device) as opened:
            of_base = ask(opened, _fixed(opened.family, sets, settings, levels), ["loss"], "Base")
    asked = Asked(sets, images, answers, of_base)
    scores = {name: ATTACKS[name].score(answers, of_base) for name in names}
    result: dict[str, Any] = {
        "version": __version__,
        "model": str(model),
        "model_hash": model_hash(model),
        "base": reference and reference.place,
        **{name: one.source for name, one in images.items()},
        **{f"num_{name}": len(one.indices) for name, one in sets.items()},
        "resolution": resolution,
        "draws": settings.draws,
        "levels": levels,
        "seed": settings.seed,
        "attacks": {name: _of_attack(name, one, asked.labels, settings.draws) for name, one in scores.items()},
        "base_by_loss": _measured(-of_base["loss"], asked.labels) if of_base else None,
        "left_out": left_out if not settings.attacks else {},
    }
    result["notes"] = _notes(result, asked, training, settings)
    _write(Path(output), result, scores, asked)
    return result


def _base(
    given: str | None, record: TrainingRecord | None, target: Target, attacks: Sequence[str]
) -> tuple[Target | None, str | None]:
    """The base, or why there is none."""
    place = given or (None if record is None else record.settings.get("pretrained_model_name_or_path"))
    needed = given is not None or any(ATTACKS[name].base for name in attacks if name in ATTACKS)
    if place is None:
        return None, "needs the model that the training started from, and none is recorded; give `base`"
    try:
        base = Target(str(pipeline_folder(place, "base")), "base")
        check_base(target, base)
        return base, None
    except UsageError as error:
        if needed:
            raise
        return None, f"needs the model that the training started from: {error}"


def _names(given: Sequence[str], left_out: dict[str, str]) -> list[str]:
    for name in given:
        if name not in ATTACKS:
            raise UsageError(f"`attack` {name}: must be one of {', '.join(ATTACKS)}")
        if name in left_out:
            raise UsageError(f"`attack` {name}: {left_out[name]}")
    return [name for name in ATTACKS if (name in given if given else name not in left_out)]


def _told(record: TrainingRecord | None, target: Target) -> Told:
    """What the model is told of an image."""
    if record is None and target.kind is Unconditional:
        if num_classes(target.place) is not None:
            raise UsageError(
                f"`model` {target.place}: is told a class of each image, and does not record where classes come from"
            )
        return NOTHING
    return told_by(record.settings if record else {}, target.place)


def _fixed(family: Any, sets: dict[str, Chosen], settings: Settings, levels: list[int]) -> FixedLosses:
    """All images with noise of their own: for each model the same, but for its own encoders."""
    pixels = torch.cat([one.pixels for one in sets.values()])
    told = [value for one in sets.values() for value in one.told]
    return FixedLosses(family, pixels, told, seed=settings.seed, batch_size=settings.batch_size, levels=levels)


def _measured(scores: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Numbers of a score, with 95% intervals."""
    threshold, rate = threshold_at(scores, labels)
    return {
        "auc": roc_auc(scores, labels),
        "auc_interval": auc_interval(scores, labels),
        "tpr_at_1_percent_fpr": rate,
        "tpr_interval": wilson_interval(by_label(scores, labels)[0] > threshold),
        "threshold": threshold,
    }


def _of_attack(name: str, scores: np.ndarray, labels: np.ndarray, draws: int) -> dict[str, Any]:
    one = ATTACKS[name]
    return _measured(scores, labels) | {"calls": one.calls(draws), "rule": one.rule, "source": one.source}


def _notes(result: dict[str, Any], asked: Asked, training: TrainingSet, settings: Settings) -> list[str]:
    """What to keep in mind when reading the numbers, in sentences."""
    notes = [*training.warnings, *(f"{note[0].upper()}{note[1:]}." for note in training.notes)]
    for name, one in asked.sets.items():
        missing = min(settings.max_images, len(asked.images[name])) - len(one.indices)
        if missing:
            notes.append(f"{missing} images of {name} were left out: they cannot be read, or lack a caption or class.")
    allowed, number = int(FALSE_POSITIVES * result["num_heldout"]), result["num_heldout"]
    if not allowed:
        notes.append(
            f"1% of {number} held-out images is less than one: the true positives at 1% are those above every held-out "
            "image."
        )
    if (of_base := result["base_by_loss"]) is not None:
        low, high = of_base["auc_interval"]
        if not low <= 0.5 <= high:
            notes.append(
                f"The base by itself tells the two sets apart by its loss (AUC {of_base['auc']:.3f}): they differ in "
                "more than membership, or the base was trained on some of these images. Only calibrated and ratio "
                "take that into account."
            )
    return notes


def table(result: dict[str, Any]) -> str:
    """The numbers in Markdown."""
    lines = [
        f"{result['num_train']} training images, {result['num_heldout']} held-out ones. Chance is an AUC of 0.5.",
        "",
        "| attack | a training image is one for which | AUC (95%) | true positives at 1% false ones (95%) | calls |",
        "|---|---|---|---|---|",
    ]
    for name, one in result["attacks"].items():
        lines.append(f"| {name} ({one['source']}) | {one['rule']} | {_shown(one)} | {one['calls']} |")
    if result["base_by_loss"] is not None:
        rule = "for comparison, no attack: the base's own loss is low"
        lines.append(f"| {BASE} | {rule} | {_shown(result['base_by_loss'])} | {result['draws']} |")
    lines += ["", *(f"- {name}: {why}." for name, why in result["left_out"].items())]
    lines += [f"- {note}" for note in result["notes"]]
    return "\n".join(lines).rstrip() + "\n"


def _shown(one: dict[str, Any]) -> str:
    (low, high), (least, most) = one["auc_interval"], one["tpr_interval"]
    rate = one["tpr_at_1_percent_fpr"]
    return f"{one['auc']:.3f} ({low:.3f} – {high:.3f}) | {rate:.1%} ({least:.1%} – {most:.1%})"


def _write(output: Path, result: dict[str, Any], scores: dict[str, np.ndarray], asked: Asked) -> None:
    output.mkdir(parents=True, exist_ok=True)
    curves = {name: roc_curve(values, asked.labels) for name, values in scores.items()}
    if asked.base:
        curves[BASE] = roc_curve(-asked.base["loss"], asked.labels)
    with (output / CURVES).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["attack", "false_positives", "true_positives", "threshold"])
        for name, curve in curves.items():
            writer.writerows([name, *point] for point in zip(*(values.tolist() for values in curve), strict=True))
    _write_images(output / IMAGES, scores, asked)
    png(_picture(curves, result), output / PICTURE)
    write_text(output / TABLE, table(result))
    write_json(output / RESULT, result)


def _write_images(path: Path, scores: dict[str, np.ndarray], asked: Asked) -> None:
    """A row for each image: what it is, the losses, and the score of each attack."""
    said = {"model": asked.model, BASE: asked.base}
    columns = {f"{who}_loss": answers["loss"] for who, answers in said.items() if "loss" in answers} | scores
    about = [
        (name, asked.images[name].names[index], asked.images[name].rows[index].get(SAMPLE_ID, ""))
        for name, one in asked.sets.items()
        for index in one.indices
    ]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["set", "file_name", SAMPLE_ID, *columns])
        values = zip(*(column.tolist() for column in columns.values()), strict=True)
        writer.writerows([*known, *row] for known, row in zip(about, values, strict=True))


def _picture(curves: dict[str, Curve], result: dict[str, Any]) -> Figure:
    """The curves on logarithmic axes, down to one false positive."""
    figure, axes = plt.subplots(figsize=(5.6, 4.8))
    least = 1 / max(result["num_train"], result["num_heldout"])
    colours = dict(zip(curves, COLOURS, strict=False)) | {BASE: GREY}
    for name, curve in curves.items():
        numbers = result["base_by_loss"] if name == BASE else result["attacks"][name]
        label = f"{'base, by its loss' if name == BASE else name} (AUC {numbers['auc']:.3f})"
        shares = (np.clip(share, least / 2, 1) for share in curve[:2])
        axes.plot(*shares, drawstyle="steps-post", color=colours[name], linewidth=1.6, label=label)
    axes.plot([least / 2, 1], [least / 2, 1], color=GREY, linewidth=0.8, linestyle=":", label="chance")
    axes.axvline(FALSE_POSITIVES, color=GREY, linewidth=0.6)
    axes.set(xscale="log", yscale="log", xlim=(least / 2, 1), ylim=(least / 2, 1.1))
    axes.set_xlabel("share of held-out images taken for training images")
    axes.set_ylabel("share of training images found")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="lower right")
    return figure
