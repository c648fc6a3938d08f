"""Mitigations that act on captions: pure functions that take all random draws from the given ``rng``.

The rules are those of Somepalli et al., "Understanding and Mitigating Copying in Diffusion Models" (2023). Words are
separated by white space; a caption to which nothing is added is returned unchanged.
"""

from collections.abc import Sequence
from random import Random
from typing import Any

from ..errors import UsageError

VOCABULARY = 49_400  # ids that Somepalli et al. draw from: CLIP's vocabulary except its very end
NUMBERS = 100_000


def random_words(caption: str, tokenizer: Any, num_words: int, rng: Random) -> str:
    """RT: insert ``num_words`` words at random positions, each the decoding of one random token of the vocabulary.

    Tokens that are special, or that decode to no word (white space, a part of a character), are drawn again. CLIP
    reads the first 77 tokens of a caption, so words inserted after them have no effect.

    Args:
        tokenizer: a ``CLIPTokenizer``.
        num_words: at least 0.

    Raises:
        UsageError: ``num_words`` is negative, or the tokenizer decodes to no words.
    """
    return _insert(caption, _vocabulary_words(tokenizer, num_words, rng), rng)


def random_numbers(caption: str, num_words: int, rng: Random) -> str:
    """RNA: insert ``num_words`` random integers in [0, 100,000) at random positions."""
    return _insert(caption, [str(rng.randrange(NUMBERS)) for _ in range(_checked(num_words))], rng)


def repeat_words(caption: str, num_words: int, rng: Random) -> str:
    """CWR: insert ``num_words`` words of the caption at random positions. A caption without words is not changed."""
    words = caption.split()
    return _insert(caption, [rng.choice(words) for _ in range(_checked(num_words) if words else 0)], rng)


def replace_caption(tokenizer: Any, num_tokens: int, rng: Random) -> str:
    """RC: a caption of ``num_tokens`` words, each the decoding of one random token of the vocabulary."""
    return " ".join(_vocabulary_words(tokenizer, num_tokens, rng))


def choose_caption(captions: str | Sequence[str], rng: Random) -> str:
    """MC: one of ``captions``; a single caption is returned unchanged. ``UsageError`` if there are none."""
    if isinstance(captions, str):
        return captions
    if not captions:
        raise UsageError("a row has an empty list of captions: give it at least one")
    return rng.choice(captions)


def _checked(num_words: int) -> int:
    if num_words < 0:
        raise UsageError(f"`num_words` {num_words}: must be at least 0")
    return num_words


def _insert(caption: str, added: list[str], rng: Random) -> str:
    if not added:
        return caption
    words = caption.split()
    for word in added:
        words.insert(rng.randint(0, len(words)), word)
    return " ".join(words)


def _vocabulary_words(tokenizer: Any, num_words: int, rng: Random) -> list[str]:
    special, size = set(tokenizer.all_special_ids), min(VOCABULARY, len(tokenizer))
    words: list[str] = []
    # A third of the tokens of the smallest vocabulary are words: draws run out only where there are none.
    for _ in range(1000 * (_checked(num_words) + 1)):
        if len(words) == num_words:
            return words
        token = rng.randrange(size)
        if token not in special:
            word = tokenizer.decode([token]).strip()
            if word.isprintable() and len(word.split()) == 1 and "\ufffd" not in word:
                words.append(word)
    raise UsageError(f"`tokenizer`: a {type(tokenizer).__name__} that decodes to no words: is it the model's own?")
