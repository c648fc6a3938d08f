"""What a reader finds: images with their captions, and what is left out and why."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..data.text_files import writable

MAX_BYTES = 1 << 27  # of an image's file: as much is held in memory at once, and no picture is larger
MAX_TEXT_BYTES = 1 << 22  # of a text or JSON beside an image
MAX_NAME = 1000  # characters

# Why something is left out.
BROKEN = "the image does not decode, or cannot be read"
SMALL = "the image is too small"
LARGE = "the file is too large"
NO_CAPTION = "there is no caption"
NO_ROW = "the image has no row in the metadata"
NO_IMAGE = "there is no image"
DUPLICATE = "the same image with the same name and captions came before"
UNSUPPORTED = "the type of file is not read"
PICKLE = "a pickle, which could run code, is never read"
NO_FILE = "not a file: a link, a device or the like"
BAD_NAME = "the name is too long, or leads out of the folder"
BAD_TEXT = "the text or JSON beside the image cannot be read"
DAMAGED = "the rest of the file is damaged or missing"
OTHER_SPLIT = "it belongs to another split"


@dataclass(frozen=True)
class Item:
    """An image of a source.

    Attributes:
        name: of the item in the source, whichever shard holds it; "" if it has none.
        image: its file's bytes, as they are stored.
        captions: none of them blank.
        more: values of the reader's own columns.
    """

    name: str
    image: bytes
    captions: tuple[str, ...] = ()
    more: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LeftOut:
    """What is not used. ``why`` is one of the reasons above, ``detail`` whatever else there is to say."""

    name: str
    why: str
    detail: str = ""
    count: int = 1


class Reader(Protocol):
    """Reads one kind of source, in units that it can start at: parts of a folder, tar files, parts of Parquet files.

    Attributes:
        columns: features of the columns that the kind has besides those that all have.
        units: number of units.
        total: number of items, if that is known beforehand.
        mark: stands for the source: with another mark it is another one, or has changed.
    """

    columns: dict[str, Any]
    units: int
    total: int | None
    mark: str

    def items(self, unit: int) -> Iterator[Item | LeftOut]:
        """All that a unit holds, always in the same order. Memory is bounded by the largest item, not by the unit."""


def captions_of(value: Any) -> tuple[str, ...]:
    """The captions that a value holds, a text or a list of texts; blank ones are none."""
    texts: Sequence[Any] = value if isinstance(value, (list, tuple)) else [value]
    return tuple(writable(text) for text in texts if isinstance(text, str) and text.strip())
