"""LCLS-II runs (xtc2) through the real psana2: serial, or dealt by psana2 over MPI ranks.

The run's small-data files are indexed first (:mod:`.psana2_index`), so the source knows every
event of the run before psana2 reads one.  Events whose pixels are cut off are withheld from psana2,
which would silently drop them and their neighbours, and come as ``UNREADABLE``.

Under MPI every rank must iterate :meth:`Source.frames`, also those that do not work.
"""
from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from .. import detectors
from ..core import (
    Column,
    ConfigurationError,
    Constants,
    ConstantsError,
    EventStatus,
    Frame,
    RunDamaged,
    RunInfo,
    RunNotFound,
    Shard,
    SourceError,
)
from .psana2_index import RunIndex, find_streams, index_big_file, index_run, xtc_directory
from .psana2_open import Opened, area_detector, import_psana, no_constants, open_run, raw_dtype
from .run_constants import FrameKind, Stated, frame_kind, plausible, run_constants, scalar_columns

__all__ = ["DAMAGE_BITS", "Source", "calibration_of", "fetch_constants", "kind_of"]

log = logging.getLogger(__name__)

DAMAGE_BITS = 0x0FFF                   # the bits above are for detectors' own use
_ENERGY_RANGE_EV = (10.0, 1e6)
_UNWRITTEN = 1 << 62


