"""The objective of models of pixels that predict the noise or the image."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from diffusers import DDPMScheduler

from ..data import Batch
from .ambient import Ambient, Counted, with_mask
from .base import Objective, Tensors
from .draws import DrawnBatch, Draws
from .noisy_data import NoisyData
from .rules import Rule, mean_squared_error, squared_errors


@dataclass(frozen=True)
class Shown:
    """What is the same at each visit of a batch's images.

    images (B, 3, H, W); condition: named tensors (B, ...); share: see ``Batch``; own: see ``DrawnBatch``.
    """

    images: torch.Tensor
    condition: Tensors
    share: tuple[slice, int] | None = None
    own: Tensors = field(default_factory=dict)


@dataclass(frozen=True)
class DrawnImages(DrawnBatch):
    """One batch with everything random drawn: images and noise (B, 3, H, W), timesteps (B,), condition: named tensors
    (B, ...).
    """

    images: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    condition: Tensors

    @property
    def levels(self) -> torch.Tensor:
        """The noise levels, over which the memory bank has its entries: here the timesteps."""
        return self.timesteps

    @property
    def clean(self) -> torch.Tensor:
        return self.images


class PixelObjective(Objective):
    """The objective of Diffusers' ``train_unconditional.py``: denoise images, perhaps told their class.

    With prediction type ``sample`` the loss at a timestep is weighted by its ratio of signal to noise,
    alpha_bar / (1 - alpha_bar), which depends on the timestep only.

    Args:
        scheduler: with prediction type ``epsilon`` or ``sample``.
        dtype: of the denoiser's input.
        noisy_data: ``NoisyData``; None is off.
        ambient: ``Ambient``; None is off.
    """

    def __init__(
        self,
        scheduler: DDPMScheduler,
        dtype: torch.dtype = torch.float32,
        noisy_data: NoisyData | None = None,
        ambient: Ambient | None = None,
    ):
        self.scheduler, self.dtype, self.noisy_data, self.ambient = scheduler, dtype, noisy_data, ambient

    def plain(self) -> "PixelObjective":
        plain = copy.copy(self)
        plain.noisy_data = plain.ambient = None
        return plain

    @property
    def num_levels(self) -> int:
        return self.scheduler.config.num_train_timesteps

    @property
    def predicts_images(self) -> bool:
        return self.scheduler.config.prediction_type == "sample"

    def encode_images(self, images: torch.Tensor) -> Tensors:
        return {"images": images.to(self.dtype)}

    def encode_inputs(self, inputs: Tensors) -> Tensors:
        return inputs

    def encode(self, batch: Batch) -> Shown:
        images = batch.images.to(self.dtype)
        own: Tensors = {}
        if self.noisy_data is not None and batch.ids is not None:
            own["noise"] = self.noisy_data.own_noise(batch.ids, images.shape[1:])
        if self.ambient is not None and batch.ids is not None:
            own |= self.ambient.masks(batch.ids, images.shape[2:])
        own = {name: tensor.to(images.device) for name, tensor in own.items()}
        return Shown(images, batch.inputs | batch.told, batch.share, own)

    @torch.no_grad()
    def draw(self, encoded: Shown) -> DrawnImages:
        """Draw noise and timesteps, in the official script's order."""
        draws = Draws(encoded.images, encoded.share)
        noise = draws.normal(*encoded.images.shape[1:], dtype=encoded.images.dtype)
        timesteps = torch.randint(0, self.num_levels, (draws.batch_rows,), device=draws.device)[draws.rows]
        return DrawnImages(encoded.images, noise, timesteps, encoded.condition, own=encoded.own)

    def at_levels(self, drawn: DrawnImages, levels: torch.Tensor) -> DrawnImages:
        return replace(drawn, timesteps=levels.to(drawn.timesteps.device))

    def with_images(self, drawn: DrawnImages, rows: Sequence[int], images: torch.Tensor) -> DrawnImages:
        changed = drawn.images.clone()
        changed[rows] = images.to(self.dtype)
        return replace(drawn, images=changed)

    def predict(self, model: Callable, drawn: DrawnImages) -> tuple[torch.Tensor, torch.Tensor, Rule | None]:
        """One forward of the model. Returns prediction and target, both (B, 3, H, W), and how they are compared if not
        by their squared error.
        """
        rule: Any = None
        noise, shown = drawn.noise, drawn.own.get("shown")
        if "noise" in drawn.own:
            rule = self._mixture(drawn)
            noise = rule.noise
        noisy = self.scheduler.add_noise(drawn.images, noise, drawn.timesteps)
        target = drawn.images if self.predicts_images else noise
        if shown is not None:
            noisy, rule = noisy * shown.to(noisy.dtype), Counted(drawn.own["counted"])
            if not self.predicts_images:
                signal, spread = (scale[:, None, None, None] for scale in self.scales(drawn))
                target = torch.where(shown > 0, noise, -signal / spread * drawn.images)
        prediction = model(with_mask(model, noisy, shown), drawn.timesteps, **drawn.condition, return_dict=False)[0]
        return prediction, target, rule

    @property
    def predicts_noise(self) -> bool:
        return True

    def noise_in(self, model: Callable, drawn: DrawnImages, noise: torch.Tensor | None = None) -> torch.Tensor:
        """From an image x in z = a x + b e it is (z - a x) / b."""
        shown = drawn.images if noise is None else self.scheduler.add_noise(drawn.images, noise, drawn.timesteps)
        prediction = model(with_mask(model, shown), drawn.timesteps, **drawn.condition, return_dict=False)[0].float()
        if not self.predicts_images:
            return prediction
        signal, spread = (scale[:, None, None, None] for scale in self.scales(drawn))
        return (shown - signal * prediction) / spread

    def denoised(self, model: Callable, noisy: torch.Tensor, drawn: DrawnImages) -> torch.Tensor:
        """Within the range that the scheduler clips images to when it draws, if it does."""
        prediction = model(with_mask(model, noisy), drawn.timesteps, **drawn.condition, return_dict=False)[0].float()
        if not self.predicts_images:
            signal, spread = (scale[:, None, None, None] for scale in self.scales(drawn))
            prediction = (noisy - spread * prediction) / signal
        most = self.scheduler.config.clip_sample_range
        return prediction.clamp(-most, most) if self.scheduler.config.clip_sample else prediction

    def decoded(self, clean: torch.Tensor) -> torch.Tensor:
        return clean

    def _mixture(self, drawn):
        assert self.noisy_data is not None
        kind = self.scheduler.config.prediction_type
        return self.noisy_data.mix(drawn.noise, drawn.own["noise"], *self.scales(drawn), kind)

    def scales(self, drawn: DrawnImages) -> tuple[torch.Tensor, torch.Tensor]:
        alpha_bar = self._alpha_bar(drawn)
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def _alpha_bar(self, drawn):
        """(B,) float32."""
        return self.scheduler.alphas_cumprod.to(drawn.timesteps.device)[drawn.timesteps].float()

    def losses(self, model: Callable, drawn: DrawnImages) -> torch.Tensor:
        """Unweighted mean squared error of each sample (eq. 2): (B,) float32."""
        return squared_errors(*self.predict(model, drawn)).flatten(1).mean(dim=1)

    def plain_loss(self, model: Callable, drawn: DrawnImages) -> torch.Tensor:
        """The official script's scalar loss, in its own order of operations: the same bits, hence not
        ``losses().mean()``.
        """
        compared, weights = self.predict(model, drawn), self.weights(drawn)
        if weights is None:
            return mean_squared_error(*compared)
        weights = weights[:, None, None, None].expand(len(drawn), 1, 1, 1)
        return (weights * squared_errors(*compared)).mean()

    def weights(self, drawn: Any) -> torch.Tensor | None:
        if not self.predicts_images:
            return None
        alpha_bar = self._alpha_bar(drawn)
        return alpha_bar / (1 - alpha_bar)
