"""Two processes train one network on CPUs (gloo); GPUs and NCCL are not part of this."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from mockdata.toy_training import RECIPE

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")
pytestmark = [pytest.mark.torch, pytest.mark.slow]

HERE = Path(__file__).parent


def launched(what, place, text):
    place.mkdir(exist_ok=True)
    (place / "recipe.toml").write_text(text)
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
         "2", str(HERE / "team_script.py"), what, str(place)],
        capture_output=True, text=True, timeout=200, check=False,
        env={**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1",
             "XFEL_CLASSIFY_CACHE": str(place / "cache")})


# Exit codes are not looked at: once in some thirty starts torch aborts a process while it takes its
# threads down, after everything is done.

def test_averaged_gradients_are_those_of_the_whole_batch(tmp_path):
    done = launched("gradients", tmp_path / "two", RECIPE)
    assert done.stdout.count("all as expected") == 2, done.stderr[-3000:]


def test_two_processes_train_one_network(tmp_path):
    done = launched("train", tmp_path / "two", RECIPE)
    assert done.stdout.count("in 2 processes") == 1, done.stderr[-3000:]    # the first one speaks
    assert (tmp_path / "two" / "out" / "validation.npz").exists()
    history = json.loads((tmp_path / "two" / "out" / "history.json").read_text())
    assert len(history) == 2 and history[-1]["loss"] < history[0]["loss"]


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path):
    done = launched("train", tmp_path / "odd", RECIPE.replace("batch = 8", "batch = 7"))
    assert done.returncode != 0
    assert "2 processes were to share minibatches of 7" in done.stderr
