"""The defaults of Diffusers' other training scripts, by which the same settings are theirs."""

from dataclasses import Field, dataclass, field
from typing import Any, ClassVar

from ..settings import declared
from .settings import TrainingSettings


def _default(name: str, value: Any) -> Any:
    """A setting of ``TrainingSettings`` with another default."""
    entry: Field = next(entry for entry in declared(TrainingSettings) if entry.name == name)
    return field(default=value, metadata=entry.metadata)


@dataclass(kw_only=True)
class LoraScript(TrainingSettings):
    """``train_text_to_image_lora.py``."""

    family: ClassVar[str | None] = "Stable Diffusion"
    lora_rank: int | None = _default("lora_rank", 4)
    output_dir: str = _default("output_dir", "sd-model-finetuned-lora")
    validation_epochs: int = _default("validation_epochs", 1)
    num_validation_images: int = _default("num_validation_images", 4)


@dataclass(kw_only=True)
class SdxlScript(TrainingSettings):
    """``train_text_to_image_sdxl.py``."""

    family: ClassVar[str | None] = "Stable Diffusion XL"
    resolution: int = _default("resolution", 1024)
    output_dir: str = _default("output_dir", "sdxl-model-finetuned")
    validation_epochs: int = _default("validation_epochs", 1)
    num_validation_images: int = _default("num_validation_images", 4)
    tracker_project_name: str = _default("tracker_project_name", "text2image-fine-tune-sdxl")


@dataclass(kw_only=True)
class LoraSdxlScript(LoraScript):
    """``train_text_to_image_lora_sdxl.py``."""

    family: ClassVar[str | None] = "Stable Diffusion XL"
    resolution: int = _default("resolution", 1024)
