"""The mean of the proxies (eq. 9)."""

import torch


class ModelAverage:
    """Unweighted mean of sets of tensors, accumulated in float64 on the host.

    A float64 sum of a few float32 numbers does not depend on their order once it is rounded back, so neither the
    order of the shards nor the number of processes shows in the result.

    Args:
        tensors: dict of named tensors whose names and shapes every added model has.
    """

    def __init__(self, tensors):
        self.sums = {name: torch.zeros(tensor.shape, dtype=torch.float64) for name, tensor in tensors.items()}
        self.count = 0

    @torch.no_grad()
    def add(self, tensors):
        for name, tensor in tensors.items():
            self.sums[name] += tensor.detach().cpu()
        self.count += 1

    def mean(self, total=lambda tensor: tensor):
        """Yield (name, float32 mean) one tensor at a time, and start over.

        ``total`` sums a float64 tensor over the processes; every process calls it for every tensor, in the same order.
        """
        count = total(torch.tensor(float(self.count), dtype=torch.float64))
        for name, value in self.sums.items():
            yield name, (total(value) / count).float()
            value.zero_()
        self.count = 0
