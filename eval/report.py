"""The report: one HTML file with the numbers and their intervals, histograms, and generated images beside their nearest
training images.
"""

import base64
import html
import io
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from PIL import Image
from tqdm.auto import tqdm

from ietagc_diffusers.errors import UsageError
from ietagc_diffusers.files import write_text

from .drawing import sentence_of
from .image_sets import BadImage, ImageSet
from .metrics import METRICS
from .metrics.patches import crop_boxes
from .plots import inline_svg, plot_similarities
from .score import different_versions, images_of, load_scores
from .verdict import SIDES

TEMPLATE = Path(__file__).with_suffix(".html")
THUMBNAIL = 160  # pixels
COMPARED = 24  # rows of models side by side
MASKS = "local_masks"  # folder, beside the scores


@dataclass(frozen=True)
class Scored:
    """A model's scores with the tables of nearest neighbours, as ``score`` wrote them.

    masks: a folder with pictures of where the model copies, under the names of the generated images; None: none.
    """

    name: str
    scores: dict[str, Any]
    nearest: dict[str, list]
    background: dict[str, list]
    masks: Path | None = None

    @classmethod
    def load(cls, folder: str | Path, name: str | None = None) -> "Scored":
        """Read a scored folder; without a name the folder's is used. Raises ``UsageError`` if a file is missing."""
        folder = Path(folder)
        return cls(name or folder.resolve().name, *load_scores(folder), folder / MASKS)


def write_report(
    scored: list[Scored],
    path: str | Path,
    max_pairs: int = 200,
    title: str | None = None,
    verdict: tuple[str, str] | None = None,
    intro: str = "",
) -> Path:
    """Write the report of one or more models.

    Args:
        max_pairs: how many pairs of each model are shown, most similar first; with patches as many again, most similar
            crops first.
        verdict: (passed, failed or inconclusive; the sentence) of an audit.
        intro: HTML before the numbers.

    Returns:
        The path.
    """
    pictures = Pictures()
    pairs = [pair for index, model in enumerate(scored) for pair in _pairs(index, model, max_pairs, pictures)]
    compare = _compare(scored, pictures)
    total = sum(len(model.nearest["file_name"]) for model in scored)
    patches = any("patch_similarity" in model.nearest for model in scored)
    crops = f", and the {max_pairs} with the most similar crops" if patches else ""
    count = f"{{}} of {total:,} generated images: at most the {max_pairs} most similar of each model{crops}."
    data = {
        "models": [model.name for model in scored],
        "images": pictures.images,
        "pairs": pairs,
        "compare": compare,
        "count": count,
    }
    first = scored[0].scores
    of_first = f" of {scored[0].name}" if _num_training_sets(scored) > 1 else ""
    values = {
        "title": html.escape(title or "Copies of training images"),
        "lead": html.escape(_lead(scored)),
        "verdict": _verdict(verdict),
        "intro": intro,
        "table": _table(scored),
        "notes": _notes(scored, pictures.num_missing),
        "histogram": _histogram(scored),
        "histogram_caption": html.escape(
            f"Similarity to the nearest training image (descriptor: {first['protocol']['descriptor']}). Dotted: "
            f"similarity of each training image{of_first} to the nearest other one. Vertical line: images with a "
            "higher similarity count as copies."
        ),
        "compare": _compare_section(compare),
        "count": html.escape(count.replace("{}", str(len(pairs)))),
        "protocol": "".join(_protocol(model) for model in scored),
        # No closing tag can appear inside the script element.
        "data": json.dumps(data, allow_nan=False).replace("<", "\\u003c"),
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, Template(TEMPLATE.read_text(encoding="utf-8")).substitute(values))
    return path


class Pictures:
    """Thumbnails as data addresses, each image or crop once.

    images: [{uri, side in pixels}]; num_missing: how many images could not be read, which are shown as grey squares.
    """

    def __init__(self) -> None:
        self.images: list[dict[str, Any]] = []
        self.num_missing = 0
        self._places: dict[tuple, int] = {}
        self._sets: dict[str, tuple] = {}

    def add(self, scores: dict[str, Any], side: str, name: str, crop: int | None = None) -> int:
        """The index in ``images`` of an image of a side, ``generated`` or ``train``, or of one of its crops."""
        key = scores[side], name, crop
        if key not in self._places:
            self._places[key] = len(self.images)
            self.images.append(self._thumbnail(scores, side, name, crop))
        return self._places[key]

    def add_file(self, path: Path) -> int:
        """The index in ``images`` of a picture in a file."""
        with Image.open(path) as image:
            self.images.append(thumbnail(image.convert("RGB")))
        return len(self.images) - 1

    def _thumbnail(self, scores: dict[str, Any], side: str, name: str, crop: int | None) -> dict[str, Any]:
        try:
            source = scores[side]
            if source not in self._sets:
                images = images_of(scores, side)
                self._sets[source] = images, {name: index for index, name in enumerate(images.names)}
            images, index = self._sets[source]
            image = images.image(index[name])
        except (KeyError, BadImage, UsageError, OSError):
            image, crop = grey(), None
            self.num_missing += 1
        if crop is not None:
            top, left, size = crop_boxes(image.height, image.width, *scores["protocol"]["patches"])[crop]
            image = image.crop((left, top, left + size, top + size))
        return thumbnail(image)


