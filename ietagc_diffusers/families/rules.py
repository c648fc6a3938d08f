"""What rivals of plain training have in common: draws that an image keeps, and losses of their own."""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F


def drawn_once(
    ids: Sequence[int], seed: int, kind: int, draw: Callable[[np.random.Generator], np.ndarray]
) -> torch.Tensor:
    """What each image keeps for the whole training, (B, ...): ``draw`` from a generator of (seed, kind, id). It is
    drawn again at each visit instead of stored, and is the same on every device, in every process and after a stop.

    ids: B integers, the images' ``sample_id``; kind tells the draws of one seed and image apart.
    """
    generators = (np.random.default_rng([seed, kind, number % 2**64]) for number in ids)
    return torch.from_numpy(np.stack([draw(generator) for generator in generators]))


class Rule(Protocol):
    """How predictions of a batch are compared with its target."""

    def losses(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """(B, ...) float32, of each element."""
        ...


def squared_errors(prediction: torch.Tensor, target: torch.Tensor, rule: Rule | None = None) -> torch.Tensor:
    """(B, ...) float32, of each element; or the losses of a rule."""
    if rule is not None:
        return rule.losses(prediction, target)
    return F.mse_loss(prediction.float(), target.float(), reduction="none")


def mean_squared_error(prediction: torch.Tensor, target: torch.Tensor, rule: Rule | None = None) -> torch.Tensor:
    """Their mean (), by the official scripts' call: the same bits."""
    if rule is not None:
        return rule.losses(prediction, target).mean()
    return F.mse_loss(prediction.float(), target.float(), reduction="mean")
