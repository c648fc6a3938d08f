"""Settings: each flag declared once, as a typed and documented field of a dataclass.

The declaration says the default, the help, the values that will do, and whether a resumed run must share the value.
``ietagc_diffusers.arguments`` makes the command line from it, ``training.resumption`` the fingerprint of a run.
"""

from collections.abc import Callable, Iterable
from dataclasses import Field, dataclass, field, fields
from enum import Enum
from typing import Any

from .errors import UsageError


class Resume(Enum):
    """What a setting means for a run that is resumed from a checkpoint."""

    FREE = "may differ: it does not shape the training"
    SAME = "must agree, unless --resume_allow names it"
    FIXED = "must agree: what a checkpoint holds is built on it"
    BUDGET = "may grow: the length of the run"


def setting(
    default: Any,
    help: str,
    *,
    resume: Resume,
    type: Callable[[str], Any] = str,
    choices: Iterable[Any] | None = None,
    several: bool = False,
    aliases: Iterable[str] = (),
    secret: bool = False,
    check: Callable[[Any], bool] | None = None,
    wanted: str = "",
) -> Any:
    """A dataclass field.

    Args:
        help: what the command line prints.
        resume: see ``Resume``.
        type: makes the value of a word of the command line; ``bool`` makes a switch (``--name``, ``--no-name``).
        several: whether the flag takes one or more words.
        aliases: other names of the flag.
        secret: never written to a record.
        check: whether a value that is not None will do; ``wanted`` says what would, as in "must be {wanted}".
    """
    about = {"help": help, "resume": resume, "type": type, "choices": None if choices is None else list(choices)}
    about |= {"several": several, "secret": secret, "aliases": tuple(aliases)}
    return field(default=default, metadata=about | {"check": (check, wanted)})


def at_least(low: float) -> dict[str, Any]:
    """Options of ``setting`` for numbers from ``low`` on."""
    return {"check": lambda value: value >= low, "wanted": f"at least {low}"}


def not_negative() -> dict[str, Any]:
    return {"check": lambda value: value >= 0, "wanted": "0 or more"}


def check_values(settings: Any) -> None:
    """Raise ``UsageError`` for the first setting of a dataclass whose value will not do."""
    for entry in declared(type(settings)):
        value, choices, (check, wanted) = (
            getattr(settings, entry.name),
            entry.metadata["choices"],
            entry.metadata["check"],
        )
        if value is None:
            continue
        if choices is not None and value not in choices:
            raise UsageError(f"`{entry.name}` {value}: must be one of {', '.join(choices)}")
        if check is not None and not check(value):
            raise UsageError(f"`{entry.name}` {value}: must be {wanted}")


def declared(kind: type) -> list[Field]:
    """The fields of a settings class that are settings."""
    return [entry for entry in fields(kind) if "resume" in entry.metadata]


@dataclass(kw_only=True)
class CacheSettings:
    """Where the Hub's files are kept."""

    cache_dir: str | None = setting(None, "Where downloaded models and datasets are kept.", resume=Resume.FREE)
