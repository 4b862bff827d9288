"""HDF5, CXI and NeXus files as a source of events.

One or more files (or globs) are one run.  Events are ordered by (timestamp, file, position); the
position in that order is their ``index``.  Without times in the files, that is file order.
"""
from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import h5py
import msgspec
import numpy as np

from .. import detectors
from ..core import (
    Column,
    ConfigurationError,
    Constants,
    EventStatus,
    Frame,
    RunDamaged,
    RunInfo,
    Shard,
    XfelClassifyError,
)
from . import hdf5_layouts as layouts
from .hdf5_files import H5_ERRORS, Walk, event_status, open_file, require_filters, walk
from .run_constants import (
    HC_EV_A,
    FrameKind,
    Stated,
    expand,
    frame_kind,
    run_constants,
    scalar_columns,
    word,
)

__all__ = ["Source"]

log = logging.getLogger(__name__)

_MAX_OPEN = 32          # files kept open at a time by one rank


@dataclass
class _Block:
    """Consecutive events in one dataset of one file."""

    file: Path
    dataset: str
    events: int
    status_N: np.ndarray
    frame_mask: str | None = None
    codes: list[tuple[int, ...]] | None = None
    damage_N: np.ndarray | None = None
    scalars: dict[str, np.ndarray] = field(default_factory=dict)