class Source:
    """Events of one LCLS-II run.  Implements :class:`xfel_classify.core.EventSource`."""

    class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
        """Give ``exp`` and ``run`` (``dir`` where the files are not in their usual place), or one
        big-data file in ``files``."""

        exp: str = ""
        run: int | None = None
        dir: str | None = None              # folder with the .xtc2 files and smalldata/
        files: list[str] = []               # one big-data file, read without small data
        detector: str = ""                  # "" = the only area detector of the run
        kind: str = ""                      # detector kind; "" = as psana says
        panels: int | None = None           # refuse a run with another number of panels
        constants: str | None = None        # HDF5 file; None = psana's calibration database
        geometry: str | None = None
        mask: str | None = None
        edge_width: int = 0                 # pixels masked along every ASIC edge
        gain_mode: str | None = None        # ePix10ka: FH, FM, FL, AHL, AML; None = as configured
        calibrated: bool | None = None      # None: floating-point pixels are, others are not
        unit: str | None = None             # of calibrated pixels: keV, photon, ADU
        batch_size: int = 4                 # events psana2 hands to a rank at a time
        photon_energy_eV: float | None = None       # for events that state none
        distance_m: float | None = None     # wins over the run's
        distance_pv: str = "detector_z"     # EPICS variable with the distance in mm
        damaged: Literal["flag", "analyse"] = "flag"    # what to do with damaged images
        max_events: int | None = None       # only the first events of the run

    keeps_raw = False

    def __init__(self, config: Config) -> None:
        self.config = config
        if bool(config.files) == (config.run is not None):
            raise ConfigurationError("source psana2 needs exp and run, or files (and not both)")
        if config.run is not None and not config.exp:
            raise ConfigurationError(f"run {config.run} of which experiment? State it with --exp")
        if len(config.files) > 1:
            raise ConfigurationError(
                f"{len(config.files)} xtc2 files were given; psana2 reads files one by one and "
                "does not join their streams into events: give --exp, the run number and --dir")
        if config.batch_size < 1:
            raise ConfigurationError(f"source.batch_size = {config.batch_size}; psana2 needs 1 or "
                                     "more events in a batch")
        if config.run is not None and config.run < 0:
            raise ConfigurationError(f"run {config.run} is negative; give the number of a run")
        self._opened: Opened | None = None
        self._index = RunIndex((), np.zeros(0, np.uint64), np.zeros(0, bool))
        self._run: RunInfo | None = None
        self._constants: Constants | None = None
        self._started = False

    # --- the protocol ---

    def __enter__(self) -> Source:
        import_psana()
        config = self.config
        if config.files:
            path = Path(config.files[0]).expanduser()
            if not path.is_file():
                raise RunNotFound(f"file {path} does not exist; check the path")
            self._index = index_big_file(path)
            what = str(path)
            arguments: dict[str, Any] = {"files": [str(path)]}
        else:
            assert config.run is not None
            directory = xtc_directory(config.exp, config.dir)
            what = f"run {config.run} of {config.exp} in {directory}"
            self._index = index_run(find_streams(config.exp, config.run, directory))
            arguments = {"exp": config.exp, "run": config.run, "dir": str(directory),
                         "batch_size": config.batch_size}
        opened = open_run(arguments, what, provider=no_constants if config.constants else None)
        self._opened = opened
        self._check_repeats(opened, what)
        self._what = what
        if opened.serves:
            self._run = RunInfo(config.exp, config.run or 0, config.detector, config.kind,
                                (0, 0, 0), "", "psana2")
        else:
            self._describe(opened, what)
        return self

    def __exit__(self, *exc: object) -> None:
        # psana2 frees its shared memory collectively: a rank that fails alone must not even let
        # go of the run, or it would wait for the others instead of saying why it failed
        if exc and exc[0] is None and self._opened is not None:
            self._opened.run.close_shared_memory()
            self._opened = None

    @property
    def distributes(self) -> bool:
        """True when psana2 deals the events to ranks (exp and run under MPI)."""
        return self._opened is not None and self._opened.parallel

    @property
    def run(self) -> RunInfo:
        if self._run is None:
            raise RuntimeError("the source is not open; use it in a with statement")
        return self._run

    def works(self) -> bool:
        return self._opened is not None and self._opened.works

    def expected_events(self) -> int:
        events = len(self._index)
        return events if self.config.max_events is None else min(events, self.config.max_events)

    def scalar_columns(self) -> Mapping[str, Column]:
        return scalar_columns()

    def constants(self) -> Constants:
        """Constants from the file, or as psana2 fetched them.

        Raises :class:`ConstantsError` where there are no pedestals: psana2's own ``calib`` would
        return raw words then, with no more than a line in the log.
        """
        if self._constants is None:
            if self._opened is None or self._opened.serves:
                raise SourceError("this rank is a psana2 server (PS_SRV_NODES) and knows no "
                                  "detector; ask for constants on another rank")
            control = None
            if self._kind.kind == "epix10ka" and not self._kind.calibrated:
                control = self._control_bits()
            self._constants = run_constants(
                self._kind, self.run.detector, self.run.panel_shape, self._stated,
                own=self._psana_constants, control_PSF=control)
        return self._constants

    def frames(self, shard: Shard) -> Iterator[Frame]:
        opened = self._opened
        if opened is None:
            raise RuntimeError("the source is not open; use it in a with statement")
        wanted_E = np.zeros(len(self._index), bool)
        wanted_E[: self.expected_events()] = True
        if shard.todo is not None:
            mask_E = np.zeros(len(self._index), bool)
            mask_E[shard.todo[shard.todo < len(mask_E)]] = True
            wanted_E &= mask_E
        readable_E = wanted_E & self._index.readable_E
        reader = None if opened.serves else _Reader(self, opened, shard.panels)
        with closing(self._events(readable_E, shard.stopping)) as events:
            if opened.parallel or opened.serves:
                yield from self._dealt(events, reader, wanted_E & ~readable_E, shard)
            else:
                yield from self._claimed(events, reader, shard)

    # --- events ---

    def _dealt(self, events: Iterator[tuple[int, Any]], reader: _Reader | None,
               unreadable_E: np.ndarray, shard: Shard) -> Iterator[Frame]:
        """psana2 decides which rank gets which event."""
        for index, event in events:
            assert reader is not None
            yield reader.frame(index, event)
        if self._opened is not None and self._opened.last:
            for index in np.flatnonzero(unreadable_E).tolist():
                if shard.stopping():
                    return
                yield self._lost(index)

    def _claimed(self, events: Iterator[tuple[int, Any]], reader: _Reader | None,
                 shard: Shard) -> Iterator[Frame]:
        """This process sees all events and keeps those that it claimed."""
        assert reader is not None
        at, event = -1, None
        for index in shard.indices():
            if index >= self.expected_events():
                break
            while at < index and self._index.readable_E[index]:
                at, event = next(events, (_UNWRITTEN, None))
            if at == index:
                yield reader.frame(index, event)
            else:
                yield self._lost(index)

    def _events(self, readable_E: np.ndarray,
                stopping: Callable[[], bool]) -> Generator[tuple[int, Any], None, None]:
        """(event index, psana event) of the readable events that psana2 gives this rank.

        Leaving a loop over psana2's events early makes an MPI job wait for ever, so an
        interruption (or a consumer that goes away) terminates the run and lets it run dry.
        """
        opened = self._opened
        assert opened is not None
        if self._started:
            raise RuntimeError("a psana2 run can be read only once; open the source again")
        if not readable_E.any():
            return                  # to psana2 an empty filter means "all events"
        self._started = True
        index = self._index
        if not readable_E.all() and not opened.serves:
            # read by psana2 when it starts to build events; sorted, as it expects
            opened.datasource.dsparms.timestamps = np.unique(index.times_E[readable_E])
        repeats: dict[int, int] = {}
        stream = opened.run.events()
        dry = False
        try:
            for event in stream:
                if dry:
                    continue
                at = index.position(int(event.timestamp))
                if at < 0:
                    raise RunDamaged(f"{self._what}: psana2 delivers an event at time "
                                     f"{event.timestamp} that no small-data file lists; copy the "
                                     "run's files again")
                if index.repeated:
                    again = repeats.get(at, 0)
                    repeats[at] = again + 1
                    at += again
                if at < len(readable_E) and readable_E[at]:
                    yield at, event
                if stopping():
                    self._terminate()
                    dry = True
            dry = True
        finally:
            if not dry and opened.parallel:
                self._terminate()
                for _ in stream:
                    pass

    def _terminate(self) -> None:
        """End the run early, without a collective and without leaving other ranks waiting."""
        assert self._opened is not None
        run = self._opened.run
        run.terminate()
        if self._opened.parallel and getattr(run, "dm", None) is not None:
            # events that are already dealt still pass by: let psana2 not read their pixels
            run.dm.n_files = 0

    def _lost(self, index: int) -> Frame:
        """An event that the small data list and that cannot be read."""
        return Frame(None, int(self._index.times_E[index]), index, status=EventStatus.UNREADABLE)

    # --- opening ---

    def _check_repeats(self, opened: Opened, what: str) -> None:
        if self._index.repeated and opened.ranks > 1 and opened.parallel:
            raise RunDamaged(
                f"{what}: {self._index.repeated} events repeat the timestamp of another one; which "
                "is which cannot be told when several ranks share them: run without mpirun")

    def _describe(self, opened: Opened, what: str) -> None:
        config = self.config
        exp, number = opened.run.expt, opened.run.runnum
        if config.exp and exp is not None and exp != config.exp:
            raise RunNotFound(f"{what} was asked for; the files are of experiment {exp!r}: check "
                              "--exp and --dir")
        if config.run is not None and number is not None and number != config.run:
            raise RunNotFound(f"{what} was asked for; the files say they are run {number}: check "
                              "the run number and --dir")
        detector = area_detector(opened.run, config.detector, what)
        raw = detector.raw
        name = detector._det_name
        segments = list(raw._segment_numbers)
        shape = self._panel_shape(detector, what)
        self._check_segments(segments, shape, name, what)
        dtype = raw_dtype(opened.run, name)
        kind = config.kind or kind_of(detector._dettype, shape)
        floating = np.issubdtype(dtype, np.floating)
        self._kind: FrameKind = frame_kind(kind, dtype, constants=not floating,
                                           calibrated=config.calibrated, unit=config.unit)
        self._stated = Stated(config.geometry, config.constants, config.mask, config.distance_m,
                              edge_width=config.edge_width, gain_mode=config.gain_mode)
        self._detector = detector
        notes = [*opened.notes, *self._index.short_streams()]
        if not any(s.ended for s in self._index.streams):
            notes.append("the run was not closed (no EndRun): events may be missing at its end")
        if exp is None:
            notes.append("the files do not say which experiment they are of")
        if "ebeam" not in opened.run.detnames:
            notes.append("the run has no ebeam detector, so its photon energy is "
                         + (f"taken as {config.photon_energy_eV} eV" if config.photon_energy_eV
                            else "assumed; state source.photon_energy_eV"))
        if self._index.repeated:
            notes.append(f"{self._index.repeated} events repeat the timestamp of another event; "
                         "their index tells them apart")
        for note in notes:
            log.info("%s", note)
        files = [s.big for s in self._index.streams]
        self._run = RunInfo(
            exp=config.exp or exp or files[0].name.split("-r")[0],
            run=int(config.run if config.run is not None else number or 0),
            detector=name, detector_kind=kind, panel_shape=shape, raw_dtype=str(dtype),
            source="psana2", notes=tuple(notes),
            provenance={
                "psana_version": opened.version,
                "source_files": "\n".join(str(f.resolve()) for f in files),
                "source_bytes": "\n".join(str(f.stat().st_size) for f in files),
                "segments": " ".join(str(s) for s in segments),
            })

    def _panel_shape(self, detector: Any, what: str) -> tuple[int, int, int]:
        """(P, S, F) as the detector's kind says; P counts the segments that the run has."""
        raw = detector.raw
        try:
            kind = kind_of(detector._dettype, None)
            panel = detectors.detector(kind).panel_shape_SF if kind else None
            if panel is not None:
                return len(raw._segment_numbers), *panel
            shape = tuple(int(n) for n in raw._shape_as_daq())
        except (AttributeError, TypeError) as error:
            raise RunDamaged(f"{what}: psana2 does not state the shape of {detector._det_name!r} "
                             f"({error}); state source.kind") from error
        return int(np.prod(shape[:-2], dtype=int)), shape[-2], shape[-1]

    def _check_segments(self, segments: list[int], shape: tuple[int, int, int], name: str,
                        what: str) -> None:
        """psana2 makes a smaller detector, silently, when the stream of a segment is missing."""
        expected = self.config.panels or _panels_of_constants(self.config.constants, name,
                                                              shape[1:])
        missing = sorted(set(range(expected or max(segments) + 1)) - set(segments))
        if (expected is not None and expected != shape[0]) or (expected is None and missing):
            stated = (f"{expected} panels were expected (source.panels or the constants)"
                      if expected else f"segments up to {max(segments)} were expected")
            raise RunDamaged(
                f"{what}: {name!r} has {shape[0]} panels (segments {segments}), {stated}; missing: "
                f"{missing or 'none'}. Is a stream's small-data file missing? If the run was taken "
                f"so, state source.panels = {shape[0]} and constants for these panels")

    def _psana_constants(self) -> dict[str, Any]:
        return calibration_of(self._detector)

    def _control_bits(self) -> np.ndarray | None:
        bits = getattr(self._detector.raw, "_cbits_config_detector", lambda: None)()
        return None if bits is None else np.asarray(bits).reshape(self.run.panel_shape)


