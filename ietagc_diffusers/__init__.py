"""IET-AGC+ for Diffusers: fine-tune diffusion models without memorizing the training set.

Names below are imported when they are first used: torch and Diffusers take seconds, ``ietagc --help`` should not.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import UsageError as UsageError
    from .families.text_to_image import Drawn as Drawn
    from .families.text_to_image import TextToImageObjective as TextToImageObjective
    from .method.augmentation import StrengthRandAugment as StrengthRandAugment
    from .method.augmentation import augmentation_strength as augmentation_strength
    from .method.averaging import ModelAverage as ModelAverage
    from .method.config import MitigationConfig as MitigationConfig
    from .method.control import Controlled as Controlled
    from .method.control import Decision as Decision
    from .method.control import PlainControl as PlainControl
    from .method.control import RandomControl as RandomControl
    from .method.control import ThresholdAwareControl as ThresholdAwareControl
    from .method.control import WenControl as WenControl
    from .method.memory_bank import LossMemoryBank as LossMemoryBank
    from .method.sharding import ShardPlan as ShardPlan
    from .training.ensemble import Callbacks as Callbacks
    from .training.ensemble import IterativeEnsemble as IterativeEnsemble
    from .training.ensemble import Rounds as Rounds
    from .training.layout import Layout as Layout
    from .training.proxy import Proxy as Proxy

__version__ = "0.2.0.dev0"

_MODULES = {
    "errors": ["UsageError"],
    "families.text_to_image": ["Drawn", "TextToImageObjective"],
    "method.augmentation": ["StrengthRandAugment", "augmentation_strength"],
    "method.averaging": ["ModelAverage"],
    "method.config": ["MitigationConfig"],
    "method.control": [
        "Controlled", "Decision", "PlainControl", "RandomControl", "ThresholdAwareControl", "WenControl",
    ],
    "method.memory_bank": ["LossMemoryBank"],
    "method.sharding": ["ShardPlan"],
    "training.ensemble": ["Callbacks", "IterativeEnsemble", "Rounds"],
    "training.layout": ["Layout"],
    "training.proxy": ["Proxy"],
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}
__all__ = ["__version__", *_MODULE_OF]

# In a checkout, evaluation (`eval`), descriptors (`sscd`) and recipes (`configs`) are beside this package; installed,
# they are inside it. Either way they are imported as `ietagc_diffusers.eval` and `ietagc_diffusers.sscd`.
if not (Path(__file__).parent / "eval").is_dir():
    __path__.append(str(Path(__file__).parent.parent))


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value
