"""How much work it takes to make models draw their training images by embeddings that are optimised for it, against
images that they were not trained on: measured, and written as a table, pictures and files.
"""

import csv
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from ietagc_diffusers import __version__
from ietagc_diffusers.data.sources import SAMPLE_ID
from ietagc_diffusers.errors import UsageError
from ietagc_diffusers.files import write_json, write_text
from ietagc_diffusers.sscd import Descriptor

from .censored import bootstrap_intervals, done_by, mean_steps, median, median_interval, share_intervals
from .generate import model_hash
from .heldout import check_held_out_files
from .image_sets import ImageSet
from .losses import Chosen, chosen
from .membership import Target
from .metrics.intervals import difference, newcombe_interval
from .plots import COLOURS, as_label, png
from .record import TrainingSet, recorded_training
from .searches import DRAWN, Finished, KeptSearches, Searches
from .trigger_search import Search, check_captions

RESULT, TABLE, CURVES, SHEET, IMAGES = "retrigger.json", "retrigger.md", "retrigger.png", "sheet.png", "images.csv"
SHOWN = {"train": 8, "heldout": 4}  # images on the sheet
SETS = {"train": "training", "heldout": "held-out"}


def retrigger(
    models: Mapping[str, str | Path],
    training: TrainingSet,
    heldout: ImageSet,
    output: str | Path,
    descriptor: Descriptor,
    search: Search | None = None,
    copy_similarity: float | None = None,
    resolution: int | None = None,
    max_images: int = 20,
    device: str = "cpu",
) -> dict[str, Any]:
    """Search models for embeddings that draw images, and write retrigger.json, retrigger.md, retrigger.png, sheet.png,
    images.csv and what was drawn into the folder ``output``. Searches that are finished there already are kept.

    Args:
        models: by name; the first is the one that the others are compared with. See ``Target.of_model``.
        training: images that all models were trained on; heldout: others, that differ from them in nothing else.
        copy_similarity: over it an image counts as drawn; None: the descriptor's own.
        resolution: of the images; None is what the first model was trained at.
        max_images: of each set.

    Returns:
        The content of retrigger.json.

    Raises:
        UsageError: a model that is told no captions or does not load, held-out files that are also training files,
            fewer than two images with captions in a set, or no threshold.
    """
    search, output = search or Search(), Path(output)
    threshold = descriptor.threshold(copy_similarity)
    targets = {name: Target.of_model(place) for name, place in models.items()}
    for target in targets.values():
        check_captions(target)
    record = training.record
    resolution = resolution or (None if record is None else record.resolution)
    if resolution is None:
        raise UsageError(
            f"`resolution`: {next(iter(models.values()))} does not record at which it was trained; give it"
        )
    check_held_out_files(heldout, training.images)
    images = {"train": training.images, "heldout": heldout.decoded_like(training.images)}
    interpolation = (None if record is None else record.interpolation) or "bilinear"
    sets = {
        name: chosen(
            one, resolution, max_images, search.drawing.seed, name, interpolation=interpolation, user="re-triggering"
        )
        for name, one in images.items()
    }
    (output / DRAWN).mkdir(parents=True, exist_ok=True)
    searched = KeptSearches(output, descriptor, threshold, search, device)
    found = {name: searched.of(name, target, models[name], sets) for name, target in targets.items()}
    result: dict[str, Any] = {
        "version": __version__,
        "descriptor": descriptor.identity,
        "copy_similarity": threshold,
        "resolution": resolution,
        "search": asdict(search),
        "checks": search.checks,
        **{name: one.source for name, one in images.items()},
        **{f"num_{name}": len(one.indices) for name, one in sets.items()},
        "models": {
            name: {"model": str(models[name]), "model_hash": model_hash(models[name])} | _measured(one, search.checks)
            for name, one in found.items()
        },
        "differences": _differences(found, search.checks),
    }
    result["notes"] = _notes(training, models, sets, images, found, max_images)
    _write(output, result, found, sets, images)
    return result


def _done(found: Searches, checks: list[int]) -> dict[str, np.ndarray]:
    return {name: done_by([one.steps for one in some], checks) for name, some in found.items()}


