"""Training on noisy data at high noise levels: Shah et al., "Does Generation Require Memorization? Creative Diffusion
Models using Ambient Diffusion", ICML 2025.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..method.config import MitigationConfig
from .rules import drawn_once, squared_errors

NOISE = 2  # tells these draws from others of the same seed and image


@dataclass(frozen=True)
class Mixture:
    """noise (B, ...): to add to the images; kept (B, 1, ...): 1 - k; shift (B, ...): of the target, in its unit."""

    noise: torch.Tensor
    kept: torch.Tensor
    shift: torch.Tensor

    def losses(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Squared errors (B, ...), float32, of a prediction f and what ``noise`` makes the target.

        Their value is (f - target)^2, the error against the image itself: it has no jump at sigma_n, so that the loss
        ratio compares like with like, and the log compares with plain training. Their gradient is that of
        ((1 - k) (f - target) - shift)^2, which is what is trained.
        """
        errors = squared_errors(prediction.detach(), target)
        trained = squared_errors(self.kept * prediction.float(), self.kept * target.float() + self.shift)
        return errors + (trained - trained.detach())


@dataclass(frozen=True)
class NoisyData:
    """Below the noise level sigma_n an image y is denoised as usual. From sigma_n on the model sees, and has to give
    back, only y_n = y + sigma_n n, with noise n of the image's own that never changes: what it can memorize there is a
    noisy image.

    A sample is x_t = a (y + sigma e), with signal a, noise level sigma = b / a and noise e. (On a DDPM schedule
    a^2 = alpha_bar and b^2 = 1 - alpha_bar; in flow matching a = 1 - s and b = s.) The authors, with a = 1, make it of
    y_n and fresh noise w, and with k = (sigma_n / sigma)^2 read off the model's image x_0 what it says of y_n:

        x_t / a = y_n + sqrt(sigma^2 - sigma_n^2) w,    (1 - k) x_0 + k x_t / a  should be  y_n.

    The first is x_t = a (y + sigma e) with e = sqrt(k) n + sqrt(1 - k) w, which is standard normal: x_t is made as
    usual, of that noise. With d = sqrt(1 - k) n - sqrt(k) w, which is standard normal too and independent of e, the
    second becomes

        (1 - k) (x_0 - y)  should be  sigma_n sqrt(1 - k) d,

    because y_n - k x_t / a = (1 - k) y + sigma_n n - k sigma e and n = sqrt(k) e + sqrt(1 - k) d. A model that predicts
    something else than x_0 is moved by c times what its x_0 is moved by: c = -1 / sigma for the noise, since
    x_t / a = x_0 + sigma e; c = -1 / b for the velocity, a e - b x_0 of DDPM as well as e - x_0 of flow matching. So
    for each of them the loss is

        || (1 - k) (f - target(y, e)) - c sigma_n sqrt(1 - k) d ||^2

    with the usual target and the usual weight of the level. If n were drawn anew at each visit d would average out:
    the model that is best is that of plain training. With sigma_n = 0 it is plain training.

    Attributes:
        sigma: sigma_n, in the unit of the images or latents.
        seed: of the images' own noise.
    """

    sigma: float
    seed: int

    @classmethod
    def of(cls, config: MitigationConfig | None, settings: Any) -> "NoisyData | None":
        """What a training's settings say; None where it is off."""
        if config is None or config.noisy_data_sigma is None:
            return None
        return cls(config.noisy_data_sigma, settings.seed or 0)

    def own_noise(self, ids: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
        """n of each image: standard normal, float32 (B, *shape), on the host."""
        return drawn_once(ids, self.seed, NOISE, lambda rng: rng.standard_normal(tuple(shape), dtype=np.float32))

    def mix(
        self, noise: torch.Tensor, own: torch.Tensor, signal: torch.Tensor, spread: torch.Tensor, predicts: str
    ) -> Mixture:
        """The noise e and the target's shift.

        Args:
            noise: w, (B, ...), standard normal. e has its dtype.
            own: n, like it.
            signal, spread: a and b of each sample, (B,).
            predicts: ``epsilon``, ``sample`` (the image) or ``v_prediction`` (either velocity).
        """
        a, b = (of_level.float().view(-1, *[1] * (noise.ndim - 1)) for of_level in (signal, spread))
        sigma = b / a
        own_sigma = torch.where(sigma >= self.sigma, self.sigma, 0.0)
        k = (own_sigma / sigma).square()
        fresh, own = noise.float(), own.float()
        mixed = k.sqrt() * own + (1 - k).sqrt() * fresh
        apart = (1 - k).sqrt() * own - k.sqrt() * fresh
        unit = {"epsilon": -a / b, "sample": torch.ones_like(a), "v_prediction": -1 / b}[predicts]
        return Mixture(mixed.to(noise.dtype), 1 - k, unit * own_sigma * (1 - k).sqrt() * apart)
