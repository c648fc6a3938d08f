"""Parquet files of images: as bytes, as the Hub stores them, or as paths of files that were fetched."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Features, Value

from ..data.columns import image_maker
from ..data.hashes import digest
from ..data.metadata import near_column
from ..errors import UsageError, one_line
from . import items
from .folders import caption_column, read_picture
from .items import Item, LeftOut, captions_of

ROWS = 32  # read at once
IMAGES = ("image", "images", "img", "jpg", "jpeg", "png", "webp", "picture", "photo", "bytes", "image_bytes")
PATHS = ("image_path", "file_name", "filename", "local_path", "path", "file", "filepath")
ADDRESSES = {"url", "urls", "imageurl", "imgurl", "link"}
NAMES = ("key", "__key__")  # columns that name an item
ADDRESS = "only an address"
FETCH = "nothing is downloaded here: fetch the images with img2dataset, and give what it wrote"


class ParquetReader:
    """Parquet files, by groups of their rows.

    Args:
        files: their paths, in order.
        where: the setting and the source, for messages.
        images: the folder that paths of images lie in; none outside is read.
        image_column, caption_column: None finds them.

    Raises:
        UsageError: there is no column of images, or only one of addresses on the web.
    """

    def __init__(
        self,
        files: Sequence[Path],
        where: str,
        images: str | Path | None = None,
        image_column: str | None = None,
        caption_column: str | None = None,
    ):
        self.files, self.where, self.caption_column = list(files), where, caption_column
        self.folder = Path(images or self.files[0].parent).resolve()
        self.places: list[tuple[int, int | None]] = []  # of each unit the file, and the group in it
        self.total: int | None = 0
        self.columns: dict[str, Any] = {}
        schema, about = None, list[list[Any]]()
        for number, path in enumerate(self.files):
            try:
                with pq.ParquetFile(path) as file:
                    groups, rows = file.metadata.num_row_groups, file.metadata.num_rows
                    schema = file.schema_arrow if schema is None else schema
            except (OSError, pa.ArrowException) as error:
                self.places.append((number, None))
                about.append([path.name, one_line(error)])
                continue
            self.places += [(number, group) for group in range(groups)]
            self.total = (self.total or 0) + rows
            about.append([path.name, path.stat().st_size, rows])
        if schema is None:
            raise UsageError(f"{where}: {about[0][0]} does not parse: {about[0][1]}")
        if caption_column is not None and caption_column not in schema.names:
            raise UsageError(
                f"`caption_column` {caption_column}: not a column of {where}, which has {', '.join(schema.names)}"
            )
        self.image_column = self._image_column(schema, image_column)
        self._check_not_addresses()
        self.columns = _labels(schema)
        self.units = len(self.places)
        self.mark = digest(json.dumps([about, self.image_column, caption_column]).encode()).hex()

    def _image_column(self, schema: pa.Schema, given: str | None) -> str:
        if given is not None and given not in schema.names:
            raise UsageError(
                f"`image_column` {given}: not a column of {self.where}, which has {', '.join(schema.names)}"
            )
        known = {name.lower(): name for name in reversed(schema.names)}
        names = [given] if given else [known[name] for name in (*IMAGES, *PATHS) if name in known]
        found = next((name for name in names if image_maker(schema.field(name).type) is not None), None)
        if found is not None:
            return found
        if near_column(schema.names, ADDRESSES) is not None:
            raise UsageError(f"{self.where}: has only the addresses of images; {FETCH}")
        raise UsageError(
            f"{self.where}: no column of images is known among {', '.join(schema.names)}; name it as `image_column`"
        )

    def _check_not_addresses(self) -> None:
        """Raise ``UsageError`` if the first image is an address."""
        first = next((place for place in range(len(self.places)) if self.places[place][1] is not None), None)
        found = None if first is None else next(self.items(first), None)
        if isinstance(found, LeftOut) and found.detail == ADDRESS:
            raise UsageError(f"{self.where}: `image_column` {self.image_column} has addresses of images; {FETCH}")

    def items(self, unit: int) -> Iterator[Item | LeftOut]:
        number, group = self.places[unit]
        path = self.files[number]
        try:
            if group is None:
                pq.ParquetFile(path).close()  # says once more why it cannot be read
                raise pa.ArrowInvalid("it was damaged before")
            # Without a buffer a whole column of a group would be read at once.
            with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
                yield from self._of_group(number, file, group)
        except Exception as error:  # of damaged files Arrow raises exceptions of many kinds
            yield LeftOut(path.name, items.DAMAGED, one_line(error))

    def _of_group(self, number: int, file: pq.ParquetFile, group: int) -> Iterator[Item | LeftOut]:
        names = file.schema_arrow.names
        texts = self.caption_column or caption_column(name for name in names if name != self.image_column)
        name = next((name for name in NAMES if name in names), None)
        wanted = {self.image_column, texts, name, *self.columns} & {*names}
        if self.image_column not in wanted:
            raise pa.ArrowInvalid(f"it has no column {self.image_column}")
        make = image_maker(file.schema_arrow.field(self.image_column).type)
        if make is None:
            raise pa.ArrowInvalid(f"its column {self.image_column} holds no images")
        told = [column for column in names if column in wanted - {self.image_column}]
        row = 0
        for batch in file.iter_batches(batch_size=ROWS, row_groups=[group], columns=[self.image_column, *told]):
            images = make(batch.column(self.image_column))
            for place in range(len(batch)):
                where = f"{self.files[number].name}: row {row} of group {group}"
                row += 1
                try:
                    stored = images[place].as_py()
                    about = {column: batch.column(column)[place].as_py() for column in told}
                except ValueError as error:  # strings that are no text
                    yield LeftOut(where, items.BAD_TEXT, one_line(error))
                    continue
                more = {column: _integer(about.get(column)) for column in self.columns}
                yield self._item(stored, about.get(name), captions_of(about.get(texts)), more, where)

    def _item(
        self, stored: dict[str, Any] | None, name: Any, captions: tuple[str, ...], more: dict[str, Any], where: str
    ) -> Item | LeftOut:
        path = None if stored is None else stored["path"]
        if stored is not None and stored["bytes"] is not None:
            if len(stored["bytes"]) > items.MAX_BYTES:
                return LeftOut(where, items.LARGE)
            return Item(str(name or os.path.basename(path or "")), stored["bytes"], captions, more)
        if path is None:
            return LeftOut(where, items.NO_IMAGE)
        if "://" in path:
            return LeftOut(where, items.NO_IMAGE, ADDRESS)
        try:
            whole = (self.folder / path).resolve()
            own = whole.relative_to(self.folder).as_posix()
        except (OSError, ValueError):
            return LeftOut(f"{where}: {path[:200]}", items.BAD_NAME)
        image = read_picture(str(whole), own)
        return image if isinstance(image, LeftOut) else Item(str(name or own), image, captions, more)


def _integer(value: Any) -> int | None:
    return value if isinstance(value, int) and -(2**63) <= value < 2**63 else None


def _labels(schema: pa.Schema) -> dict[str, Any]:
    """The column of classes, if there is one of integers."""
    if "label" not in schema.names or not pa.types.is_integer(schema.field("label").type):
        return {}
    try:
        feature = Features.from_arrow_schema(schema)["label"]
    except Exception:  # of whatever the file says of its columns
        feature = None
    return {"label": feature if isinstance(feature, ClassLabel) else Value("int64")}
