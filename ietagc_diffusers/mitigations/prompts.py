"""Mitigations that act on captions: pure functions, every random draw from the ``rng`` they are given.

The rules are those of Somepalli et al., "Understanding and Mitigating Copying in Diffusion Models" (2023). Words are
what white space parts; a caption to which nothing is added comes back as it is.
"""

from ..errors import UsageError

VOCABULARY = 49_400  # ids that Somepalli et al. draw from: all of CLIP's vocabulary but its very end
NUMBERS = 100_000


def random_words(caption, tokenizer, num_words, rng):
    """RT: insert ``num_words`` words at random positions, each the decoding of one random token of the vocabulary.

    Tokens that are special, or that decode to no word (white space, a part of a character), are drawn again. CLIP
    reads the first 77 tokens of a caption, so what lands behind them has no effect.

    Args:
        caption: str.
        tokenizer: a ``CLIPTokenizer``.
        num_words: at least 0; else ``UsageError``.
        rng: ``random.Random``.
    """
    return _insert(caption, _vocabulary_words(tokenizer, num_words, rng), rng)


def random_numbers(caption, num_words, rng):
    """RNA: insert ``num_words`` random integers in [0, 100,000) at random positions."""
    return _insert(caption, [str(rng.randrange(NUMBERS)) for _ in range(_checked(num_words))], rng)


def repeat_words(caption, num_words, rng):
    """CWR: insert ``num_words`` words drawn from the caption at random positions. A caption without words stays as it
    is.
    """
    words = caption.split()
    return _insert(caption, [rng.choice(words) for _ in range(_checked(num_words) if words else 0)], rng)


def replace_caption(tokenizer, num_tokens, rng):
    """RC: a caption of ``num_tokens`` words, each the decoding of one random token of the vocabulary."""
    return " ".join(_vocabulary_words(tokenizer, num_tokens, rng))


def choose_caption(captions, rng):
    """MC: one of ``captions``, a sequence of str; a single str is returned as it is. ``UsageError`` if it is empty."""
    if isinstance(captions, str):
        return captions
    if not captions:
        raise UsageError("a row has an empty list of captions: give it at least one")
    return rng.choice(captions)


def _checked(num_words):
    if num_words < 0:
        raise UsageError(f"num_words {num_words}: must be at least 0")
    return num_words


def _insert(caption, added, rng):
    if not added:
        return caption
    words = caption.split()
    for word in added:
        words.insert(rng.randint(0, len(words)), word)
    return " ".join(words)


def _vocabulary_words(tokenizer, num_words, rng):
    special, size = set(tokenizer.all_special_ids), min(VOCABULARY, len(tokenizer))
    words = []
    # A third of the tokens of the smallest vocabulary are words: this ends only where there are none.
    for _ in range(1000 * (_checked(num_words) + 1)):
        if len(words) == num_words:
            return words
        token = rng.randrange(size)
        if token not in special:
            word = tokenizer.decode([token]).strip()
            if word.isprintable() and len(word.split()) == 1 and "\ufffd" not in word:
                words.append(word)
    raise UsageError(f"the tokenizer decodes to no words: is it the model's own? ({type(tokenizer).__name__})")
