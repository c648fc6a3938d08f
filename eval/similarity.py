"""Sim Score and copy rate (eq. 14), with intervals."""

import numpy as np
import torch
from scipy.stats import binomtest

SIM_PERCENTILE = 95
COPY_SIMILARITY = 0.5


def sim_score(similarities):
    """The 95th percentile of similarities (N,) to the nearest training image."""
    return float(np.percentile(_array(similarities), SIM_PERCENTILE))


def copy_rate(similarities, threshold=COPY_SIMILARITY):
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
    hits = _array(hits)
    interval = binomtest(int(hits.sum()), len(hits)).proportion_ci(level, method="wilson")
    return [float(interval.low), float(interval.high)]


def _array(values):
    return (values.numpy() if isinstance(values, torch.Tensor) else np.asarray(values)).astype(np.float64)
