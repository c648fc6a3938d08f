"""Prompts from a file or from the captions of a set of images."""

import csv
import io
import json
import random
from dataclasses import dataclass
from pathlib import Path

from ietagc_diffusers.config import UsageError

COLUMNS = ("text", "prompt", "caption")


@dataclass(frozen=True)
class Prompt:
    """A prompt; sample_id and source: the training image whose caption it is, if it is one."""

    text: str
    sample_id: int | None = None
    source: str | None = None


def read_prompts(path, flag="--prompts"):
    """The prompts of a file: ``.txt`` (one a line), ``.csv``/``.tsv`` (any delimiter) or ``.jsonl``/``.json``
    (a list of objects or strings) with a column ``text``, ``prompt`` or ``caption``, in any case.

    Raises:
        UsageError: naming the row that has no prompt.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{flag} {path}: no such file")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix in (".jsonl", ".json"):
            rows = _json_rows(text, path.suffix)
        elif path.suffix in (".csv", ".tsv"):
            rows = _csv_rows(text)
        else:
            rows = [line for line in text.split("\n") if line.strip()]
    except (ValueError, csv.Error) as error:
        raise UsageError(f"{flag} {path}: does not parse: {error}") from error
    prompts = [Prompt(_prompt_of(row, f"{flag} {path}: row {number}")) for number, row in enumerate(rows, 1)]
    if not prompts:
        raise UsageError(f"{flag} {path}: holds no prompts")
    return prompts


def _json_rows(text, suffix):
    if suffix == ".json":
        return json.loads(text)
    return [json.loads(line) for line in text.split("\n") if line.strip()]


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
    lower = {str(key).lower(): value for key, value in row.items()}
    for column in COLUMNS:
        value = lower.get(column)
        if isinstance(value, str) and value.strip():
            return value
    raise UsageError(f"{where}: has no text in a column {' or '.join(COLUMNS)}, only {', '.join(lower) or 'nothing'}")


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
