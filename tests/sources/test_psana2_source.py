"""Real psana2 on real xtc2 files, one process: pixels, scalars, and every way a run is damaged."""
from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from conformance.source_conformance import Counter, SourceConformance, part, summary, whole

from xfel_classify.config import struct
from xfel_classify.core import (
    ConfigurationError,
    ConstantsError,
    DetectorNotFound,
    EventStatus,
    RunDamaged,
    RunNotFound,
    Shard,
)

psana = pytest.importorskip("psana", reason="psana2 is not installed")

from mockdata import xtc2_runs as mock  # noqa: E402

from xfel_classify.sources import psana2  # noqa: E402
from xfel_classify.sources.psana2 import Source, fetch_constants  # noqa: E402

pytestmark = pytest.mark.psana
SHARED = Path(__file__).resolve().parents[2] / "../shared"
OK = EventStatus.OK


@pytest.fixture(scope="module")
def constants(tmp_path_factory) -> dict[int, str]:
    folder = tmp_path_factory.mktemp("constants")
    return {n: str(mock.write_constants(folder / f"{n}.h5", n)) for n in (1, 2)}


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """8 events, 2 segments in 2 streams, 2 steps."""
    return mock.write_run(tmp_path_factory.mktemp("good"),
                          mock.Run(events=8, segments=2, streams=2, steps=2,
                                   codes={1: (40, 140)}))


@pytest.fixture
def copy(good, tmp_path) -> Path:
    """The good run, to be damaged."""
    return Path(shutil.copytree(good, tmp_path / "run"))


def source(directory: Path | str, constants: str | None, **options) -> Source:
    return Source(Source.Config(**{"exp": "cxitst42", "run": 7, "dir": str(directory),
                                   "constants": constants, **options}))


def read(opened: Source) -> dict[int, tuple]:
    return summary(opened.frames(whole(opened)))


def big(directory: Path, stream: int) -> Path:
    return directory / f"cxitst42-r0007-s{stream:03d}-c000.xtc2"


def smd(directory: Path, stream: int) -> Path:
    return directory / "smalldata" / f"cxitst42-r0007-s{stream:03d}-c000.smd.xtc2"


def cut(path: Path, lose: int) -> None:
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size - lose)


class TestPsana2Conforms(SourceConformance):
    @pytest.fixture
    def again(self, good, constants):
        return lambda: source(good, constants[2])


class TestOneFileConforms(SourceConformance):
    @pytest.fixture
    def again(self, good, constants):
        config = Source.Config(files=[str(big(good, 1))], constants=constants[1])
        return lambda: Source(config)


# --- what is read ---

def test_pixels_are_those_written_although_the_buffer_is_reused(good, constants):
    with source(good, constants[2]) as opened:
        buffers = set()
        for frame in opened.frames(whole(opened)):
            for segment in (0, 1):
                assert np.array_equal(frame.raw_PSF[segment],
                                      mock.pixels(frame.index, segment)[0])
            buffers.add(frame.raw_PSF.__array_interface__["data"][0])
        assert len(buffers) == 1 and not opened.keeps_raw


def test_scalars_codes_and_identity(good, constants):
    with source(good, constants[2]) as opened:
        run = opened.run
        assert (run.exp, run.run, run.detector, run.detector_kind) == (
            "cxitst42", 7, "jungfrau", "jungfrau")
        assert run.panel_shape == (2, 512, 1024) and run.raw_dtype == "uint16"
        assert run.provenance["psana_version"]
        found = {f.index: f for f in opened.frames(whole(opened))}
    assert [found[i].timestamp for i in range(8)] == mock.Run(events=8).stamps()
    assert found[3].scalars["photon_energy_eV"] == 9503.0
    assert found[3].scalars["pulse_energy_mJ"] == pytest.approx(2.1)     # mean of f_11 and f_12
    assert found[3].scalars["distance_m"] == pytest.approx(0.15)         # detector_z is in mm
    assert [found[i].scalars["step_value"] for i in (0, 7)] == [0.0, 1.0]
    assert found[1].event_codes == (40, 140) and found[2].event_codes == ()


def test_energies_that_are_no_energies_are_missing(tmp_path, constants):
    values = {0: np.nan, 1: np.inf, 2: 0.0, 3: 9500.0}
    mock.write_run(tmp_path, mock.Run(events=4, energy=values))
    with source(tmp_path, constants[1]) as opened:
        energies = [f.scalars.get("photon_energy_eV") for f in opened.frames(whole(opened))]
        assert energies == [None, None, None, 9500.0]