class _Reader:
    """Turns psana events into frames; pixels go into one buffer that is used again."""

    def __init__(self, source: Source, opened: Opened, panels: tuple[int, ...] | None) -> None:
        from psana.detector.areadetector import AreaDetectorRaw

        self._config = source.config
        self._raw = source._detector.raw
        self._name = source.run.detector
        self._segments = list(self._raw._segment_numbers)
        self._shape = source.run.panel_shape
        # detectors that only stack their segments are copied panel by panel, the wanted ones only
        self._stacks = type(self._raw).raw is AreaDetectorRaw.raw and (
            len(self._segments) == self._shape[0])
        self._panels = range(self._shape[0]) if panels is None else panels
        self._buffer_PSF = np.zeros(self._shape, source.run.raw_dtype)
        self._scalars = _Scalars(opened.run, source.config)

    def frame(self, index: int, event: Any) -> Frame:
        found = event._det_segments.get((self._name, "raw"), {})
        damage, status = self._judge(event, found)
        raw = None
        if status is EventStatus.OK or (
                status is EventStatus.DAMAGED and self._config.damaged == "analyse"):
            raw, status = self._pixels(event, found)
        scalars, codes = self._scalars(event)
        return Frame(raw, int(event.timestamp), index, damage=damage, scalars=scalars,
                     event_codes=codes, status=status)

    def _judge(self, event: Any, found: Mapping[int, Any]) -> tuple[int, EventStatus]:
        """Damage bits and status of an event, before its pixels are looked at."""
        damage = elsewhere = 0
        for dgram in event._dgrams:
            if dgram is not None:
                bits = int(dgram._xtc.damage)
                elsewhere |= bits
                if self._name in dgram.__dict__:
                    damage |= bits
        for segment in found.values():
            damage |= int(getattr(getattr(segment, "_xtc", None), "damage", 0))
        present = sum(number in found for number in self._segments)
        if present < len(self._segments):
            return damage | elsewhere, (EventStatus.WRONG_SHAPE if present
                                        else EventStatus.NO_DETECTOR)
        if damage & DAMAGE_BITS:
            return damage, EventStatus.DAMAGED
        return damage, EventStatus.OK

    def _pixels(self, event: Any,
                found: Mapping[int, Any]) -> tuple[np.ndarray | None, EventStatus]:
        if not self._stacks:
            whole = self._raw.raw(event)
            if whole is None:
                return None, EventStatus.NO_DETECTOR
            if whole.size != self._buffer_PSF.size:
                return None, EventStatus.WRONG_SHAPE
            return whole.reshape(self._shape), EventStatus.OK
        size = self._shape[1] * self._shape[2]
        if any(found[number].raw.size != size for number in self._segments):
            return None, EventStatus.WRONG_SHAPE
        for panel in self._panels:
            pixels = found[self._segments[panel]].raw
            np.copyto(self._buffer_PSF[panel], pixels.reshape(self._shape[1:]))
        return self._buffer_PSF, EventStatus.OK


