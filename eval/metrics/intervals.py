"""95% intervals of a number measured on N images.

Images of one prompt are not independent: ``groups`` says which images belong together, and an interval is then only as
narrow as the number of groups allows.
"""

from collections.abc import Callable
from statistics import NormalDist

import numpy as np
import torch


def as_float64(values: torch.Tensor | np.ndarray | list) -> np.ndarray:
    """The values as a NumPy array."""
    return (values.numpy() if isinstance(values, torch.Tensor) else np.asarray(values)).astype(np.float64)


def group_sizes(groups: np.ndarray) -> np.ndarray:
    """How many images each group of ``groups`` (N,) has."""
    return np.unique(groups, return_counts=True)[1]


def effective_number(groups: np.ndarray) -> float:
    """How many independent images N images in groups (N,) are worth, if images of a group say all the same.

    It is N^2 / (sum of the squared sizes): the number of groups where all are of one size, N where each image is its
    own group, and fewer where few groups have most of the images.
    """
    return float(len(groups) ** 2 / np.square(group_sizes(groups).astype(np.float64)).sum())


def bootstrap_interval(
    values: torch.Tensor | np.ndarray,
    statistic: Callable[[np.ndarray], float],
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    groups: np.ndarray | None = None,
) -> list[float]:
    """Percentile bootstrap interval [low, high] of ``statistic`` over values (N,).

    It shows how far the number would move with other images of the same model and prompts, not with other seeds of
    training. With ``groups`` (N,) whole groups are drawn.
    """
    values, rng = as_float64(values), np.random.default_rng(seed)
    if groups is None or len(np.unique(groups)) == len(values):
        drawn = [statistic(values[rng.integers(0, len(values), len(values))]) for _ in range(resamples)]
    else:
        values, sizes = values[np.argsort(groups, kind="stable")], group_sizes(groups)
        starts = np.cumsum(sizes) - sizes
        drawn = [
            statistic(values[_members(starts[chosen], sizes[chosen])])
            for chosen in (rng.integers(0, len(sizes), len(sizes)) for _ in range(resamples))
        ]
    tail = 50 * (1 - level)
    return [float(x) for x in np.percentile(drawn, [tail, 100 - tail])]


def _members(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The numbers start, start + 1, ... of each of G runs of these sizes, one run after the other."""
    before = np.cumsum(sizes) - sizes
    return np.repeat(starts - before, sizes) + np.arange(sizes.sum())


def wilson_interval(
    hits: torch.Tensor | np.ndarray, level: float = 0.95, groups: np.ndarray | None = None
) -> list[float]:
    """Wilson interval [low, high] of the share of hits (N,), which are 0 or 1. Unlike a bootstrap it is not [0, 0]
    where there are none.

    With ``groups`` (N,) the share is that of the images, and the width that of ``effective_number`` independent ones:
    five images of each of 100 prompts count as 100. It holds however much the images of a prompt depend on one another.
    """
    hits, z = as_float64(hits), NormalDist().inv_cdf((1 + level) / 2)
    n, share = len(hits) if groups is None else effective_number(groups), hits.mean()
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * (share * (1 - share) / n + (z / (2 * n)) ** 2) ** 0.5 / (1 + z**2 / n)
    return [float(centre - half) if hits.any() else 0.0, float(centre + half) if not hits.all() else 1.0]


def difference(first: torch.Tensor | np.ndarray, second: torch.Tensor | np.ndarray) -> float:
    """The share of the hits (N,) minus the share of the hits (M,)."""
    return float(as_float64(first).mean() - as_float64(second).mean())


def newcombe_interval(
    first: torch.Tensor | np.ndarray,
    second: torch.Tensor | np.ndarray,
    level: float = 0.95,
    groups: np.ndarray | None = None,
) -> list[float]:
    """Newcombe's interval [low, high] of the share of hits (N,) minus that of other, independent hits (M,), made of the
    Wilson interval of each. ``groups`` (N,): of the first.
    """
    shares = as_float64(first).mean(), as_float64(second).mean()
    (low1, high1), (low2, high2) = wilson_interval(first, level, groups), wilson_interval(second, level)
    between = shares[0] - shares[1]
    below = ((shares[0] - low1) ** 2 + (high2 - shares[1]) ** 2) ** 0.5
    above = ((high1 - shares[0]) ** 2 + (shares[1] - low2) ** 2) ** 0.5
    return [float(between - below), float(between + above)]
