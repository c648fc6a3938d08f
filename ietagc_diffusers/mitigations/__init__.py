"""The rival mitigations, each usable alone: on captions, in training and at inference."""

from .prompts import choose_caption, random_numbers, random_words, repeat_words, replace_caption

__all__ = ["choose_caption", "random_numbers", "random_words", "repeat_words", "replace_caption"]
