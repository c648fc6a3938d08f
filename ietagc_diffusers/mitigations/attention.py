"""Rescaled cross-attention: more of it for the beginning token, none for padding."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers.models.attention_processor import Attention

from ..errors import UsageError
from .base import Mitigation, option, real, switch

MASKED = -10_000.0  # as Diffusers turns a mask into a bias: softmax makes 0 of it


@dataclass
class RescaledAttention(Mitigation):
    """MemAttn: raise cross-attention to the beginning token and mask the padding.

    Ren et al., "Unveiling and Mitigating Memorization in Text-to-image Diffusion Models through Cross Attention", 2024.
    In the conditional branch the beginning token's logit is multiplied by ``scale``. In both branches the tokens after
    the prompt's end-of-text token get no attention, as in the authors' code: these are the padding, which summarises a
    memorized prompt. With prompt_embeds, whose length is unknown, nothing is masked.

    The logit q k / sqrt(d) is linear in the key k, so it is enough to multiply the key: every attention processor
    (sliced, xformers, with adapters) works unchanged.
    """

    name: ClassVar[str] = "memattn"
    rescales: ClassVar[bool] = True
    scale: float = option(1.25, "Factor of the beginning token's logit (the authors' c1).", real)
    mask: bool = option(True, "Whether padding is masked.", switch)

    @property
    def acts(self) -> bool:
        return self.mask or self.scale != 1

    def attach(self, denoiser: torch.nn.Module) -> list[Any]:
        if any(getattr(part, "_compiled_call_impl", None) or hasattr(part, "_orig_mod") for part in denoiser.modules()):
            raise UsageError(
                "mitigation memattn: acts inside the UNet, but a compiled graph would ignore it; give the pipeline a "
                "UNet that is not compiled"
            )
        attentions = [part for part in denoiser.modules() if isinstance(part, Attention) and part.is_cross_attention]
        if any(attention.fused_projections for attention in attentions):
            raise UsageError("mitigation memattn: the UNet's projections are fused; call unfuse_qkv_projections()")
        handles = []
        if self.scale != 1:
            handles += [attention.to_k.register_forward_hook(self._scale_key) for attention in attentions]
        if self.mask:
            self.bias: torch.Tensor | None = None
            handles += [a.register_forward_pre_hook(self._mask_padding, with_kwargs=True) for a in attentions]
        return handles

    def _scale_key(self, projection: torch.nn.Module, args: Any, key: torch.Tensor) -> torch.Tensor:
        scaled = torch.ones_like(key[..., :1])
        scaled[self.call.conditional, 0] = self.scale
        return key * scaled

    def _mask_padding(self, attention: Attention, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        if not self.call.prompts:
            return None
        hidden_states = args[0]
        if self.bias is None:
            self.bias = self._padding_bias().to(hidden_states)
        bias = self.bias.repeat(len(hidden_states) // len(self.bias), 1, 1)
        mask = kwargs.get("attention_mask")
        return args, {**kwargs, "attention_mask": bias if mask is None else bias + mask}

    def _padding_bias(self) -> torch.Tensor:
        """(B, 1, L): 0 for the tokens of each image's prompt, ``MASKED`` after them."""
        lengths = torch.tensor([max(counts) for counts in zip(*self._token_counts(), strict=True)])
        positions = torch.arange(self._tokenizers()[0].model_max_length)
        return torch.where(positions < lengths[:, None], 0.0, MASKED)[:, None]

    def _tokenizers(self) -> list[Any]:
        pipeline = self.call.pipeline
        pair = (getattr(pipeline, "tokenizer", None), getattr(pipeline, "tokenizer_2", None))
        return [tokenizer for tokenizer in pair if tokenizer is not None]

    def _token_counts(self) -> Iterator[list[int]]:
        """For each text encoder, the number of tokens of each image's prompt, from begin to end of text."""
        for prompts, tokenizer in zip(self.call.prompts.values(), self._tokenizers(), strict=False):
            converted = self.call.pipeline.maybe_convert_prompt(prompts, tokenizer)
            yield [len(ids) for ids in tokenizer(converted, truncation=True).input_ids]
