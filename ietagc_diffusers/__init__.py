"""IET-AGC+ for Diffusers: fine-tune Stable Diffusion without memorizing the training set."""

from .augmentation import StrengthRandAugment, augmentation_strength
from .averaging import ModelAverage
from .config import MitigationConfig, UsageError
from .control import Controlled, Decision, PlainControl, RandomControl, ThresholdAwareControl, WenControl
from .ensemble import Callbacks, IterativeEnsemble, Rounds
from .layout import Layout
from .memory_bank import LossMemoryBank
from .objectives import Drawn, TextToImageObjective
from .proxy import Proxy
from .sharding import ShardPlan

__all__ = [
    "Callbacks",
    "Controlled",
    "Decision",
    "Drawn",
    "IterativeEnsemble",
    "Layout",
    "LossMemoryBank",
    "MitigationConfig",
    "ModelAverage",
    "PlainControl",
    "Proxy",
    "RandomControl",
    "Rounds",
    "ShardPlan",
    "StrengthRandAugment",
    "TextToImageObjective",
    "ThresholdAwareControl",
    "UsageError",
    "WenControl",
    "augmentation_strength",
]
