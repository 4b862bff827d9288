"""The programs of examples/ run as they are, on simulated runs."""
from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from xfel_classify.commands.doctor import find_mpirun, probe

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
EVENTS = 12

pytestmark = pytest.mark.slow


def run(words: list[str | Path], directory: Path, **variables: str) -> str:
    done = subprocess.run([str(word) for word in words], cwd=directory, text=True, timeout=240,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
                          env=os.environ | {"PYTHONPATH": str(ROOT)} | variables)
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def simulated(directory: Path, form: str) -> Path:
    run([sys.executable, "-m", "xfel_classify.cli", "simulate", "sfx", "--out", directory,
         "--format", form, "--segments", "1", "--events", str(EVENTS)], directory)
    return directory


def test_all_examples_are_run_here() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {
        "plain_arrays", "archived_run", "psana2_smalldata"}


def test_plain_arrays(tmp_path: Path) -> None:
    said = run([sys.executable, EXAMPLES / "plain_arrays.py"], tmp_path)
    assert len(re.findall(r"^image \d: score [01]\.\d+ (?:hit|miss)$", said, re.MULTILINE)) == 6


def test_archived_run(tmp_path: Path) -> None:
    directory = simulated(tmp_path, "hdf5")
    said = run([sys.executable, EXAMPLES / "archived_run.py", *directory.glob("*-r0095.h5"),
                "--constants", directory / "constants.h5"], tmp_path)
    assert f"hits in {EVENTS} events, 0 without a usable image" in said


# what a site's network gives: the list of files and the constants of the run
OFF_SITE = """
import runpy, sys
from pathlib import Path
from xfel_classify.detectors import load_constants
from xfel_classify.sources.psana2_open import network_guard

def provider(uniqueid, exp=None, run=None, **options):
    if "jungfrau" not in uniqueid:
        return {}
    found = load_constants(Path(constants), "jungfrau", "jungfrau", (1, 512, 1024))
    return {name: (value, {"from": constants}) for name, value in found.items()}

constants, *sys.argv = sys.argv[1:]
with network_guard(provider, []):
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.psana
@pytest.mark.mpi
@pytest.mark.parametrize("ranks", [1, 4])
def test_psana2_smalldata(ranks: int, tmp_path: Path) -> None:
    if probe("import json, psana; print(json.dumps(psana.xtc_version))").values != 2:
        pytest.skip("psana2 is not installed")
    directory = simulated(tmp_path, "xtc2")
    exp = next(directory.glob("*-r*-s*-c000.xtc2")).name.partition("-")[0]
    (tmp_path / "off_site.py").write_text(OFF_SITE)
    words: list[str | Path] = [sys.executable, tmp_path / "off_site.py",
                               directory / "constants.h5", EXAMPLES / "psana2_smalldata.py",
                               exp, "95", "--dir", directory]
    variables = {}
    if ranks > 1:
        mpirun = find_mpirun()
        if mpirun is None:
            pytest.skip("mpirun is not installed")
        words = [*mpirun.command(ranks), *words]
        variables = mpirun.environment() | {"PS_SRV_NODES": "1"}
    run(words, tmp_path, **variables)
    with h5py.File(tmp_path / "smalldata.h5") as file:
        assert len(np.unique(file["timestamp"][:])) == EVENTS
        assert (file["status"][:] == 0).all()
        assert ((file["hit_score"][:] >= 0) & (file["hit_score"][:] <= 1)).all()
