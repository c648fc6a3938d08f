"""The objective of flow matching, as Stable Diffusion 3 is trained (Esser et al. 2024, arXiv:2403.03206)."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler

from .base import Tensors
from .latent_objective import DrawnLatents, Draws, Encoded, LatentObjective
from .text_to_image import layout_of

SCHEMES = ("logit_normal", "mode", "sigma_sqrt", "cosmap", "none")


@dataclass(frozen=True)
class FlowDrawn(DrawnLatents):
    """``DrawnLatents`` with levels and steps, both int64 (B,).

    levels: where in [0, num_levels) the uniform draw lies that the density of noise levels was made from; every level
    is as likely as any other. steps: the place in the scheduler's tables, the noisiest first.
    """

    levels: torch.Tensor
    steps: torch.Tensor


@dataclass(frozen=True)
class LevelDensity:
    """How noise levels are drawn: a density over u in [0, 1), of which 0 is pure noise.

    ``logit_normal`` (eq. 19 of the paper): u = sigmoid(m + s n), n standard normal. ``mode`` (eq. 20), from v uniform:
    u = 1 - v - scale (cos^2(pi v / 2) - 1 + v). Otherwise u is uniform.
    """

    scheme: str = "logit_normal"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29

    def draw(self, number: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """(v, u), both (number,): v uniform in [0, 1), and u, which is a function of v."""
        if self.scheme == "logit_normal":
            normal = torch.empty(number, device=device).normal_(self.logit_mean, self.logit_std)
            return torch.special.ndtr((normal - self.logit_mean) / self.logit_std), torch.sigmoid(normal)
        uniform = torch.rand(number, device=device)
        return uniform, self._of_uniform(uniform)

    def of(self, uniform: torch.Tensor) -> torch.Tensor:
        """u from v: what ``draw`` makes of the same uniform draw."""
        if self.scheme == "logit_normal":
            return torch.sigmoid(self.logit_mean + self.logit_std * torch.special.ndtri(uniform))
        return self._of_uniform(uniform)

    def _of_uniform(self, uniform):
        if self.scheme != "mode":
            return uniform
        return 1 - uniform - self.mode_scale * (torch.cos(math.pi * uniform / 2) ** 2 - 1 + uniform)


class FlowMatchingObjective(LatentObjective):
    """Rectified flow: from z = (1 - s) x + s e, with latents x, noise e and noise level s, predict e - x.

    Args:
        vae, encode_text, dtype, more: see ``LatentObjective``. A condition has ``encoder_hidden_states`` and
            ``pooled_projections``.
        scheduler: with a table of noise levels s, which has its shift.
        density: of the noise levels; its scheme also says the loss weights.
        precondition_outputs: weigh losses by s^2, which is the error of the image x = z - s v.
    """

    EMBEDDINGS = ("encoder_hidden_states", "pooled_projections")
    prediction_type = "v_prediction"
    scheduler: FlowMatchEulerDiscreteScheduler

    def __init__(
        self,
        vae: AutoencoderKL,
        encode_text: Callable[[Tensors], Tensors],
        scheduler: FlowMatchEulerDiscreteScheduler,
        dtype: torch.dtype = torch.float32,
        density: LevelDensity | None = None,
        precondition_outputs: bool = True,
        **more: Any,
    ):
        super().__init__(vae, encode_text, scheduler, dtype, **more)
        self.density = density or LevelDensity()
        self.precondition_outputs = precondition_outputs
        # On the device once: a copy from the host at each step would wait for it.
        self.sigma_table, self.timestep_table = scheduler.sigmas.to(vae.device), scheduler.timesteps.to(vae.device)

    @property
    def level_name(self) -> str:
        return f"noise level (0: {'least' if self.density.scheme == 'mode' else 'most'} noise)"

    @torch.no_grad()
    def draw(self, encoded: Encoded) -> FlowDrawn:
        """Draw noise and noise levels, in the order of Diffusers' script for Stable Diffusion 3."""
        draws = Draws(encoded.mean, encoded.share)
        posterior_noise = self.posterior_noise(draws, encoded.mean)
        latents = self.latents(encoded.mean, encoded.std, posterior_noise)
        noise = draws.normal(*latents.shape[1:], dtype=latents.dtype, layout=layout_of(latents))
        uniform, density = self.density.draw(draws.batch_rows, noise.device)
        levels, steps = (self._index(values)[draws.rows] for values in (uniform, density))
        condition = self.noisy_condition(encoded.condition, draws)
        return FlowDrawn(latents, posterior_noise, noise, condition, levels, steps, own=encoded.own)

    def _index(self, values):
        """The place in a table of ``num_levels`` that numbers in [0, 1] point to."""
        return (values * self.num_levels).long().clamp(0, self.num_levels - 1)

    def at_levels(self, drawn: FlowDrawn, levels: torch.Tensor) -> FlowDrawn:
        levels = levels.to(drawn.levels.device)
        middle = (levels.double() + 0.5) / self.num_levels
        return replace(drawn, levels=levels, steps=self._index(self.density.of(middle)))

    def sigmas(self, drawn: FlowDrawn) -> torch.Tensor:
        """The noise level s of each sample, float32 (B,) in (0, 1]."""
        return self.sigma_table[drawn.steps]

    def scales(self, drawn: FlowDrawn) -> tuple[torch.Tensor, torch.Tensor]:
        sigmas = self.sigmas(drawn)
        return 1 - sigmas, sigmas

    def noisy_and_target(self, model: Callable, drawn: FlowDrawn) -> tuple[torch.Tensor, torch.Tensor]:
        sigmas = self.sigmas(drawn).view(-1, 1, 1, 1).to(drawn.latents.dtype)
        return (1 - sigmas) * drawn.latents + sigmas * drawn.noise, drawn.noise - drawn.latents

    def call(self, model: Callable, noisy: torch.Tensor, drawn: FlowDrawn, condition: Tensors) -> torch.Tensor:
        timesteps = self.timestep_table[drawn.steps]
        return model(hidden_states=noisy, timestep=timesteps, **condition, return_dict=False)[0]

    def denoised(self, model: Callable, noisy: torch.Tensor, drawn: FlowDrawn) -> torch.Tensor:
        """x = z - s v."""
        drawn = replace(drawn, condition=self.embedded(drawn.condition))
        velocity = self.call(model, noisy.to(self.dtype), drawn, drawn.condition).float()
        return noisy - self.sigmas(drawn).view(-1, 1, 1, 1) * velocity

    def weights(self, drawn: FlowDrawn) -> torch.Tensor | None:
        """Weights (B,) of the scheme, s^-2 (``sigma_sqrt``) or 2 / (pi (1 - 2 s + 2 s^2)) (``cosmap``), times s^2 with
        ``precondition_outputs``; None if all are 1.
        """
        sigmas = self.sigmas(drawn)
        weights = sigmas.square() if self.precondition_outputs else torch.ones_like(sigmas)
        if self.density.scheme == "sigma_sqrt":
            return weights / sigmas.square()
        if self.density.scheme == "cosmap":
            return weights * 2 / (math.pi * (1 - 2 * sigmas + 2 * sigmas.square()))
        return weights if self.precondition_outputs else None
