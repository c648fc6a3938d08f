"""IET-AGC+ for Diffusers: fine-tune diffusion models without memorizing the training set."""

from pathlib import Path

__version__ = "0.2.0.dev0"

# In a checkout, evaluation (`eval`), descriptors (`sscd`) and recipes (`configs`) lie beside this package; installed,
# they lie inside it. Either way they are imported as `ietagc_diffusers.eval` and `ietagc_diffusers.sscd`.
if not (Path(__file__).parent / "eval").is_dir():
    __path__.append(str(Path(__file__).parent.parent))

from .errors import UsageError
from .families.text_to_image import Drawn, TextToImageObjective
from .method.augmentation import StrengthRandAugment, augmentation_strength
from .method.averaging import ModelAverage
from .method.config import MitigationConfig
from .method.control import Controlled, Decision, PlainControl, RandomControl, ThresholdAwareControl, WenControl
from .method.memory_bank import LossMemoryBank
from .method.sharding import ShardPlan
from .training.ensemble import Callbacks, IterativeEnsemble, Rounds
from .training.layout import Layout
from .training.proxy import Proxy

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
    "__version__",
    "augmentation_strength",
]
