"""Lines for the console that cost no result: one that cannot be shown is shown in part or not at all."""

import os
import sys
from typing import TextIO


def say(text: object, to: TextIO | None = None) -> None:
    """Print a line, by default to standard output. Characters that the console's encoding lacks become ``?``; a console
    that is full or gone is ignored from then on, so that the exit code stays what the caller makes it.
    """
    stream = to or sys.stdout
    if stream is None:  # a process without a console
        return
    try:
        try:
            print(text, file=stream, flush=True)
        except UnicodeEncodeError:
            encoding = getattr(stream, "encoding", None) or "ascii"
            print(str(text).encode(encoding, "replace").decode(encoding), file=stream, flush=True)
    except (OSError, ValueError):  # a full disk, a closed pipe, a closed stream
        _close(stream)


def _close(stream: TextIO) -> None:
    """Let the rest of the output go nowhere: Python's own flush at the end would change the exit code."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    except (OSError, ValueError):
        return
