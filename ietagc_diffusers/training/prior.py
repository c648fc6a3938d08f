"""Prior preservation (DreamBooth, Ruiz et al. 2023): beside the user's own pictures a model trains on others of the
same class, so that it keeps what it knew of the class.
"""

from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from ..data.loaders import SeededLoader
from ..data.rows import content_hash, load_other_rows
from ..data.samples import TrainingSamples
from ..families import Family
from .processes import main_first
from .settings import RunSettings
from .streams import RandomStreams

ORDER, NOISE = 0x5052494F, 0x5052494E  # keep these draws apart from those of the shard's own samples


@dataclass(frozen=True)
class PriorSet:
    """The prior pictures, all of which every proxy uses.

    Attributes:
        samples: as the training sees them.
        weight: of their mean loss.
        mark: what stands for their content.
        name: the setting and the folder, for messages.
    """

    samples: TrainingSamples
    weight: float
    mark: str
    name: str

    @classmethod
    def load(cls, settings: RunSettings, family: Family, accelerator: Accelerator) -> "PriorSet | None":
        """The set that the settings name, or None. Raises ``UsageError`` if it cannot be used."""
        if settings.prior_dir is None or settings.prior_loss_weight is None:
            return None
        # Mitigations are for the user's own pictures: what is said of these stays as it is.
        untouched = replace(settings.method, caption_mitigation=None, caption_mitigation_probability=None)
        kept: Any = copy(settings)
        kept.caption_dropout = 0.0
        condition = family.condition(kept, untouched)
        rows = main_first(accelerator, lambda: load_other_rows(settings, "prior_dir", condition))
        column, alpha = settings.image_column, settings.alpha
        samples = TrainingSamples(rows, column, family.view(settings), condition, alpha)
        mark = content_hash(rows, column, condition)
        return cls(samples, settings.prior_loss_weight, mark, f"`prior_dir` {settings.prior_dir}")

    def __len__(self) -> int:
        return len(self.samples)


class Prior:
    """The prior loss of one shard. Pictures, crops, noise and noise levels are functions of the seed, the shard and the
    number of the batch: they neither depend on the shard's own samples nor change anything that is drawn for those.

    Args:
        loader: of the prior set's batches, one for each micro-batch.
        weight: of the mean loss.
        seed: the run's and the shard's number.
        streams: the process's.
        name: of the set, for messages.
    """

    def __init__(self, loader: Any, weight: float, seed: tuple[int, int], streams: RandomStreams, name: str):
        self.loader, self.weight, self.seed, self.streams, self.name = loader, weight, seed, streams, name
        self._total: Any = 0.0  # of the losses since ``mean_loss``: on the device
        self._count = 0

    @classmethod
    def of_shard(
        cls,
        prior: PriorSet,
        batch_size: int,
        num_workers: int,
        seed: tuple[int, int],
        streams: RandomStreams,
        group_size: int = 1,
        group_rank: int = 0,
    ) -> "Prior":
        """``batch_size``: of each process; the other arguments are those of ``SeededLoader``."""
        rows = np.arange(len(prior))
        loader = SeededLoader(prior.samples, batch_size, num_workers, [*seed, ORDER], rows, group_size, group_rank)
        return cls(loader, prior.weight, seed, streams, prior.name)

    def loss(self, model: Any, objective: Any, device: torch.device) -> tuple[torch.Tensor, list]:
        """The weighted mean loss () of the next batch, and [None, reason] of each replaced row."""
        number = self.loader.taken
        batch, _ = self.loader.next()
        batch = replace(batch, ids=None)  # mitigations are for the user's own pictures
        bad = [[None, f"{self.name}: {reason}"] for _, reason in batch.bad]
        with self.streams.seeded([*self.seed, NOISE, number]):
            loss = objective.plain_loss(model, objective.draw(objective.encode(batch.to(device))))
        self._total, self._count = self._total + loss.detach(), self._count + 1
        return self.weight * loss, bad

    def mean_loss(self) -> float:
        """The mean loss, without the weight, of the batches since the last call. Reads the device."""
        mean = float(self._total) / max(1, self._count)
        self._total, self._count = 0.0, 0
        return mean
