"""How well a score tells two kinds apart: the curve of true against false positives, and numbers of it. Pure."""

from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from .metrics.intervals import wilson_interval

FALSE_POSITIVES = 0.01


def roc_auc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Probability that a positive (label True) scores higher than a negative; ties count half. (N,) each."""
    positive, negative = by_label(scores, labels)
    return float(_share_below(negative, positive).mean())


def auc_interval(scores: ArrayLike, labels: ArrayLike, level: float = 0.95) -> list[float]:
    """Interval [low, high] of ``roc_auc`` by DeLong's variance (1988), on the scale of the logit, so that it stays
    within (0, 1) and is wide enough near its ends.

    Where all positives score higher than all negatives, or all lower, that variance is 0. The interval is then Wilson's
    of as many independent pairs as there are of the rarer kind.

    Raises:
        ValueError: fewer than two of a kind.
    """
    positive, negative = by_label(scores, labels)
    if min(len(positive), len(negative)) < 2:
        raise ValueError("an interval of the AUC needs at least two of each kind")
    below, above = _share_below(negative, positive), 1 - _share_below(positive, negative)
    auc = below.mean()
    if auc in (0, 1):
        return wilson_interval(np.full(min(len(positive), len(negative)), auc), level)
    error = (below.var(ddof=1) / len(below) + above.var(ddof=1) / len(above)) ** 0.5
    half = NormalDist().inv_cdf((1 + level) / 2) * error / (auc * (1 - auc))
    return [float(1 / (1 + np.exp(side) * (1 - auc) / auc)) for side in (half, -half)]


def _share_below(values: np.ndarray, of: np.ndarray) -> np.ndarray:
    """Of each of ``of`` (N,) the share of ``values`` that lie below it; ties count half."""
    ordered = np.sort(values)
    return (np.searchsorted(ordered, of, "left") + np.searchsorted(ordered, of, "right")) / (2 * len(ordered))


def threshold_at(scores: ArrayLike, labels: ArrayLike, false_positives: float = FALSE_POSITIVES) -> tuple[float, float]:
    """The lowest threshold that at most the share ``false_positives`` of the negatives exceed, and the share of the
    positives that exceed it: (threshold, TPR@FPR).
    """
    positive, negative = by_label(scores, labels)
    threshold = np.sort(negative)[::-1][int(false_positives * len(negative))]  # as many lie over it, or fewer
    return float(threshold), float((positive > threshold).mean())


class Curve(NamedTuple):
    """Shares of false and of true positives over each threshold, from the highest on: (K,) each, in [0, 1]. The first
    threshold is infinite, and nothing lies over it; the others are the values of the scores.
    """

    false_positives: np.ndarray
    true_positives: np.ndarray
    thresholds: np.ndarray


def roc_curve(scores: ArrayLike, labels: ArrayLike) -> Curve:
    """The whole curve: what scores at least a threshold counts as positive."""
    positive, negative = by_label(scores, labels)
    thresholds = np.unique(np.concatenate([positive, negative]))[::-1]
    false, true = (
        np.concatenate([[0.0], (len(values) - np.searchsorted(np.sort(values), thresholds, "left")) / len(values)])
        for values in (negative, positive)
    )
    return Curve(false, true, np.concatenate([[np.inf], thresholds]))


def by_label(scores: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Scores of the positives, and of the negatives."""
    values, positive = np.asarray(scores, dtype=float), np.asarray(labels, dtype=bool)
    return values[positive], values[~positive]
