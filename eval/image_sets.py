"""Sets of images: a folder with or without metadata, or a dataset.

Images are read one at a time, by the reader and the decoder of training. Those that cannot be used are counted and
named.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image

from ietagc_diffusers.data import DataSettings, read_source, selected
from ietagc_diffusers.data.columns import array_of, with_images, with_texts
from ietagc_diffusers.data.decoder import BadImage, decode_bytes, read_file, read_stored, to_rgb
from ietagc_diffusers.data.folder import NO_IMAGE, NO_ROW, OTHER_METADATA, FolderRows, is_picture, read_folder_of
from ietagc_diffusers.data.listing import list_folder, suffix_of
from ietagc_diffusers.data.rows import TEXT
from ietagc_diffusers.data.settings import ImageSettings
from ietagc_diffusers.data.sources import SAMPLE_ID, of_parquet, stored_column, stored_image
from ietagc_diffusers.errors import UsageError, one_line

__all__ = ["NO_IMAGE", "NO_ROW", "OTHER_METADATA", "BadImage", "ImageSet", "load_images", "to_rgb", "training_images"]
MAX_ASPECT = 32  # a strip, resized by its small edge, would fill the memory
MIN_EDGE = 2
KEY = "key"  # column in which prepared sets have the name of each image


def unusable(skipped: Iterable[Sequence[str]]) -> list[list[str]]:
    """Those of an ``ImageSet``'s ``skipped`` that should have been images: all but notes and the like."""
    return [[name, why] for name, why in skipped if why not in (NO_IMAGE, OTHER_METADATA, NO_ROW)]


def to_tensor(image: Image.Image) -> torch.Tensor:
    """An RGB image as uint8 (3, H, W)."""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


class ImageSet:
    """Images with the rows of their metadata.

    Attributes:
        source: the folder or dataset, for messages and records.
        names: a name for each image: its path in the folder, or ``row 17``.
        texts: the caption of each image (the first of several), or None.
        rows: the rest of each image's metadata: dicts; ``sample_id`` is its row in the dataset, as in training. Of a
            dataset only the column of labels, if it was named.
        skipped: [name, reason] of each file or row that could not be used.
        columns: what ``load_again`` needs: options of ``load_images``, or settings of ``training_images``.
        alpha: how transparent parts are shown, see ``data.decoder.to_rgb``.
    """

    def __init__(
        self,
        source: str | Path,
        names: Iterable[str],
        texts: Iterable[str | None],
        rows: Iterable[dict[str, Any]],
        read_bytes: Callable[[int], bytes],
        skipped: Iterable[list[str]] = (),
        columns: dict[str, Any] | None = None,
        alpha: str = "white",
    ):
        self.source = str(source)
        self.names, self.texts, self.rows = list(names), list(texts), list(rows)
        self.read_bytes = read_bytes
        self.skipped = list(skipped)
        self.columns = columns or {}
        self.alpha = alpha

    def __len__(self) -> int:
        return len(self.names)

    def encoded(self, index: int) -> bytes:
        """The image's file as bytes. Raises ``BadImage``."""
        try:
            return self.read_bytes(index)
        except BadImage:
            raise
        except (OSError, ValueError, TypeError) as error:
            raise BadImage(f"cannot be read: {one_line(error)}") from error

    def image(self, index: int, encoded: bytes | None = None) -> Image.Image:
        """The image as PIL RGB; ``encoded``: its file's bytes, if they were read before. Raises ``BadImage``."""
        return decode_bytes(self.encoded(index) if encoded is None else encoded, self.alpha)

    def key(self, encoded: bytes) -> bytes:
        """A hash that stands for the pixels of an image file's bytes."""
        return content_hash(encoded if self.alpha == "white" else self.alpha.encode() + encoded)

    def select(self, indices: Iterable[int]) -> "ImageSet":
        """The set of these images only."""
        indices = list(indices)
        return ImageSet(
            self.source,
            [self.names[i] for i in indices],
            [self.texts[i] for i in indices],
            [self.rows[i] for i in indices],
            lambda index: self.read_bytes(indices[index]),
            self.skipped,
            self.columns,
            self.alpha,
        )

    def decoded_like(self, others: "ImageSet") -> "ImageSet":
        """The same images with transparent parts shown as in another set, so that both differ in nothing by that."""
        images = self.select(range(len(self)))
        images.alpha = others.alpha
        return images

    def files(self) -> "ImageSet":
        """Each image file once, with the first of the rows that name it."""
        first: dict[str, int] = {}
        for index, name in enumerate(self.names):
            first.setdefault(name, index)
        return self.select(first.values())

    def captions(self) -> list[tuple[int, str]]:
        """(index, caption) of every row that has a caption."""
        return [(index, text) for index, text in enumerate(self.texts) if text]


