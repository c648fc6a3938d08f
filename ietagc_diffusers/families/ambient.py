"""Ambient Diffusion: a model that never sees all pixels of a training image (Daras et al., NeurIPS 2023)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..method.config import MitigationConfig
from .rules import drawn_once, squared_errors

MASKS = 3  # tells these draws from others of the same seed and image


@dataclass(frozen=True)
class Ambient:
    """Each image has two masks for the whole training. The first, A, hides a share ``corruption`` of its pixels, all
    three channels of them, from the training. The second hides a share ``further`` of what A leaves: the model is
    shown B = A * second, both as an image and as a channel of its own, and the loss is counted over all of A. Since the
    model cannot tell which pixels A hides and which only B does, it has to predict the clean image everywhere.

    With signal a and noise b the model is shown z = B (a x + b e), and its image x_0 is compared with x over A. Noise
    prediction means x_0 = (z - b f) / a, so that the target of f is (z - a x) / b: the noise where B shows it, and
    -(a / b) x where only A does; squared errors of f are those of x_0 times (a / b)^2, the usual weight. With nothing
    hidden both are plain training, and a model that is told that it sees all is drawn from as usual.

    Attributes:
        corruption, further: shares in (0, 1) and [0, 1).
        seed: of the masks.
    """

    corruption: float
    further: float
    seed: int

    @classmethod
    def of(cls, config: MitigationConfig | None, settings: Any) -> "Ambient | None":
        """What a training's settings say; None where it is off."""
        if config is None or config.ambient_corruption is None:
            return None
        return cls(config.ambient_corruption, config.ambient_further_corruption or 0.0, settings.seed or 0)

    def masks(self, ids: Sequence[int], size: Sequence[int]) -> dict[str, torch.Tensor]:
        """``counted`` (A) and ``shown`` (B): 1 where a pixel is left, else 0; float32 (B, 1, H, W), on the host."""
        draws = drawn_once(ids, self.seed, MASKS, lambda rng: rng.random((2, 1, *size), dtype="float32"))
        counted = draws[:, 0] >= self.corruption
        shown = counted & (draws[:, 1] >= self.further)
        return {"counted": counted.float(), "shown": shown.float()}


def takes_mask(model: Any) -> bool:
    """Whether a denoiser of pixels has a channel that says which of them it is shown."""
    config = getattr(model, "config", None)
    return config is not None and config.in_channels == config.out_channels + 1


def with_mask(model: Any, images: torch.Tensor, shown: torch.Tensor | None = None) -> torch.Tensor:
    """What a denoiser takes of noisy images (B, 3, H, W): with the mask (B, 1, H, W) beside them if it takes one.
    Without ``shown`` all pixels are.
    """
    if not takes_mask(model):
        return images
    shown = torch.ones_like(images[:, :1]) if shown is None else shown.to(images.dtype)
    return torch.cat([images, shown], dim=1)


@dataclass(frozen=True)
class Counted:
    """Squared errors over the pixels of a mask (B, 1, H, W), scaled so that the mean over all elements of an image is
    that over its mask.
    """

    counted: torch.Tensor

    def losses(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        share = self.counted.mean(dim=(1, 2, 3), keepdim=True).clamp(min=1 / self.counted[0].numel())
        return squared_errors(prediction, target) * (self.counted / share)
