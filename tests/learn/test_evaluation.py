"""The table's numbers, and the choice of a threshold."""
import numpy as np
import pytest

pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from xfel_classify.learn.evaluation import choose_threshold, score_run, table  # noqa: E402


def test_a_run_is_counted_as_in_the_paper():
    scores = np.array([0.9, 0.4, 0.6, 0.1, 0.5, 0.2])
    labels = np.array([1, 1, 0, 0, 1, 0])
    row = score_run("95", scores, labels, 0.5)
    assert (row.true_positive, row.false_negative, row.false_positive, row.true_negative) == (
        2, 1, 1, 2)
    assert row.sensitivity == pytest.approx(2 / 3)
    assert row.specificity == pytest.approx(2 / 3)
    assert row.accuracy == pytest.approx(4 / 6)
    # the paper's identity: Acc = h Sen + (1 - h) Spe
    h = row.hit_fraction
    assert row.accuracy == pytest.approx(h * row.sensitivity + (1 - h) * row.specificity)
    assert table([row]).splitlines()[2] == "| 95 | 6 | 0.5000 | 0.6667 | 0.6667 | 0.6667 |"


def test_a_run_without_hits_has_no_sensitivity():
    row = score_run("97", np.array([0.1, 0.7]), np.array([0, 0]), 0.5)
    assert np.isnan(row.sensitivity) and row.specificity == 0.5


def test_the_threshold_separates_with_the_largest_room():
    scores = np.array([0.01, 0.02, 0.03, 0.6, 0.7, 0.8] * 2)
    labels = np.array([0, 0, 0, 1, 1, 1] * 2)
    runs = np.repeat([0, 1], 6)
    threshold, margin = choose_threshold(scores, labels, runs)
    assert 0.03 < threshold < 0.6
    assert margin == pytest.approx(1.0)


def test_the_worst_run_decides_the_threshold():
    rng = np.random.default_rng(0)

    def run(shift):
        logits = np.concatenate([rng.normal(-2 + shift, 1, 500), rng.normal(2 + shift, 1, 500)])
        return 1 / (1 + np.exp(-logits))

    scores = np.concatenate([run(0.0), run(1.0)])
    labels = np.tile(np.repeat([0, 1], 500), 2)
    runs = np.repeat([0, 1], 1000)
    threshold, margin = choose_threshold(scores, labels, runs, 0.9, 0.9, pseudo_events=0)
    rows = [score_run(str(r), scores[runs == r], labels[runs == r], threshold) for r in (0, 1)]
    worst = min(min(row.sensitivity, row.specificity) for row in rows)
    assert worst == pytest.approx(0.9 + 0.1 * margin, abs=0.005)
    for other in (0.3, 0.5, 0.7, 0.9):
        rows = [score_run("", scores[runs == r], labels[runs == r], other) for r in (0, 1)]
        assert min(min(row.sensitivity, row.specificity) for row in rows) <= worst + 1e-9


def test_one_missed_hit_of_a_small_run_does_not_decide_alone():
    rng = np.random.default_rng(1)
    scores = np.concatenate([rng.uniform(0.0, 0.1, 1950), rng.uniform(0.12, 0.3, 50),
                             rng.uniform(0.7, 1.0, 2000), [0.11], rng.uniform(0.7, 1.0, 29)])
    labels = np.concatenate([np.zeros(2000), np.ones(2000), np.ones(30)]).astype(int)
    runs = np.concatenate([np.zeros(4000), np.ones(30)]).astype(int)
    threshold, _ = choose_threshold(scores, labels, runs)
    assert 0.3 < threshold < 0.7
    strict, _ = choose_threshold(scores, labels, runs, pseudo_events=0)
    assert strict < 0.12


def test_thresholds_that_cannot_be_told_apart_give_the_middle():
    """One hit of thousands that lies low does not pull the threshold down to the misses."""
    scores = np.concatenate([np.full(5000, 0.01), np.full(4999, 0.95), [0.03]])
    labels = np.concatenate([np.zeros(5000), np.ones(5000)]).astype(int)
    threshold, margin = choose_threshold(scores, labels, np.zeros(10_000, int))
    assert 0.1 < threshold < 0.5 and margin == pytest.approx(1.0)
