"""The mean of the proxies (eq. 9)."""

from collections.abc import Callable, Iterator

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

    Attributes:
        sums: the sums of what was added, or None.
        count: how many models were added.
    """

    def __init__(self, tensors: Tensors, place: Place | None = None, name: str = "mean"):
        # Names and shapes only: a tensor on the meta device has no content.
        self.like = {key: torch.empty(tensor.shape, device="meta") for key, tensor in tensors.items()}
        self.place, self.name = place or HostMemory(), name
        self.sums: Tensors | None = None
        self.count = 0

    def _sum(self, name):
        shape = self.like[name].shape
        return torch.zeros(shape, dtype=torch.float64) if self.sums is None else self.sums[name]

    @torch.no_grad()
    def add(self, tensors: Tensors, count: int = 1) -> None:
        """Add a model, or the sums of ``count`` models."""
        sums = ((name, self._sum(name).add_(tensors[name].detach().cpu())) for name in self.like)
        self.sums = self.place.keep(self.name, self.like, sums, self.sums, torch.float64, owned=True)
        self.count += count

    def adopt(self, sums: TensorFile, count: int) -> None:
        """Add the sums of ``count`` models that a file holds."""
        if self.sums is None:
            self.sums, self.count = self.place.adopt(self.name, sums), count
        else:
            self.add(sums, count)

    def mean(self, total: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor) -> Iterator:
        """Yield (name, float32 mean) one tensor at a time, and start over.

        ``total`` sums a float64 tensor over the processes; every process calls it for every tensor, in the same order.
        """
        count = total(torch.tensor(float(self.count), dtype=torch.float64))
        for name in self.like:
            yield name, (total(self._sum(name)) / count).float()
        self.sums, self.count = None, 0
        self.place.drop(self.name)
