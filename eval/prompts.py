"""Prompts from a file or from the captions of a set of images."""

import csv
import io
import json
import random
from dataclasses import dataclass
from pathlib import Path

from ietagc_diffusers.errors import UsageError

COLUMNS = ("text", "prompt", "caption")
LABELS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


@dataclass(frozen=True)
class Prompt:
    """A prompt; sample_id and source: the training image whose caption it is, if it is one."""

    text: str
    sample_id: int | None = None
    source: str | None = None


def read_prompts(path, flag="--prompts"):
    """The prompts of a file: ``.txt`` (one a line), ``.csv``/``.tsv`` (any delimiter) or ``.jsonl``/``.json``
    (a list of objects or strings) with a column ``text``, ``prompt`` or ``caption``, in any case. A ``.json`` may also
    be captions by name, ``{name: caption or [captions]}``, of which each name's first is taken.

    Raises:
        UsageError: naming the row that has no prompt.
    """
    rows = _rows(path, flag)
    return [Prompt(_prompt_of(row, f"{flag} {path}: row {number}")) for number, row in enumerate(rows, 1)]


def read_labels(path, flag="--prompts"):
    """Whether each prompt of a file is memorized, as its column ``memorized`` says: N bool, or None if it says nothing.

    Raises:
        UsageError: naming the first row without a label, if others have one.
    """
    found = [_label_of(row, f"{flag} {path}: row {number}") for number, row in enumerate(_rows(path, flag), 1)]
    if set(found) == {None}:
        return None
    if None in found:
        raise UsageError(f"{flag} {path}: row {found.index(None) + 1}: memorized is empty, but other rows have a label")
    return found


def _rows(path, flag):
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{flag} {path}: no such file")
    suffix = path.suffix.lower()
    try:
        text = path.read_text(encoding="utf-8-sig")
        if suffix == ".json":
            rows = _json_rows(json.loads(text))
        elif suffix == ".jsonl":
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        elif suffix in (".csv", ".tsv"):
            rows = _csv_rows(text)
        else:
            rows = [line for line in text.split("\n") if line.strip()]
    except (ValueError, csv.Error) as error:
        raise UsageError(f"{flag} {path}: does not parse: {error}") from error
    if not rows:
        raise UsageError(f"{flag} {path}: holds no prompts")
    return rows


def _json_rows(value):
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


def _csv_rows(text):
    header = text.partition("\n")[0]
    delimiter = max(",;\t|", key=header.count)
    rows = list(csv.DictReader(io.StringIO(text), delimiter=delimiter))
    for number, row in enumerate(rows, 1):
        if None in row:
            raise ValueError(f"row {number} has more fields than the header names: put prompts in quotes")
    return rows


def _prompt_of(row, where):
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


def _label_of(row, where):
    value = _by_lower_case(row).get("memorized") if isinstance(row, dict) else None
    text = "" if value is None else str(value).strip().lower()
    if text and text not in LABELS:
        raise UsageError(f"{where}: memorized {value!r}: must be true or false, 1 or 0, yes or no")
    return LABELS.get(text)


def _by_lower_case(row):
    return {str(key).lower(): value for key, value in row.items()}


def caption_prompts(images, flag):
    """The captions of an ``ImageSet`` as prompts, one an image that has one."""
    captions = images.captions()
    if not captions:
        raise UsageError(
            f"{flag} {images.source}: its images have no captions (a metadata.jsonl with text); give --prompts"
        )
    return [Prompt(text, images.rows[index].get("sample_id"), images.names[index]) for index, text in captions]


def choose(prompts, num_images, seed):
    """``num_images`` prompts: all of them over and over, the last time (or the only one) a seeded draw, in order."""
    whole, rest = divmod(num_images, len(prompts))
    drawn = sorted(random.Random(seed).sample(range(len(prompts)), rest))
    return prompts * whole + [prompts[index] for index in drawn]
