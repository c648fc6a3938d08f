"""Denoising losses under fixed noise and timesteps: precise enough to compare models, and free of sampling."""

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler
from transformers import CLIPTextModel, CLIPTokenizer

from ..errors import UsageError
from ..families.text_to_image import TextToImageObjective

GOLDEN_RATIO = (5**0.5 - 1) / 2
DRAWN_TOGETHER = 100  # images whose noise is one draw


def _centred(images):
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images


class FixedLosses:
    """Denoising losses of images under fixed noise and timesteps, so that models can be compared to a few
    ten-thousandths.

    Args:
        base: folder or Hub id of the pipeline whose VAE, text encoder and scheduler the models share.
        images: float32 (N, 3, H, W) in [-1, 1], or uint8; captions: N strings.
        draws: noise draws an image, each at another timestep.
        prediction_type: the scheduler's, if the runs were trained with another than the base's.
        batch_size: images at once; the draws do not depend on it.
        sweep: each draw is at one timestep for all images, over the range; ``self.sweep`` has them.
    """

    def __init__(
        self, base, images, captions, draws=3, seed=0, prediction_type=None, device="cpu", batch_size=100, sweep=False
    ):
        try:
            scheduler = DDPMScheduler.from_pretrained(base, subfolder="scheduler")
            tokenizer = CLIPTokenizer.from_pretrained(base, subfolder="tokenizer")
            text_encoder = CLIPTextModel.from_pretrained(base, subfolder="text_encoder", dtype=torch.float32)
            vae = AutoencoderKL.from_pretrained(base, subfolder="vae", dtype=torch.float32)
        except (OSError, ValueError) as error:
            raise UsageError(
                f"`base` {base}: no Stable Diffusion that loads: {' '.join(str(error).split())}"
            ) from error
        if prediction_type is not None:
            scheduler.register_to_config(prediction_type=prediction_type)
        vae.enable_slicing()  # one image at a time: the widest activations are its encoder's
        self.objective = TextToImageObjective(vae.to(device), text_encoder.to(device), scheduler)
        self.device, self.batch_size = device, batch_size
        tokens = tokenizer(
            captions, max_length=tokenizer.model_max_length, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        # Timesteps spread evenly over the range: fewer draws for the same precision than random ones.
        timesteps = (np.arange(draws * len(images)) * GOLDEN_RATIO % 1 * self.objective.num_timesteps).astype(np.int64)
        timesteps = torch.from_numpy(timesteps).view(draws, len(images))
        if sweep:
            self.sweep = torch.linspace(0, self.objective.num_timesteps - 1, draws).round().long()
            timesteps = self.sweep[:, None].expand(draws, len(images))
        self.batches = []
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for draw in range(draws):
                for rows in torch.arange(len(images)).split(DRAWN_TOGETHER):
                    batch = {"pixel_values": _centred(images[rows]).to(device), "input_ids": tokens[rows].to(device)}
                    drawn = self.objective.draw(batch)
                    drawn.timesteps.copy_(timesteps[draw, rows])
                    self.batches.append((draw, rows, drawn.to("cpu")))
        self.num_images, self.draws = len(images), draws

    @torch.no_grad()
    def by_draw(self, denoiser):
        """Loss of each image at each draw: float32 (draws, N)."""
        losses = torch.zeros(self.draws, self.num_images)
        for draw, rows, drawn in self.batches:
            for some in torch.arange(len(rows)).split(self.batch_size):
                losses[draw, rows[some]] = self.objective.losses(denoiser, drawn[some].to(self.device)).cpu()
        return losses

    def __call__(self, denoiser):
        """Mean loss of each image over its draws: float32 (N,)."""
        return self.by_draw(denoiser).mean(dim=0)
