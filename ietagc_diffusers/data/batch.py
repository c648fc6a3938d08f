"""A batch of training samples."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Batch:
    """Samples as a loader gives them.

    Args:
        images: float32 (B, 3, H, W) in [-1, 1].
        inputs: what else the model is told of them: named tensors (B, ...), as the family made them.
        samples: int64 (B,), their numbers among the training rows; empty where they are none of them.
        seeds: B integers on the host, of whatever is drawn for a sample later (augmentation); None in the official
            order, which draws from the process's streams.
        ids: B integers on the host, the samples' ``sample_id``, of which is drawn what an image keeps for the whole
            training; None where they keep nothing.
        bad: [row, reason] of each row that was replaced.
        encoded_images, encoded_inputs: what the objective's ``encode_images`` and ``encode_inputs`` would give of them,
            from a cache. With the first, ``images`` are decoded when they are asked for.
        share: where several processes share a batch, this process's slice of it and the length of the whole; noise is
            drawn for the whole, so that the draws do not depend on the sharing.
        told: what the model is told of the views that ``images`` are, such as their sizes: named tensors (B, ...).
    """

    images: Any  # a tensor, or what gives one when it is indexed by rows
    inputs: Tensors = field(default_factory=dict)
    samples: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    seeds: list[int] | None = None
    ids: list[int] | None = None
    bad: list = field(default_factory=list)
    share: tuple[slice, int] | None = None
    encoded_images: Tensors | None = None
    encoded_inputs: Tensors | None = None
    told: Tensors = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.samples if self.images is None else self.images)

    def to(self, device: torch.device | str) -> "Batch":
        def move(value):
            if isinstance(value, dict):
                return {name: move(tensor) for name, tensor in value.items()}
            return None if value is None else value.to(device, non_blocking=True)

        moved = ("images", "inputs", "told", "samples", "encoded_images", "encoded_inputs")
        return replace(self, **{name: move(getattr(self, name)) for name in moved})
