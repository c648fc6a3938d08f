"""Random draws for a batch, and a batch with everything random drawn."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self, TypeVar

import torch

Whole = TypeVar("Whole")


def mapped(whole: Whole, change: Callable[[torch.Tensor], torch.Tensor]) -> Whole:
    """A dataclass with all its tensors, and those of its dicts, changed; what else it has stays as it is."""

    def changed(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: change(one) for name, one in value.items()}
        return change(value) if torch.is_tensor(value) else value

    of_dataclass: Any = whole
    return replace(of_dataclass, **{one.name: changed(getattr(whole, one.name)) for one in fields(of_dataclass)})


@dataclass(frozen=True)
class DrawnBatch:
    """The base of dataclasses whose fields are tensors (B, ...), or dicts of such tensors: rows and devices of them.
    ``levels`` (B,) are the noise levels, ``condition`` is what the model is told of each sample: named tensors.

    own: what each image keeps for the whole training, named tensors (B, ...).
    """

    own: dict[str, torch.Tensor] = field(default_factory=dict, kw_only=True)

    def __getitem__(self, rows: Any) -> Self:
        return mapped(self, lambda tensor: tensor[rows])

    def __len__(self) -> int:
        of_dataclass: Any = self
        return len(of_dataclass.levels)

    def to(self, device: torch.device | str) -> Self:
        return mapped(self, lambda tensor: tensor.to(device))

    def told(self, condition: dict[str, torch.Tensor]) -> Self:
        """The same samples, all told ``condition``, tensors (1, ...), in the place of their own of the same names."""
        of_dataclass: Any = self
        same = {name: tensor.expand(len(self), *tensor.shape[1:]) for name, tensor in condition.items()}
        return replace(of_dataclass, condition=of_dataclass.condition | same)


class Draws:
    """Standard normal draws for a batch of which this process has a share: of the whole batch, then its rows.

    like (B, ...): this process's part of the batch; share: see ``Batch``.
    """

    def __init__(self, like: torch.Tensor, share: tuple[slice, int] | None):
        self.device = like.device
        self.rows, self.batch_rows = share or (slice(None), len(like))

    def normal(
        self, *shape: int, dtype: torch.dtype | None = None, layout: torch.memory_format = torch.contiguous_format
    ) -> torch.Tensor:
        """(rows, *shape)"""
        drawn = torch.empty((self.batch_rows, *shape), device=self.device, dtype=dtype, memory_format=layout)
        return drawn.normal_()[self.rows]
