"""Text and JSON files, written whole or not at all; where caches are; and what is said of a place of this machine."""

import json
import os
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from .errors import UsageError

_ABSOLUTE = re.compile(r"(?:file:|[A-Za-z]:[\\/]|\\\\|[/~]).*", re.DOTALL)


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/ietagc``, by default in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ietagc"


def shipped(name: str | Path, suffix: str) -> Path:
    """The file ``name`` itself or, if there is none and it is no path, the file of this name, with this suffix, among
    those that come with the package.
    """
    path = Path(name)
    inside = Path(str(files("ietagc_diffusers.configs") / f"{path.stem}{suffix}"))
    return inside if path.parent == Path() and not path.exists() and inside.is_file() else path


def check_output(path: str | Path, setting: str, file: bool = False) -> None:
    """Raise ``UsageError``, naming ``setting``, unless a folder (with ``file``: a file) can be written at ``path``."""
    path = Path(path)
    if file and path.is_dir():
        raise UsageError(f"`{setting}` {path}: is a folder; give a file, such as {path / 'report.html'}")
    folders = [path.parent, *path.parent.parents] if file else [path, *path.parents]
    existing = next(folder for folder in folders if folder.exists())
    if not existing.is_dir():
        raise UsageError(f"`{setting}` {path}: {existing} is a file; give a {'file in a ' if file else ''}folder")


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 file by way of ``<path>.part``, so that an interruption leaves the old file or the new one."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def write_json(path: str | Path, value: Any) -> None:
    """Write indented JSON as ``write_text`` does. Raises ``ValueError`` for numbers that are not finite."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json_lines(path: str | Path) -> list[Any]:
    """The values of a JSON-lines file that is written line by line; [] if there is none.

    A last line that was cut off by an interruption is removed from the file.
    """
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    complete, cut = lines[:-1], lines[-1]
    if cut:
        write_text(path, "".join(line + "\n" for line in complete))
    return [json.loads(line) for line in complete]


def read_json(path: str | Path) -> Any:
    """The value of a JSON file. Raises ``UsageError`` if the file is missing or broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from error


def place_name(place: str) -> str:
    """A path of this machine as its last part; anything else, such as a Hub id, as it is."""
    try:
        return Path(place).resolve().name if place and Path(place).exists() else place
    except OSError:  # too long for a path
        return place


def without_places(value: Any) -> Any:
    """A JSON value in which each path of this or another machine is its last part: what is there, what is absolute, and
    whatever is the value of a setting of a folder (``*_dir``).
    """
    if isinstance(value, dict):
        return {
            key: _last_part(each) if isinstance(each, str) and str(key).endswith("_dir") else without_places(each)
            for key, each in value.items()
        }
    if isinstance(value, list):
        return [without_places(each) for each in value]
    if not isinstance(value, str):
        return value
    return _last_part(value) if _ABSOLUTE.fullmatch(value) else place_name(value)


def _last_part(path: str) -> str:
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1] or path
