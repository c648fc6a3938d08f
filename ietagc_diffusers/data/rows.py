"""The rows of the training set, with stable sample ids; duplicates; and what tells one training set from another."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, load_dataset, load_from_disk
from datasets import Image as ImageFeature
from PIL import Image

from ..errors import UsageError
from .conditions import ROWS_AT_ONCE, Condition
from .settings import DataSettings

SAMPLE_ID = "sample_id"
IMAGES_AT_ONCE = 256  # a selection of rows is copied into one Arrow buffer, which holds 2 GB at most
HASHED_WHOLE = 2000  # images whose bytes `content_hash` reads; of all others it reads the sizes


def load_training_rows(settings: DataSettings, condition: Condition | None = None) -> Dataset:
    """Load ``dataset_name`` or ``train_data_dir``.

    Returns the rows with the image column, the condition's columns and ``sample_id`` (int64): the row's number in the
    source, whatever is selected later. Raises ``UsageError`` naming the setting or the row.
    """
    rows = _train_split(settings)
    column = settings.image_column
    if column not in rows.column_names:
        raise UsageError(
            f"`image_column` {column}: not a column of the dataset, which has {', '.join(rows.column_names)}"
        )
    if not isinstance(rows.features[column], ImageFeature):
        raise UsageError(f"`image_column` {column}: holds {rows.features[column]}, not images")
    if SAMPLE_ID not in rows.column_names:
        rows = rows.add_column(SAMPLE_ID, np.arange(len(rows)))
    if condition is not None:
        condition.check(rows, only_types=settings.replaces_bad_samples)
    if not settings.replaces_bad_samples:
        _check_files(rows, column)
    if settings.max_train_samples is not None:
        rows = rows.shuffle(seed=settings.seed).select(range(min(settings.max_train_samples, len(rows))))
    return rows


def _train_split(settings):
    if settings.dataset_name is not None:
        source = f"`dataset_name` {settings.dataset_name}"
        load = {
            "path": settings.dataset_name,
            "name": settings.dataset_config_name,
            "data_dir": settings.train_data_dir,
        }
    else:
        source = f"`train_data_dir` {settings.train_data_dir}"
        folder = Path(settings.train_data_dir)
        if not folder.is_dir():
            raise UsageError(f"{source}: no such folder")
        _check_output_outside(folder, settings)
        if not any(path.is_file() for path in folder.rglob("*")):
            raise UsageError(f"{source}: the folder is empty; it needs images and a metadata.jsonl")
        load = {"path": "imagefolder", "data_files": {"train": str(folder / "**")}}
    try:
        if settings.dataset_name is not None and (Path(settings.dataset_name) / "state.json").is_file():
            dataset = {"train": load_from_disk(settings.dataset_name)}  # written by save_to_disk or `save_shards`
        else:
            dataset = load_dataset(**load, cache_dir=settings.cache_dir)
    except Exception as error:  # whatever datasets and its readers raise; the cause says more than the wrapper
        cause = error.__cause__ or error
        raise UsageError(f"{source}: datasets could not read it: {one_line(cause)}") from error
    if "train" not in dataset:
        raise UsageError(f"{source}: has no 'train' split, only {', '.join(dataset)}")
    return dataset["train"]


def _check_output_outside(folder, settings):
    """What a run writes must not become training data of the next."""
    output = getattr(settings, "output_dir", None)
    if output is not None and folder.resolve() in (Path(output).resolve(), *Path(output).resolve().parents):
        raise UsageError(
            f"`output_dir` {output}: lies in `train_data_dir` {folder}, so that the pictures that the run writes would "
            "be trained on by the next run; give another folder"
        )


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _stored_images(rows, column):
    """(path or None, bytes or None as an Arrow scalar) of every row, without decoding."""
    stored = rows.select_columns([column]).cast_column(column, ImageFeature(decode=False)).with_format("arrow")
    for start in range(0, len(rows), IMAGES_AT_ONCE):
        for chunk in stored[start : start + IMAGES_AT_ONCE][column].chunks:
            yield from zip(chunk.field("path").to_pylist(), chunk.field("bytes"), strict=True)


def _check_files(rows, column):
    for number, (path, inside) in enumerate(_stored_images(rows, column)):
        if not inside.is_valid and (path is None or ("://" not in path and not Path(path).is_file())):
            raise UsageError(f"row {number}: its image file {path} does not exist")


def content_hash(rows: Dataset, image_column: str, condition: Condition) -> str:
    """A short hash that tells one training set from another: of the ids, what the model is told of each image, the size
    of each image's file, and the bytes of up to 2,000 of them, evenly spread.

    Where the images lie does not count.
    """
    digest = hashlib.blake2b(digest_size=8)
    columns = rows.select_columns([SAMPLE_ID, *condition.columns]).with_format("arrow")
    for start in range(0, len(rows), ROWS_AT_ONCE):
        digest.update(json.dumps(columns[start : start + ROWS_AT_ONCE].to_pydict(), default=str).encode())
    whole = set(np.linspace(0, len(rows) - 1, min(len(rows), HASHED_WHOLE)).astype(int).tolist())
    for number, (path, inside) in enumerate(_stored_images(rows, image_column)):
        digest.update(_image_mark(path, inside, number in whole))
    return digest.hexdigest()


def _image_mark(path, inside, whole):
    if inside.is_valid:
        content = inside.as_buffer()
        return memoryview(content) if whole else str(content.size).encode()
    if path is None or "://" in path or not Path(path).is_file():
        return str(path).encode()
    return Path(path).read_bytes() if whole else str(Path(path).stat().st_size).encode()


def deduplicate(rows: Dataset, hashes: np.ndarray) -> Dataset:
    """One row of each image, the first."""
    first = np.unique(hashes, return_index=True)[1]
    return rows.select(np.sort(first))


def label_values(rows: Dataset, column: str | None) -> np.ndarray | None:
    """The class labels of a column, (N,). Raises ``UsageError`` if there is no such column."""
    if column is None:
        return None
    if column not in rows.column_names:
        raise UsageError(
            f"`label_column` {column}: not a column of the dataset, which has {', '.join(rows.column_names)}"
        )
    return stored_column(rows, column).to_numpy()


def stored_column(rows: Dataset, column: str) -> pa.ChunkedArray:
    """A column as it is stored. ``rows[column]`` reads row by row: 5 to 20 microseconds each."""
    stored, selected = rows.data.table[column], rows._indices
    return stored if selected is None else stored.take(selected.column(0))


def decode(rows: Dataset, image_column: str, index: int) -> Image.Image:
    """The RGB image of a row. Raises ``UsageError`` naming the row if it does not decode."""
    try:
        return rows[int(index)][image_column].convert("RGB")
    except Exception as error:  # whatever PIL and its plugins raise on broken files
        where = _image_path(rows, image_column, index)
        name = f" ({where})" if where else ""
        raise UsageError(f"row {index}{name}: the image does not decode: {one_line(error)}") from error


def _image_path(rows, image_column, row) -> Any:
    """Where a row's image came from, for messages, or None."""
    stored = rows.cast_column(image_column, ImageFeature(decode=False))[int(row)][image_column]
    return stored and stored.get("path")