def test_a_run_without_beam_detectors(tmp_path, constants):
    mock.write_run(tmp_path, mock.Run(events=4, scalars=False, gmd=True))
    with source(tmp_path, constants[1], distance_m=0.2) as opened:
        assert any("no ebeam" in note for note in opened.run.notes)
        frame = next(iter(opened.frames(part([1]))))
        assert frame.scalars == {"pulse_energy_mJ": 1.5, "distance_m": 0.2}


def test_constants_from_a_file(good, constants):
    with source(good, constants[2]) as opened:
        found = opened.constants()
        assert found.shape == (2, 512, 1024) and not found.calibrated
        assert found.gain_bits == "top2"
        assert not found.good_PSF[:, 5, 6].any()


def test_damaged_images_are_flagged_or_analysed(tmp_path, constants):
    mock.write_run(tmp_path, mock.Run(events=4, damage={2: 4, 3: 1 << 13}))
    with source(tmp_path, constants[1]) as opened:
        found = read(opened)
        assert [found[i][1] for i in range(4)] == [OK, OK, EventStatus.DAMAGED, OK]
        assert [found[i][2] for i in range(4)] == [0, 0, 4, 1 << 13]    # user bits are no damage
        assert found[2][3] is None
    with source(tmp_path, constants[1], damaged="analyse") as opened:
        found = read(opened)
        assert found[2][1] is OK and found[2][2] == 4 and found[2][3] is not None


def test_events_without_the_detector_or_with_part_of_it(tmp_path, constants):
    mock.write_run(tmp_path, mock.Run(events=4, segments=2, streams=2,
                                      missing={1: (0, 1), 2: (1,)}))
    with source(tmp_path, constants[2]) as opened:
        found = read(opened)
        assert [found[i][1] for i in range(4)] == [
            OK, EventStatus.NO_DETECTOR, EventStatus.WRONG_SHAPE, OK]
        assert opened.expected_events() == 4


def test_empty_run(tmp_path, constants):
    mock.write_run(tmp_path, mock.Run(events=0, times=[mock.START + 100]))
    with source(tmp_path, constants[1]) as opened:
        assert opened.expected_events() == 0
        assert read(opened) == {}


def test_events_of_one_time_are_told_apart(tmp_path, constants):
    times = [mock.START + t for t in (1000, 2000, 2000, 3000)]
    mock.write_run(tmp_path, mock.Run(events=4, times=times))
    with source(tmp_path, constants[1]) as opened:
        assert opened.expected_events() == 4
        found = {f.index: (f.timestamp, int(f.status), None if f.raw_PSF is None
                           else int(f.raw_PSF[0, 0, 0])) for f in opened.frames(whole(opened))}
        assert any("repeat" in note for note in opened.run.notes)
    assert [found[i][0] for i in range(4)] == times
    assert [found[i][2] for i in range(4)] == [int(mock.pixels(i, 0)[0, 0, 0]) for i in range(4)]


def test_first_events_only(good, constants):
    with source(good, constants[2], max_events=3) as opened:
        assert opened.expected_events() == 3
        assert sorted(read(opened)) == [0, 1, 2]


def test_a_run_is_read_once(good, constants):
    with source(good, constants[2]) as opened:
        read(opened)
        with pytest.raises(RuntimeError, match="only once"):
            next(opened.frames(whole(opened)))


def test_runs_of_the_shared_writer(constants, tmp_path):
    """The writer that is not ours: every event of its truth file, frame for frame."""
    import subprocess
    import sys
    import zlib

    writer = SHARED / "psana/make_xtc2_run.py"
    if not writer.exists():
        pytest.skip("the shared xtc2 writer is not here")
    subprocess.run([sys.executable, str(writer), "--out", str(tmp_path), "--events", "8",
                    "--segments", "2", "--streams", "2", "--steps", "2", "--damage", "3",
                    "--drop", "5"], check=True, capture_output=True, timeout=120)
    truth = np.load(tmp_path / "cxitst95-r0095-truth.npz")
    with source(tmp_path, str(tmp_path / "constants.h5"), exp="cxitst95", run=95) as opened:
        found = {}
        for frame in opened.frames(whole(opened)):
            crc = 0
            for panel in frame.raw_PSF if frame.raw_PSF is not None else ():
                crc = zlib.crc32(panel.tobytes(), crc)
            found[frame.index] = (frame, crc)
        opened.constants()
    assert [found[i][0].timestamp for i in range(8)] == truth["timestamp"].tolist()
    usable = ~(truth["damaged"] | truth["missing"])
    assert [found[i][0].status is OK for i in range(8)] == usable.tolist()
    assert all(found[i][1] == truth["raw_crc32"][i] for i in np.flatnonzero(usable))
    assert [found[i][0].scalars["photon_energy_eV"] for i in range(8)] == pytest.approx(
        truth["photon_energy_eV"].tolist())


