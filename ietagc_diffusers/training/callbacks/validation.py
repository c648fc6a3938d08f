"""Validation images."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.logging import get_logger

from ..ensemble import IterativeEnsemble
from .epochs import EveryEpochs

logger = get_logger(__name__)


class Validation(EveryEpochs):
    """Images for each validation prompt, to the tracker.

    Args:
        every, steps_per_epoch: see ``EveryEpochs``.
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
        super().__init__(every, steps_per_epoch)
        self.accelerator, self.seed = accelerator, seed
        self.prompts = [prompt for prompt in prompts for _ in range(per_prompt)]
        self.images: list[Any] = []

    def act(self, run: IterativeEnsemble) -> None:
        self.draw(run)

    def draw(self, run: IterativeEnsemble) -> None:
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
