"""Text files as people have them: in a Unicode encoding with its mark, JSON by line or whole, CSV of any delimiter."""

import codecs
import csv
import io
import json
from os import PathLike, fspath
from typing import Any

from .decoder import read_file

# The longer marks first: UTF-32's begins with UTF-16's.
MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
DELIMITERS = ",;\t|"
MAX_FIELD = 1 << 27  # characters of a CSV field; Python's own limit is 131,072


def read_text(path: str | PathLike) -> str:
    """The text of a file in UTF-8, or in UTF-16 or UTF-32 with a byte order mark; every line ends with ``\\n``.

    Raises:
        ValueError: another encoding, with the line and what would do.
        OSError: the file cannot be read.
    """
    return decode_text(read_file(fspath(path)))


def decode_text(content: bytes) -> str:
    """The text of a file's content, see ``read_text``. Raises ``ValueError`` for another encoding."""
    encoding = next((name for mark, name in MARKS if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(_of_encoding(content, encoding, error)) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _of_encoding(content: bytes, encoding: str, error: UnicodeDecodeError) -> str:
    if encoding != "utf-8":
        return f"its encoding is damaged: it begins as {encoding}, and byte {error.start} is none of it"
    if b"\0" in content[:1000]:
        return "its encoding seems to be UTF-16 without a byte order mark; save it as UTF-8"
    line = content.count(b"\n", 0, error.start) + 1
    return (
        f"its encoding is not UTF-8 (byte 0x{content[error.start]:02x} in line {line}), but probably cp1252, as "
        "Windows writes it; save it as UTF-8"
    )


def parse_json(text: str) -> Any:
    """The value of a JSON text, or the list of its lines' values where each line is JSON.

    Raises ``ValueError`` naming the line.
    """
    try:
        return json.loads(text)
    except ValueError:
        return parse_json_lines(text)


def parse_json_lines(text: str) -> list[Any]:
    """The value of each line that is not empty. Raises ``ValueError`` naming the line."""
    values = []
    for number, line in enumerate(text.split("\n"), 1):
        if line and not line.isspace():
            try:
                values.append(json.loads(line))
            except ValueError as error:
                reason = getattr(error, "msg", error)
                raise ValueError(f"line {number} is not JSON: {reason}: {line.strip()[:80]}") from error
    return values


def parse_csv(text: str) -> list[dict[str, Any]]:
    """The rows of a CSV text as dicts of strings; the delimiter is the one that its first line has most of.

    A field that is missing or empty is None. Raises ``ValueError`` or ``csv.Error`` naming the row.
    """
    header = text.partition("\n")[0]
    delimiter = max(DELIMITERS, key=header.count)
    csv.field_size_limit(MAX_FIELD)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    names = [name.strip() for name in next(reader, [])]
    rows: list[dict[str, Any]] = []
    for fields in reader:
        if not fields:
            continue
        if len(fields) > len(names):
            raise ValueError(
                f"row {len(rows) + 1} has more fields than the header names: put texts with {delimiter!r} in quotes"
            )
        row: dict[str, Any] = dict.fromkeys(names)
        row.update((name, field or None) for name, field in zip(names, fields, strict=False))
        rows.append(row)
    return rows


def writable(text: str) -> str:
    """A string that can be written as UTF-8: JSON can hold halves of characters."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()
