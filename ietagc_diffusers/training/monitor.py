"""What a model learns and what it memorizes, measured along its training: losses of training and of held-out images on
the same fixed noise, copies among images that are drawn from the same noise, and what they say.
"""

import random
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset

from ..data.conditions import Condition
from ..data.samples import TrainingSamples
from ..errors import UsageError
from ..families import Family
from .fixed_losses import FixedLosses
from .settings import RunSettings

MAX_IMAGES = 256  # of each set
NUM_RANGES = 10  # of noise levels
CI95 = 1.96  # deviations
RISEN = 2  # measurements over which held-out loss has to rise before advice is given
Row = dict[str, Any]
Image = Any  # PIL's


class Compared(NamedTuple):
    """What a comparison of drawn images with the training images finds.

    numbers: ``num_images``, ``descriptor``, ``copy_similarity``, and ``sim_score``, ``copy_rate`` with the 95% interval
    of each (``..._ci95``).
    sheet: the drawn images beside their nearest training images, the most similar first.
    """

    numbers: Row
    sheet: Image


# Drawn images, and what each was drawn for (None: nothing), -> what is found.
Compare = Callable[[Sequence[Image], Sequence[str | None]], Compared]
# The settings of a run and a device -> from the training rows to what compares with their images. It raises
# ``UsageError`` for settings that will not do.
Comparer = Callable[[RunSettings, torch.device], Callable[[Dataset], Compare]]


def _shown(settings: RunSettings, family: Family) -> tuple[Any, Condition]:
    """The settings and the condition by which images are shown as they are: cropped at the centre, unmirrored, with
    their own captions, without what training adds to them.
    """
    shown: Any = copy(settings)
    shown.center_crop, shown.random_flip, shown.caption_dropout = True, False, 0.0
    untouched = replace(settings.method, caption_mitigation=None, caption_mitigation_probability=None)
    return shown, family.condition(shown, untouched)


def _spread_evenly(number: int, num_rows: int) -> list[int]:
    """Rows, evenly spread, in order; with more than there are some of them again."""
    return np.linspace(0, num_rows - 1, number).astype(int).tolist()


@contextmanager
def _evaluated(module: torch.nn.Module) -> Iterator[None]:
    """Within it the module is as it is used, without dropout."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


@dataclass(frozen=True)
class Meter:
    """Fixed noise on training and on held-out images, to compare denoisers by."""

    training: FixedLosses
    heldout: FixedLosses

    @classmethod
    def of(
        cls,
        rows: Dataset,
        heldout: Dataset | None,
        settings: RunSettings,
        family: Family,
        canaries: Collection[int] = (),
    ) -> "Meter | None":
        """The meter of a run that is monitored, or None. Up to ``MAX_IMAGES`` of each set, evenly spread, are shown as
        they are. Canaries, which training never shows so, are not among them.

        Args:
            rows: that are trained on; heldout: that are not.
            canaries: those of ``rows`` that are some.
        """
        if heldout is None or not settings.is_monitored:
            return None
        shown, told = _shown(settings, family)
        sets = []
        for some, left_out in ((rows, canaries), (heldout, ())):
            samples = TrainingSamples(some, settings.image_column, family.view(shown), told, settings.decoding)
            usual = np.setdiff1d(np.arange(len(some)), list(left_out))
            chosen = usual[_spread_evenly(min(len(usual), MAX_IMAGES), len(usual))].tolist()
            size, objective = settings.train_batch_size, family.objective.plain()
            keys = [[(row, row) for row in chosen[i : i + size]] for i in range(0, len(chosen), size)]
            batches = (samples.__getitems__(some) for some in keys)
            sets.append(FixedLosses.of_batches(objective, family.device, batches, len(chosen)))
        return cls(*sets)

    def losses(self, denoiser: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses of training and of held-out images, (draws, N) each; draws nothing at random."""
        with _evaluated(denoiser):
            return self.training.by_draw(denoiser), self.heldout.by_draw(denoiser)

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