def test_big_data_in_chunk_files(tmp_path, constants):
    mock.write_run(tmp_path, mock.Run(events=8, steps=2, chunk_at=1))
    second = tmp_path / "cxitst42-r0007-s001-c001.xtc2"
    with source(tmp_path, constants[1]) as opened:
        found = {f.index: f.raw_PSF[0].copy() for f in opened.frames(whole(opened))}
    assert all(np.array_equal(found[i], mock.pixels(i, 0)[0]) for i in range(8))
    cut(second, 10_000)
    with source(tmp_path, constants[1]) as opened:
        found = read(opened)
        assert [found[i][1] for i in range(8)] == [OK] * 7 + [EventStatus.UNREADABLE]
    second.unlink()
    with pytest.raises(RunNotFound, match=r"s001-c001\.xtc2 does not exist"), \
            source(tmp_path, constants[1]):
        pass


def test_a_run_that_is_still_being_written(copy, constants):
    """The DAQ calls files .inprogress until the run is closed."""
    for path in (*copy.glob("*.xtc2"), *(copy / "smalldata").glob("*.xtc2")):
        path.rename(path.with_name(path.name + ".inprogress"))
    with pytest.raises(RunDamaged, match="still being written"), source(copy, constants[2]):
        pass


def test_a_real_epix_file(tmp_path):
    """An ePix10ka quad as the DAQ wrote it: gain mode from its own configuration record."""
    import h5py

    path = SHARED / "data/real/xtc2/test_epix_calib.xtc2"
    if not path.exists():
        pytest.skip("the real ePix file is not here")
    with h5py.File(tmp_path / "constants.h5", "w") as file:
        file["epixquad/pedestals"] = np.full((7, 4, 352, 384), 3000, np.float32)
        file["epixquad/pixel_gain"] = np.full((7, 4, 352, 384), 100, np.float32)
    with Source(Source.Config(files=[str(path)], constants=str(tmp_path / "constants.h5"))) as one:
        assert (one.run.exp, one.run.run, one.run.detector) == ("ueddaq02", 109, "epixquad")
        assert one.run.detector_kind == "epix10ka" and one.run.panel_shape == (4, 352, 384)
        assert one.constants().gain_bits == "bit14"
        means = [float(f.raw_PSF.mean()) for f in one.frames(whole(one))]
        assert means == pytest.approx([19453.193, 19469.134], abs=1e-3)


# --- wrong requests ---

def test_another_experiment_is_not_read(good, constants, tmp_path):
    with pytest.raises(RunNotFound, match="holds run 7 of cxitst42"), \
            source(good, constants[2], exp="cxiother"):
        pass
    inside = mock.write_run(tmp_path, mock.Run(events=1, runinfo="cxiother"))
    with pytest.raises(RunNotFound, match="files are of experiment 'cxiother'"), \
            source(inside, constants[1]):
        pass


def test_files_of_two_experiments_are_not_mixed(copy, constants):
    shutil.copy(smd(copy, 1), copy / "smalldata" / "xpptst-r0007-s001-c000.smd.xtc2")
    with pytest.raises(RunNotFound, match="would mix in"), source(copy, constants[2]):
        pass


def test_wrong_run_and_wrong_directory(good, constants, tmp_path):
    with pytest.raises(RunNotFound, match="it holds runs 7 of cxitst42"), \
            source(good, constants[2], run=8):
        pass
    with pytest.raises(RunNotFound, match="not a directory"), \
            source(tmp_path / "nowhere", constants[2]):
        pass
    with pytest.raises(RunNotFound, match="holds nothing of cxitst42"), \
            source(tmp_path, constants[2]):
        pass
    with pytest.raises(RunNotFound, match="does not exist"), \
            Source(Source.Config(files=[str(tmp_path / "no.xtc2")])):
        pass


