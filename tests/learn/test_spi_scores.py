"""Scores of single particles: what brightness alone gives, calibration, confusion, numbers."""
import math

import numpy as np
import pytest

pytest.importorskip("torch")

from xfel_classify.core import ConfigurationError
from xfel_classify.engines.cards import shipped_directory
from xfel_classify.learn.recipes import read_recipe
from xfel_classify.learn.spi import label_of
from xfel_classify.learn.spi_scores import (
    SpiEvaluation,
    brightness_alone,
    calibration_error,
    score_spi,
)


def totals(sigma, images=8000, seed=0):
    """One or two copies of two particles, one of them twice as bright, at jittered fluence."""
    rng = np.random.default_rng(seed)
    count, particle = rng.integers(2, size=images), rng.integers(2, size=images)
    total = 1000.0 * (1 + count) * (1 + particle) * np.exp(sigma * rng.standard_normal(images))
    return total, count, particle


@pytest.mark.parametrize("sigma", [0.2, 0.5, 1.0])
def test_brightness_alone_is_as_good_as_two_normal_distributions_allow(sigma):
    found = brightness_alone(*totals(sigma))
    expected = 0.5 * (1 + math.erf(0.5 * math.log(2) / sigma / math.sqrt(2)))
    assert found.count == pytest.approx(expected, abs=0.015) == found.single
    assert found.count_blind < found.count      # a bright single looks like a faint pair


def test_brightness_is_judged_on_images_it_was_not_fitted_to():
    rng = np.random.default_rng(1)
    count = rng.integers(4, size=4000)
    chance = brightness_alone(rng.lognormal(size=4000), count, np.zeros(4000))
    assert chance.count == pytest.approx(0.25, abs=0.03)
    few = brightness_alone(np.ones(3), np.array([0, 1, 2]), np.zeros(3))
    assert 0 <= few.count <= 1                  # too few to fit anything: still a number


def test_calibration_error_is_the_gap_between_stated_and_true():
    rng = np.random.default_rng(0)
    stated = rng.uniform(0.5, 1.0, 50_000)
    probability = np.stack([stated, 1 - stated], 1)
    label = (rng.random(len(stated)) > stated).astype(int)
    assert calibration_error(probability, label) < 0.01
    sure = np.tile([0.99, 0.01], (1000, 1))
    assert calibration_error(sure, np.repeat([0, 1], 500)) == pytest.approx(0.49)


@pytest.fixture
def recipe():
    return read_recipe(shipped_directory() / "spi-multi" / "recipe_small.toml")


def labels(count, particle):
    count = np.asarray(count, np.float32)
    return {"count": count, "particle": np.asarray(particle, np.float32),
            "total": 1e3 * (1 + count), "distance_m": np.full(len(count), 0.2905),
            "diameter_A": np.full(len(count), 200.0),
            "photons": np.full(len(count), 1e5)}


def test_total_needs_every_answer_right(recipe):
    truth = labels([0, 0, 1, 3], [9, 10, 10, 0])
    outputs = {"count": np.eye(4)[[0, 0, 1, 2]], "particle": np.eye(11)[[9, 9, 10, 0]]}
    scores = score_spi(recipe, outputs, truth)
    assert (scores.tasks["count"].accuracy, scores.tasks["particle"].accuracy) == (0.75, 0.75)
    assert scores.total == 0.5 == scores.figure_of_merit and scores.single == 1.0
    particle = scores.tasks["particle"]
    assert particle.confusion_KK[10, 9] == 1 and particle.recall("7dx9") == 0.5
    assert math.isnan(particle.recall("1ss8"))
    said = str(SpiEvaluation("m", "0" * 64, "torch", "standins", {"paper": scores}))
    assert "hard pair 7dx8 and 7dx9: recall 1.000 and 0.500; worst of the others 1.000" in said
    assert "| paper | 4 | 50.0 % | 75.0 % |" in said
    kept = SpiEvaluation("m", "0" * 64, "torch", "standins", {"paper": scores}).as_metrics("x")
    assert kept["paper"]["total"] == 0.5 and "brightness_count" in kept["paper"]


def test_labels_that_follow_from_others():
    truth = labels([0], [1])
    assert label_of(truth, "size_nm")[0] == 20.0
    assert label_of(truth, "edge_resolution_A")[0] == pytest.approx(20.7, abs=0.05)
    assert label_of(truth, "log_photons")[0] == pytest.approx(math.log(1e5))
    with pytest.raises(ConfigurationError, match="edge_resolution_A, size_nm"):
        label_of(truth, "colour")
