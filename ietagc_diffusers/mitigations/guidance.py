"""Delayed and opposite guidance: no guidance, or its opposite, within the attraction basin of a memorized image."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from .base import Mitigation, option, real
from .call import Step
from .wen import noise_magnitude

DYNAMIC = "dynamic"


def transition_point(value: Any) -> float | str:
    """A timestep, or ``DYNAMIC``."""
    if value == DYNAMIC:
        return value
    try:
        return real(value)
    except ValueError as error:
        raise ValueError(f"must be a timestep or '{DYNAMIC}'") from error


def optional_scale(value: Any) -> float | None:
    """A finite float, or None."""
    return None if value is None else real(value)


@dataclass
class DelayedGuidance(Mitigation):
    """CFG basin: guidance from the transition point on, none (or its opposite) before it.

    Jain et al., "Classifier-Free Guidance inside the Attraction Basin May Cause Memorization", 2025. A fixed
    transition is a timestep: guidance acts where t <= transition (in Stable Diffusion 3, t is 1000 times the noise
    level sigma). A dynamic one is found for each image: the first local minimum of ||eps_c - eps_u|| over the
    denoiser's calls; guidance acts from the call that shows it, the third at the earliest. A negative initial scale is
    opposite guidance (the authors take -2, with transition 650). Steps stay as the caller spaced them; the authors'
    script changes to finer steps at the transition. Without guidance (guidance_scale <= 1) there is nothing to delay.
    """

    name: ClassVar[str] = "cfg"
    transition: float | str = option(500.0, "Timestep from which guidance acts, or 'dynamic'.", transition_point)
    initial_scale: float | None = option(
        None,
        "Guidance scale before it. Default: 0 (only the negative prompt) for a fixed transition, 1 (only the prompt) "
        "for a dynamic one, as in the authors' scripts.",
        optional_scale,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.initial_scale is None:
            self.initial_scale = 1.0 if self.transition == DYNAMIC else 0.0

    def before_step(self, step: Step) -> None:
        self.guided = step.guided
        if self.transition != DYNAMIC:
            self.begun: Any = step.time <= float(self.transition)  # of all images; a tensor of each below

    def after_step(self, step: Step, prediction: torch.Tensor) -> None:
        if self.transition != DYNAMIC or not step.guided:
            return
        unconditional, conditional = prediction.chunk(2)
        norms = noise_magnitude(conditional, unconditional)
        if step.index == 0:
            self.begun = torch.zeros_like(norms, dtype=torch.bool)
            self.norms: list[torch.Tensor] = []
        if len(self.norms) == 2:
            first, middle = self.norms
            self.begun = self.begun | ((middle < first) & (middle < norms))
        self.norms = [*self.norms[-1:], norms]
        self.dtype = prediction.dtype

    def guidance_scale(self, scale: Any) -> Any:
        if not self.guided:
            return scale
        if self.transition == DYNAMIC:
            assert self.initial_scale is not None  # since __post_init__
            return torch.where(self.begun.view(-1, 1, 1, 1), scale, self.initial_scale).to(self.dtype)
        return scale if self.begun else self.initial_scale
