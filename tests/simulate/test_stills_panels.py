"""Stills on the panels of real geometries: gaps where the geometry has them, tilt by exact rays."""
from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import h5py
import numpy as np
import pytest

from xfel_classify import cli
from xfel_classify.core import ConfigurationError, Window
from xfel_classify.detectors import read_geometry, uncalibrated_constants
from xfel_classify.preprocess import plan_render
from xfel_classify.simulate.stills_512 import simulate_image, simulate_quadrant
from xfel_classify.simulate.stills_conditions import STILL_PRESETS, draw_still
from xfel_classify.simulate.stills_panels import (
    LAYOUTS,
    layout_geometry,
    layout_pools,
    on_tilted,
    panel_map,
    seen_from,
)

REAL = Path(__file__).resolve().parents[2] / ".." / "shared" / "data" / "real" / "geom"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="no ../shared/data/real")
SIGNS = {"A": (-1, 1), "B": (1, 1), "C": (-1, -1), "D": (1, -1)}


def rendered_good(geometry, quadrant, side):
    """Where the networks' own window finds pixels, beam at (0, 0)."""
    constants = uncalibrated_constants(geometry.shape, geometry, None, unit="photon")
    window = Window(kind="quadrant", height=side, width=side, quadrant=quadrant,
                    normalize="sqrt_floor", clip=65025.0)
    return plan_render(constants, window).good_HW


@pytest.mark.parametrize("layout", LAYOUTS)
def test_panels_lie_where_the_window_of_inference_finds_them(layout):
    geometry = layout_geometry(layout)
    for quadrant in "AB":
        ours = panel_map(layout, SIGNS[quadrant], 512, (0.0, 0.0)) >= 0
        # the window of B is turned by a quarter, so that its rows are along x
        theirs = rendered_good(geometry, quadrant, 512)
        agree = (theirs == (ours if quadrant == "A" else ours.T)).mean()
        assert agree > 0.985, (layout, quadrant, agree)     # edges differ by rounding
        assert 0.3 < ours.mean() < 1.0


def test_shift_moves_the_panels():
    geometry = layout_geometry("jungfrau:8")
    p = geometry.pixel_size_m
    still = panel_map("jungfrau:8", (1, 1), 300, (0.0, 0.0))
    moved = panel_map("jungfrau:8", (1, 1), 300, (7 * p, -4 * p))
    assert (moved[:-4, 7:] == still[4:, :-7]).mean() > 0.99


def test_tilt_is_exact_and_undone():
    rng = np.random.default_rng(3)
    x, y = rng.uniform(-0.1, 0.1, (2, 200))
    u, v = on_tilted((2.0, -3.0), 0.09, x, y)
    back = seen_from((2.0, -3.0), 0.09, u, v)
    np.testing.assert_allclose(back, (x, y), atol=1e-15)
    np.testing.assert_allclose(on_tilted((0.0, 0.0), 0.09, x, y), (x, y), atol=1e-15)
    # turned about x by a: a ray in the y-z plane at angle t meets it at D sin t / cos(t - a)
    a, t = np.deg2rad(3.0), 0.4
    _, v = on_tilted((3.0, 0.0), 0.1, np.zeros(1), np.array([0.1 * np.tan(t)]))
    assert v[0] == pytest.approx(0.1 * np.sin(t) / np.cos(t - a), rel=1e-9) or \
        v[0] == pytest.approx(0.1 * np.sin(t) / np.cos(t + a), rel=1e-9)


def test_the_same_rings_lie_elsewhere_on_a_tilted_detector():
    """The background's mean along x leans to one side, by what the tilt of 3 degrees says."""
    c = dataclasses.replace(
        draw_still(5, 1, 0, "uniform_panels"), tilt_deg=(0.0, 3.0), slope=(0.0, 0.0), ice=0.0,
        background_photons=30.0, spot_photons=1e-9, panel_gain=0.0, common_mode_photons=0.0,
        shadow=1.0, salt_spots=0, streak_photons=0.0, hot_pixels=0, stray_fraction=0.0,
        photon_energy_eV=12_000.0, distance_m=0.1)
    upright = dataclasses.replace(c, tilt_deg=(0.0, 0.0))
    leaning, straight = (simulate_image(one) for one in (c, upright))
    difference = leaning.photons_SF - straight.photons_SF
    side = difference.shape[1] // 2
    good = leaning.good_SF & straight.good_SF
    left, right = (difference[:, part][good[:, part]].mean()
                   for part in (slice(None, side), slice(side, None)))
    assert abs(left - right) > 0.02 * straight.photons_SF[good].mean()


@pytest.mark.parametrize("preset", ["uniform_panels", "gaussian_panels", "resolution_panels"])
def test_presets_with_panels(preset):
    one = draw_still(3, 4, 5, preset)
    assert one == draw_still(3, 4, 5, preset)
    other = draw_still(3, 4, 6, preset)
    assert (one.layout, one.tilt_deg, one.layout_shift_m, one.crystal) == (
        other.layout, other.tilt_deg, other.layout_shift_m, other.crystal)
    runs = [draw_still(3, run, 0, preset) for run in range(30)]
    assert len({c.layout for c in runs}) == len(LAYOUTS)
    assert all(abs(t) <= 3 for c in runs for t in c.tilt_deg)
    assert {c.pool for c in runs} == {1, 2}
    assert all(c.pool in layout_pools(c.layout) for c in runs)
    still = simulate_quadrant(next(c for c in runs if c.pool == 1))
    assert still.photons_SF.max() <= still.conditions.saturation_photons
    assert not still.photons_SF[~still.good_SF].any() and still.n_visible >= 6


