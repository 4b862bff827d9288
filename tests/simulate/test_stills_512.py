"""Labelled quadrants: reproducible, cut from one image, right in their labels and geometry."""
import dataclasses
import hashlib

import numpy as np
import pytest

from xfel_classify.core import ConfigurationError, Constants, Window
from xfel_classify.detectors import assembled_geometry
from xfel_classify.preprocess import image_window, plan_render, render
from xfel_classify.simulate.bragg import HC_EV_A, predict
from xfel_classify.simulate.crystal import draw_crystal, random_rotation, reflections
from xfel_classify.simulate.ewald import excited, near_ewald
from xfel_classify.simulate.sfx import crops, draw_conditions
from xfel_classify.simulate.stills_512 import simulate_image, simulate_quadrant
from xfel_classify.simulate.stills_conditions import (
    QUADRANTS,
    STILL_PRESETS,
    draw_still,
    label_B_A2,
    modern_d_A,
)

# sha256 of the crops below: shipped models are trained on these pixels
CROPS = {
    "training": "478249f193d540031973f94f612578360f44e4d2f8400a6920fe70224748866c",
    "shifted": "3d52c9ab2ea61397e483c4674b96cde76ab98e2162932cec8c0e0b9b095bf284",
    "demo": "a517f5af5a68d499cbc6974bec761cb234fc5336d6a77a10bae7fe1b903d5450",
    "training_stray": "99a0e97c009d02ea38b36967d52eadddcfe8f2b233e5b5fac6dcef6af9880805",
}


@pytest.mark.parametrize("preset", CROPS)
def test_the_crops_that_shipped_models_saw_have_not_changed(preset):
    """Whoever means to change them trains sfx-hit again and writes the new sums here."""
    images_BHW, truths = crops(draw_conditions(1901, 3, preset), range(4))
    # the simulator's mathematics may differ by an ulp between machines: whole photons do not
    whole = np.rint(images_BHW * 16).astype(np.int64)
    digest = hashlib.sha256(whole.tobytes() + bytes(t.is_hit for t in truths)).hexdigest()
    assert digest == CROPS[preset]


@pytest.mark.parametrize("seed", range(4))
def test_line_by_line_finds_what_the_whole_list_gives(seed):
    rng = np.random.default_rng(seed)
    crystal, turn = draw_crystal(rng, (38, 110)), random_rotation(rng)
    how = dict(photon_energy_eV=11_000.0, distance_m=0.1, domain_A=crystal.domain_A,
               mosaicity_rad=np.deg2rad(crystal.mosaicity_deg), bandwidth=2e-3, scale=1000.0)
    d_min = 2.2
    whole = predict(reflections(crystal, d_min, limit=10 ** 7), turn, **how)
    few = excited(crystal, turn, k=11_000 / HC_EV_A, q_max=1 / d_min, bandwidth=2e-3)
    ours = predict(few, turn, **how)
    expected = {tuple(h): p for h, p in zip(whole.hkl_N3.astype(int), whole.photons_N, strict=True)}
    found = {tuple(h): p for h, p in zip(ours.hkl_N3.astype(int), ours.photons_N, strict=True)}
    assert found.keys() == expected.keys() and len(found) > 50
    np.testing.assert_allclose([found[h] for h in expected], list(expected.values()), rtol=1e-3,
                               atol=0.01)
    assert len(np.unique(few.hkl_N3, axis=0)) == len(few.hkl_N3)


def test_reflections_near_the_sphere_by_brute_force():
    rng = np.random.default_rng(9)
    for _ in range(5):
        orient = random_rotation(rng) @ np.diag(1 / rng.uniform(10, 40, 3))
        k, q_max, width = rng.uniform(0.5, 1.2), 0.35, rng.uniform(0.001, 0.02)
        grid = np.stack(np.meshgrid(*[np.arange(-16, 17)] * 3, indexing="ij"), -1).reshape(-1, 3)
        q = grid @ orient.T
        eps = np.linalg.norm(q + [0, 0, k], axis=1) - k
        keep = (np.abs(eps) <= width) & (np.linalg.norm(q, axis=1) <= q_max) & grid.any(axis=1)
        found = near_ewald(orient, k, q_max, width)
        assert {tuple(h) for h in found} == {tuple(h) for h in grid[keep]}


def test_a_still_is_the_same_whoever_simulates_it():
    one = simulate_quadrant(draw_still(5, 2, 3, "uniform_f1"))
    two = simulate_quadrant(draw_still(5, 2, 3, "uniform_f1"))
    np.testing.assert_array_equal(one.photons_SF, two.photons_SF)
    assert one.conditions == two.conditions
    other = simulate_quadrant(draw_still(5, 2, 4, "uniform_f1"))
    assert not np.array_equal(one.photons_SF, other.photons_SF)
    assert one.conditions.crystal == other.conditions.crystal       # of one run
    assert draw_still(6, 2, 3, "uniform_f1").crystal != one.conditions.crystal


def test_an_image_is_its_four_quadrants():
    c = draw_still(5, 7, 0, "resolution_f1")
    whole = simulate_image(c)
    assert whole.photons_SF.shape == (1024, 1024)
    for quadrant in QUADRANTS:
        window = Window(kind="quadrant", height=512, width=512, quadrant=quadrant,
                        normalize="sqrt_floor", clip=65025.0)
        part = simulate_quadrant(c, quadrant)
        np.testing.assert_array_equal(
            image_window(whole.photons_SF, window, whole.beam_center_px, whole.good_SF),
            image_window(part.photons_SF, window, part.beam_center_px, part.good_SF))
    geometry = assembled_geometry(whole.photons_SF.shape, c.pixel_size_m, whole.beam_center_px)
    constants = Constants(whole.good_SF[None], geometry, unit="photon")
    rendered = np.zeros((512, 512), np.float32)
    render(whole.photons_SF[None], plan_render(constants, window), rendered)
    np.testing.assert_array_equal(rendered, image_window(
        whole.photons_SF, window, whole.beam_center_px, whole.good_SF))


