"""The run's own past as the reference of calibrated control, where there is no base (``--calibrate past``)."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ..checkpoint import Checkpoint, Held
from ..tensor_files import HostMemory, Place, Tensors

REFERENCE, NEXT = "past-reference", "past-next"  # of the files in a checkpoint


def kept_after(rounds: int) -> tuple[int, int]:
    """After how many rounds the model was made that is the reference once ``rounds`` are done, and the one that comes
    next; 0: there is none.

    A model is kept after 1, 2, 4, 8, ... rounds, and becomes the reference when there are twice as many: it has always
    taken a quarter to a half of the run's steps, and two models are kept whatever the length of the run.
    """
    latest = 1 << rounds.bit_length() - 1 if rounds else 0
    return latest // 2, latest


class PastModel:
    """A model that the run itself had at a quarter to a half of its present steps, as a second model on the device.

    It has seen the training images too, but has memorized them less. Until the run has taken two rounds there is none,
    and nothing is decided.

    Args:
        module: its denoiser: a frozen copy of the trained one, whose weights are replaced.
        model: the same as it is called.
        place: where the next one waits; default: host memory.
    """

    def __init__(self, module: nn.Module, model: Callable, place: Place | None = None):
        self.module, self.model, self.place = module, model, place or HostMemory()
        self.rounds = 0  # that were done at the last call of ``end_round``
        self.next: Tensors | None = None

    @torch.no_grad()
    def losses(self, objective: Any, drawn: Any) -> torch.Tensor:
        """(B,) float32; +inf as long as there is no past."""
        if not kept_after(self.rounds)[0]:
            return torch.full((len(drawn),), torch.inf, device=drawn.levels.device)
        return objective.losses(self.model, drawn)

    def end_round(self, rounds: int, weights: Tensors) -> None:
        """``rounds`` are done, and the run would now be saved with these weights, by name."""
        self.rounds = rounds
        if kept_after(rounds)[1] != rounds:
            return
        if self.next is not None:
            self._become(self.next)
        self.next = self.place.keep(NEXT, weights, weights.items(), self.next)

    @torch.no_grad()
    def _become(self, weights):
        for name, parameter in self.module.named_parameters():
            parameter.copy_(weights[name])

    def held(self) -> Iterator[Held]:
        """The tensors that a checkpoint needs, by file."""
        reference, coming = kept_after(self.rounds)
        if reference:
            yield Held(_file(REFERENCE), reference, dict(self.module.named_parameters()))
        if self.next is not None:
            yield Held(_file(NEXT), coming, self.next)

    def resume(self, checkpoint: Checkpoint, rounds: int) -> None:
        """``rounds`` were done when the checkpoint was written."""
        self.rounds = rounds
        reference, coming = checkpoint.held(_file(REFERENCE)), checkpoint.held(_file(NEXT))
        if reference is not None:
            self._become(reference)
        if coming is not None:
            self.next = self.place.adopt(NEXT, coming)


def _file(name):
    return f"ietagc/{name}.safetensors"
