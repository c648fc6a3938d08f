"""Objectives on the latents of a VAE: what models that predict noise and models of flow matching have in common."""

import copy
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from ..data import Batch
from .base import TOKEN_IDS, Objective, Tensors
from .draws import DrawnBatch, Draws
from .noisy_data import Mixture, NoisyData
from .rules import mean_squared_error, squared_errors


@dataclass(frozen=True)
class Encoded:
    """What is the same at each visit of a batch's images.

    mean, std (B, C, h, w): of the VAE's posterior; condition: named tensors (B, ...); share: see ``Batch``; own: see
    ``DrawnBatch``.
    """

    mean: torch.Tensor
    std: torch.Tensor
    condition: Tensors
    share: tuple[slice, int] | None = None
    own: Tensors = field(default_factory=dict)


@dataclass(frozen=True)
class DrawnLatents(DrawnBatch):
    """One batch with everything random drawn; the first dimension of each tensor is the sample.

    latents (B, C, h, w): scaled VAE latents; posterior_noise: the draw that made them from the VAE's posterior; noise:
    the target noise; condition: named tensors (B, ...). Subclasses add the noise level.
    """

    latents: torch.Tensor
    posterior_noise: torch.Tensor
    noise: torch.Tensor
    condition: Tensors

    @property
    def clean(self) -> torch.Tensor:
        return self.latents


