"""Commands in processes of their own, several at a time, that an interruption ends together."""

import os
import signal
import subprocess
import threading
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class Stopped(Exception):
    """The benchmark was interrupted."""


class Processes:
    """The running commands, so that an interruption ends them all and begins no more."""

    def __init__(self):
        self.running, self.stopped, self.lock = set(), False, threading.Lock()

    @contextmanager
    def ended_by_signals(self):
        """Within it SIGTERM is an interruption as Ctrl-C is, and any exception ends what runs."""

        def interrupt(*_):
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

    def call(self, command, log):
        """Run a command with its output in a file. Returns the last line of it if it fails; raises ``Stopped``."""
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
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
