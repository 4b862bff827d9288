"""Runs with torch: truth and expected photons of the host route, other noise of one law; sets."""
import dataclasses

import h5py
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from xfel_classify import cli  # noqa: E402
from xfel_classify.core import ConfigurationError, OutputExists  # noqa: E402
from xfel_classify.detectors import default_geometry, detector  # noqa: E402
from xfel_classify.learn.crop_sets import write_crop_set  # noqa: E402
from xfel_classify.learn.datasets import simulate as simulate_run  # noqa: E402
from xfel_classify.learn.recipes import RunKey  # noqa: E402
from xfel_classify.simulate.conditions import draw_conditions  # noqa: E402
from xfel_classify.simulate.sfx import SimulatedRun  # noqa: E402
from xfel_classify.simulate.sfx_torch import RunOnDevice  # noqa: E402

CPU = "cpu-torch"


def reference(run, number):
    """(expected photons, truth) by numpy."""
    scene = run.scene(number)
    expected = scene.expected_PSF
    placed = run._paint(expected, scene.spots, scene)
    more = run._paint(expected, scene.more, scene)
    if run.shadow_PSF is not None:
        expected *= run.shadow_PSF
    return expected, run.truth(scene, placed, more)


def same_truth(one, other):
    for name in one.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize("preset", ["training", "shifted_full", "training_stray"])
@pytest.mark.parametrize("on", [None, ("jungfrau", 2), ("epix10ka", 4)])
def test_expected_photons_and_truth_are_those_of_numpy(preset, on):
    conditions = draw_conditions(41, 2, preset, hit_fraction=0.6)
    conditions = dataclasses.replace(conditions, ice_chance=0.5, streak_chance=0.5)
    geometry = None if on is None else default_geometry(detector(on[0]), on[1])
    run = SimulatedRun(conditions, geometry, calm=on is not None)
    expected_BPSF, truths = RunOnDevice(run, CPU).expected(range(4))
    assert any(truth.is_hit for truth in truths)
    for number, expected, truth in zip(range(4), expected_BPSF, truths, strict=True):
        wanted, true = reference(run, number)
        np.testing.assert_allclose(expected.numpy(), wanted, rtol=2e-6, atol=3e-6)
        same_truth(truth, true)
        same_truth(truth, run.event(number)[1])


def test_noise_follows_the_same_law():
    conditions = dataclasses.replace(
        draw_conditions(42, 1, hit_fraction=0.0), ring_photons=4.0, air_photons=2.0,
        read_noise_photons=0.2, common_mode_photons=0.0, hot_fraction=1e-4, salt_fraction=1e-4,
        gain_spread=0.04, streak_chance=0.0, ice_chance=0.0, pulse_spread=0.0)
    run = SimulatedRun(conditions)
    device = RunOnDevice(run, CPU)
    ours = [photons for photons, _ in device.events(range(12))]
    numpy_s = [run.event(number)[0] for number in range(12)]
    good = run.good_PSF
    assert all(not photons[~good].any() for photons in ours)
    for take in (np.median, lambda v: np.percentile(v, 90), lambda v: np.percentile(v, 10)):
        a, b = (np.mean([take(photons[good]) for photons in some]) for some in (ours, numpy_s))
        assert a == pytest.approx(b, rel=0.03, abs=0.02)
    # hot pixels are the run's, stray ones the event's
    assert all(photons.reshape(-1)[run.hot].min() > 0 for photons in ours)
    bright = [np.sum(photons > 60) for photons in ours]
    assert np.mean(bright) == pytest.approx(np.mean([np.sum(p > 60) for p in numpy_s]), rel=0.4)
    np.testing.assert_array_equal(device.event(5)[0], ours[5])


