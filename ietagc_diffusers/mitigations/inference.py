"""Mitigations at inference that insert words into the prompt: RT, RNA, CWR."""

from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar

from .base import PromptMitigation, option, whole
from .prompts import random_numbers, random_words, repeat_words


@dataclass
class InsertedWords(PromptMitigation):
    """The common part of RT, RNA and CWR."""

    num_words: int = option(4, "Words to insert.", whole)

    @property
    def acts(self) -> bool:
        return self.num_words > 0


@dataclass
class RandomWords(InsertedWords):
    """RT: insert random words of the vocabulary into the prompt."""

    name: ClassVar[str] = "rt"

    def rewrite(self, prompt: str, tokenizer: Any, rng: Random) -> str:
        return random_words(prompt, tokenizer, self.num_words, rng)


@dataclass
class RandomNumbers(InsertedWords):
    """RNA: insert random numbers below 100,000 into the prompt."""

    name: ClassVar[str] = "rna"

    def rewrite(self, prompt: str, tokenizer: Any, rng: Random) -> str:
        return random_numbers(prompt, self.num_words, rng)


@dataclass
class RepeatedWords(InsertedWords):
    """CWR: insert words of the prompt into it again."""

    name: ClassVar[str] = "cwr"

    def rewrite(self, prompt: str, tokenizer: Any, rng: Random) -> str:
        return repeat_words(prompt, self.num_words, rng)