def test_presets_from_before_have_no_panels_and_their_old_pixels():
    assert list(STILL_PRESETS)[:10] == [
        "uniform", "gaussian", "gaussian_all", "resolution", "uniform_f1", "gaussian_f1",
        "resolution_f1", "uniform_f12", "gaussian_f12", "resolution_f12"]
    conditions = [draw_still(5, run, 1, preset) for run, preset in enumerate(STILL_PRESETS)
                  if not STILL_PRESETS[preset].panels]
    assert not any(c.layout or c.streak_photons or any(c.tilt_deg) for c in conditions)
    # models are trained on these: drawn conditions, then whole photons of a quadrant
    drawn = hashlib.sha256(repr([(
        c.detector, c.pool, c.quadrant, round(c.d_A, 9), c.n_lattices, round(c.distance_m, 9),
        tuple(round(v, 6) for v in c.crystal.cell)) for c in conditions]).encode()).hexdigest()
    assert drawn == DRAWN
    still = simulate_quadrant(draw_still(5, 2, 1, "uniform_f1"))
    whole = np.rint(still.photons_SF * 16).astype(np.int64)
    assert hashlib.sha256(whole.tobytes() + still.good_SF.tobytes()).hexdigest() == PIXELS


DRAWN = "db7b0440b5407f74edbe6c08b12324a9bbdcb985235132245751d741345146bf"
PIXELS = "e5d03ab77ac6013c57bd07868f94952dc4459994a5e1a311496fe2e506b05629"


# --- geometry files ----------------------------------------------------------------------------

@needs_real
@pytest.mark.parametrize("name", [
    "crystfel/epix10k2M.geom", "crystfel/jungfrau4M_20220207-cxilz0720.geom",
    "crystfel/agipd_p700000_r0030.geom", "psana/geometry-def-epix10ka2m.data"])
def test_stills_on_geometries_of_experiments(name):
    layout = str(REAL / name)
    c = draw_still(4, 1, 0, "uniform_panels", layout)
    assert c.layout == layout and c.pixel_size_m == layout_geometry(layout).pixel_size_m
    c = dataclasses.replace(c, pool=1)
    still = simulate_quadrant(c)
    assert 0.3 < still.good_SF.mean() < 0.99


def small_geometry(directory):
    path = directory / "small.geom"
    path.write_text("clen = 0.1\nres = 10000\nphoton_energy = 9000\np0/min_fs = 0\np0/max_fs = 99\n"
                    "p0/min_ss = 0\np0/max_ss = 99\np0/fs = +1.0x\np0/ss = +1.0y\n"
                    "p0/corner_x = -50\np0/corner_y = -50\n")
    return path


def test_a_detector_too_small_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="larger detector"):
        draw_still(1, 1, 1, "uniform_panels", str(small_geometry(tmp_path)))


def test_a_set_on_a_geometry_file(tmp_path, capsys):
    from importlib import resources

    from xfel_classify import detectors

    shipped = Path(str(resources.files(detectors) / "geometry" / "jungfrau-2.data"))
    geometry = tmp_path / "mine.data"
    geometry.write_text(shipped.read_text())
    assert cli.main(["simulate", "stills", "--out", str(tmp_path), "--events", "1", "--preset",
                     "uniform_panels", "--geometry", str(geometry), "--seed", "3"]) == 0
    path = Path(capsys.readouterr().out.strip().splitlines()[-1])
    assert path.name == "stills_uniform_panels_mine_s3.h5"
    with h5py.File(path) as file:
        assert file.attrs["layout"] == "mine.data" and file["images"].shape == (1, 512, 512)
    assert cli.main(["simulate", "stills", "--out", str(tmp_path), "--events", "1", "--geometry",
                     str(tmp_path / "no.geom"), "--seed", "4"]) == 1
    assert "check the path" in capsys.readouterr().err


@needs_real
def test_a_run_on_a_geometry_file(tmp_path, capsys):
    geometry = REAL / "crystfel" / "jungfrau4M_20220207-cxilz0720.geom"
    words = ["simulate", "sfx", "--out", str(tmp_path), "--events", "1", "--geometry"]
    assert cli.main([*words, str(geometry)]) == 0
    run = tmp_path / "mfxsim-r0095.h5"
    with h5py.File(run) as file, h5py.File(tmp_path / "constants.h5") as constants:
        assert file["jungfrau/raw"].shape == (1, 8, 512, 1024)
        text = constants["jungfrau/geometry"][()].decode()
    assert read_geometry(text, (8, 512, 1024), "jungfrau").x_m_PSF.max() == pytest.approx(
        read_geometry(geometry, (8, 512, 1024), "jungfrau").x_m_PSF.max())
    assert cli.main([*words, str(REAL / "crystfel" / "epix10k2M.geom")]) == 1
    assert "was to be of a Jungfrau" in capsys.readouterr().err
    assert cli.main([*words, str(REAL / "crystfel" / "epix10k2M.geom"), "--detector",
                     "epix10ka"]) == 0
    with h5py.File(run) as file:
        assert file["epix10ka/raw"].shape == (1, 16, 352, 384)
