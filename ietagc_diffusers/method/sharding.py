"""Shards of the training set: splitting (section IV-C) and redistribution of the most skipped samples (eq. 10, 11).
Pure functions of their seeds.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..errors import UsageError


@dataclass(frozen=True)
class ShardPlan:
    """Which samples each shard holds.

    ``shards``: K sorted int64 arrays of sample ids in [0, N). ``groups``: int64 (N,), equal for rows that must stay
    together, or None.
    """

    shards: tuple
    groups: np.ndarray | None = None

    @property
    def num_shards(self) -> int:
        return len(self.shards)

    @classmethod
    def whole(cls, num_samples: int, num_shards: int) -> "ShardPlan":
        """K shards that each hold all ids 0..N-1: averaging without sharding."""
        return cls((np.arange(num_samples),) * num_shards)

    @classmethod
    def split(
        cls,
        num_samples: int,
        num_shards: int,
        seed: int,
        labels: np.ndarray | None = None,
        groups: np.ndarray | None = None,
    ) -> "ShardPlan":
        """Split ids 0..N-1 into K parts by a seeded permutation.

        Sizes differ by at most one (with groups: by at most the largest group). ``labels`` (N,) deals each class
        evenly over the shards. ``groups`` (N,) keeps rows of one value in one shard. Raises ``UsageError`` if K
        exceeds the number of samples, or of groups.
        """
        groups = None if groups is None else np.unique(groups, return_inverse=True)[1]
        units = np.arange(num_samples) if groups is None else groups
        num_units = num_samples if groups is None else int(groups.max()) + 1
        if num_shards > num_units:
            what = "training samples" if groups is None else "groups of duplicates"
            raise UsageError(f"`num_shards` {num_shards}: more than the {num_units} {what}")
        rng = np.random.default_rng(seed)
        order = rng.permutation(num_units)
        if labels is not None:
            unit_labels = np.empty(num_units, dtype=np.int64)
            unit_labels[units] = np.unique(labels, return_inverse=True)[1]
            order = order[np.argsort(unit_labels[order], kind="stable")]
        shard_of_unit = np.empty(num_units, dtype=np.int64)
        if groups is None:
            shard_of_unit[order] = np.arange(num_units) % num_shards
        else:
            sizes = np.bincount(groups)
            # Larger groups first, each to the shard that holds least: balanced, and stable for equal sizes.
            loads = np.zeros(num_shards, dtype=np.int64)
            order = order[np.argsort(-sizes[order], kind="stable")]
            for some in np.split(order, np.flatnonzero(np.diff(sizes[order])) + 1):
                shard_of_unit[some] = _fill(loads, len(some), int(sizes[some[0]]))
        shard_of_sample = shard_of_unit[units]
        return cls(tuple(np.flatnonzero(shard_of_sample == k) for k in range(num_shards)), groups)

    def easiest(
        self, shard: int, skip_counts: np.ndarray, fraction: float, by: str, rng: np.random.Generator
    ) -> np.ndarray:
        """D_easy of eq. 10: the share ``fraction`` of a shard with the highest skip counts, ties (and ``by='random'``)
        by ``rng``.

        With groups, a group's score is its rows' mean, and whole groups are taken until the share is reached.
        """
        samples = self.shards[shard]
        wanted = round(fraction * len(samples))
        if self.groups is None:
            inverse, sizes = np.arange(len(samples)), np.ones(len(samples), dtype=np.int64)
        else:
            inverse, sizes = np.unique(self.groups[samples], return_inverse=True, return_counts=True)[1:]
        scores = np.bincount(inverse, weights=skip_counts[samples]) / sizes if by == "skips" else np.zeros(len(sizes))
        order = np.lexsort((rng.random(len(sizes)), -scores))
        before = np.concatenate([[0], np.cumsum(sizes[order])[:-1]])
        chosen = np.zeros(len(sizes), dtype=bool)
        chosen[order[before < wanted]] = True
        return samples[chosen[inverse]]

    def redistribute(
        self,
        skip_counts: np.ndarray,
        fraction: float,
        mode: str = "move",
        by: str = "skips",
        seed: int | Sequence[int] = 0,
    ) -> "ShardPlan":
        """Each shard passes its easiest samples to the next, the last to the first (eq. 11).

        Args:
            skip_counts: this round's, (N,), or (K, N) by shard.
            fraction: P in [0, 1].
            mode: ``move`` takes them out of their shard; ``copy`` is the literal union.
            by: ``skips`` or ``random``.
            seed: int or sequence of ints.

        Returns:
            A new ``ShardPlan``; with one shard, or P = 0, the same one.
        """
        if self.num_shards == 1 or fraction == 0:
            return self
        rng = np.random.default_rng(seed)
        skip_counts = np.asarray(skip_counts)
        by_shard = np.broadcast_to(skip_counts, (self.num_shards, skip_counts.shape[-1]))
        easy = [self.easiest(k, by_shard[k], fraction, by, rng) for k in range(self.num_shards)]
        shards = []
        for k, samples in enumerate(self.shards):
            kept = samples[~_among(samples, easy[k])] if mode == "move" else samples
            # A stable sort merges two sorted runs in one pass.
            merged = np.sort(np.concatenate([kept, easy[k - 1]]), kind="stable")
            shards.append(merged[np.diff(merged, prepend=-1) > 0])
        return ShardPlan(tuple(shards), self.groups)

    def num_moved(self, previous: "ShardPlan") -> int:
        """How many samples are in a shard that did not hold them in ``previous``."""
        pairs = zip(self.shards, previous.shards, strict=True)
        return sum(int((~_among(new, old)).sum()) for new, old in pairs)

    def state_dict(self) -> dict:
        """The plan as tensors."""
        shards = [torch.from_numpy(np.asarray(samples)) for samples in self.shards]
        return {"shards": shards, "groups": None if self.groups is None else torch.from_numpy(self.groups)}

    @classmethod
    def from_state_dict(cls, state: dict) -> "ShardPlan":
        groups = state["groups"]
        return cls(tuple(s.numpy() for s in state["shards"]), None if groups is None else groups.numpy())


def _among(samples, others):
    """Which of the samples are among others, by a table over ids: (N,) bool."""
    table = np.zeros(max(samples.max(initial=-1), others.max(initial=-1)) + 1, dtype=bool)
    table[others] = True
    return table[samples]


def _fill(loads, count, size):
    """Give ``count`` groups of one size to the shards, each to the one that then holds least, the first of equals.

    Returns their shards (count,), and adds what they hold to ``loads`` (K,). A shard takes a group whenever its load
    is the lowest: sorted, the loads at which the shards take them are the order of taking.
    """
    level = max(loads.max(), (loads.sum() + count * size) // len(loads) + size)
    taken = (level - loads) // size + 1  # as many as each could take, and no fewer than it will
    shards = np.repeat(np.arange(len(loads)), taken)
    within = np.arange(len(shards)) - np.repeat(np.cumsum(taken) - taken, taken)
    first = np.argsort(loads[shards] + size * within, kind="stable")[:count]
    loads += size * np.bincount(shards[first], minlength=len(loads))
    return shards[first]


class SkipHistory:
    """The skip counts by which samples are redistributed.

    Args:
        kind: ``round``: those of the round, as eq. 10 has them; ``decayed``: of all rounds so far, each weighing
            ``DECAY`` times the next one; ``total``: of all rounds alike. With a few visits in a round a sample is
            skipped by chance as much as for what it is; over several rounds chance evens out.
    """

    DECAY = 0.8
    KINDS = ("round", "decayed", "total")

    def __init__(self, kind: str = "round"):
        self.decay = {"round": None, "decayed": self.DECAY, "total": 1.0}[kind]
        self.counts: np.ndarray | None = None

    def add(self, counts: np.ndarray) -> np.ndarray:
        """A round's counts, (K, N) by shard -> those to redistribute by: (K, N), or (N,) of all shards."""
        if self.decay is None:
            return counts
        summed = counts.sum(axis=0).astype(np.float64)
        self.counts = summed if self.counts is None else self.decay * self.counts + summed
        return self.counts

    def state_dict(self) -> dict:
        return {"counts": None if self.counts is None else torch.from_numpy(self.counts)}

    def load_state_dict(self, state: dict) -> None:
        self.counts = None if state["counts"] is None else state["counts"].numpy().copy()
