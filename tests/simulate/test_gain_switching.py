"""Raw runs of detectors with gain stages: what was simulated comes back from every kind of file."""
import dataclasses
import subprocess
import sys

import h5py
import numpy as np
import pytest

from xfel_classify import cli, open_run
from xfel_classify import detectors as kinds
from xfel_classify.core import ConfigurationError, Shard
from xfel_classify.detectors import make_constants
from xfel_classify.pipeline.schedule import World
from xfel_classify.preprocess import calibrate
from xfel_classify.simulate.conditions import draw_conditions
from xfel_classify.simulate.hdf5_runs import write_cxi_run, write_hdf5_run
from xfel_classify.simulate.raw_epix10ka import Epix10kaRun
from xfel_classify.simulate.raw_runs import JungfrauRun
from xfel_classify.simulate.stills_frames import StillFrames, StillRunConditions
from xfel_classify.simulate.xtc2_runs import write_xtc2_run

EVENTS = 3


def bright_stills(seed=7):
    """Strong crystals, and constants that still hold when the run is taken."""
    return dataclasses.replace(StillRunConditions.draw(seed, 90, "resolution"), gain_spread=0.0,
                               salt_fraction=0.0, hot_fraction=0.0, distance_m=0.1)


class Brighter(StillFrames):
    """Spots as of the strongest crystals, so that the lowest stage is reached too."""

    def drawn(self, number):
        return dataclasses.replace(super().drawn(number), spot_photons=60_000.0,
                                   spot_sigma_px=0.6, shadow=1.0)


def jungfrau():
    conditions = bright_stills()
    return JungfrauRun(conditions, 2, photons=lambda g: Brighter(conditions, g))


def epix(mode):
    conditions = bright_stills()
    return Epix10kaRun(conditions, 4, mode=mode, photons=lambda g: Brighter(conditions, g))


def crystals(kind):
    """The same of an sfx run."""
    conditions = dataclasses.replace(
        draw_conditions(95, 95, "demo", hit_fraction=1.0), gain_spread=0.0, salt_fraction=0.0,
        hot_fraction=0.0, spot_photons=(2e4, 4e4))
    return kind(conditions, 1)


RUNS = {"jungfrau": jungfrau, "epix10ka AML": lambda: epix("AML"),
        "epix10ka AHL": lambda: epix("AHL"), "sfx jungfrau": lambda: crystals(JungfrauRun),
        "sfx epix10ka": lambda: crystals(Epix10kaRun)}


@pytest.fixture(scope="module", params=RUNS)
def run(request):
    return RUNS[request.param]()


@pytest.fixture(scope="module")
def raw(run):
    return list(run.events(range(EVENTS)))


def stage_of(run, raw_PSF):
    if run.kind == "jungfrau":
        return np.array([0, 1, 9, 2])[raw_PSF >> 14]
    return (raw_PSF >> 14 & 1).astype(int)


def check(run, event, keV_PSF, good_PSF):
    """Calibrated values against the photons: half a word in every stage, and readout noise."""
    photons_PSF, _ = run._run.event(event.index)
    truth_PSF = photons_PSF * np.float32(event.truth.photon_energy_eV / 1000)
    value, stage = event.raw_PSF & 0x3FFF, stage_of(run, event.raw_PSF)
    off = keV_PSF - truth_PSF
    seen = set()
    for g in range(len(run.gain)):
        here = good_PSF & (stage == g) & (value > 0) & (value < 0x3FFF)
        if not here.any():
            continue
        seen.add(g)
        # Jungfrau: noise and common mode in stage 0, none below; ePix10ka: in both
        quiet = run.kind == "jungfrau" and g > 0
        sigma = 0.0 if quiet else np.sqrt(2) * float(run.noise[g].max())
        allowed = (0.505 + 6 * sigma) / np.abs(run.gain[g][here]) + 1e-5 * truth_PSF[here]
        assert (np.abs(off[here]) <= allowed).all()
        if here.sum() > 100_000:        # but for the common mode of a panel there is no bias
            panel = np.nonzero(here)[0]
            middle = np.array([np.median(off[p][here[p]]) for p in range(len(off))])
            assert abs((off[here] - middle[panel]).mean()) < 0.02 * allowed.max()
    brightest = truth_PSF * good_PSF
    # the brightest pixels are those that switched
    switched = good_PSF & (stage > 0)
    if switched.any():
        assert brightest[switched].min() > 0.5 * brightest[good_PSF & (stage == 0)].max()
    return seen


