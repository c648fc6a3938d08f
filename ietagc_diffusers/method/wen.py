"""The training filter of Wen et al., by itself or around another control."""

import torch

from .control import DecidingControl, Decision


class KeepAll(DecidingControl):
    """Skips and augments nothing."""

    def __init__(self):
        super().__init__(augment=None)

    def decide(self, losses: torch.Tensor, levels: torch.Tensor) -> Decision:
        nothing = torch.zeros_like(losses, dtype=torch.bool)
        return Decision(nothing, nothing, torch.zeros_like(losses), torch.full_like(losses, torch.inf))


class WenControl(DecidingControl):
    """The training filter of Wen et al. (2024): skip samples whose text-conditional noise magnitude is not below a
    threshold.

    What either this or ``inner`` skips is skipped; ``inner`` decides on and learns from every sample, as it would
    by itself. A step in which nothing is left has loss 0 and is taken all the same, so that no process waits for
    another.

    Args:
        threshold: of the magnitude, over 0; see ``TextToImageObjective.losses_and_magnitudes``.
        inner: another ``DecidingControl``; default: one that keeps all that the filter leaves.
        group: the processes that share this shard; default: this one only.
    """

    def __init__(self, threshold, inner=None, group=None):
        self.inner = inner or KeepAll()
        super().__init__(self.inner.augment, group, self.inner.reference)
        self.threshold = threshold

    def measure(self, model, objective, drawn):
        losses, magnitudes = objective.losses_and_magnitudes(model, drawn)
        return losses, (magnitudes,)

    def decide(self, losses: torch.Tensor, levels: torch.Tensor, magnitudes: torch.Tensor) -> Decision:  # type: ignore[override]  # ``measure`` returns magnitudes too
        """losses (B,), levels (B,), magnitudes (B,) -> ``Decision``."""
        filtered = ~(magnitudes < self.threshold)  # a magnitude that is not a number too
        decision = self.inner.decide(losses, levels)
        return decision._replace(skip=decision.skip | filtered, augment=decision.augment & ~filtered)

    def observe(self, losses: torch.Tensor, levels: torch.Tensor) -> None:
        self.inner.observe(losses, levels)

    def prepare(self, model, objective):
        self.inner.prepare(model, objective)

    def to(self, device):
        self.inner.to(device)
        return self

    def close(self):
        self.inner.close()

    def state_dict(self):
        return self.inner.state_dict() | super().state_dict()

    def load_state_dict(self, state):
        self.inner.load_state_dict(state)
        super().load_state_dict(state)
