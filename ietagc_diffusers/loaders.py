"""The order in which a proxy sees its samples, and how that order is resumed."""

import math

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from .config import UsageError


def _whole(batch):
    return batch


def _next(batches):
    """The next batch or None. An error from a worker process comes as the one line it was."""
    try:
        return next(batches, None)
    except UsageError as error:
        raise UsageError(str(error).strip().splitlines()[-1].split("UsageError: ")[-1]) from error


class StreamLoader:
    """Batches in the official script's order: torch's shuffling loader on the process's streams, one batch ahead.

    Its state is how many batches of the epoch were taken, and the streams at the epoch's start and before the batch
    read ahead. Restoring reads the taken batches again only where worker processes have streams of their own.
    """

    def __init__(self, samples, batch_size, num_workers, streams):
        self.samples = samples
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.streams = streams
        self.taken = 0
        self.epoch_start = self.before_ahead = None
        self._batches = self._ahead = None

    def _open(self, skip=0):
        """The epoch's batches after the first ``skip``, in the order the streams give."""
        if self.num_workers:
            batches = iter(self._loader(self.samples, _whole))
            for _ in tqdm(range(skip), desc="Reading up to the checkpoint", leave=False, disable=not skip):
                next(batches)
            return batches
        order = list(self._loader(range(len(self.samples)), list))
        return (self.samples.__getitems__(rows) for rows in order[skip:])

    def _loader(self, items, collate):
        return DataLoader(items, self.batch_size, shuffle=True, collate_fn=collate, num_workers=self.num_workers)

    def _read_ahead(self):
        self.before_ahead = self.streams.get()
        self._ahead = _next(self._batches)

    def next(self):
        """Returns a batch and whether it is the epoch's last."""
        if self._batches is None:
            self.epoch_start = self.streams.get()
            self._batches = self._open()
            self._read_ahead()
        batch = self._ahead
        self._read_ahead()
        self.taken += 1
        if self._ahead is None:
            self._batches, self.taken = None, 0
            return batch, True
        return batch, False

    def set_samples(self, samples):
        """There is one shard: always the whole set."""

    def state_dict(self):
        streams = [self.epoch_start, self.before_ahead] if self.taken else None
        return {"taken": self.taken, "streams": streams}

    def load_state_dict(self, state):
        """Leaves the streams as they were after the batch ahead was read: set them afterwards."""
        self.taken, self._batches = state["taken"], None
        if self.taken:
            self.epoch_start, before_ahead = state["streams"]
            self.streams.set(self.epoch_start)
            self._batches = self._open(skip=self.taken)
            self.streams.set(before_ahead)
            self._read_ahead()


class SeededLoader:
    """Batches of a shard whose order and per-sample seeds are a function of (seed, shard, epoch): its state is two
    integers.

    Where ``group_size`` processes share a shard, each reads its part of batches ``group_size`` times as long.
    """

    def __init__(self, samples, batch_size, num_workers, seed, shard_samples, group_size=1, group_rank=0):
        self.samples = samples
        self.batch_size = batch_size * group_size
        self.num_workers = num_workers
        self.seed = seed
        self.shard_samples = shard_samples
        self.group_size, self.group_rank = group_size, group_rank
        self.epoch = self.taken = 0
        self._batches = None

    def _plan(self):
        """This epoch's batches from ``taken`` on: lists of (row, seed), and their places in the group's batches."""
        rng = np.random.default_rng([*self.seed, self.epoch])
        order = rng.permutation(self.shard_samples).tolist()
        seeds = rng.integers(2**63, size=len(order)).tolist()
        keys = list(zip(order, seeds, strict=True))
        parts, places = [], []
        for start in range(self.taken * self.batch_size, len(keys), self.batch_size):
            batch = keys[start : start + self.batch_size]
            share = math.ceil(len(batch) / self.group_size)
            first, end = (min(rank * share, len(batch)) for rank in (self.group_rank, self.group_rank + 1))
            ghost = first == end
            if ghost:  # a row that does not count, since models cannot run on none
                first, end = 0, 1
            parts.append(batch[first:end])
            places.append({"rows": slice(first, end), "batch_rows": len(batch), "ghost": ghost})
        return parts, places

    def _start(self):
        parts, places = self._plan()
        # A generator of its own, so that starting an epoch leaves the process's stream alone.
        loader = DataLoader(
            self.samples.of_shard(self.shard_samples),
            batch_sampler=parts,
            collate_fn=_whole,
            num_workers=self.num_workers,
            generator=torch.Generator(),
        )
        return zip(loader, places, strict=True)

    @property
    def batches_per_epoch(self):
        return math.ceil(len(self.shard_samples) / self.batch_size)

    def next(self):
        """Returns a batch and whether it is the epoch's last."""
        if self._batches is None:
            self._batches = self._start()
        batch, place = _next(self._batches)
        if self.group_size > 1:
            batch |= place
            if place["ghost"]:
                batch["samples"] = batch["samples"][:0]
        self.taken += 1
        last = self.taken == self.batches_per_epoch
        if last:
            self.epoch, self.taken, self._batches = self.epoch + 1, 0, None
        return batch, last

    def set_samples(self, shard_samples):
        """Go on with another set of samples, from a new epoch on; with the same set, nothing changes."""
        if not np.array_equal(shard_samples, self.shard_samples):
            self.shard_samples = shard_samples
            self.epoch, self.taken, self._batches = self.epoch + 1, 0, None

    def state_dict(self):
        return {"epoch": self.epoch, "taken": self.taken}

    def load_state_dict(self, state):
        self.epoch, self.taken, self._batches = state["epoch"], state["taken"], None