def content_hash(encoded: bytes) -> bytes:
    """A hash of an image file's bytes: the key for features computed from it."""
    return hashlib.blake2b(encoded, digest_size=16).digest()


def comparable(image: Image.Image) -> Image.Image:
    """The image, if its size lets it be compared. Raises ``BadImage``."""
    if min(image.size) < MIN_EDGE:
        raise BadImage(f"is {image.width} x {image.height}: too small to compare")
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise BadImage(f"is {image.width} x {image.height}: its sides differ by more than {MAX_ASPECT} times")
    return image


def _caption(value: Any) -> str | None:
    if isinstance(value, (list, tuple)) and value:
        value = value[0]
    return value if isinstance(value, str) else None


def training_images(settings: DataSettings, setting: str = "train", text_column: str | None = None) -> ImageSet:
    """The images of a training set: the rows that ``data.load_training_rows`` gives for these settings.

    A row whose image is missing or broken is one of them; to read it raises ``BadImage``.

    Args:
        setting: the setting that names the source, for messages.
        text_column: of captions; by default the settings' ``caption_column``, if they have one, or text.

    Raises:
        UsageError: there is no such source or no image in it.
    """
    texts = text_column or str(getattr(settings, "caption_column", "text"))
    source = read_source(settings, (texts,), setting)
    rows = selected(source.rows, settings)
    ids = stored_column(rows, SAMPLE_ID).to_pylist()
    if source.folder is None:
        names = [f"row {row}" for row in ids]
    else:
        # By the place in the source, which a selection changes.
        chosen = range(len(rows)) if rows._indices is None else rows._indices.column(0).to_pylist()
        names = [source.folder.names[row] or source.folder.origin(row) for row in chosen]
    options = {name: value for name, value in asdict(settings).items() if name in RELOADED}
    return ImageSet(
        settings.dataset_name or str(settings.train_data_dir),
        names,
        _texts(rows, texts),
        _rows(rows, ids, settings.label_column, KEY if source.folder is None else None),
        lambda index: _read(rows, settings.image_column, index),
        source.skipped,
        options | {"text_column": texts},
        settings.alpha,
    )


def images_of_rows(rows: datasets.Dataset, settings: ImageSettings) -> ImageSet:
    """The images of rows that a training has read and selected, as its settings have them decoded."""
    ids = stored_column(rows, SAMPLE_ID).to_pylist()
    return ImageSet(
        settings.dataset_name or str(settings.train_data_dir),
        [f"row {number}" for number in ids],
        [None] * len(rows),
        [{SAMPLE_ID: number} for number in ids],
        lambda index: _read(rows, settings.image_column, index),
        alpha=settings.alpha,
    )


# Settings of a training set that load it again; which rows were selected does not matter, as images have names.
RELOADED = ("image_column", "dataset_config_name", "dataset_split", "caption_lines", "alpha")


def training_settings(source: str | Path, **options: Any) -> DataSettings:
    """Settings of the training set that a folder or a Hub id holds."""
    folder = Path(source)
    if folder.is_file():
        raise UsageError(f"`train` {source}: is a file; give the folder it is in")
    options["train_data_dir" if folder.is_dir() else "dataset_name"] = str(source)
    return DataSettings(**options)


def load_training_set(source: str | Path, image_column: str = "image", text_column: str = "text") -> ImageSet:
    """The training set that a folder or a Hub id holds, as training reads it without further settings."""
    return training_images(training_settings(source, image_column=image_column), "train", text_column)


def load_again(source: str | Path, setting: str, columns: dict[str, Any]) -> ImageSet:
    """A set of images by its ``source`` and ``columns``."""
    if "dataset_split" not in columns:
        return load_images(source, setting, **columns)
    options = dict(columns)
    text_column = options.pop("text_column", None)
    return training_images(training_settings(source, **options), setting, text_column)


def _read(rows: datasets.Dataset, column: str, index: int) -> bytes:
    encoded = read_stored(stored_image(rows, column, index))
    if encoded is None:
        raise BadImage("is not on this machine")
    return encoded


def _rows(rows: datasets.Dataset, ids: Iterable[int], *columns: str | None) -> list[dict[str, Any]]:
    """Number of each row, and its values of those of the columns that there are."""
    found: list[dict[str, Any]] = [{SAMPLE_ID: number} for number in ids]
    for column in columns:
        if column is not None and column in rows.column_names:
            for row, value in zip(found, stored_column(rows, column).to_pylist(), strict=True):
                row[column] = value
    return found


def _texts(rows: datasets.Dataset, column: str) -> list[str | None]:
    if column not in rows.column_names:
        return [None] * len(rows)
    return [_caption(value) for value in stored_column(rows, column).to_pylist()]