def test_common_mode_and_gains_are_the_runs():
    conditions = dataclasses.replace(
        draw_conditions(42, 1, hit_fraction=0.0), ring_photons=2e4, streak_chance=0.0,
        ice_chance=0.0, gain_noise=0.03, chance_spot=0.0)
    run = SimulatedRun(conditions)
    expected, _ = RunOnDevice(run, CPU).expected([0])
    photons, _ = RunOnDevice(run, CPU).event(0)
    bright = run.good_PSF & (expected[0].numpy() > 500)
    ratio = photons[bright] / expected[0].numpy()[bright]
    assert np.corrcoef(ratio, run.gain_PSF[bright])[0, 1] > 0.7
    shaken = dataclasses.replace(conditions, ring_photons=0.1, air_photons=0.1,
                                 common_mode_photons=3.0)
    run = SimulatedRun(shaken)
    offsets = [np.median(p[run.good_PSF]) for p, _ in RunOnDevice(run, CPU).events(range(30))]
    assert 2.0 < np.std(offsets) < 4.2


def test_a_crop_set_holds_what_recipes_see(tmp_path):
    path = write_crop_set(tmp_path / "set.h5", lambda run: draw_conditions(43, run), 7,
                          events_per_run=4)
    with h5py.File(path) as file:
        for run, rows in ((0, slice(0, 4)), (1, slice(4, 7))):
            images, labels = simulate_run(RunKey("sfx", "training", 43, run, 4),
                                          range(rows.stop - rows.start))
            np.testing.assert_array_equal(file["images"][rows].astype(np.float16), images)
            np.testing.assert_array_equal(file["labels"][rows, 0], labels)
            assert not file["images"][rows][:, ~file["good"][run]].any()
        assert list(file["labels"].attrs["names"])[0] == "hit"
        assert file["meta/run"][:].tolist() == [0, 0, 0, 0, 1, 1, 1]
        c = draw_conditions(43, 1)
        np.testing.assert_allclose(file["geom"][5, :2], (1e3 * c.distance_m, 1e3 * c.pixel_size_m))
    with pytest.raises(OutputExists):
        write_crop_set(path, lambda run: draw_conditions(43, run), 7)
    with pytest.raises(ConfigurationError, match="at least one"):
        write_crop_set(tmp_path / "none.h5", lambda run: draw_conditions(43, run), 0)


def test_crop_sets_from_the_command_line(tmp_path):
    def made(name, *more):
        out = tmp_path / name
        assert cli.main(["simulate", "sfx", "--format", "set", "--events", "31", "--seed", "44",
                         "--preset", "training_stray:stray_spots=4", "--hit-fraction", "0.4",
                         "--out", str(out), *more]) == 0
        return next(out.glob("*.h5"))

    paths = [made("one"), made("two", "--processes", "2"), made("torch", "--device", CPU)]
    with h5py.File(paths[0]) as one, h5py.File(paths[1]) as two, h5py.File(paths[2]) as third:
        assert one["images"].shape == (31, 350, 350) and len(one["good"]) == 2
        assert 0 < one["labels"][:, 0].mean() < 1
        np.testing.assert_array_equal(one["images"][:], two["images"][:])
        for name in ("labels", "geom", "good", "meta/event"):
            np.testing.assert_array_equal(one[name][:], two[name][:])
            np.testing.assert_array_equal(one[name][:], third[name][:])
        assert third.attrs["device"] == CPU
        a, b = (file["images"][:].clip(-5, 50).mean() for file in (one, third))
        # the common mode of 31 events, up to 0.05 photons each
        assert a == pytest.approx(b, abs=5 * 0.05 * np.sqrt(2 / 31))


def test_raw_runs_by_torch(tmp_path):
    for name, more in (("host", ()), ("torch", ("--device", CPU))):
        assert cli.main(["simulate", "sfx", "--segments", "1", "--events", "3", "--seed", "45",
                         "--hit-fraction", "0.7", "--out", str(tmp_path / name), *more]) == 0
    with h5py.File(tmp_path / "host/mfxsim-r0095-truth.h5") as one, \
            h5py.File(tmp_path / "torch/mfxsim-r0095-truth.h5") as other:
        for name in ("is_hit", "n_visible", "spots/fs", "spots/photons"):
            np.testing.assert_array_equal(one[name][:], other[name][:])
    with h5py.File(tmp_path / "host/mfxsim-r0095.h5") as one, \
            h5py.File(tmp_path / "torch/mfxsim-r0095.h5") as other:
        a, b = (file["jungfrau/raw"][:].astype(float) for file in (one, other))
        assert not np.array_equal(a, b) and np.median(a) == pytest.approx(np.median(b), abs=10)
