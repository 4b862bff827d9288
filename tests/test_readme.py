"""What the documents say is true: their blocks run, the commands in them exist.

A fenced block after ``<!-- run -->`` is executed, one after ``<!-- save NAME -->`` is written to a
file of that name; all blocks of a document share one directory and run in order.
"""
from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "CONTRIBUTING.md")
SCRIPTS = sorted((ROOT / "mpi_jobs").glob("*.sh"))
BLOCK = re.compile(r"^<!-- (run|save [\w.-]+) -->\n```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def environment(directory: Path) -> dict[str, str]:
    """PATH with the commands ``python`` and ``xfel-classify`` of this interpreter."""
    programs = directory / "bin"
    programs.mkdir(exist_ok=True)
    python = shlex.quote(sys.executable)
    for name, call in {"python": python, "xfel-classify": f"{python} -m xfel_classify.cli"}.items():
        (programs / name).write_text(f'#!/bin/sh\nexec {call} "$@"\n')
        (programs / name).chmod(0o755)
    return os.environ | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
                         "PYTHONPATH": str(ROOT)}


@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS)
def test_blocks_run(document: str, tmp_path: Path) -> None:
    blocks = BLOCK.findall((ROOT / document).read_text(encoding="utf-8"))
    assert any(what == "run" for what, _, _ in blocks), f"{document} has no block to run"
    place = tmp_path / "blocks"
    place.mkdir()
    for what, language, text in blocks:
        saved = place / (what.removeprefix("save ") if what != "run" else f"block.{language}")
        saved.write_text(text, encoding="utf-8")
        if language in ("toml", "text"):
            continue
        command = {"sh": ["bash", "-euo", "pipefail", saved.name],
                   "python": [sys.executable, saved.name]}[language]
        done = subprocess.run(command, cwd=place, env=environment(tmp_path), text=True, check=False,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=240)
        assert done.returncode == 0, f"{document}:\n{text}\n--- said ---\n{done.stdout[-4000:]}"


@functools.cache
def help_of(*words: str) -> str:
    from xfel_classify.cli import main

    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit) as exit_:
        main([*words, "--help"])
    assert exit_.value.code == 0
    return shown.getvalue()


def commands(text: str) -> list[list[str]]:
    """Words of every ``xfel-classify VERB ...`` in ``text``, to the end of its line or span."""
    joined = re.sub(r"\\\n\s*", " ", text)
    return [match.split() for match in re.findall(
        r"xfel-classify ([a-z][\w-]*[^\n`\"|;&)]*)", joined)]


@pytest.mark.parametrize("path", [*(ROOT / name for name in DOCUMENTS), *SCRIPTS,
                                  ROOT / "mpi_jobs" / "README.md", ROOT / "Makefile"],
                         ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_exist_with_their_options(path: Path) -> None:
    from xfel_classify.cli import verbs

    for verb, *words in commands(path.read_text(encoding="utf-8")):
        assert verb in verbs(), f"{path.name}: there is no verb {verb}"
        options = {match.group() for word in words
                   if (match := re.match(r"--?[a-z][a-z-]*", word.lstrip("[(")))}
        missing = {o for o in options if not re.search(rf"(?<![\w-]){o}(?![\w-])", help_of(verb))}
        assert not missing, f"{path.name}: xfel-classify {verb} has no {', '.join(missing)}"


@pytest.mark.parametrize("path", [*SCRIPTS, ROOT / ".ci" / "run", ROOT / ".ci" / "venv"],
                         ids=lambda path: path.name)
def test_scripts_are_valid_bash_and_stop_at_errors(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True)
    assert "set -euo pipefail" in path.read_text(encoding="utf-8")
    assert os.access(path, os.X_OK)


def test_links_between_documents_lead_somewhere() -> None:
    for name in (*DOCUMENTS, "mpi_jobs/README.md"):
        here = ROOT / name
        for target in re.findall(r"\]\(([^)#:]+)\)", here.read_text(encoding="utf-8")):
            assert (here.parent / target).exists(), f"{name} links to {target}, which is not there"


def stub(directory: Path, name: str) -> None:
    (directory / name).write_text('#!/bin/sh\necho "$0" "$@"\n')
    (directory / name).chmod(0o755)


def test_slurm_script_resumes_unless_told_otherwise(tmp_path: Path) -> None:
    stub(tmp_path, "mpirun")
    path = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "SLURM_NTASKS": "7"}

    def said(*words: str) -> str:
        return subprocess.run(["bash", ROOT / "mpi_jobs" / "slurm.sh", *words], env=path, text=True,
                              capture_output=True, check=True).stdout.strip()

    first = said("95", "--exp", "abc")
    assert first.endswith("-n 7 xfel-classify run 95 --exp abc --resume")
    assert said("95", "--resume").endswith("run 95 --resume")
    assert said("95", "--overwrite").endswith("run 95 --overwrite")


def test_workflow_script_submits_the_run_it_is_told(tmp_path: Path) -> None:
    stub(tmp_path, "sbatch")
    path = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
                         "EXPERIMENT": "mfxl1033223", "RUN_NUM": "95"}
    said = subprocess.run(["bash", ROOT / "mpi_jobs" / "arp.sh", "--peaks", "none"], env=path,
                          text=True, capture_output=True, check=True).stdout
    assert "slurm.sh 95 --exp mfxl1033223 -o ./mfxl1033223_r0095 --peaks none" in said


def test_slurm_script_hands_the_warning_on_to_the_ranks(tmp_path: Path) -> None:
    """As SIGUSR1 to mpirun: SIGTERM would make it kill the ranks before they have flushed."""
    (tmp_path / "mpirun").write_text(
        "#!/bin/bash\n"
        "trap 'echo mpirun was told to end; exit 1' TERM\n"
        "trap 'echo passed on; exit 130' USR1\n"
        "echo ready; while :; do sleep 0.1; done\n")
    (tmp_path / "mpirun").chmod(0o755)
    path = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    with subprocess.Popen(["bash", ROOT / "mpi_jobs" / "slurm.sh", "95"], env=path, text=True,
                          stdout=subprocess.PIPE) as job:
        assert job.stdout is not None and job.stdout.readline() == "ready\n"
        time.sleep(0.5)
        job.terminate()
        said, _ = job.communicate(timeout=30)
    assert said == "passed on\n" and job.returncode == 130
