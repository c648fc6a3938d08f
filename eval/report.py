"""The report: one HTML file with the numbers and their intervals, the histograms, and the pictures side by side."""

import base64
import html
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from string import Template

from PIL import Image
from tqdm.auto import tqdm

from ietagc_diffusers.errors import UsageError
from ietagc_diffusers.files import write_text

from .image_sets import BadImage
from .patches import crop_boxes
from .plots import inline_svg, plot_similarities
from .score import images_of, load_scores

TEMPLATE = Path(__file__).with_suffix(".html")
THUMBNAIL = 160  # pixels
COMPARED = 24


@dataclass(frozen=True)
class Scored:
    """A model's scores, its nearest neighbours and the training set's own, as ``score`` left them."""

    name: str
    scores: dict
    nearest: dict
    background: dict

    @classmethod
    def load(cls, folder, name=None):
        folder = Path(folder)
        return cls(name or folder.resolve().name, *load_scores(folder))


def write_report(scored, path, max_pairs=200, title=None, verdict=None, intro=""):
    """Write the report of one or more ``Scored`` models.

    Args:
        max_pairs: how many of each model's pairs, most similar first, are shown, and with patches as many again, most
            similar crops first; all are counted.
        verdict: (passed, sentence) of an audit.
        intro: HTML that goes before the numbers.

    Returns:
        The path.
    """
    pictures = Pictures()
    pairs = [pair for index, model in enumerate(scored) for pair in _pairs(index, model, max_pairs, pictures)]
    compare = _compare(scored, pictures)
    total = sum(len(model.nearest["file_name"]) for model in scored)
    patches = any("patch_similarity" in model.nearest for model in scored)
    crops = f", and the {max_pairs} with the most similar crops" if patches else ""
    count = f"{{}} of {total:,} generated images, the {max_pairs} most similar of each model at most{crops}."
    data = {
        "models": [model.name for model in scored],
        "images": pictures.images,
        "pairs": pairs,
        "compare": compare,
        "count": count,
    }
    first = scored[0].scores
    of_first = f" of {scored[0].name}" if _training_sets(scored) > 1 else ""
    values = {
        "title": html.escape(title or "What the model gives back"),
        "lead": html.escape(_lead(scored)),
        "verdict": _verdict(verdict),
        "intro": intro,
        "table": _table(scored),
        "notes": _notes(scored, pictures.num_missing),
        "histogram": inline_svg(lambda axes: plot_similarities(axes, scored), (8, 3.2)),
        "histogram_caption": html.escape(
            f"Similarity to the nearest training image (descriptor: {first['protocol']['descriptor']}); dotted: of "
            f"each training image{of_first} to its nearest other one; the line: over it an image counts as a copy."
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
    """Thumbnails as data addresses, each image or crop once."""

    def __init__(self):
        self.images, self.known, self.sets, self.num_missing = [], {}, {}, 0

    def add(self, scores, side, name, crop=None):
        """The number of the thumbnail of an image of ``scores``, ``generated`` or ``train``, or of one of its crops;
        that of an empty picture if the image is no longer there.
        """
        key = scores[side], name, crop
        if key not in self.known:
            self.known[key] = len(self.images)
            self.images.append(self._thumbnail(scores, side, name, crop))
        return self.known[key]

    def _thumbnail(self, scores, side, name, crop):
        try:
            source = scores[side]
            if source not in self.sets:
                images = images_of(scores, side)
                self.sets[source] = images, {name: index for index, name in enumerate(images.names)}
            images, index = self.sets[source]
            image = images.image(index[name])
        except (KeyError, BadImage, UsageError):
            image, crop = Image.new("RGB", (8, 8), "grey"), None
            self.num_missing += 1
        if crop is not None:
            top, left, size = crop_boxes(image.height, image.width, *scores["protocol"]["patches"])[crop]
            image = image.crop((left, top, left + size, top + size))
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        buffer = io.BytesIO()
        kind = "png" if max(image.size) < 100 else "jpeg"  # small pictures are cheap and suffer from JPEG
        image.save(buffer, format=kind, **({} if kind == "png" else {"quality": 85}))
        code = base64.b64encode(buffer.getvalue()).decode()
        return {"uri": f"data:image/{kind};base64,{code}", "side": max(image.size)}


def _number(value, digits=4):
    return None if value is None or not math.isfinite(value) else round(value, digits)


def _pairs(index, model, max_pairs, pictures):
    """The model's most similar pairs as JSON values, those with the most similar crops included."""
    nearest, scores = model.nearest, model.scores
    chosen = {}
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


def same_prompt_and_seed(scored):
    """[((prompt, seed), [(model, row in its table)])] for what all models with seeds drew; where the first of them
    copies most comes first.
    """
    tables = []
    for model in scored:
        keys = zip(model.nearest["text"], model.nearest["seed"], strict=True)
        rows = {key: row for row, key in enumerate(keys) if key[1] is not None}
        if rows:
            tables.append((model, rows))
    if not tables:
        return []
    (first, of_first), *others = tables
    shared = [key for key in of_first if all(key in rows for _, rows in others)]
    shared.sort(key=lambda key: -first.nearest["similarity"][of_first[key]])
    return [(key, [(model, rows[key]) for model, rows in tables]) for key in shared]


def _compare(scored, pictures):
    """Images of the models with seeds for the same prompt and seed, as JSON values."""
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
        compared.append({"text": key[0], "seed": key[1], "training": training, "cells": cells})
    return compared


def _compare_section(compare):
    if not compare:
        return ""
    text = "Rows where the first model is most similar to a training image; same prompt and seed for all models."
    return f'<h2>The models side by side</h2><p class="muted">{text}</p><div id="compare"></div>'


def _training_sets(scored):
    """How many different ones there are."""
    return len({model.scores.get("train_hash", model.scores["train"]) for model in scored})


def _lead(scored):
    numbers = [f"{model.scores['num_generated']:,} of {model.name}" for model in scored]
    against = [f"compared with {model.scores['num_train']:,} training images" for model in scored]
    if _training_sets(scored) == 1 and len(set(against)) == 1:
        return f"Generated images: {', '.join(numbers)}; {against[0]}."
    return f"Generated images: {'; '.join(', '.join(pair) for pair in zip(numbers, against, strict=True))}."


def _verdict(verdict):
    if verdict is None:
        return ""
    passed, sentence = verdict
    return f'<p class="verdict{"" if passed else " bad"}">{html.escape(sentence)}</p>'


def _share(value):
    return f"{value:.1%}"


# Row title, how to find the value and its interval in the scores, and how to show a number.
ROWS = (
    ("Sim Score (95th percentile) ↓", "sim_score", "{:.3f}".format),
    ("mean similarity ↓", "sim_mean", "{:.3f}".format),
    ("copy rate ↓", "copy_rate", _share),
    ("training images that were copied ↓", "num_copied_train", "{:,}".format),
    ("Sim Score of training images among themselves", "train_train_sim_score", "{:.3f}".format),
    ("MQ 0.4 ↓", "memorized_quantity.0.4", _share),
    ("MQ 0.5 ↓", "memorized_quantity.0.5", _share),
    ("MQ 0.6 ↓", "memorized_quantity.0.6", _share),
    ("memorization ratio (Gu) ↓", "memorization_ratio", _share),
    ("local copies: patch Sim Score ↓", "patch_sim_score", "{:.3f}".format),
    ("local copies: patch copy rate ↓", "patch_copy_rate", _share),
    ("patch Sim Score of training images among themselves", "train_train_patch_sim_score", "{:.3f}".format),
    ("patch copy rate of training images among themselves", "train_train_patch_copy_rate", _share),
    ("CLIP score ↑", "clip_score", "{:.2f}".format),
    ("FID ↓", "fid", "{:.2f}".format),
    ("KID ↓", "kid", lambda value: f"{value[0]:.4f} ± {value[1]:.4f}"),
    ("Fréchet distance ({features}) ↓", "frechet_distance", "{:.3f}".format),
    ("kernel distance ({features}) ↓", "kernel_distance", lambda value: f"{value[0]:.4f} ± {value[1]:.4f}"),
)


def lookup(scores, key):
    """A score by its dotted key, or None."""
    name, _, rest = key.partition(".")
    value = scores.get(name)
    return value.get(rest) if rest and value is not None else value


def table_rows(scored):
    """(title, [(value or None, interval or None) of each model], formatter) of every metric that some model has."""
    frechet = scored[0].scores["protocol"].get("frechet") or {}
    for title, key, show in ROWS:
        name, dot, rest = key.partition(".")
        cells = [(lookup(m.scores, key), lookup(m.scores, f"{name}_ci95{dot}{rest}")) for m in scored]
        if any(value is not None for value, _ in cells):
            yield title.replace("{features}", frechet.get("features", "")), cells, show


def _table(scored):
    head = "".join(f"<th>{html.escape(model.name)}</th>" for model in scored)
    lines = [f"<tr><th></th>{head}</tr>"]
    for title, cells, show in table_rows(scored):
        shown = []
        for value, interval in cells:
            around = f"<small>{show(interval[0])} – {show(interval[1])}</small>" if interval else ""
            shown.append("<td>–</td>" if value is None else f"<td>{show(value)}{around}</td>")
        lines.append(f"<tr><td>{html.escape(title)}</td>{''.join(shown)}</tr>")
    return "".join(lines)


def _notes(scored, num_missing):
    """What to know of the numbers, what could not be computed, and what was left out."""
    lines = []
    if any(model.scores["protocol"]["descriptor"] == "pixel" for model in scored):
        lines.append(
            "Similarity is that of the built-in pixel descriptor, which knows near-exact copies alone; it is not SSCD, "
            "and its numbers do not compare with SSCD's. Give --descriptor sscd_disc_mixup."
        )
    if len({json.dumps(model.scores["protocol"], sort_keys=True) for model in scored}) > 1:
        lines.append("These models were scored under different protocols: their numbers do not compare.")
    if _training_sets(scored) > 1:
        lines.append("These models were scored against different training sets: their numbers do not compare.")
    if num_missing:
        lines.append(f"{num_missing} pictures are no longer where they were when they were scored: grey squares.")
    notes = {}
    for model in scored:
        for note in model.scores["notes"]:
            notes.setdefault(note, []).append(model.name)
    lines += [f"{', '.join(names)}: {note}." for note, names in notes.items()]
    for model in scored:
        for side, skipped in model.scores["skipped"].items():
            if skipped:
                some = "; ".join(f"{name}: {why}" for name, why in skipped[:5])
                lines.append(f"{model.name}: {len(skipped)} of the {side} files were left out. {some}")
    missing = "".join(
        f"<li>{html.escape(model.name)}: <code>{html.escape(key)}</code> {html.escape(why)}</li>"
        for model in scored
        for key, why in model.scores["reasons"].items()
    )
    shown = "".join(f'<p class="muted">{html.escape(line)}</p>' for line in lines)
    if missing:
        shown += f"<details><summary>What was not computed, and why</summary><ul>{missing}</ul></details>"
    return shown


def _protocol(model):
    text = json.dumps(model.scores["protocol"], indent=2, ensure_ascii=False)
    return f"<details><summary>{html.escape(model.name)}</summary><pre>{html.escape(text)}</pre></details>"
