"""Simulated stills: reproducible, labelled as they look, and right against a peer's simulator."""
from pathlib import Path

import numpy as np
import pytest

from xfel_classify.core import ConfigurationError
from xfel_classify.simulate.bragg import HC_EV_A, predict
from xfel_classify.simulate.conditions import PAPER_RUNS, draw_conditions
from xfel_classify.simulate.crystal import Crystal, Reflections, intensities, reflections
from xfel_classify.simulate.sfx import LEAST_IN_WINDOW, crops

SHARED = Path(__file__).resolve().parents[2] / "../shared/data"


def test_an_event_is_the_same_whoever_simulates_it_and_when():
    conditions = draw_conditions(3, 1)
    together, truths = crops(conditions, range(6))
    alone, truth = crops(draw_conditions(3, 1), [4])
    np.testing.assert_array_equal(together[4], alone[0])
    assert truths[4].is_hit == truth[0].is_hit
    other, _ = crops(draw_conditions(3, 2), [4])
    assert not np.array_equal(other[0], alone[0])


@pytest.mark.parametrize("preset", ["training", "shifted"])
def test_hits_have_visible_spots_and_misses_have_at_most_a_stray_one(preset):
    hits = misses = 0
    for run in range(4):
        images, truths = crops(draw_conditions(11, run, preset), range(25))
        assert images.dtype == np.float32 and np.isfinite(images).all()
        for truth in truths:
            if truth.is_hit:
                hits += 1
                assert truth.n_visible_window >= LEAST_IN_WINDOW
            else:
                misses += 1
                assert truth.n_visible <= 1
    assert hits > 15 and misses > 15


def test_shifted_runs_lie_outside_of_the_training_condition():
    training = [draw_conditions(5, run) for run in range(40)]
    shifted = [draw_conditions(5, run, "shifted") for run in range(40)]
    assert np.median([c.ring_photons for c in shifted]) > 3 * np.median(
        [c.ring_photons for c in training])
    assert min(c.hit_fraction for c in shifted) >= max(c.hit_fraction for c in training)


def test_spots_are_where_the_image_is_bright():
    conditions = draw_conditions(3, 1, hit_fraction=1.0)
    images, truths = crops(conditions, range(5))
    above = []
    for image, truth in zip(images, truths, strict=True):
        strong = truth.photons_N > 60
        for ss, fs in zip(truth.ss_N[strong], truth.fs_N[strong], strict=True):
            s, f = int(round(ss)), int(round(fs))
            if 10 < s < 340 and 10 < f < 340:
                above.append(image[s - 1:s + 2, f - 1:f + 2].max()
                             > np.percentile(image[s - 10:s + 11, f - 10:f + 11], 95))
    assert len(above) > 20 and np.mean(above) > 0.97


def test_structure_factors_follow_wilson_statistics_and_symmetry():
    crystal = Crystal((70.0, 80.0, 90.0, 90, 90, 90), "mmm", "I", structure_seed=4)
    rng = np.random.default_rng(0)
    hkl = rng.integers(-20, 20, (20000, 3))
    value = intensities(hkl, crystal)
    allowed = hkl.sum(axis=1) % 2 == 0
    assert (value[~allowed] == 0).all()
    unique = np.unique(np.abs(hkl[allowed]), axis=0)
    wilson = intensities(unique, crystal)
    assert wilson.mean() == pytest.approx(1.0, abs=0.06)
    assert (wilson ** 2).mean() / wilson.mean() ** 2 == pytest.approx(2.0, abs=0.2)
    np.testing.assert_array_equal(value, intensities(-hkl, crystal))
    np.testing.assert_array_equal(value, intensities(hkl * [-1, 1, 1], crystal))


def test_the_reflection_list_agrees_with_gemmi():
    gemmi = pytest.importorskip("gemmi")
    for lattice, centring, laue, cell in (
            ("I 2 2 2", "I", "mmm", (94.8, 104.75, 48.73, 90, 90, 90)),
            ("C 1 2 1", "C", "2/m", (80, 60, 70, 90, 105, 90)),
            ("P 1", "P", "-1", (40, 50, 60, 80, 95, 105))):
        crystal = Crystal(cell, laue, centring, structure_seed=1)
        ours = reflections(crystal, 5.013)
        found = gemmi.make_miller_array(gemmi.UnitCell(*cell), gemmi.SpaceGroup(lattice), 5.013,
                                        unique=False)
        assert {tuple(h) for h in ours.hkl_N3.astype(int)} == {tuple(map(int, h)) for h in found}
        d = gemmi.UnitCell(*cell).calculate_d_array(ours.hkl_N3.astype(np.int32))
        np.testing.assert_allclose(1 / np.sqrt(ours.q2_N), d, rtol=2e-5)


