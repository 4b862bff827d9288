"""Summaries as a report sees them: answers, labels, counts and totals of each run.

Axes: N events of a run.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ..core import ConfigurationError, EventStatus, OutputDamaged, OutputError
from .evaluation import RunScore
from .labels import DROPPED, HIT, Labels, find_for, rows_of

__all__ = ["Answer", "Judged", "ReportRun", "find_summaries", "open_runs", "pooled"]

ANSWERS = ("hit/label", "peaks/hit")
"""Columns that say hit or miss, the model's first."""


@dataclass(frozen=True)
class Answer:
    """One yes/no answer per event, and the score it was made from.

    ``label_N`` is int8: 1 hit, 0 miss, -1 no answer.  ``score_N`` is float64, NaN where there is
    none; ``score`` is its column, "" when nothing but the answer is known.
    """

    column: str
    label_N: np.ndarray
    score: str
    score_N: np.ndarray


@dataclass(frozen=True)
class Judged:
    """An answer held against labels: the counts, and score and label of the events judged.

    ``rows_N`` are the rows of these events in the summary; ``unanswered`` counts labelled events
    without an answer (no usable image, or not asked), ``unlabelled`` answered ones without label.
    """

    run: str
    number: int
    column: str
    labels: str
    counts: RunScore
    rows_N: np.ndarray
    score_N: np.ndarray
    truth_N: np.ndarray
    unanswered: int = 0
    unlabelled: int = 0


@dataclass(frozen=True)
class ReportRun:
    """One summary, without its totals, which are read when they are drawn."""

    path: Path
    attributes: Mapping[str, Any]
    index_N: np.ndarray
    timestamp_N: np.ndarray
    status_N: np.ndarray
    answers: tuple[Answer, ...]
    peaks_N: np.ndarray | None          # number of peaks, -1 = not counted
    stages: Mapping[str, float]         # seconds, added up over ranks
    wall_s: float                       # of the slowest rank; NaN when not recorded
    ranks: int
    totals: tuple[str, ...]
    labels: tuple[Labels, ...] = ()

    @property
    def stem(self) -> str:
        return self.path.stem

    @property
    def exp(self) -> str:
        return str(self.attributes.get("exp", ""))

    @property
    def number(self) -> int:
        return int(self.attributes.get("run", -1))

    @property
    def events(self) -> int:
        return len(self.index_N)

    @property
    def usable_N(self) -> np.ndarray:
        return self.status_N == EventStatus.OK

    @property
    def hits(self) -> int:
        """Events that the first answer calls hits."""
        return int((self.answers[0].label_N == HIT).sum()) if self.answers else 0

    @property
    def complete(self) -> bool:
        return bool(self.attributes.get("complete", False))

    @property
    def status_counts(self) -> dict[EventStatus, int]:
        counts = np.bincount(self.status_N, minlength=len(EventStatus))
        return {status: int(counts[status]) for status in EventStatus if counts[status]}

    def beside(self, suffix: str) -> Path | None:
        """A file of the same run next to the summary, None when it is not there."""
        path = self.path.with_suffix(suffix)
        return path if path.exists() else None

    def truth_N(self, labels: Labels) -> np.ndarray:
        """int8 label of every event of this run, -1 where the set has none."""
        rows = rows_of(labels, self.index_N, self.timestamp_N)
        truth_N = np.full(self.events, DROPPED, np.int8)
        truth_N[rows[rows >= 0]] = labels.label_N[rows >= 0]
        return truth_N

    def judge(self, answer: Answer, labels: Labels) -> Judged:
        """Counts of right and wrong answers on the events that are labelled and answered."""
        truth_N = self.truth_N(labels)
        labelled_N, answered_N = truth_N != DROPPED, answer.label_N != DROPPED
        rows_N = np.nonzero(labelled_N & answered_N)[0]
        called_N, hit_N = answer.label_N[rows_N] == HIT, truth_N[rows_N] == HIT
        counts = RunScore(self.stem, int((called_N & hit_N).sum()),
                          int((~called_N & hit_N).sum()), int((called_N & ~hit_N).sum()),
                          int((~called_N & ~hit_N).sum()))
        return Judged(self.stem, self.number, answer.column, labels.name, counts, rows_N,
                      answer.score_N[rows_N], truth_N[rows_N], len(labels) - len(rows_N),
                      int((answered_N & ~labelled_N).sum()))

    def total(self, name: str) -> tuple[np.ndarray, dict[str, Any]] | None:
        """(values, attributes) of ``/totals/name``; None when the run has no such total."""
        if name not in self.totals:
            return None
        with h5py.File(self.path) as file:
            dataset = file["totals"][name]
            return dataset[()], {key: _plain(value) for key, value in dataset.attrs.items()}

    def peaks(self, rows: Sequence[int]) -> list[np.ndarray]:
        """(n, 3) panel, fs, ss of the peaks of some rows; empty where none are stored."""
        with h5py.File(self.path) as file:
            names = [f"peaks/{name}" for name in ("panel", "fs", "ss")]
            if not all(name in file for name in names):
                return [np.zeros((0, 3)) for _ in rows]
            where = _plain(file[names[0]].attrs.get("offsets", "/peaks/offsets"))
            offsets = file[where][()]
            return [np.stack([file[name][offsets[row]:offsets[row + 1]].astype(np.float64)
                              for name in names], axis=1) for row in rows]


