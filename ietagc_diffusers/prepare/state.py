"""How far a preparation has come, in an SQLite file: which items are written, and where the next one is."""

import json
import sqlite3
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..data.hashes import digest
from ..errors import UsageError
from .items import Item, LeftOut

NAMED = 10  # names that a report gives of each reason


@dataclass
class Progress:
    """What is written so far, and what is not.

    Attributes:
        unit, place: of the next item in the source: its unit, and how many of the unit come before it.
        chunk: number of the next files.
        shards: files written of each split.
        rows, bytes: number of rows, and size of their images, by split.
        captions: number of captions.
        left_out: {reason: {"count", "first": names}}.
    """

    unit: int = 0
    place: int = 0
    chunk: int = 0
    shards: dict[str, int] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    captions: int = 0
    left_out: dict[str, dict[str, Any]] = field(default_factory=dict)

    def leave_out(self, one: LeftOut) -> None:
        about = self.left_out.setdefault(one.why, {"count": 0, "first": []})
        about["count"] += one.count
        if len(about["first"]) < NAMED:
            about["first"].append(f"{one.name}: {one.detail}" if one.detail else one.name)

    def take(self, split: str, item: Item) -> None:
        self.rows[split] = self.rows.get(split, 0) + 1
        self.bytes[split] = self.bytes.get(split, 0) + len(item.image)
        self.captions += len(item.captions)


class State:
    """The progress of one preparation, and the ids that it has given. Memory does not grow with their number.

    Args:
        path: the file, which is created if there is none.
        settings: JSON values; a file that was begun with others is refused.
        output: the folder, for messages.

    Raises:
        UsageError: it was begun with other settings, or another process is writing it.
    """

    def __init__(self, path: Path, settings: dict[str, Any], output: str | Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.connection = sqlite3.connect(path)
        try:
            self._begin(settings, output)
        except UsageError:
            self.close()
            raise
        except sqlite3.Error as error:
            self.close()
            raise UsageError(
                f"`output` {output}: how far it has come cannot be read ({error}); another run may be writing there, "
                "otherwise give another folder"
            ) from error

    def _begin(self, settings: dict[str, Any], output: str | Path) -> None:
        self.connection.execute("PRAGMA busy_timeout = 0")
        self.connection.execute("PRAGMA locking_mode = EXCLUSIVE")  # for as long as the connection is open
        self.connection.execute("PRAGMA synchronous = FULL")
        self.connection.execute("CREATE TABLE IF NOT EXISTS seen (id INTEGER PRIMARY KEY, times INTEGER)")
        self.connection.execute("CREATE TABLE IF NOT EXISTS state (name TEXT PRIMARY KEY, value TEXT)")
        known = dict(self.connection.execute("SELECT name, value FROM state"))
        if "settings" in known:
            check_settings(json.loads(known["settings"]), settings, output)
        self.progress = Progress(**json.loads(known["progress"])) if "progress" in known else Progress()
        with self.connection:
            self._put("settings", settings)

    def _put(self, name: str, value: Any) -> None:
        self.connection.execute("INSERT OR REPLACE INTO state VALUES (?, ?)", (name, json.dumps(value)))

    def id_of(self, item: Item) -> int | None:
        """The ``sample_id`` of an item, of 63 bits; None if it came before.

        It is made of the item's name, its image and its captions, so that it is the same on every run, and in whatever
        order and files the source has its items. Equal items without a name are numbered.
        """
        parts = [item.name.encode("utf-8", "replace"), item.image, json.dumps(item.captions).encode()]
        own = _number(*parts)
        row = self.connection.execute("SELECT times FROM seen WHERE id = ?", (own,)).fetchone()
        times = 0 if row is None else row[0]
        if times and item.name:
            return None
        self.connection.execute("INSERT OR REPLACE INTO seen VALUES (?, ?)", (own, times + 1))
        return _number(*parts, str(times).encode()) if times else own

    def commit(self) -> None:
        """Keep the progress, from which a killed run continues."""
        self._put("progress", asdict(self.progress))
        self.connection.commit()

    def close(self) -> None:
        self.connection.close()


def check_settings(before: dict[str, Any], now: dict[str, Any], output: str | Path) -> None:
    """Raise ``UsageError`` naming the first setting in which a folder's preparation differs."""
    for name in now:
        if before.get(name) != now[name]:
            what = (
                "the source is another one or has changed"
                if name == "mark"
                else (f"`{name}` was {before.get(name)}, and is {now[name]} now")
            )
            raise UsageError(f"`output` {output}: was prepared otherwise: {what}; give another folder")


def _number(*parts: bytes) -> int:
    sized = [part for one in parts for part in (len(one).to_bytes(8), one)]
    return int.from_bytes(digest(*sized)[:8]) >> 1
