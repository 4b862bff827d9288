"""Simulate run 95, classify it as one would at the beamline, and compare with the truth.

With psana2 and MPI the run is written as xtc2 files and read by four ranks of psana2; without,
as HDF5 files, read by one process.  The comparison is with the list of hits that were simulated.
"""
from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ..core import OutputDamaged, OutputExists, OutputFull, SourceError
from .doctor import Mpirun, find_mpirun, probe
from .simulate import write_run

EXP, RUN = "mfxdemo95", 95
MARKER = ".xfel-classify-demo"
"""File that marks a directory as one the demo made, and may thus empty."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="demo", metavar="DIR",
                        help="directory for the run and its results (default: demo)")
    parser.add_argument("--segments", type=int, choices=(1, 2, 8), default=2,
                        help="panels of the Jungfrau; 8 = the full 4M detector (default: 2)")
    parser.add_argument("--events", type=int, default=240, metavar="N",
                        help="events to simulate (default: 240)")
    parser.add_argument("--ranks", type=int, default=4, metavar="N",
                        help="MPI ranks; psana2 keeps two of them for itself (default: 4)")
    parser.add_argument("--serial", action="store_true",
                        help="take HDF5 files and one process even if psana and MPI are here")
    parser.add_argument("--seed", type=int, default=95, help="of the simulation (default: 95)")


def execute(args: argparse.Namespace) -> int:
    """0 when every simulated event has its row; otherwise the exit code of the run, or 3."""
    out = fresh_directory(Path(args.out))
    check_room(out, args.events, args.segments)
    mpirun = None if args.serial else parallel()
    say(f"1. simulating run {RUN}: {args.events} events of a Jungfrau with {args.segments} "
        f"panel{'s' if args.segments > 1 else ''} as {'xtc2' if mpirun else 'HDF5'} files")
    started = time.monotonic()
    run = write_run(out / "run", form="xtc2" if mpirun else "hdf5", events=args.events,
                    segments=args.segments, seed=args.seed, number=RUN, exp=EXP, preset="demo")
    simulated_s = time.monotonic() - started
    what = [str(RUN), "--exp", EXP, "--dir", str(out / "run")] if mpirun else map(str, run.files)
    command = [*(mpirun.command(args.ranks) if mpirun else []), *program(), "run", *what,
               "--constants", str(run.constants), "-o", str(out / "results")]
    say(f"2. {shown(command)}")
    started = time.monotonic()
    try:
        done = subprocess.run(command, env=mpirun.environment() if mpirun else None, text=True,
                              stdout=subprocess.PIPE, check=False)
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    code = done.returncode
    run_s = time.monotonic() - started
    if code:
        say(f"{done.stdout}the run ended with exit code {code}")
    if code not in (0, 3):
        return code
    say("3. comparing with the truth\n")
    score = compare(run.truth, out / "results" / f"{EXP}_r{RUN:04d}.h5")
    print("\n".join(report(score, simulated_s, run_s, out / "results")), flush=True)
    return code or (0 if score.rows == score.events else 3)


def say(text: str) -> None:
    print(text, flush=True)


def fresh_directory(out: Path) -> Path:
    """``out`` without the results of an earlier demo; anything else in there is left alone."""
    if out.exists() and any(out.iterdir()) and not (out / MARKER).exists():
        raise OutputExists(f"{out} was to hold the demo, but holds something else; remove it or "
                           "choose another directory with --out")
    for name in ("run", "results"):
        shutil.rmtree(out / name, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).touch()
    return out


def check_room(out: Path, events: int, segments: int) -> None:
    """Raise :class:`OutputFull` when run and results will not fit."""
    pixels = segments * 512 * 1024
    raw, hits, constants = 2 * pixels * events, 4 * pixels * events * 0.6, 60 * pixels
    needed, free = raw + hits + 2 * constants, shutil.disk_usage(out).free
    if free < needed:
        raise OutputFull(f"the demo needs about {size(needed)} in {out}, there are {size(free)}; "
                         "ask for fewer --events, or choose another directory with --out")


def size(count: float) -> str:
    """Bytes for a reader."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def parallel() -> Mpirun | None:
    """The mpirun to use, or None (with a word why) when psana2 or MPI are not here."""
    mpirun = find_mpirun()
    seen = probe("""
        import json, psana, mpi4py.MPI
        print(json.dumps({"generation": getattr(psana, "xtc_version", 1)}))
    """)
    why = ""
    if mpirun is None:
        why = "there is no mpirun"
    elif seen.values is None:
        why = f"psana2 cannot be used ({seen.failure})"
    elif seen.values["generation"] != 2:
        why = "the psana here is psana1"
    if why:
        say(f"{why}: taking the serial way over HDF5 files; xfel-classify doctor says what would "
            "help")
        return None
    return mpirun


def program() -> list[str]:
    """The command ``xfel-classify`` of this very installation."""
    script = Path(sys.executable).with_name("xfel-classify")
    return [str(script)] if script.exists() else [sys.executable, "-m", "xfel_classify.cli"]