def grey() -> Image.Image:
    """What is shown of an image that cannot be read."""
    return Image.new("RGB", (8, 8), "grey")


def thumbnail(image: Image.Image) -> dict[str, Any]:
    """A small version of an RGB image: ``uri``, a data address, and ``side``, its longer one in pixels."""
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    kind = "png" if max(image.size) < 100 else "jpeg"  # PNG of a small picture is small too, and exact
    image.save(buffer, format=kind, **({} if kind == "png" else {"quality": 85}))
    code = base64.b64encode(buffer.getvalue()).decode()
    return {"uri": f"data:image/{kind};base64,{code}", "side": max(image.size)}


def picture_of(images: ImageSet, index: int) -> str:
    """An image of a set as HTML, grey if it cannot be read any more."""
    try:
        found = thumbnail(images.image(index))
    except (BadImage, OSError):
        found = thumbnail(grey())
    small = ' class="small"' if found["side"] < 100 else ""
    return f'<img{small} src="{found["uri"]}" alt="">'


def _number(value: float | None, digits: int = 4) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, digits)


def _pairs(index: int, model: Scored, max_pairs: int, pictures: Pictures) -> list[dict[str, Any]]:
    """The model's most similar pairs and those with the most similar crops, as JSON values."""
    nearest, scores = model.nearest, model.scores
    chosen: dict[int, None] = {}  # rows, each once
    for key in ("similarity", "patch_similarity"):
        if key in nearest:
            order = sorted(range(len(nearest[key])), key=lambda row: -nearest[key][row])
            chosen |= dict.fromkeys(order[:max_pairs])
    order = sorted(chosen, key=lambda row: -nearest["similarity"][row])
    pairs = []
    for row in tqdm(order, desc=f"Pictures of {model.name}", leave=False):
        pair = {key: nearest[key][row] for key in ("file_name", "text", "seed", "nearest", "copy")}
        for key in ("similarity", "l2_ratio", "patch_similarity", "clip_score"):
            if key in nearest:
                pair[key] = _number(nearest[key][row])
        pair["image"] = pictures.add(scores, "generated", pair["file_name"])
        pair["training"] = pictures.add(scores, "train", pair["nearest"])
        if model.masks is not None and (model.masks / pair["file_name"]).is_file():
            pair["mask"] = pictures.add_file(model.masks / pair["file_name"])
        if "patch_nearest" in nearest:
            near = nearest["patch_nearest"][row]
            pair["patch"] = {
                "image": pictures.add(scores, "generated", pair["file_name"], nearest["patch"][row]),
                "training": pictures.add(scores, "train", near, nearest["patch_of_nearest"][row]),
                "nearest": near,
                "copy": nearest["patch_similarity"][row] > scores["patch_copy_similarity"],
            }
        pairs.append(pair | {"model": index})
    return pairs


Key = tuple[str | None, int, int | None]  # prompt, seed and label


def same_prompt_and_seed(scored: list[Scored]) -> list[tuple[Key, list[tuple[Scored, int]]]]:
    """[(key, [(model, row of its table)])] of the images that every model with seeds drew. Those where the first of
    these models is most similar to a training image come first.

    Labels count where all models were told some.
    """
    tables = []
    labelled = all("label" in model.nearest for model in scored)
    for model in scored:
        labels = model.nearest["label"] if labelled else [None] * len(model.nearest["seed"])
        keys = zip(model.nearest["text"], model.nearest["seed"], labels, strict=True)
        rows = {key: row for row, key in enumerate(keys) if key[1] is not None}
        if rows:
            tables.append((model, rows))
    if not tables:
        return []
    (first, of_first), *others = tables
    shared = [key for key in of_first if all(key in rows for _, rows in others)]
    shared.sort(key=lambda key: -first.nearest["similarity"][of_first[key]])
    return [(key, [(model, rows[key]) for model, rows in tables]) for key in shared]


def _compare(scored: list[Scored], pictures: Pictures) -> list[dict[str, Any]]:
    """Images of several models for the same prompt and seed, as JSON values."""
    compared = []
    for key, drawn in same_prompt_and_seed(scored)[:COMPARED]:
        if len(drawn) < 2:
            return []
        cells = []
        for model, row in drawn:
            image = pictures.add(model.scores, "generated", model.nearest["file_name"][row])
            similarity = _number(model.nearest["similarity"][row])
            cells.append({"model": model.name, "image": image, "similarity": similarity})
        first, row = drawn[0]
        training = pictures.add(first.scores, "train", first.nearest["nearest"][row])
        text = key[0] if key[2] is None else f"class {key[2]}"
        compared.append({"text": text, "seed": key[1], "training": training, "cells": cells})
    return compared


