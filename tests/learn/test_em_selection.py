"""EM classes against the formulas written out, and the choice, size filter and vote around them."""
import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest
from mockdata.spi_patterns import grid, pattern, patterns

pytest.importorskip("scipy")

from xfel_classify.core import ConfigurationError
from xfel_classify.learn import em_selection as em
from xfel_classify.learn.size_filter import (
    MINIMA,
    fit_spheres,
    minima_px,
    ring_photons,
    sphere_intensity,
)
from xfel_classify.learn.symmetry_score import chosen_by_symmetry, order_scores


def bilinear(average_GG, x, y):
    """One value of an average whose middle is the beam."""
    half = average_GG.shape[0] // 2
    column, row = int(np.floor(x + half)), int(np.floor(y + half))
    u, v = x + half - column, y + half - row
    return ((1 - v) * ((1 - u) * average_GG[row, column] + u * average_GG[row, column + 1])
            + v * ((1 - u) * average_GG[row + 1, column] + u * average_GG[row + 1, column + 1]))


def test_lookup_turns_the_average():
    rng = np.random.default_rng(0)
    x, y = rng.uniform(-5, 5, (2, 7))
    table = em.lookup(x, y, 6, friedel=False)
    average = rng.random((2, table.side ** 2))
    found = table.turned(average)
    for k in range(2):
        for r in range(6):
            phi = 2 * np.pi * r / 6
            expected = [bilinear(average[k].reshape(table.side, -1),
                                 np.cos(phi) * a - np.sin(phi) * b,
                                 np.sin(phi) * a + np.cos(phi) * b)
                        for a, b in zip(x, y, strict=True)]
            np.testing.assert_allclose(found[k, r], expected, rtol=1e-5)
    # putting back is the transpose: <A m, v> = <m, A^T v>
    values = rng.random((1, 6, 7))
    np.testing.assert_allclose((table.turned(average[:1]) * values).sum(),
                               (table.back(values) * average[:1]).sum(), rtol=1e-5)


@pytest.mark.parametrize("hard", [False, True])
def test_the_e_step_is_its_formula(hard):
    """P_nkr = softmax of sum_p d ln(s M) - s sum_p M, pattern by pattern, in loops."""
    rng = np.random.default_rng(1)
    data = rng.poisson(3.0, (5, 11)).astype(np.float32)
    model = rng.uniform(0.5, 6.0, (4, 11))
    scale = rng.uniform(0.5, 2.0, 5)
    logs = np.log(model).astype(np.float32)
    found, height = em.e_step(data, logs - logs.mean(0), model.sum(1), scale, hard)
    for n in range(5):
        likelihood = np.array([sum(d * np.log(scale[n] * m) - scale[n] * m
                                   for d, m in zip(data[n], one, strict=True)) for one in model])
        expected = np.exp(likelihood - likelihood.max())
        expected /= expected.sum()
        if hard:
            expected = (np.arange(4) == likelihood.argmax()).astype(float)
        np.testing.assert_allclose(found[n], expected, rtol=2e-4, atol=1e-6)
        whole = height[n] + data[n] @ logs.mean(0) + data[n].sum() * np.log(scale[n])
        top = likelihood.max()
        total = top if hard else top + np.log(np.exp(likelihood - top).sum())
        assert whole == pytest.approx(total, abs=1e-2)


def test_one_iteration_is_its_formulas(monkeypatch):
    """Scales and averages as written, whatever the size of the blocks."""
    rng = np.random.default_rng(2)
    images, _ = patterns(12, seed=2, photons=300, side=12, radius=1.2)
    data, x, y = em.prepared(images, np.ones((12, 12), bool), (6.0, 6.0), 1)
    how = em.EmSettings(classes=3, rotations=5, friedel=False)
    table = em.lookup(x, y, 5, False)
    level = data.sum(1).mean() / len(x)
    start = level * rng.uniform(0.5, 1.5, (3, table.side ** 2))
    scale = rng.uniform(0.5, 2, 12)
    seen = np.asarray(table.matrix.sum(0)).ravel() > 0
    monkeypatch.setattr(em, "BLOCK_BYTES", 8 * 15 * 5)
    averages, scales, state = em._iteration(data, data.sum(1).astype(float), start, scale, table,
                                            how, level, seen)
    matrix = table.matrix.toarray().astype(float).reshape(5, len(x), -1)
    model = np.einsum("rpg,kg->krp", matrix, start)
    likelihood = (np.einsum("np,krp->nkr", data, np.log(model))
                  - scale[:, None, None] * model.sum(2))
    posterior = np.exp(likelihood - likelihood.max((1, 2), keepdims=True))
    posterior /= posterior.sum((1, 2), keepdims=True)
    own = data.sum(1) / np.einsum("nkr,kr->n", posterior, model.sum(2))
    np.testing.assert_allclose(scales, own / own.mean(), rtol=1e-3)
    above = np.einsum("nkr,np,rpg->kg", posterior, data, matrix)
    below = np.einsum("nkr,n,rpg->kg", posterior, own / own.mean(), matrix)
    filled = below > 1e-3 * below.max()
    expected = (above / np.maximum(below, 1e-30))[filled]
    np.testing.assert_allclose(averages[filled], expected, rtol=2e-3, atol=1e-4 * expected.max())
    assert (state[1] == posterior.sum(2).argmax(1)).all()


