"""The kinds of models that can be trained; one line of ``FAMILIES`` each."""

from pathlib import Path

from diffusers import DiffusionPipeline

from ..errors import UsageError
from .base import WEIGHTS_FILE, Family, Objective, drawn_edge, place_name
from .sd3 import StableDiffusion3
from .sdxl import StableDiffusionXL
from .stable_diffusion import StableDiffusion

FAMILIES: tuple[type[Family], ...] = (StableDiffusion, StableDiffusionXL, StableDiffusion3)


def family_of(
    base: str | Path,
    revision: str | None = None,
    cache_dir: str | None = None,
    setting: str = "pretrained_model_name_or_path",
    wanted: str | None = None,
) -> type[Family]:
    """The family of a pipeline's folder or Hub id, by the class that its model_index.json names.

    A base without that file is taken for ``wanted``, the name of a family, or for the first of ``FAMILIES``: Diffusers'
    scripts read the parts only. ``setting`` names the base in messages. Raises ``UsageError`` for a pipeline of no
    family here, or of another than ``wanted``.
    """
    expected = [family for family in FAMILIES if wanted in (None, family.name)]
    try:
        kind = DiffusionPipeline.load_config(str(base), revision=revision, cache_dir=cache_dir)["_class_name"]
    except (OSError, ValueError, KeyError):
        return expected[0]
    for family in FAMILIES:
        if kind in {pipeline.__name__ for pipeline in family.pipelines}:
            if family in expected:
                return family
            raise UsageError(
                f"`{setting}` {base}: is a {kind}, and this script trains {wanted}; train_text_to_image_ietagc.py "
                "trains every kind"
            )
    known = "; ".join(f"{f.name} ({', '.join(p.__name__ for p in f.pipelines)})" for f in FAMILIES)
    raise UsageError(f"`{setting}` {base}: is a {kind}; the models that can be trained are {known}")


__all__ = [
    "FAMILIES",
    "WEIGHTS_FILE",
    "Family",
    "Objective",
    "StableDiffusion",
    "StableDiffusion3",
    "StableDiffusionXL",
    "drawn_edge",
    "family_of",
    "place_name",
]
