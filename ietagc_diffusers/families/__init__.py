"""The kinds of models that can be trained; one line of ``FAMILIES`` each."""

from pathlib import Path

from diffusers import DiffusionPipeline

from ..errors import UsageError
from ..run_folder import ADAPTER_FILE
from .base import WEIGHTS_FILE, Family, Objective, drawn_edge
from .sd3 import StableDiffusion3
from .sdxl import StableDiffusionXL
from .stable_diffusion import StableDiffusion
from .unconditional import Unconditional
from .views import Bordered, NoisyPixels, bordered

INDEX = DiffusionPipeline.config_name  # model_index.json
FAMILIES: tuple[type[Family], ...] = (StableDiffusion, StableDiffusionXL, StableDiffusion3, Unconditional)


def family_of(
    base: str | Path | None,
    revision: str | None = None,
    cache_dir: str | None = None,
    setting: str = "pretrained_model_name_or_path",
    wanted: str | None = None,
) -> type[Family]:
    """The family of a pipeline's folder or Hub id, by the class that its model_index.json names.

    A Hub id whose file cannot be read is taken for ``wanted``, the name of a family, or the first of ``FAMILIES``; so
    is no base at all. ``setting`` names the base in messages. Raises ``UsageError`` for a folder that is not there or
    has no such file, for a pipeline of no family here, or of another than ``wanted``.
    """
    expected = [family for family in FAMILIES if wanted in (None, family.name)]
    if base is None:
        return expected[0]
    _check_place(Path(base), setting)
    try:
        kind = DiffusionPipeline.load_config(str(base), revision=revision, cache_dir=cache_dir)["_class_name"]
    except (OSError, ValueError, KeyError):
        return expected[0]
    for family in FAMILIES:
        if kind in {pipeline.__name__ for pipeline in family.pipelines}:
            if family in expected:
                return family
            raise UsageError(
                f"`{setting}` {base}: is a {kind}, and this script trains {wanted}; {family.script} trains it"
            )
    known = "; ".join(f"{f.name} ({', '.join(p.__name__ for p in f.pipelines)})" for f in FAMILIES)
    raise UsageError(f"`{setting}` {base}: is a {kind}; the models that can be trained are {known}")


def _check_place(base, setting):
    """Raise ``UsageError`` for what can only be a folder and is not a pipeline's."""
    if not base.exists() and (base.is_absolute() or str(base).count("/") > 1):
        raise UsageError(f"`{setting}` {base}: no such folder")
    if not base.is_dir() or (base / INDEX).is_file():
        return
    if (base / ADAPTER_FILE).is_file():
        raise UsageError(f"`{setting}` {base}: holds a LoRA, not a pipeline; give the base model that it was made for")
    raise UsageError(f"`{setting}` {base}: has no {INDEX}, so it is not the folder of a pipeline")


__all__ = [
    "FAMILIES",
    "WEIGHTS_FILE",
    "Bordered",
    "Family",
    "NoisyPixels",
    "Objective",
    "StableDiffusion",
    "StableDiffusion3",
    "StableDiffusionXL",
    "Unconditional",
    "bordered",
    "drawn_edge",
    "family_of",
]
