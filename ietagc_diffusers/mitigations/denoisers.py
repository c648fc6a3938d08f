"""How each kind of pipeline that can be mitigated calls its denoiser."""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline

from ..errors import UsageError


@dataclass(frozen=True)
class Denoiser:
    """The denoiser of one kind of pipeline.

    Attributes:
        component: its name in the pipeline.
        sample: the name of its argument for the noisy latents; the others have one name everywhere.
        pooled: the keys, one inside the other, of the pooled prompt embedding among its arguments; none if it has none.
        padded: whether the pipeline fills the prompt embedding up with zeros, which no encoder computed.
        cross_attention: whether the image attends to the prompt by cross-attention.
    """

    component: str = "unet"
    sample: str = "sample"
    pooled: tuple[str, ...] = ()
    padded: bool = False
    cross_attention: bool = True

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
        """A call's noisy latents, timestep and other arguments."""
        inputs = {**dict(zip((self.sample, "timestep"), args, strict=False)), **kwargs}
        return inputs.pop(self.sample), inputs.pop("timestep"), inputs

    def pooled_of(self, inputs: dict[str, Any]) -> torch.Tensor | None:
        """The pooled prompt embedding (B, D) among a call's arguments; None if there is none."""
        value: Any = inputs if self.pooled else None
        for key in self.pooled:
            value = value[key]
        return value

    def with_prompt(
        self, inputs: dict[str, Any], embeddings: torch.Tensor, pooled: torch.Tensor | None
    ) -> dict[str, Any]:
        """A call's arguments with another prompt embedding (B, L, D), and another pooled one unless that is None."""
        changed = {**inputs, "encoder_hidden_states": embeddings}
        if pooled is not None:
            *outer, last = self.pooled
            for key in outer:
                changed[key] = {**inputs[key], last: pooled}
            if not outer:
                changed[last] = pooled
        return changed


DENOISERS: dict[Any, Denoiser] = {
    StableDiffusionPipeline: Denoiser(),
    StableDiffusionXLPipeline: Denoiser(pooled=("added_cond_kwargs", "text_embeds")),
    StableDiffusion3Pipeline: Denoiser(
        component="transformer",
        sample="hidden_states",
        pooled=("pooled_projections",),
        padded=True,
        cross_attention=False,
    ),
}


def denoiser_of(pipeline: Any) -> Denoiser:
    """Raises ``UsageError`` for a pipeline of another kind."""
    for kind, denoiser in DENOISERS.items():
        if isinstance(pipeline, kind):
            return denoiser
    *others, last = (kind.__name__ for kind in DENOISERS)
    raise UsageError(f"a {type(pipeline).__name__} cannot be mitigated: give a {', '.join(others)} or {last}")
