"""Prompts from a file, or from the captions of a set of images."""

import csv
import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ietagc_diffusers.data.text_files import parse_csv, parse_json, parse_json_lines, read_text
from ietagc_diffusers.errors import UsageError

if TYPE_CHECKING:
    from .image_sets import ImageSet

T = TypeVar("T")
COLUMNS = ("text", "prompt", "caption")
LABELS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


@dataclass(frozen=True)
class Prompt:
    """A prompt. If it is the caption of a training image, ``sample_id`` and ``source`` say of which.

    For a model without prompts ``text`` is empty, and ``label`` the class, if it has classes.
    """

    text: str
    sample_id: int | None = None
    source: str | None = None
    label: int | None = None

    def record(self) -> dict[str, Any]:
        """JSON values."""
        values = asdict(self)
        return {key: value for key, value in values.items() if key != "label" or value is not None}


def read_prompts(path: str | Path, setting: str = "prompts") -> list[Prompt]:
    """The prompts of a file.

    A ``.txt`` file has one prompt a line. A ``.csv`` or ``.tsv`` file (any delimiter) and a ``.jsonl`` or ``.json``
    file (a list of objects or strings) have a column ``text``, ``prompt`` or ``caption``, in upper or lower case. A
    ``.json`` file may also hold captions by name, ``{name: caption or [captions]}``; each name's first is taken.

    Args:
        setting: the setting that names the file, for messages.

    Raises:
        UsageError: there is no such file, it does not parse, or a row, which is named, has no prompt.
    """
    rows = _rows(path, setting)
    return [Prompt(_prompt_of(row, f"`{setting}` {path}: row {number}")) for number, row in enumerate(rows, 1)]


def read_labels(path: str | Path, setting: str = "prompts") -> list[bool] | None:
    """Whether each prompt of a file is memorized, by its column ``memorized``: N bool, or None without that column.

    Raises:
        UsageError: naming the first row without a label, if others have one.
    """
    found = [_label_of(row, f"`{setting}` {path}: row {number}") for number, row in enumerate(_rows(path, setting), 1)]
    labels = [label for label in found if label is not None]
    if labels and len(labels) < len(found):
        row = found.index(None) + 1
        raise UsageError(f"`{setting}` {path}: row {row}: memorized is empty, but other rows have a label")
    return labels or None


def _rows(path: str | Path, setting: str) -> list[Any]:
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"`{setting}` {path}: no such file")
    suffix = path.suffix.lower()
    try:
        text = read_text(path)
        if suffix == ".json":
            rows = _json_rows(parse_json(text))
        elif suffix in (".jsonl", ".ndjson"):
            rows = parse_json_lines(text)
        elif suffix in (".csv", ".tsv"):
            rows = parse_csv(text)
        else:
            rows = [line for line in text.split("\n") if line.strip()]
    except (OSError, ValueError, csv.Error) as error:
        raise UsageError(f"`{setting}` {path}: does not parse: {error}") from error
    if not rows:
        raise UsageError(f"`{setting}` {path}: holds no prompts")
    return rows


def _json_rows(value: Any) -> list[Any]:
    if isinstance(value, list):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"should be a list or an object of captions by name, is {json.dumps(value)[:80]}")
    rows = []
    for name, captions in value.items():
        first = captions[0] if isinstance(captions, list) and captions else captions
        if not isinstance(first, str):
            raise ValueError(f"{name}: should be a caption or a list of captions, is {json.dumps(captions)[:80]}")
        rows.append(first)
    return rows


def _prompt_of(row: Any, where: str) -> str:
    if isinstance(row, str):
        return row
    if not isinstance(row, dict):
        raise UsageError(f"{where}: should be a string or an object, is {json.dumps(row)[:80]}")
    lower = _by_lower_case(row)
    for column in COLUMNS:
        value = lower.get(column)
        if isinstance(value, str) and value.strip():
            return value
    raise UsageError(f"{where}: has no text in a column {' or '.join(COLUMNS)}, only {', '.join(lower) or 'nothing'}")


def _label_of(row: Any, where: str) -> bool | None:
    value = _by_lower_case(row).get("memorized") if isinstance(row, dict) else None
    text = "" if value is None else str(value).strip().lower()
    if text and text not in LABELS:
        raise UsageError(f"{where}: memorized {value!r}: must be true or false, 1 or 0, yes or no")
    return LABELS.get(text)


def _by_lower_case(row: dict[str, Any]) -> dict[str, Any]:
    return {str(key).lower(): value for key, value in row.items()}


def caption_prompts(images: "ImageSet", setting: str) -> list[Prompt]:
    """The captions of a set of images as prompts; images without one are left out.

    Args:
        setting: the setting that names the images, for messages.
    """
    captions = images.captions()
    if not captions:
        column = images.columns.get("text_column", "text")
        raise UsageError(
            f"`{setting}` {images.source}: its images have no captions (a metadata.jsonl with {column}); give `prompts`"
        )
    return [Prompt(text, images.rows[index].get("sample_id"), images.names[index]) for index, text in captions]


def without_prompts(num_images: int, classes: int | None, seed: int) -> list[Prompt]:
    """What a model without prompts is asked for: nothing, or the classes 0 to ``classes`` - 1, each as often as they
    fit and a seeded draw of the rest.
    """
    if classes is None:
        return [Prompt("")] * num_images
    return choose([Prompt("", label=label) for label in range(classes)], num_images, seed)


def choose(prompts: list[T], num_images: int, seed: int) -> list[T]:
    """``num_images`` of a list: all of them as often as they fit, then a seeded draw of the rest, each in order."""
    whole, rest = divmod(num_images, len(prompts))
    drawn = sorted(random.Random(seed).sample(range(len(prompts)), rest))
    return prompts * whole + [prompts[index] for index in drawn]
