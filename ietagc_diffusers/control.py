"""Threshold-aware control: skip, augment or keep each sample (eq. 5, 8), and reduce what is kept to one loss."""

from typing import NamedTuple

import torch

from .augmentation import StrengthRandAugment, augmentation_strength
from .memory_bank import LossMemoryBank


class Decision(NamedTuple):
    """skip (B,) bool; augment (B,) bool, never where skip; strength (B,) in [0, 1]; ratio (B,), the loss ratio r."""

    skip: torch.Tensor
    augment: torch.Tensor
    strength: torch.Tensor
    ratio: torch.Tensor


class Controlled(NamedTuple):
    """loss (): to differentiate; skipped, augmented, nonfinite (B,) bool; ratio (B,); mean_loss (): over the batch,
    unweighted, for the log.
    """

    loss: torch.Tensor
    skipped: torch.Tensor
    augmented: torch.Tensor
    nonfinite: torch.Tensor
    ratio: torch.Tensor
    mean_loss: torch.Tensor


class Solo:
    """The group of a process that trains its shard alone."""

    size, rank = 1, 0

    def gather(self, tensor):
        return tensor

    def sum(self, tensor):
        return tensor


class PlainControl:
    """No control at all: the official training step."""

    def step(self, model, objective, batch):
        drawn = objective.draw(batch)
        loss = objective.plain_loss(model, drawn)
        none = torch.zeros(len(drawn), dtype=torch.bool, device=loss.device)
        nonfinite = none | ~loss.detach().isfinite()
        return Controlled(
            loss, none, none, nonfinite, torch.full_like(none, torch.inf, dtype=torch.float32), loss.detach()
        )

    def to(self, device):
        return self

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class _Control:
    """What every control with decisions shares: the step. Subclasses say which samples are skipped and augmented, in
    ``decide``.
    """

    def __init__(self, augment, group=None):
        self.augment = augment
        self.group = group or Solo()

    def decide(self, losses, timesteps):
        raise NotImplementedError

    def observe(self, losses, timesteps):
        """Learn from the losses (B,), after the decision."""

    def step(self, model, objective, batch):
        """Decide on the batch and compute the mean loss over the samples it keeps, exactly over all processes of the
        group.

        With augmentation, a forward without gradient decides and the kept samples, the augmented among them with
        their new images, are run again with gradient. Without, one forward serves both. A batch with nothing left has
        loss 0.

        Args:
            model: the UNet.
            objective: see ``TextToImageObjective``.
            batch: pixel_values (B, 3, H, W) in [-1, 1], input_ids (B, L), seeds (B,) on the host (for augmentation
                alone).

        Returns:
            ``Controlled``; the sum of ``loss`` over the group is the mean over the group's kept samples.
        """
        drawn = objective.draw(batch)
        with torch.set_grad_enabled(self.augment is None):
            losses = objective.losses(model, drawn)
        observed = losses.detach()
        finite = observed.isfinite()
        skip, augment, strength, ratio = self.decide(observed, drawn.timesteps)
        self.observe(self.group.gather(observed), self.group.gather(drawn.timesteps))
        keep = ~skip & finite
        num_kept = self.group.sum(keep.sum()).clamp(min=1)
        if self.augment is None:
            loss = self._weighted_sum(objective, losses, drawn.timesteps, keep) / num_kept
        else:
            magnitudes = self.augment.magnitudes(strength) * (augment & keep)
            augment = magnitudes > 0
            drawn = self._augmented(objective, drawn, batch, magnitudes)[keep]
            if len(drawn):
                losses = objective.losses(model, drawn)
                loss = self._weighted_sum(objective, losses, drawn.timesteps) / num_kept
            else:
                loss = observed.new_zeros(())
        mean_loss = torch.where(finite, observed, 0.0).mean()
        return Controlled(loss, skip & finite, augment, ~finite, ratio, mean_loss)

    def _augmented(self, objective, drawn, batch, magnitudes):
        host_magnitudes = magnitudes.tolist()  # the one synchronisation of a step with augmentation
        rows = [row for row, magnitude in enumerate(host_magnitudes) if magnitude]
        if not rows:
            return drawn
        images = self.augment(
            batch["pixel_values"][rows], [host_magnitudes[row] for row in rows], [batch["seeds"][row] for row in rows]
        )
        return objective.with_images(drawn, rows, images)

    @staticmethod
    def _weighted_sum(objective, losses, timesteps, keep=None):
        weights = objective.weights(timesteps)
        if weights is not None:
            losses = losses * weights
        return losses.sum() if keep is None else torch.where(keep, losses, 0.0).sum()

    def to(self, device):
        return self

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class ThresholdAwareControl(_Control):
    """Eq. 8: skip below lambda, augment below R lambda, keep the rest; decided against the memory bank before it is
    updated.

    Args:
        bank: ``LossMemoryBank``.
        skip_threshold: lambda; 0 skips nothing.
        augment_range: R; 1 augments nothing.
        augment_decay: A.
        augment: ``StrengthRandAugment``, needed if R > 1.
        group: the processes that share this shard; default: this one alone.
    """

    def __init__(
        self, bank: LossMemoryBank, skip_threshold, augment_range=1.0, augment_decay=5.0, augment=None, group=None
    ):
        if augment_range > 1 and augment is None:
            raise ValueError("augment_range over 1 needs an augmentation")
        super().__init__(augment if augment_range > 1 else None, group)
        self.bank = bank
        self.skip_threshold = skip_threshold
        self.augment_range = augment_range
        self.augment_decay = augment_decay

    def decide(self, losses, timesteps):
        """losses (B,), timesteps (B,) -> ``Decision``. A sample whose timestep has no history is kept as it is."""
        ratio = self.bank.loss_ratio(losses, timesteps)
        skip = ratio < self.skip_threshold
        near = ~skip & (ratio < self.augment_range * self.skip_threshold)
        if self.skip_threshold == 0:
            return Decision(skip, near, torch.zeros_like(ratio), ratio)
        return Decision(skip, near, augmentation_strength(ratio, self.skip_threshold, self.augment_decay), ratio)

    def observe(self, losses, timesteps):
        self.bank.update(losses, timesteps)

    def to(self, device):
        self.bank.to(device)
        return self

    def state_dict(self):
        return self.bank.state_dict()

    def load_state_dict(self, state):
        self.bank.load_state_dict(state)


class RandomControl(_Control):
    """A control experiment: skip and augment at given rates, blind to the loss."""

    def __init__(
        self, skip_rate=0.0, augment_rate=0.0, strength=0.5, augment: StrengthRandAugment | None = None, group=None
    ):
        super().__init__(augment if augment_rate > 0 else None, group)
        self.skip_rate = skip_rate
        self.augment_rate = augment_rate
        self.strength = strength

    def decide(self, losses, timesteps):
        skip = torch.rand_like(losses) < self.skip_rate
        augment = ~skip & (torch.rand_like(losses) < self.augment_rate)
        return Decision(skip, augment, torch.full_like(losses, self.strength), torch.full_like(losses, torch.inf))
