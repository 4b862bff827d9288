"""Simulated runs on disk: the real psana2 and plain h5py read back what was simulated."""
import h5py
import numpy as np
import pytest

from xfel_classify.core import ConfigurationError
from xfel_classify.preprocess import calibrate
from xfel_classify.simulate.conditions import draw_conditions
from xfel_classify.simulate.hdf5_runs import write_hdf5_run
from xfel_classify.simulate.raw_runs import JungfrauRun
from xfel_classify.simulate.xtc2_runs import write_xtc2_run


@pytest.fixture(scope="module")
def run():
    return JungfrauRun(draw_conditions(95, 95, "demo", hit_fraction=0.5), 1, damaged=[2],
                       missing=[3])


@pytest.fixture(scope="module")
def raw(run):
    return {event.index: event for event in run.events(range(6))}


def test_calibrated_words_are_the_photons_again(run, raw):
    from xfel_classify import detectors
    from xfel_classify.detectors import make_constants

    mapping = run.constants()
    constants = make_constants(detectors.detector("jungfrau"), run.shape, mapping, run.geometry)
    for index, event in raw.items():
        if event.raw_PSF is None:
            continue
        photons, _ = run._run.event(index)
        keV = calibrate(event.raw_PSF, constants) / (event.truth.photon_energy_eV / 1000)
        good = constants.good_PSF & (photons < 300)
        difference = (keV - photons)[good]
        assert abs(np.median(difference)) < 0.05
        assert np.percentile(np.abs(difference), 99) < 0.3
        stages = event.raw_PSF >> 14
        assert set(np.unique(stages)) <= {0, 1, 3}
    assert any((event.raw_PSF >> 14).any() for event in raw.values() if event.raw_PSF is not None)


def test_hdf5(run, raw, tmp_path):
    seen = []
    files = write_hdf5_run(tmp_path, run, 6, exp="mfxtest", progress=seen.append)
    assert seen == [1, 2, 3, 4, 5, 6]
    with h5py.File(files.files[0]) as file:
        for index, event in raw.items():
            if event.raw_PSF is not None:
                np.testing.assert_array_equal(file["jungfrau/raw"][index], event.raw_PSF)
        assert (np.diff(file["timestamp"][:]) > 0).all()
    with h5py.File(files.truth) as truth:
        assert truth["missing"][:].tolist() == [n == 3 for n in range(6)]
        assert truth["damaged"][:].tolist() == [n == 2 for n in range(6)]
        assert truth["spots/offsets"][-1] == len(truth["spots/fs"])
        assert truth["is_hit"][:].tolist() == [raw[n].truth.is_hit for n in range(6)]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "constants.h5", "mfxtest-r0095-truth.h5", "mfxtest-r0095.h5"]


@pytest.mark.psana
def test_xtc2(run, raw, tmp_path):
    pytest.importorskip("psana")
    from xfel_classify import open_run
    from xfel_classify.core import EventStatus, Shard
    from xfel_classify.pipeline.schedule import World

    files = write_xtc2_run(tmp_path, run, 6, exp="mfxtest", steps=2)
    with open_run(95, exp="mfxtest", dir=str(tmp_path), constants=str(files.constants)) as source:
        assert source.expected_events() == 6
        world = World()
        seen = 0
        for frame in source.frames(Shard(lambda n: world.claim(n, 6))):
            event = raw[frame.index]
            assert frame.timestamp == event.timestamp
            assert frame.scalars["photon_energy_eV"] == event.truth.photon_energy_eV
            assert frame.scalars["pulse_energy_mJ"] == pytest.approx(event.truth.pulse_energy_mJ)
            if event.raw_PSF is None:
                assert frame.raw_PSF is None
            elif frame.index != 2:
                np.testing.assert_array_equal(frame.raw_PSF, event.raw_PSF)
            assert (frame.status == EventStatus.DAMAGED) == (frame.index == 2)
            seen += 1
        assert seen == 6


def test_wrong_numbers_of_segments_and_streams_are_named(run, tmp_path):
    with pytest.raises(ConfigurationError, match="3 segments"):
        JungfrauRun(run.conditions, 3)
    pytest.importorskip("psana")
    with pytest.raises(ConfigurationError, match="2 streams"):
        write_xtc2_run(tmp_path, run, 2, exp="mfxtest", streams=2)
