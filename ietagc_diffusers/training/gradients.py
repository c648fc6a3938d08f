"""Gradients of processes that train one shard together, summed while the backward pass is still running."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

BUCKET_BYTES = (
    25 * 2**20
)  # as torch's own DistributedDataParallel: large enough for the network, small enough to overlap


class GradientSum:
    """Sums the gradients of some parameters over a group of processes, in buckets.

    Between ``expect`` and ``finish`` a bucket is sent as soon as all of its gradients are there. Buckets are sent in
    the same order on all processes, whichever gradients come first, and also by a process that has none to give.

    Args:
        parameters: the same on every process, in the same order.
        group: of torch.distributed; None is all processes.
        bucket_bytes: the size from which a bucket is full.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], group: Any = None, bucket_bytes: int = BUCKET_BYTES):
        self.group = group
        self.buckets: list[list[torch.nn.Parameter]] = [[]]
        size = 0
        for parameter in reversed(parameters):  # about the order in which a backward pass gives gradients
            if size >= bucket_bytes:
                self.buckets.append([])
                size = 0
            self.buckets[-1].append(parameter)
            size += parameter.numel() * parameter.element_size()
        self.bucket_of = {id(p): number for number, bucket in enumerate(self.buckets) for p in bucket}
        self.expecting = False
        self.missing: list[int] = []  # gradients of each bucket that are not there yet
        self.sent: list[tuple[torch.Tensor, Any]] = []  # a flat bucket, and the work that sums it
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._ready)

    def expect(self) -> None:
        """The backward pass that comes is the last one before ``finish``."""
        self.expecting, self.missing, self.sent = True, [len(bucket) for bucket in self.buckets], []

    def _ready(self, parameter):
        if self.expecting:
            self.missing[self.bucket_of[id(parameter)]] -= 1
            while len(self.sent) < len(self.buckets) and self.missing[len(self.sent)] == 0:
                self._send()

    def _send(self):
        flat = torch.cat([_gradient(parameter).reshape(-1) for parameter in self.buckets[len(self.sent)]])
        self.sent.append((flat, dist.all_reduce(flat, group=self.group, async_op=True)))

    @torch.no_grad()
    def finish(self) -> None:
        """Send what was not sent, wait, and put the sums into the gradients."""
        if not self.expecting:
            self.expect()
        self.expecting = False
        while len(self.sent) < len(self.buckets):
            self._send()
        for bucket, (flat, work) in zip(self.buckets, self.sent, strict=True):
            work.wait()
            for parameter, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                _gradient(parameter).copy_(part.view_as(parameter))
        self.sent = []


def _gradient(parameter):
    """Its gradient; zeros where nothing of this process's part of the batch was kept."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
