"""Sets of images: a folder with or without metadata, or a dataset.

Images are read one at a time. Those that cannot be used are counted and named.
"""

import csv
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image, ImageOps

from ietagc_diffusers.errors import UsageError

# Formats that Pillow opens and calls images: it also opens videos, PostScript, and the headers of scientific data.
SUFFIXES = {
    suffix
    for suffix, kind in Image.registered_extensions().items()
    if kind in Image.OPEN and Image.MIME.get(kind, "").startswith("image/")
}
UNREAD_SUFFIXES = {".heic", ".heif", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw"}
MAX_ASPECT = 32  # a strip, resized by its small edge, would fill the memory
MIN_EDGE = 2
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
# Reasons for leaving out a file that are not the loss of an image.
NO_IMAGE, OTHER_METADATA = "is not an image", "is not read: another metadata file is beside it"


class BadImage(ValueError):
    """An image that cannot be used, and why."""


def to_rgb(image: Image.Image) -> Image.Image:
    """A PIL image as RGB: turned as its EXIF says, 16 bits scaled to 8, transparent parts on white.

    Raises ``BadImage``, or what Pillow raises for an image that does not decode.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # 16-bit grey, which Pillow's own conversion clips
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


def unusable(skipped: Iterable[Sequence[str]]) -> list[list[str]]:
    """Those of an ``ImageSet``'s ``skipped`` that should have been images: all but notes and the like."""
    return [[name, why] for name, why in skipped if why not in (NO_IMAGE, OTHER_METADATA)]


def to_tensor(image: Image.Image) -> torch.Tensor:
    """An RGB image as uint8 (3, H, W)."""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


class ImageSet:
    """Images with the rows of their metadata.

    Attributes:
        source: the folder or dataset, for messages and records.
        names: a name for each image: its path in the folder, or ``row 17``.
        texts: the caption of each image (the first of several), or None.
        rows: the rest of each image's metadata: dicts; ``sample_id`` is its row in the dataset, as in training.
        skipped: [name, reason] of each file or row that could not be used.
        columns: the options of ``load_images`` that load the set again.
    """

    def __init__(
        self,
        source: str | Path,
        names: Iterable[str],
        texts: Iterable[str | None],
        rows: Iterable[dict[str, Any]],
        read_bytes: Callable[[int], bytes],
        skipped: Iterable[list[str]] = (),
        columns: dict[str, str] | None = None,
    ):
        self.source = str(source)
        self.names, self.texts, self.rows = list(names), list(texts), list(rows)
        self.read_bytes = read_bytes
        self.skipped = list(skipped)
        self.columns = columns or {}

    def __len__(self) -> int:
        return len(self.names)

    def encoded(self, index: int) -> bytes:
        """The image's file as bytes. Raises ``BadImage``."""
        try:
            return self.read_bytes(index)
        except (OSError, ValueError, TypeError) as error:
            raise BadImage(f"cannot be read: {_one_line(error)}") from error

    def image(self, index: int, encoded: bytes | None = None) -> Image.Image:
        """The image as PIL RGB; ``encoded``: its file's bytes, if they were read before. Raises ``BadImage``."""
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
        except Exception as error:  # Pillow and its plugins raise exceptions of any kind on broken files
            raise BadImage(f"does not decode: {_one_line(error)}") from error

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
        )

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


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _text(value: str) -> str:
    """A string that can be written as UTF-8: JSON can hold halves of characters."""
    return value.encode("utf-8", "replace").decode()


def _caption(value: Any) -> str | None:
    if isinstance(value, (list, tuple)) and value:
        value = value[0]
    return _text(value) if isinstance(value, str) else None