@dataclass(frozen=True)
class CopyMeter:
    """Images for what the model was told of some training images, each always from the same noise; and how similar they
    are to the training images.

    Attributes:
        told: see ``Family.draw_told``; seeds: of the noise of each.
        compare: None on processes that do not measure.
    """

    family: Family
    told: list[Any]
    seeds: list[int]
    batch_size: int
    steps: int | None
    compare: Compare | None

    @classmethod
    def of(cls, rows: Dataset, settings: RunSettings, family: Family, compare: Compare | None) -> "CopyMeter | None":
        """The meter of a run with ``monitor_images``, or None. The images are those of rows that are evenly spread.

        Args:
            rows: that are trained on.
        """
        if settings.monitor_images is None:
            return None
        _, condition = _shown(settings, family)
        columns = rows.select_columns(list(condition.columns)) if condition.columns else None  # decodes no image
        told = []
        for row in _spread_evenly(settings.monitor_images, len(rows)):
            try:
                value = condition.read({} if columns is None else columns[row])
            except UsageError:  # training replaces such a row
                continue
            told.append(condition.draw(value, random.Random(row)))
        seeds = [(settings.seed or 0) + index for index in range(len(told))]
        return cls(family, told, seeds, settings.train_batch_size, settings.monitor_inference_steps, compare)

    def __call__(self) -> Compared:
        """Draw from the family as it is now, and compare. Only where there is ``compare``."""
        assert self.compare is not None
        with _evaluated(self.family.denoiser):
            images = self.family.draw_told(self.told, self.seeds, self.batch_size, self.steps)
        return self.compare(images, [told if isinstance(told, str) else None for told in self.told])


def beside_base(found: Row, base: Row | None) -> Row:
    """``base_copy_rate`` and ``base_sim_score``, of the model that training started from, None where that knew nothing;
    and ``excess_copy_rate``: the copy rate less the base's, which copies that training did not bring do not raise.
    """
    rate, score = (None, None) if base is None else (base["copy_rate"], base["sim_score"])
    excess = found["copy_rate"] - (rate or 0.0)
    return {"base_copy_rate": rate, "base_sim_score": score, "excess_copy_rate": excess}


def advice(rows: Sequence[Row]) -> str:
    """What measurements say, the last of them above all, in words: of copies first."""
    drawn = [row for row in rows if "copy_rate" in row]
    measured = [row for row in rows if "heldout_loss" in row]
    said = [*([_of_copies(drawn)] if drawn else []), *([_of_losses(measured)] if measured or not drawn else [])]
    return " ".join(said)


def _of_copies(rows):
    last = rows[-1]
    low, high = last["copy_rate_ci95"]
    rate, base, number = last["copy_rate"], last["base_copy_rate"] or 0.0, last["num_images"]
    copies = round(rate * number)
    if not copies:
        return f"None of the {number} drawn images is a copy (95% interval of the copy rate: up to {high:.1%})."
    are = "is a copy" if copies == 1 else "are copies"
    found = f"{copies} of the {number} drawn images {are} ({rate:.1%}, {low:.1%} to {high:.1%})"
    if base:
        found += f", of the base model's {base:.1%}"
    if low <= base:
        return f"{found}: training has not clearly brought more."
    first = next(row["global_step"] for row in rows if row["excess_copy_rate"] > 0)
    return (
        f"{found}: the model reproduces training images, first seen at step {first}. Look at the sheet; stop earlier "
        "(`keep_best` copies), train with more mitigation, or without duplicates (`deduplicate`)."
    )


def _of_losses(rows):
    if len(rows) <= RISEN:
        return "There are too few measurements of losses for advice yet."
    last, lowest = rows[-1], min(rows, key=lambda row: row["heldout_loss"])
    since = len(rows) - 1 - [row["global_step"] for row in rows].index(lowest["global_step"])
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
