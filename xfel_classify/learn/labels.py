"""Labels of events: hit or miss, from peak counts, an expert's file, or a simulation's truth.

A label set says for some events of one run whether they are hits.  Sets are stored as HDF5
(format "xfel_classify labels") with the two identities of an event, so that they can be joined
with a summary or with one another.  Axes: N events.
"""
from __future__ import annotations

import datetime
import gzip
import math
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ..core import ConfigurationError, OutputDamaged, OutputError, OutputExists
from ..sinks.staging import set_attributes, staged_hdf5, write_array

__all__ = ["DROPPED", "HIT", "MISS", "Agreement", "Labels", "agreement", "labels_from_counts",
           "read_labels", "with_identity", "write_labels"]

FORMAT = "xfel_classify labels"
FORMAT_VERSION = 1
MISS, HIT, DROPPED = 0, 1, -1
NAMES = ("miss", "hit")

EXPERT_LINE = re.compile(r"(?P<file>\S.*?)\s+\[(?P<number>\d+)\]\s+(?P<word>hit|miss|maybe)$",
                         re.IGNORECASE)
COUNT_LINE = re.compile(r"(?P<number>\d+)\s+\d+\s+(?P<word>hit|miss|maybe)$", re.IGNORECASE)
TRUTH_NAME = re.compile(r"(?P<exp>[A-Za-z0-9]+)-r(?P<run>\d+)-truth$")
WORDS = {"hit": HIT, "miss": MISS, "maybe": DROPPED}


@dataclass(frozen=True)
class Labels:
    """Labels of some events of a run; every event at most once, in the order of the run.

    ``label_N`` is int8, 1 hit and 0 miss; ``index_N`` (position in the run) and ``timestamp_N``
    are int64, -1 where unknown.  ``dropped`` counts events that were looked at and got no label.
    ``rule`` says in words how the labels came about.  ``exp`` and ``run`` are "" and -1 when
    nobody said which run it is.
    """

    name: str
    kind: str                       # "peak counts", "answers", "expert", "truth"
    rule: str
    label_N: np.ndarray
    index_N: np.ndarray
    timestamp_N: np.ndarray
    dropped: int = 0
    exp: str = ""
    run: int = -1
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.label_N)

    @property
    def hits(self) -> int:
        return int((self.label_N == HIT).sum())

    def describe(self) -> str:
        """One line: what the set is and how many labels it holds."""
        return (f"{self.name} ({self.kind}): {self.hits} hits, {len(self) - self.hits} misses, "
                f"{self.dropped} dropped")


def read_labels(path: str | Path, *, miss_below: int = 2, hit_above: int = 10,
                column: str = "peaks/n", file: str = "") -> Labels:
    """Labels from whatever ``path`` is: a summary, a truth file, a label file, an expert's list.

    A summary gives labels by ``column``: counts below ``miss_below`` are misses, above
    ``hit_above`` hits, the rest is dropped (methods: sfx_hit, Data); a yes/no column such as
    ``hit/label`` gives its answers.  ``file`` chooses one image file of an expert's list.

    Raises :class:`OutputError` when there is nothing at ``path``, :class:`OutputDamaged` when it
    is none of these, :class:`ConfigurationError` when an option does not fit it.
    """
    path = Path(path)
    if path.is_dir():
        raise ConfigurationError(f"labels were to be read from {path}, which is a directory; "
                                 "give the summary, truth or label file in it")
    if not path.exists():
        raise OutputError(f"labels were to be read from {path}, which does not exist; check the "
                          "path")
    if not h5py.is_hdf5(path):
        if path.suffix in (".h5", ".hdf5", ".cxi"):
            raise OutputDamaged(f"labels were to be read from {path}, which is not a whole HDF5 "
                                "file; write it again")
        return _from_text(path, file)
    try:
        with h5py.File(path) as opened:
            stated = _text(opened.attrs.get("format", ""))
            if stated == "xfel_classify summary":
                return labels_from_counts(opened, path, column, miss_below, hit_above)
            if stated == FORMAT:
                return _from_label_file(opened, path)
            if "is_hit" in opened and "timestamp" in opened:
                return _from_truth(opened, path)
    except OSError as error:
        raise OutputDamaged(f"labels were to be read from {path}: {error}; write it again"
                            ) from error
    raise OutputDamaged(
        f"labels were to be read from {path}, which is HDF5 but neither a summary, nor the truth "
        "of a simulated run, nor a label file; give one of these, or an expert's text file")


