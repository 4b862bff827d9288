"""Stray spots, the nuisances of section 7.3 and changed conditions of simulated runs."""
import dataclasses

import h5py
import numpy as np
import pytest

from xfel_classify import cli
from xfel_classify.analyses.peakfinder8 import Parameters, PeakFinder8
from xfel_classify.core import ConfigurationError
from xfel_classify.detectors import default_geometry, detector
from xfel_classify.simulate.conditions import draw_conditions
from xfel_classify.simulate.raw_runs import JungfrauRun
from xfel_classify.simulate.sfx import LEAST_IN_WINDOW, SimulatedRun, crops
from xfel_classify.simulate.sfx_nuisances import shadow_on
from xfel_classify.simulate.stills_512 import ICE_D_A, SALT_D_A
from xfel_classify.simulate.stills_panels import on_tilted


def test_a_stray_run_is_the_plain_run_with_strays_on_top():
    plain = draw_conditions(3, 1)
    stray = draw_conditions(3, 1, "training_stray")
    assert stray == dataclasses.replace(
        plain, preset="training_stray", stray_spots=8, stray_chance=stray.stray_chance,
        stray_photons=stray.stray_photons)
    _, without = crops(plain, range(12))
    images_BHW, truths = crops(stray, range(12))
    alone_BHW, _ = crops(stray, [7])
    np.testing.assert_array_equal(alone_BHW[0], images_BHW[7])
    assert any(truth.n_stray for truth in truths)
    for one, other in zip(without, truths, strict=True):
        assert one.is_hit == other.is_hit and one.n_lattices == other.n_lattices
        # strays are listed as spots, and make no hit
        assert other.n_visible == one.n_visible + other.n_stray == len(other.fs_N)
        assert other.n_visible_window == one.n_visible_window


@pytest.mark.parametrize("preset", ["training_stray", "shifted_stray"])
def test_strays_are_on_hits_and_misses_few_and_far_apart(preset):
    counts = {True: [], False: []}
    photons = []
    for run in range(6):
        conditions = draw_conditions(12, run, preset, hit_fraction=0.4)
        _, truths = crops(conditions, range(20))
        for truth in truths:
            counts[truth.is_hit].append(truth.n_stray)
            if not truth.is_hit:
                assert truth.n_visible <= 8
                photons.extend(truth.photons_N)
                at = np.stack([truth.fs_N, truth.ss_N], axis=1)[len(at_chance(truth)):]
                apart = np.hypot(*(at[:, None] - at[None]).transpose(2, 0, 1))
                assert (apart[np.triu_indices(len(at), 1)] > 20).all()
            else:
                assert truth.n_visible_window >= LEAST_IN_WINDOW
    for is_hit in (True, False):
        assert max(counts[is_hit]) >= 5 and min(counts[is_hit]) == 0, counts
    assert max(photons) > 4000 and np.median(photons) < 1500


def at_chance(truth):
    """The chance spot of the plain preset, which comes first, where there is one."""
    return range(truth.n_visible - truth.n_stray)


def test_a_finder_sees_the_strays_of_a_miss_and_too_few_peaks_for_a_hit():
    found, planted = [], []
    for run in range(4):
        conditions = draw_conditions(13, run, "training_stray:streak_chance=0,ice_chance=0",
                                     hit_fraction=0.0)
        simulated = SimulatedRun(conditions)
        geometry = simulated.geometry
        radius_px = np.hypot(geometry.x_m_PSF, geometry.y_m_PSF) / conditions.pixel_size_m
        finder = PeakFinder8(radius_px.astype(np.float32), simulated.good_PSF, Parameters(
            adc_threshold=8.0, minimum_snr=5.0, min_pixel_count=2,
            max_pixel_count=60, local_bg_radius=6))
        for number in range(12):
            photons_PSF, truth = simulated.event(number)
            found.append(len(finder.find(photons_PSF)))
            planted.append(truth.n_visible)
    assert max(found) <= 10         # more make a hit by the paper's labels
    assert np.corrcoef(found, planted)[0, 1] > 0.9
    assert np.mean(found) > 0.6 * np.mean(planted)


def test_a_preset_takes_changed_numbers():
    plain = draw_conditions(3, 1)
    changed = draw_conditions(3, 1, "training:ice_chance=1,stray_spots=3")
    assert changed == dataclasses.replace(
        plain, preset=changed.preset, ice_chance=1.0, stray_spots=3)
    for wrong in ("training:colour=3", "training:ice_chance", "training:ice_chance=much",
                  "trainings"):
        with pytest.raises(ConfigurationError):
            draw_conditions(3, 1, wrong)


# --- the rest of section 7.3 ---------------------------------------------------------------------

def of(changes, number=2, seed=3, run=1, geometry=None, **more):
    """(photons_PSF, truth) of an event of the plain training run with some changes."""
    conditions = dataclasses.replace(draw_conditions(seed, run, "training", hit_fraction=1.0),
                                     **changes)
    return SimulatedRun(conditions, geometry, **more).event(number)


def test_full_presets_have_every_nuisance_somewhere():
    for base in ("training", "shifted"):
        plain = [draw_conditions(5, run, base) for run in range(200)]
        full = [draw_conditions(5, run, f"{base}_full") for run in range(200)]
        for one, other in zip(plain, full, strict=True):
            assert (one.crystal, one.ring_photons, one.distance_m) == (
                other.crystal, other.ring_photons, other.distance_m)
        for name in ("stray_chance", "lipid_photons", "plastic_photons", "smooth_photons",
                     "ice_spots", "salt_chance", "saturation_photons"):
            assert any(getattr(c, name) for c in full), name
            assert not any(getattr(c, name) for c in plain), name
        assert 15 < sum(c.shadow < 1 for c in full) < 50        # 15 %
        assert all(abs(angle) <= 3 for c in full for angle in c.tilt_deg)