def test_the_run_is_a_number():
    with pytest.raises(ConfigurationError, match="run"):
        struct(Source.Config, {"exp": "cxitst42", "run": "7"}, "source psana2")
    with pytest.raises(ConfigurationError, match="exp and run, or files"):
        Source(Source.Config(exp="cxitst42"))
    with pytest.raises(ConfigurationError, match="--exp"):
        Source(Source.Config(run=7))


def test_streams_given_as_files_are_not_joined(good):
    with pytest.raises(ConfigurationError, match="does not join their streams"):
        Source(Source.Config(files=[str(big(good, 0)), str(big(good, 1))]))


def test_unknown_detector(good, constants):
    with pytest.raises(DetectorNotFound, match=r"no detector 'epix'; it has .*jungfrau"), \
            source(good, constants[2], detector="epix"):
        pass
    with pytest.raises(DetectorNotFound, match="'ebeam' has no raw images"), \
            source(good, constants[2], detector="ebeam"):
        pass


def test_raw_words_without_pedestals_are_refused(good):
    """Without network and file there are no constants; psana's calib would return raw words."""
    with source(good, None) as opened, pytest.raises(ConstantsError, match="--constants"):
        opened.constants()


def test_constants_of_the_database(good, constants, monkeypatch):
    """What psana's database answers is used, and can be fetched for a file."""
    import h5py
    import psana.pscalib.calib.MDBWebUtils as web

    with h5py.File(constants[2]) as file:
        stored = {k: v[()] for k, v in file["jungfrau"].items()}

    def database(det, exp=None, run=None, **_):
        assert (exp, run) == ("cxitst42", 7)
        return {k: (v, {}) for k, v in stored.items()} if det.startswith("jungfrau") else {}

    monkeypatch.setattr(web, "calib_constants_all_types", database)
    with source(good, None) as opened, source(good, constants[2]) as other:
        assert opened.constants().identity == other.constants().identity
    name, fetched = fetch_constants("cxitst42", 7, directory=str(good))
    assert name == "jungfrau"
    assert all(np.array_equal(fetched[k], stored[k]) for k in stored)
    monkeypatch.setattr(web, "calib_constants_all_types", lambda *_, **__: {})
    with pytest.raises(ConstantsError, match="no pedestals"):
        fetch_constants("cxitst42", 7, directory=str(good))


def test_an_unreachable_database_is_asked_once(good, monkeypatch):
    import psana.pscalib.calib.MDBWebUtils as web
    import requests

    asked = []

    def database(det, **_):
        asked.append(det)
        raise requests.exceptions.ConnectionError("no route")

    monkeypatch.setattr(web, "calib_constants_all_types", database)
    with source(good, None) as opened:
        assert any("cannot be reached" in note for note in opened.run.notes)
    assert len(asked) == 1


def test_psana_is_left_as_it_was(good, constants):
    import psana.pscalib.calib.MDBWebUtils as web
    import psana.psexp.ds_base as ds_base
    import requests

    before = (ds_base.DataSourceBase._get_file_info_from_db, web.calib_constants_all_types)
    with source(good, constants[2]):
        assert before == (ds_base.DataSourceBase._get_file_info_from_db,
                          web.calib_constants_all_types)
        assert ds_base.requests is requests


def test_a_silent_network_ends_in_a_timeout(good, constants, monkeypatch):
    import requests

    asked = []

    def get(*_, timeout=None, **__):
        asked.append(timeout)
        raise requests.exceptions.ConnectTimeout("no answer")

    monkeypatch.setattr(requests, "get", get)
    with source(good, constants[2]) as opened:
        assert opened.expected_events() == 8
    assert asked and all(t is not None for t in asked)


# --- damaged runs ---

@pytest.mark.parametrize(("lose", "lost"), [(50, 0), (100, 1), (2_000_000, 2), (4_000_000, 4)])
def test_truncated_big_data_loses_only_what_is_cut(copy, constants, lose, lost):
    """psana2 alone ends early without a word and drops whole events before the cut as well."""
    cut(big(copy, 2), lose)
    with source(copy, constants[2]) as opened:
        found = read(opened)
        named = [n for n in opened.run.notes if "stream s002" in n and "cannot be read" in n]
        assert len(named) == bool(lost)
    bad = EventStatus.UNREADABLE
    assert [found[i][1] for i in range(8)] == [OK] * (8 - lost) + [bad] * lost


