"""The event loop of one rank: frames in, rows out, every event exactly once.

The loop knows no source, analysis or sink: it is given them.  Data takes four hops: detector
buffer, batch slot, columns, part file.  A batch has a row for every event and pixels only for
usable ones.

Analyses run in phases.  Those that need no earlier column see the pixels as they arrive; one that
uses the column of another waits until that one has answered for the batch.  Full-frame analyses
are put in the latest phase that nobody waits for, so that a frame is calibrated once for all.
"""
from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..core import (
    Analysis,
    Batch,
    Column,
    ConfigurationError,
    Constants,
    EventError,
    EventSource,
    EventStatus,
    Frame,
    Shard,
    Total,
)
from ..detectors import detector, saturated
from ..preprocess import calibrate, common_mode
from .stages import Stages

log = logging.getLogger(__name__)

DEFAULT_PHOTON_ENERGY_EV = 9500.0
"""Photon energy assumed where neither run, configuration nor geometry tells one; flagged."""

IDENTITY = {
    "timestamp": Column("int64", missing=-1, unit="seconds << 32 | ns, or as the file gives it",
                        doc="event time; rows are sorted by it"),
    "index": Column("int64", missing=-1, doc="position of the event in the run, from 0"),
    "status": Column("uint8", missing=255, doc="what became of the event",
                     names=tuple(status.name for status in EventStatus)),
    "damage": Column("int64", missing=0, doc="damage bits of the data acquisition"),
    "photon_energy_eV": Column("float64", unit="eV", doc="photon energy used for this event"),
    "photon_energy_assumed": Column("uint8", missing=255, doc="1 where the energy was assumed"),
    "event_codes": Column("int32", (-1,), missing=-1, doc="event codes, where recorded"),
}


class OpenFrame:
    """A frame with its pixels at hand; calibrates at most once (core.CalibratedFrame)."""

    def __init__(self, constants: Constants, stages: Stages, kind: str = "generic",
                 common_mode_kinds: Sequence[str] = (), mask_saturated: bool = False) -> None:
        self._constants = constants
        self._stages = stages
        self._detector = detector(kind)
        self._common_mode_kinds = tuple(common_mode_kinds)
        self._mask_saturated = mask_saturated
        self._buffer: np.ndarray | None = None
        self._calibrated = False
        self._columns: Mapping[str, Any] = {}
        self._row = 0
        self.good_PSF = constants.good_PSF
        self.photon_energy_eV = DEFAULT_PHOTON_ENERGY_EV

    def load(self, frame: Frame, raw_PSF: np.ndarray, photon_energy_eV: float,
             columns: Mapping[str, Any], row: int) -> None:
        self.frame, self.raw_PSF = frame, raw_PSF
        self.photon_energy_eV = photon_energy_eV
        self._columns, self._row = columns, row
        self._calibrated = False

    @property
    def calibrated_PSF(self) -> np.ndarray:
        if not self._calibrated:
            if self._buffer is None:
                self._buffer = np.empty(self._constants.shape, np.float32)
            with self._stages("calibrate"):
                calibrate(self.raw_PSF, self._constants, out=self._buffer)
            if self._mask_saturated:
                self._buffer[saturated(self.raw_PSF, self._detector)] = 0
            if self._common_mode_kinds:
                with self._stages("common mode"):
                    common_mode(self._buffer, self.good_PSF, self._common_mode_kinds,
                                self._detector.bank_shape_SF)
            self._calibrated = True
        assert self._buffer is not None
        return self._buffer

    def earlier(self, column: str) -> Any:
        return self._columns[column][self._row]


def phases(analyses: Sequence[Analysis]) -> list[list[int]]:
    """Positions of the analyses, grouped into the phases they run in."""
    owner = {column: i for i, analysis in enumerate(analyses) for column in analysis.columns}
    waits_for: list[set[int]] = []
    for i, analysis in enumerate(analyses):
        needed = sorted({*analysis.uses, analysis.only} - {""})
        for column in needed:
            if owner.get(column, i) >= i:
                known = ", ".join(c for c, o in owner.items() if o < i) or "none"
                raise ConfigurationError(
                    f"{analysis.name} needs the column {column!r}, which no earlier analysis "
                    f"gives; columns of earlier analyses: {known}"
                )
        waits_for.append({owner[column] for column in needed})
    first: list[int] = []
    for needed_by in waits_for:
        first.append(max((first[j] + 1 for j in needed_by), default=0))
    last = [max(first, default=0)] * len(analyses)
    for i in reversed(range(len(analyses))):
        if not analyses[i].full_frame:
            last[i] = first[i]
        for j in waits_for[i]:
            last[j] = min(last[j], last[i] - 1)
    chosen = [last[i] if analyses[i].full_frame else first[i] for i in range(len(analyses))]
    return [[i for i in range(len(analyses)) if chosen[i] == phase]
            for phase in range(max(chosen, default=-1) + 1)]


