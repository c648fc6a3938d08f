"""What images are told apart by: hashes of the bytes as they are stored; and of the decoded pixels, which a cache keeps
between runs, hashes and the vectors of near duplicates.
"""

import hashlib
import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image
from tqdm.auto import tqdm

from ..errors import UsageError
from ..files import cache_folder
from .decoder import decoder_mark, read_file
from .near_duplicates import (
    VERSION,
    Clusters,
    Vectors,
    both_ways,
    calibrate,
    cluster,
    largest_first,
    low_frequencies,
    of_half,
)
from .rows import decode
from .work import batched, in_threads

HASH = 16  # bytes of a hash
ROWS_AT_ONCE = 32  # of a thread: of large images, a few hundred megabytes


def default_cache() -> Path:
    """``$XDG_CACHE_HOME/ietagc/pixel_hashes.sqlite``, by default in ~/.cache."""
    return cache_folder() / "pixel_hashes.sqlite"


def digest(*parts: bytes) -> bytes:
    """16 bytes that stand for some content."""
    state = hashlib.blake2b(digest_size=HASH)
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


class PixelCache:
    """What was found of decoded pixels by the hash of what is stored, in one SQLite file that runs share.

    Without a path, or where the file cannot be written, it is kept in memory. ``table``: of the file.
    """

    def __init__(self, path: Path | None, table: str):
        self.table = table
        try:
            self._open(path)
        except (OSError, sqlite3.Error):
            self._open(None)

    def _open(self, path: Path | None) -> None:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        self.connection = sqlite3.connect(":memory:" if path is None else path, timeout=60)
        self.connection.execute(f"CREATE TABLE IF NOT EXISTS {self.table} (stored BLOB PRIMARY KEY, pixels BLOB)")

    def known(self, stored: set[bytes]) -> dict[bytes, bytes]:
        """Of these images, those that are in the cache."""
        found: dict[bytes, bytes] = {}
        for some in batched(stored, 500):
            marks = ",".join("?" * len(some))
            query = f"SELECT stored, pixels FROM {self.table} WHERE stored IN ({marks})"
            found |= dict(self.connection.execute(query, some))
        return found

    def add(self, pairs: list[tuple[bytes, bytes]]) -> None:
        with self.connection:
            self.connection.executemany(f"INSERT OR REPLACE INTO {self.table} VALUES (?, ?)", pairs)

    def close(self) -> None:
        self.connection.close()


def _pixel_hash(image: Image.Image) -> bytes:
    return digest(f"{image.size}".encode(), image.tobytes())


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
    found = _of_pixels(rows, image_column, _pixel_hash, cache, "hashes", {}, allow_bad, progress, alpha)
    return _numbered(found)


def _numbered(hashes: list[bytes | None]) -> np.ndarray:
    """Int64 (N,): equal for equal hashes; None equals nothing."""
    different = [f"row {row}".encode() if one is None else one for row, one in enumerate(hashes)]
    return np.unique(different, return_inverse=True)[1]


class Described(NamedTuple):
    """What duplicates of N images are found by. Of an image that does not decode the vectors are 0.

    hashes: as of ``pixel_hashes``, (N,); sizes: width and height in pixels, int64 (N, 2); vectors: of
    ``near_duplicates.low_frequencies``.
    """

    hashes: np.ndarray
    sizes: np.ndarray
    vectors: Vectors


def described(
    rows: Dataset,
    image_column: str,
    cache: Path | None = None,
    allow_bad: bool = False,
    progress: bool = True,
    alpha: str = "white",
) -> Described:
    """What duplicates and near duplicates are found by. Arguments are those of ``pixel_hashes``."""
    mark = {"low_frequencies": VERSION}
    found = _of_pixels(rows, image_column, _description, cache, "descriptions", mark, allow_bad, progress, alpha)
    bare = _description(Image.new("RGB", (1, 1)))
    sizes = np.array([np.frombuffer(one or bare, np.uint32, 2, HASH) for one in found]).astype(np.int64)
    vectors = np.array([np.frombuffer(one or bare, np.float16, offset=HASH + 8) for one in found])
    hashes = _numbered([None if one is None else one[:HASH] for one in found])
    return Described(hashes, sizes, both_ways(of_half(torch.from_numpy(vectors))))


def _description(image: Image.Image) -> bytes:
    """Hash, size and vector of an image."""
    vector = vector_of(image).numpy().astype(np.float16)
    return _pixel_hash(image) + np.array(image.size, np.uint32).tobytes() + vector.tobytes()


def vector_of(image: Image.Image) -> torch.Tensor:
    """The vector (D,) of an RGB image, see ``near_duplicates.low_frequencies``."""
    return low_frequencies(torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None])[0]


def near_clusters(
    rows: Dataset, image_column: str, found: Described, similarity: float | None = None, alpha: str = "white"
) -> tuple[Clusters, float]:
    """The clusters of near duplicates, of which the largest image is kept, and the similarity that they exceed.

    Args:
        found: of the rows.
        similarity: from which images are near duplicates; None: what ``near_duplicates.calibrate`` finds.
    """
    if similarity is None:
        measured = calibrate(found.vectors, lambda row: decode(rows, image_column, row, alpha), vector_of)
        similarity = measured.threshold
    return cluster(found.vectors, similarity, largest_first(found.sizes)), similarity


def _of_pixels(
    rows: Dataset,
    image_column: str,
    compute: Callable[[Image.Image], bytes],
    cache: Path | None,
    table: str,
    mark: dict[str, Any],
    allow_bad: bool,
    progress: bool,
    alpha: str,
) -> list[bytes | None]:
    """What ``compute`` finds of each row's decoded image; None for one that does not decode, with ``allow_bad``.

    ``mark``: JSON values that stand for ``compute``.
    """
    images = rows.select_columns([image_column])
    marked = json.dumps(decoder_mark(alpha) | mark).encode()  # another decoder makes other pixels of the same file
    files = stored_hashes(images, image_column, "Reading images" if progress else None)
    stored = [digest(one, marked) for one in files]

    def of_row(row: int) -> bytes | None:
        try:
            return compute(decode(images, image_column, row, alpha))
        except UsageError:
            if not allow_bad:
                raise
            return None

    with closing(PixelCache(cache, table)) as kept:
        known = kept.known(set(stored))
        first = {one: row for row, one in reversed(list(enumerate(stored))) if one not in known}
        bar = tqdm(total=len(first), desc="Looking for duplicates", leave=False, disable=not progress)
        for some in batched(sorted(first.values()), 1000):
            found = zip((stored[row] for row in some), in_threads(of_row, some), strict=True)
            pairs = [(one, pixels) for one, pixels in found if pixels is not None]
            kept.add(pairs)
            known.update(pairs)
            bar.update(len(some))
    return [known.get(one) for one in stored]
