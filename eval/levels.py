"""The front by noise level: losses and gap in equal parts of the range of levels, called buckets."""

import csv
import math
from collections.abc import Sequence
from dataclasses import astuple, fields
from pathlib import Path

import numpy as np
import torch

from ietagc_diffusers.errors import UsageError

from .curves import Coordinate, FrontPoint, LevelBucket, crossing

Pair = Sequence[torch.Tensor]  # of the training images and of the held-out ones


def edges_of(num_levels: int, buckets: int) -> list[int]:
    """Where ``buckets`` equal parts of the levels 0 to ``num_levels`` - 1 begin, and where the last one ends."""
    if not 1 <= buckets <= num_levels:
        raise UsageError(f"`levels` {buckets}: must be from 1 to {num_levels}, the number of the models' noise levels")
    return [-(-bucket * num_levels // buckets) for bucket in range(buckets + 1)]


def by_level(edges: Sequence[int], levels: Pair, losses: Pair, start: Pair | None = None) -> tuple[LevelBucket, ...]:
    """Losses of a model in each bucket.

    Args:
        edges: see ``edges_of``.
        levels: int64 (draws, N), the noise level of each draw of each image.
        losses: float32 (draws, N); start: the same of the model whose gap shows only that one of the two sets is more
            difficult, which is subtracted; None subtracts nothing.
    """
    changes = losses if start is None else [ours - theirs for ours, theirs in zip(losses, start, strict=True)]
    of_losses, of_changes = (
        [_means(edges, *of_set) for of_set in zip(levels, values, strict=True)] for values in (losses, changes)
    )
    (train, train_count, _), (heldout, heldout_count, _) = of_losses
    (train_change, _, train_error), (heldout_change, _, heldout_error) = of_changes
    gap, gap_error = heldout_change - train_change, np.hypot(train_error, heldout_error)
    columns = [column.tolist() for column in (train, heldout, gap, gap_error, train_count, heldout_count)]
    return tuple(LevelBucket(*row) for row in zip(edges[:-1], edges[1:], *columns, strict=True))


def _means(edges, levels, losses):
    """Mean, number and standard error of the losses in each bucket; the mean of none is nan, and so is the error of
    fewer than two.
    """
    size = len(edges) - 1
    bucket = np.searchsorted(edges, levels.numpy().ravel(), side="right") - 1
    values = losses.double().numpy().ravel()
    count = np.bincount(bucket, minlength=size)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.bincount(bucket, values, size) / count
        variance = np.bincount(bucket, (values - mean[bucket]) ** 2, size) / (count - 1)
        return mean, count, np.sqrt(variance / count)


def shared_gap(points: list[FrontPoint]) -> float:
    """The largest mean gap that every seed of every run reaches; 0 if there is none above it."""
    largest: dict[tuple[str, int], float] = {}
    for point in points:
        if math.isfinite(point.gap):
            seed = point.run, point.replicate
            largest[seed] = max(point.gap, largest.get(seed, 0.0))
    return min(largest.values(), default=0.0)


def profile(seed: list[FrontPoint], field: str, gap: float | None = None) -> list[float]:
    """A field of each bucket at the last model of a run, or where its mean gap first reaches ``gap``, linearly between
    its models.
    """
    if gap is None:
        return [getattr(bucket, field) for bucket in seed[-1].levels]

    def of_bucket(number: int) -> Coordinate:
        return lambda point: getattr(point.levels[number], field)

    found = [crossing(seed, lambda p: p.gap, of_bucket(number), gap) for number in range(len(seed[0].levels))]
    return [math.nan if value is None else value for value in found]


def write_levels(points: list[FrontPoint], path: Path) -> None:
    """One row a point and bucket; see ``LevelBucket`` for the columns."""
    columns = [field.name for field in fields(LevelBucket)]
    with Path(path).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["run", "replicate", "step", *columns])
        for p in points:
            writer.writerows([p.run, p.replicate, p.step, *astuple(bucket)] for bucket in p.levels)
