"""Check that an output is complete and that its files agree.

Reads the files as any outsider would, with h5py and numpy alone, and shares no code with what
wrote them.
"""
from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ..core import OutputError
from ._validate_cxi import cxi_problems, geometry_problems, link_problems
from .inspect import datasets, text

NOT_PER_EVENT = ("totals", "timing", "reason")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="FILE", type=Path,
                        help="a summary, a CXI file, or the directory they are in")


def execute(args: argparse.Namespace) -> int:
    """0 sound, 3 sound but for missing events, 1 otherwise."""
    problems = validate(args.path)
    for problem in problems:
        print(problem)
    if not problems:
        print(f"{args.path}: complete and consistent")
        return 0
    return 3 if all("incomplete" in problem for problem in problems) else 1


def validate(path: str | Path) -> list[str]:
    """Problems of an output, one sentence each; [] when there are none.

    ``path`` is a summary (the files of the same run beside it are checked too), a directory with
    one or more summaries, or a CXI file alone.  Raises :class:`OutputError` when nothing is there.
    """
    path = Path(path)
    if not path.exists():
        raise OutputError(f"cannot validate {path}: it does not exist; give a summary, a CXI "
                          "file, or the directory they are in")
    if path.is_dir():
        return _directory(path)
    if path.suffix == ".cxi":
        return _opened(path, lambda file: cxi_problems(file, path))
    return _opened(path, lambda file: _run_problems(file, path))


def _directory(path: Path) -> list[str]:
    problems: list[str] = [f"{p.name}: left over from a run that did not finish; run it again "
                           "with --resume" for p in sorted(path.glob("*.tmp"))]
    summaries = sorted(path.glob("*.h5"))
    if not summaries:
        problems.append(f"{path} holds no summary (*.h5): no run has finished here")
    for summary in summaries:
        problems += [f"{summary.name}: {problem}" for problem in validate(summary)]
    return problems


def _opened(path: Path, check: Callable[[h5py.File], list[str]]) -> list[str]:
    try:
        with h5py.File(path) as file:
            return check(file)
    except OSError as error:
        return [f"{path.name} cannot be read as HDF5 ({error}); it is truncated or not ours"]


def _run_problems(file: h5py.File, path: Path) -> list[str]:
    stated = text(file.attrs.get("format", ""))
    if stated != "xfel_classify summary":
        return [f"{path.name} is not a summary of xfel_classify (format {stated!r})"]
    problems = [*_root(file), *_identity(file), *_per_event(file), *_reasons(file),
                *_ragged(file), *_totals(file), *link_problems(file, path)]
    if not {"timestamp", "index", "kept"} - set(file):
        problems += _companions(file, path)
    return problems


def _root(file: h5py.File) -> Iterator[str]:
    attributes = file.attrs
    for name in ("exp", "run", "complete", "events", "events_expected", "hits"):
        if name not in attributes:
            yield f"root attribute {name} is missing"
    if "events" not in attributes:
        return
    events = int(attributes["events"])
    expected = int(attributes.get("events_expected", -1))
    complete = bool(attributes.get("complete", False))
    if "complete" in attributes and not complete:
        of = f" of {expected}" if expected >= 0 else ""
        yield f"incomplete: {events}{of} events; run the same command with --resume"
    if complete and 0 <= expected != events:
        yield f"it says complete, but holds {events} events of {expected} expected"
    if "timestamp" in file and len(file["timestamp"]) != events:
        yield f"root attribute events is {events}, but there are {len(file['timestamp'])} rows"
    if "kept" in file and "hits" in attributes:
        kept = int(np.count_nonzero(file["kept"][()]))
        if kept != int(attributes["hits"]):
            yield f"root attribute hits is {attributes['hits']}, but {kept} events are kept"


