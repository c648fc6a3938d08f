"""Stable Diffusion XL: a UNet that is told the caption by two text encoders, and the size and crop of the image."""

from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ..data import ImageSettings
from ..errors import UsageError
from .base import Tensors
from .parts import Reader
from .stable_diffusion import OF_FLOW_MATCHING, NoisePredicting
from .text_to_image import TextToImageObjective
from .views import SizedPixels

NUM_SIZES = 6  # numbers that the UNet is told of an image: its size, the crop, the size of the view


class SizedObjective(TextToImageObjective):
    """``TextToImageObjective`` of a UNet that is told ``text_embeds`` and ``time_ids`` as added conditions."""

    PREDICTIONS = ("epsilon", "v_prediction", "sample")
    ADDED = ("text_embeds", "time_ids")
    EMBEDDINGS = ("encoder_hidden_states", "text_embeds")

    def arguments(self, condition: Tensors) -> dict[str, Any]:
        own = {name: tensor for name, tensor in condition.items() if name not in self.ADDED}
        return own | {"added_cond_kwargs": {name: condition[name] for name in self.ADDED}}


def _stores_latents(settings: Any) -> bool:
    """Whether the official script encodes all images before training: that of the full training does, that of LoRA
    does not.
    """
    return getattr(settings, "lora_rank", None) is None


class StableDiffusionXL(NoisePredicting):
    """Stable Diffusion XL."""

    name = "Stable Diffusion XL"
    pipelines = (StableDiffusionXLPipeline,)
    tags = ("stable-diffusion-xl", "stable-diffusion-xl-diffusers", "text-to-image")
    foreign = (*OF_FLOW_MATCHING, "dream_training")
    readers = (
        Reader("", CLIPTokenizer, CLIPTextModel),
        Reader("_2", CLIPTokenizer, CLIPTextModelWithProjection),
    )

    @classmethod
    def objective_options(cls, settings: Any, scheduler: Any) -> dict[str, Any]:
        return super().objective_options(settings, scheduler) | {"stored_latents": _stores_latents(settings)}

    def make_objective(self, scheduler: Any, **options: Any) -> SizedObjective:
        return SizedObjective(self.vae, self.encode_text, scheduler, self.dtype, **options)

    def vae_dtype(self) -> torch.dtype:
        """As in the official scripts: float32, since the model's own VAE overflows in half precision; but that of the
        other parts for adapters beside a VAE that was chosen.
        """
        s = self.settings
        return torch.float32 if s.pretrained_vae_model_name_or_path is None or _stores_latents(s) else self.dtype

    def check_parts(self) -> None:
        super().check_parts()
        if self.vae.config.latents_mean is not None:
            own = self.settings.pretrained_vae_model_name_or_path
            setting = "pretrained_model_name_or_path" if own is None else "pretrained_vae_model_name_or_path"
            raise UsageError(
                f"`{setting}` {getattr(self.settings, setting)}: its VAE scales each channel of the latents by itself "
                "(latents_mean), as Playground 2.5 does, which is not trained here; give a base of Stable Diffusion XL"
            )

    def fits(self):
        unet = self.denoiser.config
        takes, size_width = unet.projection_class_embeddings_input_dim or 0, unet.addition_time_embed_dim or 0
        makes = self.text_encoders["text_encoder_2"].config.projection_dim + NUM_SIZES * size_width
        what = "the UNet takes added conditions of width {}, text_encoder_2 and the sizes make {}"
        return [*super().fits(), (what, takes, makes)]

    def encode_text(self, inputs: Tensors) -> Tensors:
        """``encoder_hidden_states`` (B, L, D_1 + D_2), of the layer before the last of both encoders, and
        ``text_embeds`` (B, D_2), the pooled embedding of the second.
        """
        pooled, embeddings = torch.empty(0), []
        for reader in self.readers:
            encoder = self.text_encoders[reader.encoder_name]
            pooled, *_, hidden = encoder(
                inputs[reader.ids].to(encoder.device), output_hidden_states=True, return_dict=False
            )
            embeddings.append(hidden[-2])
        return {"encoder_hidden_states": torch.cat(embeddings, dim=-1), "text_embeds": pooled.flatten(1)}

    @torch.no_grad()
    def unconditional(self) -> Tensors:
        """As pipelines of the base draw: zeros for an empty prompt, unless its index says otherwise."""
        s = self.settings
        try:
            index: dict[str, Any] = self.pipelines[0].load_config(
                s.pretrained_model_name_or_path, revision=s.revision, cache_dir=s.cache_dir
            )
        except (OSError, ValueError):
            index = {}
        if not index.get("force_zeros_for_empty_prompt", True):
            return super().unconditional()
        return {name: torch.zeros_like(told) for name, told in self.encode_text(self.tokenize([""])).items()}

    def view(self, settings: ImageSettings) -> SizedPixels:
        return SizedPixels.of(settings)

    def told(self, images: torch.Tensor) -> Tensors:
        height, width = images.shape[2:]
        sizes = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32)
        return {"time_ids": sizes.expand(len(images), -1)}