def shown(command: list[str]) -> str:
    """The command as a user would type it."""
    words = [Path(word).name if word == program()[0] or word.endswith(("mpirun", "mpiexec"))
             else word for word in command]
    return shlex.join(words)


@dataclass(frozen=True)
class Score:
    """A run compared with its truth.

    ``answers`` maps "network" and "finder" to (sensitivity, specificity), NaN without events.
    ``stages`` maps each named stage to its seconds, added up over ranks; ``loop_s`` is the time
    of the slowest rank in the event loop, without the start of its engine.
    """

    events: int
    rows: int
    unusable: int
    true_hits: int
    hits: int
    answers: dict[str, tuple[float, float]]
    stages: dict[str, float]
    loop_s: float
    ranks: int


def compare(truth: Path, summary: Path) -> Score:
    """Join a summary with the truth by time stamp.

    Raises :class:`SourceError` or :class:`OutputDamaged` when a file is not what it should be.
    """
    if not summary.exists():
        raise OutputDamaged(f"the run was to write {summary}, but it is not there; its messages "
                            "above say why")
    try:
        with h5py.File(truth) as file:
            true_stamps, true_hit = file["timestamp"][:], file["is_hit"][:].astype(bool)
    except (OSError, KeyError) as error:
        raise SourceError(f"{truth} is not a list of simulated hits ({error}); simulate the run "
                          "again") from error
    with h5py.File(summary) as file:
        stamps, status = file["timestamp"][:], file["status"][:]
        columns = {name: file[path][:] for name, path in
                   (("network", "hit/label"), ("finder", "peaks/hit")) if path in file}
        timing = {name: dataset[()] for name, dataset in file["timing"].items()}
        hits = int(file.attrs["hits"])
    order = np.argsort(true_stamps)
    position = np.searchsorted(true_stamps, stamps, sorter=order).clip(max=len(order) - 1)
    known = true_stamps[order[position]] == stamps
    is_hit = true_hit[order[position]]
    usable = known & (status == 0)
    answers = {}
    for name, labels in columns.items():
        positive = labels == 1
        answers[name] = (fraction(positive, usable & is_hit),
                         fraction(~positive, usable & ~is_hit))
    unusable = int((known & (status != 0)).sum())
    return Score(len(true_stamps), len(np.unique(stamps[known])), unusable, int(true_hit.sum()),
                 hits, answers, *_times(timing))


def fraction(true: np.ndarray, among: np.ndarray) -> float:
    """Share of ``true`` among the selected; NaN when none is selected."""
    return float(true[among].mean()) if among.any() else float("nan")


def _times(timing: dict[str, Any]) -> tuple[dict[str, float], float, int]:
    """(seconds of each stage, seconds of the slowest rank without its start, working ranks)."""
    names = [n.decode() if isinstance(n, bytes) else str(n) for n in timing["stage"]]
    seconds = timing["seconds"]
    starting = seconds[:, [name.startswith("start ") for name in names]].sum(axis=1)
    stages = {name: float(s) for name, s in zip(names, seconds.sum(axis=0), strict=True)}
    loop_s = float((timing["wall_s"] - starting).max(initial=0.0))
    return stages, loop_s, int((timing["events"] > 0).sum())


def report(score: Score, simulated_s: float, run_s: float, results: Path) -> Iterator[str]:
    """The summary that the demo ends with, line by line."""
    def row(name: str, value: str) -> str:
        return f"{name:<26}{value}"

    yield row("events in / rows out", f"{score.events} / {score.rows}"
              + (f" ({score.unusable} without a usable image)" if score.unusable else ""))
    yield row("hits simulated / found", f"{score.true_hits} / {score.hits}  (hit rate "
              f"{score.true_hits / max(score.events, 1):.1%} / "
              f"{score.hits / max(score.rows, 1):.1%})")
    yield row("", "sensitivity  specificity")
    for name, (sensitivity, specificity) in score.answers.items():
        yield row(f"  {name}", f"{sensitivity:11.3f}  {specificity:11.3f}")
    rate = score.rows / score.loop_s if score.loop_s else float("nan")
    working = f"{score.ranks} working rank{'s' if score.ranks > 1 else ''}"
    yield row("speed", f"{rate:.1f} events/s with {working}, without start-up and join")
    yield row("wall time", f"{simulated_s:.1f} s to simulate, {run_s:.1f} s to classify with "
              "start-up and output")
    total = sum(score.stages.values())
    yield f"where the time went ({total:.1f} s, ranks added up)"
    for name, seconds in sorted(score.stages.items(), key=lambda item: -item[1]):
        if seconds >= 0.005 * total:
            yield row(f"  {name}", f"{seconds:8.2f} s  {seconds / total:5.1%}")
    yield f"files in {results}"
    for path in sorted(p for p in results.iterdir() if p.is_file()):
        yield row(f"  {path.name}", f"  {size(path.stat().st_size)}")
