"""Mitigations on captions: what they add, where, and that nothing but the seed decides it."""

import random
from collections import Counter

import pytest

from ietagc_diffusers import UsageError, testing
from ietagc_diffusers.mitigations import choose_caption, random_numbers, random_words, repeat_words, replace_caption

CAPTIONS = {
    "plain": "a red picture of a blue picture",
    "empty": "",
    "one": "picture",
    "long": " ".join(f"word{i}" for i in range(80)),
    "cyrillic": "красная картина на белой стене",
    "japanese": "赤い絵 と 青い絵",
    "emoji": "a 🐈\u200d⬛ in the sun",
}


@pytest.fixture(scope="module")
def tokenizer():
    return testing.build_tokenizer(["a red picture", "a blue picture"], num_merges=32)


@pytest.fixture(scope="module")
def vocabulary(tokenizer):
    ids = set(range(len(tokenizer))) - set(tokenizer.all_special_ids)
    return {tokenizer.decode([token]).strip() for token in ids}


FUNCTIONS = {
    "rt": lambda caption, n, rng, tokenizer: random_words(caption, tokenizer, n, rng),
    "rna": lambda caption, n, rng, tokenizer: random_numbers(caption, n, rng),
    "cwr": lambda caption, n, rng, tokenizer: repeat_words(caption, n, rng),
}


def added(caption, changed):
    """The words of ``changed`` beyond those of ``caption``, whose order must be kept."""
    left = iter(changed.split())
    assert all(word in left for word in caption.split()), "the caption's own words must stay in order"
    return list((Counter(changed.split()) - Counter(caption.split())).elements())


@pytest.mark.parametrize("caption", CAPTIONS.values(), ids=CAPTIONS)
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("number", [0, 1, 4, 50])
def test_each_adds_exactly_what_it_says(tokenizer, vocabulary, caption, name, number):
    changed = FUNCTIONS[name](caption, number, random.Random(3), tokenizer)
    if number == 0 or (name == "cwr" and not caption):
        assert changed == caption
        return
    words = added(caption, changed)
    assert len(words) == number
    belongs = {
        "rt": lambda word: word in vocabulary,
        "rna": lambda word: word == str(int(word)) and 0 <= int(word) < 100_000,
        "cwr": lambda word: word in caption.split(),
    }[name]
    assert all(map(belongs, words))


def test_random_words_are_whole_words_and_never_special(tokenizer):
    words = random_words("", tokenizer, 3000, random.Random(0)).split(" ")
    assert len(words) == 3000
    assert not set(words) & set(tokenizer.all_special_tokens)
    assert all(word and "\ufffd" not in word and word.isprintable() for word in words)
    assert len(set(words)) > 90  # the printable bytes, and some of the merges


def test_random_words_come_from_the_first_49400_tokens():
    class Wide:
        all_special_ids = (7,)

        def __len__(self):
            return 200_000

        def decode(self, ids):
            return f"t{ids[0]} "

    ids = [int(word[1:]) for word in random_words("", Wide(), 20_000, random.Random(0)).split()]
    assert max(ids) < 49_400 and max(ids) > 49_000 and 7 not in ids


def test_a_tokenizer_without_words_is_an_error_not_an_endless_loop():
    class Blank:
        all_special_ids = ()

        def __len__(self):
            return 10

        def decode(self, ids):
            return " "

    with pytest.raises(UsageError, match="decodes to no words"):
        random_words("a", Blank(), 1, random.Random(0))
    assert random_words("a", Blank(), 0, random.Random(0)) == "a"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_seed_alone_decides(tokenizer, name):
    caption = CAPTIONS["plain"]
    results = [FUNCTIONS[name](caption, 3, random.Random(seed), tokenizer) for seed in (*range(20), *range(20))]
    assert results[:20] == results[20:]
    assert len(set(results)) > 10
    random.seed(0)
    state = random.getstate()
    FUNCTIONS[name](caption, 3, random.Random(1), tokenizer)
    assert random.getstate() == state


@pytest.mark.parametrize("name", ["rt", "rna"])
def test_every_position_is_as_likely(tokenizer, name):
    """One word inserted in a caption of three: four places, a quarter each."""
    rng, counts = random.Random(0), Counter()
    for _ in range(2000):
        words = FUNCTIONS[name]("§ § §", 1, rng, tokenizer).split()
        counts[next(i for i, word in enumerate(words) if word != "§")] += 1
    assert set(counts) == {0, 1, 2, 3}
    assert all(abs(count - 500) < 100 for count in counts.values())


def test_repeated_words_are_drawn_from_the_caption_as_it_was():
    """Drawing from the growing caption would favour words that were drawn before: all four different in 4.5 % of
    cases instead of 4!/4^4 = 9.4 %.
    """
    rng = random.Random(0)
    changed = [repeat_words("a b c d", 4, rng).split() for _ in range(2000)]
    different = sum(set(Counter(words).values()) == {2} for words in changed)
    assert different / 2000 == pytest.approx(24 / 256, abs=0.02)


def test_a_replaced_caption_has_nothing_of_the_old(tokenizer, vocabulary):
    for number in (0, 1, 4, 100):
        words = replace_caption(tokenizer, number, random.Random(number)).split()
        assert len(words) == number and set(words) <= vocabulary


def test_each_of_several_captions_is_chosen_as_often():
    rng = random.Random(0)
    counts = Counter(choose_caption(["a", "b", "c"], rng) for _ in range(3000))
    assert set(counts) == {"a", "b", "c"} and all(abs(count - 1000) < 150 for count in counts.values())
    assert choose_caption("a single caption", rng) == "a single caption"
    with pytest.raises(UsageError, match="empty list of captions"):
        choose_caption([], rng)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_negative_number_is_an_error(tokenizer, name):
    with pytest.raises(UsageError, match="`num_words` -1: must be at least 0"):
        FUNCTIONS[name]("a picture", -1, random.Random(0), tokenizer)