def load_images(
    source: str | Path,
    setting: str,
    image_column: str = "image",
    text_column: str = "text",
    label_column: str | None = None,
    caption_lines: str = "whole",
    or_default: bool = False,
) -> ImageSet:
    """A set of images from a folder of image files (with ``metadata.jsonl`` or not), or from anything that
    ``datasets`` loads: a folder of Parquet files, a folder that ``save_to_disk`` wrote, a Hub id.

    All images of the source count, also those without a row in its metadata and those of another split than training.

    Args:
        setting: the setting that names the source, for messages.
        image_column: a dataset's column of images.
        text_column: column of captions, in a dataset or in metadata; label_column: of classes.
        caption_lines: what of a text file beside an image is its caption, see ``data.folder.read_folder``.
        or_default: whether images are read from the column ``image``, and captions from ``text``, where there is none
            of the other name.

    Raises:
        UsageError: there is no such source or no image in it.
    """
    folder = Path(source)
    if folder.is_file():
        raise UsageError(f"`{setting}` {source}: is a file; give the folder it is in")
    name, found = f"`{setting}` {source}", None

    def named(column: str, default: str, columns: Iterable[str]) -> str:
        return default if or_default and column not in columns else column

    if folder.is_dir() and not (folder / "state.json").is_file() and not (folder / "dataset_dict.json").is_file():
        listing = list_folder(folder)
        if any(map(is_picture, listing.names)):
            rows, _ = read_folder_of(image_column, listing, name, caption_lines=caption_lines)
            text_column = named(text_column, TEXT, rows.columns)
            images = _from_folder(folder, rows, text_column)
            images.columns = {"image_column": image_column, "text_column": text_column}
            if caption_lines != "whole":
                images.columns["caption_lines"] = caption_lines
            return images
        if not any(suffix_of(file) == ".parquet" for file in listing.names):
            raise UsageError(f"{name}: no images in this folder (.png, .jpg, .webp or others)")
        found = of_parquet(listing, name, None)
    found = _load(folder, source, name) if found is None else found
    image_column = named(image_column, "image", found.column_names)
    text_column = named(text_column, TEXT, found.column_names)
    images = _from_rows(source, name, found, image_column, text_column, label_column)
    images.columns = {"image_column": image_column, "text_column": text_column}
    return images


def _from_folder(folder: Path, found: FolderRows, text_column: str) -> ImageSet:
    """Rows of the metadata first, in their order and with their numbers, then images without a row."""
    listing = found.listing
    skipped = [[found.origin(row), fault] for row, fault in found.faults.items()]
    good = [row for row in range(len(found.names)) if row not in found.faults]
    names = [name for row in good if (name := found.names[row]) is not None]
    rows = [
        {SAMPLE_ID: found.numbers[row]} | {key: values[row] for key, values in found.columns.items()} for row in good
    ]
    rows = [{key: value for key, value in row.items() if value is not None} for row in rows]
    names, rows = [*names, *found.loose], [*rows, *({} for _ in found.loose)]
    return ImageSet(
        folder,
        names,
        map(_caption, array_of([row.get(text_column) for row in rows]).to_pylist()),
        rows,
        lambda index: read_file(listing.path(names[index])),
        skipped + found.skipped,
    )


def _load(folder: Path, source: str | Path, name: str) -> datasets.Dataset:
    try:
        if folder.is_dir():
            rows = datasets.load_from_disk(str(folder))
        else:
            rows = datasets.load_dataset(str(source), split="train")
    except Exception as error:
        raise UsageError(f"{name}: neither a folder nor a dataset: {one_line(error)[:200]}") from error
    if isinstance(rows, dict):
        splits = rows
        if "train" not in splits and len(splits) > 1:
            raise UsageError(f"{name}: has no split train; give the folder of one of {', '.join(splits)}")
        rows = splits["train"] if "train" in splits else next(iter(splits.values()))
    return rows


def _from_rows(
    source: str | Path,
    name: str,
    rows: datasets.Dataset,
    image_column: str,
    text_column: str,
    label_column: str | None,
) -> ImageSet:
    if image_column not in rows.column_names:
        raise UsageError(f"{name}: has no column '{image_column}', only {', '.join(rows.column_names)}")
    rows = with_images(rows, image_column, os.path.abspath(source) if Path(source).is_dir() else None)
    if text_column in rows.column_names:
        rows = with_texts(rows, text_column)
    ids = stored_column(rows, SAMPLE_ID).to_pylist() if SAMPLE_ID in rows.column_names else range(len(rows))
    names = [f"row {number}" for number in range(len(rows))]
    texts = _texts(rows, text_column)
    known = _rows(rows, ids, label_column)
    return ImageSet(source, names, texts, known, lambda index: _read(rows, image_column, index))
