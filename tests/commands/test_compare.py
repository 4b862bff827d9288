"""``compare`` ignores timings and provenance, and nothing else."""
import argparse
import shutil

import h5py
import numpy as np
import pytest
from mockdata.hand_output import STEM, write_output
from mockdata.hand_result import hand_result

from xfel_classify.commands import compare as verb
from xfel_classify.commands.compare import PROVENANCE, compare
from xfel_classify.core import OutputDamaged, OutputError


@pytest.fixture
def two(tmp_path):
    """The same run written twice, with other timings, and on another day."""
    first = write_output(tmp_path / "a")
    second = write_output(tmp_path / "b", hand_result(
        timing={"seconds": np.array([[7.0]]), "rank": np.arange(4)},
        attributes=hand_result().attributes | {"versions": {"numpy": "3"},
                                               "configuration": "[loop]\nbatch = 3\n"}))
    return first, second


def test_equal_but_for_timings_and_provenance(two):
    assert compare(*two) == []
    assert compare(two[0].parent, two[1].parent) == []
    assert "configuration" in PROVENANCE


SUMMARY_CHANGES = [
    ("/hit/score: 1 of 6 values differ, first at [2]",
     lambda f: f["hit/score"].__setitem__(2, 0.21)),
    ("/hit/score: 1 of 6 values differ", lambda f: f["hit/score"].__setitem__(5, 0.0)),
    ("/peaks/fs: 1 of 4", lambda f: f["peaks/fs"].__setitem__(3, 7.25)),
    ("/totals/powder_max_hits: 1 of 256 values differ, first at [1, 2, 3]",
     lambda f: f["totals/powder_max_hits"].__setitem__((1, 2, 3), 8)),
    ("/hit/label is only in the first", lambda f: f.__delitem__("hit/label")),
    ("/more is only in the second", lambda f: f.__setitem__("more", 1)),
    ("/index: shape (6,) and (2,)", lambda f: [f.__delitem__("index"),
                                               f.__setitem__("index", [1, 2])]),
    ("/index: type int64 and int32", lambda f: [
        f.__delitem__("index"), f.__setitem__("index", np.arange(6, dtype=np.int32))]),
    ("/peaks is a group in one", lambda f: [f.__delitem__("peaks"), f.__setitem__("peaks", 1)]),
    ("attribute units of /photon_energy_eV: eV and keV",
     lambda f: f["photon_energy_eV"].attrs.__setitem__("units", "keV")),
    ("attribute model_name of /", lambda f: f.attrs.__setitem__("model_name", "other")),
    ("attribute complete of / is only in the first", lambda f: f.attrs.__delitem__("complete")),
    ("attribute new of / is only in the second", lambda f: f.attrs.__setitem__("new", 1)),
    ("attribute names of /status", lambda f: f["status"].attrs.__setitem__("names", ["OK"])),
    ("/reason/names: 6 of 6", lambda f: f["reason/names"].__setitem__(slice(None), "other")),
]


@pytest.mark.parametrize(("said", "change"), SUMMARY_CHANGES, ids=[c[0] for c in SUMMARY_CHANGES])
def test_differences_of_summaries(two, said, change):
    with h5py.File(two[1], "r+") as file:
        change(file)
    differences = compare(*two)
    assert any(said in difference for difference in differences), differences


def test_differences_of_cxi_files_and_their_links(two):
    ours, theirs = (path.with_suffix(".cxi") for path in two)
    assert compare(ours, theirs) == []
    with h5py.File(theirs, "r+") as file:
        file["entry_1/data_1/data"][2, 15, 15] += 1
        del file["entry_1/instrument_1/detector_1/mask"]
        file["entry_1/instrument_1/detector_1/mask"] = h5py.SoftLink("/else")
    differences = compare(ours, theirs)
    assert len(differences) == 2
    assert "first at [2, 15, 15]" in differences[0]
    assert "links to different places" in differences[1]


def test_large_datasets_are_compared_in_pieces(tmp_path):
    for name, last in (("a.h5", 0), ("b.h5", 1)):
        with h5py.File(tmp_path / name, "w") as file:
            frames = file.create_dataset("d", (40, 1024, 1024), "f4", chunks=(1, 1024, 1024))
            frames[39, 5, 6] = last
    assert compare(tmp_path / "a.h5", tmp_path / "b.h5")[0].startswith(
        "/d: 1 of 41943040 values differ, first at [39, 5, 6]")


@pytest.mark.parametrize(("name", "content"), [
    (".lst", b"/x/mfxl1033223_r0095.cxi //0\n"), ("_hits.txt", b"95 1\n95 3\n95 5\n"),
    (".geom", b"res = 1\n")])
def test_differences_of_text_files(two, name, content):
    path = two[1].parent / f"{STEM}{name}"
    path.write_bytes(content)
    differences = compare(two[0].parent, two[1].parent)
    assert len(differences) == 1 and f"{STEM}{name}" in differences[0]


@pytest.mark.parametrize("stamps", [np.arange(3, dtype=np.uint64), np.arange(3)])
def test_differences_of_time_stamps(two, stamps):
    np.save(two[1].parent / f"{STEM}_hits.npy", stamps)
    assert len(compare(two[0].parent, two[1].parent)) == 1


def test_missing_files(two, tmp_path):
    (two[1].parent / f"{STEM}.lst").unlink()
    (two[0].parent / f"{STEM}.geom").unlink()
    differences = compare(two[0].parent, two[1].parent)
    assert [d.split()[0] for d in differences] == [f"{STEM}.lst", f"{STEM}.geom"]
    with pytest.raises(OutputError, match="does not exist"):
        compare(two[0], tmp_path / "nothing.h5")
    assert compare(two[0], two[1].parent) == [
        f"{two[0]} and {two[1].parent}: one is a directory, the other a file"]


def test_truncated_file(two):
    shutil.copy(two[0], two[1])
    two[1].write_bytes(two[0].read_bytes()[:3000])
    with pytest.raises(OutputDamaged):
        compare(*two)
    two[1].write_bytes(b"")
    with pytest.raises(OutputDamaged, match="not a whole HDF5"):
        compare(*two)


def test_verb(two, capsys):
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    args = parser.parse_args([str(path) for path in two])
    assert verb.execute(args) == 0 and "are equal" in capsys.readouterr().out
    with h5py.File(two[1], "r+") as file:
        file["hit/score"][0] = 0.5
    assert verb.execute(args) == 1 and "/hit/score" in capsys.readouterr().out
