"""psana2 under mpirun: roles, sharing, interruption, damage; and nothing hangs."""
from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from xfel_classify.core import EventStatus

pytest.importorskip("psana", reason="psana2 is not installed")
if shutil.which("mpirun") is None:
    pytest.skip("mpirun is not installed", allow_module_level=True)

from mockdata import xtc2_runs as mock

pytestmark = [pytest.mark.psana, pytest.mark.mpi]
RANK = Path(__file__).with_name("psana2_rank.py")
ROOT = Path(__file__).resolve().parents[2]
EVENTS = 24


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """24 events, 2 segments in 2 streams; one damaged, one without images."""
    folder = tmp_path_factory.mktemp("run")
    mock.write_run(folder, mock.Run(events=EVENTS, segments=2, streams=2, steps=2,
                                    damage={5: 4}, missing={9: (0, 1)}))
    mock.write_constants(folder / "constants.h5", 2)
    return folder


@pytest.fixture
def launch(tmp_path):
    """Start ranks; returns (answers by rank, exit code, text).  ``within`` bounds a hang."""

    def start(ranks: int, directory: Path, environment: dict[str, str] | None = None,
              config: dict | None = None, within: float = 60, **options):
        options["config"] = config or {"exp": "cxitst42", "run": 7, "dir": str(directory),
                                       "constants": str(directory / "constants.h5"),
                                       "batch_size": 2}
        out = tmp_path / f"out{time.monotonic_ns()}"
        out.mkdir()
        command = [sys.executable, str(RANK), str(out), json.dumps(options)]
        if ranks:
            command = ["mpirun", "-n", str(ranks), "--oversubscribe", *command]
        variables = {**os.environ, **(environment or {}), "OMPI_ALLOW_RUN_AS_ROOT": "1",
                     "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
                     "PYTHONPATH": os.pathsep.join(filter(None, [
                         str(ROOT), os.environ.get("PYTHONPATH")]))}
        done = subprocess.run(command, capture_output=True, text=True, timeout=within,
                              env=variables,
                              check=False, stdin=subprocess.DEVNULL)
        answers = [json.loads(p.read_text()) for p in sorted(out.glob("rank*.json"))]
        answers.sort(key=lambda a: a["rank"])
        return answers, done.returncode, done.stdout + done.stderr

    return start


def rows(answers: list[dict]) -> list[list]:
    return sorted(row for answer in answers for row in answer["seen"])


@pytest.fixture(scope="module")
def serial(run, tmp_path_factory) -> list[list]:
    out = tmp_path_factory.mktemp("serial")
    options = {"config": {"exp": "cxitst42", "run": 7, "dir": str(run),
                          "constants": str(run / "constants.h5")}}
    subprocess.run([sys.executable, str(RANK), str(out), json.dumps(options)], check=True,
                   timeout=60, capture_output=True, cwd=ROOT,
                   env={**os.environ, "PYTHONPATH": str(ROOT)})
    return rows([json.loads((out / "rank0.json").read_text())])


@pytest.mark.parametrize("ranks", [3, 4])
def test_every_rank_count_sees_the_same_run(run, launch, serial, ranks):
    answers, code, text = launch(ranks, run)
    assert code == 0, text
    assert [a["works"] for a in answers] == [False, False] + [True] * (ranks - 2)
    assert all(a["expected"] == EVENTS and a["distributes"] for a in answers)
    assert len(serial) == EVENTS and rows(answers) == serial
    assert not answers[0]["seen"] and not answers[1]["seen"]
    if ranks == 4:      # a small batch size spreads even few events over the ranks
        assert all(a["seen"] for a in answers[2:])
    assert len({a["identity"] for a in answers if a["works"]}) == 1


def test_two_ranks_are_refused_at_once(run, launch):
    answers, _, _ = launch(2, run, within=30)
    assert len(answers) == 2
    assert all("needs 1, or at least 3" in a["error"] for a in answers)


def test_server_and_builder_ranks_do_not_work(run, launch, serial):
    answers, code, text = launch(6, run, {"PS_SRV_NODES": "1", "PS_EB_NODES": "2"})
    assert code == 0, text
    assert [a["works"] for a in answers] == [False, False, False, True, True, False]
    assert rows(answers) == serial


def test_an_mfx_experiment_sets_its_own_builders(launch, tmp_path):
    """psana2 overrides PS_EB_NODES for experiments called mfx...: 3 ranks are enough."""
    mock.write_run(tmp_path / "run", mock.Run(exp="mfxtst42", events=4))
    config = {"exp": "mfxtst42", "run": 7, "dir": str(tmp_path / "run"), "calibrated": True}
    answers, code, text = launch(3, tmp_path, {"PS_EB_NODES": "2"}, config)
    assert code == 0, text
    assert [len(a["seen"]) for a in answers] == [0, 0, 4], answers