def _measured(found: Searches, checks: list[int]) -> dict[str, Any]:
    """Numbers of a model, with 95% intervals: of both sets, and how much more training images are drawn."""
    done = _done(found, checks)
    numbers: dict[str, Any] = {}
    for name, one in done.items():
        low, high = share_intervals(one)
        numbers[name] = {
            "median_steps": median(one, checks),
            "median_interval": median_interval(one, checks),
            "mean_steps": float(mean_steps(one, checks).mean()),
            "share": one.mean(axis=0).tolist(),
            "share_interval": [low.tolist(), high.tolist()],
            "num_diverged": sum(each.diverged for each in found[name]),
        }
    train, heldout = (one[:, -1] for one in done.values())
    numbers["excess"] = difference(train, heldout)
    numbers["excess_interval"] = newcombe_interval(train, heldout)
    return numbers


def _differences(found: dict[str, Searches], checks: list[int]) -> dict[str, Any]:
    """Of each model but the first: its curve minus that of the first one, with 95% bootstrap intervals over images."""
    first, *others = found
    start = _done(found[first], checks)
    differences = {}
    for name in others:
        done = _done(found[name], checks)
        train, heldout = (done[each] - start[each] for each in SETS)
        steps = mean_steps(done["train"], checks) - mean_steps(start["train"], checks)
        differences[name] = {
            "share": _difference(train),
            "share_beyond_heldout": _difference(train, -heldout),
            "mean_steps": {key: value[0] for key, value in _difference(steps).items()},
        }
    return differences


def _difference(*parts: np.ndarray) -> dict[str, list]:
    value = sum(part.mean(axis=0) for part in parts)
    intervals = np.stack(bootstrap_intervals(*parts), axis=1)
    return {"value": np.asarray(value).tolist(), "interval": intervals.tolist()}


def _notes(
    training: TrainingSet,
    models: Mapping[str, str | Path],
    sets: dict[str, Chosen],
    images: dict[str, ImageSet],
    found: dict[str, Searches],
    max_images: int,
) -> list[str]:
    """What to keep in mind when reading the numbers, in sentences."""
    notes = [*training.warnings, *(f"{note[0].upper()}{note[1:]}." for note in training.notes)]
    first, *others = models
    for name in others:
        other = recorded_training(models[name])
        if other is None or training.record is None:
            notes.append(f"Whether {name} was trained on the same images as {first} is not recorded.")
        elif other.settings.get("images_hash") != training.record.settings.get("images_hash"):
            notes.append(f"{name} was trained on other images than {first}, by what they record.")
    for each, one in sets.items():
        missing = min(max_images, len(images[each])) - len(one.indices)
        if missing:
            notes.append(f"{missing} images of {each} were left out: they cannot be read, or lack a caption.")
    for name, some in found.items():
        diverged = sum(one.diverged for each in some.values() for one in each)
        if diverged:
            notes.append(
                f"{diverged} searches in {name} ended early, as their loss was no longer finite; they count as not "
                "drawn. A lower learning rate may help."
            )
        if done_by([one.steps for one in some["heldout"]], [10**9]).mean() >= 0.5:
            notes.append(
                f"{name} is led to at least half of the held-out images too: the search itself draws them, and what is "
                "drawn of training images says little about memorization. Fewer steps or a lower learning rate leave "
                "less room for that."
            )
    return notes


def table(result: dict[str, Any]) -> str:
    """The numbers in Markdown."""
    search, most = result["search"], result["checks"][-1]
    lines = [
        f"Embeddings were optimised until the model drew the image: over a similarity of "
        f"{result['copy_similarity']:.3f} by {result['descriptor']['descriptor']}. An image was drawn before the first "
        f"step and every {search['check_every']} steps, up to {most}.",
        "",
        f"| model | images | drawn at the start | drawn within {most} steps (95%) | median of the steps (95%) |",
        "|---|---|---|---|---|",
    ]
    for name, one in result["models"].items():
        for each, called in SETS.items():
            numbers = one[each]
            low, high = (band[-1] for band in numbers["share_interval"])
            shares = f"{numbers['share'][0]:.0%} | {numbers['share'][-1]:.0%} ({low:.0%} – {high:.0%})"
            low, high = (_steps(value, most) for value in numbers["median_interval"])
            middle = _steps(numbers["median_steps"], most) + (f" ({low} – {high})" if low != high else "")
            lines.append(f"| {name} | {result[f'num_{each}']} {called} | {shares} | {middle} |")
    lines.append("")
    for name, one in result["models"].items():
        low, high = one["excess_interval"]
        lines.append(
            f"- {name}: training images are drawn more often than held-out ones by {_points(one['excess'])} "
            f"({_points(low)} to {_points(high)}) percentage points."
        )
    first = next(iter(result["models"]))
    for name, one in result["differences"].items():
        share, beyond = (
            f"{_points(of['value'][-1])} ({' to '.join(map(_points, of['interval'][-1]))})"
            for of in (one["share"], one["share_beyond_heldout"])
        )
        low, high = one["mean_steps"]["interval"]
        lines.append(
            f"- {name} against {first}, percentage points of training images drawn within {most} steps: {share}; "
            f"beyond the difference of held-out images: {beyond}. Steps on average, at most {most}: "
            f"{one['mean_steps']['value']:+.0f} ({low:+.0f} to {high:+.0f})."
        )
    lines += [f"- {note}" for note in result["notes"]]
    return "\n".join(lines) + "\n"


