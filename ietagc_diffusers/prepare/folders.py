"""Folders of images: with metadata or text files, kohya's, Somepalli et al.'s, and what img2dataset writes as files."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Value

from ..data.decoder import BadImage, is_file, native, read_stored
from ..data.folder import FolderRows, read_folder
from ..data.hashes import digest
from ..data.listing import Listing, list_folder, suffix_of
from ..data.metadata import FILE_NAME, NEAR_TEXT, read_metadata
from ..errors import UsageError, one_line
from . import items
from .items import Item, LeftOut, captions_of

ROWS = 1000  # of a unit
PICKLES = {".pickle", ".pkl", ".pyd", ".pth", ".pt", ".ckpt", ".joblib"}
SEVERAL = "captions"  # the column of metadata that has several captions an image, and so comes before one with one
LEADING_NUMBER = re.compile(r"(\d{1,3})_.+")
TEXTS = {".txt", ".caption", ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".md"}  # beside images, of no interest


def read_picture(path: str, name: str) -> bytes | LeftOut:
    """The bytes of an image's file, or why it is left out."""
    try:
        if not is_file(path):
            return LeftOut(name, items.BROKEN if not os.path.exists(native(path)) else items.NO_FILE, "no such file")
        if os.stat(native(path)).st_size > items.MAX_BYTES:
            return LeftOut(name, items.LARGE)
        return read_stored({"bytes": None, "path": path}) or b""
    except (BadImage, OSError, ValueError) as error:
        return LeftOut(name, items.BROKEN, one_line(error))


def left_out_files(listing: Listing, skipped: list[list[str]]) -> list[LeftOut]:
    """Files of a folder that are no images; those that only describe images are not worth a word."""
    found = []
    for name, why in skipped:
        suffix = suffix_of(name)
        if suffix in PICKLES:
            found.append(LeftOut(name, items.PICKLE))
        elif suffix not in TEXTS:
            found.append(LeftOut(name, items.UNSUPPORTED, why))
    return found


