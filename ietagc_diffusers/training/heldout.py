"""Held-out images: never trained on, only measured along the training, to learn what loss ratios such images have."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from ..data.conditions import Condition
from ..data.loaders import SeededLoader
from ..data.rows import content_hash
from ..data.samples import TrainingSamples, View
from .settings import RunSettings
from .streams import RandomStreams

ORDER, NOISE = 0x48454C44, 0x48454C4E  # keep these draws apart from those of the shard's own samples
EVERY = 4  # batches of the shard for each held-out batch


@dataclass(frozen=True)
class HeldoutSet:
    """The held-out images, all of which every proxy is measured on.

    Attributes:
        samples: as the training images are seen.
        mark: what stands for their content.
    """

    samples: TrainingSamples
    mark: str

    @classmethod
    def of(cls, rows: Dataset | None, settings: RunSettings, condition: Condition, view: View) -> "HeldoutSet | None":
        """The set that ``skip_false_rate`` is of, or None. ``rows``: those that are held out."""
        if rows is None or not settings.method.skip_false_rate:
            return None
        column = settings.image_column
        samples = TrainingSamples(rows, column, view, condition, settings.decoding)
        return cls(samples, content_hash(rows, column, condition))


class Heldout:
    """The held-out samples that one shard's proxy is measured on, a batch for every ``EVERY`` of its own. Images,
    crops, noise, noise levels and dropout are functions of the seed, the shard and the number of the batch: they change
    nothing that is drawn for the shard's own samples.

    Args:
        heldout: the set.
        batch_size: of each process.
        seed: the run's and the shard's number.
        streams, device: the process's.
        num_workers, group_size, group_rank: see ``SeededLoader``.
    """

    def __init__(
        self,
        heldout: HeldoutSet,
        batch_size: int,
        num_workers: int,
        seed: tuple[int, int],
        streams: RandomStreams,
        device: torch.device,
        group_size: int = 1,
        group_rank: int = 0,
    ):
        rows, order = np.arange(len(heldout.samples)), [*seed, ORDER]
        self.loader = SeededLoader(heldout.samples, batch_size, num_workers, order, rows, group_size, group_rank)
        self.seed, self.streams, self.device = seed, streams, device
        self.calls = 0

    def measure(
        self, objective: Any, losses_of: Callable[[Any], torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Losses and noise levels of the next noisy samples, see ``method.control.HeldoutSamples``."""
        self.calls += 1
        if (self.calls - 1) % EVERY:
            return None
        number = self.loader.taken
        batch, _ = self.loader.next()
        with self.streams.seeded([*self.seed, NOISE, number]):
            drawn = objective.draw(objective.encode(batch.to(self.device)))
            return losses_of(drawn), drawn.levels

    def close(self) -> None:
        """End the data workers, until the next batch is asked for."""
        self.loader.close()

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls, "loader": self.loader.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calls = state["calls"]
        self.loader.load_state_dict(state["loader"])
