"""Wrong use, told in the caller's terms."""

import re
from collections.abc import Collection

_SETTING = re.compile(r"`(\w+)`")


class UsageError(ValueError):
    """Wrong use: the message names the setting or the row at fault, what was found, and what would do.

    Settings stand in backquotes, as in "`num_shards` 0: must be at least 1". A command line shows those that it has
    flags for as flags, see ``with_flags``; to a caller in Python they are the names of arguments.
    """


def one_line(error: BaseException) -> str:
    """What an exception says, in a line of at most 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def with_flags(message: str, flags: Collection[str]) -> str:
    """``message`` with each setting in backquotes that is among ``flags`` (names without dashes) as ``--name``."""
    return _SETTING.sub(lambda found: f"--{found[1]}" if found[1] in flags else found[0], message)
