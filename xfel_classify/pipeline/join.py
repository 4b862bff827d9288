"""Parts to result: rows sorted by time, reductions summed, outputs written and renamed together."""
from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..core import (
    Column,
    Constants,
    EventStatus,
    RunInfo,
    RunResult,
    Sink,
    Total,
    XfelClassifyError,
)
from .journal import KeptPixels, Part, output_error

log = logging.getLogger(__name__)


def done_indices(parts: Sequence[Part]) -> np.ndarray:
    """Sorted indices of the events that the parts hold and that need not be tried again."""
    found = [part.rows["index"][part.rows["status"] != EventStatus.UNREADABLE]
             for part in parts if part.rows]
    return np.unique(np.concatenate(found)) if found else np.zeros(0, np.int64)


def join_parts(parts: Sequence[Part], run: RunInfo, columns: Mapping[str, Column],
               attributes: Mapping[str, Any], *, hits: str | None,
               constants: Constants | None = None, locate: Any = None,
               events_expected: int | None = None) -> RunResult:
    """One result from all parts; the same for any number of ranks and any number of resumptions.

    Parts overlap only in events that one of them could not read; the row of the one that could
    is taken.
    """
    parts = sorted((p for p in parts if p.rows), key=lambda p: p.path.name)
    rows: dict[str, Any] = {}
    for name, column in columns.items():
        pieces = [part.rows[name] for part in parts]
        if column.ragged:
            rows[name] = [row for piece in pieces for row in piece]
        else:
            empty = np.zeros((0, *column.shape), column.dtype)
            rows[name] = np.concatenate([empty, *pieces]).astype(column.dtype, copy=False)
    order = _one_row_per_event(rows)
    for name, column in columns.items():
        rows[name] = [rows[name][i] for i in order] if column.ragged else rows[name][order]
    usable = rows["status"] == EventStatus.OK
    selected = usable & (np.nan_to_num(rows[hits]) > 0) if hits else np.zeros(len(order), bool)
    kept_pixels = KeptPixels(parts, run.panel_shape)
    hit_rows = np.flatnonzero(selected)
    has_pixels = len(hit_rows) > 0 and all(int(i) in kept_pixels for i in rows["index"][hit_rows])
    n, expected = len(order), -1 if events_expected is None else events_expected
    unreadable = int(np.count_nonzero(rows["status"] == EventStatus.UNREADABLE))
    every = {
        "exp": run.exp, "run": run.run, "detector": run.detector,
        "detector_kind": run.detector_kind, "source": run.source,
        "complete": unreadable == 0 and (events_expected is None or n >= events_expected),
        "events_expected": expected, "events": n, "hits": len(hit_rows),
        "hit_column": hits or "", "constants_identity": constants.identity if constants else "",
        "calibrated_unit": constants.unit if constants else "",
        "notes": "\n".join(run.notes), **_analysis_attributes(parts), **attributes,
        **{f"source_{key.removeprefix('source_')}": value
           for key, value in run.provenance.items()},
    }
    return RunResult(
        run=run, columns=columns, rows=rows, totals=_sum_totals(parts), attributes=every,
        constants=constants, timing=_timing(parts), kept=hit_rows,
        pixels=(lambda row: kept_pixels.read(int(rows["index"][row]))) if has_pixels else None,
        locate=locate and (lambda row: locate(int(rows["index"][row]))),
    )


def _one_row_per_event(rows: Mapping[str, Any]) -> np.ndarray:
    """Row numbers sorted by (timestamp, index), the best row of each event only."""
    unreadable = rows["status"] == EventStatus.UNREADABLE
    order = np.lexsort((unreadable, rows["index"], rows["timestamp"]))
    index = rows["index"][order]
    first = np.ones(len(order), bool)
    first[1:] = index[1:] != index[:-1]
    return order[first]


def _analysis_attributes(parts: Sequence[Part]) -> dict[str, Any]:
    """What the analyses said on each rank; values that differ between ranks are all named."""
    said: dict[str, list[Any]] = {}
    for part in parts:
        for key, value in part.notes[-1].get("attributes", {}).items():
            if value not in said.setdefault(key, []):
                said[key].append(value)
    return {key: values[0] if len(values) == 1 else ", ".join(sorted(map(str, values)))
            for key, values in sorted(said.items())}


def _sum_totals(parts: Sequence[Part]) -> dict[str, Total]:
    totals: dict[str, Total] = {}
    for part in parts:
        for name, total in part.totals.items():
            before = totals.get(name)
            if before is None:
                totals[name] = total
                continue
            combine = np.add if total.how == "sum" else np.maximum
            totals[name] = Total(combine(before.values, total.values), total.how,
                                 before.events + total.events, total.scale, total.unit, total.doc)
    for name, total in totals.items():
        if total.how == "max":      # a rank that saw no such event starts from minus infinity
            values = np.where(np.isneginf(total.values), 0, total.values)
            totals[name] = replace(total, values=values.astype(total.values.dtype))
    return totals


def _timing(parts: Sequence[Part]) -> dict[str, Any]:
    """Seconds per part (rank and generation) and stage, and how many events each part did."""
    notes = [part.notes[-1] for part in parts]
    stages = sorted({stage for note in notes for stage in note.get("stages", {})})
    return {
        "stage": stages,
        "seconds": np.array([[note.get("stages", {}).get(stage, 0.0) for stage in stages]
                             for note in notes]).reshape(len(notes), len(stages)),
        "rank": np.array([part.rank for part in parts], np.int32),
        "events": np.array([len(part.rows["index"]) for part in parts], np.int64),
        "wall_s": np.array([note.get("wall_s", 0.0) for note in notes]),
    }


def write_outputs(result: RunResult, sinks: Sequence[Sink], directory: Path) -> list[Path]:
    """Let every sink write, then rename everything; the summary gets its name last.

    A reader who sees the summary sees all of the run's files.  Files of an earlier run of the
    same name are replaced.
    """
    names: list[str] = []
    last = f"{result.stem}.h5"
    renamed = False
    try:
        for sink in sorted(sinks, key=lambda sink: sink.name == "summary"):
            if sink.name == "summary":
                result = replace(result, attributes={**result.attributes,
                                                     "outputs": sorted([*names, last])})
            names += sink.write(result, directory)
        for name in names:
            _fsync_path(directory / f"{name}.tmp")
        for name in sorted(names, key=lambda name: name == last):
            os.replace(directory / f"{name}.tmp", directory / name)
        _fsync_path(directory)
        renamed = True
    except OSError as error:
        if isinstance(error, XfelClassifyError):
            raise
        raise output_error(error, directory) from error
    finally:
        if not renamed:
            for leftover in directory.glob(f"{result.stem}*.tmp"):
                leftover.unlink(missing_ok=True)
    return [directory / name for name in sorted(names)]


def _fsync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
