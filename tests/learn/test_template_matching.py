"""Template matching: even rotations, the true orientation found, two particles told apart."""
import numpy as np
import pytest

from xfel_classify.learn.template_matching import Matching, rotations, turned
from xfel_classify.simulate.spi_conditions import draw_spi
from xfel_classify.simulate.spi_images import copies_of, simulate_spi

PARTICLES = ("1igy", "6m0j")


@pytest.fixture(scope="module", autouse=True)
def volumes(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XFEL_CLASSIFY_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def angle_deg(one_33, other_33):
    return np.degrees(np.arccos(np.clip((np.trace(one_33.T @ other_33) - 1) / 2, -1, 1)))


def test_rotations_are_spread_evenly():
    turns = rotations(2000)
    np.testing.assert_allclose(turns @ turns.transpose(0, 2, 1), np.broadcast_to(
        np.eye(3), turns.shape), atol=1e-12)
    np.testing.assert_allclose(turns.mean(0), 0, atol=2e-3)
    spacing = np.degrees((8 * np.pi ** 2 / 2000) ** (1 / 3))
    traces = np.einsum("rij,sij->rs", turns[:100], turns)
    nearest = np.degrees(np.arccos(np.clip((np.sort(traces, 1)[:, -2] - 1) / 2, -1, 1)))
    assert 0.6 * spacing < nearest.min() and nearest.max() < 1.4 * spacing


def test_turning_adds_to_an_orientation():
    start = rotations(7)[3]
    assert angle_deg(start, turned(start, np.array([0, 0, np.radians(5)]))) == pytest.approx(5)
    np.testing.assert_array_equal(turned(start, np.zeros(3)), start)


@pytest.mark.parametrize("fluence", [1.0, 0.03])
def test_particle_and_orientation_are_found(fluence):
    preset = f"paper:particles={'+'.join(PARTICLES)},counts=1,fluence={fluence}"
    drawn = [draw_spi(4999, 0, event, preset) for event in range(4)]
    images = np.stack([simulate_spi(c) for c in drawn])
    truth = np.array([PARTICLES.index(c.particle) for c in drawn])
    matching = Matching(PARTICLES, drawn[0], orientations=3000, starts=8, finalists=3)
    found = matching.match(images)
    assert (found.fine_NP.argmax(1) == truth).all() and set(truth) == {0, 1}
    for n, c in enumerate(drawn):
        at_truth = matching.log_likelihood(images[n], truth[n], copies_of(c)[0].rotation_33)
        assert found.fine_NP[n, truth[n]] > at_truth - 1.0      # the maximum is above the truth
