"""Folders of images: their rows, from metadata, from text files beside the images, or from the images themselves."""

import os
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ..errors import UsageError
from .decoder import SUFFIXES
from .listing import KEYWORDS, Finder, Listing, is_outside, printable, split_of, suffix_of
from .metadata import FILE_NAME, NAMES, is_near, rank, read_metadata
from .text_files import read_text, writable

UNREAD_SUFFIXES = {".heic", ".heif", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw"}
SIDECARS = (".txt", ".caption")
# Reasons for leaving out a file that are not the loss of an image.
NO_IMAGE, OTHER_METADATA = "is not an image", "is not read: another metadata file is beside it"
NO_ROW, OTHER_SPLIT = "has no row in the metadata", "is kept apart: it belongs to another split"


@dataclass
class FolderRows:
    """The rows of a folder of images.

    Attributes:
        names: of each row's file in the folder; None where it names none.
        numbers: of each row in the source: of all its metadata, or of all its images.
        columns: what the metadata says of each row, by name.
        labels: of each row the folder that it is in, where folders are classes; otherwise None.
        origins: of each row of metadata, the file and the row in it, for messages.
        faults: why a row of metadata has no file, by its place.
        loose: images that no row names.
        skipped: [name, reason] of files that are not used.
        apart: number of images by split that are kept apart.
        sidecars: whether captions come from text files beside the images.
        near: files that look like metadata but are not read, and what would do.
    """

    listing: Listing
    names: list[str | None] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    columns: dict[str, list[Any]] = field(default_factory=dict)
    labels: list[str] | None = None
    origins: list[tuple[str, int]] = field(default_factory=list)
    faults: dict[int, str] = field(default_factory=dict)
    loose: list[str] = field(default_factory=list)
    skipped: list[list[str]] = field(default_factory=list)
    apart: dict[str, int] = field(default_factory=dict)
    sidecars: bool = False
    near: dict[str, str] = field(default_factory=dict)

    def origin(self, row: int) -> str:
        """Where a row stands, as in ``metadata.jsonl row 2``."""
        name, number = self.origins[row]
        return f"{name} row {number}"


def is_picture(name: str) -> bool:
    """Whether a file's name is that of an image."""
    return suffix_of(name) in SUFFIXES


def read_folder(
    listing: Listing,
    where: str,
    split: str | None = None,
    caption_lines: str = "whole",
    name_column: str = FILE_NAME,
    bad_texts: dict[str, str] | None = None,
) -> FolderRows:
    """The rows of a folder of images.

    With metadata, its rows are those of the set, in their order, as for ``datasets``. Otherwise each image is one, in
    the order of names, with the text file beside it as its caption.

    Args:
        where: the setting and the folder, for messages.
        split: that is wanted, where sub-folders are splits; None reads all.
        caption_lines: what of a text file is the caption: "whole", the "first" line, or "each" line is one.
        name_column: of the metadata, that names the files.
        bad_texts: filled with the images whose text file does not parse, and why; None raises.

    Raises:
        UsageError: there is nothing to read in the split, or a file does not parse.
    """
    names, apart = _of_split(listing.names, split, where)
    pictures = [name for name in names if is_picture(name)]
    rows = FolderRows(listing, apart=apart, skipped=list(listing.skipped))
    metadata, other = _metadata(rows, names, where, name_column)
    read = {*metadata}
    if metadata:
        _take_rows(rows, metadata, names, split, name_column)
    else:
        rows.names, rows.numbers = [*pictures], list(range(len(pictures)))
        rows.labels = _labels(pictures)
        read |= _read_sidecars(rows, set(names), caption_lines, where, bad_texts)
    read |= {name for name in rows.names if name is not None}
    rows.loose = [name for name in pictures if name not in read]
    for name in names:
        if name not in read and not is_picture(name):
            rows.skipped.append([printable(name), OTHER_METADATA if name in other else _why_no_image(rows, name)])
    return rows


def read_folder_of(
    image_column: str, listing: Listing, where: str, split: str | None = None, caption_lines: str = "whole"
) -> tuple[FolderRows, str]:
    """What ``read_folder`` finds, and the column that names the files: that of the image column, as in
    ``photo_file_name``, or ``file_name`` where metadata has no such column.
    """
    if image_column != "image":
        column = f"{image_column}_{FILE_NAME}"
        with suppress(UsageError):
            return read_folder(listing, where, split, caption_lines, column), column
    return read_folder(listing, where, split, caption_lines), FILE_NAME


def _why_no_image(rows, name):
    if is_near(name.rpartition("/")[2]):
        rows.near.setdefault(name, "rename it to metadata.jsonl or metadata.csv")
    suffix = suffix_of(name)
    return f"{suffix} is not read: convert it" if suffix in UNREAD_SUFFIXES else NO_IMAGE


def _of_split(names, split, where):
    """The files of a split, and how many images each of the others has."""
    if split is None:
        return names, {}
    wanted = KEYWORDS.get(split, split)
    found = Counter(split_of(name) for name in names if is_picture(name))
    others = {name: number for name, number in found.items() if name not in (None, "train")}
    if wanted == "train":
        if not others:
            return names, {}
        only = "train" in found
        if not only and None not in found:
            raise UsageError(
                f"{where}: has no images to train on, only {', '.join(sorted(others))}, which is kept apart; give its "
                "folder itself to train on it, or name it as `dataset_split`"
            )
        apart = others | ({"others": found[None]} if only and found[None] else {})
    else:
        if wanted not in found:
            known = ", ".join(sorted(name for name in found if name is not None)) or "none"
            raise UsageError(f"`dataset_split` {split}: no folder of {where} is one; its splits: {known}")
        only, apart = True, {name or "others": number for name, number in found.items() if name != wanted}
    kept = [
        name
        for name in names
        if (at := split_of(name)) == wanted or (at is None and (not only or rank(name.rpartition("/")[2]) is not None))
    ]
    return kept, apart


def _metadata(rows, names, where, name_column):
    """The rows of the metadata file of each folder, by file in their order, and the files that are beside one."""
    by_folder: dict[str, list] = {}
    for name in names:
        folder, _, own = name.rpartition("/")
        place = rank(own)
        if place is not None:
            by_folder.setdefault(folder, []).append((place, name))
    read: dict[str, list[dict[str, Any]]] = {}
    for _, some in sorted(by_folder.items()):
        place, name = min(some)
        try:
            read[name] = read_metadata(rows.listing.path(name), where, name_column)
        except UsageError as error:
            if place < len(NAMES):
                raise
            rows.near[name] = str(error)  # another name: it may be something else
        if not read.get(name, [None]):
            del read[name]
            rows.near[name] = f"it has no rows; the first line of a CSV file names its columns, as in {FILE_NAME},text"
    every = {name for some in by_folder.values() for _, name in some}
    return read, every - {*read, *rows.near}


def _take_rows(rows, metadata, names, split, name_column):
    finder, kept = Finder(rows.listing), set(names)
    wanted = KEYWORDS.get(split, split)
    table: list[dict[str, Any]] = []
    number = -1
    for file, of_file in metadata.items():
        folder = file.rpartition("/")[0]
        for place, row in enumerate(of_file, 1):
            number += 1
            name, fault = _find(finder, folder, row.pop(name_column, None))
            # What another split's folder has is kept apart, whatever metadata says of it.
            if split is not None and name is not None and not _is_of(name, wanted, kept, finder.names):
                continue
            if fault is not None:
                rows.faults[len(table)] = fault
            rows.names.append(name)
            rows.numbers.append(number)
            rows.origins.append((file, place))
            table.append(row)
    keys = dict.fromkeys(key for row in table for key in row)
    rows.columns = {key: [row.get(key) for row in table] for key in keys if isinstance(key, str)}


def _is_of(name, split, kept, names):
    return name in kept if name in names else split_of(name) in (None, split)


def _find(finder, folder, given):
    """The name of a row's file in the folder, and why there is none; both None where the row names none."""
    if not isinstance(given, str) or not given:
        return None, "has no file_name"
    given = writable(given)
    name = f"{folder}/{given}" if folder else given
    found = name if name in finder.names else None
    if found is None and is_outside(given):
        how = "is an absolute path, perhaps" if os.path.isabs(given) else "lies"
        return name, f"its file {given[:200]} {how} outside the folder"
    found = found or finder.find(name)
    return (found, None) if found is not None else (name, f"its file {given[:200]} does not exist")


def _labels(pictures):
    """Of each image its folder, where images of several folders lie at one depth, as for ``datasets``."""
    folders = [name.rpartition("/")[0] for name in pictures]
    if len({folder.count("/") if folder else -1 for folder in folders}) != 1:
        return None
    labels = [folder.rpartition("/")[2] for folder in folders]
    return labels if len(set(labels)) > 1 else None


def _read_sidecars(rows, names, caption_lines, where, bad_texts):
    beside = [_sidecar(name, names) for name in rows.names]
    if any(beside):
        rows.sidecars, texts = True, []
        for name, file in zip(rows.names, beside, strict=True):
            try:
                texts.append(file and _caption(rows.listing.path(file), caption_lines, where))
            except UsageError as error:
                if bad_texts is None:
                    raise
                bad_texts[name] = str(error.__cause__)
                texts.append(None)
        rows.columns["text"] = texts
    return {name for name in beside if name is not None}


def _sidecar(name, names):
    stem = os.path.splitext(name)[0]
    return next((stem + suffix for suffix in SIDECARS if stem + suffix in names), None)


def _caption(path, caption_lines, where):
    try:
        return caption_of(read_text(path), caption_lines)
    except (OSError, ValueError) as error:
        raise UsageError(f"{where}: {path} does not parse: {error}") from error


def caption_of(text: str, caption_lines: str) -> str | list[str] | None:
    """The caption, or several, of the text of a file beside an image; None if it is empty.

    ``caption_lines``: see ``read_folder``.
    """
    text = text.strip()
    if not text or caption_lines == "whole":
        return text or None
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    return lines[0] if caption_lines == "first" else lines
