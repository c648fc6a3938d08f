"""Encodings on disk: what the frozen models make of each image and each text, computed once and read at each visit.

A cache holds what ``Objective.encode_images`` and ``encode_inputs`` give; everything random is still drawn at each
visit. Encodings lie in safetensors files that are mapped into memory, by key: an image's is the hash of its file, a
text's the hash of the text. Each set of encoder weights, precision and view has a folder of its own.
"""

import hashlib
import json
import logging
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from ..errors import UsageError
from ..files import check_output, read_json, write_json
from .batch import Batch, Tensors
from .decoder import decoder_mark
from .hashes import digest
from .rows import decode
from .samples import Key, TrainingSamples
from .work import batched, in_threads

logger = logging.getLogger(__name__)
FILE_ITEMS = 512  # of a file: what an interruption loses at most, for each process
ABANDONED = 3600  # seconds after which a file that nobody finished is removed
FORMAT = 1  # of the files; a change makes older caches stale
TOLD = "told."  # begins the names of what the model is told of a view, beside the encodings of its image


class Processes:
    """One process by itself; ``training.layout.Layout`` is several."""

    num_processes, process_index = 1, 0

    def barrier(self) -> None:
        """Wait for the others."""


class Store:
    """Named tensors by key (16 bytes), in files that are written whole and never changed.

    Args:
        folder: that of all caches.
        kind: of what, as in "latents".
        mark: JSON values; with another one the tensors would be others.
        processes: those that share the work: each checks and writes its part.
    """

    def __init__(self, folder: Path, kind: str, mark: dict[str, Any], processes: Any = None):
        self.processes = processes or Processes()
        self.kind, self.mark = kind, mark
        self.identity = hashlib.blake2b(json.dumps(mark, sort_keys=True).encode(), digest_size=8).hexdigest()
        self.folder = folder / f"{kind}-{self.identity}"
        self.files: dict[str, Tensors] = {}
        self.channels_last: set[str] = set()  # names of the tensors that lie in memory in that order
        self.places: dict[bytes, tuple[str, int]] = {}
        self._make_folder()
        self._remove_unfinished()
        self._check()
        self.processes.barrier()
        self._open()

    @property
    def is_main(self) -> bool:
        return self.processes.process_index == 0

    def _make_folder(self) -> None:
        if self.is_main and not self.folder.exists():
            for path in self.folder.parent.glob(f"{self.kind}-*/mark.json"):
                mark = read_json(path)
                changed = ", ".join(name for name, value in self.mark.items() if value != mark.get(name))
                logger.info(f"{path.parent} was made with other {changed}: {self.folder} is made beside it")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.is_main:
                write_json(self.folder / "mark.json", self.mark)
        except OSError as error:
            raise UsageError(f"`cache_latents` {self.folder.parent}: {error.strerror}") from error

    def _remove_unfinished(self) -> None:
        if self.is_main:
            for path in self.folder.glob("*.part"):
                if time.time() - path.stat().st_mtime > ABANDONED:
                    path.unlink(missing_ok=True)

    def _check(self) -> None:
        """Remove damaged files, so that they are made again."""
        mine = sorted(self.folder.glob("*.safetensors"))[self.processes.process_index :: self.processes.num_processes]
        for path in tqdm(mine, f"Checking {self.folder.name}", leave=False, disable=len(mine) < 10):
            fault = self._fault(path)
            if fault:
                logger.warning(f"{path} {fault}: what it held is computed again")
                path.unlink(missing_ok=True)

    def _fault(self, path: Path) -> str | None:
        try:
            tensors, about = _read(path)
        except (OSError, ValueError, SafetensorError) as error:
            return f"is damaged ({error})"
        if about.get("mark") != self.identity:
            return "belongs to another cache"
        return None if about.get("crc") == _checksum(tensors) else "is damaged (wrong checksum)"

    def _open(self) -> None:
        """Map the files that are not mapped yet."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name not in self.files:
                self.files[path.name], about = _read(path)
                self.channels_last |= set(json.loads(about["channels_last"]))
                keys = bytes.fromhex(about["keys"])
                for row in range(len(keys) // 16):
                    self.places[keys[16 * row : 16 * row + 16]] = path.name, row

    def __contains__(self, key: bytes) -> bool:
        return key in self.places

    def get(self, keys: list[bytes], views: list[int] | None = None) -> Tensors:
        """Named tensors (B, ...) of B keys; ``views``: which view of each, by default the first."""
        views = views or [0] * len(keys)
        places = [self.places[key] for key in keys]
        stacked = {}
        for name in {name.partition(".")[2] for name in self.files[places[0][0]]}:
            found = zip(places, views, strict=True)
            tensor = torch.stack([self.files[file][f"{view}.{name}"][row] for (file, row), view in found])
            layout = torch.channels_last if f"0.{name}" in self.channels_last else torch.contiguous_format
            stacked[name] = tensor.contiguous(memory_format=layout)
        return stacked

    def fill(self, items: dict[bytes, Any], make: Callable[[list[Any]], Iterator[Tensors | None]], title: str) -> None:
        """Compute what is missing, each process its part.

        Args:
            items: by key, what ``make`` makes the tensors from.
            make: of some items, gives one after another the tensors (1, ...), named <view>.<name>; None if there are
                none.
        """
        missing = [(key, item) for key, item in items.items() if key not in self.places]
        self.processes.barrier()  # none may write while another still looks at what is missing
        several, rank = self.processes.num_processes, self.processes.process_index
        size = max(1, min(FILE_ITEMS, -(-len(missing) // several)))
        mine = [missing[start : start + size] for start in range(0, len(missing), size)][rank::several]
        bar = tqdm(total=sum(map(len, mine)), desc=title, disable=rank > 0 or not mine)
        for number, some in enumerate(mine):
            rows = []
            for (key, _), tensors in zip(some, make([item for _, item in some]), strict=True):
                if tensors is not None:
                    rows.append((key, tensors))
                bar.update()
            if rows:
                self._write(rows, len(missing) if number == 0 else 0)
        bar.close()
        self.processes.barrier()
        self._open()

    def _write(self, rows: list[tuple[bytes, Tensors]], left: int) -> None:
        """Write a file. ``left``: how many are to come, if it has to be seen whether there is room for them."""
        keys = b"".join(key for key, _ in rows)
        path = self.folder / f"{digest(keys).hex()}.safetensors"
        channels_last = [name for name, tensor in rows[0][1].items() if _is_channels_last(tensor)]
        tensors = {name: torch.stack([of[name][0].contiguous() for _, of in rows]) for name in rows[0][1]}
        if left:
            self._check_room(sum(t.numel() * t.element_size() for t in tensors.values()) / len(rows) * left)
        about = {"mark": self.identity, "keys": keys.hex(), "crc": _checksum(tensors)}
        part = path.with_suffix(f".{os.getpid()}.part")
        try:
            save_file(tensors, part, metadata=about | {"channels_last": json.dumps(channels_last)})
            part.replace(path)
        except (OSError, SafetensorError) as error:
            part.unlink(missing_ok=True)
            raise UsageError(f"`cache_latents`: {path} cannot be written: {error}") from error

    def _check_room(self, need: float) -> None:
        free = shutil.disk_usage(self.folder).free
        if self.is_main:
            logger.info(f"{self.folder} will take {need / 1e9:.2f} GB, of {free / 1e9:.1f} GB free")
        if need > free:
            raise UsageError(
                f"`cache_latents` {self.folder.parent}: needs {need / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
            )


def _read(path: Path) -> tuple[Tensors, dict[str, str]]:
    """The tensors of a file, mapped into memory, and what stands beside them."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def _checksum(tensors: Tensors) -> str:
    crc = 0
    for _, tensor in sorted(tensors.items()):
        crc = zlib.crc32(tensor.view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"


def _is_channels_last(tensor: torch.Tensor) -> bool:
    return tensor.ndim == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)


