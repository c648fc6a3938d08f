"""The mean of the proxies (eq. 9)."""

import math
from collections.abc import Callable, Iterable, Iterator

import torch

from ..tensor_files import HostMemory, Place, TensorFile, Tensors


class ModelAverage:
    """Unweighted mean of sets of tensors, accumulated in float64, on the host or in a file.

    A float64 sum of a few float32 numbers does not depend on their order once it is rounded back, so neither the
    order of the shards nor the number of processes shows in the result.

    Args:
        tensors: named tensors whose names and shapes every added model has.
        place: where the sums wait: from the first model that is added to the mean.
        name: of the sums in that place.
        watched: whether ``squares`` and ``spread`` are computed.

    Attributes:
        sums: the sums of what was added, or None.
        count: how many models were added.
        squares: the sum of the squares of all that was added; nan if that is not known.
        spread: of the last mean m of the models x_i: the mean over i of ||x_i - m||^2. It is the mean of the squares
            minus the square of the mean, both in float64, so that no copy of a model is needed.
    """

    def __init__(self, tensors: Tensors, place: Place | None = None, name: str = "mean", watched: bool = False):
        # Names and shapes only: a tensor on the meta device has no content.
        self.like = {key: torch.empty(tensor.shape, device="meta") for key, tensor in tensors.items()}
        self.place, self.name = place or HostMemory(), name
        self.sums: Tensors | None = None
        self.count = 0
        self.watched, self.squares, self.spread = watched, 0.0, math.nan

    def _sum(self, name):
        shape = self.like[name].shape
        return torch.zeros(shape, dtype=torch.float64) if self.sums is None else self.sums[name]

    @torch.no_grad()
    def add(self, tensors: Tensors, count: int = 1, squares: float | None = None) -> None:
        """Add a model, or the sums of ``count`` models and their ``squares``."""
        if self.watched:
            self.squares += squared_norm(tensors[name] for name in self.like) if squares is None else squares
        sums = ((name, self._sum(name).add_(tensors[name].detach().cpu())) for name in self.like)
        self.sums = self.place.keep(self.name, self.like, sums, self.sums, torch.float64, owned=True)
        self.count += count

    def adopt(self, sums: TensorFile, count: int, squares: float = math.nan) -> None:
        """Add the sums of ``count`` models that a file holds, and their ``squares``."""
        if self.sums is None:
            self.sums, self.count, self.squares = self.place.adopt(self.name, sums), count, squares
        else:
            self.add(sums, count, squares)

    def mean(self, total: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor) -> Iterator:
        """Yield (name, float32 mean) one tensor at a time, and start over.

        ``total`` sums a float64 tensor over the processes; every process calls it for every tensor, in the same order.
        """
        count = total(torch.tensor(float(self.count), dtype=torch.float64))
        squares = total(torch.tensor(self.squares, dtype=torch.float64)).item() if self.watched else math.nan
        for name in self.like:
            summed = total(self._sum(name))
            if self.watched:
                squares -= squared_norm([summed]) / count.item()
            yield name, (summed / count).float()
        self.spread = max(squares / count.item(), 0.0) if math.isfinite(squares) else math.nan
        self.sums, self.count, self.squares = None, 0, 0.0
        self.place.drop(self.name)


def squared_norm(tensors: Iterable[torch.Tensor]) -> float:
    """The sum of the squares of all numbers, in float64. ``sum`` adds in pairs: norms and dot products lose digits that
    a difference of two such sums needs.
    """
    found = 0.0
    for tensor in tensors:
        here = tensor.detach() if tensor.device.type == "cuda" else tensor.detach().cpu()  # others may have no float64
        found += here.double().square().sum().item()
    return found


def disagreement(spread: float, moved: float) -> float | None:
    """How far the K proxies theta_i of a round were from their mean theta_hat, beside how far that came in the round
    from where all of them had started:

        sqrt(1/K sum_i ||theta_i - theta_hat||^2) / ||theta_hat - theta_start||

    0: all proxies are the same. sqrt(K - 1): their updates are equally long and at right angles, so that they have
    nothing in common. More: they undo one another.

    Args:
        spread: the mean over i of ||theta_i - theta_hat||^2; moved: ||theta_hat - theta_start||^2.

    Returns:
        It, to five digits; None where theta_hat did not move, or one of the two is not known or not finite.
    """
    ratio = math.sqrt(spread / moved) if moved > 0 and spread >= 0 else math.nan
    return float(f"{ratio:.5g}") if math.isfinite(ratio) else None
