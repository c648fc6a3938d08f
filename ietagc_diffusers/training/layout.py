"""Which process trains which shard, and the few sums that cross processes.

W processes, K shards. W <= K: each process owns K / W shards and trains them one after another. W > K: groups of W /
K processes train one shard together. Anything else is an error.
"""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ..errors import UsageError
from .gradients import GradientSum

PATIENCE = timedelta(days=2)  # how long processes wait for one that writes, validates or uploads


def valid_process_counts(num_shards: int, limit: int = 64) -> list[int]:
    """Numbers of processes that K shards can be trained on: divisors of K and multiples of it."""
    return [w for w in range(1, limit + 1) if num_shards % w == 0 or w % num_shards == 0]


class Layout:
    """This process's place among W processes and K shards.

    Attributes:
        groups: for each group of processes, the shards it trains, in turn.
        shards: those of this process's group.
        size, rank: of the group of processes that trains the same shard.
    """

    def __init__(
        self, num_shards: int, num_processes: int = 1, process_index: int = 0, device: torch.device | str = "cpu"
    ):
        if num_shards % num_processes and num_processes % num_shards:
            counts = ", ".join(map(str, valid_process_counts(num_shards, max(16, 2 * num_processes))))
            raise UsageError(
                f"`num_processes` {num_processes} does not fit `num_shards` {num_shards}: "
                f"one must divide the other. Numbers of processes that do: {counts}"
            )
        self.num_shards = num_shards
        self.num_processes = num_processes
        self.process_index = process_index
        self.device = torch.device(device)
        num_groups = min(num_processes, num_shards)
        self.groups = [range(first, num_shards, num_groups) for first in range(num_groups)]
        self.size = num_processes // num_groups
        self.rank = process_index % self.size
        self.shards = self.groups[process_index // self.size]
        self._group: Any = None
        # On the host and with a time-out of its own: that of the default group is over while one writes a large file.
        together = num_processes > 1 and dist.is_initialized()  # a layout can be looked at without the processes
        self._patient: Any = dist.new_group(backend="gloo", timeout=PATIENCE) if together else None
        self._gradients: GradientSum | None = None
        if self.size > 1:
            for leader in range(0, num_processes, self.size):
                group = dist.new_group(list(range(leader, leader + self.size)))
                if leader == process_index - self.rank:
                    self._group = group

    @property
    def is_main(self) -> bool:
        return self.process_index == 0

    @property
    def leads(self) -> bool:
        """Whether this process speaks for its group."""
        return self.rank == 0

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Concatenate the group's tensors, all of one shape, in the order of the batch."""
        if self.size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous(), group=self._group)
        return torch.cat(parts)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the group."""
        if self.size > 1:
            tensor = tensor.to(self.device, copy=True)
            dist.all_reduce(tensor, group=self._group)
        return tensor

    def expect_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        """The backward pass that comes is the last of this step: gradients may be summed while it runs."""
        if self.size > 1:
            if self._gradients is None:
                self._gradients = GradientSum(parameters, self._group)
            self._gradients.expect()

    def sum_gradients(self) -> None:
        """Make every member's gradients the sum of the group's, after ``expect_gradients``."""
        if self._gradients is not None:
            self._gradients.finish()

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over all processes; takes and returns a host tensor."""
        if self.num_processes == 1:
            return tensor
        total = tensor.to(self.device)
        total = total.clone() if total.data_ptr() == tensor.data_ptr() else total
        dist.all_reduce(total)
        return total.cpu()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process. Waits for all of them, as long as it takes."""
        return bool(self.agree(torch.tensor([float(flag)])).item())

    def agree(self, numbers: torch.Tensor) -> torch.Tensor:
        """The sum of a few numbers, a host tensor, over all processes. Waits for all of them, as long as it takes."""
        if self.num_processes > 1:
            dist.all_reduce(numbers, group=self._patient)
        return numbers

    def barrier(self) -> None:
        """Wait for all processes, as long as it takes."""
        self.any(False)
