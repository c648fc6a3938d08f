"""What is trained: from a batch to per-sample losses. Random draws happen in ``draw`` only."""

from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from diffusers.training_utils import compute_dream_and_update_latents, compute_snr

from ..errors import UsageError


@dataclass(frozen=True)
class Drawn:
    """One batch with everything random drawn; the first dimension of each field is the sample.

    latents (B, C, h, w): scaled VAE latents; posterior_noise: the draw that made them from the VAE's posterior;
    noise: the target noise;
    added_noise: what is added to the latents (differs from ``noise`` under input perturbation); timesteps (B,);
    condition (B, L, D).
    """

    latents: torch.Tensor
    posterior_noise: torch.Tensor
    noise: torch.Tensor
    added_noise: torch.Tensor
    timesteps: torch.Tensor
    condition: torch.Tensor

    def __getitem__(self, rows):
        return Drawn(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def __len__(self):
        return len(self.timesteps)

    def to(self, device):
        return Drawn(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


class TextToImageObjective:
    """The objective of Diffusers' ``train_text_to_image.py``: denoise VAE latents given the caption.

    Args:
        vae, text_encoder: frozen, on the device, in ``dtype``.
        scheduler: a ``DDPMScheduler`` with prediction type ``epsilon`` or ``v_prediction``.
        dtype: of images and latents.
        noise_offset, input_perturbation: scales, 0 is off.
        snr_gamma: min-SNR weighting, None is off.
        dream_detail_preservation: DREAM's p, None is off.
        embedding_noise: scale of Gaussian noise on the caption's embedding, 0 is off (GN, Somepalli et al. 2023).
        unconditional: (1, L, D), the embedding of the empty caption; ``losses_and_magnitudes`` needs it.
    """

    def __init__(
        self,
        vae,
        text_encoder,
        scheduler,
        dtype=torch.float32,
        noise_offset=0.0,
        input_perturbation=0.0,
        snr_gamma=None,
        dream_detail_preservation=None,
        embedding_noise=0.0,
        unconditional=None,
    ):
        prediction_type = scheduler.config.prediction_type
        if prediction_type not in ("epsilon", "v_prediction"):
            raise UsageError(f"--prediction_type {prediction_type}: must be epsilon or v_prediction")
        if dream_detail_preservation is not None and prediction_type != "epsilon":
            raise UsageError(
                f"--dream_training works with prediction type epsilon alone; this model's is {prediction_type}"
            )
        self.vae = vae
        self.text_encoder = text_encoder
        self.scheduler = scheduler
        self.dtype = dtype
        self.noise_offset = noise_offset
        self.input_perturbation = input_perturbation
        self.snr_gamma = snr_gamma
        self.dream_detail_preservation = dream_detail_preservation
        self.embedding_noise = embedding_noise
        self.unconditional = unconditional

    @property
    def num_timesteps(self):
        return self.scheduler.config.num_train_timesteps

    @torch.no_grad()
    def draw(self, batch):
        """Draw noise and timesteps, in the official script's order, and then what it does not know.

        ``batch``: pixel_values (B, 3, H, W) in [-1, 1], input_ids (B, L); where several processes share a batch, also
        ``rows`` (this process's slice of it) and ``batch_rows`` (its length): noise is drawn for the whole batch, so
        that the draws do not depend on the sharing.
        """
        posterior = self.vae.encode(batch["pixel_values"].to(self.dtype)).latent_dist
        num_rows = len(posterior.mean)
        rows, batch_rows = batch.get("rows", slice(0, num_rows)), batch.get("batch_rows", num_rows)

        def randn(*shape, dtype=None):
            return torch.randn((batch_rows, *shape), device=posterior.mean.device, dtype=dtype)[rows]

        shape, dtype = posterior.mean.shape[1:], posterior.mean.dtype
        posterior_noise = randn(*shape, dtype=dtype)
        noise = randn(*shape, dtype=dtype)
        if self.noise_offset:
            noise = noise + (self.noise_offset * randn(shape[0], 1, 1)).to(dtype)
        added_noise = noise
        if self.input_perturbation:
            added_noise = noise + self.input_perturbation * randn(*shape, dtype=dtype)
        timesteps = torch.randint(0, self.num_timesteps, (batch_rows,), device=noise.device)[rows]
        condition = self.text_encoder(batch["input_ids"], return_dict=False)[0]
        if self.embedding_noise:
            condition = condition + self.embedding_noise * randn(*condition.shape[1:], dtype=condition.dtype)
        return Drawn(
            self._sample(posterior, posterior_noise), posterior_noise, noise, added_noise, timesteps, condition
        )

    def _sample(self, posterior, noise):
        return (posterior.mean + posterior.std * noise) * self.vae.config.scaling_factor

    @torch.no_grad()
    def with_images(self, drawn, rows, images):
        """``drawn`` with the samples ``rows`` (indices) showing ``images`` (N, 3, H, W): same timestep, noise and
        caption, other latents.
        """
        posterior = self.vae.encode(images.to(self.dtype)).latent_dist
        latents = drawn.latents.clone()
        latents[rows] = self._sample(posterior, drawn.posterior_noise[rows])
        return replace(drawn, latents=latents)

    def _noisy_and_target(self, model, drawn):
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
                drawn.condition,
                self.dream_detail_preservation,
            )
        return noisy, target

    def predict(self, model, drawn):
        """One forward of the model. Returns prediction and target, both (B, C, h, w)."""
        noisy, target = self._noisy_and_target(model, drawn)
        return model(noisy, drawn.timesteps, drawn.condition, return_dict=False)[0], target

    def losses(self, model, drawn):
        """Unweighted mean squared error of each sample (eq. 2): (B,) float32."""
        return _mean_squared_errors(*self.predict(model, drawn))

    def losses_and_magnitudes(self, model, drawn):
        """``losses``, and the magnitude of the text-conditional noise || eps(z_t, c) - eps(z_t, "") ||_2 of each
        sample (Wen et al. 2024), both (B,) float32, from two forwards. No gradient flows through the magnitudes.

        The norm is over all C h w elements, so that it grows with the resolution. Predictions are the model's output as
        it is, noise or velocity, as in the authors' code.
        """
        noisy, target = self._noisy_and_target(model, drawn)
        prediction = model(noisy, drawn.timesteps, drawn.condition, return_dict=False)[0]
        with torch.no_grad():
            nothing = self.unconditional.expand(len(drawn), -1, -1)
            unconditional = model(noisy, drawn.timesteps, nothing, return_dict=False)[0]
            magnitudes = (prediction.float() - unconditional.float()).flatten(1).norm(dim=1)
        return _mean_squared_errors(prediction, target), magnitudes

    def weights(self, timesteps):
        """min-SNR weights (B,), or None. They depend on the timestep alone, so they cancel in the loss ratio and come
        after it.
        """
        if self.snr_gamma is None:
            return None
        snr = compute_snr(self.scheduler, timesteps)
        clamped = torch.stack([snr, self.snr_gamma * torch.ones_like(timesteps)], dim=1).min(dim=1)[0]
        return clamped / (snr if self.scheduler.config.prediction_type == "epsilon" else snr + 1)

    def plain_loss(self, model, drawn):
        """The official script's scalar loss, in its own order of operations: the same bits, hence not
        ``losses().mean()``.
        """
        prediction, target = self.predict(model, drawn)
        weights = self.weights(drawn.timesteps)
        if weights is None:
            return F.mse_loss(prediction.float(), target.float(), reduction="mean")
        losses = F.mse_loss(prediction.float(), target.float(), reduction="none")
        return (losses.mean(dim=list(range(1, losses.ndim))) * weights).mean()


def _mean_squared_errors(prediction, target):
    return F.mse_loss(prediction.float(), target.float(), reduction="none").flatten(1).mean(dim=1)
