"""``doctor`` tells the truth about parts that are there, absent, crashing or hanging."""
from __future__ import annotations

import argparse
import os
from pathlib import Path

import pytest

from xfel_classify.commands import doctor


def test_a_child_answers_crashes_hangs_and_fails_in_words() -> None:
    assert doctor.probe("import json; print('noise'); print(json.dumps({'a': 1}))").values == {
        "a": 1}
    crashed = doctor.probe("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    assert crashed.values is None and crashed.failure == "crashed with SIGSEGV"
    hung = doctor.probe("import time; time.sleep(60)", timeout_s=0.5)
    assert hung.values is None and "no answer" in hung.failure
    absent = doctor.probe("import no_such_package_at_all")
    assert absent.values is None and "no_such_package_at_all" in absent.failure
    assert "unreadable" in doctor.probe("print('hello')").failure


def test_a_child_is_no_rank_and_does_not_import_from_the_working_directory(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "psana.py").write_text("raise SystemExit('imported from the working directory')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "3")
    answer = doctor.probe("""
        import json, os, sys
        print(json.dumps({"rank": os.environ.get("OMPI_COMM_WORLD_RANK"), "path": sys.path}))
    """)
    assert answer.values is not None and answer.values["rank"] is None
    assert "" not in answer.values["path"] and str(tmp_path) not in answer.values["path"]


def test_report_of_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    code = doctor.execute(argparse.Namespace())
    shown = capsys.readouterr().out
    for subject in ("python", "hdf5", "hdf5 filters", "onnxruntime", "torch", "compiled kernels",
                    "model", "mpirun", "psana", "gpu", "tensorrt", "cache", "threads per rank"):
        assert f" {subject} " in shown
    assert code == (1 if "FAIL" in shown else 0)
    assert code == 0, shown


def test_a_missing_model_fails_the_basic_job(tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "SECTIONS", (doctor.models,))
    monkeypatch.setattr(doctor, "probe", lambda code: doctor.Probe({"rows": []}))
    assert doctor.execute(argparse.Namespace()) == 1
    shown = capsys.readouterr().out
    assert "FAIL models" in shown and "XFEL_CLASSIFY_MODELS" in shown


def test_a_crashing_library_is_a_line_of_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "probe",
                        lambda code, timeout_s=1.0: doctor.Probe(None, "crashed with SIGSEGV"))
    (psana,) = doctor.psana()
    assert psana.state == "absent" and "SIGSEGV" in psana.found and "pip install" in psana.remedy
    (hdf5,) = doctor.hdf5()
    assert hdf5.state == "fault"


def test_psana_generations_are_told_apart(tmp_path: Path,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "psana.py").write_text("__version__ = '4.0.62'\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    original = doctor.child_environment
    monkeypatch.setattr(doctor, "child_environment",
                        lambda: original() | {"PYTHONPATH": str(tmp_path)})
    (finding,) = doctor.psana()
    assert "psana1" in finding.found and finding.state == "absent"
    (tmp_path / "psana.py").write_text("__version__ = 'x'\nxtc_version = 2\n")
    (finding,) = doctor.psana()
    assert "psana2" in finding.found and finding.state == "ok"


@pytest.mark.parametrize(("text", "flavour"), [
    ("mpirun (Open MPI) 4.1.4", "Open MPI"),
    ("HYDRA build details:\n    Version:      4.0.2", "MPICH"),
    ("Intel(R) MPI Library for Linux* OS, Version 2021.9", "Intel MPI"),
])
def test_mpirun_flavours(text: str, flavour: str, tmp_path: Path,
                         monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "mpirun"
    fake.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    mpirun = doctor.find_mpirun()
    assert mpirun is not None and mpirun.flavour == flavour
    assert ("--oversubscribe" in mpirun.command(4)) == (flavour == "Open MPI")
    assert mpirun.command(4)[1:3] == ["-n", "4"]


def test_no_mpirun_is_not_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.find_mpirun() is None
    findings = list(doctor.mpi())
    assert findings[-1].subject == "mpirun" and findings[-1].state == "absent"


def test_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XFEL_CLASSIFY_CACHE", str(tmp_path / "file" / "below"))
    finding = next(iter(doctor.caches()))
    assert finding.state == "absent" and "XFEL_CLASSIFY_CACHE" in finding.remedy
    monkeypatch.setenv("XFEL_CLASSIFY_CACHE", str(tmp_path / "new"))
    assert next(iter(doctor.caches())).state == "ok"
    assert not (tmp_path / "new").exists()


def test_too_many_threads_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1000")
    (finding,) = doctor.threads()
    assert finding.state == "absent" and "OMP_NUM_THREADS=" in finding.remedy