def test_bright_pixels_are_in_lower_stages_and_come_back(run, raw):
    detector = kinds.detector(run.kind)
    constants = make_constants(detector, run.shape, run.constants(), run.geometry)
    assert constants.gain_GPSF.shape[0] == detector.stages
    seen = set()
    for event in raw:
        seen |= check(run, event, calibrate(event.raw_PSF, constants), constants.good_PSF)
    assert seen == set(range(detector.stages))


def frames_of(source):
    world = World()
    for frame in source.frames(Shard(lambda n: world.claim(n, EVENTS))):
        yield frame.index, frame.raw_PSF.copy()


@pytest.mark.parametrize("form", ["hdf5", "cxi", pytest.param("xtc2", marks=pytest.mark.psana)])
def test_every_format_gives_the_photons_back(run, raw, form, tmp_path):
    if form == "xtc2":
        pytest.importorskip("psana")
    write = {"hdf5": write_hdf5_run, "cxi": write_cxi_run, "xtc2": write_xtc2_run}[form]
    files = write(tmp_path, run, EVENTS, exp="mfxtest")
    if form == "xtc2":
        opened = open_run(run.conditions.run, exp="mfxtest", dir=str(tmp_path),
                          constants=str(files.constants))
    else:
        opened = open_run(str(files.files[0]), constants=str(files.constants))
    with opened as source:
        assert source.run.detector_kind == run.kind and source.run.panel_shape == run.shape
        constants = source.constants()
        seen, count = set(), 0
        for index, raw_PSF in frames_of(source):
            np.testing.assert_array_equal(raw_PSF, raw[index].raw_PSF)
            seen |= check(run, raw[index], calibrate(raw_PSF, constants), constants.good_PSF)
            count += 1
    assert count == EVENTS and len(seen) == kinds.detector(run.kind).stages
    if form == "hdf5":      # what any reader finds
        with h5py.File(files.files[0]) as file, h5py.File(files.constants) as known:
            words = file[f"{run.kind}/raw"][0]
            stage = stage_of(run, words)
            pedestals, gain = (known[f"{run.kind}/{name}"][:] for name in (
                "pedestals", "pixel_gain"))
            chosen = [np.take_along_axis(planes, stage[None], 0)[0] for planes in (
                pedestals, gain)]
            check(run, raw[0], ((words & 0x3FFF) - chosen[0]) / chosen[1],
                  known[f"{run.kind}/pixel_status"][:].max(0) == 0)
    with h5py.File(files.truth) as truth:
        assert len(truth["n_lattices"]) == EVENTS
        assert truth["spots/offsets"][-1] == len(truth["spots/fs"]) > 0
        if "d_A" in truth:
            assert (truth["d_A"][:] > 1).all()


@pytest.mark.psana
@pytest.mark.parametrize("mode", ["AML", "AHL"])
def test_control_bits_choose_between_psanas_seven_planes(mode, tmp_path):
    pytest.importorskip("psana")
    run = epix(mode)
    files = write_xtc2_run(tmp_path, run, 1, exp="mfxtest", streams=2)
    kinds.save_constants(files.constants, "epix10ka", run.all_planes())
    two = make_constants(kinds.detector("epix10ka"), run.shape, run.constants(), run.geometry)
    with open_run(90, exp="mfxtest", dir=str(tmp_path), constants=str(files.constants)) as source:
        np.testing.assert_array_equal(source.constants().pedestals_GPSF, two.pedestals_GPSF)
        np.testing.assert_array_equal(source.constants().gain_GPSF, two.gain_GPSF)


READ_BY_PSANA = """
import sys
from pathlib import Path
import h5py, numpy as np
from psana import DataSource
from psana.psexp.ds_base import DataSourceBase
import psana.pscalib.calib.MDBWebUtils as wu
folder = Path(sys.argv[1])
with h5py.File(folder / "constants.h5") as file:
    kept = {name: (one.asstr()[()] if name == "geometry" else one[()],
                   {"experiment": "mfxtest", "run": 90}) for name, one in file["epix10ka"].items()}
wu.calib_constants_all_types = lambda uid, *a, **k: kept if "epix10ka" in uid else {}
DataSourceBase._get_file_info_from_db = lambda self, runnum: {}
calib = []
for run in DataSource(exp="mfxtest", run=90, dir=str(folder)).runs():
    detector = run.Detector("epix10ka")
    for event in run.events():
        calib.append(detector.raw.calib(event).copy())
np.save(folder / "calib.npy", calib)
"""