def _compare_section(compare: list[dict[str, Any]]) -> str:
    if not compare:
        return ""
    text = (
        "The same prompt and seed for all models, where the image of the first one is most similar to a training image."
    )
    return f'<h2>Models side by side</h2><p class="muted">{text}</p><div id="compare"></div>'


def _num_training_sets(scored: list[Scored]) -> int:
    return len({model.scores.get("train_hash", model.scores["train"]) for model in scored})


def _lead(scored: list[Scored]) -> str:
    numbers = [f"{model.scores['num_generated']:,} of {model.name}" for model in scored]
    against = [f"compared with {model.scores['num_train']:,} training images" for model in scored]
    if _num_training_sets(scored) == 1 and len(set(against)) == 1:
        return f"Generated images: {', '.join(numbers)}; {against[0]}."
    return f"Generated images: {'; '.join(', '.join(pair) for pair in zip(numbers, against, strict=True))}."


def as_html(sentence: str) -> str:
    """A sentence as HTML; settings in backquotes as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(sentence))


def _verdict(verdict: tuple[str, str] | None) -> str:
    if verdict is None:
        return ""
    outcome, sentence = verdict
    word, space, rest = sentence.partition(" ")
    return f'<p class="verdict {outcome}"><b>{as_html(word)}</b>{space}{as_html(rest)}</p>'


def _histogram(scored: list[Scored]) -> str:
    """The histograms as SVG, or why they could not be drawn: names can hold anything, and a report needs no plot."""
    try:
        return inline_svg(lambda axes: plot_similarities(axes, scored), (8, 3.2))
    except Exception as error:
        return f'<p class="muted">{html.escape(f"The histograms could not be drawn: {error}")}</p>'


def table_rows(scored: list[Scored]) -> Iterator[tuple[str, list[tuple[Any, Any]], Callable[[Any], str]]]:
    """(heading, [(value or None, interval or None) of each model], formatter) of every metric that some model has."""
    for metric in METRICS.values():
        cells = [(metric.value(model.scores), metric.interval(model.scores)) for model in scored]
        measured = [model for model, (value, _) in zip(scored, cells, strict=True) if value is not None]
        if measured:
            yield metric.heading(measured[0].scores["protocol"]), cells, metric.format


def _table(scored: list[Scored]) -> str:
    head = "".join(f"<th>{html.escape(model.name)}</th>" for model in scored)
    lines = [f"<tr><th></th>{head}</tr>"]
    for heading, cells, show in table_rows(scored):
        shown = []
        for value, interval in cells:
            around = f"<small>{show(interval[0])} – {show(interval[1])}</small>" if interval else ""
            shown.append("<td>–</td>" if value is None else f"<td>{show(value)}{around}</td>")
        lines.append(f"<tr><td>{html.escape(heading)}</td>{''.join(shown)}</tr>")
    return "".join(lines)


def _notes(scored: list[Scored], num_missing: int) -> str:
    """What to keep in mind when reading the numbers, which files were left out, and which numbers are missing."""
    lines = []
    if any(model.scores["protocol"]["descriptor"] == "pixel" for model in scored):
        lines.append(
            "Similarity was measured with the built-in descriptor pixel. It detects only near-exact copies, and its "
            "values are not comparable with those of SSCD: set `descriptor` to sscd_disc_mixup to use SSCD."
        )
    if len({json.dumps({**model.scores["protocol"], "version": None}, sort_keys=True) for model in scored}) > 1:
        lines.append("These models were scored under different protocols: their numbers are not comparable.")
    if versions := different_versions(model.scores for model in scored):
        lines.append(f"These models were scored by {versions}.")
    if _num_training_sets(scored) > 1:
        lines.append("These models were scored against different training sets: their numbers are not comparable.")
    for model in scored:
        if model.scores.get("drawing"):
            lines.append(f"{model.name}: {sentence_of(model.scores['drawing'])}")
    if num_missing:
        lines.append(f"{num_missing} pictures can no longer be read and are shown as grey squares.")
    notes: dict[str, list[str]] = {}
    for model in scored:
        for note in model.scores["notes"]:
            notes.setdefault(note, []).append(model.name)
    lines += [f"{', '.join(names)}: {note}." for note, names in notes.items()]
    for model in scored:
        for side, skipped in model.scores["skipped"].items():
            if skipped:
                some = "; ".join(f"{name}: {why}" for name, why in skipped[:5])
                lines.append(f"{model.name}: {len(skipped)} {SIDES[side]} files were left out. {some}")
    missing = "".join(
        f"<li>{html.escape(model.name)}: <code>{html.escape(key)}</code>: {as_html(why)}</li>"
        for model in scored
        for key, why in model.scores["reasons"].items()
    )
    shown = "".join(f'<p class="muted">{as_html(line)}</p>' for line in lines)
    if missing:
        shown += f"<details><summary>Numbers that were not computed</summary><ul>{missing}</ul></details>"
    return shown


def _protocol(model: Scored) -> str:
    text = json.dumps(model.scores["protocol"], indent=2, ensure_ascii=False)
    return f"<details><summary>{html.escape(model.name)}</summary><pre>{html.escape(text)}</pre></details>"
