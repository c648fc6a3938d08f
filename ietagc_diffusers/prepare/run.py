"""From a source to a prepared set: every item looked at once, written to Parquet files, or left out and counted."""

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..data.decoder import BadImage, decode_bytes
from ..data.hashes import digest
from ..data.listing import printable
from ..data.work import THREADS
from ..errors import UsageError
from ..files import read_json
from . import items
from .formats import Options, open_source
from .items import Item, LeftOut, Reader
from .report import REPORT, write_report
from .shards import PARTS, Shards, features_of
from .state import State, check_settings

STATE = "state.sqlite"
AHEAD_ITEMS, AHEAD_BYTES = 8 * THREADS, 1 << 26  # read before they are decoded, whichever is reached first


@dataclass(frozen=True)
class Settings:
    """What becomes of the items.

    Attributes:
        test_share: of the images that make up the split ``test``, by their pixels.
        seed: of that draw.
        min_side: smaller images are left out, in pixels of the shorter side.
        main_caption: which of an image's captions is in the column ``text``, from 0; of fewer, the last.
        without_captions: keep images that have no caption.
        shard_size: of a file, in MB of images; a file is closed after the item that exceeds it.
    """

    test_share: float = 0.0
    seed: int = 0
    min_side: int = 1
    main_caption: int = 0
    without_captions: bool = False
    shard_size: float = 256.0


@dataclass(frozen=True)
class Looked:
    """An item that can be used, or not, and which split it belongs to."""

    found: Item | LeftOut
    split: str = "train"


def prepare(
    source: str | Path,
    output: str | Path,
    options: Options | None = None,
    settings: Settings | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Write a source of images and captions as a set that training loads as it is, and a report of what is left out.

    ``output`` has ``train/00000.parquet``, ... and, with ``test_share``, ``test/00000.parquet``, ...; a preparation
    that was interrupted continues after its last file, and the result is the same, byte for byte.

    Returns the report. Raises ``UsageError`` naming a setting; or where no image can be used.
    """
    options, settings = options or Options(), settings or Settings()
    output = Path(output)
    kind, reader = open_source(source, options)
    told = {"format": kind, **{k: v for k, v in asdict(options).items() if k not in ("format", "captions", "images")}}
    told |= asdict(settings) | {"mark": reader.mark}
    if (output / REPORT).is_file():
        complete = read_json(output / REPORT)
        check_settings(complete["settings"], told, output)
        shutil.rmtree(output / PARTS, ignore_errors=True)
        return complete
    _check_output(Path(source), output)
    with closing(State(output / PARTS / STATE, told, output)) as state:
        _write(reader, state, settings, output, progress)
        now = state.progress
        report = write_report(output, source, told, now) if now.rows else None
    shutil.rmtree(output / PARTS)
    if report is None:
        why, about = max(now.left_out.items(), key=lambda entry: entry[1]["count"], default=("it is empty", {}))
        example = f" (such as {printable(about['first'][0])[:200]})" if about else ""
        raise UsageError(f"`source` {source}: no image can be used, most often because: {why}{example}")
    return report


def _check_output(source: Path, output: Path) -> None:
    """Raise ``UsageError`` for a folder that holds something else, or lies in the source."""
    if output.is_dir() and any(output.iterdir()) and not (output / PARTS / STATE).is_file():
        raise UsageError(f"`output` {output}: is not empty; give another folder")
    if source.resolve() in (output.resolve(), *output.resolve().parents):
        raise UsageError(f"`output` {output}: lies in the source, and would become part of it; give another folder")


def _write(reader: Reader, state: State, settings: Settings, output: Path, progress: bool) -> None:
    """Write what is not written yet, a chunk at a time."""
    features, now = features_of(reader.columns), state.progress
    done = sum(now.rows.values()) + sum(about["count"] for about in now.left_out.values())
    bar = tqdm(total=reader.total, initial=done, desc="Preparing", unit=" images", disable=not progress)
    shards = Shards(output, features, now.chunk)
    with bar:
        for unit, place, looked in _looked_at(reader, now.unit, now.place, settings):
            now.unit, now.place = unit, place
            found = looked.found
            bar.update(found.count if isinstance(found, LeftOut) else 1)
            sample_id = None if isinstance(found, LeftOut) else state.id_of(found)
            if isinstance(found, LeftOut):
                now.leave_out(found)
            elif sample_id is None:
                now.leave_out(LeftOut(found.name, items.DUPLICATE))
            else:
                text = found.captions[min(settings.main_caption, len(found.captions) - 1)] if found.captions else None
                shards.add(looked.split, found, sample_id, text)
                now.take(looked.split, found)
            if shards.bytes >= settings.shard_size * 1e6:
                _commit(shards, state)
                shards = Shards(output, features, now.chunk)
        _commit(shards, state)


def _commit(shards: Shards, state: State) -> None:
    """Put a chunk's files in their places, then say so: a run that is killed in between writes the same files again."""
    now = state.progress
    for split in shards.close():
        now.shards[split] = now.shards.get(split, 0) + 1
    now.chunk += 1
    state.commit()


def _looked_at(reader: Reader, unit: int, place: int, settings: Settings) -> Iterator[tuple[int, int, Looked]]:
    """(unit, number in it, item) from a place on, in the order of the source; images are decoded in threads."""
    with ThreadPoolExecutor(THREADS) as pool:
        for some in _ahead(_from(reader, unit, place)):
            looked = pool.map(lambda one: _look(one[2], settings), some)
            for (of_unit, number, _), each in zip(some, looked, strict=True):
                yield of_unit, number, each


def _from(reader: Reader, unit: int, place: int) -> Iterator[tuple[int, int, Item | LeftOut]]:
    """Everything from the place on, each with the place after it."""
    for of_unit in range(unit, reader.units):
        for number, found in enumerate(reader.items(of_unit), 1):
            if of_unit > unit or number > place:
                yield of_unit, number, found


def _ahead(found: Iterator[tuple[int, int, Item | LeftOut]]) -> Iterator[list[tuple[int, int, Item | LeftOut]]]:
    """Lists of what is decoded at once, bounded in number and in bytes."""
    some: list[tuple[int, int, Item | LeftOut]] = []
    size = 0
    for one in found:
        some.append(one)
        size += len(one[2].image) if isinstance(one[2], Item) else 0
        if len(some) >= AHEAD_ITEMS or size >= AHEAD_BYTES:
            yield some
            some, size = [], 0
    if some:
        yield some


def _look(found: Item | LeftOut, settings: Settings) -> Looked:
    """Decode an item's image. Equal pixels belong to the same split, however and wherever they are stored."""
    if isinstance(found, LeftOut):
        return Looked(found)
    if not found.captions and not settings.without_captions:
        return Looked(LeftOut(found.name, items.NO_CAPTION))
    try:
        image = decode_bytes(found.image)
    except BadImage as error:
        return Looked(LeftOut(found.name, items.BROKEN, str(error)))
    if min(image.size) < settings.min_side:
        return Looked(LeftOut(found.name, items.SMALL, f"{image.width} x {image.height}"))
    if not settings.test_share:
        return Looked(found)
    pixels = digest(f"{image.size}".encode(), image.tobytes())
    drawn = int.from_bytes(digest(f"test {settings.seed}".encode(), pixels)) / 2**128  # uniform in [0, 1)
    return Looked(found, "test" if drawn < settings.test_share else "train")


def read_report(output: str | Path) -> dict[str, Any]:
    """The report of a prepared set. Raises ``UsageError`` if there is none."""
    return read_json(Path(output) / REPORT)