def _identity(file: h5py.File) -> Iterator[str]:
    for name in ("timestamp", "index", "status", "damage", "kept"):
        if name not in file:
            yield f"dataset /{name} is missing"
    if "timestamp" not in file or "index" not in file:
        return
    stamps, indices = file["timestamp"][()], file["index"][()]
    if stamps.dtype != np.int64:
        yield f"/timestamp is {stamps.dtype}, not int64"
    if np.any(np.diff(stamps) < 0):
        yield f"/timestamp is not sorted (first at row {int(np.argmax(np.diff(stamps) < 0)) + 1})"
    unique, counts = np.unique(indices, return_counts=True)
    if len(unique) != len(indices):
        yield f"/index holds event {int(unique[counts > 1][0])} more than once"
    if np.any(indices < 0):
        yield "/index holds negative positions"
    if "status" in file:
        allowed = file["status"].attrs.get("values")
        if allowed is None:
            yield "/status does not say what its values mean (attribute values)"
        else:
            strange = np.setdiff1d(file["status"][()], allowed)
            if len(strange):
                yield f"/status holds {strange.tolist()}, which its attributes do not name"


def _per_event(file: h5py.File) -> Iterator[str]:
    """Every column has one row per event, and says what it is."""
    events = len(file["timestamp"]) if "timestamp" in file else int(file.attrs.get("events", 0))
    for path, dataset in datasets(file):
        if path.partition("/")[0] in NOT_PER_EVENT:
            continue
        if "offsets" in dataset.attrs or path.rpartition("/")[2].endswith("offsets"):
            continue
        if dataset.shape[:1] != (events,):
            yield f"/{path} has shape {dataset.shape}, not one row for each of {events} events"
        for name in ("units", "doc"):
            if name not in dataset.attrs and path not in ("timestamp", "index"):
                yield f"/{path} has no attribute {name}"


def _reasons(file: h5py.File) -> Iterator[str]:
    if "reason/counts" not in file or "reason/status" not in file:
        yield "/reason/counts or /reason/status is missing"
        return
    counts, codes = file["reason/counts"][()], file["reason/status"][()]
    events = int(file.attrs.get("events", 0))
    if counts.sum() != events:
        yield f"/reason/counts add up to {int(counts.sum())}, not to {events} events"
    if "status" in file:
        status = file["status"][()]
        for code, count in zip(codes, counts, strict=True):
            found = int(np.count_nonzero(status == code))
            if found != count:
                yield f"/reason counts {int(count)} events of status {int(code)}, found {found}"


def _ragged(file: h5py.File) -> Iterator[str]:
    events = len(file["timestamp"]) if "timestamp" in file else 0
    for path, dataset in datasets(file):
        where = text(dataset.attrs.get("offsets", ""))
        if not where:
            continue
        if where not in file:
            yield f"/{path} names its offsets {where}, which do not exist"
            continue
        offsets = file[where][()]
        if len(offsets) != events + 1 or offsets[0] != 0 or np.any(np.diff(offsets) < 0):
            yield f"{where} is not a rising list of {events + 1} positions from 0"
        elif offsets[-1] != len(dataset):
            yield f"/{path} has {len(dataset)} values, but {where} ends at {int(offsets[-1])}"
        counts = f"{path.rpartition('/')[0]}/n"
        if path.rpartition("/")[2] == "fs" and counts in file and len(offsets) == events + 1:
            stated = np.maximum(file[counts][()], 0)
            if stated.shape == (events,) and np.any(stated != np.diff(offsets)):
                row = int(np.argmax(stated != np.diff(offsets)))
                yield (f"/{counts} says {int(stated[row])} peaks in row {row}, but {where} has "
                       f"{int(np.diff(offsets)[row])}")


def _totals(file: h5py.File) -> Iterator[str]:
    if "totals" not in file:
        return
    events = int(file.attrs.get("events", 0))
    for path, dataset in datasets(file["totals"]):
        used = dataset.attrs.get("events")
        if used is not None and not 0 <= int(used) <= events:
            yield f"/totals/{path} is over {int(used)} events, but the run has {events}"


