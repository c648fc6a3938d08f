"""Numbers of a curve of true against false positives are those of the statistics books."""

import numpy as np
import pytest

from ietagc_diffusers.eval.metrics.intervals import wilson_interval
from ietagc_diffusers.eval.roc import auc_interval, roc_auc, roc_curve, threshold_at


def drawn(number=60, seed=0):
    """Scores with ties, and labels."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 10, number).astype(float), rng.random(number) < 0.4


def won(scores, labels):
    """Whether each positive (rows) beats each negative (columns), ties by half: one pair at a time."""
    return np.array([[(a > b) + 0.5 * (a == b) for b in scores[~labels]] for a in scores[labels]])


def test_auc_is_the_share_of_ordered_pairs():
    scores, labels = drawn()
    assert roc_auc(scores, labels) == pytest.approx(won(scores, labels).mean())
    assert roc_auc([3, 4, 1, 2], [True, True, False, False]) == 1
    assert roc_auc([1, 1], [True, False]) == 0.5


def test_at_most_the_given_share_of_negatives_lies_over_the_threshold():
    scores = np.concatenate([np.arange(200.0), np.array([150.0, 197.5, 198.5, 300.0])])
    labels = np.arange(204) >= 200
    threshold, rate = threshold_at(scores, labels)
    assert (scores[:200] > threshold).sum() == 2 and rate == 0.75
    assert threshold_at([5.0, 5.0, 5.0, 9.0], [False, False, False, True], 0.5) == (5.0, 1.0)


def test_the_interval_has_delong_s_variance():
    scores, labels = drawn()
    pairs = won(scores, labels)
    auc, (rows, columns) = pairs.mean(), pairs.shape
    variance = pairs.mean(axis=1).var(ddof=1) / rows + pairs.mean(axis=0).var(ddof=1) / columns
    low, high = auc_interval(scores, labels)
    logits = np.log([low / (1 - low), high / (1 - high)])
    assert logits.mean() == pytest.approx(np.log(auc / (1 - auc)))
    assert np.diff(logits)[0] / 2 == pytest.approx(1.959964 * variance**0.5 / (auc * (1 - auc)))


def test_the_interval_is_that_of_a_bootstrap():
    rng = np.random.default_rng(0)
    positive, negative = rng.normal(1, 1, 150), rng.normal(0, 2, 200)
    scores, labels = np.concatenate([positive, negative]), np.arange(350) < 150
    again = [(rng.choice(positive, 150)[:, None] > rng.choice(negative, 200)).mean() for _ in range(600)]
    assert auc_interval(scores, labels) == pytest.approx(np.percentile(again, [2.5, 97.5]), abs=0.012)


def test_complete_separation_is_as_uncertain_as_so_many_pairs():
    scores, labels = np.arange(30.0), np.arange(30) >= 20
    assert auc_interval(scores, labels) == wilson_interval(np.ones(10))
    assert auc_interval(-scores, labels) == wilson_interval(np.zeros(10))
    assert auc_interval(np.ones(30), labels) == [0.5, 0.5]  # a score that says nothing, of whichever images
    with pytest.raises(ValueError, match="two of each"):
        auc_interval(scores[:21], labels[:21])


def test_the_curve_counts_what_reaches_each_threshold():
    scores, labels = drawn()
    curve = roc_curve(scores, labels)
    for false, true, threshold in zip(*curve, strict=True):
        assert false == np.mean(scores[~labels] >= threshold) and true == np.mean(scores[labels] >= threshold)
    assert (curve.false_positives[0], curve.true_positives[0]) == (0, 0)
    assert (curve.false_positives[-1], curve.true_positives[-1]) == (1, 1)
    under = np.diff(curve.false_positives) * (curve.true_positives[1:] + curve.true_positives[:-1]) / 2
    assert under.sum() == pytest.approx(roc_auc(scores, labels))