def test_salt_and_ice_lie_on_their_rings():
    geometry = default_geometry(detector("jungfrau"), 8)
    photons_PSF, truth = of({"salt_chance": 1.0, "ice_spots": 150, "ice_chance": 1.0,
                             "ring_photons": 0.05, "air_photons": 0.05},
                            geometry=geometry, calm=True)
    conditions = draw_conditions(3, 1)
    radius = np.hypot(geometry.x_m_PSF, geometry.y_m_PSF)
    fallen = truth.n_visible - truth.n_stray
    assert truth.n_stray > 3
    for p, s, f, d in zip(truth.panel_N[fallen:], truth.ss_N[fallen:], truth.fs_N[fallen:],
                          truth.d_A_N[fallen:], strict=True):
        p, s, f = int(p), round(s), round(f)
        assert np.abs(np.array((*ICE_D_A, *SALT_D_A)) - d).min() < 1e-6
        # the beam of an event is a few pixels off
        assert 1 / conditions.inverse_d_A(radius[p, s, f]) == pytest.approx(d, rel=0.02)
    assert photons_PSF.max() > 10


def test_a_shadow_dims_background_and_hides_spots():
    plain, seen = of({"ring_photons": 20.0})
    dim, still_seen = of({"ring_photons": 20.0, "shadow": 0.0})
    assert still_seen.n_visible < seen.n_visible
    behind = dim.mean(axis=0) < 0.5
    # half a plane or a strip: no light at all there but for noise
    conditions = dataclasses.replace(draw_conditions(3, 1), shadow=0.0)
    transmission = shadow_on(conditions, SimulatedRun(conditions).geometry)
    assert set(np.unique(transmission)) == {0.0, 1.0}
    dark = (transmission == 0) & SimulatedRun(conditions).good_PSF
    assert behind.any() and dark.any() and abs(np.median(dim[dark])) < 0.5
    assert plain[dark].mean() > 2


def test_a_tilted_detector_has_spots_where_their_rays_meet_it():
    changes = {"center_jitter_px": 0.0}
    _, upright = of(changes)
    _, tilted = of({**changes, "tilt_deg": (3.0, -2.0)})
    c = draw_conditions(3, 1)
    geometry = SimulatedRun(c).geometry
    half = (geometry.shape[1] - 1) / 2

    def rays(truth):
        return ((truth.fs_N - half) * c.pixel_size_m, (half - truth.ss_N) * c.pixel_size_m)

    x, y = on_tilted((3.0, -2.0), c.distance_m, *rays(upright))
    u, v = rays(tilted)
    apart = np.hypot(x[:, None] - u, y[:, None] - v) / c.pixel_size_m
    assert np.mean(apart.min(axis=1) < 0.05) > 0.9      # a few went behind a gap
    moved = np.hypot(x - rays(upright)[0], y - rays(upright)[1]) / c.pixel_size_m
    assert 0.1 < moved.max() < 30


def test_backgrounds_and_saturation():
    dark = {"air_photons": 0.0, "ring_photons": 0.0, "streak_chance": 0.0, "ice_chance": 0.0,
            "spot_photons": (0.01, 0.02)}
    geometry = default_geometry(detector("jungfrau"), 8)
    radius = np.hypot(geometry.x_m_PSF, geometry.y_m_PSF)
    q = draw_conditions(3, 1).inverse_d_A(radius.astype(float))
    for name, d in (("lipid_photons", 4.5), ("plastic_photons", 5.2)):
        conditions = dataclasses.replace(draw_conditions(3, 1, hit_fraction=0.0), **{
            **dark, name: 10.0, "chance_spot": 0.0, "slope": (0.0, 0.0)})
        photons_PSF, _ = SimulatedRun(conditions, geometry, calm=True).event(0)
        edges = np.linspace(0.1, 0.4, 61)
        profile = [photons_PSF[(q >= low) & (q < high)].mean()
                   for low, high in zip(edges[:-1], edges[1:], strict=True)]
        assert 1 / edges[np.argmax(profile)] == pytest.approx(d, rel=0.1)
    photons_PSF, _ = of({"saturation_photons": 50.0, "spot_photons": (5e4, 6e4)})
    assert photons_PSF.max() == 50.0


def test_full_runs_can_be_written_as_raw_words():
    run = JungfrauRun(draw_conditions(5, 4, "training_full", hit_fraction=1.0), 1)
    event = next(run.events(range(1)))
    assert event.raw_PSF.any() and event.truth.n_visible == len(event.truth.fs_N)


def test_runs_of_the_study_from_the_command_line(tmp_path, capsys):
    asked = ("simulate", "sfx", "--segments", "1", "--events", "6", "--out")
    assert cli.main([*asked, str(tmp_path / "a"), "--preset", "paper", "--run", "99"]) == 0
    assert cli.main([*asked, str(tmp_path / "b"), "--preset", "shifted", "--run", "99",
                     "--hit-fraction", "0.8471"]) == 0
    assert cli.main([*asked, str(tmp_path / "c"), "--preset", "paper_full", "--run", "92"]) == 0
    paths = [tmp_path / name / "mfxsim-r0099.h5" for name in "ab"]
    with h5py.File(paths[0]) as one, h5py.File(paths[1]) as other:
        np.testing.assert_array_equal(one["jungfrau/raw"][:], other["jungfrau/raw"][:])
    capsys.readouterr()
    assert cli.main([*asked, str(tmp_path / "d"), "--preset", "paper", "--run", "97"]) != 0
    assert "90, 91, 92, 93, 94, 95, 96, 98, 99, 100" in capsys.readouterr().err
