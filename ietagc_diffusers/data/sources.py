"""Where rows come from: an image folder, files of Parquet, what ``save_to_disk`` wrote, or the Hub."""

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from datasets.data_files import DataFilesDict, DataFilesList
from datasets.packaged_modules.parquet.parquet import Parquet

from ..errors import UsageError, one_line
from .columns import STORED_IMAGE, array_of, made, with_images, with_texts
from .folder import NO_ROW, FolderRows, is_picture, read_folder_of
from .listing import KEYWORDS, Listing, list_folder, printable, repeated_folders, split_of_file, suffix_of
from .metadata import FILE_NAME, NEAR_TEXT, near_column, rank
from .settings import ImageSettings

logger = logging.getLogger(__name__)
SAMPLE_ID = "sample_id"
ARCHIVES = {".zip", ".tar", ".gz", ".tgz", ".rar", ".7z"}
NAMED = 3  # files that a warning names


@dataclass(frozen=True)
class Source:
    """Rows as they are read, and what is known of where they come from.

    Attributes:
        rows: with a column of images, and ``sample_id`` (int64): the row's number in the source.
        name: the setting and the source, for messages.
        folder: of an image folder, what was found in it.
        skipped: [name, reason] of files that are not used.
    """

    rows: Dataset
    name: str
    folder: FolderRows | None = None
    skipped: list[list[str]] = field(default_factory=list)

    def file_of(self, row: int) -> str:
        """The file that a row of an image folder names, in brackets, for messages; otherwise nothing."""
        name = None if self.folder is None else self.folder.names[row]
        return "" if name is None else f" ({printable(name)})"

    def hint(self, column: str) -> str:
        """What may be meant where a column of texts is missing."""
        near = near_column((name for name in self.rows.column_names if name != column), NEAR_TEXT)
        if near is not None:
            return f"; is it {near}?"
        if self.folder is None:
            return ""
        if self.folder.near:
            name, advice = next(iter(self.folder.near.items()))
            return f"; {name} is not read as metadata: {advice}"
        if self.folder.sidecars:
            return "; the captions of the .txt files are in the column text"
        return " (captions come from a metadata.jsonl in the folder, or from a .txt file beside each image)"


def read_source(settings: ImageSettings, texts: Iterable[str] = (), setting: str | None = None) -> Source:
    """Everything that ``dataset_name`` or ``train_data_dir`` holds of ``dataset_split``.

    Args:
        texts: columns of texts, which are read in whatever type they are stored.
        setting: the setting that names the source, for messages; by default the one that does.

    Raises:
        UsageError: naming the setting.
    """
    if settings.dataset_name is not None:
        name = f"`{setting or 'dataset_name'}` {settings.dataset_name}"
        folder = Path(settings.dataset_name)
        if folder.is_dir() and settings.train_data_dir:
            folder = folder / settings.train_data_dir
        local = folder.is_dir()
    else:
        name = f"`{setting or 'train_data_dir'}` {settings.train_data_dir}"
        folder, local = Path(str(settings.train_data_dir)), True
        if not folder.is_dir():
            raise UsageError(f"{name}: no such folder")
        _check_output_outside(folder, settings, name)
    source = _of_folder(folder, settings, name) if local else Source(_of_datasets(settings, name), name)
    rows = _numbered(_with_images(source, settings.image_column, str(folder.resolve()) if local else None))
    for column in texts:
        rows = with_texts(rows, column) if column in rows.column_names else rows
    return Source(rows, source.name, source.folder, source.skipped)


def selected(rows: Dataset, settings: ImageSettings) -> Dataset:
    """The rows that ``max_train_samples`` draws with the seed."""
    if settings.max_train_samples is None:
        return rows
    return rows.shuffle(seed=settings.seed).select(range(min(settings.max_train_samples, len(rows))))


def stored_column(rows: Dataset, column: str) -> pa.ChunkedArray:
    """A column as it is stored. ``rows[column]`` reads row by row: 5 to 20 microseconds each."""
    stored, chosen = rows.data.table[column], rows._indices
    return stored if chosen is None else stored.take(chosen.column(0))


def stored_image(rows: Dataset, column: str, index: int) -> dict[str, Any] | None:
    """A row's image as it is stored, ``{"bytes", "path"}``, without decoding it; None if the row has none."""
    place = int(index) if rows._indices is None else rows._indices.column(0)[int(index)].as_py()
    return rows.data.fast_slice(place, 1)[column][0].as_py()


