"""Stable Diffusion 3 and 3.5: a transformer of flow matching, told the caption by two CLIP text encoders and T5."""

from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from ..errors import UsageError
from .base import Tensors, drawn_edge
from .flow_matching import FlowMatchingObjective, LevelDensity
from .latent_diffusion import LatentDiffusion
from .parts import Reader

T5 = "_3"


class StableDiffusion3(LatentDiffusion):
    """Stable Diffusion 3 and 3.5; T5 may be left out, as the pipeline allows."""

    name = "Stable Diffusion 3"
    pipelines = (StableDiffusion3Pipeline,)
    denoiser_name = "transformer"
    denoiser_kind = SD3Transformer2DModel
    scheduler_kind = FlowMatchEulerDiscreteScheduler
    tags = ("sd3", "sd3-diffusers", "text-to-image")
    # Of joint attention: the layers of the image's tokens, and those of the caption's.
    denoiser_targets = (
        "attn.to_k", "attn.to_q", "attn.to_v", "attn.to_out.0",
        "attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out",
    )  # fmt: skip
    readers = (
        Reader("", CLIPTokenizer, CLIPTextModelWithProjection),
        Reader("_2", CLIPTokenizer, CLIPTextModelWithProjection),
        Reader(T5, T5TokenizerFast, T5EncoderModel, optional=True),
    )
    foreign = (
        "prediction_type", "snr_gamma", "noise_offset", "input_perturbation", "dream_training",
        "timestep_bias_strategy", "non_ema_revision",
    )  # fmt: skip
    objective: FlowMatchingObjective

    @classmethod
    def objective_options(cls, settings: Any, scheduler: Any) -> dict[str, Any]:
        density = LevelDensity(settings.weighting_scheme, settings.logit_mean, settings.logit_std, settings.mode_scale)
        return {"density": density, "precondition_outputs": settings.precondition_outputs}

    def make_objective(self, scheduler: Any, **options: Any) -> FlowMatchingObjective:
        return FlowMatchingObjective(self.vae, self.encode_text, scheduler, self.dtype, **options)

    def vae_dtype(self) -> torch.dtype:
        return torch.float32

    def length(self, reader):
        return self.settings.max_sequence_length if reader.suffix == T5 else super().length(reader)

    def fits(self):
        config, t5 = self.denoiser.config, self.text_encoders.get(f"text_encoder{T5}")
        clips = sum(text.config.hidden_size for text in self._clips())
        # The embeddings of CLIP are filled up with zeros to the width of T5's.
        width = max(clips, config.joint_attention_dim) if t5 is None else t5.config.d_model
        pooled = sum(text.config.projection_dim for text in self._clips())
        return [
            *super().fits(),
            ("the transformer takes embeddings of width {}, the text encoders make {}", config.joint_attention_dim,
             width),
            ("the transformer takes pooled embeddings of width {}, the text encoders make {}",
             config.pooled_projection_dim, pooled),
        ]  # fmt: skip

    def _clips(self):
        return [self.text_encoders[f"text_encoder{suffix}"] for suffix in ("", "_2")]

    def encode_text(self, inputs: Tensors) -> Tensors:
        """``encoder_hidden_states`` (B, L_CLIP + L_T5, D), the embeddings of both CLIPs side by side, filled up with
        zeros, before those of T5, which are zeros without T5; ``pooled_projections`` (B, D_1 + D_2).
        """
        embeddings, pooled = [], []
        for reader in self.readers[:2]:
            encoder = self.text_encoders[reader.encoder_name]
            told = encoder(inputs[reader.ids].to(encoder.device), output_hidden_states=True)
            embeddings.append(told.hidden_states[-2])
            pooled.append(told.text_embeds)
        clip = torch.cat(embeddings, dim=-1)
        t5 = self._of_t5(inputs, clip)
        both = torch.cat([F.pad(clip, (0, t5.shape[-1] - clip.shape[-1])), t5], dim=-2)
        return {"encoder_hidden_states": both, "pooled_projections": torch.cat(pooled, dim=-1)}

    def _of_t5(self, inputs, like):
        encoder = self.text_encoders.get(f"text_encoder{T5}")
        if encoder is not None:
            return encoder(inputs[f"input_ids{T5}"].to(encoder.device))[0]
        return like.new_zeros(len(like), self.settings.max_sequence_length, self._joint_width)  # as the pipeline

    @cached_property
    def _joint_width(self):
        if self.denoiser is not None:
            return self.denoiser.config.joint_attention_dim
        base = self.settings.pretrained_model_name_or_path
        return self.denoiser_kind.load_config(base, subfolder=self.denoiser_name)["joint_attention_dim"]

    def prepare_denoiser(self, resolution: int | None) -> None:
        """Raise ``UsageError`` for a resolution whose latents are not cut into patches, or into too many."""
        config, vae = self.denoiser.config, self.vae.config
        factor = 2 ** (len(vae.block_out_channels) - 1)
        edge, most = factor * config.patch_size, factor * config.patch_size * config.pos_embed_max_size
        if resolution is not None and (resolution % edge or resolution > most):
            raise UsageError(f"`resolution` {resolution}: {self.name} takes multiples of {edge}, at most {most}")

    def drawn_size(self) -> dict[str, int]:
        """The transformer's own size is part of its weights, and stays what it is."""
        resolution = getattr(self.settings, "resolution", None)
        return {} if resolution is None else {"height": drawn_edge(resolution), "width": drawn_edge(resolution)}
