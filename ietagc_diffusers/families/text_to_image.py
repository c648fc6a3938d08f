"""The objective of latent text-to-image models that predict noise or velocity."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.training_utils import compute_dream_and_update_latents, compute_snr

from ..data import Batch
from ..errors import UsageError
from .base import Objective

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Encoded:
    """What is the same at each visit of a batch's images.

    mean, std (B, C, h, w): of the VAE's posterior; condition: named tensors (B, ...); share: see ``Batch``.
    """

    mean: torch.Tensor
    std: torch.Tensor
    condition: Tensors
    share: tuple[slice, int] | None = None


@dataclass(frozen=True)
class Drawn:
    """One batch with everything random drawn; the first dimension of each tensor is the sample.

    latents (B, C, h, w): scaled VAE latents; posterior_noise: the draw that made them from the VAE's posterior; noise:
    the target noise; added_noise: what is added to the latents (differs from ``noise`` under input perturbation);
    timesteps (B,); condition: named tensors (B, ...).
    """

    latents: torch.Tensor
    posterior_noise: torch.Tensor
    noise: torch.Tensor
    added_noise: torch.Tensor
    timesteps: torch.Tensor
    condition: Tensors

    @property
    def levels(self) -> torch.Tensor:
        """The noise levels, over which the memory bank has its entries: here the timesteps."""
        return self.timesteps

    def __getitem__(self, rows: Any) -> "Drawn":
        return self._map(lambda tensor: tensor[rows])

    def __len__(self) -> int:
        return len(self.timesteps)

    def to(self, device: torch.device | str) -> "Drawn":
        return self._map(lambda tensor: tensor.to(device))

    def _map(self, change):
        changed = {f.name: change(getattr(self, f.name)) for f in fields(self) if f.name != "condition"}
        return Drawn(**changed, condition={name: change(tensor) for name, tensor in self.condition.items()})


class TextToImageObjective(Objective):
    """The objective of Diffusers' ``train_text_to_image.py``: denoise VAE latents given the caption.

    A condition is a dict of named tensors, keyed by the denoiser's own arguments (``encoder_hidden_states``, ...).

    Args:
        vae: frozen, on the device, in ``dtype``.
        encode_text: a batch's ``inputs`` -> its condition.
        scheduler: with prediction type ``epsilon`` or ``v_prediction``.
        dtype: of images and latents.
        noise_offset, input_perturbation: scales, 0 is off.
        snr_gamma: min-SNR weighting, None is off.
        dream_detail_preservation: DREAM's p, None is off.
        embedding_noise: scale of Gaussian noise on the caption's embedding, 0 is off (GN, Somepalli et al. 2023).
        unconditional: what ``encode_inputs`` gives of the empty caption, tensors (1, ...); ``losses_and_magnitudes``
            needs it.
        trains_text: see ``Objective``; conditions are then a batch's ``inputs``, which each forward encodes.
    """

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
        embedding_noise: float = 0.0,
        unconditional: Tensors | None = None,
        trains_text: bool = False,
    ):
        prediction_type = scheduler.config.prediction_type
        if prediction_type not in ("epsilon", "v_prediction"):
            raise UsageError(f"`prediction_type` {prediction_type}: must be epsilon or v_prediction")
        if dream_detail_preservation is not None and prediction_type != "epsilon":
            raise UsageError(
                f"`dream_training` works only with prediction type epsilon; this model's is {prediction_type}"
            )
        self.vae = vae
        self.encode_text = encode_text
        self.scheduler = scheduler
        self.dtype = dtype
        self.noise_offset = noise_offset
        self.input_perturbation = input_perturbation
        self.snr_gamma = snr_gamma
        self.dream_detail_preservation = dream_detail_preservation
        self.embedding_noise = embedding_noise
        self.unconditional = unconditional
        self.trains_text = trains_text

    @property
    def num_levels(self) -> int:
        return self.scheduler.config.num_train_timesteps

    @torch.no_grad()
    def encode(self, batch: Batch) -> Encoded:
        moments = batch.encoded_images or self.encode_images(batch.images)
        posterior = DiagonalGaussianDistribution(moments["moments"])
        condition = batch.encoded_inputs or self.encode_inputs(batch.inputs)
        return Encoded(posterior.mean, posterior.std, condition, batch.share)

    @torch.no_grad()
    def encode_images(self, images: torch.Tensor) -> Tensors:
        """``moments`` (B, 2C, h, w): mean and logarithm of the variance of the VAE's posterior."""
        return {"moments": self.vae.encode(images.to(self.dtype)).latent_dist.parameters}

    @torch.no_grad()
    def encode_inputs(self, inputs: Tensors) -> Tensors:
        return inputs if self.trains_text else self.encode_text(inputs)

    def _told(self, condition: Tensors) -> Tensors:
        """A condition as the denoiser takes it."""
        return self.encode_text(condition) if self.trains_text else condition

    @torch.no_grad()
    def draw(self, encoded: Encoded) -> Drawn:
        """Draw noise and timesteps in the official script's order, and then what it does not have.

        A VAE of the real shape gives latents whose channels lie last in memory, and the official script draws their
        noise by ``randn_like``, which fills memory in its order: so is noise drawn here.
        """
        mean = encoded.mean
        rows, batch_rows = encoded.share or (slice(None), len(mean))

        def randn(*shape, dtype=None, layout=torch.contiguous_format):
            drawn = torch.empty((batch_rows, *shape), device=mean.device, dtype=dtype, memory_format=layout).normal_()
            return drawn[rows]

        shape, dtype = mean.shape[1:], mean.dtype
        posterior_noise = randn(*shape, dtype=dtype)
        latents = self._sample(mean, encoded.std, posterior_noise)
        channels_last = not latents.is_contiguous() and latents.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        noise = randn(*shape, dtype=dtype, layout=layout)
        if self.noise_offset:
            noise = noise + (self.noise_offset * randn(shape[0], 1, 1)).to(dtype)
        added_noise = noise
        if self.input_perturbation:
            added_noise = noise + self.input_perturbation * randn(*shape, dtype=dtype, layout=layout)
        timesteps = torch.randint(0, self.num_levels, (batch_rows,), device=noise.device)[rows]
        condition = encoded.condition
        if self.embedding_noise:
            embedding = condition["encoder_hidden_states"]
            noisy = embedding + self.embedding_noise * randn(*embedding.shape[1:], dtype=embedding.dtype)
            condition = condition | {"encoder_hidden_states": noisy}
        return Drawn(latents, posterior_noise, noise, added_noise, timesteps, condition)

    def _sample(self, mean, std, noise):
        return (mean + std * noise) * self.vae.config.scaling_factor

    @torch.no_grad()
    def with_images(self, drawn: Drawn, rows: Sequence[int], images: torch.Tensor) -> Drawn:
        posterior = self.vae.encode(images.to(self.dtype)).latent_dist
        latents = drawn.latents.clone()
        latents[rows] = self._sample(posterior.mean, posterior.std, drawn.posterior_noise[rows])
        return replace(drawn, latents=latents)

    def _noisy_and_target(self, model, drawn, condition):
        """What the model is shown and what it should say: noisy latents and target, both (B, C, h, w)."""
        noisy = self.scheduler.add_noise(drawn.latents, drawn.added_noise, drawn.timesteps)
        if self.scheduler.config.prediction_type == "epsilon":
            target = drawn.noise
        else:
            target = self.scheduler.get_velocity(drawn.latents, drawn.noise, drawn.timesteps)
        if self.dream_detail_preservation is not None:
            noisy, target = compute_dream_and_update_latents(
                model,
                self.scheduler,
                drawn.timesteps,
                drawn.noise,
                noisy,
                target,
                condition["encoder_hidden_states"],
                self.dream_detail_preservation,
            )
        return noisy, target

    @staticmethod
    def _call(model, noisy, timesteps, condition):
        return model(noisy, timesteps, **condition, return_dict=False)[0]

    def predict(self, model: Callable, drawn: Drawn) -> tuple[torch.Tensor, torch.Tensor]:
        """One forward of the model. Returns prediction and target, both (B, C, h, w)."""
        condition = self._told(drawn.condition)
        noisy, target = self._noisy_and_target(model, drawn, condition)
        return self._call(model, noisy, drawn.timesteps, condition), target

    def losses(self, model: Callable, drawn: Drawn) -> torch.Tensor:
        """Unweighted mean squared error of each sample (eq. 2): (B,) float32."""
        return _mean_squared_errors(*self.predict(model, drawn))

    def losses_and_magnitudes(self, model: Callable, drawn: Drawn) -> tuple[torch.Tensor, torch.Tensor]:
        """``losses``, and the magnitude of the text-conditional noise || eps(z_t, c) - eps(z_t, "") ||_2 of each
        sample (Wen et al. 2024), both (B,) float32, from two forwards. No gradient flows through the magnitudes.

        The norm is over all C h w elements, so that it grows with the resolution. Predictions are the model's output as
        it is, noise or velocity, as in the authors' code.
        """
        if self.unconditional is None:
            raise ValueError("losses_and_magnitudes needs the condition of the empty caption")
        condition = self._told(drawn.condition)
        noisy, target = self._noisy_and_target(model, drawn, condition)
        prediction = self._call(model, noisy, drawn.timesteps, condition)
        with torch.no_grad():
            nothing = {
                name: tensor.expand(len(drawn), *tensor.shape[1:])
                for name, tensor in self._told(self.unconditional).items()
            }
            unconditional = self._call(model, noisy, drawn.timesteps, nothing)
            magnitudes = (prediction.float() - unconditional.float()).flatten(1).norm(dim=1)
        return _mean_squared_errors(prediction, target), magnitudes

    def weights(self, drawn: Drawn) -> torch.Tensor | None:
        """min-SNR weights (B,), or None."""
        if self.snr_gamma is None:
            return None
        snr = compute_snr(self.scheduler, drawn.timesteps)
        clamped = torch.stack([snr, self.snr_gamma * torch.ones_like(drawn.timesteps)], dim=1).min(dim=1)[0]
        return clamped / (snr if self.scheduler.config.prediction_type == "epsilon" else snr + 1)

    def plain_loss(self, model: Callable, drawn: Drawn) -> torch.Tensor:
        """The official script's scalar loss, in its own order of operations: the same bits, hence not
        ``losses().mean()``.
        """
        prediction, target = self.predict(model, drawn)
        weights = self.weights(drawn)
        if weights is None:
            return F.mse_loss(prediction.float(), target.float(), reduction="mean")
        losses = F.mse_loss(prediction.float(), target.float(), reduction="none")
        return (losses.mean(dim=list(range(1, losses.ndim))) * weights).mean()


def _mean_squared_errors(prediction, target):
    return F.mse_loss(prediction.float(), target.float(), reduction="none").flatten(1).mean(dim=1)
