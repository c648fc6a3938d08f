"""Run commands in processes of their own, several at a time, which an interruption ends together."""

import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ietagc_diffusers

PACKAGE = Path(ietagc_diffusers.__file__).resolve().parent
# In a checkout processes have to be told where the package is; an installed copy they find by themselves.
CHECKOUT = PACKAGE.parent if not (PACKAGE / "eval").is_dir() else None


class Stopped(Exception):
    """The benchmark was interrupted."""


class Processes:
    """The running commands, so that an interruption ends them all and starts no more."""

    def __init__(self) -> None:
        self.running: set[subprocess.Popen] = set()
        self.stopped, self.lock = False, threading.Lock()

    @contextmanager
    def ended_by_signals(self) -> Iterator[None]:
        """Inside, SIGTERM interrupts as Ctrl-C does, and any exception ends the running commands."""

        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        on_main = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGTERM, interrupt) if on_main else None
        try:
            yield
        except BaseException:
            with self.lock:
                self.stopped = True
                for process in self.running:
                    process.terminate()
            raise
        finally:
            if on_main:
                signal.signal(signal.SIGTERM, before)

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
                process = subprocess.Popen(list(map(str, command)), stdout=output, stderr=output, env=environment)
                self.running.add(process)
            code = process.wait()
        self.running.discard(process)
        if self.stopped or code in (-signal.SIGINT, -signal.SIGTERM, 130):
            raise Stopped
        if code == 0:
            return None
        lines = [line for line in Path(log).read_text(errors="replace").splitlines() if line.strip()]
        return f"exit {code}: {lines[-1][:300] if lines else 'no output'} (see {log})"
