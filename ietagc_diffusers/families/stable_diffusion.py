"""Stable Diffusion 1.x and 2.x: a UNet on VAE latents, told the caption by one CLIP text encoder."""

from typing import Any, ClassVar

from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from .base import Tensors, drawn_edge
from .latent_diffusion import LatentDiffusion
from .parts import Reader
from .text_to_image import TextToImageObjective, biased_timesteps

OF_FLOW_MATCHING = (
    "weighting_scheme", "logit_mean", "logit_std", "mode_scale", "precondition_outputs", "max_sequence_length",
)  # fmt: skip


class NoisePredicting(LatentDiffusion):
    """Families whose denoiser is a UNet that predicts noise or velocity at timesteps of a DDPM schedule."""

    denoiser_name = "unet"
    denoiser_kind = UNet2DConditionModel
    scheduler_kind = DDPMScheduler
    foreign: ClassVar[tuple[str, ...]] = OF_FLOW_MATCHING
    objective: TextToImageObjective

    @classmethod
    def objective_options(cls, settings: Any, scheduler: Any) -> dict[str, Any]:
        return cls.frozen_options(scheduler, settings.prediction_type) | {
            "noise_offset": settings.noise_offset,
            "input_perturbation": settings.input_perturbation,
            "snr_gamma": settings.snr_gamma,
            "dream_detail_preservation": settings.dream_detail_preservation if settings.dream_training else None,
            "timestep_weights": biased_timesteps(
                scheduler.config.num_train_timesteps,
                settings.timestep_bias_strategy,
                settings.timestep_bias_multiplier,
                settings.timestep_bias_begin,
                settings.timestep_bias_end,
                settings.timestep_bias_portion,
            ),
        }

    @classmethod
    def frozen_options(cls, scheduler: Any, prediction_type: str | None) -> dict[str, Any]:
        if prediction_type is not None:
            scheduler.register_to_config(prediction_type=prediction_type)
        return {}

    def make_objective(self, scheduler: Any, **options: Any) -> TextToImageObjective:
        return TextToImageObjective(self.vae, self.encode_text, scheduler, self.dtype, **options)

    def fits(self):
        makes = sum(text.config.hidden_size for text in self.text_encoders.values())
        texts = "the text encoder makes" if len(self.text_encoders) == 1 else "the text encoders make"
        what = f"the UNet takes embeddings of width {{}}, {texts} {{}}"
        return [*super().fits(), (what, self.denoiser.config.cross_attention_dim, makes)]

    def prepare_denoiser(self, resolution: int | None) -> None:
        """Make the resolution of the training the one at which pipelines draw unless they are told another."""
        if resolution is not None:
            factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
            self.denoiser.register_to_config(sample_size=max(1, drawn_edge(resolution) // factor))

    def pipeline(self):
        size = self.denoiser.config.sample_size
        pipeline = super().pipeline()
        # diffusers gives denoisers of its first versions the size 64 here, whatever they were trained at.
        self.denoiser.register_to_config(sample_size=size)
        # What the denoiser was trained to predict, which need not be what the base's did.
        pipeline.scheduler.register_to_config(prediction_type=self.objective.prediction_type)
        return pipeline


class StableDiffusion(NoisePredicting):
    """Stable Diffusion 1.x and 2.x."""

    name = "Stable Diffusion"
    pipelines = (StableDiffusionPipeline,)
    tags = ("stable-diffusion", "stable-diffusion-diffusers", "text-to-image")
    readers = (Reader("", CLIPTokenizer, CLIPTextModel),)

    @classmethod
    def denoiser_source(cls, settings: Any, files: dict[str, Any]) -> dict[str, Any]:
        """As the official scripts load it: for a LoRA like the other parts, else from a revision of its own."""
        if getattr(settings, "lora_rank", None) is not None:
            return files
        return {"revision": settings.non_ema_revision, "cache_dir": settings.cache_dir}

    def encode_text(self, inputs: Tensors) -> Tensors:
        """The captions' embeddings, (B, L, D)."""
        encoder = self.text_encoders["text_encoder"]
        return {"encoder_hidden_states": encoder(inputs["input_ids"].to(encoder.device), return_dict=False)[0]}
