"""The per-run summary ``{stem}.h5``: one row per event, in time order, for any HDF5 reader.

Layout (format 1).  Every dataset carries ``units`` and ``doc``::

    /                       attributes: exp, run, complete, events, hits, configuration, ...
    /timestamp /index       (N,) int64, identity of the event
    /status /damage /kept   (N,) what became of it; kept = 1 where it went into the hit lists
    /reason/{status,names,counts}    events per status
    /hit/score, ...         (N, ...) one dataset per column of the analyses
    /peaks/fs, ...          (M,) ragged columns: the values of all events one after another
    /peaks/offsets          (N + 1,) event i owns values[offsets[i]:offsets[i + 1]]
    /totals/...             reductions over the run: powder patterns, mean, radial profile
    /timing/...             where the time went; the only part that differs between equal runs

A ragged dataset names its offsets in the attribute ``offsets``.
"""
from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import msgspec
import numpy as np

from ..core import Column, EventStatus, OutputError, RunResult, Total
from .staging import (
    column_attributes,
    filled_column,
    set_attributes,
    staged_hdf5,
    write_array,
)

FORMAT = "xfel_classify summary"
FORMAT_VERSION = 1

LAYOUT = (
    "One row per event, sorted by (timestamp, index). Ragged columns hold the values of all "
    "events one after another; the attribute 'offsets' names the dataset with N + 1 positions: "
    "event i owns values[offsets[i]:offsets[i + 1]]. Groups totals, reason and timing are not "
    "per event."
)

IDENTITY = {
    "timestamp": Column(
        "int64", missing=-1, unit="",
        doc="psana2 time stamp (seconds since 1990-01-01 UTC << 32 | nanoseconds) where the run "
            "has one, else what the source gives, else the event index"),
    "index": Column("int64", missing=-1, doc="position of the event in the run, from 0"),
    "status": Column("uint8", missing=0, doc="what became of the event"),
    "damage": Column("int64", missing=0, doc="damage bits of the data acquisition"),
}


class Sink:
    """Writes ``{stem}.h5``."""

    name = "summary"

    class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
        """How the summary is stored."""

        compress: bool = True           # gzip + shuffle for arrays over 64 kB
        radial_profile: bool = True     # azimuthal average of the mean image

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or self.Config()

    def write(self, result: RunResult, directory: Path) -> list[str]:
        """Write ``{stem}.h5.tmp``; returns the final name.  Raises :class:`OutputError`."""
        name = f"{result.stem}.h5"
        with staged_hdf5(Path(directory), name) as (file, check):
            set_attributes(file, root_attributes(result))
            self._write_identity(file, result)
            self._write_columns(file, result)
            check()
            self._write_totals(file, result)
            timing = file.create_group("timing")
            for key, values in sorted(result.timing.items()):
                write_array(timing, key, values, compress=self.config.compress)
        return [name]

    def _write_identity(self, file: h5py.File, result: RunResult) -> None:
        count = len(result)
        for path, column in IDENTITY.items():
            dataset = write_array(
                file, path, filled_column(column, result.rows.get(path), count),
                compress=self.config.compress, units=column.unit, doc=column.doc)
            if path == "status":
                set_attributes(dataset, {
                    "names": [status.name for status in EventStatus],
                    "values": np.array([int(status) for status in EventStatus], np.uint8),
                    "reasons": [status.reason for status in EventStatus],
                })
        kept = np.zeros(count, np.uint8)
        kept[np.asarray(result.kept, np.int64)] = 1
        write_array(file, "kept", kept, compress=self.config.compress, units="",
                    doc="1 where the event is a hit and went into the CXI file and the hit lists")
        status = np.asarray(result.rows["status"])
        write_array(file, "reason/status", np.array([int(s) for s in EventStatus], np.uint8),
                    units="", doc="value of /status")
        write_array(file, "reason/names", [s.name for s in EventStatus], units="",
                    doc="its name", reasons=[s.reason for s in EventStatus])
        write_array(file, "reason/counts",
                    np.array([np.count_nonzero(status == s) for s in EventStatus], np.int64),
                    units="events", doc="events that ended with this status")

    def _write_columns(self, file: h5py.File, result: RunResult) -> None:
        columns = {path: column for path, column in result.columns.items()
                   if path not in IDENTITY}
        for path in sorted(columns):
            if not columns[path].ragged:
                column = columns[path]
                write_array(file, path, filled_column(column, result.rows.get(path), len(result)),
                            compress=self.config.compress, **column_attributes(column))
        ragged = {path: column for path, column in columns.items() if column.ragged}
        self._write_ragged(file, ragged, result)

    def _write_ragged(
        self, file: h5py.File, columns: Mapping[str, Column], result: RunResult
    ) -> None:
        offsets_of = {path: _offsets(path, result.rows.get(path), len(result))
                      for path in sorted(columns)}
        for path, offsets in offsets_of.items():
            parent = path.rpartition("/")[0]
            siblings = [o for other, o in offsets_of.items() if other.rpartition("/")[0] == parent]
            shared = f"{parent}/offsets"
            where = f"{path}_offsets"
            if parent and shared not in result.columns and all(
                np.array_equal(offsets, other) for other in siblings
            ):
                where = shared
            if where not in file:
                write_array(file, where, offsets, compress=self.config.compress, units="",
                            doc="event i owns values offsets[i] to offsets[i + 1] of the ragged "
                                "datasets that name this one")
            column = columns[path]
            rows = result.rows.get(path)
            values = [np.asarray(row, column.dtype) for row in rows or () if row is not None]
            joined = np.concatenate([np.zeros(0, column.dtype), *values])
            write_array(file, path, joined, compress=self.config.compress,
                        offsets=f"/{where}", **column_attributes(column))

    def _write_totals(self, file: h5py.File, result: RunResult) -> None:
        group = file.create_group("totals")
        for name, total in sorted(result.totals.items()):
            self._write_total(group, name, total_values(total), total)
            if name.rpartition("/")[2] == "sum" and total.how == "sum":
                mean = total_mean(total)
                path = f"{name.removesuffix('sum')}mean"
                self._write_total(group, path, mean, total, how="mean",
                                  doc=f"mean over the events of totals/{name}")
                if self.config.radial_profile and result.constants is not None:
                    _write_radial_profile(group, mean, total, result)

    def _write_total(
        self, group: h5py.Group, name: str, values: np.ndarray, total: Total, **changes: Any
    ) -> None:
        values = values.astype(np.float32) if values.dtype.kind == "f" else values
        attributes = {"units": total.unit, "doc": total.doc, "how": total.how,
                      "events": total.events} | changes
        chunk = (1, *values.shape[1:]) if values.ndim == 3 else None
        write_array(group, name, values, chunk=chunk, compress=self.config.compress, **attributes)


