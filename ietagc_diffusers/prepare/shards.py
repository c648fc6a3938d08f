"""The Parquet files that are written: images as they are stored, in groups of rows that fit into memory."""

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, Value
from datasets import Image as ImageFeature

from .items import Item

GROUP_BYTES = 1 << 24  # of images in a group of rows, which is held in memory
GROUP_ROWS = 1000
PARTS = ".prepare"  # hidden: no reader of folders looks into it


def features_of(columns: dict[str, Any]) -> Features:
    """The columns of a prepared set; ``columns``: those of its reader."""
    own = {"image": ImageFeature(), "text": Value("string"), "captions": [Value("string")]}
    return Features(own | columns | {"key": Value("string"), "sample_id": Value("int64")})


class Shards:
    """The files of one chunk, one of each split.

    Args:
        folder: of the prepared set.
        features: see ``features_of``.
        number: of the chunk, which is the files' name.
    """

    def __init__(self, folder: Path, features: Features, number: int):
        self.folder, self.features, self.number = folder, features, number
        self.schema = features.arrow_schema
        self.waiting: dict[str, list[dict[str, Any]]] = {}
        self.waiting_bytes: dict[str, int] = {}
        self.writers: dict[str, pq.ParquetWriter] = {}
        self.bytes = 0

    def add(self, split: str, item: Item, sample_id: int, text: str | None) -> None:
        """Add an item to a split's file. ``text``: the caption in the column ``text``."""
        image = {"bytes": item.image, "path": os.path.basename(item.name) or None}
        captions = list(item.captions)
        row = {"image": image, "text": text, "captions": captions, "key": item.name, "sample_id": sample_id}
        self.waiting.setdefault(split, []).append(row | item.more)
        size = len(item.image) + sum(map(len, captions))
        self.bytes += size
        self.waiting_bytes[split] = self.waiting_bytes.get(split, 0) + size
        if self.waiting_bytes[split] >= GROUP_BYTES or len(self.waiting[split]) >= GROUP_ROWS:
            self._flush(split)

    def _part(self, split: str) -> Path:
        return self.folder / PARTS / f"{split}.parquet.part"

    def _flush(self, split: str) -> None:
        rows = self.waiting.pop(split, [])
        self.waiting_bytes.pop(split, None)
        if not rows:
            return
        if split not in self.writers:
            # Images are compressed already.
            zipped = {name: "NONE" if name.startswith("image") else "ZSTD" for name in self._leaves()}
            self.writers[split] = pq.ParquetWriter(
                self._part(split), self.schema, compression=zipped, use_dictionary=False, write_statistics=["sample_id"]
            )
        columns = [
            pa.array([row.get(name) for row in rows], self.schema.field(name).type) for name in self.schema.names
        ]
        self.writers[split].write_table(pa.Table.from_arrays(columns, schema=self.schema))

    def _leaves(self) -> list[str]:
        nested = {"image": ["image.bytes", "image.path"], "captions": ["captions.list.element"]}
        return [leaf for name in self.schema.names for leaf in nested.get(name, [name])]

    def close(self) -> list[str]:
        """Write what waits, and put the files in their places. Returns the splits that have one."""
        for split in [*self.waiting]:
            self._flush(split)
        for split, writer in self.writers.items():
            writer.close()
            with open(self._part(split), "rb+") as file:
                os.fsync(file.fileno())
            target = self.folder / split / f"{self.number:05d}.parquet"
            target.parent.mkdir(exist_ok=True)
            os.replace(self._part(split), target)
        return [*self.writers]
