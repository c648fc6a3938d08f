"""A clean stop on signals."""

import signal
import time
from collections.abc import Callable

import torch

from ...errors import UsageError
from ..ensemble import Callback
from .checkpoints import Checkpoints


class Signals(Callback):
    """SIGTERM, SIGINT or a fault on any process stops the run after its step; says where it can be resumed.

    Launchers wait 30 seconds for that. With several processes a stop must be agreed on, and asking costs each of them a
    wait: they ask about every ``SECONDS``, which leaves the rest to the checkpoint.

    Args:
        checkpoints: which write one on the stop.
        every: with several processes, the most steps between two questions.
        say: takes the message.
    """

    SECONDS = 3.0

    def __init__(self, checkpoints: Checkpoints, every: int, say: Callable[[str], None]):
        self.checkpoints, self.every, self.say = checkpoints, every, say
        self.received: int | None = None
        self.fault: UsageError | None = None
        self.stops = False  # whether this stops the run: a callback can, too, that says why itself
        self.ask_in = self.steps = 1  # until the next question, and from the last: alike on all processes
        self.asked = time.monotonic()

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
            self.stops = wanted
        else:
            self.ask_in -= 1
            self.stops = self.ask_in <= 0 and self._ask(run.layout, wanted)
        return self.stops

    def _ask(self, layout, wanted):
        """Whether any process wants to stop. The main process says when to ask again."""
        now = time.monotonic()
        pace = max(1, int(self.steps * self.SECONDS / max(now - self.asked, 1e-9)))
        self.asked = now
        numbers = torch.tensor([float(wanted), float(min(pace, self.every) * layout.is_main)])
        any_wants, self.steps = layout.agree(numbers).tolist()
        self.ask_in = self.steps = int(self.steps)
        return any_wants > 0

    def on_stop(self, run):
        if self.stops and run.layout.is_main:
            last = self.checkpoints.last
            how = (
                "without a checkpoint" if last is None else f"continue with `resume_from_checkpoint` checkpoint-{last}"
            )
            self.say(f"Stopped at step {run.global_step}; {how}")
