"""The rows of the training set, with stable sample ids; duplicates; and what tells one training set from another."""

import hashlib
import json
import os
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image

from ..errors import UsageError
from .conditions import ROWS_AT_ONCE, Condition
from .decoder import BadImage, decode_stored, is_file, look, native, read_file, read_stored
from .excluded import without_excluded
from .listing import KEYWORDS, split_of_folder
from .settings import ImageSettings
from .sources import SAMPLE_ID, read_source, selected, stored_column, stored_image
from .work import batched, in_threads

IMAGES_AT_ONCE = 256  # a selection of rows is copied into one Arrow buffer, which holds 2 GB at most
HASHED_WHOLE = 2000  # images whose bytes `content_hash` reads; of all others it reads the sizes
TEXT = "text"  # the column of captions that come from files beside the images
HELD_OUT = 0x48454C44  # keeps the draw of held-out images apart from others of the seed
LOOKED_AT = 200_000  # images whose ends are looked at before training; of more, that many evenly spread


def load_training_rows(settings: ImageSettings, condition: Condition | None = None) -> Dataset:
    """Load ``dataset_name`` or ``train_data_dir``, without the rows that ``exclude_rows`` names.

    Returns the rows with the image column, the condition's columns and ``sample_id`` (int64): the row's number in the
    source, whatever is selected later. Raises ``UsageError`` naming the setting or the row.
    """
    return load_and_exclude(settings, condition)[0]


def load_and_exclude(settings: ImageSettings, condition: Condition | None = None) -> tuple[Dataset, np.ndarray]:
    """What ``load_training_rows`` returns, and the sample ids of the rows that were left out, int64."""
    columns = () if condition is None else condition.columns
    source, excluded = without_excluded(read_source(settings, columns), settings.exclude_rows)
    return _checked(source, settings, condition), excluded


def load_other_rows(settings: Any, setting: str, condition: Condition) -> Dataset:
    """Load the folder of images that a setting names (``prior_dir``, ``heldout_dir``): all of it, read as
    ``train_data_dir`` is. Captions may also be in the column ``text``.

    Args:
        settings: ``ImageSettings`` and the setting in one.

    Raises:
        UsageError: naming the setting, and the row if one is bad; also where the folder and the training set lie in one
            another, so that one would be read as part of the other. A folder ``test`` or the like in that of the
            training set is not.
    """
    folder = getattr(settings, setting)
    name = f"`{setting}` {folder}"
    others = copy(settings)
    others.dataset_name, others.train_data_dir = None, folder
    others.dataset_split, others.max_train_samples, others.exclude_rows = "train", None, None
    try:
        source = read_source(others, {*condition.columns, TEXT}, setting=setting)
        _check_apart(settings, folder, name)
        missing = set(condition.columns) - set(source.rows.column_names)
        if len(missing) == 1 and TEXT in source.rows.column_names:
            source = replace(source, rows=source.rows.rename_column(TEXT, missing.pop()))
        return _checked(source, others, condition)
    except UsageError as error:
        if str(error).startswith((f"`{setting}`", "`output_dir`")):
            raise
        raise UsageError(f"{name}: {error}") from error


def _check_apart(settings, folder, name):
    """Raise ``UsageError`` if one of training set and another folder of images lies in the other."""
    inside = settings.train_data_dir or ""
    own = Path(inside if settings.dataset_name is None else Path(settings.dataset_name) / inside)
    if not own.is_dir():
        return
    other, own = Path(folder).resolve(), own.resolve()
    if own in other.parents:
        split = split_of_folder(other.relative_to(own).as_posix())
        if split not in (None, KEYWORDS.get(settings.dataset_split, settings.dataset_split)):
            return  # its name keeps it apart
    if other == own or own in other.parents or other in own.parents:
        raise UsageError(
            f"{name}: this folder and that of the training set, {own}, must not lie in one another, because "
            "sub-folders are read too: move one of them"
        )


def _checked(source, settings, condition):
    """The rows of a source that are trained on, all of which can be used as far as their ends show."""
    if condition is not None:
        condition.check(source.rows, settings.replaces_bad_samples, source)
    rows = selected(source.rows, settings)
    if not settings.replaces_bad_samples:
        _check_images(rows, settings.image_column)
    return rows