class EventLoop:
    """Runs the analyses over frames and hands the rows of each batch to ``deliver``.

    ``deliver(rows, kept)`` gets {column: rows} and, when ``keep`` names a column, an iterable of
    (event index, calibrated pixels) of the events where that column is > 0.
    """

    def __init__(self, source: EventSource, analyses: Sequence[Analysis], *, batch: int,
                 keep: str | None = None, photon_energy_eV: float | None = None,
                 common_mode_kinds: Sequence[str] = (), mask_saturated: bool = False,
                 stages: Stages | None = None) -> None:
        self.stages = stages or Stages()
        self.analyses = list(analyses)
        self.phases = phases(self.analyses)
        self.scalars = dict(source.scalar_columns())
        self.scalars.pop("photon_energy_eV", None)
        self.columns = columns_of(self.analyses, self.scalars)
        if keep is not None and keep not in self.columns:
            raise ConfigurationError(f"hits are to be selected by {keep!r}, which no analysis "
                                     f"gives; columns: {', '.join(self.columns)}")
        self._source = source
        self._batch = batch
        self._keep = keep
        self._fallback_eV = photon_energy_eV
        self._corrections = common_mode_kinds, mask_saturated
        self._said: set[EventStatus] = set()
        self.status_counts = np.zeros(len(EventStatus), np.int64)

    def start(self, constants: Constants) -> None:
        """Open everything that needs a working rank (engines, tables)."""
        self._constants = constants
        for analysis in self.analyses:
            with self.stages(f"start {analysis.name}"):
                analysis.start(self._source.run, constants, self._batch)
        self._view = OpenFrame(constants, self.stages, self._source.run.detector_kind,
                               *self._corrections)
        self._keeps_pixels = len(self.phases) > 1 or self._keep is not None
        self._raw_slots: list[np.ndarray | None] = [None] * self._batch

    def panels(self) -> tuple[int, ...] | None:
        """The panels that anybody looks at; None = all (known after :meth:`start`)."""
        if self._keep is not None or any(
                a.full_frame or a.panels is None for a in self.analyses):
            return None
        return tuple(sorted({p for a in self.analyses for p in a.panels or ()}))

    def run(self, shard: Shard, deliver: Callable[[dict[str, Any], Iterable], None]) -> None:
        """Process all events of ``shard``; returns when they are done or it is interrupted."""
        frames = iter(self._source.frames(shard))
        waiting: list[Frame] = []
        while True:
            with self.stages("read"):
                frame = next(frames, None)
            if frame is None:
                break
            if not waiting:
                self._begin()
            self._arrive(frame, len(waiting))
            waiting.append(frame)
            if len(waiting) == self._batch:
                self._finish(waiting, deliver)
                waiting = []
        if waiting:
            self._finish(waiting, deliver)

    def close(self) -> None:
        for analysis in self.analyses:
            analysis.close()

    def totals(self) -> dict[str, Total]:
        return {name: total for a in self.analyses for name, total in a.totals().items()}

    # --- one batch -----------------------------------------------------------------------------

    def _begin(self) -> None:
        self._status = np.zeros(self._batch, np.uint8)
        self._energy = np.full(self._batch, DEFAULT_PHOTON_ENERGY_EV)
        self._assumed = np.zeros(self._batch, np.uint8)

    def _arrive(self, frame: Frame, row: int) -> None:
        """Look at a frame while its pixels are valid."""
        self.stages.event = f"event {frame.index}, timestamp {frame.timestamp}"
        self._energy[row], self._assumed[row] = self._photon_energy(frame)
        status = frame.status
        raw = frame.raw_PSF
        if status is EventStatus.OK:
            status = self._usable(raw)
        self._status[row] = status
        if status is not EventStatus.OK:
            self._say(status, frame)
            return
        assert raw is not None
        if self._keeps_pixels:
            raw = self._hold(raw, row)
        self._take(0, frame, raw, row, {})

    def _usable(self, raw_PSF: np.ndarray | None) -> EventStatus:
        if raw_PSF is None:
            return EventStatus.NO_DETECTOR
        if raw_PSF.shape != self._constants.shape:
            return EventStatus.WRONG_SHAPE
        if raw_PSF.dtype.kind == "f":
            sparse = raw_PSF[:, ::64, ::64], self._constants.good_PSF[:, ::64, ::64]
            whole = raw_PSF, self._constants.good_PSF
            if not any(np.isfinite(pixels[good]).any() for pixels, good in (sparse, whole)):
                return EventStatus.NOT_FINITE
        return EventStatus.OK

    def _photon_energy(self, frame: Frame) -> tuple[float, int]:
        energy = float(frame.scalars.get("photon_energy_eV", np.nan))
        if np.isfinite(energy) and energy > 0:
            return energy, 0
        return self._fallback_eV or DEFAULT_PHOTON_ENERGY_EV, 1

    def _hold(self, raw_PSF: np.ndarray, row: int) -> np.ndarray:
        """Pixels that stay valid until the batch is finished."""
        if self._source.keeps_raw:
            self._raw_slots[row] = raw_PSF
            return raw_PSF
        slot = self._raw_slots[row]
        if slot is None or slot.dtype != raw_PSF.dtype:
            slot = self._raw_slots[row] = np.empty_like(raw_PSF)
        with self.stages("hold"):
            np.copyto(slot, raw_PSF)
        return slot

    def _take(self, phase: int, frame: Frame, raw_PSF: np.ndarray, row: int,
              columns: Mapping[str, Any]) -> None:
        if phase >= len(self.phases):
            return
        self._view.load(frame, raw_PSF, float(self._energy[row]), columns, row)
        for i in self.phases[phase]:
            analysis = self.analyses[i]
            if analysis.only and not np.nan_to_num(columns[analysis.only][row]) > 0:
                continue
            try:
                with self.stages(analysis.name):
                    analysis.take(self._view, row)
            except EventError as error:
                self._status[row] = error.status
                self._say(error.status, frame, str(error))
                return

    def _finish(self, waiting: list[Frame],
                deliver: Callable[[dict[str, Any], Iterable], None]) -> None:
        n = len(waiting)
        rows: dict[str, Any] = {
            "timestamp": np.array([f.timestamp for f in waiting], np.int64),
            "index": np.array([f.index for f in waiting], np.int64),
            "damage": np.array([f.damage for f in waiting], np.int64),
            "photon_energy_eV": self._energy[:n].copy(),
            "photon_energy_assumed": self._assumed[:n].copy(),
            "event_codes": [np.array(f.event_codes, np.int32) for f in waiting],
        }
        for name, column in self.scalars.items():
            rows[name] = np.array([f.scalars.get(name, column.missing) for f in waiting],
                                  column.dtype)
        answered: dict[str, Any] = {}
        for phase, members in enumerate(self.phases):
            if phase:
                for row, frame in enumerate(waiting):
                    raw = self._raw_slots[row]
                    if self._status[row] == EventStatus.OK and raw is not None:
                        self.stages.event = f"event {frame.index}, timestamp {frame.timestamp}"
                        self._take(phase, frame, raw, row, answered)
            for i in members:
                analysis = self.analyses[i]
                selected = self._status[:n] == EventStatus.OK
                if analysis.only:
                    selected &= np.nan_to_num(answered[analysis.only]) > 0
                batch = Batch(rows["timestamp"], rows["index"], self._status[:n], selected,
                              answered)
                with self.stages(analysis.name):
                    answer = analysis.process(batch)
                for name, column in analysis.columns.items():
                    answered[name] = _filled(answer[name], column, selected, name)
        rows["status"] = self._status[:n].copy()
        rows.update(answered)
        self.status_counts += np.bincount(rows["status"], minlength=len(EventStatus))
        with self.stages("write"):
            deliver({name: rows[name] for name in self.columns}, self._kept(waiting, rows))
        if self._source.keeps_raw:
            self._raw_slots = [None] * self._batch

    def _kept(self, waiting: list[Frame], rows: Mapping[str, Any]) -> Iterable:
        if self._keep is None:
            return
        chosen = (rows["status"] == EventStatus.OK) & (np.nan_to_num(rows[self._keep]) > 0)
        for row in np.flatnonzero(chosen):
            raw = self._raw_slots[row]
            assert raw is not None
            self._view.load(waiting[row], raw, float(self._energy[row]), {}, int(row))
            yield waiting[row].index, self._view.calibrated_PSF

    def _say(self, status: EventStatus, frame: Frame, message: str = "") -> None:
        """Log the first event of each kind of trouble; the rest is counted."""
        if status not in self._said:
            self._said.add(status)
            log.warning("event %d (timestamp %d): %s; further ones are only counted",
                        frame.index, frame.timestamp, message or status.reason)


def columns_of(analyses: Sequence[Analysis],
               scalars: Mapping[str, Column]) -> dict[str, Column]:
    """All columns of a run in file order; a name given twice is an error."""
    columns = {**IDENTITY, **{k: v for k, v in scalars.items() if k not in IDENTITY}}
    for analysis in analyses:
        for name, column in analysis.columns.items():
            if name in columns:
                raise ConfigurationError(
                    f"{analysis.name} gives the column {name!r}, which is already taken; use one "
                    "analysis of that kind, or give it another name"
                )
            columns[name] = column
    return columns


def _filled(answer: Any, column: Column, selected_B: np.ndarray, name: str) -> Any:
    """The answer with rows outside of ``selected_B`` set to the missing value."""
    if len(answer) != len(selected_B):
        raise ValueError(f"column {name!r} has {len(answer)} rows for {len(selected_B)} events")
    if column.ragged:
        nothing = np.zeros(0, column.dtype)
        return [np.asarray(row, column.dtype) if ok else nothing
                for row, ok in zip(answer, selected_B, strict=True)]
    filled = np.array(answer, column.dtype)
    filled[~selected_B] = column.missing
    return filled