class LatentObjective(Objective):
    """The part of an objective that has to do with latents and conditions.

    A condition is a flat dict of named tensors. ``call`` makes the denoiser's arguments of it.

    Args:
        vae: frozen, on the device. Images are encoded in its precision.
        encode_text: a batch's ``inputs`` -> its condition.
        scheduler: the base's, with its tables of noise levels.
        dtype: of the denoiser's input.
        embedding_noise: scale of Gaussian noise on the caption's embedding, 0 is off (GN, Somepalli et al. 2023).
        unconditional: what captions are compared with by ``losses_and_magnitudes``, which needs it: a condition, or
            token ids, tensors (1, ...).
        stored_latents: latents are float32 and contiguous, as the official script of Stable Diffusion XL reads them
            from its cache; otherwise they have ``dtype`` and the memory layout that the VAE gives.
        noisy_data: ``NoisyData``, on latents; None is off.
        trains_text: see ``Objective``; conditions then have token ids, which each forward encodes.
    """

    EMBEDDINGS: ClassVar[tuple[str, ...]] = ("encoder_hidden_states",)  # of the caption: of tokens, then pooled

    def __init__(
        self,
        vae: AutoencoderKL,
        encode_text: Callable[[Tensors], Tensors],
        scheduler: Any,
        dtype: torch.dtype = torch.float32,
        embedding_noise: float = 0.0,
        unconditional: Tensors | None = None,
        stored_latents: bool = False,
        trains_text: bool = False,
        noisy_data: NoisyData | None = None,
    ):
        self.vae = vae
        self.encode_text = encode_text
        self.scheduler = scheduler
        self.dtype = dtype
        self.embedding_noise = embedding_noise
        self.unconditional = unconditional
        self.stored_latents = stored_latents
        self.trains_text = trains_text
        self.noisy_data = noisy_data

    @property
    def num_levels(self) -> int:
        return self.scheduler.config.num_train_timesteps

    def plain(self) -> "LatentObjective":
        plain = copy.copy(self)
        plain.embedding_noise, plain.noisy_data = 0.0, None
        return plain

    @torch.no_grad()
    def encode(self, batch: Batch) -> Encoded:
        moments = batch.encoded_images or self.encode_images(batch.images)
        posterior = DiagonalGaussianDistribution(moments["moments"])
        condition = batch.encoded_inputs or self.encode_inputs(batch.inputs)
        own = {}
        if self.noisy_data is not None and batch.ids is not None:
            own["noise"] = self.noisy_data.own_noise(batch.ids, posterior.mean.shape[1:]).to(posterior.mean.device)
        return Encoded(posterior.mean, posterior.std, condition | batch.told, batch.share, own)

    @torch.no_grad()
    def encode_images(self, images: torch.Tensor) -> Tensors:
        """``moments`` (B, 2C, h, w): mean and logarithm of the variance of the VAE's posterior."""
        return {"moments": self.vae.encode(images.to(self.vae.dtype)).latent_dist.parameters}

    @torch.no_grad()
    def encode_inputs(self, inputs: Tensors) -> Tensors:
        return inputs if self.trains_text else self.encode_text(inputs)

    def embedded(self, condition: Tensors) -> Tensors:
        """A condition as ``call`` takes it: token ids, which it has with ``trains_text``, are encoded now, with
        gradient.
        """
        if not any(name.startswith(TOKEN_IDS) for name in condition):
            return condition
        others = {name: tensor for name, tensor in condition.items() if not name.startswith(TOKEN_IDS)}
        return self.encode_text(condition) | others

    def posterior_noise(self, draws: Draws, mean: torch.Tensor) -> torch.Tensor:
        """The draw that picks latents from the VAE's posterior, like ``mean`` (B, C, h, w)."""
        return draws.normal(*mean.shape[1:], dtype=mean.dtype)

    def latents(self, mean: torch.Tensor, std: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Scaled latents (B, C, h, w) from the VAE's posterior and a draw of standard normal noise."""
        latents = (mean + std * noise - (self.vae.config.shift_factor or 0)) * self.vae.config.scaling_factor
        return latents.float().contiguous() if self.stored_latents else latents.to(self.dtype)

    def noisy_condition(self, condition: Tensors, draws: Draws) -> Tensors:
        """A condition with noise on the caption's embeddings (GN), if that is on; not on the zeros that fill up those
        of Stable Diffusion 3.
        """
        noisy = {}
        for name in self.EMBEDDINGS if self.embedding_noise else ():
            embedding = condition[name]
            noise = draws.normal(*embedding.shape[1:], dtype=embedding.dtype)
            noisy[name] = torch.where(embedding == 0, embedding, embedding + self.embedding_noise * noise)
        return condition | noisy

    @torch.no_grad()
    def with_images(self, drawn: Any, rows: Sequence[int], images: torch.Tensor) -> Any:
        posterior = self.vae.encode(images.to(self.vae.dtype)).latent_dist
        latents = drawn.latents.clone()
        latents[rows] = self.latents(posterior.mean, posterior.std, drawn.posterior_noise[rows])
        return replace(drawn, latents=latents)

    @torch.no_grad()
    def decoded(self, clean: torch.Tensor) -> torch.Tensor:
        vae = self.vae.config
        return self.vae.decode((clean / vae.scaling_factor + (vae.shift_factor or 0)).to(self.vae.dtype)).sample.float()

    @abstractmethod
    def noisy_and_target(self, model: Callable, drawn: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """What the model is shown and what it should say: noisy latents and target, both (B, C, h, w)."""

    @abstractmethod
    def call(self, model: Callable, noisy: torch.Tensor, drawn: Any, condition: Tensors) -> torch.Tensor:
        """The model's prediction (B, C, h, w), to compare with the target."""

    @property
    @abstractmethod
    def prediction_type(self) -> str:
        """``epsilon``, ``v_prediction`` or ``sample``."""

    def with_noise(self, drawn: Any, noise: torch.Tensor) -> Any:
        """``drawn`` with this noise in the place of its own."""
        return replace(drawn, noise=noise)

    def prepare(self, drawn: Any) -> tuple[Any, Mixture | None]:
        """``drawn`` as a forward takes it, with captions as embeddings, and what ``NoisyData`` makes of the loss."""
        drawn = replace(drawn, condition=self.embedded(drawn.condition))
        if "noise" not in drawn.own:
            return drawn, None
        assert self.noisy_data is not None
        mixture = self.noisy_data.mix(drawn.noise, drawn.own["noise"], *self.scales(drawn), self.prediction_type)
        return self.with_noise(drawn, mixture.noise), mixture

    def predict(self, model: Callable, drawn: Any) -> tuple[torch.Tensor, torch.Tensor, Mixture | None]:
        """One forward of the model. Returns prediction and target, both (B, C, h, w), and what ``NoisyData`` makes of
        the loss.
        """
        drawn, mixture = self.prepare(drawn)
        noisy, target = self.noisy_and_target(model, drawn)
        return self.call(model, noisy, drawn, drawn.condition), target, mixture

    def losses(self, model: Callable, drawn: Any) -> torch.Tensor:
        """Unweighted mean squared error of each sample (eq. 2): (B,) float32."""
        return _of_samples(squared_errors(*self.predict(model, drawn)))

    def losses_and_magnitudes(self, model: Callable, drawn: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """``losses``, and the magnitude of the text-conditional noise || eps(z_t, c) - eps(z_t, "") ||_2 of each
        sample (Wen et al. 2024), both (B,) float32, from two forwards. No gradient flows through the magnitudes.

        The norm is over all C h w elements, so that it grows with the resolution. Predictions are the model's output as
        it is, noise or velocity, as in the authors' code. What the model is told besides the caption stays.
        """
        if self.unconditional is None:
            raise ValueError("losses_and_magnitudes needs `unconditional`")
        drawn, mixture = self.prepare(drawn)
        noisy, target = self.noisy_and_target(model, drawn)
        prediction = self.call(model, noisy, drawn, drawn.condition)
        with torch.no_grad():
            nothing = drawn.told(self.embedded(self.unconditional))
            unconditional = self.call(model, noisy, nothing, nothing.condition)
            magnitudes = (prediction.float() - unconditional.float()).flatten(1).norm(dim=1)
        return _of_samples(squared_errors(prediction, target, mixture)), magnitudes

    def plain_loss(self, model: Callable, drawn: Any) -> torch.Tensor:
        """The official script's scalar loss, in its own order of operations: the same bits, hence not
        ``losses().mean()``.
        """
        compared, weights = self.predict(model, drawn), self.weights(drawn)
        if weights is None:
            return mean_squared_error(*compared)
        losses = squared_errors(*compared)
        return (losses.mean(dim=list(range(1, losses.ndim))) * weights).mean()


def _of_samples(errors):
    return errors.flatten(1).mean(dim=1)
