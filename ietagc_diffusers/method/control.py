"""Threshold-aware control: skip, augment or keep each sample (eq. 5, 8), and reduce what is kept to one loss."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch

from .augmentation import StrengthRandAugment, augmentation_strength
from .memory_bank import LossMemoryBank
from .thresholds import RunningQuantile

# What keeping a pass for its gradient costs if there is none to compute, over what it saves if there is: measured about
# 0.04 and 0.3 steps.
WORTH_A_GRADIENT = 1 / 8


class Decision(NamedTuple):
    """skip (B,) bool; augment (B,) bool, never where skip; strength (B,) in [0, 1]; ratio (B,), the loss ratio r."""

    skip: torch.Tensor
    augment: torch.Tensor
    strength: torch.Tensor
    ratio: torch.Tensor


class Controlled(NamedTuple):
    """What a step did. loss (): to differentiate; skipped, augmented, nonfinite (B,) bool; ratio (B,).

    total_loss (): summed over the batch's finite losses, for the log. all_finite: known to the host. kept (): how many
    samples of the group ``loss`` is the mean of; None for the official loss, a mean whatever is kept.
    """

    loss: torch.Tensor
    skipped: torch.Tensor
    augmented: torch.Tensor
    nonfinite: torch.Tensor
    ratio: torch.Tensor
    total_loss: torch.Tensor
    all_finite: bool
    kept: torch.Tensor | None = None


class Reference(Protocol):
    """A model that has learned less of the training images, or nothing, and so tells how difficult each of them is."""

    def losses(self, objective, drawn) -> torch.Tensor:
        """Its loss (B,) on the same noisy samples as the trained model's; draws nothing at random."""