def labels_from_counts(summary: h5py.File, path: Path, column: str = "peaks/n",
                       miss_below: int = 2, hit_above: int = 10) -> Labels:
    """Labels of a summary's events by a column of counts, or of yes/no answers.

    Events without a usable image or without a count are dropped.
    """
    if miss_below > hit_above + 1 or miss_below < 0:
        raise ConfigurationError(
            f"fewer than {miss_below} peaks was to mean miss and more than {hit_above} hit: some "
            "counts would be both; let the first be at most the second plus one")
    columns = sorted(name for name in ("peaks/n", "peaks/hit", "hit/label") if name in summary)
    if column not in summary or not isinstance(summary[column], h5py.Dataset):
        raise ConfigurationError(f"{path} has no column {column!r} to make labels from; it has "
                                 f"{', '.join(columns) or 'no peak counts'}; choose with --column, "
                                 "or classify the run again with a peak finder")
    values_N = summary[column][()]
    status_N = summary["status"][()]
    if values_N.shape != status_N.shape or values_N.dtype.kind not in "iub":
        raise ConfigurationError(f"column {column!r} of {path} does not hold one whole number per "
                                 f"event; choose one of {', '.join(columns)} with --column")
    label_N = np.full(len(values_N), DROPPED, np.int8)
    answers = values_N.dtype.itemsize == 1
    if answers:
        label_N[values_N == 0] = MISS
        label_N[values_N == 1] = HIT
        rule = f"answers of {column}"
    else:
        label_N[(values_N >= 0) & (values_N < miss_below)] = MISS
        label_N[values_N > hit_above] = HIT
        rule = f"{column}: fewer than {miss_below} miss, more than {hit_above} hit, else dropped"
    label_N[status_N != 0] = DROPPED
    keep = label_N != DROPPED
    attributes = summary.attrs
    told = {name: _text(attributes[name]) for name in ("peaks_finder", "xfel_classify_version")
            if name in attributes}
    return Labels(f"{path.stem} {column}", "answers" if answers else "peak counts", rule,
                  label_N[keep], summary["index"][()][keep], summary["timestamp"][()][keep],
                  int((~keep).sum()), _text(attributes.get("exp", "")),
                  int(attributes.get("run", -1)), {"file": path.name} | told)


def _from_truth(truth: h5py.File, path: Path) -> Labels:
    label_N = truth["is_hit"][()].astype(np.int8)
    stamps_N = truth["timestamp"][()].astype(np.int64)
    if label_N.shape != stamps_N.shape or label_N.ndim != 1:
        raise OutputDamaged(f"{path}: is_hit {label_N.shape} and timestamp {stamps_N.shape} were "
                            "to be of one length; simulate the run again")
    named = TRUTH_NAME.match(path.stem)
    return Labels(path.stem, "truth", "what was simulated", label_N, np.arange(len(label_N)),
                  stamps_N, 0, named["exp"] if named else "", int(named["run"]) if named else -1,
                  {"file": path.name})


