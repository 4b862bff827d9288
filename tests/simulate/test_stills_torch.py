"""Stills with torch: the expected images and labels of the numpy route, other noise of one law."""
import dataclasses

import h5py
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from xfel_classify.core import ConfigurationError  # noqa: E402
from xfel_classify.learn.labelled_sets import write_labelled_set  # noqa: E402
from xfel_classify.simulate.stills_512 import (  # noqa: E402
    draw_still,
    expected_quadrant,
    simulate_quadrant,
)
from xfel_classify.simulate.stills_torch import (  # noqa: E402
    expected_quadrants,
    simulate_quadrants,
)
from xfel_classify.simulate.torch_device import torch_on  # noqa: E402

CPU = "cpu-torch"


def same(found, wanted):
    """Expected images to float32 rounding; pixels and visible spots exactly."""
    (expected, good, seen), (reference, good_reference, seen_reference) = found, wanted
    np.testing.assert_allclose(expected, reference, rtol=2e-6, atol=3e-6)
    np.testing.assert_array_equal(good, good_reference)
    assert seen == seen_reference


@pytest.mark.parametrize("preset", ["uniform_f1", "gaussian_f12", "uniform_panels"])
def test_expected_images_and_labels_are_those_of_numpy(preset):
    drawn = [draw_still(31, run, event, preset) for run in range(2) for event in range(2)]
    for found, c in zip(expected_quadrants(drawn, CPU, batch=3), drawn, strict=True):
        same(found, expected_quadrant(c))


def test_every_nuisance_is_that_of_numpy():
    c = next(c for c in (draw_still(32, run, 0, "uniform_panels") for run in range(40))
             if c.pool == 1)
    c = dataclasses.replace(c, ice=2.0, ice_spots=150, salt_spots=8, streak_photons=40.0,
                            shadow=0.0, misset_deg=(4.0, 20.0), bandwidth=3e-3)
    plain = dataclasses.replace(draw_still(32, 0, 0, "uniform_f1"), reach=0.8, shadow=0.3,
                                beam_stop_m=4e-3, quadrant="C")
    for found, one in zip(expected_quadrants([c, plain], CPU), [c, plain], strict=True):
        same(found, expected_quadrant(one))


@pytest.mark.parametrize("seed", range(2))
def test_any_lattice_and_centring_has_the_same_reflections(seed):
    from xfel_classify.simulate.bragg import predict
    from xfel_classify.simulate.bragg_torch import Shot, predict_all
    from xfel_classify.simulate.crystal import LATTICES, Crystal, random_rotation
    from xfel_classify.simulate.ewald import excited

    rng = np.random.default_rng(seed)
    cells = {"triclinic": (50, 60, 70, 80, 95, 100), "monoclinic": (50, 60, 70, 90, 105, 90),
             "orthorhombic": (50, 60, 70, 90, 90, 90), "tetragonal": (60, 60, 80, 90, 90, 90),
             "trigonal": (60, 60, 90, 90, 90, 120), "hexagonal": (60, 60, 90, 90, 90, 120),
             "cubic": (80, 80, 80, 90, 90, 90)}
    shots, wanted = [], []
    for name, (groups, centrings, _) in LATTICES.items():
        for laue, centring in {(group, one) for group in groups for one in (*centrings, "A")}:
            crystal = Crystal(cells[name], laue, centring, int(rng.integers(2**31)))
            turn, sector = random_rotation(rng), tuple(rng.choice([-1, 1], 2).tolist())
            k, q_max = 0.9, 0.4
            shots.append(Shot(crystal, turn, k, 0.1, 2e-3, q_max, 500.0, 20.0, sector))
            table = excited(crystal, turn, k=k, q_max=q_max, bandwidth=2e-3, sector=sector)
            wanted.append(predict(table, turn, photon_energy_eV=k * 12398.419843, distance_m=0.1,
                                  domain_A=crystal.domain_A,
                                  mosaicity_rad=np.deg2rad(crystal.mosaicity_deg), bandwidth=2e-3,
                                  scale=500.0, extra_B_A2=20.0))
    found = predict_all(torch, torch.device("cpu"), shots, 0.01)
    assert len(found.x_m_N) > 1000
    for number, spots in enumerate(wanted):
        spots = spots.take(spots.photons_N > 0.01)
        own = found.take(found.shot_N == number)
        order, other = np.argsort(spots.photons_N), np.argsort(own.photons_N.numpy())
        for name in ("x_m_N", "y_m_N", "photons_N", "radial_m_N", "tangential_m_N"):
            np.testing.assert_allclose(getattr(own, name).numpy()[other],
                                       getattr(spots, name)[order], rtol=1e-5, atol=1e-12)