def _steps(value: int | None, most: int) -> str:
    return f"over {most}" if value is None else str(value)


def _points(share: float) -> str:
    return f"{round(100 * share):+d}"


def _write(
    output: Path,
    result: dict[str, Any],
    found: dict[str, Searches],
    sets: dict[str, Chosen],
    images: dict[str, ImageSet],
) -> None:
    with (output / IMAGES).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        columns = ("steps", "similarity_at_start", "highest_similarity", "drawn_at_start", "most_similar")
        writer.writerow(["model", "set", "file_name", SAMPLE_ID, *columns])
        for name, each, place, one in _all(found):
            index = sets[each].indices[place]
            about = images[each].names[index], images[each].rows[index].get(SAMPLE_ID, "")
            drawn = (f"{DRAWN}/{one.first}", f"{DRAWN}/{one.best}")
            steps = "" if one.steps is None else one.steps
            writer.writerow([name, each, *about, steps, one.similarities[0], max(one.similarities), *drawn])
    png(_curves(result), output / CURVES)
    png(_sheet(output, found, sets), output / SHEET)
    write_text(output / TABLE, table(result))
    write_json(output / RESULT, result)


def _all(found: dict[str, Searches]) -> Iterator[tuple[str, str, int, Finished]]:
    for name, searches in found.items():
        for each, some in searches.items():
            for place, one in enumerate(some):
                yield name, each, place, one


def _curves(result: dict[str, Any]) -> Figure:
    """The share of images drawn against steps: training solid with its interval, held-out dashed."""
    figure, axes = plt.subplots(figsize=(6.4, 4.2))
    for number, (name, one) in enumerate(result["models"].items()):
        colour = COLOURS[number % len(COLOURS)]
        for each, style in (("train", "-"), ("heldout", "--")):
            numbers = one[each]
            label = f"{as_label(name)}, {SETS[each]}"
            axes.step(result["checks"], numbers["share"], style, where="post", color=colour, linewidth=1.6, label=label)
        low, high = one["train"]["share_interval"]
        axes.fill_between(result["checks"], low, high, step="post", color=colour, alpha=0.12, linewidth=0)
    axes.set(xlabel="optimisation steps", ylabel="share of images drawn", ylim=(-0.02, 1.02))
    axes.set_xlim(0, result["checks"][-1])
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure


def _sheet(output: Path, found: dict[str, Searches], sets: dict[str, Chosen]) -> Figure:
    """Some images of both sets, and beside each, for each model, what it drew at the start and most like it."""
    rows = [(each, place) for each, most in SHOWN.items() for place in range(min(most, len(sets[each].indices)))]
    figure, grid = plt.subplots(
        len(rows), 1 + 2 * len(found), figsize=(1.5 * (1 + 2 * len(found)), 1.62 * len(rows)), squeeze=False
    )
    for line, (each, place) in zip(grid, rows, strict=True):
        target = sets[each].pixels[place].permute(1, 2, 0).numpy()
        shown = [(target, f"{SETS[each]} image")]
        for searches in found.values():
            one = searches[each][place]
            first, best = (np.asarray(Image.open(output / DRAWN / name)) for name in (one.first, one.best))
            steps = "not drawn" if one.steps is None else f"{one.steps} steps"
            shown.append((first, f"start: {one.similarities[0]:.3f}"))
            shown.append((best, f"{steps}: {max(one.similarities):.3f}"))
        for axes, (picture, title) in zip(line, shown, strict=True):
            axes.imshow(picture, interpolation="nearest")
            axes.set_title(title, fontsize=7, pad=2)
            axes.axis("off")
    for column, name in enumerate(found):
        grid[0][1 + 2 * column].annotate(
            as_label(name), (0, 1.2), xycoords="axes fraction", fontsize=9, fontweight="bold"
        )
    figure.subplots_adjust(wspace=0.05, hspace=0.2)
    return figure