def test_presets_draw_the_laws_they_name():
    for name, preset in STILL_PRESETS.items():
        drawn = [draw_still(1, run, 0, name) for run in range(300)]
        assert {c.pool for c in drawn} == set(preset.pools)
        several = [c for c in drawn if c.n_lattices > 1]
        assert len(several) / len(drawn) == pytest.approx(preset.multiple, abs=0.1)
        angles = np.array([a for c in several for a in c.misset_deg])
        if preset.misset == "uniform":
            assert angles.min() >= 1 and angles.max() <= 180
            assert angles.mean() == pytest.approx(90, abs=40)
        else:
            assert (angles.min() < 0.1) == (name == "gaussian_all")
            assert angles.max() < 60
        assert all(0.06 <= c.distance_m <= 0.3 and 9 <= c.photon_energy_eV / 1e3 <= 13
                   and 1.4 <= c.d_A <= 6 for c in drawn)
    assert label_B_A2(2.0) == 28.0
    with pytest.raises(ConfigurationError, match="known: uniform, gaussian"):
        draw_still(1, 1, 1, "gauss")


def test_the_modern_reading_of_b():
    d = np.array([1.5, 2.0, 3.0, 6.0])
    modern = modern_d_A(d)
    np.testing.assert_allclose(15 * modern ** 2 - 33 * modern + 37, label_B_A2(d), rtol=1e-12)
    assert (modern < d).any()


def _clean(c, **more):
    """Without anything but the crystal."""
    return dataclasses.replace(
        c, background_photons=1e-6, ice=0.0, salt_spots=0, beam_stop_m=0.0, shadow=1.0, reach=1.0,
        gain_noise=0.0, read_noise_photons=0.0, hot_pixels=0, stray_fraction=0.0,
        dead_fraction=0.0, center_jitter_px=(0.0, 0.0), detector="rayonix_4x4", **more)


def _radial_share(still, inverse_d):
    """Share of the photons beyond a resolution."""
    c = still.conditions
    rows, columns = np.indices(still.photons_SF.shape) + 0.5
    x = (columns - still.beam_center_px[0]) * c.pixel_size_m
    y = (rows - still.beam_center_px[1]) * c.pixel_size_m
    beyond = c.inverse_d_A(np.hypot(x, y)) > inverse_d
    return still.photons_SF[beyond].sum() / still.photons_SF.sum()


def test_a_crystal_of_higher_resolution_diffracts_further():
    base = draw_still(3, 4, 0, "resolution_f1")
    shares = []
    for d in (1.6, 2.5, 4.0):
        c = _clean(base, d_A=d, spot_photons=2e4, distance_m=0.12, misset_deg=())
        shares.append(_radial_share(simulate_quadrant(c), 0.3))
    assert shares[0] > 1.3 * shares[1] > 1.3 * shares[2]


def test_the_same_crystal_at_150_and_300_mm_has_the_same_spots():
    """Positions scale with the distance, 1/d of a spot does not change."""
    base = draw_still(3, 11, 0, "resolution_f1")
    near, far = (simulate_quadrant(_clean(base, distance_m=z, spot_photons=5e4, d_A=3.0,
                                          misset_deg=())) for z in (0.15, 0.30))
    share = [_radial_share(still, 0.12) for still in (near, far)]
    limit = 1 / far.conditions.edge_d_A
    within = [1 - _radial_share(still, 0.9 * limit) for still in (near, far)]
    inner = [(1 - s) / w for s, w in zip(share, within, strict=True)]
    assert inner[0] == pytest.approx(inner[1], rel=0.1)


def test_several_lattices_share_the_photons_and_add_spots():
    base = _clean(draw_still(3, 4, 0, "uniform_f1"), d_A=2.0, spot_photons=2e4)
    one = simulate_quadrant(dataclasses.replace(base, misset_deg=()))
    three = simulate_quadrant(dataclasses.replace(base, misset_deg=(40.0, 90.0)))
    assert three.n_visible > 1.5 * one.n_visible
    assert three.conditions.n_lattices == 3


def test_background_and_faults_are_where_they_should_be():
    c = dataclasses.replace(_clean(draw_still(3, 4, 0, "uniform_f1")), background_photons=30.0,
                            background_shares=(1.0, 0.0, 0.0, 0.0), distance_m=0.1,
                            pixel_size_m=177.2e-6, photon_energy_eV=12_000.0, quadrant="D",
                            slope=(0.0, 0.0), spot_photons=1.0, d_A=6.0, beam_stop_m=2e-3)
    still = simulate_quadrant(c)
    rows, columns = np.indices(still.photons_SF.shape) + 0.5
    radius_m = np.hypot(rows, columns) * c.pixel_size_m
    q = c.inverse_d_A(radius_m)
    ring = still.photons_SF[(q > 0.30) & (q < 0.32)].mean()
    assert ring > 2 * still.photons_SF[(q > 0.10) & (q < 0.15)].mean()      # water at 3.2 A
    assert not still.good_SF[radius_m < 1.8e-3].any()
    assert (still.photons_SF[~still.good_SF] == 0).all()
    across = still.photons_SF[(q > 0.30) & (q < 0.32) & (rows > 4 * columns)].mean()
    along = still.photons_SF[(q > 0.30) & (q < 0.32) & (columns > 4 * rows)].mean()
    assert across > along                                                   # polarised along x