class FolderReader:
    """A folder of images, as training reads it. Names and captions are held in memory, images are not.

    Args:
        folder: its path.
        where: the setting and the folder, for messages.
        split: that is read.
        caption_column: of the metadata; None finds it.
        caption_lines: see ``data.folder.read_folder``.
        repeats: whether numbers before the folders' names are kohya's repeats, which become a column.
    """

    def __init__(
        self,
        folder: str | Path,
        where: str,
        split: str | None = "train",
        caption_column: str | None = None,
        caption_lines: str = "whole",
        repeats: bool = False,
    ):
        self.bad_texts: dict[str, str] = {}
        self.rows = self._read(folder, where, split, caption_lines)
        self.columns: dict[str, Any] = {"repeats": Value("int64")} if repeats else {}
        self.captions = self._captions(caption_column, where)
        self.labels = self._labels() if not repeats else None
        self.left_out = self._left_out()
        self.units = 1 + -(-len(self.rows.names) // ROWS)  # the first is what is left out as a whole
        self.total: int | None = len(self.rows.names) + sum(one.count for one in self.left_out)
        told = [self.rows.names, self.captions, self.labels, [[one.name, one.why] for one in self.left_out]]
        self.mark = digest(json.dumps(told, default=str).encode()).hex()

    def _read(self, folder: str | Path, where: str, split: str | None, caption_lines: str) -> FolderRows:
        return read_folder(list_folder(folder), where, split, caption_lines, bad_texts=self.bad_texts)

    def _captions(self, column: str | None, where: str) -> list[Any]:
        """What the metadata, or the text files, say of each row."""
        columns = self.rows.columns
        if column is not None and column not in columns:
            raise UsageError(
                f"`caption_column` {column}: not a column of the metadata of {where}, which has {', '.join(columns)}"
            )
        column = column or caption_column(columns)
        return [None] * len(self.rows.names) if column is None else columns[column]

    def _labels(self) -> list[int | None] | None:
        """The class of each row, by its folder or by the metadata."""
        if self.rows.labels is not None:
            names = sorted(set(self.rows.labels))
            self.columns["label"] = ClassLabel(names=names)
            numbers = {name: number for number, name in enumerate(names)}
            return [numbers[name] for name in self.rows.labels]
        given = self.rows.columns.get("label", [])
        if {int} <= {type(value) for value in given} <= {int, type(None)}:
            self.columns["label"] = Value("int64")
            return given
        return None

    def _left_out(self) -> list[LeftOut]:
        rows = self.rows
        apart = [LeftOut(split, items.OTHER_SPLIT, count=number) for split, number in rows.apart.items()]
        loose = [LeftOut(name, items.NO_ROW) for name in rows.loose]
        return [*apart, *loose, *left_out_files(rows.listing, rows.skipped)]

    def items(self, unit: int) -> Iterator[Item | LeftOut]:
        if unit == 0:
            yield from self.left_out
            return
        names = self.rows.names
        for row in range((unit - 1) * ROWS, min(unit * ROWS, len(names))):
            yield self._item(row, names[row])

    def _item(self, row: int, name: str | None) -> Item | LeftOut:
        fault = self.rows.faults.get(row)
        if name is None or fault is not None:
            why = items.BAD_NAME if fault and "outside" in fault else items.NO_IMAGE
            return LeftOut(self.rows.origin(row), why, fault or "")
        if name in self.bad_texts:
            return LeftOut(name, items.BAD_TEXT, self.bad_texts[name])
        image = read_picture(self.rows.listing.path(name), name)
        if isinstance(image, LeftOut):
            return image
        return Item(name, image, captions_of(self.captions[row]), self._more(row))

    def _more(self, row: int) -> dict[str, Any]:
        more: dict[str, Any] = {}
        if self.labels is not None:
            more["label"] = self.labels[row]
        if "repeats" in self.columns:
            more["repeats"] = repeats_of(self.rows.names[row] or "")
        return more


def caption_column(columns: Any) -> str | None:
    """The column of captions among others: the one that has several of an image, or the first that is one."""
    names = {re.sub(r"[^a-z]", "", str(name).lower()): name for name in reversed([*columns])}
    meant = [SEVERAL, "texts", *sorted(NEAR_TEXT - {"tags", "label"}, key=lambda name: (name != "text", name))]
    return next((names[name] for name in meant if name in names), None)


def repeats_of(name: str) -> int:
    """How often kohya's scripts would show an image in an epoch, by its folder's name: ``10_cat`` is ten times."""
    found = LEADING_NUMBER.fullmatch(name.rpartition("/")[0].rpartition("/")[2])
    return int(found[1]) if found else 1


class DcrReader(FolderReader):
    """A folder of images, and a file that has captions of each, by paths of another machine: {path: [caption, ...]}.

    An image is found by the last part of its path, and where several have it by as much of the rest as agrees.

    Args:
        captions: the file; None is the only one in the folder that looks like it.
    """

    def __init__(self, folder: str | Path, where: str, split: str | None = "train", captions: str | None = None):
        self.file = captions or self._only_json(Path(folder), where)
        super().__init__(folder, where, split)

    @staticmethod
    def _only_json(folder: Path, where: str) -> str:
        found = captions_files(folder)
        if len(found) != 1:
            several = f"several: {', '.join(path.name for path in found[:5])}" if found else "none in the folder"
            raise UsageError(f"`captions`: of {where}, which .json file has the captions? There are {several}; give it")
        return str(found[0])

    def _read(self, folder: str | Path, where: str, split: str | None, caption_lines: str) -> FolderRows:
        listing = list_folder(folder)
        listing.names = [name for name in listing.names if suffix_of(name) not in TEXTS]  # captions come from the file
        return read_folder(listing, where, split)

    def _captions(self, column: str | None, where: str) -> list[Any]:
        told: dict[str, list[tuple[list[str], Any]]] = {}
        for row in read_metadata(self.file, "`captions`"):
            path = str(row.get(FILE_NAME, "")).replace("\\", "/").split("/")
            told.setdefault(path[-1], []).append((path, row.get("text")))
        captions, self.without_image = [], {name: len(some) for name, some in told.items()}
        for name in self.rows.names:
            parts = str(name).split("/")
            same = told.get(parts[-1], [])
            scores = [common_end(path, parts) for path, _ in same]
            best = [text for score, (_, text) in zip(scores, same, strict=True) if score == max(scores)]
            captions.append(best[0] if len(best) == 1 else None)
            if len(best) == 1:
                self.without_image[parts[-1]] -= 1
        return captions

    def _labels(self) -> None:
        return None  # sub-folders are where the download has them, not classes

    def _left_out(self) -> list[LeftOut]:
        missing = [name for name, number in self.without_image.items() for _ in range(max(number, 0))]
        return [*super()._left_out(), *(LeftOut(name, items.NO_IMAGE) for name in missing)]


def captions_files(folder: Path) -> list[Path]:
    """JSON files beside or above images that may have the captions of a download."""
    return sorted(path for path in folder.glob("*.json") if path.is_file() and not path.name.startswith("."))


def common_end(some: list[str], others: list[str]) -> int:
    """How many parts at the end of two paths are the same."""
    number = 0
    for one, other in zip(reversed(some), reversed(others), strict=False):
        if one != other:
            break
        number += 1
    return number


class FetchedFilesReader:
    """What img2dataset writes as files: folders 00000, 00001, ..., of which one at a time is held in memory.

    Args:
        folder: that they are in.
        where: the setting and the folder, for messages.
    """

    def __init__(self, folder: str | Path, where: str, caption_lines: str = "whole"):
        self.folder, self.where, self.caption_lines = Path(folder), where, caption_lines
        self.folders = fetched_folders(self.folder)
        self.columns: dict[str, Any] = {}
        self.units = len(self.folders)
        self.total: int | None = None
        about = [[name, os.stat(self.folder / name).st_mtime_ns] for name in self.folders]
        self.mark = digest(json.dumps(about).encode()).hex()

    def items(self, unit: int) -> Iterator[Item | LeftOut]:
        bad: dict[str, str] = {}
        listing = list_folder(self.folder / self.folders[unit])
        rows = read_folder(listing, self.where, None, self.caption_lines, bad_texts=bad)
        texts = rows.columns.get("text") or [None] * len(rows.names)
        yield from left_out_files(listing, rows.skipped)
        yield from (LeftOut(name, items.BAD_TEXT, why) for name, why in bad.items())
        for name, text in zip(rows.names, texts, strict=True):
            if name in bad:
                continue
            path = listing.path(str(name))
            image = read_picture(path, str(name))
            if isinstance(image, LeftOut):
                yield image
            else:
                yield Item(os.path.splitext(str(name))[0], image, captions_of(text or self._of_json(path)))

    def _of_json(self, path: str) -> Any:
        """The caption in the JSON file beside an image; img2dataset writes none as a text file where it is empty."""
        beside = Path(os.path.splitext(path)[0] + ".json")
        try:
            if beside.stat().st_size <= items.MAX_TEXT_BYTES:
                about = json.loads(beside.read_bytes())
                return about.get("caption") if isinstance(about, dict) else None
        except (OSError, ValueError, RecursionError):
            pass
        return None


def fetched_folders(folder: Path) -> list[str]:
    """The folders of images that img2dataset writes: of digits, each with a Parquet file of the same name beside it."""
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and re.fullmatch(r"\d{5,}", path.name))
    beside = any((folder / f"{name}{end}").is_file() for name in names for end in (".parquet", "_stats.json"))
    return names if beside else []
