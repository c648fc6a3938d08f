"""The order in which a proxy sees its samples, and how that order is resumed."""

import math
import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..errors import UsageError
from .batch import Batch

CAN_TELL_SENDERS = hasattr(signal, "sigwaitinfo")


def _start(loader):
    """Start reading, in worker processes if the loader has any.

    Launchers and terminals signal all processes. The main process decides when to stop, and needs its workers until
    then: from their start they take no signals but its own, where the system can tell.
    """
    if not CAN_TELL_SENDERS:
        return iter(loader)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})  # workers inherit this
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _heed_the_main_process(worker):
    if CAN_TELL_SENDERS:
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent):
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


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

    def __init__(self, samples: Any, batch_size: int, num_workers: int, streams: Any):
        self.samples = samples
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.streams = streams
        self.taken = 0
        self.epoch_start = self.before_ahead = None
        self._batches: Any = None
        self._ahead: Any = None

    @property
    def order(self) -> str:
        """What a resumed run must share; workers draw from streams of their own, which their number decides."""
        return f"official, {self.num_workers} data workers"

    def _open(self, skip=0):
        """The epoch's batches after the first ``skip``, in the order the streams give."""
        if self.num_workers:
            batches = _start(self._loader(self.samples, _whole))
            for _ in tqdm(range(skip), desc="Reading up to the checkpoint", leave=False, disable=not skip):
                next(batches)
            return batches
        order = list(self._loader(range(len(self.samples)), list))
        return (self.samples.__getitems__(rows) for rows in order[skip:])

    def _loader(self, items, collate):
        return DataLoader(
            items,
            self.batch_size,
            shuffle=True,
            collate_fn=collate,
            num_workers=self.num_workers,
            worker_init_fn=_heed_the_main_process,
        )

    def _read_ahead(self):
        self.before_ahead = self.streams.get()
        self._ahead = _next(self._batches)

    def next(self) -> tuple[Batch, bool]:
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

    def set_samples(self, samples: np.ndarray) -> None:
        """There is one shard: always the whole set."""

    def close(self) -> None:
        """There is one shard, which never waits."""

    def state_dict(self) -> dict[str, Any]:
        streams = [self.epoch_start, self.before_ahead] if self.taken else None
        return {"taken": self.taken, "streams": streams}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Leaves the streams as they were after the batch ahead was read: set them afterwards."""
        self.taken, self._batches = state["taken"], None
        if self.taken:
            self.epoch_start, before_ahead = state["streams"]
            self.streams.set(self.epoch_start)
            self._batches = self._open(skip=self.taken)
            self.streams.set(before_ahead)
            self._read_ahead()


class SeededLoader:
    """Batches of a shard; order and per-sample seeds are functions of (seed, shard, epoch), the state two integers.

    One epoch follows another without a short batch between them, so that small shards see as many samples a step as
    large ones. Where ``group_size`` processes share a shard, each reads its part of batches that many times as long.
    """

    BLOCK = 256  # batches planned at a time

    def __init__(
        self,
        samples: Any,
        batch_size: int,
        num_workers: int,
        seed: Sequence[int],
        shard_samples: np.ndarray,
        group_size: int = 1,
        group_rank: int = 0,
    ):
        self.samples = samples
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.shard_samples = shard_samples
        self.group_size, self.group_rank = group_size, group_rank
        self.first_epoch = 0  # of this set of samples
        self.taken = 0  # batches since then
        self._batches = iter(())
        self._order: tuple[int, np.ndarray] | None = None  # the last planned epoch's number and order

    @property
    def order(self) -> str:
        """What a resumed run must share: the number of workers does not show."""
        return "by seed and shard"

    def _epoch(self, number):
        """One epoch's order: rows and seeds, (2, N) int64."""
        if self._order is None or self._order[0] != number:
            rng = np.random.default_rng([*self.seed, number])
            order = rng.permutation(self.shard_samples)
            self._order = number, np.stack([order, rng.integers(2**63, size=len(order))])
        return self._order[1]

    def _plan(self):
        """This process's part of the next batches: lists of (row, seed)."""
        length, size = self.batch_size * self.group_size, len(self.shard_samples)
        start = self.taken * length
        end = start + self.BLOCK * length
        parts = []
        for number in range(start // size, math.ceil(end / size)):
            first = number * size
            parts.append(self._epoch(self.first_epoch + number)[:, max(start - first, 0) : end - first])
        keys = list(zip(*np.concatenate(parts, axis=1).tolist(), strict=True))
        mine = self.group_rank * self.batch_size
        return [keys[i + mine : i + mine + self.batch_size] for i in range(0, self.BLOCK * length, length)]

    def next(self) -> tuple[Batch, bool]:
        """Returns a batch and False: no epoch ends on a batch."""
        batch = _next(self._batches)
        if batch is None:
            # A generator of its own, so that starting to read leaves the process's stream alone.
            self._batches = _start(
                DataLoader(
                    self.samples.of_shard(self.shard_samples),
                    batch_sampler=self._plan(),
                    collate_fn=_whole,
                    num_workers=self.num_workers,
                    generator=torch.Generator(),
                    worker_init_fn=_heed_the_main_process,
                )
            )
            batch = _next(self._batches)
        batch = self.samples.received(batch)
        if self.group_size > 1:
            first = self.group_rank * self.batch_size
            share = slice(first, first + self.batch_size), self.batch_size * self.group_size
            batch = replace(batch, share=share)
        self.taken += 1
        return batch, False

    def set_samples(self, shard_samples: np.ndarray) -> None:
        """Go on with another set of samples, from a new epoch on; with the same set, nothing changes."""
        if not np.array_equal(shard_samples, self.shard_samples):
            epochs = math.ceil(self.taken * self.batch_size * self.group_size / len(self.shard_samples))
            self.first_epoch, self.taken = self.first_epoch + epochs, 0
            self.shard_samples, self._batches, self._order = shard_samples, iter(()), None

    def close(self) -> None:
        """End the data workers, until the next batch is asked for."""
        self._batches = iter(())

    def state_dict(self) -> dict[str, Any]:
        return {"first_epoch": self.first_epoch, "taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.first_epoch, self.taken, self._batches = state["first_epoch"], state["taken"], iter(())
