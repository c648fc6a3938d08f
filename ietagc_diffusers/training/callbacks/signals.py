"""A clean stop on signals."""

import signal
from collections.abc import Callable

import torch

from ...errors import UsageError
from ..ensemble import Callback
from .checkpoints import Checkpoints


class Signals(Callback):
    """SIGTERM, SIGINT or a fault on any process stops the run after its step; says where it can be resumed.

    Args:
        checkpoints: which write one on the stop.
        every: with several processes, how often they ask one another, in steps: asking costs each of them a wait.
        say: takes the message.
    """

    def __init__(self, checkpoints: Checkpoints, every: int, say: Callable[[str], None]):
        self.checkpoints, self.every, self.say = checkpoints, every, say
        self.received: int | None = None
        self.fault: UsageError | None = None
        self.questions = 0

    def on_start(self, run):
        signal.signal(signal.SIGTERM, self._receive)
        signal.signal(signal.SIGINT, self._receive)

    def _receive(self, number, frame):
        if self.received is not None and number == signal.SIGINT:
            raise SystemExit(130)
        self.received = number

    def stop(self, fault: UsageError) -> None:
        """Stop the run after this step as a signal would, because of a fault that ends it."""
        self.fault = self.fault or fault

    def should_stop(self, run):
        wanted = self.received is not None or self.fault is not None
        if run.layout.num_processes == 1:
            return wanted
        self.questions += 1
        if self.questions % self.every:
            return False
        return run.layout.total(torch.tensor([float(wanted)])).item() > 0

    def on_stop(self, run):
        if run.layout.is_main:
            last = self.checkpoints.last
            how = (
                "without a checkpoint" if last is None else f"continue with `resume_from_checkpoint` checkpoint-{last}"
            )
            self.say(f"Stopped at step {run.global_step}; {how}")
