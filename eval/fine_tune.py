"""A model and the base that it was trained from, which may be the same pipeline without its adapters."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler

from ietagc_diffusers.errors import UsageError
from ietagc_diffusers.families import Unconditional

from .base_guidance import BaseGuidance
from .membership import Target, check_base
from .pipelines import pipeline_folder
from .record import TrainingRecord

# w and k of FineXtract's authors for DreamBooth, which trains all weights, and for LoRA.
FULL, LORA = (3.0, -0.02), (5.0, 0.0)


@dataclass(frozen=True)
class FineTune:
    """A model that was trained from a base.

    Args:
        model: the pipeline's folder, a run's or a LoRA run's, a checkpoint in a file, or a Hub id.
        base: the base's pipeline.
        lora: adapters for the model.
        is_adapter: whether the model is the base with adapters, so that there are no second weights.
        schedule: what its predictions depend on besides the weights.
        flow: whether it is one of flow matching.
    """

    model: str
    base: str
    lora: tuple[str, ...]
    is_adapter: bool
    schedule: dict[str, Any]
    flow: bool

    @classmethod
    def of(
        cls, model: str | Path, base: str | None, lora: Sequence[str] = (), record: TrainingRecord | None = None
    ) -> "FineTune":
        """
        Args:
            base: None: what the model records, or the model without its adapters.

        Raises:
            UsageError: a model without prompts, or without a base that is known and of its kind.
        """
        target = Target.of_model(model)
        if target.kind is Unconditional:
            raise UsageError(f"`model` {model}: draws without prompts and has no base, but both are needed")
        is_adapter = bool(lora) or target.adapter is not None
        if is_adapter and base is not None:
            raise UsageError(f"`base` {base}: the base of an adapter is the model without it; leave this out")
        place = target.place if is_adapter else base
        if place is None and record is not None:
            place = record.settings.get("pretrained_model_name_or_path")
        if place is None:
            raise UsageError(f"`base`: {model} does not record which model its training started from; give it")
        place = str(pipeline_folder(place, "base"))
        if not lora:
            check_base(target, Target(place, "base"))
        flow = getattr(target.kind, "scheduler_kind", None) is FlowMatchEulerDiscreteScheduler
        return cls(str(model), place, tuple(lora), is_adapter, target.schedule, flow)

    def targets(self) -> tuple[Target, Target]:
        """The model and its base, to compare what they predict.

        Raises:
            UsageError: adapters that are not those of a run.
        """
        if self.lora:
            raise UsageError(
                f"`lora` {self.lora[0]}: what a model predicts with it is not compared with the base; give the folder "
                "of the LoRA run as `model`"
            )
        return Target.of_model(self.model), Target(self.base, "base")

    def guidance(self, scale: float | None = None, correction: float | None = None) -> BaseGuidance:
        """The authors' numbers where none are given; no correction where it is not defined.

        Raises:
            UsageError: a correction that is not defined for the model.
        """
        own_scale, own_correction = LORA if self.is_adapter else FULL
        why = self._uncorrectable()
        if correction and why:
            raise UsageError(f"`correction` {correction}: {why}; leave it out")
        if correction is None:
            correction = 0.0 if why else own_correction
        return BaseGuidance(None if self.is_adapter else self.base, own_scale if scale is None else scale, correction)

    def _uncorrectable(self) -> str | None:
        """Why the noise in a prediction cannot be corrected, or None."""
        if self.flow or self.schedule.get("rescale_betas_zero_snr"):
            return "changes the noise that the base sees, and this model starts where it sees nothing but noise"
        if self.schedule.get("prediction_type") == "sample":
            return "changes the noise that the base sees, and this model predicts the image"
        return None