@pytest.fixture(scope="module")
def sorted_patterns():
    """240 patterns of singles with six-fold lobes and of pairs, in 6 classes."""
    images, single = patterns(240, seed=1, photons=3e4, side=40)
    data, x, y = em.prepared(images, np.ones((40, 40), bool), (20.0, 20.0), 1, inner=3, outer=19)
    found = em.em_classes(data, x, y, em.EmSettings(classes=6, rotations=36, iterations=20, seed=3))
    return found, single, data, (x, y)


def test_classes_are_of_one_kind(sorted_patterns):
    found, single, _, _ = sorted_patterns
    pure = sum(max(single[found.class_N == k].sum(), (~single[found.class_N == k]).sum())
               for k in range(6))
    assert pure / len(single) > 0.95
    assert found.likelihood[-1] > found.likelihood[0]
    assert (found.probability_N <= 1 + 1e-9).all()


def test_brightness_is_the_scale_and_not_the_class(sorted_patterns):
    found, _, data, _ = sorted_patterns
    assert np.corrcoef(found.scale_N, data.sum(1))[0, 1] > 0.99
    assert found.scale_N.mean() == pytest.approx(1)


def test_classes_with_six_fold_symmetry_are_the_singles(sorted_patterns):
    found, single, _, _ = sorted_patterns
    chosen, scores = chosen_by_symmetry(found.averages_KGG, 8, 18, (6,))
    selected = chosen[found.class_N]
    assert scores.shape == (6, 50)
    assert (selected & single).sum() / max(selected.sum(), 1) > 0.95
    assert (selected & single).sum() / single.sum() > 0.5


def test_turns_are_found():
    """Copies of one pattern by known angles: the turns differ by them, modulo the symmetry."""
    rng = np.random.default_rng(4)
    y, x = grid(32)
    q, angle = np.hypot(y, x), np.arctan2(y, x)
    turns = rng.uniform(0, np.pi, 40)
    images = [rng.poisson(50 * np.exp(-q / 8) * (1 + 0.8 * np.cos(2 * (angle - t))))
              for t in turns]
    data, px, py = em.prepared(np.array(images, float), np.ones((32, 32), bool), (16.0, 16.0), 1,
                               inner=2, outer=15)
    found = em.em_classes(data, px, py, em.EmSettings(classes=1, rotations=90, iterations=30))
    # the average turned by +phi is looked up: a pattern at angle t has phi = const - t
    offset = np.exp(2j * (found.turn_N + turns))
    assert np.abs(offset.mean()) > 0.97


def test_half_a_detector_fills_whole_averages():
    images, _ = patterns(120, seed=5, share=1.0, photons=3e4, side=40)
    good = np.ones((40, 40), bool)
    good[20:] = False               # the lower half is dead
    good[:, 18:22] = False          # and there is a gap
    hidden = np.where(good, images, 1e6)
    data, x, y = em.prepared(hidden, good, (20.0, 20.0), 1, inner=2, outer=19)
    assert data.max() < 1e6
    found = em.em_classes(data, x, y, em.EmSettings(classes=1, rotations=36, iterations=15))
    average = found.averages_KGG[0]
    middle = average.shape[0] // 2
    yy, xx = np.mgrid[-middle:middle + 1, -middle:middle + 1]
    ring = (np.hypot(yy, xx) > 4) & (np.hypot(yy, xx) < 16)
    assert np.isfinite(average[ring]).all()
    np.testing.assert_allclose(average[ring], average[::-1, ::-1][ring], rtol=1e-5)     # Friedel
    assert order_scores(average, 8, 16)[:12].argmax() + 1 == 6


@pytest.mark.parametrize(("settings", "said"), [
    ({"classes": 0}, "at least one of each"), ({"classes": 9}, "fewer classes")])
def test_settings_nobody_can_mean(settings, said):
    with pytest.raises(ConfigurationError, match=said):
        em.em_classes(np.ones((5, 4), np.float32), np.arange(4.0), np.arange(4.0),
                      em.EmSettings(**settings))


def test_patterns_without_photons_are_refused():
    for data in (np.zeros((5, 4)), np.full((5, 4), np.nan), np.full((5, 4), -1.0)):
        with pytest.raises(ConfigurationError, match="mask those pixels"):
            em.em_classes(data.astype(np.float32), np.arange(4.0), np.arange(4.0),
                          em.EmSettings(classes=2))
    with pytest.raises(ConfigurationError, match="wider range"):
        em.prepared(np.ones((1, 4, 4)), np.ones((4, 4), bool), (2.0, 2.0), 1, inner=50)


