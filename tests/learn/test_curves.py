"""Curves and intervals agree with their definitions, counted pair by pair."""
import math

import numpy as np
import pytest

from xfel_classify.learn.curves import curves, wilson


@pytest.mark.parametrize("levels", [3, 10, 10**9], ids=["many ties", "ties", "no ties"])
@pytest.mark.parametrize("seed", range(4))
def test_areas_by_counting_pairs(seed, levels):
    rng = np.random.default_rng(seed)
    labels_N = rng.integers(0, 2, 60)
    labels_N[:2] = 0, 1
    scores_N = np.floor((labels_N * 0.3 + rng.random(60)) * levels) / levels
    found = curves(scores_N, labels_N)
    hits, misses = scores_N[labels_N == 1], scores_N[labels_N == 0]
    wins = (hits[:, None] > misses).mean() + (hits[:, None] == misses).mean() / 2
    assert found.auc == pytest.approx(wins, abs=1e-12)
    average, before = 0.0, 0.0
    for threshold in sorted(set(scores_N), reverse=True):
        called = scores_N >= threshold
        recall = (called & (labels_N == 1)).sum() / len(hits)
        average += (recall - before) * labels_N[called].mean()
        before = recall
    assert found.average_precision == pytest.approx(average, abs=1e-12)
    assert len(found.threshold_T) == len(set(scores_N)) + 1
    assert (found.recall_T[0], found.recall_T[-1]) == (0, 1)
    assert (found.false_positive_rate_T[0], found.false_positive_rate_T[-1]) == (0, 1)


def test_perfect_reversed_and_constant_scores():
    labels_N = np.array([0, 0, 1, 1])
    assert curves([1, 2, 3, 4], labels_N).auc == 1
    assert curves([4, 3, 2, 1], labels_N).auc == 0
    constant = curves([7, 7, 7, 7], labels_N)
    assert constant.auc == 0.5 and constant.average_precision == 0.5


@pytest.mark.parametrize("labels", [[0, 0], [1, 1], []])
def test_one_class_has_no_curves(labels):
    assert curves(np.arange(len(labels)), np.array(labels)) is None


def test_wilson_intervals():
    # E. B. Wilson's formula, worked out by hand for 8 of 10 at z = 1.96
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=5e-5)
    assert wilson(0, 20)[0] == 0 and wilson(20, 20)[1] == 1
    assert all(math.isnan(bound) for bound in wilson(0, 0))
