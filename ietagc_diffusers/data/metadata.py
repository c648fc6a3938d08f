"""Metadata files of image folders: which file is one, what its rows say, and what was probably meant by near misses."""

import csv
import os
import re
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import UsageError
from .decoder import native
from .text_files import parse_csv, parse_json, parse_json_lines, read_text, writable

# As `datasets` names them; of several in one folder the first is read.
NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
# Other names that can mean nothing else, in upper or lower case; read where the folder has none of the above.
STEMS = ("metadata", "captions")
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
NEAR_STEMS = re.compile(
    r"(meta|metadata|meta[-_ ]data|captions?|labels?|annotations?|prompts?|data)\b.*", re.IGNORECASE
)
NEAR_SUFFIXES = {*SUFFIXES, ".txt", ".xlsx", ".xls", ".ods", ".yaml", ".yml", ".toml", ".gz", ".json5"}
FILE_NAME = "file_name"
NEAR_FILE_NAME = {
    "filename", "file", "files", "image", "images", "img", "imagename", "imagefile", "imagepath", "imgpath", "filepath",
    "path", "name", "picture", "photo", "filenames",
}  # fmt: skip
NEAR_TEXT = {"text", "texts", "caption", "captions", "prompt", "prompts", "description", "tags", "label"}

Row = dict[str, Any]


def rank(name: str) -> int | None:
    """Where a file's name stands among those of metadata, the first being read; None if it is none of them."""
    if name in NAMES:
        return NAMES.index(name)
    path = PurePosixPath(name.lower())
    if path.stem in STEMS and path.suffix in SUFFIXES:
        return len(NAMES) + STEMS.index(path.stem) * len(SUFFIXES) + SUFFIXES.index(path.suffix)
    return None


def is_near(name: str) -> bool:
    """Whether a file's name looks like that of metadata, but is not read as such."""
    return (
        bool(NEAR_STEMS.fullmatch(name)) and PurePosixPath(name.lower()).suffix in NEAR_SUFFIXES and rank(name) is None
    )


def near_column(columns: Iterable[str], meant: set[str]) -> str | None:
    """The first column whose name is, but for case and marks, one of those ``meant``."""
    return next((name for name in columns if re.sub(r"[^a-z]", "", str(name).lower()) in meant), None)


def read_metadata(path: str, where: str, name_column: str = FILE_NAME) -> list[Row]:
    """The rows of a metadata file, each a dict with the file's name under ``name_column``.

    JSON and CSV are read as they are written: in CSV every value is a string, and an empty one is None.

    Args:
        where: the setting and source, for messages.

    Raises:
        UsageError: the file does not parse, or no row has a ``name_column``.
    """
    try:
        rows = _parse(path)
    except (OSError, ValueError, csv.Error, pa.ArrowException, RecursionError) as error:
        raise UsageError(f"{where}: {path} does not parse: {' '.join(str(error).split())[:300]}") from error
    wrong = next((number for number, row in enumerate(rows, 1) if not isinstance(row, dict)), None)
    if wrong is not None:
        raise UsageError(
            f"{where}: {path}: every line should be a JSON object with {name_column} and text; line {wrong} is not"
        )
    if rows and not any(name_column in row for row in rows):
        columns = list(dict.fromkeys(str(key) for row in rows for key in row))
        raise UsageError(f"{where}: {path} has no {name_column}, only {', '.join(columns)[:200]}{_advice(columns)}")
    return rows


def _advice(columns: list[str]) -> str:
    near = near_column(columns, NEAR_FILE_NAME)
    if near is not None:
        return f": rename {near} to {FILE_NAME}"
    if any(re.search(r"\.\w{3,4}$", name) for name in columns):
        return f": its first line should name the columns, as in {FILE_NAME},text"
    return ""


def _parse(path: str) -> list[Any]:
    suffix = os.path.splitext(path)[1].lower()
    if suffix == ".parquet":
        with open(native(path), "rb") as file:
            return pq.read_table(file).to_pylist()
    text = read_text(path)
    if suffix in (".csv", ".tsv"):
        return list(parse_csv(text))
    rows = _parse_json(text, suffix)
    return _writable(rows) if "\\ud" in text.lower() else rows


def _parse_json(text: str, suffix: str) -> list[Any]:
    if suffix != ".json" and not text.lstrip().startswith("["):
        return parse_json_lines(text)
    try:
        value = parse_json(text)
    except ValueError:
        return parse_json_lines(text)  # says which line is at fault
    if isinstance(value, dict):
        return [value] if FILE_NAME in value else [_named(name, about) for name, about in value.items()]
    return value if isinstance(value, list) else [value]


def _writable(value: Any) -> Any:
    """The same without halves of characters, which no file can hold."""
    if isinstance(value, dict):
        return {_writable(key): _writable(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_writable(one) for one in value]
    return writable(value) if isinstance(value, str) else value


def _named(name: str, about: Any) -> Row:
    """A row of ``{name: caption, captions or object}``."""
    return {FILE_NAME: name} | (about if isinstance(about, dict) else {"text": about})