class ImagesOnDemand:
    """A batch's images, decoded when they are asked for: ``images[rows]`` is float32 (N, 3, H, W)."""

    def __init__(self, samples: TrainingSamples, rows: list[int], seeds: list[int] | None, device: Any = "cpu"):
        self.samples, self.rows, self.seeds, self.device = samples, rows, seeds, device

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, chosen: list[int]) -> torch.Tensor:
        if self.seeds is None:
            raise ValueError("only images of a seeded order can be decoded again")
        images = self.samples.images_of([(self.rows[n], self.seeds[n]) for n in chosen])
        return images.to(self.device)

    def to(self, device: Any, non_blocking: bool = False) -> "ImagesOnDemand":
        return ImagesOnDemand(self.samples, self.rows, self.seeds, device)


class CachedSamples(TrainingSamples):
    """``TrainingSamples`` whose batches have encodings instead of images, from the same draws.

    Args:
        samples: those to stand for.
        latents: encodings of the images, by ``keys`` (N), those of the rows.
        texts: encodings of what the model is told, or None where that is not known beforehand.
        batch_size: of the batches that are read from the cache; others are as without a cache. None: all are.
    """

    def __init__(
        self, samples: TrainingSamples, latents: Store, keys: list[bytes], texts: Store | None, batch_size: int | None
    ):
        self.__dict__.update(vars(samples))
        self.uncached, self.latents, self.keys, self.texts = samples, latents, keys, texts
        self.batch_size = batch_size

    def _image(self, row: int) -> Any:
        if self.keys[row] in self.latents:
            return int(row)
        super()._image(row)  # says what is wrong with it
        raise UsageError(f"row {row}: its image changed after the cache was made; start again")

    def _show(self, row: int, image: Any, rng: Any) -> Any:
        return image, self.transform.draw(rng)

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        if self.batch_size not in (None, len(keys)):
            return self.uncached.of_shard(self.pool).__getitems__(keys)
        return super().__getitems__(keys)

    def _images(self, shown: Any, drawn: list[Any]) -> dict[str, Any]:
        rows, views = map(list, zip(*shown, strict=True))
        stored = self.latents.get([self.keys[row] for row in rows], views)
        told = {name.removeprefix(TOLD): stored.pop(name) for name in list(stored) if name.startswith(TOLD)}
        encoded = {"encoded_images": stored, "told": told}
        if self.texts is not None:
            encoded["encoded_inputs"] = self.texts.get([text_key(value) for value in drawn])
        return {"images": None, "inputs": self.condition.tensors(drawn), **encoded}

    def received(self, batch: Batch) -> Batch:
        if batch.images is not None:
            return batch
        return replace(batch, images=ImagesOnDemand(self.uncached, batch.samples.tolist(), batch.seeds or []))


