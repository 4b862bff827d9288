"""The demo ends well with and without psana, and its table is computed right."""
from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from xfel_classify.commands import demo, doctor
from xfel_classify.core import OutputDamaged, OutputExists, OutputFull

STAMPS = np.array([40, 10, 30, 20, 50], np.int64)
TRUE_HITS = np.array([1, 1, 0, 0, 1], np.uint8)      # of 40, 10, 30, 20, 50


def write_truth(path: Path) -> Path:
    with h5py.File(path, "w") as file:
        file["timestamp"], file["is_hit"] = STAMPS, TRUE_HITS
    return path


def write_summary(path: Path, stamps: list[int], status: list[int], label: list[int],
                  finder: list[int]) -> Path:
    with h5py.File(path, "w") as file:
        file["timestamp"], file["status"] = np.array(stamps), np.array(status, np.uint8)
        file["hit/label"], file["peaks/hit"] = np.array(label, np.int8), np.array(finder, np.int8)
        file.attrs["hits"] = sum(value == 1 for value in label)
        file["timing/stage"] = ["read", "calibrate"]
        file["timing/seconds"] = np.array([[1.0, 2.0], [0.5, 0.5], [0.0, 0.0]])
        file["timing/events"], file["timing/wall_s"] = np.array([3, 2, 0]), np.array([4.0, 2.0, 0])
    return path


def test_answers_are_compared_by_time_stamp(tmp_path: Path) -> None:
    score = demo.compare(write_truth(tmp_path / "truth.h5"), write_summary(
        tmp_path / "summary.h5", [10, 20, 30, 40, 50], [0, 0, 0, 0, 0],
        label=[1, 0, 1, 1, 0], finder=[1, 0, 0, 1, 1]))
    assert (score.events, score.rows, score.unusable, score.true_hits) == (5, 5, 0, 3)
    assert score.answers["network"] == (pytest.approx(2 / 3), pytest.approx(1 / 2))
    assert score.answers["finder"] == (1.0, 1.0)
    assert score.stages == {"read": 1.5, "calibrate": 2.5}
    assert score.loop_s == 4.0 and score.ranks == 2 and score.stages["read"] == 1.5


def test_missing_invented_and_unusable_rows_show(tmp_path: Path) -> None:
    score = demo.compare(write_truth(tmp_path / "truth.h5"), write_summary(
        tmp_path / "summary.h5", [10, 20, 35, 40], [0, 0, 0, 1],
        label=[1, 0, 1, -1], finder=[1, 0, 1, -1]))
    assert score.rows == 3 and score.unusable == 1
    assert score.answers["network"] == (1.0, 1.0)      # of the usable events that were simulated
    table = "\n".join(demo.report(score, 1.0, 2.0, tmp_path))
    assert "5 / 3 (1 without a usable image)" in table and "summary.h5" in table


def test_no_hit_at_all_is_not_a_number(tmp_path: Path) -> None:
    assert math.isnan(demo.fraction(np.array([True]), np.array([False])))


def test_a_run_without_output_says_so(tmp_path: Path) -> None:
    with pytest.raises(OutputDamaged, match=r"gone\.h5"):
        demo.compare(write_truth(tmp_path / "truth.h5"), tmp_path / "gone.h5")


def test_a_directory_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputExists, match="--out"):
        demo.fresh_directory(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    mine = demo.fresh_directory(tmp_path / "demo")
    (mine / "results").mkdir()
    (mine / "notes.txt").write_text("kept")
    again = demo.fresh_directory(mine)
    assert not (again / "results").exists() and (again / "notes.txt").exists()


def test_without_mpirun_or_psana_the_serial_way_is_taken(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    mpirun = doctor.Mpirun("/opt/bin/mpirun", "MPICH", "4.1")
    psana2 = doctor.Probe({"generation": 2})
    for found, seen, word in ((None, psana2, "no mpirun"),
                              (mpirun, doctor.Probe(None, "No module named 'psana'"), "psana2"),
                              (mpirun, doctor.Probe({"generation": 1}), "psana1")):
        monkeypatch.setattr(demo, "find_mpirun", lambda found=found: found)
        monkeypatch.setattr(demo, "probe", lambda code, seen=seen: seen)
        assert demo.parallel() is None
        assert word in capsys.readouterr().out
    monkeypatch.setattr(demo, "probe", lambda code: psana2)
    assert demo.parallel() == mpirun


def test_a_full_disk_is_noticed_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(OutputFull, match="--events"):
        demo.check_room(tmp_path, 10**9, 8)
    demo.check_room(tmp_path, 1, 1)


def run_demo(tmp_path: Path, *options: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "xfel_classify.cli", "demo", "--segments", "1", "--events", "24",
         *options], cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        timeout=280, check=False,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])})
    assert done.returncode == 0, done.stdout
    return done.stdout


def check_demo(tmp_path: Path, said: str) -> None:
    assert "24 / 24" in said and "sensitivity" in said and "where the time went" in said
    results = tmp_path / "demo" / "results"
    names = {path.name for path in results.iterdir()}
    stem = f"{demo.EXP}_r0095"
    assert {f"{stem}.h5", f"{stem}.cxi", f"{stem}.lst", f"{stem}.geom", f"{stem}_hits.npy",
            f"{stem}_hits.txt"} <= names
    assert all(name in said for name in names)
    with h5py.File(results / f"{stem}.h5") as file:
        assert bool(file.attrs["complete"]) and len(file["timestamp"]) == 24


@pytest.mark.slow
def test_serial_demo(tmp_path: Path) -> None:
    check_demo(tmp_path, run_demo(tmp_path, "--serial"))


@pytest.mark.slow
@pytest.mark.psana
@pytest.mark.mpi
def test_demo_with_psana_and_mpirun(tmp_path: Path) -> None:
    if demo.parallel() is None:
        pytest.skip("psana2 or MPI is not here")
    said = run_demo(tmp_path)
    check_demo(tmp_path, said)
    assert "mpirun -n 4" in said and "2 working ranks" in said