@pytest.mark.parametrize(("variables", "message"), [
    ({"PS_SRV_NODES": "2"}, "at least 5"),
    ({"PS_EB_NODES": "two"}, "PS_EB_NODES = 'two'"),
])
def test_roles_that_leave_nobody_to_work_are_refused(run, launch, variables, message):
    answers, *_ = launch(3, run, variables)
    assert len(answers) == 3 and all(message in a["error"] for a in answers)


def test_interruption_ends_all_ranks(run, launch):
    """A bare break in psana2's event loop would leave the job hanging."""
    answers, code, text = launch(4, run, stop_after=2, within=40)
    assert code == 0, text
    assert len(answers) == 4
    seen = [row[0] for row in rows(answers)]
    assert 2 <= len(seen) <= 2 * 2 and len(set(seen)) == len(seen)


def test_one_rank_leaving_does_not_hang_the_others(run, launch, serial):
    answers, code, text = launch(4, run, leave_after=1, leavers=[2])
    assert code == 0, text
    assert len(answers[2]["seen"]) == 1
    assert set(map(str, rows(answers))) <= set(map(str, serial))


def test_constants_that_psana_distributes(run, launch, serial):
    """One rank asks the database; psana shares the answer through memory of the node."""
    config = {"exp": "cxitst42", "run": 7, "dir": str(run)}
    answers, code, text = launch(4, run, config=config, database=str(run / "constants.h5"))
    assert code == 0, text
    from_file, *_ = launch(0, run)
    assert rows(answers) == serial
    assert {a["identity"] for a in answers if a["works"]} == {from_file[0]["identity"]}


def test_a_rank_that_fails_ends_the_job_with_its_traceback(run, launch):
    config = {"exp": "cxitst42", "run": 7, "dir": str(run)}
    _, code, text = launch(4, run, config=config, within=40, database=str(run / "constants.h5"),
                           fail_after=1)
    assert code != 0 and "planted failure" in text


def test_resuming_reads_only_what_is_missing(run, launch, serial):
    todo = [1, 2, 9, 17, 23]
    answers, code, text = launch(4, run, todo=todo)
    assert code == 0, text
    assert rows(answers) == [serial[i] for i in todo]


def test_nothing_left_to_do_reads_nothing(run, launch):
    """An empty filter means "all events" to psana2."""
    answers, code, text = launch(4, run, todo=[])
    assert code == 0, text
    assert rows(answers) == []


def test_truncated_big_data_under_mpi(run, launch, serial, tmp_path):
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    path = copy / "cxitst42-r0007-s002-c000.xtc2"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 5_000_000)
    answers, code, text = launch(4, copy)
    assert code == 0, text
    found = rows(answers)
    assert [row[0] for row in found] == list(range(EVENTS))
    assert found[:19] == serial[:19]
    assert {row[2] for row in found[19:]} == {int(EventStatus.UNREADABLE)}
    assert all(any("stream s002" in n for n in a["notes"]) for a in answers)


def test_a_missing_stream_is_refused_on_every_rank(run, launch, tmp_path):
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    (copy / "cxitst42-r0007-s002-c000.xtc2").unlink()
    answers, _, _ = launch(4, copy, within=30)
    assert len(answers) == 4
    assert all(a["error"].startswith("RunNotFound") for a in answers)


def test_repeated_times_are_refused_when_ranks_share_them(launch, tmp_path):
    times = [mock.START + t for t in (1000, 2000, 2000, 3000)]
    mock.write_run(tmp_path / "run", mock.Run(events=4, times=times))
    mock.write_constants(tmp_path / "run/constants.h5", 1)
    answers, *_ = launch(3, tmp_path / "run")
    assert all("run without mpirun" in a["error"] for a in answers) and len(answers) == 3


def test_one_file_is_shared_by_claim(run, launch):
    """psana2 itself would give every event to every rank."""
    config = {"files": [str(run / "cxitst42-r0007-s001-c000.xtc2")]}
    answers, code, text = launch(2, run, config=config)
    assert code == 0, text
    assert not any(a["distributes"] for a in answers)
    assert [row[0] for row in rows(answers)] == list(range(EVENTS - 1))     # one has no image
    assert all(a["seen"] for a in answers)


def test_psana_without_mpi_under_mpirun_is_shared_by_claim(run, launch, serial):
    answers, code, text = launch(2, run, {"PS_PARALLEL": "none"})
    assert code == 0, text
    assert rows(answers) == serial and all(a["seen"] for a in answers)