def root_attributes(result: RunResult) -> dict[str, Any]:
    """Root attributes of the summary: what the run is, plus ``result.attributes`` on top."""
    run = result.run
    constants = result.constants
    found: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "layout": LAYOUT,
        "exp": run.exp,
        "run": run.run,
        "detector": run.detector,
        "detector_kind": run.detector_kind,
        "panel_shape": np.array(run.panel_shape, np.int64),
        "source": run.source,
        "events": len(result),
        "hits": len(np.asarray(result.kept)),
        "notes": list(run.notes),
    }
    if constants is not None:
        found |= {"constants_identity": constants.identity, "calibrated_unit": constants.unit,
                  "geometry": constants.geometry.name}
    found |= {f"source_{key}": str(value) for key, value in run.provenance.items()}
    found |= {key: _attribute(value) for key, value in result.attributes.items()}
    if found.get("events_expected", 0) is None:
        found["events_expected"] = -1
    return found


def _attribute(value: Any) -> Any:
    """Mappings become JSON text; HDF5 attributes hold only arrays and texts."""
    if isinstance(value, Mapping):
        return json.dumps(value, sort_keys=True, default=str)
    if isinstance(value, (set, frozenset)):
        return sorted(str(v) for v in value)
    if isinstance(value, Path):
        return str(value)
    return value


def total_values(total: Total) -> np.ndarray:
    """Values in their unit: fixed point sums times their scale, as float64; others as they are."""
    values = np.asarray(total.values)
    return values * np.float64(total.scale) if total.how == "sum" else values


def total_mean(total: Total) -> np.ndarray:
    """Mean per event of a sum, float64; 0 where no event went in."""
    return total_values(total) / max(1, total.events)


def radial_profile(
    image_PSF: np.ndarray, good_PSF: np.ndarray, radius_px_PSF: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(mean, pixel count) over rings one pixel wide, bin k = radius in [k, k + 1).

    Rings without a good pixel are NaN.
    """
    bins = np.floor(radius_px_PSF[good_PSF]).astype(np.int64)
    count = np.bincount(bins)
    total = np.bincount(bins, weights=np.asarray(image_PSF, np.float64)[good_PSF])
    with np.errstate(invalid="ignore", divide="ignore"):
        return (total / count).astype(np.float32), count


def _write_radial_profile(
    group: h5py.Group, mean: np.ndarray, total: Total, result: RunResult
) -> None:
    constants = result.constants
    if constants is None or mean.shape != constants.shape or not constants.good_PSF.any():
        return
    geometry = constants.geometry
    radius = np.hypot(geometry.x_m_PSF.astype(np.float64), geometry.y_m_PSF) / geometry.pixel_size_m
    profile, count = radial_profile(mean, constants.good_PSF, radius)
    write_array(group, "radial_profile", profile, units=total.unit, how="mean",
                events=total.events,
                doc="mean image averaged over rings about the beam; entry k covers radii of "
                    "k to k + 1 pixels")
    write_array(group, "radial_radius_px", np.arange(len(profile)) + np.float32(0.5),
                units="pixel", doc="middle of the ring")
    write_array(group, "radial_pixels", count, units="", doc="unmasked pixels in the ring")


def _offsets(path: str, rows: Sequence[Any] | None, count: int) -> np.ndarray:
    if rows is None:
        return np.zeros(count + 1, np.int64)
    if len(rows) != count:
        raise OutputError(f"column {path!r} has {len(rows)} rows but the run has {count} events; "
                          "this is a bug in the analysis that made the column")
    lengths = [0 if row is None else len(row) for row in rows]
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