@pytest.mark.psana
@pytest.mark.parametrize("mode", ["AML", "AHL"])
def test_psanas_own_calibration_gives_the_photons_too(mode, tmp_path):
    pytest.importorskip("psana")
    run = epix(mode)
    files = write_xtc2_run(tmp_path, run, 2, exp="mfxtest")
    kinds.save_constants(files.constants, "epix10ka", run.all_planes())
    script = tmp_path / "read.py"
    script.write_text(READ_BY_PSANA)
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True, capture_output=True,
                   timeout=240)
    constants = make_constants(kinds.detector("epix10ka"), run.shape, run.constants(),
                               run.geometry)
    good = constants.good_PSF
    for event, keV_PSF in zip(run.events(range(2)), np.load(tmp_path / "calib.npy"), strict=True):
        assert check(run, event, keV_PSF, good) == {0, 1}
        np.testing.assert_allclose(keV_PSF[good], calibrate(event.raw_PSF, constants)[good],
                                   rtol=1e-6, atol=1e-5)


def test_spots_of_stills_are_where_the_run_is_bright(run, raw):
    if not isinstance(run._run, StillFrames):
        pytest.skip("an sfx run")
    constants = make_constants(kinds.detector(run.kind), run.shape, run.constants(), run.geometry)
    found = []
    for event in raw:
        keV_PSF, t = calibrate(event.raw_PSF, constants), event.truth
        assert t.n_visible > 20
        for p, s, f, light in zip(t.panel_N, t.ss_N, t.fs_N, t.photons_N, strict=True):
            p, s, f = int(p), round(s), round(f)
            if light > 200 and 12 < s < run.shape[1] - 12 and 12 < f < run.shape[2] - 12:
                around = keV_PSF[p, s - 12:s + 13, f - 12:f + 13]
                found.append(keV_PSF[p, s - 1:s + 2, f - 1:f + 2].max()
                             >= np.percentile(around, 95))
    assert len(found) > 30 and np.mean(found) > 0.9


def test_the_labels_of_a_run_fit_its_distance():
    conditions = bright_stills()
    frames = StillFrames(conditions, kinds.default_geometry(kinds.detector("epix10ka"), 16))
    drawn = [frames.drawn(number) for number in range(20)]
    assert {c.distance_m for c in drawn} == {conditions.distance_m}
    assert len({c.crystal for c in drawn}) == 1
    assert np.std([c.photon_energy_eV for c in drawn]) < 0.003 * conditions.photon_energy_eV
    for c in drawn:
        half = c.reach * 512 * c.pool * c.pixel_size_m
        assert 1 / c.d_A < 1.2 * float(c.inverse_d_A(np.array(half)))


def test_misses_of_a_stills_run_have_no_crystal():
    conditions = bright_stills()
    geometry = kinds.default_geometry(kinds.detector("jungfrau"), 1)
    truths = [StillFrames(conditions, geometry, hit_fraction=0.5).event(n)[1] for n in range(8)]
    assert {t.is_hit for t in truths} == {True, False}
    for t in truths:
        assert t.n_lattices == t.conditions.n_lattices * t.is_hit
        assert np.isnan(t.columns()["d_A"]) == (not t.is_hit)


def test_from_the_command_line(tmp_path, capsys):
    for kind, detector in (("stills", "epix10ka"), ("sfx", "epix10ka"), ("stills", "jungfrau")):
        out = tmp_path / f"{kind}_{detector}"
        assert cli.main(["simulate", kind, "--format", "hdf5", "--detector", detector, "--segments",
                         "1", "--events", "2", "--out", str(out)]) == 0
        with h5py.File(out / "mfxsim-r0095.h5") as file:
            assert file[f"{detector}/raw"].shape[:2] == (2, 1)
    capsys.readouterr()
    assert cli.main(["simulate", "sfx", "--detector", "epix10ka", "--segments", "2", "--events",
                     "1", "--out", str(tmp_path / "none")]) != 0
    assert "1, 4, 16" in capsys.readouterr().err
    with pytest.raises(ConfigurationError, match="AHL and AML"):
        epix("FM")