class _Scalars:
    """Beam and scan values of an event, as far as the run has them."""

    def __init__(self, run: Any, config: Source.Config) -> None:
        self._config = config
        names = run.detnames

        def fields(name: str, *wanted: str) -> list[Callable[[Any], Any]]:
            raw = getattr(run.Detector(name), "raw", None) if name in names else None
            return [getattr(raw, field) for field in wanted if hasattr(raw, field)]

        self._energy = fields("ebeam", "ebeamPhotonEnergy") or fields("ebeamh", "ebeamPhotonEnergy")
        self._pulse = (fields("gasdet", "f_11_ENRC", "f_12_ENRC")
                       or fields("gmd", "milliJoulesPerPulse", "energy")[:1]
                       or fields("xgmd", "milliJoulesPerPulse", "energy")[:1])
        self._codes = fields("timing", "eventcodes")
        self._step = run.Detector("step_value", accept_missing=True)
        self._distance = run.Detector(config.distance_pv, accept_missing=True)

    def __call__(self, event: Any) -> tuple[dict[str, float], tuple[int, ...]]:
        scalars: dict[str, float] = {}
        for read in self._energy:
            if plausible(energy := read(event), *_ENERGY_RANGE_EV):
                scalars["photon_energy_eV"] = float(energy)
        pulses = [float(p) for read in self._pulse if plausible(p := read(event), 0.0, 1e4)]
        if pulses:
            scalars["pulse_energy_mJ"] = sum(pulses) / len(pulses)
        if plausible(step := self._step(event), -1e300, 1e300):
            scalars["step_value"] = float(step)
        if self._config.distance_m is not None:
            scalars["distance_m"] = self._config.distance_m
        elif plausible(distance := self._distance(event), 0.1, 1e6):
            scalars["distance_m"] = float(distance) * 1e-3
        codes: tuple[int, ...] = ()
        for read in self._codes:
            flags = read(event)
            if flags is not None:
                codes = tuple(int(n) for n in np.flatnonzero(np.asarray(flags)))
        return scalars, codes


