"""Sim Score and copy rate (eq. 14), with intervals."""

from statistics import NormalDist

import numpy as np
import torch

SIM_PERCENTILE = 95


def sim_score(similarities):
    """The 95th percentile of similarities (N,) to the nearest training image."""
    return float(np.percentile(_array(similarities), SIM_PERCENTILE))


def copy_rate(similarities, threshold):
    """Share of similarities (N,) over the threshold."""
    return float((_array(similarities) > threshold).mean())


def bootstrap_interval(values, statistic, level=0.95, resamples=1000, seed=0):
    """Percentile bootstrap interval [low, high] of ``statistic`` (an array -> a number) over values (N,).

    Says how far the number would move with other images of the same model and prompts; nothing of other seeds of
    training.
    """
    values, rng = _array(values), np.random.default_rng(seed)
    drawn = [statistic(values[rng.integers(0, len(values), len(values))]) for _ in range(resamples)]
    tail = 50 * (1 - level)
    return [float(x) for x in np.percentile(drawn, [tail, 100 - tail])]


def share_interval(hits, level=0.95):
    """Wilson interval [low, high] of the share of True in hits (N,). Unlike a bootstrap it is not [0, 0] where nothing
    was hit.
    """
    hits, z = _array(hits), NormalDist().inv_cdf((1 + level) / 2)
    n, share = len(hits), hits.mean()
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * (share * (1 - share) / n + (z / (2 * n)) ** 2) ** 0.5 / (1 + z**2 / n)
    return [float(centre - half) if hits.any() else 0.0, float(centre + half) if not hits.all() else 1.0]


def _array(values):
    return (values.numpy() if isinstance(values, torch.Tensor) else np.asarray(values)).astype(np.float64)
