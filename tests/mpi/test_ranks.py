"""The event loop under a real mpirun: any number of ranks, and every way for one to end."""
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from xfel_classify.commands.compare import compare

pytestmark = pytest.mark.mpi

JOB = Path(__file__).with_name("tiny_job.py")
ENVIRONMENT = {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
               "OMPI_MCA_rmaps_base_oversubscribe": "1", "OMP_NUM_THREADS": "1"}

if shutil.which("mpirun") is None:
    pytest.skip("no mpirun on the path", allow_module_level=True)
pytest.importorskip("mpi4py")


def command(ranks, out, *options):
    return ["mpirun", "-n", str(ranks), sys.executable, str(JOB), str(out), *map(str, options)]


def launch(ranks, out, *options, timeout=120):
    return subprocess.run(command(ranks, out, *options), env=ENVIRONMENT, capture_output=True,
                          text=True, timeout=timeout)


@pytest.fixture(scope="module")
def serial(tmp_path_factory):
    out = tmp_path_factory.mktemp("serial")
    done = launch(1, out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize("ranks", [2, 5])
def test_content_does_not_depend_on_the_number_of_ranks(serial, tmp_path, ranks):
    done = launch(ranks, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "events 60 hits 30" in done.stdout
    for name in ("tiny_r0007.h5", "tiny_r0007.cxi"):
        assert compare(serial / name, tmp_path / "out" / name) == []


@pytest.mark.parametrize("events", [0, 1])
def test_more_ranks_than_events(tmp_path, events):
    done = launch(4, tmp_path, "--events", events)
    assert done.returncode == 0, done.stderr
    assert f"events {events} " in done.stdout


def test_an_error_on_one_rank_ends_all_with_its_traceback_and_stays_resumable(serial, tmp_path):
    done = launch(3, tmp_path, "--fail-at", 40, "--checkpoint", 0, "--pause", 0.01, timeout=60)
    assert done.returncode == 1
    assert "planted failure" in done.stderr and "in stage 'read'" in done.stderr
    assert not (tmp_path / "tiny_r0007.h5").exists()
    resume_and_compare(serial, tmp_path)


def resume_and_compare(serial, out, ranks=2):
    done = launch(ranks, out, "--mode", "resume")
    assert done.returncode == 0, done.stderr
    for name in ("tiny_r0007.h5", "tiny_r0007.cxi"):
        assert compare(serial / name, out / name) == []


@pytest.mark.parametrize("rank", [0, 2])
def test_kill_9_of_any_rank_ends_the_job_and_resumes_to_the_same_content(serial, tmp_path, rank):
    done = launch(3, tmp_path, "--kill-rank", rank, "--kill-after", 8, "--checkpoint", 0,
                  "--pause", 0.01, timeout=60)
    assert done.returncode not in (0, 3)
    assert not (tmp_path / "tiny_r0007.h5").exists()
    resume_and_compare(serial, tmp_path)


@pytest.mark.parametrize("told", ["one rank", "all ranks", "mpirun"])
def test_a_signal_flushes_and_exits_130(serial, tmp_path, told):
    """SIGTERM to ranks, or SIGUSR1 to mpirun, which passes that on and leaves them time."""
    job = subprocess.Popen(command(3, tmp_path, "--pause", 0.1), env=ENVIRONMENT,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    ranks = []
    for _ in range(100):
        time.sleep(0.1)
        children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        ranks = [int(pid) for pid in children]
        if len(ranks) == 3 and len(list(tmp_path.rglob("run.json"))) == 1:
            break
    time.sleep(1.0)
    if told == "mpirun":
        job.send_signal(signal.SIGUSR1)
    for pid in {"one rank": ranks[1:2], "all ranks": ranks, "mpirun": []}[told]:
        os.kill(pid, signal.SIGTERM)
    _, err = job.communicate(timeout=60)
    assert job.returncode == 130, err
    assert not (tmp_path / "tiny_r0007.h5").exists()
    assert list(tmp_path.rglob("*.journal"))
    resume_and_compare(serial, tmp_path)


@pytest.mark.slow
def test_sixty_four_ranks(serial, tmp_path):
    done = launch(64, tmp_path / "out", timeout=180)
    assert done.returncode == 0, done.stderr
    assert compare(serial / "tiny_r0007.h5", tmp_path / "out" / "tiny_r0007.h5") == []
