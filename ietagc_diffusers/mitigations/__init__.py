"""Mitigations by others, each usable by itself: on captions, and at inference by name (``mitigate``)."""

from .prompts import choose_caption, random_numbers, random_words, repeat_words, replace_caption
from .registry import MITIGATIONS, apply_mitigations, mitigate, parse_mitigation, parse_mitigations
from .wen import TextConditionalNoise, text_conditional_noise

__all__ = [
    "MITIGATIONS",
    "TextConditionalNoise",
    "apply_mitigations",
    "choose_caption",
    "mitigate",
    "parse_mitigation",
    "parse_mitigations",
    "random_numbers",
    "random_words",
    "repeat_words",
    "replace_caption",
    "text_conditional_noise",
]
