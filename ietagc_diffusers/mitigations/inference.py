"""Mitigations at inference that draw at random: on the prompt (RT, RNA, CWR) and on its embedding (GNI)."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import Mitigation, PromptMitigation, non_negative, option, whole
from .prompts import random_numbers, random_words, repeat_words


@dataclass
class InsertedWords(PromptMitigation):
    """What RT, RNA and CWR have in common."""

    num_words: int = option(4, "Words to insert.", whole)

    @property
    def acts(self):
        return self.num_words > 0


@dataclass
class RandomWords(InsertedWords):
    """RT: insert random words of the vocabulary into the prompt."""

    name: ClassVar[str] = "rt"

    def rewrite(self, prompt, tokenizer, rng):
        return random_words(prompt, tokenizer, self.num_words, rng)


@dataclass
class RandomNumbers(InsertedWords):
    """RNA: insert random numbers below 100,000 into the prompt."""

    name: ClassVar[str] = "rna"

    def rewrite(self, prompt, tokenizer, rng):
        return random_numbers(prompt, self.num_words, rng)


@dataclass
class RepeatedWords(InsertedWords):
    """CWR: insert words of the prompt into it again."""

    name: ClassVar[str] = "cwr"

    def rewrite(self, prompt, tokenizer, rng):
        return repeat_words(prompt, self.num_words, rng)


@dataclass
class EmbeddingNoise(Mitigation):
    """GNI: add Gaussian noise to the prompt's embedding, embedding + scale * N(0, 1).

    To the conditional branch alone (the authors' code disturbs the unconditional one, too); in SDXL to the token
    embeddings and to the pooled one, which carries the prompt as well. The noise is drawn in float32 on the host, so
    that device and dtype do not change it.
    """

    name: ClassVar[str] = "gni"
    scale: float = option(0.1, "Standard deviation of the noise.", non_negative)

    @property
    def acts(self):
        return self.scale > 0

    def before_unet(self, step):
        if step.index:
            return
        generators = [torch.Generator().manual_seed(seed) for seed in self.call.seeds(self.salt)]
        for target in (step.embeddings, step.pooled):
            if target is not None:
                noise = torch.stack([torch.randn(target.shape[1:], generator=g) for g in generators])
                target.copy_(target.float() + self.scale * noise.to(target.device))