def test_the_paper_table_of_runs_is_complete():
    assert [run.run for run in PAPER_RUNS] == [90, 91, 92, 93, 94, 95, 96, 98, 99, 100]
    assert sum(run.events for run in PAPER_RUNS) == 110_891
    assert [run.run for run in PAPER_RUNS if run.preset == "shifted"] == [98, 99, 100]


def test_unknown_presets_are_named():
    with pytest.raises(ConfigurationError, match="training"):
        draw_conditions(1, 1, "easy")


@pytest.mark.skipif(not (SHARED / "nanobragg").exists(),
                    reason="the peer's stills (shared/data/nanobragg) are not here")
def test_positions_and_intensities_agree_with_nanobragg():
    """Same orientation, cell and structure factors in; spots within a pixel of theirs."""
    import h5py

    distances, correlations = [], []
    with h5py.File(SHARED / "nanobragg" / "nanobragg_dev_1024.h5") as file:
        names = [str(name) for name in file["spots"].attrs["names"]]
        spots = file["spots"][:]
        geom_names = [str(name) for name in file["geom"].attrs["names"]]
        label_names = [str(name) for name in file["labels"].attrs["names"]]
        sample_names = [str(name) for name in file["sample"].attrs["names"]]
        for image in range(len(file["images"])):
            rows = spots[spots[:, 0] == image]
            if not len(rows):
                continue
            geom = dict(zip(geom_names, file["geom"][image], strict=True))
            sample = dict(zip(sample_names, file["sample"][image], strict=True))
            for lattice in np.unique(rows[:, 1]).astype(int):
                table = {name: rows[rows[:, 1] == lattice][:, i] for i, name in enumerate(names)}
                wanted_B = dict(zip(label_names, file["labels"][image], strict=True))["B_A2"]
                name = _text(file["crystal"][image])
                amplitude = np.load(SHARED / "nanobragg" / f"sf_{name}.npz")
                distance, correlation = _agreement(table, geom, sample, amplitude, wanted_B,
                                                   file["A"][image, lattice])
                distances.append(distance)
                if len(distance) > 30:
                    correlations.append(correlation)
    assert np.median(np.concatenate(distances)) < 0.3
    assert np.mean(np.concatenate(distances) < 1.0) > 0.95
    assert len(correlations) >= 16 and min(correlations) >= 0.9


def _text(value):
    return value.decode() if isinstance(value, bytes) else str(value)


def _agreement(table, geom, sample, amplitude, wanted_B, basis_33):
    """(distances of our spots from theirs in pixels, correlation of the expected photons)."""
    hkl = np.stack([table["h"], table["k"], table["l"]], axis=1).astype(int)
    squares = {(int(h), int(k), int(l_)): f ** 2 for h, k, l_, f in zip(
        amplitude["h"], amplitude["k"], amplitude["l"], amplitude["F"], strict=True)}
    q2 = ((hkl @ basis_33.T) ** 2).sum(axis=1)
    order = np.argsort(q2)
    intensity = np.array([squares.get(tuple(abs(h)), 0.0) for h in hkl[order]], np.float32)
    reflection = Reflections(hkl[order].astype(np.float32), q2[order].astype(np.float32),
                             intensity, basis_33)
    ours = predict(reflection, np.eye(3), photon_energy_eV=HC_EV_A / geom["wavelength_A"],
                   distance_m=geom["distance_mm"] * 1e-3,
                   domain_A=sample["block_A"], mosaicity_rad=np.deg2rad(sample["mosaic_deg"]),
                   bandwidth=max(sample["bandwidth_pct"] / 100, 1e-4), scale=1.0,
                   extra_B_A2=wanted_B - 12)
    pixel_m = geom["pixel_mm"] * 1e-3
    theirs = {tuple(row): i for i, row in enumerate(hkl)}
    index = np.array([theirs[tuple(row)] for row in ours.hkl_N3.astype(int)])
    distance = np.hypot(ours.x_m_N / pixel_m + geom["beam_x_px"] - table["x_pred"][index],
                        ours.y_m_N / pixel_m + geom["beam_y_px"] - table["y_pred"][index])
    assert np.abs(ours.excitation_N - table["excitation_error_invA"][index]).max() < 2e-5
    return distance, np.corrcoef(ours.photons_N, table["photons"][index])[0, 1]