@pytest.mark.slow
def test_as_pure_as_spi_em_class():
    """The program of PyPI, where it is installed, on the same patterns; see benchmarks/."""
    if shutil.which("spi_em_run.py") is None:
        pytest.skip("spi-em-class is not installed (pip install spi-em-class)")
    spec = importlib.util.spec_from_file_location(
        "em_benchmark", Path(__file__).parents[2] / "benchmarks" / "em_selection.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    images, single = patterns(150, seed=6, share=0.3, photons=2e3)
    rows = [benchmark.row(name, found[0], single, found[1]) for name, found in (
        ("ours", benchmark.ours(images, 6, 0, True)),
        ("theirs", benchmark.spi_em_class(images, 6, True)))]
    assert rows[0]["purity"] >= rows[1]["purity"] - 0.05


# --- symmetry ------------------------------------------------------------------------------------

@pytest.mark.parametrize("order", [2, 6, 10])
def test_the_score_names_the_order(order):
    half = 20
    y, x = np.mgrid[-half:half + 1, -half:half + 1]
    average = (1 + 0.3 * np.cos(order * np.arctan2(y, x))) * np.exp(-np.hypot(y, x) / 9)
    scores = order_scores(average, 8, 18)
    assert scores.argmax() + 1 == order
    assert scores[order - 1] / scores.sum() > 0.9
    assert scores[order - 1] == pytest.approx(0.3 ** 2 / 2, rel=0.25)      # a cosine's variance
    average[half + 12, half] = np.nan           # a hole spoils its rings only
    assert order_scores(average, 8, 18).argmax() + 1 == order


def test_labels_choose_the_classes_with_the_best_f1():
    """Rare singles: no class holds a majority of them, and still the best two are chosen."""
    from xfel_classify.learn.em_runs import best_by_labels

    class_N = np.repeat([0, 1, 2, 3], [20, 100, 20, 5])
    label_N = np.zeros(145, int)
    label_N[:8] = label_N[120:127] = 1          # 8 of 20 in class 0, 7 of 20 in class 2
    label_N[20] = 1                             # 1 of 100 in class 1
    label_N[140:] = -1
    assert best_by_labels(class_N, label_N, 4).tolist() == [True, False, True, False]
    assert not best_by_labels(class_N, np.zeros(145, int), 4).any()


def test_orders_are_checked():
    with pytest.raises(ConfigurationError, match="orders from 1 to 50"):
        chosen_by_symmetry(np.ones((1, 9, 9)), 2, 4, (0,))


# --- size ----------------------------------------------------------------------------------------

GEOMETRY = {"element_m": 6e-4, "distance_m": 0.13, "wavelength_A": 7.29}


def sphere_frames(diameters_nm, background=0.0, photons=1e5, seed=0):
    rng = np.random.default_rng(seed)
    y, x = grid(60)
    s_nm = 2 * np.sin(0.5 * np.arctan(np.hypot(y, x) * 6e-4 / 0.13)) / 0.729
    images = []
    for diameter in diameters_nm:
        expected = sphere_intensity(np.pi * s_nm * diameter)
        images.append(rng.poisson(photons * expected / expected.sum() + background))
    return np.array(images, np.float32)


@pytest.mark.parametrize("background", [0.0, 0.5])
def test_diameters_of_spheres(background):
    diameters = np.linspace(35, 90, 31)         # fringes of two elements and more
    images = sphere_frames(diameters, background)
    good = np.ones((60, 60), bool)
    good[:30] = False                                   # half a detector
    good[30:33, 27:33] = False                          # beam stop
    found = fit_spheres(*ring_photons(images, good, (30.0, 30.0), 1), **GEOMETRY)
    off = np.abs(found.diameter_nm_N / diameters - 1) > 0.03
    assert off.sum() <= 1       # by a whole fringe, where background hides the minima
    border = (np.abs(diameters - 55) < 2) | (np.abs(diameters - 84) < 3)
    right = found.within(55, 84) == ((diameters >= 55) & (diameters <= 84))
    assert right[~border & ~off].all()


def test_an_empty_frame_has_no_size():
    images = np.concatenate([sphere_frames([60.0]), np.zeros((1, 60, 60), np.float32)])
    found = fit_spheres(*ring_photons(images, np.ones((60, 60), bool), (30.0, 30.0), 1),
                        **GEOMETRY)
    assert np.isnan(found.diameter_nm_N[1]) and not found.within(0, 1e3)[1]
    with pytest.raises(ConfigurationError, match=r"source\.distance_m"):
        fit_spheres(np.ones((1, 3)), np.ones(3), np.arange(3.0), element_m=1e-4, distance_m=0.0,
                    wavelength_A=1.0)


def test_minima_are_where_the_sphere_is_dark():
    assert (sphere_intensity(np.array(MINIMA)) < 1e-12).all()
    radii = minima_px(70.0, **GEOMETRY)
    s_nm = 2 * np.sin(0.5 * np.arctan(radii * 6e-4 / 0.13)) / 0.729
    np.testing.assert_allclose(np.pi * s_nm * 70.0, MINIMA[:len(radii)], rtol=1e-6)


def test_the_generator_has_the_symmetry_it_says():
    one = pattern(np.random.default_rng(0), True, 1e6)
    np.testing.assert_allclose(one, one[::-1, ::-1], rtol=1e-9)
