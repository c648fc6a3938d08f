"""Features of a set of images, each computed once and cached on disk by the hash of the image's file."""

import hashlib
import json
import os
import sqlite3
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torchvision.transforms.v2 import functional as TF
from tqdm.auto import tqdm

from ietagc_diffusers.errors import UsageError

from .image_sets import NO_ROW, BadImage, ImageSet, comparable, to_tensor

DTYPES = {"f": np.float32, "u": np.uint8}
PIXELS_AT_ONCE = 16_000_000  # 16 photographs of a megapixel, or one large one


class Extractor(Protocol):
    """Images uint8 (N, 3, H, W) -> vectors (N, D), float32 or uint8. Every descriptor is one.

    identity: a dict of JSON values that changes whenever the vectors do.
    """

    @property
    def identity(self) -> dict: ...

    def __call__(self, images: torch.Tensor) -> torch.Tensor: ...


def default_cache() -> Path:
    """``$XDG_CACHE_HOME/ietagc/features``, by default in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ietagc" / "features"


class FeatureCache:
    """Vectors of one extractor, by content hash: one SQLite file, committed batch by batch, that processes can share.

    Without a folder, or if the file cannot be written, vectors are kept in memory.
    """

    def __init__(self, folder: str | Path | None, identity: dict) -> None:
        self.path = None
        if folder is not None:
            text = json.dumps(identity, sort_keys=True)
            self.path = Path(folder) / f"{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}.sqlite"
        self.connection = self._open(str(identity))

    def _open(self, identity: str) -> sqlite3.Connection:
        if self.path is not None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                return self._connect(self.path, identity)
            except (OSError, sqlite3.Error) as error:
                self._give_up(error)
        return self._connect(":memory:", identity)

    @staticmethod
    def _connect(where: str | Path, identity: str) -> sqlite3.Connection:
        connection = sqlite3.connect(where, timeout=60)
        connection.execute("CREATE TABLE IF NOT EXISTS vectors (key BLOB PRIMARY KEY, kind TEXT, vector BLOB)")
        connection.execute("CREATE TABLE IF NOT EXISTS identity (text TEXT PRIMARY KEY)")
        connection.execute("INSERT OR IGNORE INTO identity VALUES (?)", (identity,))
        connection.commit()
        return connection

    def _give_up(self, error: Exception) -> None:
        """Rename a damaged file, so that the next run starts a new one."""
        warnings.warn(f"{self.path}: features are not cached in this run: {error}", stacklevel=3)
        damaged = isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError)
        if damaged and self.path is not None and self.path.exists():
            self.path.replace(self.path.with_suffix(".damaged"))

    def _or_in_memory(self, action: Callable[[], Any]) -> Any:
        """The result of ``action``; if the file fails, that of a cache in memory, which is used from now on."""
        try:
            return action()
        except sqlite3.Error as error:
            self._give_up(error)
            self.connection = self._connect(":memory:", "")
            return action()

    def get(self, keys: list[bytes]) -> dict[bytes, np.ndarray]:
        """{key: vector} of the keys that are in the cache."""
        return self._or_in_memory(lambda: self._get(keys))

    def _get(self, keys: list[bytes]) -> dict[bytes, np.ndarray]:
        marks = ",".join("?" * len(keys))
        rows = self.connection.execute(f"SELECT key, kind, vector FROM vectors WHERE key IN ({marks})", keys)
        return {key: np.frombuffer(vector, dtype=DTYPES[kind]) for key, kind, vector in rows}

    def put(self, vectors: dict[bytes, np.ndarray]) -> None:
        """Add {key: vector}."""
        rows = [(key, "u" if v.dtype == np.uint8 else "f", v.tobytes()) for key, v in vectors.items()]
        self._or_in_memory(lambda: self._put(rows))

    def _put(self, rows: list[tuple]) -> None:
        with self.connection:
            self.connection.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?, ?)", rows)


@dataclass(frozen=True)
class Embedded:
    """Features of the images of a set that could be used.

    images: these M images; features: {extractor name: (M, D)}; kept: their indices in the set; keys: the hashes of
    their files; skipped: [name, reason] of the others.
    """

    images: ImageSet
    features: dict[str, torch.Tensor]
    kept: list[int]
    keys: list[bytes]
    skipped: list[list[str]]

    def select(self, indices: list[int]) -> "Embedded":
        """Some of the M images with their features."""
        return Embedded(
            self.images.select(indices),
            {name: vectors[indices] for name, vectors in self.features.items()},
            [self.kept[i] for i in indices],
            [self.keys[i] for i in indices],
            self.skipped,
        )

    def content(self) -> str:
        """A hash of the images' files that does not depend on their names and order."""
        return hashlib.blake2b(b"".join(sorted(self.keys)), digest_size=8).hexdigest()