class Source:
    """Events of HDF5 files; see the module.  Implements :class:`xfel_classify.core.EventSource`."""

    class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
        """Values stated here win over what the files say."""

        files: list[str] = []               # files and globs; together one run
        dataset: str | None = None          # path of the images inside of the files
        detector: str = ""                  # kind or name; "assembled" for 2-D images
        kind: str = ""                      # detector kind where ``detector`` is a name
        panel_shape: tuple[int, int, int] | None = None     # [panels, rows, columns]
        exp: str | None = None
        run: int | None = None
        constants: str | None = None        # HDF5 file with pedestals, pixel_gain, ...
        geometry: str | None = None         # psana .data or CrystFEL .geom
        mask: str | None = None             # npy, npz or file.h5:/dataset; 1 = good
        edge_width: int = 0                 # pixels masked along every ASIC edge
        gain_mode: str | None = None        # ePix10ka: FH, FM, FL, AHL, AML
        calibrated: bool | None = None      # None: floating point or no constants
        unit: str | None = None             # of calibrated values: keV, photon, ADU
        photon_energy_eV: float | None = None
        wavelength_A: float | None = None
        distance_m: float | None = None
        pixel_size_m: float | None = None
        beam_center_px: tuple[float, float] | None = None   # [fast, slow] from the image's corner
        damaged: Literal["flag", "analyse"] = "flag"    # what to do with damaged images
        max_events: int | None = None

    distributes = False
    keeps_raw = False

    def __init__(self, config: Config) -> None:
        self.config = config
        if not config.files:
            raise ConfigurationError("source hdf5 was given no files; name HDF5 files or globs")
        if config.photon_energy_eV is not None and config.wavelength_A is not None:
            raise ConfigurationError("both source.photon_energy_eV and source.wavelength_A are "
                                     "stated; state one of them")
        if config.unit not in (None, "keV", "photon", "ADU"):
            raise ConfigurationError(f"source.unit = {config.unit!r}; use keV, photon or ADU")
        self._blocks: list[_Block] = []
        self._open: dict[Path, h5py.File] = {}
        self._run: RunInfo | None = None
        self._constants: Constants | None = None
        self._good: np.ndarray | None = None

    # --- the protocol ---

    def __enter__(self) -> Source:
        notes: list[str] = []
        stamps: list[np.ndarray] = []
        first: tuple[tuple[int, ...], np.dtype] | None = None
        named: list[tuple[str | None, int | None]] = []
        files = expand(self.config.files)
        self._good = None
        for path in files:
            try:
                frame, dtype, times, name = self._scan(path, first, notes)
            except XfelClassifyError:
                raise
            except H5_ERRORS as error:
                raise RunDamaged(f"file {path} opens, but its contents are damaged ({error}); copy "
                                 "it again from where it was written") from error
            first = first or (frame, dtype)
            stamps.append(times)
            named.append(name)
        assert first is not None
        self._order(stamps, notes)
        self._describe(files, named, first, notes)
        return self

    def __exit__(self, *exc: object) -> None:
        for file in self._open.values():
            file.close()
        self._open.clear()

    @property
    def run(self) -> RunInfo:
        if self._run is None:
            raise RuntimeError("the source is not open; use it in a with statement")
        return self._run

    def works(self) -> bool:
        return True

    def expected_events(self) -> int:
        events = len(self._block_E)
        return events if self.config.max_events is None else min(events, self.config.max_events)

    def scalar_columns(self) -> Mapping[str, Column]:
        return scalar_columns()

    def constants(self) -> Constants:
        if self._constants is None:
            self._constants = run_constants(
                self._kind, self.run.detector, self.run.panel_shape, self._stated,
                good_PSF=self._good_panels())
        return self._constants

    def frames(self, shard: Shard) -> Iterator[Frame]:
        if self.expected_events() == 0:
            return
        reader = _Reader(self, shard.panels)
        events = self.expected_events()
        for index in shard.indices(reader.chunk):
            if index >= events:
                break
            yield reader.frame(index)

    def pixel_location(self, index: int) -> tuple[str, str, int]:
        """(file, dataset, position along its first axis) of the pixels of event ``index``.

        External links are resolved, so the file is the one that holds the dataset.
        """
        block, position = self._blocks[self._block_E[index]], int(self._position_E[index])
        dataset = self._dataset(block)
        return str(Path(dataset.file.filename).resolve()), dataset.name, position

    # --- opening ---

    def _scan(self, path: Path, first: tuple[tuple[int, ...], np.dtype] | None,
              notes: list[str]) -> tuple:
        """Add the events of one file; its (frame shape, dtype, timestamps, (exp, run))."""
        file = self._file(path)
        found = walk(file)
        names = layouts.image_datasets(found, str(path), self.config.dataset)
        shape, dtype = found.datasets[names[0]].shape, found.datasets[names[0]].dtype
        frame = shape if len(shape) == 2 else shape[1:]
        times = self._add(path, found, names, first or (frame, dtype), notes)
        if self._good is None:
            self._good = layouts.fixed_mask(found, names[0], frame)
        return frame, dtype, times, layouts.experiment_of(file, found, path.stem)

    def _add(self, path: Path, found: Walk, names: list[str],
             first: tuple[tuple[int, ...], np.dtype], notes: list[str]) -> np.ndarray:
        """Append the blocks of one file; returns its (N,) timestamps, or an empty array."""
        blocks = []
        problems: list[str] = []
        for name in names:
            dataset = found.datasets[name]
            require_filters(dataset)
            if dataset.ndim == 2:
                events, frame, status = 1, dataset.shape, np.zeros(1, np.int8)
            else:
                events, frame = dataset.shape[0], dataset.shape[1:]
                status = event_status(dataset, problems)
            if frame != first[0]:
                notes.append(f"{path}:{name} holds frames of {frame}, the run's are {first[0]}; "
                             "its events are reported with status WRONG_SHAPE")
                status = np.full(events, EventStatus.WRONG_SHAPE, np.int8)
            mask = None if dataset.ndim == 2 else layouts.frame_mask(found, name, dataset.shape)
            blocks.append(_Block(path, name, events, status, mask))
        total = sum(b.events for b in blocks)
        scalars = layouts.read_scalars(found, total)
        codes = layouts.event_codes(found, total)
        damage, present = layouts.damage_and_presence(found, names[0], total)
        status_N = np.concatenate([b.status_N for b in blocks])
        if present is None or status_N[present].any():
            notes += problems           # else the file itself says that those have no image
        at = 0
        for block in blocks:
            span = slice(at, at + block.events)
            block.scalars = {k: v[span] for k, v in scalars.items()}
            block.codes = None if codes is None else codes[span]
            self._flag(block, None if damage is None else damage[span],
                       None if present is None else present[span])
            at += block.events
        self._blocks += blocks
        times = layouts.read_timestamps(found, total)
        return np.zeros(0, np.uint64) if times is None else times[0]

    def _flag(self, block: _Block, damage: np.ndarray | None, present: np.ndarray | None) -> None:
        """Statuses that the file itself states, where the pixels are not at fault already."""
        fine = block.status_N == EventStatus.OK
        if damage is not None:
            block.damage_N = damage
            if self.config.damaged == "flag":
                block.status_N[fine & (damage != 0)] = EventStatus.DAMAGED
        if present is not None:
            block.status_N[~present] = EventStatus.NO_DETECTOR

    def _order(self, stamps: list[np.ndarray], notes: list[str]) -> None:
        """Fix block, position and timestamp of every event index."""
        block_E = np.repeat(np.arange(len(self._blocks)), [b.events for b in self._blocks])
        position_E = np.concatenate([np.arange(b.events) for b in self._blocks])
        stamp_E = np.concatenate(stamps) if stamps else np.zeros(0, np.uint64)
        if len(stamp_E) != len(block_E):
            if len(stamp_E):
                notes.append("only some of the files state the times of their events; events are "
                             "numbered in file order and carry that number as timestamp")
            else:
                notes.append("the files state no times of their events; events are numbered in "
                             "file order and carry that number as timestamp")
            stamp_E = np.arange(len(block_E), dtype=np.uint64)
        order = np.argsort(stamp_E, kind="stable")
        self._block_E = block_E[order].astype(np.int64)
        self._position_E = position_E[order].astype(np.int64)
        self._stamp_E = stamp_E[order]
        repeated = len(stamp_E) - len(np.unique(stamp_E))
        if repeated:
            notes.append(f"{repeated} events repeat the timestamp of another event; their index "
                         "tells them apart")

    def _describe(self, files: list[Path], named: list[tuple[str | None, int | None]],
                  first: tuple[tuple[int, ...], np.dtype], notes: list[str]) -> None:
        config = self.config
        frame, dtype = first
        kind = config.kind or (config.detector if config.detector in detectors.kinds() else "")
        kind = kind or detectors.guess_kind(config.panel_shape or frame)
        shape = layouts.panel_shape(frame, kind, config.panel_shape)
        self._frame_shape = frame
        self._stated = Stated(config.geometry, config.constants, config.mask, config.distance_m,
                              config.pixel_size_m, config.beam_center_px, config.edge_width,
                              config.gain_mode)
        self._kind = frame_kind(kind, dtype, constants=bool(config.constants),
                                calibrated=config.calibrated, unit=config.unit)
        self._dtype = np.dtype(np.float32) if self._kind.calibrated else dtype.newbyteorder("=")
        if not self._kind.calibrated and dtype.kind not in "iu":
            raise ConfigurationError(f"source.calibrated = false, but the pixels are {dtype}; raw "
                                     "words are integers: leave source.calibrated away")
        self._state_scalars(notes)
        if any(b.frame_mask for b in self._blocks) and not self._kind.calibrated:
            self._fix_mask(notes)
        if all(b.status_N.all() for b in self._blocks if b.events) and len(self._block_E):
            raise RunDamaged(f"no event of {', '.join(map(str, files))} can be read: "
                             f"{'; '.join(notes)}")
        exp = config.exp or next((e for e, _ in named if e), None) or word(files[0].stem)
        run = config.run if config.run is not None else next(
            (r for _, r in named if r is not None), 0)
        if self._kind.calibrated and dtype.kind in "iu":
            notes.append(f"pixels are {dtype} and no constants were given: used as calibrated "
                         f"values in {self._kind.unit}")
        if kind == "assembled" and config.beam_center_px is None and not config.geometry:
            notes.append("no beam centre was stated: the centre of the image is taken")
        for note in notes:
            log.info("%s", note)
        self._run = RunInfo(
            exp=exp, run=run, detector=config.detector or kind, detector_kind=kind,
            panel_shape=shape, raw_dtype=str(self._dtype), source="hdf5", notes=tuple(notes),
            provenance={
                "source_files": "\n".join(str(f.resolve()) for f in files),
                "source_bytes": "\n".join(str(f.stat().st_size) for f in files),
                "source_dataset": self._blocks[0].dataset if self._blocks else "",
            })

    def _state_scalars(self, notes: list[str]) -> None:
        """Stated values win over those of the files."""
        config = self.config
        energy = config.photon_energy_eV
        if config.wavelength_A is not None:
            energy = HC_EV_A / config.wavelength_A
        missing = 0
        for block in self._blocks:
            for name, value in (("photon_energy_eV", energy), ("distance_m", config.distance_m)):
                if value is not None:
                    block.scalars[name] = np.full(block.events, value)
            found = block.scalars.get("photon_energy_eV", np.full(block.events, np.nan))
            missing += int(np.count_nonzero(~np.isfinite(found)))
        if missing:
            notes.append(f"{missing} of {sum(b.events for b in self._blocks)} events state no "
                         "photon energy, so one is assumed; state source.photon_energy_eV or "
                         "source.wavelength_A")

    def _fix_mask(self, notes: list[str]) -> None:
        """Raw words cannot carry a mask of their own: that of the first event is used for all."""
        block = next(b for b in self._blocks if b.frame_mask)
        first = np.asarray(self._file(block.file)[block.frame_mask][0]) == 0
        self._good = first if self._good is None else self._good & first
        for other in self._blocks:
            other.frame_mask = None
        notes.append("the files hold a mask per event; frames are raw, so that of the first event "
                     "is used for all of them")

    def _good_panels(self) -> np.ndarray | None:
        if self._good is None:
            return None
        return detectors.as_panels(self._good, self._kind.kind).reshape(self.run.panel_shape)

    # --- files ---

    def _file(self, path: Path) -> h5py.File:
        file = self._open.get(path)
        if file is None:
            while len(self._open) >= _MAX_OPEN:
                self._open.pop(next(iter(self._open))).close()
            file = self._open[path] = open_file(path)
        return file

    def _dataset(self, block: _Block) -> h5py.Dataset:
        return self._file(block.file)[block.dataset]