def text_key(value: Any) -> bytes:
    """The key of what the model is told of a row: of a caption."""
    return digest(json.dumps(value).encode())


def cache_samples(
    samples: TrainingSamples,
    folder: str | Path,
    keys: list[bytes],
    rows: Dataset,
    encoder: Any,
    marks: dict[str, dict[str, Any]],
    batch_size: int,
    device: torch.device | str = "cpu",
    allow_bad: bool = False,
    processes: Any = None,
) -> CachedSamples:
    """``samples`` with the encodings of all their views and texts, those that are not in ``folder`` computed first.

    Two batches of one length give the same numbers, two of different lengths may differ in the last bit: on the CPU the
    encodings are those of batches of ``batch_size``, and part of a cache's mark is that number.

    Args:
        keys: of the images' contents (N), see ``hashes.stored_hashes``; those of rows with views of their own have
            keys of their own here.
        rows: the samples' rows, of which every text is read.
        encoder: ``families.Objective``, for ``encode_images`` and ``encode_inputs``.
        marks: what stands for the encoders, by "images" and "inputs"; without the latter only images are cached.
        allow_bad: leave out an image that does not decode; else ``UsageError`` names it.
        processes: those that share the work (``training.layout.Layout``).
    """
    check_output(folder, "cache_latents")
    folder, views = Path(folder), samples.transform.fixed
    keys = [
        digest(key, repr(samples.own_views[n]).encode()) if n in samples.own_views else key
        for n, key in enumerate(keys)
    ]
    exact = batch_size if torch.device(device).type == "cpu" else None
    here = {"batch_size": exact, "format": FORMAT}
    of_pixels = {"views": [repr(view) for view in views]} | decoder_mark(samples.alpha)
    latents = Store(folder, "latents", here | marks["images"] | of_pixels, processes)

    def view_all(row: int) -> list[tuple[torch.Tensor, Tensors]] | None:
        try:
            image = decode(samples.images, samples.image_column, row, samples.alpha)
        except UsageError:
            if not allow_bad:
                raise
            return None
        return [view(image) for view in samples.view_of(row).fixed]

    def encode_images(some: list[int]) -> Iterator[Tensors | None]:
        for shown in batched(in_threads(view_all, some), batch_size):
            good = [image for image in shown if image is not None]
            encoded = []
            for view in range(len(views)) if good else ():
                images, told = zip(*(image[view] for image in good), strict=True)
                encodings = _encode(encoder.encode_images, torch.stack(images).float().to(device), batch_size)
                encoded.append(encodings | {TOLD + name: torch.stack([of[name] for of in told]) for name in told[0]})
            yield from _by_row(encoded, [image is not None for image in shown])

    def encode_texts(some: list[Any]) -> Iterator[Tensors | None]:
        for values in batched(some, batch_size):
            inputs = {name: tensor.to(device) for name, tensor in samples.condition.tensors(values).items()}
            yield from _by_row([_encode(encoder.encode_inputs, inputs, batch_size)], [True] * len(values))

    first = {key: row for row, key in reversed(list(enumerate(keys)))}
    latents.fill(dict(sorted(first.items(), key=lambda pair: pair[1])), encode_images, "Encoding images")
    texts = None
    values = samples.condition.values(rows) if "inputs" in marks else None
    if "inputs" not in marks:
        logger.info("What encodes the captions is trained: they are encoded at each visit, only images are cached")
    elif values is None:
        logger.info("Captions are rewritten at each visit: they are encoded at each visit too, only images are cached")
    else:
        texts = Store(folder, "texts", here | marks["inputs"], processes)
        texts.fill({text_key(value): value for value in values}, encode_texts, "Encoding texts")
    return CachedSamples(samples, latents, keys, texts, exact)


def _encode(encode: Callable[[Any], Tensors], batch: Any, batch_size: int) -> Tensors:
    """Named tensors (B, ...) on the host, from a batch that is filled up to its size by repetition."""

    def full(tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor, tensor[-1:].expand(batch_size - len(tensor), *tensor.shape[1:])])

    rows = len(batch) if torch.is_tensor(batch) else len(next(iter(batch.values())))
    with torch.no_grad():
        whole = full(batch) if torch.is_tensor(batch) else {name: full(tensor) for name, tensor in batch.items()}
        return {name: tensor[:rows].cpu() for name, tensor in encode(whole).items()}


def _by_row(views: list[Tensors], good: list[bool]) -> Iterator[Tensors | None]:
    """Of each row the tensors (1, ...) of its views, named <view>.<name>; None for a row that is not good."""
    row = 0
    for one in good:
        if one:
            yield {f"{v}.{name}": t[row : row + 1] for v, of_view in enumerate(views) for name, t in of_view.items()}
            row += 1
        else:
            yield None
