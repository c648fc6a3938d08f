"""How many steps something takes, where some do not get there within the steps that they were given.

All are watched up to the same step, so that the Kaplan-Meier estimate of the share that got there is the share itself,
and its median the first step by which half of all did, or more than all steps.
"""

from collections.abc import Sequence

import numpy as np

from .metrics.intervals import wilson_interval


def done_by(steps: Sequence[int | None], checks: Sequence[int]) -> np.ndarray:
    """Whether each of N was done by each of C checks, as 0 or 1: float64 (N, C).

    steps: at which check each was done; None: at none.
    """
    return np.array([[step is not None and step <= check for check in checks] for step in steps], dtype=np.float64)


def median(done: np.ndarray, checks: Sequence[int]) -> int | None:
    """The first check by which half of N were done; None: that is later than the last."""
    return _first(done.mean(axis=0) >= 0.5, checks)


def median_interval(done: np.ndarray, checks: Sequence[int], level: float = 0.95) -> list[int | None]:
    """[low, high] of the median: the checks at which Wilson's interval of the share begins and ceases to hold 1/2."""
    low, high = share_intervals(done, level)
    return [_first(high >= 0.5, checks), _first(low >= 0.5, checks)]


def share_intervals(done: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's interval, low and high (C,), of the share that was done by each check."""
    low, high = zip(*(wilson_interval(by_check, level) for by_check in done.T), strict=True)
    return np.array(low), np.array(high)


def mean_steps(done: np.ndarray, checks: Sequence[int]) -> np.ndarray:
    """The steps of each of N, those of one that was not done counting as all: float64 (N, 1)."""
    between = np.diff(checks)
    return checks[0] + ((1 - done[:, :-1]) * between).sum(axis=1, keepdims=True)


def bootstrap_intervals(
    *parts: np.ndarray, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Percentile bootstrap interval, low and high (C,), of the sum of the means of parts (N_k, C), each of which is
    drawn again by rows. The difference of two means of the same rows is a part of differences, that of two of different
    rows a part and the negative of another.
    """
    rng = np.random.default_rng(seed)
    drawn = [sum(part[rng.integers(0, len(part), len(part))].mean(axis=0) for part in parts) for _ in range(resamples)]
    tail = 50 * (1 - level)
    low, high = np.percentile(drawn, [tail, 100 - tail], axis=0)
    return low, high


def _first(holds: np.ndarray, checks: Sequence[int]) -> int | None:
    return checks[int(holds.argmax())] if holds.any() else None
