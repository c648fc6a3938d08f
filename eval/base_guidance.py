"""Guidance of a fine-tuned model away from the base that it was trained from, which is how an attacker who has both
draws training images (FineXtract: Wu et al., ICML 2025).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from diffusers.utils.peft_utils import set_adapter_layers

from ietagc_diffusers.mitigations.base import Mitigation
from ietagc_diffusers.mitigations.call import Step
from ietagc_diffusers.mitigations.denoisers import denoiser_of
from ietagc_diffusers.mitigations.pipeline import with_mitigation


@dataclass(frozen=True)
class BaseGuidance:
    """How a model is guided away from its base: see ``AwayFromBase``.

    Args:
        base: folder or Hub id of the base's pipeline; None: the model without its adapters.
        scale: w; correction: k.
    """

    base: str | None
    scale: float
    correction: float = 0.0


class AwayFromBase(Mitigation):
    """Each prediction of noise becomes e_base + w (e_model - e_base) + k e_base, where the model is told the prompt and
    the base the empty one.

    A model may predict another linear function of the noise: in z = a x + b e the velocity is v = (e - b z) / a. The
    weights of the first terms have the sum 1, so that these terms are the same for velocities, also those of flow
    matching. The last one, a change of the noise by k e_base, changes v by k e_base / a = k (v_base + b z / a).

    Args:
        base: its denoiser, as the pipeline calls it, and within ``off`` the base's.
        told: the base's embeddings of the empty prompt, (1, L, D), and pooled ones (1, D) if it has any.
        scale, correction: w and k. k must be 0 for models of flow matching, which start where a is 0.
    """

    name = "away-from-base"

    def __init__(
        self,
        base: torch.nn.Module,
        told: Sequence[torch.Tensor],
        scale: float,
        correction: float,
        off: Any = nullcontext,
    ):
        self.base, self.told, self.off = base, told, off
        self.scale, self.correction = scale, correction

    def after_step(self, step: Step, prediction: torch.Tensor) -> None:
        base = self._of_base(step)
        added = self.correction * self._noise(step, base) if self.correction else 0
        prediction.sub_(base).mul_(self.scale).add_(base).add_(added)

    def _of_base(self, step: Step) -> torch.Tensor:
        embeddings, *pooled = (told.expand(len(step.sample), *told.shape[1:]) for told in self.told)
        given = {**step.inputs, step.kind.sample: step.sample, "timestep": step.timestep, "return_dict": False}
        inputs = step.kind.with_prompt(given, embeddings, pooled[0] if pooled else None)
        with step.call.apart(slice(0)), self.off():
            return self.base(**inputs)[0]

    def _noise(self, step: Step, base: torch.Tensor) -> torch.Tensor:
        """The noise that the base sees, times what a prediction changes by for each unit of noise."""
        scheduler = step.call.pipeline.scheduler
        if scheduler.config.prediction_type == "epsilon":
            return base
        alpha_bar = float(scheduler.alphas_cumprod[int(step.time)])
        return base + (1 / alpha_bar - 1) ** 0.5 * step.sample


def guide_away(pipeline: Any, base: Any, guidance: BaseGuidance) -> Any:
    """A pipeline that draws as ``pipeline`` guided away from its base; both must have the same noise schedule and kind
    of prediction. Draw with a guidance scale of 1: guidance by the model's own empty prompt would come on top.

    Args:
        base: the base's pipeline; None: ``pipeline`` without its adapters.
    """
    source, off = (pipeline, _without_adapters(pipeline)) if base is None else (base, nullcontext)
    with off():
        told = _empty_prompt(source)
    denoiser = getattr(source, denoiser_of(pipeline).component)
    return with_mitigation(pipeline, AwayFromBase(denoiser, told, guidance.scale, guidance.correction, off))


def _without_adapters(pipeline: Any) -> Any:
    modules = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]

    @contextmanager
    def off() -> Iterator[None]:
        for module in modules:
            set_adapter_layers(module, enabled=False)
        try:
            yield
        finally:
            for module in modules:
                set_adapter_layers(module, enabled=True)

    return off


@torch.no_grad()
def _empty_prompt(pipeline: Any) -> Sequence[torch.Tensor]:
    """The embeddings of no prompt, as the pipeline itself makes them for guidance; pooled ones too if it has any."""
    known = signature(pipeline.encode_prompt).parameters
    prompts = {name: "" for name in ("prompt", "prompt_2", "prompt_3") if name in known}
    options = {"device": pipeline.device, "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    return pipeline.encode_prompt(**prompts, **options)[1::2]
