"""Prototypes: the nearest class mean as the last layer, and models cut down to one question."""
import numpy as np
import pytest

from xfel_classify.core import ConfigurationError
from xfel_classify.learn.prototypes import prototype_layer


def embeddings(count, classes=2, features=40, seed=0, apart=5.0):
    """(embeddings (N, F), classes): classes apart along one direction, scatter large along others.
    """
    rng = np.random.default_rng(seed)
    class_N = rng.integers(classes, size=count)
    scale_F = np.geomspace(0.3, 6.0, features)
    embedding = rng.standard_normal((count, features)) * scale_F
    embedding[:, 0] += 0.3 * apart * class_N
    return embedding, class_N


def test_the_scatter_within_classes_is_the_unit_of_distance():
    labelled, class_N = embeddings(120)
    asked, truth = embeddings(2000, seed=1)
    layer = prototype_layer(labelled, class_N, 2)
    right = (layer.logits(asked).argmax(1) == truth).mean()
    means = np.stack([labelled[class_N == one].mean(0) for one in range(2)])
    plain = ((asked[:, None] - means) ** 2).sum(2).argmin(1)
    assert right > 0.85 and right > (plain == truth).mean() + 0.1


def test_full_shrinkage_is_the_plain_nearest_mean():
    labelled, class_N = embeddings(60, classes=3)
    layer = prototype_layer(labelled, class_N, 3, shrinkages=(1.0,))
    means = np.stack([labelled[class_N == one].mean(0) for one in range(3)])
    plain = ((labelled[:, None] - means) ** 2).sum(2).argmin(1)
    np.testing.assert_array_equal(layer.logits(labelled).argmax(1), plain)
    assert layer.shrinkage == 1.0


def test_left_out_images_are_judged_without_themselves():
    rng = np.random.default_rng(2)          # nothing to learn: left out, half are right
    labelled, class_N = rng.standard_normal((60, 40)), np.arange(60) % 2
    layer = prototype_layer(labelled, class_N, 2)
    seen = (layer.logits(labelled).argmax(1) == class_N).mean()
    left_out = (layer.left_out_NK.argmax(1) == class_N).mean()
    assert left_out < 0.7 < seen


def test_rare_classes_count_as_much():
    labelled, class_N = embeddings(2000, apart=6.0)
    keep = (class_N == 0) | (np.cumsum(class_N) <= 40)
    layer = prototype_layer(labelled[keep], class_N[keep], 2)
    asked, truth = embeddings(2000, seed=3, apart=6.0)
    found = layer.logits(asked).argmax(1)
    assert min((found == truth)[truth == one].mean() for one in (0, 1)) > 0.9


def test_a_class_without_images_is_refused():
    with pytest.raises(ConfigurationError, match="at least two of every class"):
        prototype_layer(np.zeros((5, 3)), np.zeros(5, int), 2)