def _from_text(path: Path, file: str) -> Labels:
    lines = _lines(path)
    found: dict[str, dict[int, int]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = EXPERT_LINE.match(line.strip()) or COUNT_LINE.match(line.strip())
        if match is None or int(match["number"]) < 1:
            raise OutputDamaged(f"line {number} of {path} is {line.strip()[:80]!r}; expected "
                                "'FILE [N] HIT', 'FILE [N] MISS' or 'FILE [N] MAYBE' with N "
                                "counted from 1; correct the line")
        image = match.groupdict().get("file") or ""
        frames = found.setdefault(image, {})
        label = WORDS[match["word"].lower()]
        if frames.setdefault(int(match["number"]) - 1, label) != label:
            raise OutputDamaged(f"line {number} of {path} contradicts an earlier line on the same "
                                "frame; leave one of the two")
    if file and file not in found:
        raise ConfigurationError(f"labels of image file {file!r} were asked for; {path} has "
                                 f"{', '.join(sorted(found)) or 'none'}")
    if len(found) > 1 and not file:
        raise ConfigurationError(f"{path} labels frames of {len(found)} image files "
                                 f"({', '.join(sorted(found)[:4])}); choose one with --file")
    frames = found[file] if file else next(iter(found.values()), {})
    index_N = np.array(sorted(frames), np.int64)
    label_N = np.array([frames[int(i)] for i in index_N], np.int8)
    keep = label_N != DROPPED
    image = file or next(iter(found), "")
    name = path.name.removesuffix(".gz").removesuffix(".txt")
    return Labels(name, "expert", "read from a list of HIT, MISS and MAYBE; MAYBE dropped",
                  label_N[keep], index_N[keep], np.full(int(keep.sum()), -1, np.int64),
                  int((~keep).sum()), provenance={"file": path.name, "images": image})


def _lines(path: Path) -> list[str]:
    try:
        raw = path.read_bytes()
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
        return raw.decode("utf-8").splitlines()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise OutputDamaged(f"labels were to be read from {path}, which is neither HDF5 nor text "
                            f"({error}); give a summary, a truth or label file, or an expert's "
                            "list") from error


# --- the label file ------------------------------------------------------------------------------

def write_labels(labels: Labels, path: str | Path, *, command: str = "",
                 overwrite: bool = False) -> Path:
    """Write a label file, whole or not at all; returns its path.

    ``/timestamp``, ``/index`` and ``/label`` have one row per labelled event; dropped events are
    only counted, in the attribute ``dropped``.  Raises :class:`OutputError`.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise OutputExists(f"{path} already exists; choose another name with -o, or replace it "
                           "with --overwrite")
    with staged_hdf5(path.parent, path.name) as (file, check):
        set_attributes(file, {
            "format": FORMAT, "format_version": FORMAT_VERSION, "name": labels.name,
            "kind": labels.kind, "rule": labels.rule, "exp": labels.exp, "run": labels.run,
            "events": len(labels), "hits": labels.hits, "dropped": labels.dropped,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": command, "xfel_classify_version": version("xfel-classify"),
        } | {f"source_{key}": str(value) for key, value in labels.provenance.items()})
        write_array(file, "timestamp", labels.timestamp_N.astype(np.int64), units="",
                    doc="64-bit time stamp of the event as in the summary; -1 = unknown")
        write_array(file, "index", labels.index_N.astype(np.int64), units="",
                    doc="position of the event in the run, from 0; -1 = unknown")
        write_array(file, "label", labels.label_N.astype(np.int8), units="", doc=labels.rule,
                    names=list(NAMES))
        check()
    try:
        os.replace(path.with_name(f"{path.name}.tmp"), path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error}; choose another name with -o"
                          ) from error
    return path


def _from_label_file(file: h5py.File, path: Path) -> Labels:
    try:
        label_N, index_N, stamps_N = (file[name][()] for name in ("label", "index", "timestamp"))
    except KeyError as error:
        raise OutputDamaged(f"label file {path} lacks a dataset ({error}); write it again"
                            ) from error
    whole = label_N.ndim == 1 and label_N.shape == index_N.shape == stamps_N.shape
    if not whole or not np.isin(label_N, (MISS, HIT)).all():
        raise OutputDamaged(f"label file {path} was to hold one 0 or 1 per event; it does not; "
                            "write it again with xfel-classify label")
    attributes = {name: _text(value) for name, value in file.attrs.items()}
    return Labels(attributes.get("name") or path.stem, attributes.get("kind", "labels"),
                  attributes.get("rule", ""), label_N.astype(np.int8), index_N, stamps_N,
                  int(attributes.get("dropped", 0)), attributes.get("exp", ""),
                  int(attributes.get("run", -1)),
                  {name.removeprefix("source_"): value for name, value in attributes.items()
                   if name.startswith("source_")} | {"label_file": path.name})


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


# --- joining two sets ----------------------------------------------------------------------

def with_identity(labels: Labels, summary: str | Path) -> Labels:
    """The same labels as those of the events of a summary: experiment, run and time stamps.

    An expert's list knows only positions; the summary must have an event at each of them.
    """
    summary = Path(summary)
    if not h5py.is_hdf5(summary):
        raise OutputError(f"the run of {labels.name} was to be read from {summary}, which is no "
                          "HDF5 file; give a summary written by xfel-classify run")
    with h5py.File(summary) as file:
        if _text(file.attrs.get("format", "")) != "xfel_classify summary":
            raise OutputDamaged(f"the run of {labels.name} was to be read from {summary}, which "
                                "is no summary; give one written by xfel-classify run")
        index_M, stamps_M = file["index"][()], file["timestamp"][()]
        exp, run = _text(file.attrs.get("exp", "")), int(file.attrs.get("run", -1))
    rows_N = rows_of(labels, index_M, stamps_M)
    if (rows_N < 0).any():
        raise ConfigurationError(
            f"{labels.name} was to label events of {summary}; {int((rows_N < 0).sum())} of its "
            f"{len(labels)} events are not in there; give the summary of the run that was labelled")
    return replace(labels, index_N=index_M[rows_N], timestamp_N=stamps_M[rows_N], exp=exp,
                   run=run, provenance=dict(labels.provenance) | {"summary": summary.name})


def rows_of(labels: Labels, index_M: np.ndarray, timestamp_M: np.ndarray) -> np.ndarray:
    """Row of each label's event among M events of the same run, -1 where it is not there.

    By time stamp where both sides have stamps that name each event once, else by index.
    """
    return _positions(*_keys(labels.index_N, labels.timestamp_N, index_M, timestamp_M))


def _keys(index_N: np.ndarray, stamps_N: np.ndarray, index_M: np.ndarray, stamps_M: np.ndarray
          ) -> tuple[np.ndarray, np.ndarray]:
    if all(_unique(stamps) for stamps in (stamps_N, stamps_M)):
        return stamps_N, stamps_M
    return index_N, index_M


def _unique(keys_N: np.ndarray) -> bool:
    return bool((keys_N >= 0).all()) and len(np.unique(keys_N)) == len(keys_N)


def _positions(keys_N: np.ndarray, keys_M: np.ndarray) -> np.ndarray:
    if not len(keys_M):
        return np.full(len(keys_N), -1, np.int64)
    order = np.argsort(keys_M, kind="stable")
    at = order[np.searchsorted(keys_M[order], keys_N).clip(max=len(order) - 1)]
    return np.where((keys_M[at] == keys_N) & (keys_N >= 0), at, -1)


@dataclass(frozen=True)
class Agreement:
    """Two label sets compared on the events that both label; ``only_*`` counts the others."""

    first: str
    second: str
    both_hit: int
    first_hit: int                  # hit in the first, miss in the second
    second_hit: int
    both_miss: int
    only_first: int = 0
    only_second: int = 0

    @property
    def events(self) -> int:
        return self.both_hit + self.first_hit + self.second_hit + self.both_miss

    @property
    def agreement(self) -> float:
        """Share of the common events with the same label; NaN without any."""
        return (self.both_hit + self.both_miss) / self.events if self.events else math.nan

    @property
    def kappa(self) -> float:
        """Cohen's kappa: agreement beyond chance.  NaN when both know one class only.

        J. Cohen, Educ. Psychol. Meas. 20 (1960) 37.
        """
        n = self.events
        if not n:
            return math.nan
        hits_1, hits_2 = self.both_hit + self.first_hit, self.both_hit + self.second_hit
        chance = (hits_1 * hits_2 + (n - hits_1) * (n - hits_2)) / n**2
        return (self.agreement - chance) / (1 - chance) if chance < 1 else math.nan

    def __str__(self) -> str:
        undefined = "undefined (both name one class only)"
        kappa = undefined if math.isnan(self.kappa) else f"{self.kappa:.4f}"
        share = "undefined" if math.isnan(self.agreement) else f"{self.agreement:.4f}"
        return "\n".join([
            f"rows: {self.first}; columns: {self.second}", "",
            "| | hit | miss |", "|---|---|---|",
            f"| hit | {self.both_hit} | {self.first_hit} |",
            f"| miss | {self.second_hit} | {self.both_miss} |", "",
            f"{self.events} events in both, {self.only_first} only in the first, "
            f"{self.only_second} only in the second",
            f"agreement {share}, Cohen's kappa {kappa}"])


def agreement(first: Labels, second: Labels) -> Agreement:
    """Compare two label sets of one run.

    Raises :class:`ConfigurationError` when they name different runs or share no event.
    """
    for what, unknown in (("exp", ""), ("run", -1)):
        ours, theirs = getattr(first, what), getattr(second, what)
        if unknown not in (ours, theirs) and ours != theirs:
            raise ConfigurationError(f"{first.name} is of {what} {ours} and {second.name} of "
                                     f"{what} {theirs}; give two label sets of one run")
    rows_N = rows_of(first, second.index_N, second.timestamp_N)
    common = rows_N >= 0
    if not common.any() and len(first) and len(second):
        raise ConfigurationError(f"{first.name} and {second.name} have no event in common; give "
                                 "two label sets of one run")
    return _counted(first.name, second.name, first.label_N[common],
                    second.label_N[rows_N[common]], int((~common).sum()),
                    len(second) - int(common.sum()))


def _counted(first: str, second: str, a_N: np.ndarray, b_N: np.ndarray, only_first: int,
             only_second: int) -> Agreement:
    def count(a: int, b: int) -> int:
        return int(((a_N == a) & (b_N == b)).sum())

    return Agreement(first, second, count(HIT, HIT), count(HIT, MISS), count(MISS, HIT),
                     count(MISS, MISS), only_first, only_second)


def find_for(labels: Sequence[Labels], exp: str, run: int, alone: bool) -> list[Labels]:
    """The sets that label this run; a set that names no run belongs to a summary that is ``alone``.
    """
    return [one for one in labels
            if (one.run == run and one.exp in ("", exp)) or (one.run < 0 and alone)]
