"""``validate`` accepts a sound output and names every planted defect."""
import argparse
import shutil

import h5py
import numpy as np
import pytest
from mockdata.hand_output import STEM, write_output
from mockdata.hand_result import (
    SHAPE,
    empty_result,
    hand_constants,
    hand_geometry,
    hand_pixels,
    hand_result,
)

from xfel_classify.commands import validate as verb
from xfel_classify.commands.validate import validate
from xfel_classify.core import OutputError


@pytest.fixture
def summary(tmp_path):
    return write_output(tmp_path / "out")


def replace(file, path, values):
    """Put other values at ``path``, attributes kept."""
    attributes = dict(file[path].attrs)
    del file[path]
    file[path] = values
    for name, value in attributes.items():
        file[path].attrs[name] = value


def test_sound_outputs_have_no_problems(summary, tmp_path):
    assert validate(summary) == []
    assert validate(summary.parent) == []
    assert validate(summary.with_suffix(".cxi")) == []
    for events in (0, 1, 4):
        assert validate(write_output(tmp_path / f"empty{events}", empty_result(events))) == []


def test_summary_alone_is_sound(summary, tmp_path):
    shutil.copy(summary, tmp_path / "alone.h5")
    assert validate(tmp_path / "alone.h5") == []


def test_nothing_there():
    with pytest.raises(OutputError, match="does not exist"):
        validate("/nowhere/at/all.h5")


def attribute(name, value):
    return lambda file: file.attrs.__setitem__(name, value)


def no_attribute(name):
    return lambda file: file.attrs.__delitem__(name)


def element(path, index, value):
    return lambda file: file[path].__setitem__(index, value)


def other(path, make):
    return lambda file: replace(file, path, make(file[path][()]))


def without(path):
    return lambda file: file.__delitem__(path)


SUMMARY_DEFECTS = [
    ("complete is missing", no_attribute("complete")),
    ("incomplete: 6 of 9 events", lambda f: f.attrs.update(complete=False, events_expected=9)),
    ("says complete, but holds 6 events of 7", attribute("events_expected", 7)),
    ("attribute events is 5", attribute("events", 5)),
    ("attribute hits is 2", attribute("hits", 2)),
    ("not a summary", attribute("format", "something")),
    ("/timestamp is missing", without("timestamp")),
    ("/kept is missing", without("kept")),
    ("timestamp is not sorted", element("timestamp", 2, 5)),
    ("event 3 more than once", element("index", 4, 3)),
    ("negative positions", element("index", 0, -4)),
    ("holds [77]", element("status", 0, 77)),
    ("attribute values", lambda f: f["status"].attrs.__delitem__("values")),
    ("/timestamp is float64", other("timestamp", lambda v: v.astype(float))),
    ("/hit/score has shape (5,)", other("hit/score", lambda v: v[:5])),
    ("/hit/label has no attribute units", lambda f: f["hit/label"].attrs.__delitem__("units")),
    ("add up to 8", element("reason/counts", 0, 7)),
    ("found 1", lambda f: [element("reason/counts", 0, 4)(f), element("reason/counts", 2, 2)(f)]),
    ("reason/status is missing", without("reason/status")),
    ("/peaks/fs has 3 values", other("peaks/fs", lambda v: v[:3])),
    ("not a rising list", element("peaks/offsets", 2, 5)),
    ("not a rising list", other("peaks/offsets", lambda v: v[:-1])),
    ("which do not exist", lambda f: f["peaks/fs"].attrs.__setitem__("offsets", "/no/where")),
    ("says 2 peaks in row 1", element("peaks/n", 1, 2)),
    ("is over 12 events", lambda f: f["totals/mean"].attrs.__setitem__("events", 12)),
    ("links to gone.h5:/x", lambda f: f.__setitem__("dead", h5py.ExternalLink("gone.h5", "/x"))),
    ("links to /nothing", lambda f: f.__setitem__("dead", h5py.SoftLink("/nothing"))),
    ("extra.h5 was written with this", attribute("outputs", ["extra.h5"])),
    ("lists other events", lambda f: [element("kept", 0, 1)(f), element("kept", 1, 0)(f)]),
    ("has 3 lines, but the run has 2", lambda f: [element("kept", 1, 0)(f),
                                                  attribute("hits", 2)(f)]),
]


