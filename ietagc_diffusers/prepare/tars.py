"""Tar files of images as webdataset and img2dataset write them: the files of an item share the name before the dot.

Nothing is ever unpacked to the disk, and names are only names. Items come in the order in which they lie in the file.
"""

import bz2
import gzip
import json
import lzma
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from datasets import Value

from ..data.decoder import SUFFIXES
from ..data.folder import caption_of
from ..data.hashes import digest
from ..data.text_files import decode_text, writable
from ..errors import one_line
from . import items
from .folders import PICKLES, caption_column
from .items import Item, LeftOut, captions_of

ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
TEXT_ENDINGS = (".txt", ".caption", ".text")
COMPRESSIONS: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
BLOCK = 512  # of bytes, which a tar file consists of
OF_NO_ITEM = "__"  # begins the names of webdataset's own files


class TarReader:
    """Tar files, perhaps compressed.

    Args:
        files: their paths, in order.
        caption_lines: see ``data.folder.read_folder``.
    """

    def __init__(self, files: Sequence[Path], caption_lines: str = "whole"):
        self.files, self.caption_lines = list(files), caption_lines
        self.columns: dict[str, Any] = {"label": Value("int64")}
        self.units = len(self.files)
        self.total: int | None = None
        self.mark = digest(json.dumps([[path.name, path.stat().st_size] for path in self.files]).encode()).hex()

    def items(self, unit: int) -> Iterator[Item | LeftOut]:
        of_one: dict[str, bytes] = {}
        name = None
        for found in members(self.files[unit]):
            if isinstance(found, LeftOut):
                yield found
                continue
            member, content = found
            own, ending = split_name(member)
            if own != name or ending in of_one:
                yield from self._item(name, of_one)
                name, of_one = own, {}
            of_one[ending] = content
        yield from self._item(name, of_one)

    def _item(self, name: str | None, files: dict[str, bytes]) -> Iterator[Item | LeftOut]:
        if name is None or not files:
            return
        images = [ending for ending in files if ending in SUFFIXES]
        if not images:
            yield LeftOut(name, items.NO_IMAGE)
            return
        yield from (LeftOut(name + ending, items.UNSUPPORTED, "a second image") for ending in images[1:])
        captions: tuple[str, ...] = ()
        more: dict[str, Any] = {"label": None}
        for ending in (ending for ending in files if ending not in SUFFIXES):
            try:
                value = self._value(ending, decode_text(files[ending]))
            except (ValueError, RecursionError) as error:
                yield LeftOut(name + ending, items.BAD_TEXT, one_line(error))
                continue
            if ending == ".cls":
                more["label"] = value
            else:  # a text file is worth more than a JSON file that has no more captions
                found = captions_of(value)
                better = len(found) > len(captions) or (len(found) == len(captions) and ending != ".json")
                captions = found if better else captions
        yield Item(name, files[images[0]], captions, more)

    def _value(self, ending: str, text: str) -> Any:
        """What a file beside an image says. Raises ``ValueError``."""
        if ending == ".cls":
            return _label(text)
        if ending == ".json":
            about = json.loads(text)
            column = caption_column(about) if isinstance(about, dict) else None
            return None if column is None else about[column]
        return caption_of(text, self.caption_lines)


def _label(text: str) -> int:
    label = int(text)
    if not -(2**63) <= label < 2**63:
        raise ValueError("the class has too many digits")
    return label


def split_name(member: str) -> tuple[str, str]:
    """Of a member's name what stands before the first dot of its last part, and the rest, in lower case."""
    folder, slash, own = member.rpartition("/")
    stem, dot, ending = own.partition(".")
    return folder + slash + stem, dot + ending.lower()


class _Bounded:
    """A file of which no part that would fill the memory is read at once: headers may claim any size."""

    def __init__(self, file: BinaryIO):
        self.file = file

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= items.MAX_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self.file.read(size)

    def seek(self, place: int, whence: int = os.SEEK_SET) -> int:
        return self.file.seek(place, whence)

    def tell(self) -> int:
        return self.file.tell()


def _opened(path: Path) -> Any:
    """A tar file without its compression, which its first bytes tell."""
    with open(path, "rb") as file:
        head = file.read(6)
    unpack = next((unpack for mark, unpack in COMPRESSIONS.items() if head.startswith(mark)), open)
    return unpack(path, "rb")


def members(path: Path) -> Iterator[tuple[str, bytes] | LeftOut]:
    """The files in a tar that may belong to an item, (name, content), one at a time, and what is left out of it."""
    where = path.name
    try:
        with _opened(path) as file:
            bounded: Any = _Bounded(file)
            with tarfile.open(fileobj=bounded, mode="r:", errorlevel=0) as tar:
                yield from _members(tar, file, where)
    except Exception as error:  # of damaged files tarfile raises exceptions of any kind
        yield LeftOut(where, items.DAMAGED, one_line(error))


def _members(tar: tarfile.TarFile, file: Any, where: str) -> Iterator[tuple[str, bytes] | LeftOut]:
    end = 0
    while (member := tar.next()) is not None:
        # tarfile lists every member that it has read: of a large tar the list would fill the memory.
        tar.members.clear()  # type: ignore[attr-defined]
        if tar.offset <= end or member.size < 0:
            raise tarfile.ReadError("a member of negative size")
        end = tar.offset
        if member.isdir():
            continue
        name = writable(member.name)
        why = _why_not(name, member)
        if why is not None:
            yield LeftOut(f"{where}: {name[:200]}", why)
        elif not os.path.basename(name).startswith(OF_NO_ITEM):
            content = tar.extractfile(member)
            assert content is not None  # of a regular file
            yield name, content.read()
    file.seek(tar.offset)
    if file.read(BLOCK).strip(b"\0") or file.tell() == tar.offset:
        yield LeftOut(where, items.DAMAGED, "it does not end as tar files do: it is cut off, or a header is damaged")


def _why_not(name: str, member: tarfile.TarInfo) -> str | None:
    """Why a member is not read."""
    if not member.isreg() or member.issparse():
        return items.NO_FILE
    if len(name) > items.MAX_NAME:
        return items.BAD_NAME
    ending = split_name(name)[1]
    if ending in SUFFIXES:
        return items.LARGE if member.size > items.MAX_BYTES else None
    if ending in (*TEXT_ENDINGS, ".json", ".cls"):
        return items.LARGE if member.size > items.MAX_TEXT_BYTES else None
    return items.PICKLE if ending in PICKLES else items.UNSUPPORTED
