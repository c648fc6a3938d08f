"""Which kind of source something is, and its reader."""

import re
from dataclasses import dataclass
from pathlib import Path

from ..data.folder import SIDECARS, is_picture
from ..data.listing import list_folder, repeated_folders, suffix_of
from ..data.metadata import NAMES, rank
from ..data.sources import files_of_split
from ..errors import UsageError
from .folders import DcrReader, FetchedFilesReader, FolderReader, captions_files, fetched_folders
from .items import Reader
from .parquet import ParquetReader
from .tars import ENDINGS, TarReader

FORMATS = ("auto", "folder", "dcr", "kohya", "img2dataset", "webdataset", "parquet")
LOOKED_AT = 1 << 14  # bytes of a JSON file that tell whether it has captions
FIRST_KEY = re.compile(r'\ufeff?\s*\{\s*"([^"]*)"\s*:')


@dataclass(frozen=True)
class Options:
    """How a source is read.

    Attributes:
        format: one of ``FORMATS``.
        dataset_split: of a source that has several, by the names of its folders or files.
        captions: the file of captions, for ``dcr``.
        images: the folder that a Parquet file's paths lie in; by default its own.
        image_column, caption_column: of Parquet and metadata; None finds them.
        caption_lines: of text files, see ``data.folder.read_folder``.
    """

    format: str = "auto"
    dataset_split: str = "train"
    captions: str | None = None
    images: str | None = None
    image_column: str | None = None
    caption_column: str | None = None
    caption_lines: str = "whole"


def open_source(source: str | Path, options: Options) -> tuple[str, Reader]:
    """The kind of a source, and its reader. Raises ``UsageError`` if there is nothing to read."""
    path, where = Path(source), f"`source` {source}"
    if not path.exists():
        raise UsageError(f"{where}: no such folder or file")
    kind = detect(path, where, options) if options.format == "auto" else options.format
    if options.captions is not None and not Path(options.captions).is_file():
        raise UsageError(f"`captions` {options.captions}: no such file")
    if options.captions is not None and kind != "dcr":
        raise UsageError(f"`captions` {options.captions}: is for `format` dcr, and {where} is {kind}")
    if options.images is not None and not Path(options.images).is_dir():
        raise UsageError(f"`images` {options.images}: no such folder")
    if path.is_file() and kind not in ("webdataset", "parquet"):
        raise UsageError(f"{where}: is a file; give the folder it is in")
    return kind, _reader(kind, path, where, options)


def _reader(kind: str, path: Path, where: str, options: Options) -> Reader:
    split, lines = options.dataset_split, options.caption_lines
    if kind == "parquet":
        files = _files(path, (".parquet",), where, split)
        return ParquetReader(files, where, options.images, options.image_column, options.caption_column)
    if kind == "webdataset":
        return TarReader(_files(path, ENDINGS, where, split), lines)
    if kind == "img2dataset":
        if fetched_folders(path):
            return FetchedFilesReader(path, where, lines)
        if _data_files(path, ENDINGS):
            return TarReader(_files(path, ENDINGS, where, split), lines)
        files = _files(path, (".parquet",), where, split)
        return ParquetReader(files, where, options.images, options.image_column, options.caption_column)
    if kind == "dcr":
        return DcrReader(path, where, split, options.captions)
    return FolderReader(path, where, split, options.caption_column, lines, repeats=kind == "kohya")


def detect(path: Path, where: str, options: Options) -> str:
    """The kind of a source, by what lies in it. Raises ``UsageError`` if it is none."""
    if options.captions is not None:
        return "dcr"
    if path.is_file():
        kinds = {ENDINGS: "webdataset", (".parquet",): "parquet"}
        found = next((kind for endings, kind in kinds.items() if path.name.lower().endswith(endings)), None)
        if found is None:
            raise UsageError(f"{where}: is neither a tar nor a Parquet file; give a folder, or name its `format`")
        return found
    if fetched_folders(path):
        return "img2dataset"
    if _data_files(path, ENDINGS):
        return "webdataset"
    names = list_folder(path).names
    if any(map(is_picture, names)):
        if any(rank(name.rpartition("/")[2]) in range(len(NAMES)) for name in names):
            return "folder"
        if any(suffix_of(name) in SIDECARS for name in names):
            return "kohya" if repeated_folders(names) else "folder"
        return "dcr" if any(map(_has_captions, captions_files(path))) else "folder"
    if any(suffix_of(name) == ".parquet" for name in names):
        return "parquet"
    raise UsageError(f"{where}: has neither images nor tar or Parquet files")


def _has_captions(path: Path) -> bool:
    """Whether a JSON file names images, and so has captions of them."""
    with path.open("rb") as file:
        found = FIRST_KEY.match(file.read(LOOKED_AT).decode("utf-8", "replace"))
    return found is not None and is_picture(found[1])


def _data_files(path: Path, endings: tuple[str, ...]) -> list[str]:
    """The files of some endings below a folder, or the file itself, as text in their order."""
    if path.is_file():
        return [path.name]
    return [name for name in list_folder(path).names if name.lower().endswith(endings)]


def _files(path: Path, endings: tuple[str, ...], where: str, split: str) -> list[Path]:
    names = _data_files(path, endings)
    if not names:
        raise UsageError(f"{where}: has no {' or '.join(endings)} files")
    if path.is_file():
        return [path]
    return [path / name for name in files_of_split(names, where, split)]
