"""Features of a set of images, each computed once and cached on disk by the hash of the image's file."""

import hashlib
import json
import os
import sqlite3
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torchvision.transforms.v2 import functional as TF
from tqdm.auto import tqdm

from ietagc_diffusers.data.decoder import VERSION
from ietagc_diffusers.errors import UsageError
from ietagc_diffusers.files import cache_folder

from .image_sets import NO_ROW, BadImage, ImageSet, comparable, content_hash, to_tensor
from .vectors import Several, Vectors

DTYPES = {"f": np.float32, "u": np.uint8}
PIXELS_AT_ONCE = 16_000_000  # 16 photographs of a megapixel, or one large one


class Extractor(Protocol):
    """Images uint8 (N, 3, H, W) -> vectors (N, D), float32 or uint8. Every descriptor is one.

    Some give several vectors of each image, (N, V, D), with V depending on H and W only.

    identity: a dict of JSON values that changes whenever the vectors do.
    """

    @property
    def identity(self) -> dict: ...

    def __call__(self, images: torch.Tensor) -> torch.Tensor: ...


def default_cache() -> Path:
    """``$XDG_CACHE_HOME/ietagc/features``, by default in ~/.cache."""
    return cache_folder() / "features"


class FeatureCache:
    """Vectors of one extractor, by content hash: one SQLite file, committed batch by batch, that processes can share.

    Without a folder, or if the file cannot be read or written, nothing is kept.
    """

    def __init__(self, folder: str | Path | None, identity: dict) -> None:
        self.path = None
        self.connection: sqlite3.Connection | None = None
        if folder is not None:
            # Another decoder makes other pixels of the same file.
            text = json.dumps([VERSION, identity], sort_keys=True)
            self.path = Path(folder) / f"{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}.sqlite"
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.connection = self._connect(self.path, str(identity))
            except (OSError, sqlite3.Error) as error:
                self._give_up(error)

    @staticmethod
    def _connect(where: str | Path, identity: str) -> sqlite3.Connection:
        connection = sqlite3.connect(where, timeout=60)
        connection.execute("CREATE TABLE IF NOT EXISTS vectors (key BLOB PRIMARY KEY, kind TEXT, vector BLOB)")
        connection.execute("CREATE TABLE IF NOT EXISTS identity (text TEXT PRIMARY KEY)")
        connection.execute("INSERT OR IGNORE INTO identity VALUES (?)", (identity,))
        connection.commit()
        return connection

    def _give_up(self, error: Exception) -> None:
        """Keep nothing from now on. A damaged file is renamed, so that the next run starts a new one."""
        self.connection = None
        warnings.warn(f"{self.path}: features are not cached in this run: {error}", stacklevel=3)
        damaged = isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError)
        if damaged and self.path is not None and self.path.exists():
            self.path.replace(self.path.with_suffix(".damaged"))

    def get(self, keys: list[bytes]) -> dict[bytes, np.ndarray]:
        """{key: vector} of the keys that are in the cache."""
        if self.connection is None:
            return {}
        marks = ",".join("?" * len(keys))
        query = f"SELECT key, kind, vector FROM vectors WHERE key IN ({marks})"
        try:
            rows = self.connection.execute(query, keys).fetchall()
        except sqlite3.Error as error:
            self._give_up(error)
            return {}
        return {key: _unpacked(kind, vector) for key, kind, vector in rows}

    def put(self, vectors: dict[bytes, np.ndarray]) -> None:
        """Add {key: vector}."""
        if self.connection is None:
            return
        rows = [(key, _kind(v), v.tobytes()) for key, v in vectors.items()]
        try:
            with self.connection:
                self.connection.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?, ?)", rows)
        except sqlite3.Error as error:
            self._give_up(error)


def _kind(vectors: np.ndarray) -> str:
    """How an image's vectors are stored: their type and, if there are several, how many."""
    return ("u" if vectors.dtype == np.uint8 else "f") + (str(len(vectors)) if vectors.ndim == 2 else "")


def _unpacked(kind: str, stored: bytes) -> np.ndarray:
    values = np.frombuffer(stored, dtype=DTYPES[kind[0]])
    return values.reshape(int(kind[1:]), -1) if kind[1:] else values


@dataclass(frozen=True)
class Embedded:
    """Features of the images of a set that could be used.

    images: these M images; features: {extractor name: (M, D)}; several: the same of extractors that give several
    vectors of an image; kept: their indices in the set; keys: the hashes of their files; skipped: [name, reason] of the
    others.
    """

    images: ImageSet
    features: dict[str, torch.Tensor]
    several: dict[str, Several]
    kept: list[int]
    keys: list[bytes]
    skipped: list[list[str]]

    def select(self, indices: list[int]) -> "Embedded":
        """Some of the M images with their features."""
        if indices == list(range(len(self.kept))):
            return self  # no second copy
        return Embedded(
            self.images.select(indices),
            {name: vectors[indices] for name, vectors in self.features.items()},
            {name: vectors.select(indices) for name, vectors in self.several.items()},
            [self.kept[i] for i in indices],
            [self.keys[i] for i in indices],
            self.skipped,
        )

    def both_ways(self) -> list[Several]:
        """The views of the images, and those of their mirror images if they were computed too."""
        return [self.several[name] for name in ("views", "views_mirrored") if name in self.several]

    def content_groups(self) -> torch.Tensor:
        """int64 (M,): of each image the index of the first one that looks the same to all extractors."""
        wholes = [views.last() for name, views in self.several.items() if name == "views"]
        seen: dict[bytes, int] = {}
        groups = []
        for index, vectors in enumerate(zip(*self.features.values(), *wholes, strict=True)):
            key = hashlib.blake2b(b"".join(vector.numpy().tobytes() for vector in vectors), digest_size=16).digest()
            groups.append(seen.setdefault(key, index))
        return torch.tensor(groups)

    def distinct(self) -> "Embedded":
        """The first of each group of images that look the same."""
        groups = self.content_groups()
        return self.select((groups == torch.arange(len(groups))).nonzero()[:, 0].tolist())

    def content(self) -> str:
        """A hash of the images' files that does not depend on their names and order."""
        return hashlib.blake2b(b"".join(sorted(self.keys)), digest_size=8).hexdigest()


def file_keys(images: ImageSet) -> dict[str, bytes]:
    """{name: hash of its file} of the images; files that cannot be read are left out."""
    keys: dict[str, bytes] = {}
    for index, name in enumerate(images.names):
        if name not in keys:
            with suppress(BadImage):
                keys[name] = content_hash(images.encoded(index))
    return keys


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
    vectors = {name: Vectors(len(images)) for name in extractors}
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
    found_of = {name: of_images.result() for name, of_images in vectors.items()}
    return Embedded(
        images.select(kept),
        {name: found for name, found in found_of.items() if isinstance(found, torch.Tensor)},
        {name: found for name, found in found_of.items() if isinstance(found, Several)},
        kept,
        keys,
        skipped,
    )


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


@dataclass(frozen=True)
class Size:
    """Height and width in pixels; float32 (N, 2)."""

    @property
    def identity(self) -> dict:
        return {"size": 1}

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return torch.tensor(images.shape[2:], dtype=torch.float32).repeat(len(images), 1)


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
