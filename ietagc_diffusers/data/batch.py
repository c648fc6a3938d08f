"""A batch of training samples."""

from dataclasses import dataclass, field, replace

import torch


@dataclass(frozen=True)
class Batch:
    """Samples as a loader gives them.

    Args:
        images: float32 (B, 3, H, W) in [-1, 1].
        inputs: what else the model is told of them: named tensors (B, ...), as the family made them.
        samples: int64 (B,), their numbers among the training rows; empty where they are none of them.
        seeds: B integers on the host, of whatever is drawn for a sample later (augmentation); None in the official
            order, which draws from the process's streams.
        bad: [row, reason] of each row that was replaced.
        share: where several processes share a batch, this process's slice of it and the length of the whole; noise is
            drawn for the whole, so that the draws do not depend on the sharing.
    """

    images: torch.Tensor
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    samples: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    seeds: list[int] | None = None
    bad: list = field(default_factory=list)
    share: tuple[slice, int] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str) -> "Batch":
        def move(tensor):
            return tensor.to(device, non_blocking=True)

        inputs = {name: move(tensor) for name, tensor in self.inputs.items()}
        return replace(self, images=move(self.images), inputs=inputs, samples=move(self.samples))