def file_names(rows: Dataset, image_column: str) -> list[str | None]:
    """Of each row the name of its image's file, without its folder; None where none is known."""
    paths = pc.struct_field(stored_column(rows, image_column), "path").to_pylist()
    return [os.path.basename(path) or None if path else None for path in paths]


def _check_images(rows, column):
    """Raise ``UsageError`` naming the first row whose file is missing, or is damaged as far as its ends show."""
    ids = stored_column(rows, SAMPLE_ID)
    chosen = set(np.linspace(0, len(rows) - 1, min(len(rows), LOOKED_AT)).astype(int).tolist())
    everything = len(chosen) == len(rows)

    def faults(some):
        for row, (path, inside) in some:
            try:
                if everything or row in chosen:
                    look({"bytes": inside.as_buffer() if inside.is_valid else None, "path": path})
                elif not inside.is_valid and (path is None or ("://" not in path and not is_file(path))):
                    read_stored({"bytes": None, "path": path})
            except BadImage as error:
                return row, path, error
        return None

    for fault in in_threads(faults, batched(enumerate(_stored_images(rows, column)), IMAGES_AT_ONCE)):
        if fault is not None:
            row, path, error = fault
            error = _of_row(ids[row].as_py(), path, error)
            raise UsageError(f"{error}; mend or remove it, or set `on_bad_sample` to skip")


def _of_row(row, path, error):
    """What is said of a row whose image cannot be used."""
    message = str(error)
    if message.startswith("its image file"):
        return UsageError(f"row {row}: {message}")
    where = f"row {row} ({path}):" if path else f"row {row}:"
    return UsageError(f"{where} the image {message}" if message.startswith("does not") else f"{where} {message}")


def _stored_images(rows, column):
    """(path or None, bytes or None as an Arrow scalar) of every row, without decoding."""
    stored = rows.select_columns([column]).cast_column(column, ImageFeature(decode=False)).with_format("arrow")
    for start in range(0, len(rows), IMAGES_AT_ONCE):
        for chunk in stored[start : start + IMAGES_AT_ONCE][column].chunks:
            yield from zip(chunk.field("path").to_pylist(), chunk.field("bytes"), strict=True)


def content_hash(rows: Dataset, image_column: str, condition: Condition) -> str:
    """A short hash that tells one training set from another: of the ids, what the model is told of each image, the size
    of each image's file, and the bytes of up to 2,000 of them, evenly spread.

    Where the images lie does not count.
    """
    digest = hashlib.blake2b(digest_size=8)
    columns = rows.select_columns(list(dict.fromkeys([SAMPLE_ID, *condition.columns]))).with_format("arrow")
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
    if path is None or "://" in path or not is_file(path):
        return str(path).encode()
    return read_file(path) if whole else str(os.stat(native(path)).st_size).encode()


def first_rows(hashes: np.ndarray) -> np.ndarray:
    """The first row of each image, in the order of the rows, by the images' hashes (N,)."""
    return np.sort(np.unique(hashes, return_index=True)[1])


def held_out(hashes: np.ndarray, share: float, seed: int | None) -> np.ndarray:
    """Which rows are held out, bool (N,): all of this share of the images, drawn at random; two of them at least.

    Raises ``UsageError`` if no image would be left.
    """
    images, image_of = np.unique(hashes, return_inverse=True)
    number = max(2, round(share * len(images)))
    if number >= len(images):
        raise UsageError(
            f"`heldout_share` {share}: the training set has {len(images)} different images, of which {number} would be "
            "held out and none trained on"
        )
    chosen = np.random.default_rng([seed or 0, HELD_OUT]).permutation(len(images))[:number]
    return np.isin(image_of, chosen)


def label_values(rows: Dataset, column: str | None) -> np.ndarray | None:
    """The class labels of a column, (N,). Raises ``UsageError`` if there is no such column."""
    if column is None:
        return None
    if column not in rows.column_names:
        raise UsageError(
            f"`label_column` {column}: not a column of the dataset, which has {', '.join(rows.column_names)}"
        )
    return stored_column(rows, column).to_numpy()


def decode(rows: Dataset, image_column: str, index: int, alpha: str = "white") -> Image.Image:
    """The RGB image of a row; ``alpha``: see ``decoder.to_rgb``.

    Raises ``UsageError`` naming the row if it does not decode.
    """
    stored = stored_image(rows, image_column, index)
    try:
        return decode_stored(stored, alpha)
    except BadImage as error:
        raise _of_row(index, stored and stored.get("path"), error) from error