def _of_folder(folder, settings, name):
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        return Source(_of_disk(folder, settings, name), name)
    if settings.dataset_name is not None and (settings.dataset_config_name or _has_configurations(folder)):
        return Source(_of_datasets(settings, name), name)
    listing = list_folder(folder)
    if any(map(is_picture, listing.names)):
        options = settings.dataset_split, settings.caption_lines
        found, column = read_folder_of(settings.image_column, listing, name, *options)
        for row, fault in found.faults.items():
            if "outside" in fault:
                raise UsageError(
                    f"{name}: {found.origin(row)}: {fault}: {column} should be a path relative to the metadata's folder"
                )
        _warn(found, name)
        return Source(
            _rows_of(found, "image" if column == FILE_NAME else settings.image_column), name, found, found.skipped
        )
    if any(suffix_of(file) == ".parquet" for file in listing.names):
        return Source(of_parquet(listing, name, settings.dataset_split, settings.cache_dir), name)
    if settings.dataset_name is not None and listing.names:
        return Source(_of_datasets(settings, name), name)
    raise UsageError(f"{name}: {_nothing_in(listing)}")


def _nothing_in(listing: Listing) -> str:
    if not listing.names and not listing.skipped:
        return "the folder is empty; it needs images and a metadata.jsonl"
    archive = next((file for file in listing.names if suffix_of(file) in ARCHIVES), None)
    if archive is not None:
        return f"no images in this folder, but {archive}: unpack it"
    return "no images in this folder (.png, .jpg, .webp or others)"


def _rows_of(found: FolderRows, image_column: str) -> Dataset:
    """The rows of an image folder, their images by path."""
    listing = found.listing
    paths = pa.array([None if name is None else listing.path(name) for name in found.names], pa.string())
    inside = pa.nulls(len(paths), pa.binary())
    images = pa.StructArray.from_arrays([inside, paths], ["bytes", "path"], mask=paths.is_null())
    columns: dict[str, pa.Array] = {image_column: images.cast(STORED_IMAGE)}
    kinds: dict[str, Any] = {image_column: ImageFeature()}
    for name, values in found.columns.items():
        if name not in (image_column, SAMPLE_ID):
            columns[name] = array_of(values)
    if found.labels is not None and "label" not in columns:
        kinds["label"] = ClassLabel(names=sorted(set(found.labels)))
        columns["label"] = pa.array(kinds["label"].str2int(found.labels), pa.int64())
    columns[SAMPLE_ID] = _sample_ids(found)
    table = pa.table(columns)
    return made(table, Features(Features.from_arrow_schema(table.schema) | kinds), "train")


def _sample_ids(found):
    """Those that the metadata gives, as of a saved shard, or the numbers of its rows."""
    given = found.columns.get(SAMPLE_ID)
    try:
        if given is not None and None not in given:
            return pa.array([int(value) for value in given], pa.int64())
    except (TypeError, ValueError, OverflowError):
        pass
    return pa.array(found.numbers, pa.int64())


def _warn(found: FolderRows, name: str) -> None:
    if found.apart:
        counts = ", ".join(f"{split} ({number})" for split, number in sorted(found.apart.items()))
        say(f"{name}: {len(found.names)} rows are read; images of other splits are kept apart: {counts}")
    if found.loose:
        some = _such_as([*map(printable, found.loose[:NAMED])], "image", len(found.loose))
        say(f"{name}: {some} without a row in the metadata left out")
    unread = [file for file, why in found.skipped if why.endswith("convert it")]
    if unread:
        say(f"{name}: {_such_as(unread, 'file')} of a format that is not read left out: convert to PNG or JPEG")
    lost = found.listing.skipped
    if lost:
        say(f"{name}: {_such_as([file for file, _ in lost], 'file')} left out: {lost[0][0]} {lost[0][1]}")
    repeated = repeated_folders([file for file in found.names if file is not None])
    if repeated and found.sidecars:
        say(f"{name}: each image is read once; the repeats in the names of folders ({repeated[0]}) are not applied")
    found.skipped += [[printable(file), NO_ROW] for file in found.loose]


def _such_as(names, thing, number=None):
    number = len(names) if number is None else number
    return f"{number} {thing}{'' if number == 1 else 's'} ({', '.join(names[:NAMED])})"


def say(message: str) -> None:
    """Warn, in one of a run's processes."""
    if os.environ.get("RANK", "0") == "0":
        logger.warning(message)


