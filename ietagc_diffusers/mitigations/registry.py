"""The mitigations at inference by name, and chains of them as the command line writes them."""

import difflib
import re
from dataclasses import fields

from ..errors import UsageError
from .attention import RescaledAttention
from .embeddings import EmbeddingNoise
from .guidance import DelayedGuidance
from .inference import RandomNumbers, RandomWords, RepeatedWords
from .pipeline import with_mitigation
from .wen import OptimisedPrompt

# A class's fields are its options with their defaults; the first line of its docstring says what it does.
MITIGATIONS = {
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


def mitigate(pipeline, name, **options):
    """A pipeline that behaves as ``pipeline`` but for the mitigation ``name``; ``pipeline`` itself stays as it is.

    The new pipeline shares the components and is of the same class (a subclass), so it takes the same arguments,
    composes (``mitigate(mitigate(pipeline, "rt"), "gni")`` rewrites the prompt, then adds noise to its embedding) and
    is saved as what it was: mitigations are not saved. With generators a call is reproducible: the mitigations' draws
    derive from the generators' states, and an image with a generator of its own does not depend on its batch.

    During a call the UNet, which both pipelines share, has hooks: do not run two calls on it at once.

    Args:
        pipeline: ``StableDiffusionPipeline`` (1.x, 2.x) or ``StableDiffusionXLPipeline``.
        name: a key of ``MITIGATIONS``.
        options: fields of ``MITIGATIONS[name]``.

    Raises ``UsageError`` for an unknown name or option, naming the nearest known, or one out of range.
    """
    return with_mitigation(pipeline, _kind(name)(**_known_options(name, options)))


def parse_mitigation(text):
    """``"rt:num_words=4"`` -> ("rt", {"num_words": 4}); options are separated by commas. Raises ``UsageError``."""
    name, _, listed = text.strip().partition(":")
    pairs = [pair.partition("=") for pair in listed.split(",") if pair.strip()]
    for option, equals, _ in pairs:
        if not equals:
            raise UsageError(f"mitigation {text}: '{option}' has no value: write {option.strip()}=value")
    options = _known_options(name, {option.strip(): value.strip() for option, _, value in pairs})
    made = _kind(name)(**options)
    return name, {option: getattr(made, option) for option in options}


def parse_mitigations(text):
    """A chain, ``"rt+gni:scale=0.05"`` -> a list of (name, options); ``"none"`` is the empty one."""
    if text.strip() == "none":
        return []
    # Names begin with a letter, the exponent of 1e+1 does not.
    return [parse_mitigation(part) for part in re.split(r"\+(?=\s*[a-z])", text)]


def apply_mitigations(pipeline, text):
    """``mitigate`` for each mitigation of the chain ``text``, in its order; ``"none"`` returns ``pipeline`` itself."""
    for name, options in parse_mitigations(text):
        pipeline = mitigate(pipeline, name, **options)
    return pipeline


def _kind(name):
    if name not in MITIGATIONS:
        raise UsageError(f"mitigation '{name}': not one of {', '.join(MITIGATIONS)}{_nearest(name, MITIGATIONS)}")
    return MITIGATIONS[name]


def _known_options(name, options):
    known = [entry.name for entry in fields(_kind(name))]
    for option in options:
        if option not in known:
            raise UsageError(
                f"mitigation {name}: unknown option '{option}'; it has {', '.join(known)}{_nearest(option, known)}"
            )
    return options


def _nearest(word, known):
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean '{near[0]}'?" if near else ""