def test_truncation_in_the_middle_of_the_last_event(copy, constants):
    cut(big(copy, 1), 10_000)
    with source(copy, constants[2]) as opened:
        found = read(opened)
        assert [i for i in found if found[i][1] is EventStatus.UNREADABLE] == [7]
        assert "1 of its 8 events" in "".join(opened.run.notes)


def test_missing_big_data(copy, constants):
    big(copy, 2).unlink()
    with pytest.raises(RunNotFound, match=r"s002-c000\.xtc2 does not exist"), \
            source(copy, constants[2]):
        pass


def test_psana_leaving_through_exit_becomes_an_error(copy, constants, monkeypatch):
    files = psana2.find_streams("cxitst42", 7, copy)
    index = psana2.index_run(files)
    monkeypatch.setattr(psana2, "find_streams", lambda *_: files)
    monkeypatch.setattr(psana2, "index_run", lambda *_: index)
    big(copy, 2).unlink()
    with pytest.raises(RunNotFound, match="psana2 gave up"), source(copy, constants[2]):
        pass


def test_missing_small_data_of_a_stream(copy, constants):
    smd(copy, 2).unlink()
    with pytest.raises(RunDamaged, match="s002.*big data without small data"), \
            source(copy, constants[2]):
        pass


def test_a_whole_stream_missing(copy, constants):
    """psana2 makes a one-panel detector of it, without a warning."""
    for path in (smd(copy, 2), big(copy, 2)):
        path.unlink()
    with pytest.raises(RunDamaged, match=r"has 1 panels .*2 panels were exp.*missing: \[1\]"), \
            source(copy, constants[2]):
        pass
    with pytest.raises(RunDamaged, match="2 panels were expected"), \
            source(copy, constants[1], panels=2):
        pass


def test_the_first_segments_missing(copy, constants):
    for path in (smd(copy, 1), big(copy, 1)):
        path.unlink()
    with pytest.raises(RunDamaged, match=r"missing: \[0\]"), source(copy, None):
        pass


def test_all_image_streams_missing(copy, constants):
    for stream in (1, 2):
        smd(copy, stream).unlink()
        big(copy, stream).unlink()
    with pytest.raises(DetectorNotFound, match="no detector 'jungfrau'.*may be missing"), \
            source(copy, constants[2], detector="jungfrau"):
        pass


@pytest.mark.parametrize("lose", [5, 150, 400])
def test_truncated_small_data(copy, constants, lose):
    cut(smd(copy, 1), lose)
    with pytest.raises(RunDamaged, match="smdwriter"), source(copy, constants[2]):
        pass


@pytest.mark.parametrize("keep", [0, 10, 3000])
def test_small_data_cut_off_before_the_run_begins(copy, constants, keep):
    path = smd(copy, 0)
    cut(path, path.stat().st_size - keep)
    with pytest.raises(RunDamaged, match="does not even hold the beginning"), \
            source(copy, constants[2]):
        pass


def test_small_data_that_end_between_events(copy, constants):
    path = smd(copy, 2)
    data = path.read_bytes()
    last = 0
    at = 0
    while at < len(data):                       # the last event begins here
        service = (int.from_bytes(data[at + 8:at + 12], "little") >> 24) & 15
        last = at if service == 12 else last
        at += 12 + int.from_bytes(data[at + 20:at + 24], "little")
    path.write_bytes(data[:last])
    with pytest.raises(RunDamaged, match="ends without EndRun, which other streams have"), \
            source(copy, constants[2]):
        pass


def test_a_run_that_was_never_closed(tmp_path, constants):
    mock.write_run(tmp_path, mock.Run(events=4, closed=False))
    with source(tmp_path, constants[1]) as opened:
        assert sorted(read(opened)) == [0, 1, 2, 3]
        assert any("EndRun" in note for note in opened.run.notes)


def test_one_truncated_file_read_by_itself(copy, constants):
    cut(big(copy, 1), 10_000)
    with Source(Source.Config(files=[str(big(copy, 1))], constants=constants[1])) as opened:
        found = read(opened)
        assert [found[i][1] for i in range(8)] == [OK] * 7 + [EventStatus.UNREADABLE]


def test_interruption_ends_the_run(good, constants):
    with source(good, constants[2]) as opened:
        seen = []
        shard = Shard(Counter(8), stopping=lambda: len(seen) >= 3)
        for frame in opened.frames(shard):
            seen.append(frame.index)
        assert len(seen) == 3
