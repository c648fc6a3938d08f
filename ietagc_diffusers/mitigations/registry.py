"""The mitigations at inference by name, and chains of them as text."""

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from ..errors import UsageError
from .attention import RescaledAttention
from .base import Mitigation
from .embeddings import EmbeddingNoise
from .guidance import DelayedGuidance
from .inference import RandomNumbers, RandomWords, RepeatedWords
from .pipeline import with_mitigation
from .wen import OptimisedPrompt

# A class's fields are its options with their defaults; the first line of its docstring describes it.
MITIGATIONS: dict[str, type[Mitigation]] = {
    kind.name: kind
    for kind in (
        RandomWords,
        RandomNumbers,
        RepeatedWords,
        EmbeddingNoise,
        OptimisedPrompt,
        DelayedGuidance,
        RescaledAttention,
    )
}


def mitigate(pipeline: Any, name: str, **options: Any) -> Any:
    """A pipeline that works as ``pipeline`` with the mitigation ``name``; ``pipeline`` itself is not changed.

    The new pipeline shares the components and is of a subclass, so it takes the same arguments. Mitigations compose:
    ``mitigate(mitigate(pipeline, "rt"), "gni")`` rewrites the prompt, then adds noise to its embedding. They are not
    saved: ``save_pretrained`` writes the original pipeline. With generators a call is reproducible: the mitigations'
    draws are derived from the generators' states, and an image with its own generator does not depend on its batch.

    During a call the denoiser, which both pipelines share, has hooks: do not run two calls on it at once.

    Args:
        pipeline: ``StableDiffusionPipeline`` (1.x, 2.x), ``StableDiffusionXLPipeline`` or ``StableDiffusion3Pipeline``
            (3, 3.5), in which ``memattn`` finds no cross-attention.
        name: a key of ``MITIGATIONS``.
        options: fields of ``MITIGATIONS[name]``.

    Raises:
        UsageError: an unknown name or option (the message names the nearest known one), an option out of range, or a
            pipeline on which the mitigation cannot act.
    """
    return with_mitigation(pipeline, _kind(name)(**_known_options(name, options)))


def parse_mitigation(text: str) -> tuple[str, dict[str, Any]]:
    """``"rt:num_words=4"`` -> ("rt", {"num_words": 4}); options are separated by commas. Raises ``UsageError``."""
    name, _, listed = text.strip().partition(":")
    pairs = [pair.partition("=") for pair in listed.split(",") if pair.strip()]
    for option, equals, _ in pairs:
        if not equals:
            raise UsageError(f"mitigation {text}: '{option}' has no value: write {option.strip()}=value")
    options = _known_options(name, {option.strip(): value.strip() for option, _, value in pairs})
    parsed = _kind(name)(**options)
    return name, {option: getattr(parsed, option) for option in options}


def parse_mitigations(text: str) -> list[tuple[str, dict[str, Any]]]:
    """A chain, ``"rt+gni:scale=0.05"`` -> a list of (name, options); ``"none"`` is the empty chain."""
    if text.strip() == "none":
        return []
    # Names begin with a letter, the exponent of 1e+1 does not.
    return [parse_mitigation(part) for part in re.split(r"\+(?=\s*[a-z])", text)]


def apply_mitigations(pipeline: Any, text: str) -> Any:
    """``mitigate`` for each mitigation of the chain ``text``, in its order; ``"none"`` returns ``pipeline`` itself."""
    for name, options in parse_mitigations(text):
        pipeline = mitigate(pipeline, name, **options)
    return pipeline


def _kind(name: str) -> type[Mitigation]:
    if name not in MITIGATIONS:
        raise UsageError(f"mitigation '{name}': not one of {', '.join(MITIGATIONS)}{_nearest(name, MITIGATIONS)}")
    return MITIGATIONS[name]


def _known_options(name: str, options: Mapping[str, Any]) -> Mapping[str, Any]:
    known = [entry.name for entry in fields(_kind(name))]
    for option in options:
        if option not in known:
            raise UsageError(
                f"mitigation {name}: unknown option '{option}'; it has {', '.join(known)}{_nearest(option, known)}"
            )
    return options


def _nearest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean '{near[0]}'?" if near else ""