def pooled(judged: Sequence[Judged]) -> RunScore:
    """Counts of several runs added up."""
    return RunScore("all", *(sum(getattr(one.counts, name) for one in judged) for name in (
        "true_positive", "false_negative", "false_positive", "true_negative")))


# --- reading -------------------------------------------------------------------------------------

def find_summaries(paths: Sequence[str | Path]) -> list[Path]:
    """The summaries among ``paths``: files, or directories that hold some.

    Raises :class:`OutputError` when a path is missing or a directory holds no summary.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise OutputError(f"a report on {path} was asked for; it does not exist; give a "
                              "summary written by xfel-classify run, or its directory")
        inside = [p for p in sorted(path.glob("*.h5")) if _is_summary(p)] if path.is_dir() \
            else [path]
        if not inside:
            raise OutputError(f"a report on {path} was asked for; the directory holds no summary; "
                              "give that of a finished run, or finish it with --resume")
        found += [p for p in inside if p not in found]
    return found


def _is_summary(path: Path) -> bool:
    try:
        with h5py.File(path) as file:
            return str(_plain(file.attrs.get("format", ""))) == "xfel_classify summary"
    except OSError:
        return False


def open_runs(paths: Sequence[Path], labels: Sequence[Labels] = (), column: str = ""
              ) -> list[ReportRun]:
    """Read the summaries, sorted by experiment and run, each with the label sets of its run.

    ``column`` names the answer to be judged first.  Raises :class:`OutputDamaged` for files that
    are no summary, :class:`ConfigurationError` for labels that belong to none of the runs.
    """
    runs = sorted((_read(path, column) for path in paths), key=lambda r: (r.exp, r.number, r.stem))
    for one in labels:
        homes = [run for run in runs if find_for([one], run.exp, run.number, len(runs) == 1)]
        if homes:
            continue
        known = ", ".join(f"{run.exp} run {run.number}" for run in runs)
        raise ConfigurationError(
            f"labels {one.name} are of {one.exp} run {one.run}, the report of {known}; give the "
            "labels of these runs" if one.run >= 0 else
            f"labels {one.name} do not say which of {known} they are of; make a label file of "
            "them with xfel-classify label FILE --run-of SUMMARY -o LABELS.h5")
    return [_with_labels(run, find_for(labels, run.exp, run.number, len(runs) == 1))
            for run in runs]


def _with_labels(run: ReportRun, labels: list[Labels]) -> ReportRun:
    from dataclasses import replace

    for one in labels:
        if len(one) and run.events and (rows_of(one, run.index_N, run.timestamp_N) < 0).all():
            raise ConfigurationError(f"labels {one.name} name no event of {run.path}; give the "
                                     "labels of this run")
    return replace(run, labels=tuple(labels))


def _read(path: Path, column: str) -> ReportRun:
    try:
        with h5py.File(path) as file:
            return _read_open(path, file, column)
    except OSError as error:
        raise OutputDamaged(f"a report on {path} was asked for; it cannot be read as HDF5: "
                            f"{error}; run its command again with --resume") from error
    except KeyError as error:
        raise OutputDamaged(f"a report on {path} was asked for; the summary is not whole "
                            f"({error}); xfel-classify validate says more") from error


def _read_open(path: Path, file: h5py.File, column: str) -> ReportRun:
    attributes = {key: _plain(value) for key, value in file.attrs.items()}
    if attributes.get("format") != "xfel_classify summary":
        raise OutputDamaged(f"a report on {path} was asked for; it is not a summary of "
                            "xfel-classify run; give one of these")
    status_N = file["status"][()]
    peaks_N = file["peaks/n"][()] if "peaks/n" in file else None
    stages, wall_s, ranks = _timing(file["timing"]) if "timing" in file else ({}, np.nan, 0)
    totals = tuple(sorted(file["totals"])) if "totals" in file else ()
    return ReportRun(path, attributes, file["index"][()], file["timestamp"][()], status_N,
                     tuple(_answers(path, file, status_N, attributes, column)), peaks_N, stages,
                     wall_s, ranks, totals)


def _answers(path: Path, file: h5py.File, status_N: np.ndarray, attributes: Mapping[str, Any],
             column: str) -> Iterator[Answer]:
    """The answer asked for, then that which chose the hits, then the others."""
    if column and column not in file:
        have = ", ".join(name for name in ANSWERS if name in file) or "none"
        raise ConfigurationError(f"{path} has no column {column!r} with answers; it has {have}; "
                                 "choose with --column")
    wanted = [column, str(attributes.get("hit_column", "")), *ANSWERS]
    for name in dict.fromkeys(w for w in wanted if w and w in file):
        values_N = file[name][()]
        if values_N.shape != status_N.shape or values_N.dtype.kind not in "iub":
            if name != column:
                continue
            raise ConfigurationError(f"column {name!r} of {path} does not hold one whole number "
                                     "per event; give a column such as hit/label with --column")
        label_N = np.full(len(values_N), DROPPED, np.int8)
        label_N[values_N == 0] = 0
        label_N[values_N > 0] = HIT
        label_N[status_N != EventStatus.OK] = DROPPED
        score = next((s for s in (name.rpartition("/")[0] + "/score",
                                  "peaks/n" if name == "peaks/hit" else "") if s and s in file), "")
        score_N = np.full(len(values_N), np.nan)
        if score:
            score_N = file[score][()].astype(np.float64)
            if score == "peaks/n":
                score_N[score_N < 0] = np.nan
        score_N[label_N == DROPPED] = np.nan
        yield Answer(name, label_N, score, score_N)


def _timing(group: h5py.Group) -> tuple[dict[str, float], float, int]:
    if not {"stage", "seconds"} <= set(group):
        return {}, float("nan"), 0
    names = [str(_plain(name)) for name in group["stage"][()]]
    seconds = np.atleast_2d(group["seconds"][()])
    if not names or seconds.shape[-1] != len(names):
        return {}, float("nan"), 0
    wall = group["wall_s"][()] if "wall_s" in group else np.zeros(0)
    ranks = int((group["events"][()] > 0).sum()) if "events" in group else len(seconds)
    stages = dict(zip(names, map(float, seconds.sum(axis=0)), strict=True))
    return stages, float(np.max(wall, initial=0.0)) or float("nan"), ranks


def _plain(value: Any) -> Any:
    """bytes as text, numpy scalars as Python's, arrays as lists."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return [_plain(v) for v in value.tolist()]
    return value
