"""Validation images."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.logging import get_logger

from ..ensemble import Callback

logger = get_logger(__name__)


class Validation(Callback):
    """Images for each validation prompt, to the tracker: after epochs 1, 1 + X, 1 + 2X, ... as in the official
    script; with several shards after the next round.

    Args:
        every: X, in epochs; steps_per_epoch: global steps in an epoch over the whole training set.
        per_prompt: how many images, one after another from the same random stream.

    ``images``: the last ones, for the model card.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        prompts: Sequence[str],
        every: int,
        steps_per_epoch: int,
        seed: int,
        per_prompt: int = 1,
    ):
        self.accelerator, self.every, self.seed = accelerator, every, seed
        self.prompts = [prompt for prompt in prompts for _ in range(per_prompt)]
        self.steps_per_epoch = steps_per_epoch
        self.images: list[Any] = []

    def on_step(self, run, proxy, before):
        if run.single:
            self._draw_if_due(run, before)

    def on_round(self, run, row, before):
        self._draw_if_due(run, before if run.single else run.rounds.steps_before(run.round - 1))

    def _draw_if_due(self, run, before):
        first, last = before // self.steps_per_epoch, run.global_step // self.steps_per_epoch
        if any(epoch % self.every == 0 for epoch in range(first, last)):
            self.draw(run)

    def draw(self, run) -> None:
        """Draw and send the images; only the main process does."""
        if not run.layout.is_main:
            return
        with run.weights.averaged():
            self.images = run.weights.family.draw_images(self.prompts, self.seed)
        for tracker in self.accelerator.trackers:
            self._send(tracker, run.global_step)

    def _send(self, tracker, step):
        if tracker.name == "tensorboard":
            stack = np.stack([np.asarray(image) for image in self.images])
            tracker.writer.add_images("validation", stack, step, dataformats="NHWC")
        elif tracker.name == "wandb":
            import wandb

            pairs = zip(self.images, self.prompts, strict=True)
            pictures = [wandb.Image(image, caption=prompt) for image, prompt in pairs]
            tracker.log({"validation": pictures}, step=step)
        else:
            logger.warning(f"Validation images are not sent to {tracker.name}")
