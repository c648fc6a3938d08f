"""Run commands in processes of their own, several at a time, which an interruption ends together.

A command may be a launcher that passes no signal on. Each therefore gets a process group, and signals go to the group
and to the descendants that left it. Only where this process itself is killed by SIGKILL do they continue.
"""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from tqdm.auto import tqdm

import ietagc_diffusers

PACKAGE = Path(ietagc_diffusers.__file__).resolve().parent
# In a checkout processes have to be told where the package is; an installed copy they find by themselves.
CHECKOUT = PACKAGE.parent if not (PACKAGE / "eval").is_dir() else None
GRACE = 300.0  # seconds for a training to write its checkpoint after a signal
ENDING = (signal.SIGTERM, signal.SIGHUP)  # a closed terminal no longer reaches processes with groups of their own


class Stopped(Exception):
    """The benchmark was interrupted."""


class Processes:
    """The running commands, so that an interruption ends them all and starts no more."""

    def __init__(self) -> None:
        self.running: set[subprocess.Popen] = set()
        self.stopped, self.lock = False, threading.Lock()

    @contextmanager
    def ended_by_signals(self) -> Iterator[None]:
        """Inside, SIGTERM and SIGHUP interrupt as Ctrl-C does, and any exception ends the running commands."""

        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        # A signal that is ignored, as under nohup, stays so. Only the main thread can set handlers.
        on_main = threading.current_thread() is threading.main_thread()
        heeded = [number for number in ENDING if on_main and signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, interrupt) for number in heeded}
        try:
            yield
        except BaseException:
            with self.lock:
                self.stopped = True
                groups = [process.pid for process in self.running]
            end(groups)
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def call(self, command: Sequence[Any], log: str | Path) -> str | None:
        """Run a command with its output in the file ``log``.

        Returns None, or why it failed: the exit code and its last line. Raises ``Stopped`` if it was interrupted.
        """
        environment = dict(os.environ)
        if CHECKOUT is not None:
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")]))
        with Path(log).open("w") as output:
            with self.lock:
                if self.stopped:
                    raise Stopped
                process = subprocess.Popen(
                    list(map(str, command)), stdout=output, stderr=output, env=environment, start_new_session=True
                )
                self.running.add(process)
            code = process.wait()
            if code != 0 and not self.stopped:
                end([process.pid])  # of a launcher that failed, what it started must not go on training
        with self.lock:
            self.running.discard(process)
        if self.stopped or code in (-signal.SIGINT, -signal.SIGTERM, 130):
            raise Stopped
        if code == 0:
            return None
        lines = [line for line in Path(log).read_text(errors="replace").splitlines() if line.strip()]
        return f"exit {code}: {lines[-1][:300] if lines else 'no output'} (see {log})"


def end(groups: Iterable[int], grace: float | None = None) -> None:
    """Send SIGTERM to all processes of the groups and to their descendants, wait until they have ended, and kill those
    that have not after ``grace`` seconds (by default ``GRACE``) or at the next interruption.
    """
    groups, members = set(groups), set[psutil.Process]()
    try:
        members = _members(groups)
        for member in members:
            _send(member, signal.SIGTERM)
        if members:
            with suppress(OSError):  # the terminal may be gone
                tqdm.write(f"Waiting for {len(members)} processes to end; interrupt again to kill them")
        _wait(members, GRACE if grace is None else grace)
    finally:
        members |= _members(groups)  # those that began meanwhile too
        for member in members:
            _send(member, signal.SIGKILL)
        _wait(members, 10)


def _members(groups: set[int]) -> set[psutil.Process]:
    """The living processes of the groups, and the descendants of these, which may have groups of their own."""
    found = set()
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) in groups and _lives(process):
                found |= {process, *process.children(recursive=True)}
        except (psutil.Error, ProcessLookupError):
            continue  # it has ended by itself
    return {process for process in found if _lives(process)}


def _wait(processes: Iterable[psutil.Process], seconds: float) -> None:
    """Until all have ended, at most ``seconds``."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(map(_lives, processes)):
        time.sleep(0.05)


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _send(process: psutil.Process, number: int) -> None:
    with suppress(psutil.Error):  # it has ended, or is another user's
        if _lives(process):
            process.send_signal(number)
