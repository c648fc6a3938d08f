"""The files of a folder: what is there, which of them are kept apart as another split, and what their names say."""

import os
import re
import unicodedata
from dataclasses import dataclass, field
from functools import cache
from pathlib import PurePosixPath

from ..errors import UsageError
from .decoder import native

SPLITS = {
    "train": ("train", "training", "trn"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "tst", "eval", "evaluation"),
    "heldout": ("heldout", "held out", "held_out", "held-out", "holdout", "hold out", "hold_out", "hold-out"),
}
KEYWORDS = {word: split for split, words in SPLITS.items() for word in words}
_WORDS = "|".join(sorted(map(re.escape, KEYWORDS), key=len, reverse=True))
_THINGS = r"images?|imgs?|pictures?|photos?|data|set|split"
# A folder that is a split: test, val2017, test_set, images-train.
_FOLDER = re.compile(rf"(?:(?:{_THINGS})[-_. ])?({_WORDS})(?:[-_. ]?(?:{_THINGS}|\d+))*")
# A file that is part of a split, as `datasets` sees it: train-00000-of-00001.parquet, my_test.parquet.
_FILE = re.compile(rf"(?:.*[-._ 0-9])?({_WORDS})(?:[-._ 0-9].*)?")
_REPEATS = re.compile(r"\d{1,3}_.+")


@dataclass
class Listing:
    """The files of a folder, by their paths in it, with "/" between their parts.

    Attributes:
        folder: its absolute path.
        names: of its files, sorted as text; hidden ones, and those in hidden folders, are none of them.
        skipped: [name, reason] of what should have been a file but cannot be read.
    """

    folder: str
    names: list[str] = field(default_factory=list)
    skipped: list[list[str]] = field(default_factory=list)

    def path(self, name: str) -> str:
        """The absolute path of a file."""
        return os.path.join(self.folder, name)


def list_folder(folder: str | os.PathLike) -> Listing:
    """The files of a folder and its sub-folders, links followed. No file is opened, and of most none is looked at."""
    absolute = os.path.abspath(os.fspath(folder))
    listing = Listing(_text(absolute) or "")
    if not listing.folder:
        raise UsageError(f"{printable(absolute)}: its name is not text in UTF-8; rename the folder")
    pending, seen = [("", absolute)], set()
    while pending:
        inside, path = pending.pop()
        about = os.stat(path)
        if (about.st_dev, about.st_ino) in seen:
            continue
        seen.add((about.st_dev, about.st_ino))
        try:
            entries = list(os.scandir(path))
        except OSError as error:
            listing.skipped.append([printable(inside), f"cannot be read: {error.strerror}"])
            continue
        for entry in entries:
            _take(entry, inside, listing, pending)
    listing.names.sort()
    listing.skipped.sort()
    return listing


def _take(entry, inside, listing, pending):
    if entry.name.startswith("."):
        return
    if entry.is_dir():
        if not entry.name.startswith("__"):  # __pycache__, __MACOSX
            pending.append((f"{inside}{_text(entry.name) or entry.name}/", entry.path))
    elif entry.is_file():
        name = _text(entry.name)
        if name is None or not is_text(inside):
            listing.skipped.append([printable(inside + entry.name), "has a name that is not text"])
        else:
            listing.names.append(inside + name)
    elif entry.is_symlink():
        listing.skipped.append([printable(inside + entry.name), "is a link to a file that does not exist"])


def _text(name: str) -> str | None:
    """A name as text; None if it is in another encoding than UTF-8."""
    if name.isascii() or is_text(name):
        return name
    try:
        return os.fsencode(name).decode()
    except UnicodeError:
        return None


def is_text(name: str) -> bool:
    """Whether a name can be written as text."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(name: str) -> str:
    """A name that any console can print."""
    return ascii(name)[1:-1]


def suffix_of(name: str) -> str:
    """The ending of a file's name, in lower case."""
    return os.path.splitext(name)[1].lower()


class Finder:
    """Finds the files that metadata names.

    Args:
        listing: the folder's files.
    """

    def __init__(self, listing: Listing):
        self.listing, self.names = listing, set(listing.names)
        self._composed: dict[str, str] | None = None

    def find(self, name: str) -> str | None:
        """The name, in the folder, of a file that metadata calls ``name``; None if there is none.

        Backslashes may stand between its parts, and accents may be composed in another way.
        """
        if name in self.names:
            return name
        for candidate in dict.fromkeys((name, name.replace("\\", "/"))):
            candidate = os.path.normpath(candidate)
            if candidate in self.names or os.path.isfile(native(self.listing.path(candidate))):
                return candidate
        return self._by_composition(name)

    def _by_composition(self, name):
        if name.isascii():
            return None
        if self._composed is None:
            self._composed = {unicodedata.normalize("NFC", known): known for known in self.listing.names}
        return self._composed.get(unicodedata.normalize("NFC", os.path.normpath(name.replace("\\", "/"))))


def is_outside(name: str) -> bool:
    """Whether a name in metadata leads out of the folder."""
    inside = os.path.normpath(name.replace("\\", "/"))
    return (
        os.path.isabs(inside)
        or inside.split("/")[0] == ".."
        or "://" in name
        or re.match(r"[A-Za-z]:", name) is not None
    )


@cache
def split_of_folder(folder: str) -> str | None:
    """The split that a folder's path says: of its first part that is one's name; None if none is."""
    for part in folder.split("/"):
        found = _FOLDER.fullmatch(part.lower())
        if found:
            return KEYWORDS[found[1]]
    return None


def split_of(name: str) -> str | None:
    """The split that the folders of a file's path say."""
    return split_of_folder(name.rpartition("/")[0])


def split_of_file(name: str) -> str | None:
    """The split that a data file's path says: by its folders, otherwise by its own name."""
    found = split_of(name) or _FILE.fullmatch(PurePosixPath(name).name.lower())
    return found if found is None or isinstance(found, str) else KEYWORDS[found[1]]


def repeated_folders(names: list[str]) -> list[str]:
    """Folders that kohya's scripts would repeat: 10_name."""
    folders = {name.rpartition("/")[0].rpartition("/")[2] for name in names}
    return sorted(folder for folder in folders if _REPEATS.fullmatch(folder))
