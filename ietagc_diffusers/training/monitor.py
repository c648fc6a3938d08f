"""What a model learns and what it memorizes, measured along its training: losses of training and of held-out images on
the same fixed noise, and what they say.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from ..data.samples import TrainingSamples
from ..families import Family
from .fixed_losses import FixedLosses
from .settings import RunSettings
from .views import canary_keys

MAX_IMAGES = 256  # of each set
NUM_RANGES = 10  # of noise levels
CI95 = 1.96  # deviations
RISEN = 2  # measurements over which held-out loss has to rise before advice is given
Row = dict[str, Any]


@dataclass(frozen=True)
class Meter:
    """Fixed noise on training and on held-out images, to compare denoisers by."""

    training: FixedLosses
    heldout: FixedLosses

    @classmethod
    def of(cls, rows: Dataset, heldout: Dataset | None, settings: RunSettings, family: Family) -> "Meter | None":
        """The meter of a run that is monitored, or None. Up to ``MAX_IMAGES`` of each set, evenly spread, are shown as
        they are: cropped at the centre, unmirrored, with their own captions, without what training adds to them.
        Canaries, which training never shows so, are not among them.

        Args:
            rows: that are trained on; heldout: that are not.
        """
        if heldout is None or settings.monitor_every is None:
            return None
        shown: Any = copy(settings)
        shown.center_crop, shown.random_flip, shown.caption_dropout = True, False, 0.0
        untouched = replace(settings.method, caption_mitigation=None, caption_mitigation_probability=None)
        told = family.condition(shown, untouched)
        sets = []
        for some, left_out in ((rows, canary_keys(rows, settings)), (heldout, {})):
            samples = TrainingSamples(some, settings.image_column, family.view(shown), told, settings.decoding)
            usual = np.setdiff1d(np.arange(len(some)), list(left_out))
            chosen = usual[np.linspace(0, len(usual) - 1, min(len(usual), MAX_IMAGES)).astype(int)].tolist()
            size, objective = settings.train_batch_size, family.objective.plain()
            keys = [[(row, row) for row in chosen[i : i + size]] for i in range(0, len(chosen), size)]
            batches = (samples.__getitems__(some) for some in keys)
            sets.append(FixedLosses.of_batches(objective, family.device, batches, len(chosen)))
        return cls(*sets)

    def losses(self, denoiser: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses of training and of held-out images, (draws, N) each; draws nothing at random."""
        training = denoiser.training
        denoiser.eval()
        try:
            return self.training.by_draw(denoiser), self.heldout.by_draw(denoiser)
        finally:
            denoiser.train(training)

    def measurement(
        self, losses: tuple[torch.Tensor, torch.Tensor], base: tuple[torch.Tensor, torch.Tensor] | None
    ) -> Row:
        """The numbers of a model.

        Args:
            losses: of the model; base: of the one that training started from, which shows how much more difficult one
                of the two sets is. None where that one knew nothing.

        Returns:
            ``train_loss``, ``heldout_loss``; ``gap``, the second minus the first, less the base's, and its 95% interval
            over the images ``gap_ci95``; ``levels``, the same by range of noise levels, from the least noise.
        """
        learned = [*losses] if base is None else [found - start for found, start in zip(losses, base, strict=True)]
        of_images = [change.mean(dim=0) for change in learned]
        gap = (of_images[1].mean() - of_images[0].mean()).item()
        error = sum(change.var().item() / len(change) for change in of_images if len(change) > 1) ** 0.5
        train_loss, heldout_loss = (found.mean().item() for found in losses)
        return {
            "train_loss": train_loss,
            "heldout_loss": heldout_loss,
            "gap": gap,
            "gap_ci95": [gap - CI95 * error, gap + CI95 * error],
            "levels": self._by_level(losses, learned),
        }

    def _by_level(self, losses, learned):
        num_levels = self.training.objective.num_levels
        ranges, number = [], min(NUM_RANGES, num_levels)
        places = [fixed.levels * number // num_levels for fixed in (self.training, self.heldout)]
        for index in range(number):
            inside = [place == index for place in places]
            if not all(bool(mask.any()) for mask in inside):
                continue  # too few images for all ranges
            train_loss, heldout_loss = (each[m].mean().item() for each, m in zip(losses, inside, strict=True))
            before, after = (change[m].mean().item() for change, m in zip(learned, inside, strict=True))
            first, last = (-(-edge * num_levels // number) for edge in (index, index + 1))
            numbers = {"train_loss": train_loss, "heldout_loss": heldout_loss, "gap": after - before}
            ranges.append({"from": first, "to": last - 1} | numbers)
        return ranges


def advice(rows: Sequence[Row]) -> str:
    """What measurements say, the last of them above all, in words."""
    if len(rows) <= RISEN:
        return "There are too few measurements for advice yet."
    last, lowest = rows[-1], min(rows, key=lambda row: row["heldout_loss"])
    since = len(rows) - 1 - [row["round"] for row in rows].index(lowest["round"])
    low, high = last["gap_ci95"]
    if since >= RISEN and last["gap"] > lowest["gap"]:
        return (
            f"Held-out loss was lowest at step {lowest['global_step']} ({lowest['heldout_loss']:.4f}) and has risen to "
            f"{last['heldout_loss']:.4f} since, while the gap grew from {lowest['gap']:.4f} to {last['gap']:.4f}: the "
            "model memorizes more than it learns. Use the model of that step, which `keep_best` heldout keeps, or "
            "train less, with a smaller learning rate or with more mitigation."
        )
    if low > 0:
        return (
            f"The gap of {last['gap']:.4f} ({low:.4f} to {high:.4f}) is above zero: the model knows its training "
            "images better than others like them. Held-out loss has not risen for long: it still learns."
        )
    return f"No sign of memorization: the gap of {last['gap']:.4f} ({low:.4f} to {high:.4f}) is not above zero."
