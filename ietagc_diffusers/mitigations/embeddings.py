"""GNI: noise on the prompt's embedding at inference. In training (GN) the objective adds it."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import Mitigation, non_negative, option
from .call import Step


@dataclass
class EmbeddingNoise(Mitigation):
    """GNI: add Gaussian noise to the prompt's embedding, embedding + scale * N(0, 1).

    Only the conditional branch gets noise (the authors' code adds it to the unconditional one too); in SDXL and Stable
    Diffusion 3 both the token embeddings and the pooled one, which also carries the prompt. In Stable Diffusion 3 the
    tokens of all its encoders get it, but not the zeros that the pipeline fills up with. The noise is drawn in float32
    on the host, so that device and dtype do not change it.
    """

    name: ClassVar[str] = "gni"
    scale: float = option(0.1, "Standard deviation of the noise.", non_negative)

    @property
    def acts(self) -> bool:
        return self.scale > 0

    def before_step(self, step: Step) -> None:
        if step.index:
            return
        generators = [torch.Generator().manual_seed(seed) for seed in self.call.seeds(self.salt)]
        for target in (step.embeddings, step.pooled):
            if target is not None:
                noise = torch.stack([torch.randn(target.shape[1:], generator=g) for g in generators])
                target.copy_(target.float() + self.scale * step.unpadded(noise.to(target.device), target))