@pytest.mark.parametrize(("said", "plant"), SUMMARY_DEFECTS, ids=[d[0] for d in SUMMARY_DEFECTS])
def test_defects_of_the_summary(summary, said, plant):
    with h5py.File(summary, "r+") as file:
        plant(file)
    problems = validate(summary)
    assert any(said in problem for problem in problems), problems


RESULT = "entry_1/result_1"
CXI_DEFECTS = [
    ("/cxi_version is missing", without("cxi_version")),
    ("incomplete run", attribute("complete", False)),
    ("/entry_1/data_1/data is missing", without("entry_1/data_1/data")),
    ("not (hits, slow, fast)", other("entry_1/data_1/data", lambda v: v[:, None])),
    ("root attribute hits is 9", attribute("hits", 9)),
    ("values that are not finite", element("entry_1/data_1/data", (0, 1, 2), np.inf)),
    ("NaN everywhere", element("entry_1/data_1/data", 1, np.nan)),
    ("/entry_1/data_1/mask is missing", without("entry_1/data_1/mask")),
    ("mask has shape", other("entry_1/data_1/mask", lambda v: v[:, :3])),
    ("not an integer", other("entry_1/data_1/mask", lambda v: v.astype(float))),
    ("every pixel bad", element("entry_1/data_1/mask", 0, 1)),
    ("lacks peakTotalIntensity", without(f"{RESULT}/peakTotalIntensity")),
    ("nPeaks has 2 rows", other(f"{RESULT}/nPeaks", lambda v: v[:2])),
    ("outside of 0 to 3", element(f"{RESULT}/nPeaks", 0, 4)),
    ("peakSNR has shape", other(f"{RESULT}/peakSNR", lambda v: v[:, :2])),
    ("peakXPosRaw is not 0", element(f"{RESULT}/peakXPosRaw", (1, 0), 3)),
    ("outside of the frame", element(f"{RESULT}/peakYPosRaw", (0, 1), 40)),
    ("/LCLS/timestamp is missing", without("LCLS/timestamp")),
    ("do not make up", element("LCLS/machineTime", 0, 5)),
    ("/LCLS/eventNumber has 2 hits", other("LCLS/eventNumber", lambda v: v[:2])),
    ("other events than the summary", element("LCLS/eventNumber", 0, 2)),
    ("links to /entry_1/data_1/mask", without("entry_1/data_1/mask")),
    ("clen = /LCLS/detector_1/EncoderValue, which is unknown for 1",
     element("LCLS/detector_1/EncoderValue", 1, np.nan)),
    ("photon_energy = /LCLS/photon_energy_eV, which the CXI file does not have",
     without("LCLS/photon_energy_eV")),
]


@pytest.mark.parametrize(("said", "plant"), CXI_DEFECTS, ids=[d[0] for d in CXI_DEFECTS])
def test_defects_of_the_cxi_file(tmp_path, said, plant):
    constants = hand_constants(geometry=hand_geometry(distance_m=None))
    columns = dict(hand_result().columns) | {"distance_m": hand_result().columns["hit/score"]}
    rows = dict(hand_result().rows) | {"distance_m": np.full(6, 0.1)}
    summary = write_output(tmp_path, hand_result(constants=constants, columns=columns, rows=rows))
    assert validate(summary) == []
    with h5py.File(summary.with_suffix(".cxi"), "r+") as file:
        plant(file)
    problems = validate(summary)
    assert any(said in problem for problem in problems), problems


def test_frames_that_were_never_written(summary):
    with h5py.File(summary.with_suffix(".cxi"), "r+") as file:
        del file["entry_1/data_1/data"]
        file.create_dataset("entry_1/data_1/data", (3, 16, 16), "f4", chunks=(1, 16, 16))[0] = 1
    assert any("only 1 of 3 frames" in problem for problem in validate(summary))


def edited(name, old, new):
    def plant(directory):
        path = directory / f"{STEM}{name}"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
    return plant


def saved(values):
    return lambda directory: np.save(directory / f"{STEM}_hits.npy", values)