class HeldoutSamples(Protocol):
    """Noisy samples of images that are never trained on."""

    def measure(
        self, objective: Any, losses_of: Callable[[Any], torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """``losses_of`` (B,) of some, as ``objective.draw`` returns them, and their noise levels (B,); None where it is
        not their turn. What is drawn for that, by the model too, is apart from what is drawn for the training.
        """

    def close(self) -> None: ...
    def state_dict(self) -> dict: ...
    def load_state_dict(self, state: dict) -> None: ...


class Solo:
    """The group of a process that trains its shard by itself."""

    size, rank = 1, 0

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


class Control(ABC):
    """Decides what becomes of each sample of a batch, and reduces the batch to one loss."""

    @abstractmethod
    def step(self, model, objective, batch):
        """Returns ``Controlled``."""

    def to(self, device):
        return self

    def close(self) -> None:
        """End the data workers, if there are any, until the next step."""
        return None

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        if state:
            raise ValueError("this control keeps no state")


class PlainControl(Control):
    """No control at all: the official training step."""

    def step(self, model, objective, batch):
        """The official loss, less samples whose loss is not finite. Reads the device once, as the official script."""
        drawn = objective.draw(objective.encode(batch))
        loss = objective.plain_loss(model, drawn)
        nonfinite = torch.zeros(len(drawn), dtype=torch.bool, device=loss.device)
        all_finite = bool(loss.isfinite())
        if not all_finite:
            with torch.no_grad():
                nonfinite = ~objective.losses(model, drawn).isfinite()
            drawn = drawn[~nonfinite]
            loss = objective.plain_loss(model, drawn) if len(drawn) else torch.zeros_like(loss.detach())
        nothing = torch.zeros_like(nonfinite)
        ratio = torch.full_like(nothing, torch.inf, dtype=torch.float32)
        return Controlled(loss, nothing, nothing, nonfinite, ratio, loss.detach() * len(drawn), all_finite)


class SummedControl(Control):
    """Keeps every sample, and sums their weighted losses, so that the gradient of each can be told (DP-SGD). A loss
    that is not finite stays in the sum.
    """

    def step(self, model, objective, batch):
        drawn = objective.draw(objective.encode(batch))
        losses, weights = objective.losses(model, drawn), objective.weights(drawn)
        finite = losses.detach().isfinite()
        nothing = torch.zeros_like(finite)
        loss = (losses if weights is None else losses * weights).sum()
        ratio = torch.full_like(nothing, torch.inf, dtype=torch.float32)
        total_loss = torch.where(finite, losses.detach(), 0.0).sum()
        return Controlled(loss, nothing, nothing, ~finite, ratio, total_loss, bool(finite.all()))


class DecidingControl(Control):
    """The step of every control that skips and augments; subclasses say which samples, in ``decide``.

    Args:
        augment: ``StrengthRandAugment``, or None.
        group: the processes that share this shard; default: this one only.
        reference: calibrates: what is decided on and learned from is each loss over the ``Reference``'s on the same
            noisy sample. None: the losses themselves.
    """

    def __init__(self, augment, group=None, reference: Reference | None = None):
        self.augment = augment
        self.group = group or Solo()
        self.reference = reference
        # Of the latest batches, those that were kept as they are: a moving average.
        self.whole_share = 1.0 if self.group.size == 1 else 0.0

    def measure(self, model, objective, drawn):
        """The losses (B,) to differentiate, and a tuple of what ``decide`` takes beside losses and noise levels."""
        return objective.losses(model, drawn), ()

    def calibrated(self, losses: torch.Tensor, objective: Any, drawn: Any) -> torch.Tensor:
        """The losses (B,), over the reference's if there is one: +inf, which nothing is decided on or learned from,
        where it has none to divide by.
        """
        if self.reference is None:
            return losses
        difficulty = self.reference.losses(objective, drawn)
        return torch.where(difficulty.isfinite() & (difficulty > 0), losses / difficulty, torch.inf)

    @abstractmethod
    def decide(self, losses: torch.Tensor, levels: torch.Tensor) -> Decision:
        """losses (B,), as ``calibrated`` returns them, levels (B,) -> ``Decision``."""

    def observe(self, losses: torch.Tensor, levels: torch.Tensor) -> None:
        """Learn from the same losses (B,), after the decision."""

    def prepare(self, model, objective) -> None:
        """What comes before a step."""

    def step(self, model, objective, batch):
        """Decide on the batch and compute the mean loss over the samples it keeps, exactly over all processes of the
        group.

        One forward pass decides. Without augmentation it is also the pass that is trained on. With augmentation the
        kept samples, the augmented among them with their new images, are run again with gradient, but where a batch
        is kept as it is: as long as there are such batches, the first pass keeps what a gradient needs. A batch with
        nothing left has loss 0.

        Args:
            model: the denoiser, as it is called.
            objective: ``families.base.Objective``.
            batch: ``data.Batch``; its seeds are needed only for augmentation.

        Returns:
            ``Controlled``; the sum of ``loss`` over the group is the mean over the group's kept samples.
        """
        self.prepare(model, objective)
        drawn = objective.draw(objective.encode(batch))
        with torch.set_grad_enabled(self.augment is None or self.whole_share > WORTH_A_GRADIENT):
            losses, more = self.measure(model, objective, drawn)
        observed = losses.detach()
        finite = observed.isfinite()
        judged = self.calibrated(observed, objective, drawn)
        skip, augment, strength, ratio = self.decide(judged, drawn.levels, *more)
        self.observe(self.group.gather(judged), self.group.gather(drawn.levels))
        keep = ~skip & finite
        kept = self.group.sum(keep.sum())
        num_kept = kept.clamp(min=1)
        if self.augment is None:
            augment = torch.zeros_like(keep)
            whole = all_finite = bool(finite.all())  # the step's one read of the device
        else:
            magnitudes = self.augment.magnitudes(strength) * (augment & keep)
            augment = magnitudes > 0
            table = torch.stack([magnitudes, finite.long(), keep.long()])
            host_magnitudes, host_finite, host_keep = table.tolist()  # likewise
            all_finite = all(host_finite)
            whole = all(host_keep) and not any(host_magnitudes)
            if self.group.size == 1:  # of several, one's share would be restored for all
                self.whole_share += 0.1 * (whole - self.whole_share)
        if whole and losses.requires_grad:
            loss = self._weighted_sum(objective, drawn, losses, keep) / num_kept
        else:
            del losses  # and all that the pass kept for its gradient, before the next pass does
            if self.augment is not None:
                drawn = self._augmented(objective, drawn, batch, host_magnitudes)
                keep = [row for row, kept_row in enumerate(host_keep) if kept_row]
            # Only what is kept goes backward: a loss that is not finite would spoil every gradient, masked or not.
            drawn = drawn[keep]
            if len(drawn):
                loss = self._weighted_sum(objective, drawn, objective.losses(model, drawn)) / num_kept
            else:
                loss = observed.new_zeros(())
        total_loss = torch.where(finite, observed, 0.0).sum()
        return Controlled(loss, skip & finite, augment, ~finite, ratio, total_loss, all_finite, kept)

    def _augmented(self, objective, drawn, batch, magnitudes):
        """``drawn`` with each image augmented whose magnitude (a host integer) is not 0."""
        rows = [row for row, magnitude in enumerate(magnitudes) if magnitude]
        if not rows:
            return drawn
        images = self.augment(batch.images[rows], [magnitudes[row] for row in rows], [batch.seeds[row] for row in rows])
        return objective.with_images(drawn, rows, images)

    def state_dict(self):
        return {} if self.augment is None else {"whole_share": self.whole_share}

    def load_state_dict(self, state):
        self.whole_share = state.get("whole_share", self.whole_share)

    @staticmethod
    def _weighted_sum(objective, drawn, losses, keep=None):
        weights = objective.weights(drawn)
        if weights is not None:
            losses = losses * weights
        return losses.sum() if keep is None else torch.where(keep, losses, 0.0).sum()


class ThresholdAwareControl(DecidingControl):
    """Eq. 8: skip below lambda, augment below R lambda, keep the rest; decided against the memory bank before it is
    updated.

    Args:
        bank: ``LossMemoryBank``.
        skip_threshold: lambda, 0 skips nothing; or ``RunningQuantile``, whose lambda is another at each noise level.
        augment_range: R; 1 augments nothing.
        augment_decay: A.
        augment: ``StrengthRandAugment``, needed if R > 1.
        group, reference: see ``DecidingControl``.
        heldout: ``HeldoutSamples``, whose ratios the quantile is of; default: the shard's own.
    """

    def __init__(
        self,
        bank: LossMemoryBank,
        skip_threshold: float | RunningQuantile,
        augment_range=1.0,
        augment_decay=5.0,
        augment=None,
        group=None,
        reference=None,
        heldout: HeldoutSamples | None = None,
    ):
        if augment_range > 1 and augment is None:
            raise ValueError("augment_range over 1 needs an augmentation")
        super().__init__(augment if augment_range > 1 else None, group, reference)
        self.bank = bank
        self.quantile = skip_threshold if isinstance(skip_threshold, RunningQuantile) else None
        self.skip_threshold = skip_threshold
        self.heldout = heldout
        self.augment_range = augment_range
        self.augment_decay = augment_decay

    def decide(self, losses: torch.Tensor, levels: torch.Tensor) -> Decision:
        """losses (B,), levels (B,) -> ``Decision``. A sample whose noise level has no history is kept as it is."""
        ratio = self.bank.loss_ratio(losses, levels)
        if isinstance(self.skip_threshold, RunningQuantile):
            threshold = self.skip_threshold(levels)
        else:
            threshold = torch.full_like(ratio, self.skip_threshold)
        skip = ratio < threshold
        near = ~skip & (ratio < self.augment_range * threshold)
        strength = augmentation_strength(ratio, threshold, self.augment_decay)
        return Decision(skip, near, torch.where(threshold > 0, strength, 0.0), ratio)

    def observe(self, losses: torch.Tensor, levels: torch.Tensor) -> None:
        if self.quantile is not None and self.heldout is None:
            self.quantile.update(self.bank.loss_ratio(losses, levels), levels)
        self.bank.update(losses, levels)

    @torch.no_grad()
    def prepare(self, model, objective):
        """Look at the held-out samples whose turn it is: the quantile is of their ratios to the shard's bank."""
        if self.quantile is None or self.heldout is None:
            return
        measured = self.heldout.measure(
            objective, lambda drawn: self.calibrated(objective.losses(model, drawn), objective, drawn)
        )
        if measured is not None:
            losses, levels = map(self.group.gather, measured)
            self.quantile.update(self.bank.loss_ratio(losses, levels), levels)

    def to(self, device):
        for part in self._parts():
            part.to(device)
        return self

    def _parts(self):
        return [self.bank] if self.quantile is None else [self.bank, self.quantile]

    def close(self):
        if self.heldout is not None:
            self.heldout.close()

    def state_dict(self):
        state = super().state_dict()
        for part in self._parts():
            state |= part.state_dict()
        return state if self.heldout is None else state | {"heldout": self.heldout.state_dict()}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        for part in self._parts():
            part.load_state_dict(state)
        if self.heldout is not None:
            self.heldout.load_state_dict(state["heldout"])


class RandomControl(DecidingControl):
    """A control experiment: skip and augment at given rates, blind to the loss."""

    def __init__(
        self, skip_rate=0.0, augment_rate=0.0, strength=0.5, augment: StrengthRandAugment | None = None, group=None
    ):
        super().__init__(augment if augment_rate > 0 else None, group)
        self.skip_rate = skip_rate
        self.augment_rate = augment_rate
        self.strength = strength

    def decide(self, losses: torch.Tensor, levels: torch.Tensor) -> Decision:
        skip = torch.rand_like(losses) < self.skip_rate
        augment = ~skip & (torch.rand_like(losses) < self.augment_rate)
        return Decision(skip, augment, torch.full_like(losses, self.strength), torch.full_like(losses, torch.inf))
