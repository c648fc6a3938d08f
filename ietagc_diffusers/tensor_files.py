"""Named tensors in safetensors files, written and read one at a time; and the places where tensors wait.

Neither writing nor reading needs more host memory than the largest tensor, and a file can be read as long as it is
open, whatever becomes of its name.
"""

import json
import math
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

Tensors = Mapping[str, torch.Tensor]

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_WORTH_A_THREAD = 1 << 16  # bytes: checksums of fewer take less time than handing them over


class NotFinite(ValueError):
    """A tensor that holds a number that is not finite; the message names it."""


class TensorFile(Tensors):
    """A safetensors file as a read-only mapping. Each look-up reads the tensor into host memory again.

    crc: of the whole file, where this process wrote it; not_finite: likewise, a tensor with numbers that are not.
    """

    def __init__(self, path: str | Path, crc: int | None = None, not_finite: str | None = None):
        self.path, self.crc, self.not_finite = Path(path), crc, not_finite
        self._file = self.path.open("rb", buffering=0)
        length = int.from_bytes(self._file.read(8), "little")
        header = json.loads(self._file.read(length))
        header.pop("__metadata__", None)
        self._start, self._entries = 8 + length, header
        self.size = os.fstat(self._file.fileno()).st_size

    def __getitem__(self, name: str) -> torch.Tensor:
        entry = self._entries[name]
        tensor = torch.empty(entry["shape"], dtype=_DTYPES[entry["dtype"]])
        self._file.seek(self._start + entry["data_offsets"][0])
        left = _bytes(tensor)
        while len(left):
            count = self._file.readinto(left)
            if not count:
                raise OSError(f"{self.path}: ends within {name}")
            left = left[count:]
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def sync(self) -> None:
        """Wait until the content is on the disk."""
        os.fsync(self._file.fileno())


def _bytes(tensor):
    """The bytes of a contiguous host tensor, as a view."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else memoryview(b"")


def _is_finite(tensor):
    if not tensor.numel() or not tensor.is_floating_point():
        return True
    return all(math.isfinite(end) for end in torch.aminmax(tensor))  # a NaN is both of its ends


def write(
    path: str | Path,
    like: Tensors,
    values: Iterable[tuple[str, torch.Tensor]] | None = None,
    dtype: torch.dtype | None = None,
    metadata: dict[str, str] | None = None,
) -> TensorFile:
    """Write tensors one by one, by way of ``<path>.part``. Returns the file, open for reading.

    Args:
        like: has the names, shapes and data types, in the order of the file.
        values: the tensors, in that order; default: those of ``like``.
        dtype: of all of them, if not that of ``like``.

    Raises:
        OSError: the disk refuses; ``path`` is as it was.
    """
    path, part = Path(path), Path(f"{path}.part")
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    offset = 0
    for name, tensor in like.items():
        kind = dtype or tensor.dtype
        end = offset + tensor.numel() * kind.itemsize
        header[name] = {"dtype": _NAMES[kind], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    crc, not_finite = zlib.crc32(head), None
    try:
        with part.open("wb") as file, ThreadPoolExecutor(1) as other:
            file.write(head)
            for name, tensor in like.items() if values is None else values:
                host = tensor.detach().cpu().contiguous()
                content = _bytes(host)
                later = other.submit(zlib.crc32, content, crc) if len(content) >= _WORTH_A_THREAD else None
                file.write(content)
                if not_finite is None and not _is_finite(host):
                    not_finite = name
                crc = zlib.crc32(content, crc) if later is None else later.result()
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return TensorFile(path, crc, not_finite)


def link(source: str | Path, target: str | Path) -> None:
    """A second name for a file that nobody changes, or a copy where the file system refuses that."""
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(source, target)
        with Path(target).open("rb") as file:
            os.fsync(file.fileno())


class HostMemory:
    """Tensors wait in host memory."""

    def keep(
        self,
        name: str,
        like: Tensors,
        values: Iterable[tuple[str, torch.Tensor]],
        old: Tensors | None = None,
        dtype: torch.dtype | None = None,
        owned: bool = False,
    ) -> Tensors:
        """Keep tensors under a name. Returns them as a mapping.

        Args:
            like: has their names and shapes.
            values: (name, tensor), in that order.
            old: what was kept under this name, which may be overwritten.
            dtype: if not that of ``like``.
            owned: nobody else writes into these tensors: no copy is needed.
        """
        if old is None:
            return {key: value.detach().to("cpu", copy=not owned) for key, value in values}
        for key, value in values:
            old[key].copy_(value)
        return old

    def adopt(self, name: str, file: TensorFile) -> Tensors:
        """Keep what a file holds."""
        return dict(file.items())

    def drop(self, name: str) -> None:
        """What was kept under this name is not needed any more."""

    def clear(self) -> None:
        """Nothing that was kept is needed any more."""

    def close(self) -> None:
        """Nothing will be kept any more either."""


class Disk:
    """Tensors wait in files of a folder, made when needed; the system caches them in what memory it has."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)

    def _path(self, name):
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / f"{name}.safetensors"

    def keep(
        self,
        name: str,
        like: Tensors,
        values: Iterable[tuple[str, torch.Tensor]],
        old: Tensors | None = None,
        dtype: torch.dtype | None = None,
        owned: bool = False,
    ) -> Tensors:
        return write(self._path(name), like, values, dtype)

    def adopt(self, name: str, file: TensorFile) -> Tensors:
        path = self._path(name)
        path.unlink(missing_ok=True)
        link(file.path, path)
        return TensorFile(path, file.crc, file.not_finite)

    def drop(self, name: str) -> None:
        self._path(name).unlink(missing_ok=True)

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)  # and not its parent, in which others may be making theirs

    def close(self) -> None:
        self.clear()
        with suppress(OSError):  # other processes have theirs beside it
            self.folder.parent.rmdir()


Place = HostMemory | Disk