def load_images(source: str | Path, setting: str, image_column: str = "image", text_column: str = "text") -> ImageSet:
    """A set of images from a folder of image files (with ``metadata.jsonl`` or not), or from anything that
    ``datasets`` loads: a folder of Parquet files, a folder that ``save_to_disk`` wrote, a Hub id.

    Args:
        setting: the setting that names the source, for messages.
        image_column: a dataset's column of images.
        text_column: column of captions, in a dataset or in metadata.

    Raises:
        UsageError: there is no such source or no image in it.
    """
    folder = Path(source)
    if folder.is_file():
        raise UsageError(f"`{setting}` {source}: is a file; give the folder it is in")
    images = None
    if folder.is_dir():
        files = sorted(path for path in folder.rglob("*") if path.is_file() and not _hidden(path, folder))
        if any(path.suffix.lower() in SUFFIXES for path in files):
            images = _from_folder(folder, setting, files, text_column)
        elif not any(path.suffix == ".parquet" or path.name == "state.json" for path in files):
            raise UsageError(f"`{setting}` {source}: no images in this folder (.png, .jpg, .webp or others)")
    if images is None:
        images = _from_dataset(source, setting, image_column, text_column)
    images.columns = {"image_column": image_column, "text_column": text_column}
    return images


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _from_folder(folder: Path, setting: str, files: list[Path], text_column: str) -> ImageSet:
    """Rows of the metadata first, in their order as ``datasets`` numbers them, then images without a row."""
    entries: list[tuple[Path, dict[str, Any]]] = []
    skipped: list[list[str]] = []
    metadata: dict[Path, Path] = {}
    for path in sorted((path for path in files if path.name in METADATA), key=lambda path: METADATA.index(path.name)):
        metadata.setdefault(path.parent, path)
    for path in sorted(metadata.values()):
        for number, row in enumerate(_metadata_rows(path, setting)):
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
                # Numbers of several metadata files are not the dataset's.
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
    skipped += [[_printable(path, folder), "has a name that is not text"] for path, _ in entries if not _is_text(path)]
    return ImageSet(
        folder,
        [str(path.relative_to(folder)) for path, _ in readable],
        [_caption(row.get(text_column)) for _, row in readable],
        [row for _, row in readable],
        lambda index: readable[index][0].read_bytes(),
        skipped,
    )


def _is_text(path: Path) -> bool:
    """Whether a name can be written as text: one in another encoding than the file system's cannot."""
    return str(path) == _text(str(path))


def _printable(path: Path, folder: Path) -> str:
    return ascii(str(path.relative_to(folder)))[1:-1]


def _metadata_rows(path: Path, setting: str) -> list[dict[str, Any]]:
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
        raise UsageError(f"`{setting}`: {path} does not parse: {_one_line(error)}") from error
    if not all(isinstance(row, dict) for row in rows):
        raise UsageError(f"`{setting}`: {path}: every line should be a JSON object with file_name and text")
    return [{key: _text(value) if isinstance(value, str) else value for key, value in row.items()} for row in rows]


def _from_dataset(source: str | Path, setting: str, image_column: str, text_column: str) -> ImageSet:
    folder = Path(source)
    try:
        if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
            rows = datasets.load_from_disk(str(folder))
        elif folder.is_dir():
            rows = datasets.load_dataset("parquet", data_files=str(folder / "**/*.parquet"), split="train")
        else:
            rows = datasets.load_dataset(str(source), split="train")
    except Exception as error:
        raise UsageError(f"`{setting}` {source}: neither a folder nor a dataset: {_one_line(error)}") from error
    if isinstance(rows, dict):
        splits = rows
        if "train" not in splits and len(splits) > 1:
            raise UsageError(f"`{setting}` {source}: has no split train; give the folder of one of {', '.join(splits)}")
        rows = splits["train"] if "train" in splits else next(iter(splits.values()))
    if image_column not in rows.column_names:
        raise UsageError(f"`{setting}` {source}: has no column '{image_column}', only {', '.join(rows.column_names)}")
    stored = rows.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
    texts = rows[text_column] if text_column in rows.column_names else [None] * len(rows)

    def read_bytes(index: int) -> bytes:
        value = stored[index][image_column]
        return value["bytes"] if value["bytes"] is not None else Path(value["path"]).read_bytes()

    ids = rows["sample_id"] if "sample_id" in rows.column_names else range(len(rows))
    names = [f"row {number}" for number in range(len(rows))]
    return ImageSet(source, names, map(_caption, texts), [{"sample_id": i} for i in ids], read_bytes)
