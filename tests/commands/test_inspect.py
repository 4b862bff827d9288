"""``inspect`` says in words what a file holds."""
import argparse

import h5py
import numpy as np
import pytest
from mockdata.hand_output import write_output
from mockdata.hand_result import empty_result, hand_result

from xfel_classify.commands import inspect as verb
from xfel_classify.commands.inspect import inspect_file
from xfel_classify.core import OutputDamaged, OutputError


@pytest.fixture
def summary(tmp_path):
    return write_output(tmp_path / "out")


def test_summary(summary):
    text = inspect_file(summary)
    for said in ("summary of a run", "mfxl1033223, run 95", "jungfrau", "complete: 6 events",
                 "hits: 3 (50.00 %)", "5  OK", "1  DAMAGED", "probability of a hit",
                 "photon_energy_eV  (6) float64 [eV]", "totals/mean", "model_name: sfx-hit",
                 "2.00 s  infer", "configuration"):
        assert said in text, said
    assert "NO_DETECTOR" not in text            # counts of zero are left out


def test_incomplete_and_empty_runs(tmp_path):
    result = hand_result(attributes={"complete": False, "events_expected": 40})
    assert "INCOMPLETE: 6 events, 40 expected" in inspect_file(
        write_output(tmp_path / "a", result))
    text = inspect_file(write_output(tmp_path / "b", empty_result(0)))
    assert "complete: 0 events" in text and "hits: 0\n" in text


def test_cxi(summary):
    text = inspect_file(summary.with_suffix(".cxi"))
    assert "CXI" in text and "3 frames of 16 x 16 pixels" in text and "run 95" in text
    assert "peaks a hit: 0 to 3, median 1" in text
    write_output(summary.parent, empty_result(2))
    assert "0 frames of 16 x 16" in inspect_file(summary.with_suffix(".cxi"))


def test_constants_and_foreign_files(tmp_path):
    with h5py.File(tmp_path / "constants.h5", "w") as file:
        file["jungfrau/pedestals"] = np.zeros((3, 2, 8, 16), np.float32)
        file["jungfrau/geometry"] = "# text"
    text = inspect_file(tmp_path / "constants.h5")
    assert "calibration constants" in text and "pedestals  (3 x 2 x 8 x 16) float32" in text
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["a/b"] = 1
    assert "another program" in inspect_file(tmp_path / "other.h5")


def test_directory(summary):
    text = inspect_file(summary.parent)
    assert "summary of a run" in text and ".lst" in text and ".geom" in text
    summary.parent.joinpath("sub").mkdir()
    assert "empty directory" in inspect_file(summary.parent / "sub")


def test_parts_of_an_unfinished_run(tmp_path):
    journal = pytest.importorskip("xfel_classify.pipeline.journal")
    writer = journal.PartWriter(tmp_path, 2, 1)
    writer.add({"timestamp": np.arange(5), "index": np.arange(5)})
    writer.keep(3, np.zeros((2, 8, 16), np.float32))
    writer.checkpoint({}, {})
    writer.close()
    text = inspect_file(tmp_path)
    assert "unfinished" in text and "rank0002.g1.journal: 5 events, 1 of them" in text
    assert "5 events are safe" in text


def test_no_such_file_and_no_hdf5(tmp_path):
    with pytest.raises(OutputError, match="does not exist"):
        inspect_file(tmp_path / "nothing.h5")
    (tmp_path / "half.h5").write_bytes(b"\x89HDF\r\n\x1a\n half")
    with pytest.raises(OutputDamaged, match="--resume"):
        inspect_file(tmp_path / "half.h5")


def test_verb(summary, capsys):
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    assert verb.execute(parser.parse_args([str(summary)])) == 0
    assert "summary of a run" in capsys.readouterr().out
