"""Simulated crops are seen through real panel layouts."""
import numpy as np
import pytest

pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from xfel_classify.learn import datasets  # noqa: E402
from xfel_classify.learn.layouts import LAYOUTS, MOST_MISSING, draw_gaps, layout_gaps  # noqa: E402
from xfel_classify.learn.recipes import RunKey  # noqa: E402


@pytest.mark.parametrize(("kind", "panels"), sorted(set(LAYOUTS)))
def test_a_layout_has_pixels_and_gaps(kind, panels):
    gaps_HW = layout_gaps(kind, panels, 350)
    assert gaps_HW.shape == (350, 350) and 0 < gaps_HW.mean() < 0.4


def test_the_jungfrau_4m_has_its_hole_about_the_beam():
    gaps_HW = layout_gaps("jungfrau", 8, 350)
    assert gaps_HW[150:200, 150:200].all()


def test_drawn_gaps_differ_and_are_repeatable():
    drawn = [draw_gaps(np.random.default_rng(seed)) for seed in range(12)]
    for seed, gaps_HW in enumerate(drawn):
        if gaps_HW is not None:
            assert gaps_HW.shape == (350, 350) and gaps_HW.mean() <= MOST_MISSING
            np.testing.assert_array_equal(gaps_HW, draw_gaps(np.random.default_rng(seed)))
    assert len({gaps_HW.tobytes() for gaps_HW in drawn if gaps_HW is not None}) > 8


def test_runs_look_through_layouts_and_every_hit_shows_spots():
    from xfel_classify.simulate.sfx import LEAST_IN_WINDOW

    missing = []
    for run in range(3):
        images_NHW, labels_N = datasets.simulate(RunKey("sfx", "training", 31, run, 4))
        assert images_NHW.shape == (4, 350, 350) and set(labels_N) <= {0, 1}
        missing.append((images_NHW == 0).all(axis=0).mean())
        simulated = datasets._sfx_run("training", 31, run)
        for event, label in enumerate(labels_N):
            number = next(n for n in range(event, event + 10 * datasets.SPARE, datasets.SPARE)
                          if not (truth := simulated.event(n)[1]).is_hit
                          or truth.n_visible_window >= LEAST_IN_WINDOW)
            assert simulated.event(number)[1].is_hit == bool(label)
    assert len(set(missing)) == 3
