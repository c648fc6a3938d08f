"""The control of a shard by the method's numbers, and the model that it compares with (``--calibrate``)."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import UsageError
from ..families import Family
from ..method.augmentation import StrengthRandAugment
from ..method.config import MitigationConfig
from ..method.control import (
    Control,
    HeldoutSamples,
    PlainControl,
    RandomControl,
    Reference,
    SummedControl,
    ThresholdAwareControl,
)
from ..method.memory_bank import LossMemoryBank
from ..method.thresholds import RunningQuantile
from ..method.wen import WenControl
from ..tensor_files import Place
from .layout import Layout
from .lora import adapted_layers
from .past import PastModel
from .settings import RunSettings


def build_control(
    config: MitigationConfig,
    num_levels: int,
    visits_per_shard: int,
    layout: Layout,
    private: bool = False,
    reference: Reference | None = None,
    heldout: HeldoutSamples | None = None,
) -> Control:
    """The control of one shard; ``private``: for DP-SGD."""
    if private:
        return SummedControl()
    if config.is_plain and layout.size == 1:
        return PlainControl()
    control = _method_control(config, num_levels, visits_per_shard, layout, reference, heldout)
    return control if config.wen_threshold is None else WenControl(config.wen_threshold, control, layout)


def _method_control(config, num_levels, visits_per_shard, layout, reference, heldout):
    augment = None
    if config.augments:
        augment = StrengthRandAugment(
            config.randaugment_magnitude, config.randaugment_num_ops, config.randaugment_operations
        )
    if config.random_skip_rate or config.random_augment_rate:
        if layout.size > 1:
            raise UsageError("`random_skip_rate` and `random_augment_rate`: at most as many processes as shards")
        return RandomControl(
            config.random_skip_rate, config.random_augment_rate, config.random_augment_strength, augment, layout
        )
    bank = LossMemoryBank(
        num_levels,
        config.bank_decay,
        config.bank_bias_correction,
        config.resolve_bank_buckets(visits_per_shard, num_levels),
    )
    rate = config.skip_rate or config.skip_false_rate
    threshold = RunningQuantile(rate, num_levels) if rate else config.skip_threshold
    return ThresholdAwareControl(
        bank, threshold, config.augment_range, config.augment_decay, augment, layout, reference, heldout
    )


@dataclass(frozen=True)
class BaseCopy:
    """The base as a second model on the device, frozen."""

    model: Callable

    @torch.no_grad()
    def losses(self, objective: Any, drawn: Any) -> torch.Tensor:
        """(B,) float32."""
        return objective.losses(self.model, drawn)


@dataclass(frozen=True)
class WithoutAdapters:
    """The base as the model in training without its adapters, which takes no memory."""

    model: Callable
    layers: Sequence[Any]

    @torch.no_grad()
    def losses(self, objective: Any, drawn: Any) -> torch.Tensor:
        """(B,) float32."""
        try:
            for layer in self.layers:
                layer.enable_adapters(False)
            return objective.losses(self.model, drawn)
        finally:
            for layer in self.layers:
                layer.enable_adapters(True)


def reference_of(
    settings: RunSettings,
    family: Family,
    model: Callable,
    prepare: Callable[[nn.Module], Any],
    place: Place | None = None,
) -> Reference | None:
    """The reference that ``--calibrate`` asks for, of a family that has just been loaded, or None.

    Args:
        model: the denoiser as training calls it.
        prepare: makes the same of a copy.
        place: where a model of the past waits; default: host memory.
    """
    if settings.method.calibrate == "none":
        return None
    if settings.adapters is not None:
        return WithoutAdapters(model, [*adapted_layers(family).values()])
    other = copy.deepcopy(family.denoiser).requires_grad_(False).eval()
    if other.dtype != family.dtype:  # diffusers warns of a cast even where there is none
        other.to(dtype=family.dtype)
    called = prepare(other)
    return BaseCopy(called) if settings.method.calibrate == "base" else PastModel(other, called, place)