def _companions(file: h5py.File, path: Path) -> list[str]:
    """The other files of the run, beside the summary."""
    stem = path.name.removesuffix(".h5")
    kept = file["kept"][()].astype(bool)
    if len(kept) != len(file["timestamp"]):
        return []                                   # said already
    hits = {"timestamp": file["timestamp"][()][kept], "index": file["index"][()][kept]}
    problems: list[str] = []
    outputs = [text(name) for name in np.atleast_1d(file.attrs.get("outputs", []))]
    for name in outputs:
        if not (path.parent / name).exists():
            problems.append(f"{name} was written with this summary, but is not beside it")
    beside = {suffix: path.with_name(f"{stem}{suffix}")
              for suffix in (".cxi", ".lst", ".geom", "_hits.npy", "_hits.txt")}
    if beside["_hits.npy"].exists():
        problems += _npy(beside["_hits.npy"], hits["timestamp"])
    if beside["_hits.txt"].exists():
        problems += _txt(beside["_hits.txt"], int(file.attrs.get("run", 0)), hits["index"])
    if beside[".lst"].exists():
        problems += _lst(beside[".lst"], beside[".cxi"], len(hits["index"]))
    if beside[".cxi"].exists():
        problems += [f"{beside['.cxi'].name}: {problem}" for problem in _opened(
            beside[".cxi"], lambda cxi: _cxi_of_run(cxi, beside, hits))]
    return problems


def _cxi_of_run(
    cxi: h5py.File, beside: Mapping[str, Path], hits: Mapping[str, np.ndarray]
) -> list[str]:
    problems = cxi_problems(cxi, beside[".cxi"])
    for path, name in (("LCLS/timestamp", "timestamp"), ("LCLS/eventNumber", "index")):
        found = cxi[path][()] if path in cxi else np.zeros(0)
        if len(found) != len(hits[name]):
            problems.append(f"/{path} has {len(found)} hits, the summary {len(hits[name])}")
        elif not np.array_equal(found, hits[name]):
            problems.append(f"/{path} lists other events than the summary's hits")
    if beside[".geom"].exists():
        problems += [f"{beside['.geom'].name}: {problem}"
                     for problem in geometry_problems(beside[".geom"], cxi)]
    return problems


def _npy(path: Path, stamps: np.ndarray) -> Iterator[str]:
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        yield f"{path.name} cannot be read: {error}"
        return
    if found.dtype != np.uint64:
        yield f"{path.name} holds {found.dtype}, but psana2 takes uint64 time stamps"
    if len(found) != len(stamps):
        yield f"{path.name} lists {len(found)} hits, the summary {len(stamps)}"
    elif not np.array_equal(found, np.sort(stamps).astype(np.uint64)):
        yield f"{path.name} lists other time stamps than the summary's hits"


def _txt(path: Path, run: int, indices: np.ndarray) -> Iterator[str]:
    try:
        found = [tuple(map(int, line.split())) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        yield f"{path.name} is not lines of \"run index\": {error}"
        return
    if len(found) != len(indices):
        yield f"{path.name} lists {len(found)} hits, the summary {len(indices)}"
    elif found != [(run, int(index)) for index in indices]:
        yield f"{path.name} lists other events than the summary's hits"


def _lst(path: Path, cxi: Path, hits: int) -> Iterator[str]:
    try:
        lines = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError as error:
        yield f"{path.name} cannot be read: {error}"
        return
    if len(lines) != hits:
        yield f"{path.name} has {len(lines)} lines, but the run has {hits} hits"
    frames: list[Any] = []
    files = set()
    for line in lines:
        name, separator, frame = line.rpartition(" //")
        files.add(name if separator else line)
        frames.append(int(frame) if separator and frame.isdigit() else line)
    if lines and frames != list(range(len(lines))):
        yield f"{path.name} does not count its frames 0 to {len(lines) - 1}"
    for name in sorted(files):
        target = path.parent / name                 # an absolute name stays what it is
        if Path(name).name != cxi.name:
            yield f"{path.name} names {name}, not {cxi.name}"
        elif not target.exists():
            moved = "; the directory was moved: use indexamajig --basename --prefix=DIR/" \
                if cxi.exists() else ""
            yield f"{path.name} names {name}, which does not exist{moved}"
