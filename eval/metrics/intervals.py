"""95% intervals of a number measured on N images."""

from collections.abc import Callable
from statistics import NormalDist

import numpy as np
import torch


def as_float64(values: torch.Tensor | np.ndarray | list) -> np.ndarray:
    """The values as a NumPy array."""
    return (values.numpy() if isinstance(values, torch.Tensor) else np.asarray(values)).astype(np.float64)


def bootstrap_interval(
    values: torch.Tensor | np.ndarray,
    statistic: Callable[[np.ndarray], float],
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> list[float]:
    """Percentile bootstrap interval [low, high] of ``statistic`` over values (N,).

    It shows how far the number would move with other images of the same model and prompts, not with other seeds of
    training.
    """
    values, rng = as_float64(values), np.random.default_rng(seed)
    drawn = [statistic(values[rng.integers(0, len(values), len(values))]) for _ in range(resamples)]
    tail = 50 * (1 - level)
    return [float(x) for x in np.percentile(drawn, [tail, 100 - tail])]


def wilson_interval(hits: torch.Tensor | np.ndarray, level: float = 0.95) -> list[float]:
    """Wilson interval [low, high] of the share of hits (N,), which are 0 or 1. Unlike a bootstrap it is not [0, 0]
    where there are none.
    """
    hits, z = as_float64(hits), NormalDist().inv_cdf((1 + level) / 2)
    n, share = len(hits), hits.mean()
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * (share * (1 - share) / n + (z / (2 * n)) ** 2) ** 0.5 / (1 + z**2 / n)
    return [float(centre - half) if hits.any() else 0.0, float(centre + half) if not hits.all() else 1.0]
