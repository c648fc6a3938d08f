"""IET-AGC+ for Diffusers: fine-tune diffusion models without memorizing the training set."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

# In a checkout, evaluation (`eval`), descriptors (`sscd`) and recipes (`configs`) lie beside this package; installed,
# they lie inside it. Either way they are imported as `ietagc_diffusers.eval` and `ietagc_diffusers.sscd`.
if not (Path(__file__).parent / "eval").is_dir():
    __path__.append(str(Path(__file__).parent.parent))

if TYPE_CHECKING:
    from .errors import UsageError as UsageError
    from .families import FAMILIES as FAMILIES
    from .families import Family as Family
    from .families import StableDiffusion as StableDiffusion
    from .families import family_of as family_of
    from .families.text_to_image import TextToImageObjective as TextToImageObjective
    from .method.augmentation import StrengthRandAugment as StrengthRandAugment
    from .method.augmentation import augmentation_strength as augmentation_strength
    from .method.averaging import ModelAverage as ModelAverage
    from .method.config import MitigationConfig as MitigationConfig
    from .method.control import Control as Control
    from .method.control import PlainControl as PlainControl
    from .method.control import RandomControl as RandomControl
    from .method.control import ThresholdAwareControl as ThresholdAwareControl
    from .method.memory_bank import LossMemoryBank as LossMemoryBank
    from .method.sharding import ShardPlan as ShardPlan
    from .method.wen import WenControl as WenControl
    from .mitigations import mitigate as mitigate
    from .run_folder import RunFolder as RunFolder
    from .training.ensemble import Callback as Callback
    from .training.ensemble import IterativeEnsemble as IterativeEnsemble
    from .training.layout import Layout as Layout
    from .training.proxy import Proxy as Proxy
    from .training.rounds import Rounds as Rounds
    from .training.run import train as train
    from .training.settings import TrainingSettings as TrainingSettings
    from .training.weights import Weights as Weights

# Where each public name lives; it is imported when it is first asked for, so that a command line answers at once.
_HOMES = {
    "errors": ("UsageError",),
    "families": ("FAMILIES", "Family", "StableDiffusion", "family_of"),
    "families.text_to_image": ("TextToImageObjective",),
    "method.augmentation": ("StrengthRandAugment", "augmentation_strength"),
    "method.averaging": ("ModelAverage",),
    "method.config": ("MitigationConfig",),
    "method.control": ("Control", "PlainControl", "RandomControl", "ThresholdAwareControl"),
    "method.memory_bank": ("LossMemoryBank",),
    "method.sharding": ("ShardPlan",),
    "mitigations": ("mitigate",),
    "method.wen": ("WenControl",),
    "run_folder": ("RunFolder",),
    "training.ensemble": ("Callback", "IterativeEnsemble"),
    "training.rounds": ("Rounds",),
    "training.layout": ("Layout",),
    "training.proxy": ("Proxy",),
    "training.run": ("train",),
    "training.settings": ("TrainingSettings",),
    "training.weights": ("Weights",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = ["__version__", *sorted(_HOME_OF)]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
