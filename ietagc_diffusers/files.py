"""JSON files, written whole or not at all, and where they may go."""

import json
from pathlib import Path

from .errors import UsageError


def check_output(path, flag, file=False):
    """Raise ``UsageError`` unless a folder, or a file, can be written there."""
    path = Path(path)
    if file and path.is_dir():
        raise UsageError(f"{flag} {path}: is a folder; give a file, such as {path / 'report.html'}")
    folders = [path.parent, *path.parent.parents] if file else [path, *path.parents]
    there = next(folder for folder in folders if folder.exists())
    if not there.is_dir():
        raise UsageError(f"{flag} {path}: {there} is a file; give a {'file in a ' if file else ''}folder")


def write_text(path, text):
    path = Path(path)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def write_json(path, value):
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json_lines(path):
    """The rows of a JSON-lines file that is written line by line; a last line that was cut off is removed from it."""
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    whole, cut = lines[:-1], lines[-1]
    if cut:
        write_text(path, "".join(line + "\n" for line in whole))
    return [json.loads(line) for line in whole]


def read_json(path):
    """Raises ``UsageError`` if the file is missing or broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from error
