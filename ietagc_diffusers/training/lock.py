"""A run folder belongs to one process at a time: two trainings would overwrite each other's records and checkpoints."""

import errno
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from types import ModuleType

from ..errors import UsageError
from ..run_folder import RunFolder

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

logger = logging.getLogger(__name__)
TAKEN = (errno.EWOULDBLOCK, errno.EACCES)
_held: set[int] = set()  # file descriptors


def _let_go() -> None:
    """A forked data worker shares the lock: it must not hold it where its parent was killed."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


@contextmanager
def locked(folder: RunFolder) -> Iterator[None]:
    """Make the folder, and hold its lock inside. The system releases it when the process ends, however it ends.

    Raises:
        UsageError: another process holds it, or the folder cannot be written.
    """
    try:
        folder.records.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder.lock_file, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UsageError(f"`output_dir` {folder.path}: {error.strerror}") from error
    _held.add(descriptor)
    try:
        _take(descriptor, folder)
        yield
    finally:
        if descriptor in _held:
            _held.remove(descriptor)
            os.close(descriptor)


def _take(descriptor: int, folder: RunFolder) -> None:
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, "this system has no file locks")
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in TAKEN:
            raise UsageError(
                f"`output_dir` {folder.path}: is in use by {_holder(descriptor)}; wait until it has ended, or give "
                "another folder"
            ) from error
        logger.warning(
            f"{folder.path} cannot be locked ({error.strerror}): make sure that no other training writes into it"
        )
        return
    # Written in place: a new file of the same name would not be the locked one.
    about = {"process": os.getpid(), "host": socket.gethostname(), "since": f"{datetime.now():%Y-%m-%d %H:%M:%S}"}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, (json.dumps(about) + "\n").encode(), 0)


def _holder(descriptor: int) -> str:
    try:
        about = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {about['process']} on {about['host']} since {about['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