def calibration_of(detector: Any) -> dict[str, Any]:
    """{type: array or text} that psana2 holds for a detector.

    psana2 keeps (value, document) pairs; over MPI, with an empty document, the value alone.
    """
    pairs = (detector.calibconst or {}).items()
    found = {kind: value[0] if isinstance(value, tuple) and len(value) == 2 else value
             for kind, value in pairs}
    return {kind: value for kind, value in found.items() if value is not None}


def kind_of(dettype: str | None, shape: tuple[int, int, int] | None) -> str:
    """Our name of a psana detector type; "" when only the shape (not given) could tell."""
    for kind in detectors.kinds():
        if dettype and detectors.detector(kind).psana_dettype == dettype:
            return kind
    return detectors.guess_kind(shape) if shape is not None else ""


def _panels_of_constants(path: str | None, name: str, panel: tuple[int, int]) -> int | None:
    """How many panels a constants file describes; None when it cannot be told."""
    import h5py

    if path is None or not Path(path).is_file():
        return None
    try:
        with h5py.File(path) as file:
            groups = [g for g in file.values() if isinstance(g, h5py.Group)]
            group = file.get(name, groups[0] if len(groups) == 1 else None)
            pedestals = group.get("pedestals") if isinstance(group, h5py.Group) else None
            if isinstance(pedestals, h5py.Dataset) and pedestals.ndim >= 3 and (
                    pedestals.shape[-2:] == panel):
                return int(pedestals.shape[-3])
    except OSError as error:
        raise ConstantsError(f"constants {path} cannot be read ({error}); copy the file "
                             "again") from error
    return None


def fetch_constants(exp: str, run: int, detector: str = "",
                    directory: str | None = None) -> tuple[str, dict[str, Any]]:
    """(detector name, constants) of a run as psana2 finds them: names and shapes as psana's.

    For ``detectors.save_constants``; a single process.  Raises :class:`ConstantsError` when psana
    has none (or its database cannot be reached), and the errors of opening a run.
    """
    config = Source.Config(exp=exp, run=run, detector=detector, dir=directory)
    with Source(config) as source:
        found = source._psana_constants()
        name = source.run.detector
        if "pedestals" not in found:
            reasons = "; ".join(source.run.notes) or "the calibration database has none"
            raise ConstantsError(f"psana has no pedestals of {name!r} for run {run} of {exp} (it "
                                 f"has: {', '.join(found) or 'nothing'}): {reasons}")
        return name, {k: np.array(v) if isinstance(v, np.ndarray) else v
                      for k, v in found.items()}