def of_parquet(listing: Listing, name: str, split: str | None, cache_dir: str | None = None) -> Dataset:
    """The rows of a folder's Parquet files; ``split``: that their names say, None for all of them.

    `datasets` keeps a copy as Arrow files, under a mark of the files' sizes, times and places on disk.
    """
    files = [file for file in listing.names if suffix_of(file) == ".parquet" and rank(file.rpartition("/")[2]) is None]
    chosen = files_of_split(files, name, split)
    paths = [listing.path(file) for file in chosen]
    marks = [(s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for s in map(os.stat, paths)]
    data_files = DataFilesDict({"train": DataFilesList(paths, [tuple(map(str, mark)) for mark in marks])})
    return guarded(name, lambda: _prepared(Parquet(cache_dir=cache_dir, data_files=data_files)))


def files_of_split(files: list[str], name: str, split: str | None) -> list[str]:
    """The data files whose names say a split, all of them for None. Without any, those of no split are for training.

    Raises ``UsageError`` naming the splits that there are.
    """
    splits = {file: split_of_file(file) for file in files}
    wanted, found = KEYWORDS.get(split or "", split), set(splits.values())
    chosen = [file for file in files if split is None or splits[file] == wanted]
    if not chosen and wanted == "train" and None in found:
        chosen = [file for file in files if splits[file] is None]
    if not chosen:
        known = ", ".join(sorted(one for one in found if one is not None)) or "none"
        raise UsageError(f"{name}: has no '{split}' split, only {known}; name one as `dataset_split`")
    if len(chosen) < len(files):
        apart = ", ".join(sorted({str(splits[file] or "others") for file in files if file not in set(chosen)}))
        say(f"{name}: files of other splits are kept apart: {apart}")
    return chosen


def _prepared(builder):
    builder.download_and_prepare()
    return builder.as_dataset(split="train")


def guarded(name: str, read: Any) -> Any:
    """What ``read`` gives. Raises ``UsageError`` for whatever `datasets` and its readers raise."""
    try:
        return read()
    except Exception as error:
        cause = error.__cause__ or error  # says more than the wrapper
        raise UsageError(f"{name}: datasets could not read it: {one_line(cause)}") from error


def of_split(loaded: Any, split: str, name: str) -> Dataset:
    """One split of what was loaded. Raises ``UsageError`` naming those that there are."""
    if not isinstance(loaded, dict):
        return loaded
    if split not in loaded:
        raise UsageError(f"{name}: has no '{split}' split, only {', '.join(loaded)}; name one as `dataset_split`")
    return loaded[split]


def _of_disk(folder, settings, name):
    return of_split(guarded(name, lambda: datasets.load_from_disk(str(folder))), settings.dataset_split, name)


def _of_datasets(settings, name):
    """A set that `datasets` reads by itself: of the Hub, or with a configuration."""
    split = settings.dataset_split
    options = {
        "name": settings.dataset_config_name,
        "data_dir": settings.train_data_dir,
        "cache_dir": settings.cache_dir,
    }
    sliced = {"split": split} if set("[+") & set(split) else {}  # as in train[:10%]
    return of_split(
        guarded(name, lambda: datasets.load_dataset(settings.dataset_name, **options, **sliced)), split, name
    )


def _has_configurations(folder):
    """Whether the folder's card says which files are which split."""
    card = folder / "README.md"
    try:
        return card.is_file() and "\nconfigs:" in card.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False


def _with_images(source, column, folder):
    rows = source.rows
    if column not in rows.column_names:
        raise UsageError(
            f"`image_column` {column}: not a column of the dataset, which has {', '.join(rows.column_names)}"
        )
    rows = guarded(source.name, lambda: with_images(rows, column, folder))
    if not isinstance(rows.features[column], ImageFeature):
        raise UsageError(f"`image_column` {column}: holds {rows.features[column]}, not images")
    return rows


def _numbered(rows):
    if SAMPLE_ID in rows.column_names:
        stored = rows.data.table[SAMPLE_ID]
        if pa.types.is_integer(stored.type) and not stored.null_count:
            return rows
        rows = rows.remove_columns(SAMPLE_ID)
    return rows.add_column(SAMPLE_ID, np.arange(len(rows)))


def _check_output_outside(folder, settings, name):
    """What a run writes must not become training data of the next."""
    output = getattr(settings, "output_dir", None)
    if output is not None and folder.resolve() in (Path(output).resolve(), *Path(output).resolve().parents):
        raise UsageError(
            f"`output_dir` {output}: lies in {name}, so that the pictures that the run writes would "
            "be trained on by the next run; give another folder"
        )
