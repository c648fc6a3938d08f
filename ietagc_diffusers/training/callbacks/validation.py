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
        send_images(self.accelerator, "validation", self.images, self.prompts, run.global_step)


def send_images(accelerator: Accelerator, name: str, images: Sequence[Any], captions: Sequence[str], step: int) -> None:
    """Send PIL images of one size, with a caption each, to the trackers that take some."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            stack = np.stack([np.asarray(image) for image in images])
            tracker.writer.add_images(name, stack, step, dataformats="NHWC")
        elif tracker.name == "wandb":
            import wandb

            pairs = zip(images, captions, strict=True)
            tracker.log({name: [wandb.Image(image, caption=caption) for image, caption in pairs]}, step=step)
        else:
            logger.warning(f"Images of {name} are not sent to {tracker.name}")
