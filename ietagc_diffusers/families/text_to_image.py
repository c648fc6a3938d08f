"""The objective of latent text-to-image models that predict noise, velocity or the image."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, DDPMScheduler
from diffusers.training_utils import compute_dream_and_update_latents, compute_snr

from ..errors import UsageError
from .base import Tensors
from .latent_objective import DrawnLatents, Draws, Encoded, LatentObjective


@dataclass(frozen=True)
class Drawn(DrawnLatents):
    """``DrawnLatents`` with added_noise, what is added to the latents (differs from ``noise`` under input
    perturbation), and timesteps (B,).
    """

    added_noise: torch.Tensor
    timesteps: torch.Tensor

    @property
    def levels(self) -> torch.Tensor:
        """The noise levels, over which the memory bank has its entries: here the timesteps."""
        return self.timesteps


def biased_timesteps(
    num_timesteps: int, strategy: str, multiplier: float = 1.0, begin: int = 0, end: int = 1000, portion: float = 0.25
) -> torch.Tensor | None:
    """How likely each timestep is drawn, float32 (num_timesteps,) with the sum 1, by the official script of Stable
    Diffusion XL; None if all are alike.

    ``multiplier`` times as likely are the first or last share ``portion`` of them (``earlier``, ``later``), or those
    from ``begin`` up to ``end`` (``range``). Raises ``UsageError``.
    """
    if strategy == "none":
        return None
    if strategy == "range" and not 0 <= begin < end <= num_timesteps:
        raise UsageError(
            f"`timestep_bias_begin` {begin} and `timestep_bias_end` {end}: must be a range within 0 to {num_timesteps}"
        )
    number = int(portion * num_timesteps)
    first = {"earlier": 0, "later": num_timesteps - number, "range": begin}[strategy]
    last = end if strategy == "range" else first + number
    weights = torch.ones(num_timesteps)
    weights[first:last] *= multiplier
    return weights / weights.sum()


class TextToImageObjective(LatentObjective):
    """The objective of Diffusers' ``train_text_to_image.py``: denoise VAE latents given the caption.

    A condition is keyed by the denoiser's own arguments (``encoder_hidden_states``, ...).

    Args:
        vae, encode_text, dtype, more: see ``LatentObjective``.
        scheduler: with a prediction type of ``PREDICTIONS``.
        noise_offset, input_perturbation: scales, 0 is off.
        snr_gamma: min-SNR weighting, None is off.
        dream_detail_preservation: DREAM's p, None is off.
        timestep_weights: see ``biased_timesteps``.
    """

    PREDICTIONS: ClassVar[tuple[str, ...]] = ("epsilon", "v_prediction")
    scheduler: DDPMScheduler

    def __init__(
        self,
        vae: AutoencoderKL,
        encode_text: Callable[[Tensors], Tensors],
        scheduler: DDPMScheduler,
        dtype: torch.dtype = torch.float32,
        noise_offset: float = 0.0,
        input_perturbation: float = 0.0,
        snr_gamma: float | None = None,
        dream_detail_preservation: float | None = None,
        timestep_weights: torch.Tensor | None = None,
        **more: Any,
    ):
        super().__init__(vae, encode_text, scheduler, dtype, **more)
        if self.prediction_type not in self.PREDICTIONS:
            *some, last = self.PREDICTIONS
            raise UsageError(f"`prediction_type` {self.prediction_type}: must be {', '.join(some)} or {last}")
        if dream_detail_preservation is not None and self.prediction_type != "epsilon":
            raise UsageError(
                f"`dream_training` works only with prediction type epsilon; this model's is {self.prediction_type}"
            )
        self.noise_offset = noise_offset
        self.input_perturbation = input_perturbation
        self.snr_gamma = snr_gamma
        self.dream_detail_preservation = dream_detail_preservation
        self.timestep_weights = None if timestep_weights is None else timestep_weights.to(vae.device)

    def plain(self) -> "TextToImageObjective":
        plain: Any = super().plain()
        plain.noise_offset = plain.input_perturbation = 0.0
        plain.dream_detail_preservation = None
        return plain

    @property
    def prediction_type(self) -> str:
        return self.scheduler.config.prediction_type

    @torch.no_grad()
    def draw(self, encoded: Encoded) -> Drawn:
        """Draw noise and timesteps in the official script's order, and then what it does not have.

        A VAE of the real shape gives latents whose channels lie last in memory, and the official script draws their
        noise by ``randn_like``, which fills memory in its order: so is noise drawn here.
        """
        draws, shape = Draws(encoded.mean, encoded.share), encoded.mean.shape[1:]
        posterior_noise = self.posterior_noise(draws, encoded.mean)
        latents = self.latents(encoded.mean, encoded.std, posterior_noise)
        layout, dtype = layout_of(latents), latents.dtype
        noise = draws.normal(*shape, dtype=dtype, layout=layout)
        if self.noise_offset:
            noise = noise + (self.noise_offset * draws.normal(shape[0], 1, 1)).to(dtype)
        added_noise = noise
        if self.input_perturbation:
            added_noise = noise + self.input_perturbation * draws.normal(*shape, dtype=dtype, layout=layout)
        timesteps = self._timesteps(draws.batch_rows, noise.device)[draws.rows]
        condition = self.noisy_condition(encoded.condition, draws)
        return Drawn(latents, posterior_noise, noise, condition, added_noise, timesteps, own=encoded.own)

    def _timesteps(self, number, device):
        if self.timestep_weights is None:
            return torch.randint(0, self.num_levels, (number,), device=device)
        return torch.multinomial(self.timestep_weights, number, replacement=True)

    def at_levels(self, drawn: Drawn, levels: torch.Tensor) -> Drawn:
        return replace(drawn, timesteps=levels.to(drawn.timesteps.device))

    def scales(self, drawn: Drawn) -> tuple[torch.Tensor, torch.Tensor]:
        alpha_bar = self.scheduler.alphas_cumprod.to(drawn.timesteps.device)[drawn.timesteps]
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def with_noise(self, drawn: Drawn, noise: torch.Tensor) -> Drawn:
        return replace(drawn, noise=noise, added_noise=noise)

    def noisy_and_target(self, model: Callable, drawn: Drawn) -> tuple[torch.Tensor, torch.Tensor]:
        noisy = self.scheduler.add_noise(drawn.latents, drawn.added_noise, drawn.timesteps).to(self.dtype)
        target = drawn.noise
        if self.prediction_type == "v_prediction":
            target = self.scheduler.get_velocity(drawn.latents, drawn.noise, drawn.timesteps)
        elif self.prediction_type == "sample":
            target = drawn.latents
        if self.dream_detail_preservation is not None:
            noisy, target = compute_dream_and_update_latents(
                model,
                self.scheduler,
                drawn.timesteps,
                drawn.noise,
                noisy,
                target,
                drawn.condition["encoder_hidden_states"],
                self.dream_detail_preservation,
            )
        return noisy, target

    def call(self, model: Callable, noisy: torch.Tensor, drawn: Drawn, condition: Tensors) -> torch.Tensor:
        prediction = model(noisy, drawn.timesteps, **self.arguments(condition), return_dict=False)[0]
        # The official script's rule: a model of this kind says the image and the noise together.
        return prediction - drawn.noise if self.prediction_type == "sample" else prediction

    @property
    def predicts_noise(self) -> bool:
        """Not of a model that says image and noise together, see ``call``."""
        return self.prediction_type != "sample"

    def noise_in(self, model: Callable, drawn: Drawn, noise: torch.Tensor | None = None) -> torch.Tensor:
        """From a velocity v in z = a x + b e, which is a e - b x, it is a v + b z."""
        condition = self.embedded(drawn.condition)
        shown = drawn.latents if noise is None else self.scheduler.add_noise(drawn.latents, noise, drawn.timesteps)
        prediction = self.call(model, shown.to(self.dtype), drawn, condition).float()
        if self.prediction_type == "epsilon":
            return prediction
        signal, spread = (scale[:, None, None, None] for scale in self.scales(drawn))
        return signal * prediction + spread * shown

    def denoised(self, model: Callable, noisy: torch.Tensor, drawn: Drawn) -> torch.Tensor:
        """From a velocity v in z = a x + b e, which is a e - b x, it is a z - b v."""
        drawn = replace(drawn, condition=self.embedded(drawn.condition))
        prediction = self.call(model, noisy.to(self.dtype), drawn, drawn.condition).float()
        signal, spread = (scale[:, None, None, None] for scale in self.scales(drawn))
        if self.prediction_type == "epsilon":
            return (noisy - spread * prediction) / signal
        # What pipelines take for the image, where a model of the kind says it: its output as it is.
        return prediction + drawn.noise if self.prediction_type == "sample" else signal * noisy - spread * prediction

    def arguments(self, condition: Tensors) -> dict[str, Any]:
        """The denoiser's keyword arguments that a condition stands for: here its own."""
        return condition

    def weights(self, drawn: Drawn) -> torch.Tensor | None:
        """min-SNR weights (B,), or None."""
        if self.snr_gamma is None:
            return None
        snr = compute_snr(self.scheduler, drawn.timesteps)
        clamped = torch.stack([snr, self.snr_gamma * torch.ones_like(drawn.timesteps)], dim=1).min(dim=1)[0]
        if self.prediction_type == "sample":
            return clamped
        return clamped / (snr if self.prediction_type == "epsilon" else snr + 1)


def layout_of(latents: torch.Tensor) -> torch.memory_format:
    """Whether latents (B, C, h, w) have their channels last in memory."""
    last = not latents.is_contiguous() and latents.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format