def test_noise_follows_the_same_law():
    c = draw_still(33, 1, 0, "resolution_panels")
    c = dataclasses.replace(c, read_noise_photons=0.3, gain_noise=0.02, hot_pixels=3,
                            stray_fraction=3e-5, saturation_photons=20_000.0)
    expected, good, _ = expected_quadrant(c)
    turned = expected[::-1 if simulate_quadrant(c).beam_center_px[1] else 1,
                      ::-1 if simulate_quadrant(c).beam_center_px[0] else 1]
    one, = simulate_quadrants([c], CPU)
    other = simulate_quadrant(c)
    np.testing.assert_array_equal(one.good_SF, other.good_SF)
    assert one.beam_center_px == other.beam_center_px and one.n_visible == other.n_visible
    assert not one.photons_SF[~one.good_SF].any()
    assert not np.array_equal(one.photons_SF, other.photons_SF)
    edges = np.quantile(turned[one.good_SF], np.linspace(0, 1, 6))
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        where = one.good_SF & (turned >= low) & (turned <= high)
        a, b = ((still.photons_SF - turned)[where] for still in (one, other))
        spread = np.std(b[np.abs(b) < 6 * np.std(b)])
        a, b = (np.clip(v, -5 * spread, 5 * spread) for v in (a, b))
        assert abs(a.mean() - b.mean()) < 5 * spread / np.sqrt(len(a) / 2)
        assert a.std() == pytest.approx(b.std(), rel=0.02)


def test_one_seed_is_one_set_whatever_the_batch():
    drawn = [draw_still(34, run, event, "uniform_f1") for run in range(2) for event in range(2)]
    together = list(simulate_quadrants(drawn, CPU, batch=4))
    again, = simulate_quadrants(drawn[2:3], CPU)
    np.testing.assert_array_equal(together[2].photons_SF, again.photons_SF)
    assert not np.array_equal(together[0].photons_SF, together[1].photons_SF)


def test_pixels_of_a_run_keep_their_gain():
    c = dataclasses.replace(draw_still(36, 1, 0, "uniform_f1"), gain_noise=0.03, background_photons=
                            1e5, read_noise_photons=0.0, ice=0.0, spot_photons=1.0)
    pair = [dataclasses.replace(c, event=event, quadrant="B") for event in (0, 1)]
    expected = np.stack([expected_quadrant(c)[0][::-1] for c in pair])
    stills = list(simulate_quadrants(pair, CPU))
    bright = stills[0].good_SF & (expected > 1e4).all(axis=0)
    ratio = [still.photons_SF[bright] / mean[bright] for still, mean in zip(
        stills, expected, strict=True)]
    assert bright.sum() > 10_000 and np.corrcoef(*ratio)[0, 1] > 0.8


def test_a_set_by_torch_has_the_labels_of_one_by_numpy(tmp_path):
    paths = [write_labelled_set(tmp_path / f"{device or 'host'}.h5", "gaussian_f1", 35, 3, side=256,
                                device=device) for device in ("", CPU)]
    with h5py.File(paths[0]) as host, h5py.File(paths[1]) as device:
        assert host.attrs["device"] == "" and device.attrs["device"] == CPU
        for name in ("labels", "geom", "cell", "quadrant"):
            np.testing.assert_array_equal(host[name][:], device[name][:])
        a, b = (file["images"][:].astype(float) for file in (host, device))
        for one, other in zip(a, b, strict=True):
            assert abs(one.mean() - other.mean()) < 0.02 * one.mean() + 0.02
            one, other = (np.minimum(image, 30).reshape(32, 8, 32, 8).mean((1, 3)).ravel()
                          for image in (one, other))       # less of noise and hot pixels
            assert np.corrcoef(one, other)[0, 1] > 0.8


def test_devices_that_are_not_there_are_named(monkeypatch):
    for wrong in ("gpu", "cuda:x", "mps", ""):
        with pytest.raises(ConfigurationError, match="cuda, cuda:N and cpu-torch"):
            torch_on(wrong)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigurationError, match="leave the device out"):
        list(simulate_quadrants([draw_still(1, 0, 0, "uniform_f1")], "cuda"))
    assert torch_on("cpu")[1].type == "cpu"
