"""Hashes of images: of the bytes as they are stored, and of the decoded pixels, which a cache keeps between runs."""

import hashlib
import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from datasets import Image as ImageFeature
from tqdm.auto import tqdm

from ..errors import UsageError
from ..files import cache_folder
from .decoder import decoder_mark, read_file
from .rows import decode
from .work import batched, in_threads

ROWS_AT_ONCE = 32  # of a thread: of large images, a few hundred megabytes


def default_cache() -> Path:
    """``$XDG_CACHE_HOME/ietagc/pixel_hashes.sqlite``, by default in ~/.cache."""
    return cache_folder() / "pixel_hashes.sqlite"


def digest(*parts: bytes) -> bytes:
    """16 bytes that stand for some content."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        state.update(part)
    return state.digest()


def stored_hashes(rows: Dataset, image_column: str, progress: str | None = None) -> list[bytes]:
    """Of each row's image, 16 bytes that stand for what is stored: the file's content, without decoding it.

    Of an image that is nowhere on this machine (a URL) the address stands for it; a row without image has b"".
    ``progress``: title of a progress bar.
    """
    stored = rows.select_columns([image_column]).cast_column(image_column, ImageFeature(decode=False))
    starts = range(0, len(rows), ROWS_AT_ONCE)

    def hashes_from(start: int) -> list[bytes]:
        return [_stored_hash(image) for image in stored[start : start + ROWS_AT_ONCE][image_column]]

    bar = tqdm(in_threads(hashes_from, starts), progress, total=len(starts), leave=False, disable=progress is None)
    return [one for some in bar for one in some]


def _stored_hash(image: dict[str, Any] | None) -> bytes:
    if image is None:
        return b""
    if image["bytes"] is not None:
        return digest(image["bytes"])
    try:
        return digest(read_file(image["path"]))
    except (OSError, TypeError, ValueError):
        return digest(str(image["path"]).encode())


class PixelHashes:
    """Hashes of decoded pixels by the hash of what is stored, in one SQLite file that runs share.

    Without a path, or where the file cannot be written, they are kept in memory.
    """

    def __init__(self, path: Path | None):
        try:
            self._open(path)
        except (OSError, sqlite3.Error):
            self._open(None)

    def _open(self, path: Path | None) -> None:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        self.connection = sqlite3.connect(":memory:" if path is None else path, timeout=60)
        self.connection.execute("CREATE TABLE IF NOT EXISTS hashes (stored BLOB PRIMARY KEY, pixels BLOB)")

    def known(self) -> dict[bytes, bytes]:
        return dict(self.connection.execute("SELECT stored, pixels FROM hashes"))

    def add(self, pairs: list[tuple[bytes, bytes]]) -> None:
        with self.connection:
            self.connection.executemany("INSERT OR REPLACE INTO hashes VALUES (?, ?)", pairs)

    def close(self) -> None:
        self.connection.close()


def pixel_hashes(
    rows: Dataset,
    image_column: str,
    cache: Path | None = None,
    allow_bad: bool = False,
    progress: bool = True,
    alpha: str = "white",
) -> np.ndarray:
    """Int64 (N,): equal for rows whose images decode to the same RGB pixels.

    Images are decoded in threads; with ``cache`` (see ``default_cache``) each only once, whatever the run. Raises
    ``UsageError`` for an image that does not decode; with ``allow_bad`` it is taken for different from all others.
    ``alpha``: see ``decoder.to_rgb``.
    """
    images = rows.select_columns([image_column])
    mark = json.dumps(decoder_mark(alpha)).encode()  # another decoder makes other pixels of the same file
    files = stored_hashes(images, image_column, "Reading images" if progress else None)
    stored = [digest(one, mark) for one in files]

    def hash_of(row: int) -> bytes | None:
        try:
            image = decode(images, image_column, row, alpha)
        except UsageError:
            if not allow_bad:
                raise
            return None
        return digest(f"{image.size}".encode(), image.tobytes())

    with closing(PixelHashes(cache)) as kept:
        known = kept.known()
        first = {one: row for row, one in reversed(list(enumerate(stored))) if one not in known}
        bar = tqdm(total=len(first), desc="Looking for duplicates", leave=False, disable=not progress)
        for some in batched(sorted(first.values()), 1000):
            found = zip((stored[row] for row in some), in_threads(hash_of, some), strict=True)
            pairs = [(one, pixels) for one, pixels in found if pixels is not None]
            kept.add(pairs)
            known.update(pairs)
            bar.update(len(some))
    pixels = [known.get(one) or digest(f"row {row}".encode()) for row, one in enumerate(stored)]
    return np.unique(pixels, return_inverse=True)[1]
