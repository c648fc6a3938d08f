"""YAML files of studies: matrices of benchmarks and of training-set sizes."""

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from ietagc_diffusers.errors import UsageError
from ietagc_diffusers.method.recipes import check_keys

KINDS = {dict: "keys and values", list: "a list", str: "a text", int: "a whole number", float: "a number"}
# Training flags that say how the training images are read, and which of them are trained on.
READ = ("caption_lines", "dataset_config_name", "dataset_split", "alpha")
USED = ("max_train_samples", "deduplicate", "deduplicate_similarity", "heldout_share", "exclude_rows")


def read_configuration(path: Path, keys: Collection[str], needed: Collection[str], where: str) -> Callable[..., Any]:
    """Read a file of ``keys``, of which ``needed`` must be there.

    Returns:
        A function (key, type, default) that gives the value of a key. It raises ``UsageError`` for another type.

    Raises:
        UsageError: beginning with ``where``, for a file that cannot be read or a key that is unknown or missing.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{where}: cannot be read: {' '.join(str(error).split())}") from error
    values = checked(content, dict, where)
    check_keys(values, keys, where)
    for key in sorted(set(needed) - values.keys()):
        raise UsageError(f"{where}: has no '{key}'")

    def part(key: str, kind: type, default: Any = None) -> Any:
        value = values.get(key)
        return default if value is None else checked(value, kind, f"{where}: {key}")

    return part


def checked(value: Any, kind: type, where: str) -> Any:
    """The value. Raises ``UsageError`` for one of another type; a whole number is a number."""
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or isinstance(value, bool):
        raise UsageError(f"{where}: should hold {KINDS[kind]}, holds {json.dumps(value, default=str)[:80]}")
    return value


@contextmanager
def named(where: str) -> Iterator[None]:
    """Inside, ``where`` is added to the message of a ``UsageError``."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error


def unlike(flags: Mapping[str, Any], defaults: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Those of the named flags that are given, and not as their defaults are."""
    return {name: flags[name] for name in names if name in flags and flags[name] != defaults.get(name)}


def slug(name: str) -> str:
    """A name as part of a folder's."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name.replace("+", "plus"))


def short_hash(value: Any) -> str:
    """8 hexadecimal digits that stand for a JSON value."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=4).hexdigest()