FILE_DEFECTS = [
    ("has 2 lines", lambda d: (d / f"{STEM}.lst").write_text(
        "".join((d / f"{STEM}.lst").read_text().splitlines(keepends=True)[:2]))),
    ("does not count its frames", edited(".lst", "//1\n", "//7\n")),
    ("which does not exist", edited(".lst", f"/{STEM}.cxi", f"/elsewhere/{STEM}.cxi")),
    ("names", edited(".lst", f"{STEM}.cxi", "other.cxi")),
    ("lists 2 hits", saved(np.arange(2, dtype=np.uint64))),
    ("other time stamps", saved(np.arange(3, dtype=np.uint64))),
    ("holds int64", saved(np.arange(3))),
    ("_hits.npy cannot be read", lambda d: (d / f"{STEM}_hits.npy").write_bytes(b"no array")),
    ("_hits.txt lists 2 hits", edited("_hits.txt", "95 4\n", "")),
    ("_hits.txt lists other events", edited("_hits.txt", "95 4\n", "96 4\n")),
    ("not lines of", edited("_hits.txt", "95 4\n", "ninety-five\n")),
    ("data = /elsewhere, which the CXI", edited(".geom", "data = /entry_1/data_1/data",
                                                "data = /elsewhere")),
    ("dim0 is not %", edited(".geom", "dim0 = %", "dim0 = 0")),
    ("reaches outside", edited(".geom", "max_ss = 15", "max_ss = 16")),
    ("panels overlap in 16 pixels", edited(".geom", "p1/min_ss = 8", "p1/min_ss = 7")),
    ("leave 16 good pixels out", edited(".geom", "p1/max_ss = 15", "p1/max_ss = 14")),
    ("lacks or misstates", edited(".geom", "p1/min_ss = 8", "")),
    ("not a number", edited(".geom", "p0/corner_x = -8.000000000", "p0/corner_x = nan")),
    ("describes no panel", lambda d: (d / f"{STEM}.geom").write_text("res = 1\n")),
    (".cxi cannot be read", lambda d: (d / f"{STEM}.cxi").write_bytes(b"no HDF5")),
    (".h5 cannot be read", lambda d: (d / f"{STEM}.h5").write_bytes(
        (d / f"{STEM}.h5").read_bytes()[:5000])),
]


@pytest.mark.parametrize(("said", "plant"), FILE_DEFECTS, ids=[d[0] for d in FILE_DEFECTS])
def test_defects_of_the_files_beside_the_summary(summary, said, plant):
    plant(summary.parent)
    problems = validate(summary)
    assert any(said in problem for problem in problems), problems


def test_moved_directory_is_explained(summary, tmp_path):
    summary.parent.rename(tmp_path / "moved")
    problems = validate(tmp_path / "moved")
    assert len(problems) == 1 and "--basename --prefix" in problems[0]


def test_leftovers_and_empty_directories(summary, tmp_path):
    (summary.parent / f"{STEM}.cxi.tmp").touch()
    assert any("left over" in problem for problem in validate(summary.parent))
    (tmp_path / "nothing").mkdir()
    assert "no run has finished" in validate(tmp_path / "nothing")[0]


def test_links_into_a_source_that_changed_or_went(tmp_path):
    source = tmp_path / "100% source.h5"
    with h5py.File(source, "w") as file:
        file["frames"] = np.stack([hand_pixels(row) for row in range(6)])
    result = hand_result(locate=lambda row: (str(source), "/frames", row), pixels=None)
    summary = write_output(tmp_path / "out", result, link=True)
    assert validate(summary) == []
    with h5py.File(source, "w") as file:
        file["frames"] = np.zeros((2, *SHAPE), np.float32)
    assert any("lacks position" in problem for problem in validate(summary))
    with h5py.File(source, "w") as file:
        file["else"] = 1
    assert any("no such dataset" in problem for problem in validate(summary))
    source.write_bytes(b"no HDF5")
    assert any("cannot be read" in problem for problem in validate(summary))
    source.unlink()
    assert any("not there" in problem for problem in validate(summary.with_suffix(".cxi")))


def test_verb(summary, capsys):
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    args = parser.parse_args([str(summary)])
    assert verb.execute(args) == 0 and "complete and consistent" in capsys.readouterr().out
    for path in (summary, summary.with_suffix(".cxi")):
        with h5py.File(path, "r+") as file:
            file.attrs["complete"] = False
    assert verb.execute(args) == 3 and "--resume" in capsys.readouterr().out
    with h5py.File(summary, "r+") as file:
        file["timestamp"][0] = 2**63 - 1
    assert verb.execute(args) == 1 and "not sorted" in capsys.readouterr().out
