"""What tells one training set from another, whatever the order of its rows and wherever they lie."""

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from .decoder import BadImage, native, read_stored
from .hashes import digest
from .sources import stored_column

READ_WHOLE = 2000  # images whose bytes are read; of all others only the sizes
NOT_HERE = -1  # the size of an image that is not on this machine, such as one at a URL
SHOWN = 16  # hexadecimal digits of a fingerprint


@dataclass(frozen=True)
class Contents:
    """Fingerprints of the rows of a training set.

    A caption is often short enough to be guessed. ``captions`` is therefore keyed by the images: only someone who has
    all the images can find out whether a guess is right.

    Attributes:
        images: 16 hexadecimal digits for the images without their captions: their number, the sizes of all files, and
            the bytes of up to 2,000 of them.
        captions: the same for what the model is told of each image; None without such columns.
        marks: of each row, 16 bytes that stand for its image's file, or None where it was not read.
    """

    images: str
    captions: str | None
    marks: list[bytes | None]


def contents(rows: Dataset, image_column: str, columns: Sequence[str] = ()) -> Contents:
    """The fingerprints of ``rows``. ``columns``: what the model is told of an image besides the image."""
    stored = stored_column(rows, image_column)
    paths = pc.struct_field(stored, "path").to_pylist()
    sizes = _sizes(pc.binary_length(pc.struct_field(stored, "bytes")), paths)
    marks: list[bytes | None] = [None] * len(rows)
    for row in _read_whole(sizes):
        marks[row] = _mark(stored[int(row)].as_py())
    images = [
        int(size).to_bytes(8, signed=True) + (mark or _address(paths[row]) if size == NOT_HERE else mark or b"")
        for row, (size, mark) in enumerate(zip(sizes, marks, strict=True))
    ]
    whole = hashlib.blake2b(b"".join(sorted(images)), digest_size=32)
    return Contents(whole.hexdigest()[:SHOWN], _captions(rows, columns, images, whole.digest()), marks)


def _sizes(lengths: pa.ChunkedArray, paths: list[str | None]) -> np.ndarray:
    """The size of each image's file in bytes, int64 (N,)."""
    sizes = pc.fill_null(lengths, NOT_HERE).to_numpy().astype(np.int64)
    for row in np.flatnonzero(sizes == NOT_HERE):
        path = paths[row]
        if path is not None:
            with suppress(OSError, ValueError):
                sizes[row] = os.stat(native(path)).st_size
    return sizes


def _read_whole(sizes: np.ndarray) -> np.ndarray:
    """The rows whose images are read whole: all, or of many images those of some sizes.

    Which sizes depends on the sizes only, so that the order of the rows does not show.
    """
    if len(sizes) <= READ_WHOLE:
        return np.arange(len(sizes))
    different, which, counts = np.unique(sizes, return_inverse=True, return_counts=True)
    chosen, left = [], READ_WHOLE
    for number in sorted(range(len(different)), key=lambda number: digest(str(different[number]).encode())):
        if counts[number] <= left:
            chosen.append(number)
            left -= counts[number]
        if not left:
            break
    if not chosen:  # nearly all files are of the same size
        return np.linspace(0, len(sizes) - 1, READ_WHOLE).astype(int)
    return np.flatnonzero(np.isin(which, chosen))


def _mark(image: dict[str, Any] | None) -> bytes | None:
    """16 bytes that stand for an image's file; None if it cannot be read."""
    try:
        encoded = read_stored(image)
    except BadImage:
        return None
    return None if encoded is None else digest(encoded)


def _address(path: str | None) -> bytes:
    """What stands for an image that is elsewhere: its URL, but no path of a machine."""
    return digest(path.encode()) if path and "://" in path else b""


def _captions(rows: Dataset, columns: Sequence[str], images: list[bytes], key: bytes) -> str | None:
    if not columns or any(column not in rows.column_names for column in columns):
        return None
    values = zip(*(stored_column(rows, column).to_pylist() for column in columns), strict=True)
    told = [
        image + digest(json.dumps(value, default=str).encode()) for image, value in zip(images, values, strict=True)
    ]
    return hashlib.blake2b(b"".join(sorted(told)), digest_size=SHOWN // 2, key=key).hexdigest()