class _Reader:
    """Reads frames of an open source into one buffer that is used again for every event."""

    def __init__(self, source: Source, panels: tuple[int, ...] | None) -> None:
        self._source = source
        self._kind: FrameKind = source._kind
        self._shape = source.run.panel_shape
        self._buffer_PSF = np.zeros(self._shape, source._dtype)
        # a Cheetah CSPAD slab has its quadrants side by side: read it whole, then cut it
        self._staging: np.ndarray | None = None
        if self._frame_is_slab():
            self._staging = np.zeros(source._frame_shape, source._dtype)
        self._panels = panels
        dataset = source._dataset(source._blocks[0])
        self.chunk = min(32, dataset.chunks[0]) if dataset.chunks and dataset.ndim > 2 else 1

    def _frame_is_slab(self) -> bool:
        _, slow, fast = self._shape
        frame = self._source._frame_shape
        return frame[-1] != fast or (len(frame) == 2 and frame[0] % slow != 0)

    def frame(self, index: int) -> Frame:
        source = self._source
        block = source._blocks[source._block_E[index]]
        position = int(source._position_E[index])
        status = EventStatus(int(block.status_N[position]))
        raw = None
        if status is EventStatus.OK:
            try:
                raw = self._read(block, position)
            except H5_ERRORS as error:
                log.warning("event %d: %s:%s[%d] cannot be read (%s)", index, block.file,
                            block.dataset, position, error)
                status = EventStatus.UNREADABLE
        scalars = {k: float(v[position]) for k, v in block.scalars.items()}
        return Frame(
            raw_PSF=raw, timestamp=int(source._stamp_E[index]), index=index, status=status,
            damage=0 if block.damage_N is None else int(block.damage_N[position]),
            scalars={k: v for k, v in scalars.items() if np.isfinite(v)},
            event_codes=block.codes[position] if block.codes is not None else ())

    def _read(self, block: _Block, position: int) -> np.ndarray:
        dataset = self._source._dataset(block)
        out_PSF = self._buffer_PSF
        where = () if dataset.ndim == 2 else (position,)
        if self._staging is not None:
            dataset.read_direct(self._staging, where or np.s_[:])
            cut = detectors.as_panels(self._staging, self._kind.kind)
            np.copyto(out_PSF, cut.reshape(self._shape))
        elif self._panels is not None and self._partial(dataset):
            for selection, panels in self._pieces(dataset):
                dataset.read_direct(out_PSF, (*where, *selection), panels)
        else:
            dataset.read_direct(out_PSF.reshape(self._source._frame_shape), where or np.s_[:])
        if block.frame_mask is not None:
            mask = self._source._file(block.file)[block.frame_mask][position]
            out_PSF[np.asarray(mask).reshape(self._shape) != 0] = np.nan
        return out_PSF

    def _partial(self, dataset: h5py.Dataset) -> bool:
        """True where reading some panels touches less of the file than reading all."""
        panels, slow, _ = self._shape
        if self._panels is None or len(self._panels) >= panels:
            return False
        if dataset.chunks is None:
            return True
        frame_chunk = dataset.chunks[-len(self._source._frame_shape):]
        if len(frame_chunk) > 2:
            return int(np.prod(frame_chunk[:-2])) < panels
        return frame_chunk[0] <= slow

    def _pieces(self, dataset: h5py.Dataset) -> Iterator[tuple[tuple, slice]]:
        """(selection in the frame, planes of the buffer) for runs of neighbouring panels."""
        frame = self._source._frame_shape
        slow = self._shape[1]
        wanted = sorted(set(self._panels or ()))
        while wanted:
            run = [wanted.pop(0)]
            while wanted and wanted[0] == run[-1] + 1 and len(frame) <= 3:
                run.append(wanted.pop(0))
            planes = slice(run[0], run[-1] + 1)
            if len(frame) == 2:
                yield (slice(run[0] * slow, (run[-1] + 1) * slow),), planes
            elif len(frame) == 3:
                yield (planes,), planes
            else:
                yield tuple(int(n) for n in np.unravel_index(run[0], frame[:-2])), planes
