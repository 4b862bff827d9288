"""Errors by shape, and the page of activations."""
import numpy as np
import pytest

from xfel_classify.core import ConfigurationError
from xfel_classify.learn.quality_reports import activation_page, robustness_table, shape_score


def test_errors_by_shape():
    score = np.concatenate([[0.9, 0.8, 0.4, 0.2], np.linspace(0.0, 0.3, 300)])
    good = np.arange(304) < 4
    found = shape_score("torus", score, good)
    assert (found.good, found.bad) == (4, 300)
    assert found.fnr == 0.5 and found.fpr == 0.0
    # three of 300 may pass: the threshold lies below the fourth highest bad score, 0.297
    assert found.fnr_allowed == 0.25
    table = robustness_table([found, shape_score("sphere", np.ones(2), np.ones(2))]).splitlines()
    assert table[2] == "| torus | 4 / 300 | 50.0 | 0.0 | 25.0 | 84.8 | 0.0 |"
    assert table[3] == "| sphere | 2 / 0 | 0.0 | - | - | - | - |"


def test_scores_and_labels_must_fit():
    with pytest.raises(ConfigurationError, match="one finite score per label"):
        shape_score("torus", np.array([0.1, np.nan]), np.array([True, False]))


@pytest.mark.torch
def test_a_page_of_activations():
    pytest.importorskip("torch")
    from xfel_classify.learn.networks import build_network

    network = build_network("spi_quality", size=32, width=4)
    images = np.random.default_rng(0).random((2, 32, 32), np.float32)
    page = activation_page(network, images, ["one", "other"], channels=3)
    assert page.count("<figure") == 2 * (1 + 3 + 3 + 3)
    assert all(f'id="{stage}"' in page for stage in ("input", "stem", "stage1", "stage2"))
    assert "32 x 32" in page and "8 x 8" in page and "http:" not in page
    with pytest.raises(ConfigurationError, match="one for each"):
        activation_page(network, images, ["one"])
