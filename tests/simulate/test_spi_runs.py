"""Raw runs of single particles: sources read back what was simulated, in every format."""
import h5py
import numpy as np
import pytest
from conformance.source_conformance import whole

from xfel_classify import detectors
from xfel_classify.core import ConfigurationError
from xfel_classify.preprocess import calibrate
from xfel_classify.simulate.hdf5_runs import write_cxi_run, write_hdf5_run
from xfel_classify.simulate.raw_runs import JungfrauRun
from xfel_classify.simulate.spi_images import simulate_spi
from xfel_classify.simulate.spi_runs import PnccdRun, spi_run
from xfel_classify.simulate.xtc2_runs import write_xtc2_run
from xfel_classify.sources import hdf5

PRESET = "paper:particles=2cex,counts=1+1,fluence=300..300,gap_px=16,dead_fraction=1e-3"
EVENTS = 3


@pytest.fixture(scope="module")
def run():
    return spi_run(7, 3, PRESET, hit_fraction=0.7)


@pytest.fixture(scope="module")
def raw(run):
    return {event.index: event for event in run.events(range(EVENTS))}


def test_it_is_a_pnccd_with_the_gap_of_the_run(run):
    assert isinstance(run, PnccdRun) and run.shape == (4, 512, 512)
    y, x = run.geometry.y_m_PSF / 75e-6, run.geometry.x_m_PSF / 75e-6
    assert np.abs(y).min() == pytest.approx(8.5, abs=0.1)       # half the gap and half a pixel
    assert np.abs(y).max() == pytest.approx(519.5, abs=0.2)
    assert np.abs(x).max() == pytest.approx(511.5, abs=0.2)
    assert run.geometry.distance_m == pytest.approx(0.2905)


def test_calibrated_words_are_the_photons_again(run, raw):
    constants = detectors.make_constants(detectors.detector("pnccd"), run.shape, run.constants(),
                                         run.geometry)
    kinds = {event.truth.is_hit for event in raw.values()}
    assert kinds == {True, False}
    for index, event in raw.items():
        photons, truth = run.frames.event(index)
        counted = calibrate(event.raw_PSF, constants) / 4.6
        off = (counted - photons)[constants.good_PSF & (photons < 500)]
        assert abs(off.mean()) < 0.05 and off.std() < 1.5       # 1.3 ADU per photon, noise 0.6
        if truth.is_hit:
            assert photons.sum() == pytest.approx(truth.labels["photons"], rel=0.15)
        else:
            assert not photons.any()


def test_blocks_of_a_frame_are_the_image_of_the_set(run, raw):
    """Detector pixels averaged over 8 x 8 blocks against what a network is trained with."""
    number = next(index for index, event in raw.items() if event.truth.is_hit)
    photons, truth = run.frames.event(number)
    image = simulate_spi(truth.conditions)
    column = np.floor(run.geometry.x_m_PSF / 600e-6 + 64).astype(int)
    row = np.floor(64 - run.geometry.y_m_PSF / 600e-6).astype(int)
    inside = (row >= 0) & (row < 128) & (column >= 0) & (column < 128)
    flat = row[inside] * 128 + column[inside]
    total = np.bincount(flat, photons[inside], minlength=128 * 128)
    mean = (total / np.maximum(np.bincount(flat, minlength=128 * 128), 1)).reshape(128, 128)
    both = (image > 0) & (mean > 0)
    assert np.corrcoef(image[both], mean[both])[0, 1] > 0.99


def test_events_do_not_depend_on_their_order(run, raw):
    again = next(iter(spi_run(7, 3, PRESET, hit_fraction=0.7).events(range(2, 3))))
    np.testing.assert_array_equal(again.raw_PSF, raw[2].raw_PSF)


@pytest.mark.parametrize("write, form", [(write_hdf5_run, "h5"), (write_cxi_run, "cxi")])
def test_files_are_read_back_by_the_source(run, raw, tmp_path, write, form):
    files = write(tmp_path, run, EVENTS, exp="amosim")
    assert [path.name for path in files.files] == [f"amosim-r0003.{form}"]
    options = hdf5.Source.Config(files=[str(files.files[0])], constants=str(files.constants),
                                 detector="pnccd")
    with hdf5.Source(options) as source:
        assert (source.run.exp, source.run.run) == ("amosim", 3)
        assert source.constants().geometry.distance_m == pytest.approx(0.2905)
        frames = {}
        for frame in source.frames(whole(source)):
            frames[frame.index] = np.array(frame.raw_PSF)
            assert frame.scalars["photon_energy_eV"] == pytest.approx(4600.0)
            assert frame.scalars["distance_m"] == pytest.approx(0.2905)
    assert sorted(frames) == list(range(EVENTS))
    for index, pixels in frames.items():
        np.testing.assert_array_equal(pixels, raw[index].raw_PSF)
    with h5py.File(files.truth) as truth:
        hits = [raw[n].truth.is_hit for n in range(EVENTS)]
        assert truth["is_hit"][:].tolist() == hits
        assert ((truth["count"][:] > 0) == hits).all()
        assert truth["name"].asstr()[hits.index(True)] == "2cex"
        turn = truth["copies/rotation"][hits.index(True), 0]
        np.testing.assert_allclose(turn @ turn.T, np.eye(3), atol=1e-9)
        assert np.isnan(truth["copies/rotation"][hits.index(False)]).all()


def test_a_jungfrau_of_two_modules_takes_the_same_events(tmp_path):
    run = spi_run(7, 3, PRESET, "jungfrau", hit_fraction=1.0)
    assert isinstance(run, JungfrauRun) and run.shape == (2, 512, 1024)
    event = next(iter(run.events(range(1))))
    constants = detectors.make_constants(detectors.detector("jungfrau"), run.shape,
                                         run.constants(), run.geometry)
    photons, _ = run._run.event(0)
    counted = calibrate(event.raw_PSF, constants) / 4.6
    off = (counted - photons)[constants.good_PSF & (photons < 100)]
    assert abs(np.median(off)) < 0.05 and photons.sum() > 1e5


@pytest.mark.psana
def test_psana_reads_the_xtc2_run(tmp_path):
    pytest.importorskip("psana")
    from xfel_classify import open_run

    run = spi_run(7, 3, PRESET, "jungfrau", hit_fraction=1.0)
    files = write_xtc2_run(tmp_path, run, 2, exp="amosim")
    expected = [event.raw_PSF for event in run.events(range(2))]
    with open_run(3, exp="amosim", dir=str(tmp_path), constants=str(files.constants)) as source:
        frames = [np.array(frame.raw_PSF) for frame in source.frames(whole(source))]
    np.testing.assert_array_equal(frames, expected)


def test_xtc2_has_no_pnccd(run, tmp_path):
    pytest.importorskip("psana")
    with pytest.raises(ConfigurationError, match="pnccd"):
        write_xtc2_run(tmp_path, run, 1, exp="amosim")


def test_the_command_writes_a_run(tmp_path):
    from xfel_classify.cli import main

    words = ["simulate", "spi", "--format", "cxi", "--out", str(tmp_path), "--preset", PRESET,
             "--events", "1", "--exp", "amosim"]
    assert main(words) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "amosim-r0095-truth.h5", "amosim-r0095.cxi", "constants.h5"]
    assert main([*words, "--hit-fraction", "7"]) != 0
