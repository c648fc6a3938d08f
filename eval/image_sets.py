"""Sets of images: a folder with or without metadata, or a dataset. Read one at a time; what is bad is counted and
named.
"""

import csv
import hashlib
import io
import json
import os
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image, ImageOps

from ietagc_diffusers.errors import UsageError

# What PIL opens and calls an image: it also opens videos, PostScript, and scientific data of which it reads the head.
SUFFIXES = {
    suffix
    for suffix, kind in Image.registered_extensions().items()
    if kind in Image.OPEN and Image.MIME.get(kind, "").startswith("image/")
}
UNREAD_SUFFIXES = {".heic", ".heif", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw"}
MAX_ASPECT = 32  # a strip, resized by its small edge, would fill the memory
MIN_EDGE = 2
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
# Reasons of what was left out and is no image that was lost.
NO_IMAGE, OTHER_METADATA = "is not an image", "is not read: another metadata file is beside it"


class BadImage(ValueError):
    """An image that cannot be used, and why."""


def to_rgb(image):
    """A PIL image as RGB: turned as its EXIF says, 16-bit scaled to 8, transparent parts on white.

    Raises ``BadImage`` or what PIL raises if it does not decode.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # 16-bit grey, which PIL's own conversion clips instead of scaling
        values = np.asarray(image, dtype=np.float64)
        if image.mode.startswith("F") and values.max() > 1:
            raise BadImage("floating-point pixels over 1")
        scale = 255 if image.mode.startswith("F") else 255 / 65535
        return Image.fromarray((values * scale).round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(canvas, image).convert("RGB")
    return image.convert("RGB")


def unusable(skipped):
    """Those of ``skipped`` that should have been images: all but notes and the like."""
    return [[name, why] for name, why in skipped if why not in (NO_IMAGE, OTHER_METADATA)]


def to_tensor(image):
    """An RGB image as uint8 (3, H, W)."""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


class ImageSet:
    """Images with the rows of their metadata.

    Attributes:
        source: the folder or dataset, for messages and records.
        names: a name for each image: its path in the folder, or ``row 17``.
        texts: its caption (the first of several), or None.
        rows: what else its metadata says: dicts; ``sample_id`` is its row in the dataset, as in training.
        skipped: [name, reason] of what could not be used.
        columns: the options of ``load_images`` that load it again.
    """

    def __init__(self, source, names, texts, rows, read_bytes, skipped=(), columns=None):
        self.source = str(source)
        self.names, self.texts, self.rows = list(names), list(texts), list(rows)
        self.read_bytes = read_bytes
        self.skipped = list(skipped)
        self.columns = columns or {}

    def __len__(self):
        return len(self.names)

    def encoded(self, index):
        """The image's file as bytes. Raises ``BadImage``."""
        try:
            return self.read_bytes(index)
        except (OSError, ValueError, TypeError) as error:
            raise BadImage(f"cannot be read: {_one_line(error)}") from error

    def image(self, index, encoded=None):
        """The image as PIL RGB. Raises ``BadImage``."""
        encoded = self.encoded(index) if encoded is None else encoded
        try:
            image = Image.open(io.BytesIO(encoded))
            if min(image.size) < MIN_EDGE:
                raise BadImage(f"is {image.width} x {image.height}: too small to compare")
            if max(image.size) > MAX_ASPECT * min(image.size):
                raise BadImage(f"is {image.width} x {image.height}: its sides differ by more than {MAX_ASPECT} times")
            return to_rgb(image)
        except BadImage:
            raise
        except Exception as error:  # whatever PIL and its plugins raise on broken files
            raise BadImage(f"does not decode: {_one_line(error)}") from error

    def select(self, indices):
        indices = list(indices)
        return ImageSet(
            self.source,
            [self.names[i] for i in indices],
            [self.texts[i] for i in indices],
            [self.rows[i] for i in indices],
            lambda index: self.read_bytes(indices[index]),
            self.skipped,
            self.columns,
        )

    def files(self):
        """Each image file once, with the first of the rows that name it."""
        first = {}
        for index, name in enumerate(self.names):
            first.setdefault(name, index)
        return self.select(first.values())

    def captions(self):
        """(index, caption) of every row that has one."""
        return [(index, text) for index, text in enumerate(self.texts) if text]


def content_hash(encoded):
    """The key under which what was computed of an image is kept: a hash of its file's bytes."""
    return hashlib.blake2b(encoded, digest_size=16).digest()


def _one_line(error):
    return " ".join(str(error).split())[:200] or type(error).__name__


def _text(value):
    """A string that can be written: JSON can hold halves of characters."""
    return value.encode("utf-8", "replace").decode()


def _caption(value):
    if isinstance(value, (list, tuple)) and value:
        value = value[0]
    return _text(value) if isinstance(value, str) else None


def load_images(source, flag, image_column="image", caption_column="text"):
    """A set of images from a folder of image files (with ``metadata.jsonl`` or not), or whatever ``datasets`` loads: a
    folder of Parquet files, one that ``save_to_disk`` wrote, a Hub id.

    Args:
        flag: for messages: the flag that named the source.

    Raises:
        UsageError: there is no such source or no image in it.
    """
    folder = Path(source)
    if folder.is_file():
        raise UsageError(f"{flag} {source}: is a file; give the folder it is in")
    images = None
    if folder.is_dir():
        files = sorted(path for path in folder.rglob("*") if path.is_file() and not _hidden(path, folder))
        if any(path.suffix.lower() in SUFFIXES for path in files):
            images = _from_folder(folder, flag, files, caption_column)
        elif not any(path.suffix == ".parquet" or path.name == "state.json" for path in files):
            raise UsageError(f"{flag} {source}: no images in this folder (.png, .jpg, .webp or what else PIL opens)")
    if images is None:
        images = _from_dataset(source, flag, image_column, caption_column)
    images.columns = {"image_column": image_column, "caption_column": caption_column}
    return images


def _hidden(path, folder):
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _from_folder(folder, flag, files, caption_column):
    """Rows of the metadata first, in their order as ``datasets`` numbers them, then images without a row."""
    entries, skipped = [], []
    metadata = {}
    for path in sorted((path for path in files if path.name in METADATA), key=lambda path: METADATA.index(path.name)):
        metadata.setdefault(path.parent, path)
    for path in sorted(metadata.values()):
        for number, row in enumerate(_metadata_rows(path, flag)):
            where, name = f"{path.relative_to(folder)} row {number + 1}", row.pop("file_name", None)
            if not isinstance(name, str):
                skipped.append([where, "has no file_name"])
                continue
            inside = os.path.normpath(path.parent.relative_to(folder) / name)
            if os.path.isabs(inside) or inside.split(os.sep)[0] == "..":
                skipped.append([where, f"its file {name[:200]} lies outside the folder"])
            elif not os.path.isfile(folder / inside):
                skipped.append([where, f"its file {name[:200]} does not exist"])
            else:
                # With several metadata files the number says nothing.
                sample_id = {"sample_id": number} if path.parent == folder else {}
                entries.append((folder / inside, sample_id | row))
    described = {path.resolve() for path, _ in entries}
    numbered = not described
    for path in files:
        suffix = path.suffix.lower()
        if path.name in METADATA:
            if path != metadata[path.parent]:
                skipped.append([_printable(path, folder), OTHER_METADATA])
        elif path.resolve() in described:
            continue
        elif suffix in SUFFIXES:
            entries.append((path, {"sample_id": len(entries)} if numbered else {}))
        else:
            why = f"{suffix} is not read: convert it" if suffix in UNREAD_SUFFIXES else NO_IMAGE
            skipped.append([_printable(path, folder), why])
    readable = [(path, row) for path, row in entries if _is_text(path)]
    skipped += [[_printable(path, folder), "has a name that is no text"] for path, _ in entries if not _is_text(path)]
    return ImageSet(
        folder,
        [str(path.relative_to(folder)) for path, _ in readable],
        [_caption(row.get(caption_column)) for _, row in readable],
        [row for _, row in readable],
        lambda index: readable[index][0].read_bytes(),
        skipped,
    )


def _is_text(path):
    """Whether a name can be written: one in another encoding than the file system's cannot."""
    return str(path) == _text(str(path))


def _printable(path, folder):
    return ascii(str(path.relative_to(folder)))[1:-1]


def _metadata_rows(path, flag):
    """The rows of a metadata file as dicts."""
    try:
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
        elif path.suffix == ".csv":
            with path.open(newline="", encoding="utf-8-sig") as file:
                rows = list(csv.DictReader(file))
        else:
            rows = datasets.Dataset.from_parquet(str(path)).to_list()
    except Exception as error:
        raise UsageError(f"{flag}: {path} does not parse: {_one_line(error)}") from error
    if not all(isinstance(row, dict) for row in rows):
        raise UsageError(f"{flag}: {path}: every line should be a JSON object with file_name and text")
    return [{key: _text(value) if isinstance(value, str) else value for key, value in row.items()} for row in rows]


def _from_dataset(source, flag, image_column, caption_column):
    folder = Path(source)
    try:
        if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
            rows = datasets.load_from_disk(str(folder))
        elif folder.is_dir():
            rows = datasets.load_dataset("parquet", data_files=str(folder / "**/*.parquet"), split="train")
        else:
            rows = datasets.load_dataset(str(source), split="train")
    except Exception as error:
        raise UsageError(f"{flag} {source}: neither a folder nor a dataset that loads: {_one_line(error)}") from error
    if isinstance(rows, dict):
        splits = rows
        if "train" not in splits and len(splits) > 1:
            raise UsageError(f"{flag} {source}: has no split train; give the folder of one of {', '.join(splits)}")
        rows = splits["train"] if "train" in splits else next(iter(splits.values()))
    if image_column not in rows.column_names:
        raise UsageError(f"{flag} {source}: has no column '{image_column}', only {', '.join(rows.column_names)}")
    stored = rows.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
    texts = rows[caption_column] if caption_column in rows.column_names else [None] * len(rows)

    def read_bytes(index):
        value = stored[index][image_column]
        return value["bytes"] if value["bytes"] is not None else Path(value["path"]).read_bytes()

    ids = rows["sample_id"] if "sample_id" in rows.column_names else range(len(rows))
    names = [f"row {number}" for number in range(len(rows))]
    return ImageSet(source, names, map(_caption, texts), [{"sample_id": i} for i in ids], read_bytes)