def embed(
    images: ImageSet,
    extractors: Mapping[str, Extractor],
    cache: str | Path | None = None,
    batch_size: int = 32,
    desc: str = "Describing images",
) -> Embedded:
    """Features of a set of images.

    Args:
        extractors: {name: extractor}.
        cache: the folder of the ``FeatureCache``s, or None.
        batch_size: images that are read at a time.
        desc: the title of the progress bar.

    An image that does not decode, or whose features are not finite, is skipped and named. If the process is killed, the
    features computed so far are in the cache.

    Raises:
        UsageError: no image could be used.
    """
    caches = {name: FeatureCache(cache, extractor.identity) for name, extractor in extractors.items()}
    vectors: dict[str, list[np.ndarray]] = {name: [] for name in extractors}
    kept, keys, skipped = [], [], [entry for entry in images.skipped if entry[1] != NO_ROW]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool, tqdm(total=len(images), desc=desc) as bar:
        for start in range(0, len(images), batch_size):
            batch = range(start, min(start + batch_size, len(images)))
            hashes, found, bad = _embed_batch(images, batch, extractors, caches, pool)
            for index in batch:
                if index in bad:
                    skipped.append([images.names[index], bad[index]])
                else:
                    kept.append(index)
                    keys.append(hashes[index])
                    for name in extractors:
                        vectors[name].append(found[index][name])
            bar.update(len(batch))
    if not kept:
        why = f": {skipped[0][0]} {skipped[0][1]}" if skipped else ""
        raise UsageError(f"{images.source}: none of its {len(images)} images can be used{why}")
    features = {name: torch.from_numpy(np.stack(vectors[name])) for name in extractors}
    return Embedded(images.select(kept), features, kept, keys, skipped)


def _embed_batch(
    images: ImageSet,
    batch: range,
    extractors: Mapping[str, Extractor],
    caches: dict[str, FeatureCache],
    pool: ThreadPoolExecutor,
) -> tuple[dict[int, bytes], dict[int, dict[str, np.ndarray]], dict[int, str]]:
    """Returns {index: hash of its file}, {index: {name: vector}} and {index: reason why it is skipped}."""
    bad = {}

    def guarded(function, index, *args):
        try:
            return function(index, *args)
        except BadImage as error:
            bad[index] = str(error)
            return None

    encoded = dict(zip(batch, pool.map(lambda index: guarded(images.encoded, index), batch), strict=True))
    keys = {index: images.key(value) for index, value in encoded.items() if value is not None}
    found = {name: cache.get(list(set(keys.values()))) for name, cache in caches.items()}
    missing = [index for index in keys if any(keys[index] not in found[name] for name in extractors)]
    for group in _groups(images, missing, encoded, guarded, pool):
        for name, extractor in extractors.items():
            wanted = {keys[i]: image for i, image in group.items() if keys[i] not in found[name]}
            vectors = _in_stacks(extractor, wanted)
            finite = {key: vector for key, vector in vectors.items() if np.isfinite(vector).all()}
            caches[name].put(finite)
            found[name] |= finite
            for index in group:
                if keys[index] not in found[name]:
                    bad[index] = f"its {name} features are not finite"
    good = [index for index in keys if index not in bad]
    return keys, {index: {name: found[name][keys[index]] for name in extractors} for index in good}, bad


def _groups(
    images: ImageSet, indices: list[int], encoded: dict[int, bytes], guarded: Callable, pool: ThreadPoolExecutor
) -> Iterator[dict[int, torch.Tensor]]:
    """{index: decoded image}, only as many at a time as fit into little memory: decoded photographs are large."""
    group: dict[int, torch.Tensor] = {}
    pixels, few = 0, os.cpu_count() or 1
    for start in range(0, len(indices), few):
        some = indices[start : start + few]
        decoded = pool.map(lambda index: guarded(lambda i: comparable(images.image(i, encoded[i])), index), some)
        for index, image in zip(some, decoded, strict=True):
            if image is not None:
                if group and pixels + image.width * image.height > PIXELS_AT_ONCE:
                    yield group
                    group, pixels = {}, 0
                group[index] = to_tensor(image)
                pixels += image.width * image.height
    if group:
        yield group


def _in_stacks(extractor: Extractor, images: dict[bytes, torch.Tensor]) -> dict[bytes, np.ndarray]:
    """{key: vector} of {key: image}: images of the same size go through the extractor together."""
    sizes: dict[tuple, list[bytes]] = {}
    for key, image in images.items():
        sizes.setdefault(image.shape, []).append(key)
    found: dict[bytes, np.ndarray] = {}
    for keys in sizes.values():
        vectors = extractor(torch.stack([images[key] for key in keys])).cpu().numpy()
        found |= dict(zip(keys, vectors, strict=True))
    return found


def first_of_each(features: dict[str, torch.Tensor]) -> list[int]:
    """The indices of the images whose features differ from those of all images before them."""
    seen: dict[bytes, int] = {}
    for index, vectors in enumerate(zip(*features.values(), strict=True)):
        key = hashlib.blake2b(b"".join(vector.numpy().tobytes() for vector in vectors), digest_size=16).digest()
        seen.setdefault(key, index)
    return list(seen.values())


@dataclass(frozen=True)
class SmallEdge:
    """The length of the small edge; float32 (N, 1)."""

    @property
    def identity(self) -> dict:
        return {"small_edge": 1}

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return torch.full((len(images), 1), float(min(images.shape[2:])))


@dataclass(frozen=True)
class Pixels:
    """Pixels for l2 distances: the small edge resized to ``size``, the centre cropped; uint8 (N, 3 * size * size)."""

    size: int

    @property
    def identity(self) -> dict:
        return {"pixels": self.size}

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        resized = TF.resize(images, [self.size], antialias=True) if min(images.shape[2:]) != self.size else images
        return TF.center_crop(resized, [self.size]).flatten(1)
