"""Simulated runs as LCLS-II data: xtc2 files and their small-data index, for the real psana2.

Everything is written with psana's own ``DgramEdit``.  A run has one stream of scalars (run info,
gas detector, electron beam, step, detector distance) and one or more streams of the segments of a
Jungfrau, or of an ePix10ka with the control bits of its configuration.  The small-data file of a
stream repeats its transitions and holds, for every event, the place of the event in the big file.
"""
from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..core import ConfigurationError, MissingDependency
from ..detectors import save_constants
from .raw_epix10ka import Epix10kaRun
from .raw_runs import START_S, RawRun, RunFiles, TruthFile

__all__ = ["write_xtc2_run"]

DAMAGE_OUT_OF_SYNC = 1 << 2
_SMALL_DATA_NODE = 512


@dataclass(frozen=True)
class _Record:
    """A detector record of a stream: names as psana's readers look them up, and its fields."""

    name: str
    dettype: str
    detid: str
    alg: str
    version: tuple[int, int, int]
    fields: Mapping[str, tuple[Any, int]]
    segment: int = 0


def _floats(*names: str) -> dict[str, tuple[Any, int]]:
    return {name: (np.float64, 0) for name in names}


def _segment_records(kind: str, segment: int) -> list[_Record]:
    """What a stream holds of one segment; psana knows detectors by these names and versions."""
    if kind == "jungfrau":
        return [_Record(kind, kind, f"seg{segment:04d}", "raw", (0, 1, 0), {"raw": (np.uint16, 3)},
                        segment)]
    return [_Record(kind, kind, f"seg{segment:04d}", "raw", (3, 0, 1), {"raw": (np.uint16, 2)},
                    segment),
            _Record(kind, kind, f"seg{segment:04d}", "config", (3, 0, 0), {
                "cbitsConfig": (np.uint8, 2), "asicPixelConfig": (np.uint8, 3),
                "trbit": (np.uint8, 1)}, segment)]


_RUNINFO = _Record("runinfo", "runinfo", "", "runinfo", (0, 0, 1),
                   {"expt": (str, 1), "runnum": (np.uint32, 0)})
_GAS = ("f_11_ENRC", "f_12_ENRC", "f_21_ENRC", "f_22_ENRC", "f_63_ENRC", "f_64_ENRC")
_SCALARS = (
    _RUNINFO,
    _Record("gasdet", "gasdet", "gas0", "raw", (1, 0, 0), _floats(*_GAS)),
    _Record("ebeam", "ebeam", "ebeam0", "raw", (2, 0, 0),
            {**_floats("ebeamPhotonEnergy", "ebeamL3Energy"), "damageMask": (np.uint32, 0)}),
    _Record("scan", "scan", "scan0", "raw", (2, 0, 0),
            {**_floats("step_value"), "step_docstring": (str, 1)}),
    _Record("epics", "epics", "epics0", "raw", (2, 0, 0),
            _floats("detector_z", "photon_energy_set")),
)
_OFFSETS = _Record("smdinfo", "offset", "", "offsetAlg", (0, 0, 0),
                   {"intOffset": (np.uint64, 0), "intDgramSize": (np.uint64, 0)})


class _File:
    """One xtc2 file: a configuration and the dgrams that refer to it."""

    def __init__(self, path: Path, records: list[_Record], room: int) -> None:
        from psana.dgramedit import AlgDef, DetectorDef, DgramEdit
        from psana.psexp import TransitionId

        self._make, self._services = DgramEdit, TransitionId
        self._room, self._out = room, bytearray(room)
        self._configure = DgramEdit(transition_id=TransitionId.Configure, ts=0, bufsize=room)
        self._boxes = {}
        for number, record in enumerate(records):
            last = record is _OFFSETS
            detector = self._configure.Detector(
                DetectorDef(record.name, record.dettype, record.detid),
                AlgDef(record.alg, *record.version), dict(record.fields),
                nodeId=_SMALL_DATA_NODE if last else 1, namesId=0 if last else number,
                segment=record.segment)
            key = f"{record.name}/config" if record.alg == "config" else record.name
            self._boxes[key, record.segment] = getattr(detector, record.alg)
        self.path = path
        self._file = path.with_name(path.name + ".tmp").open("wb")
        self.offset = 0

    def dgram(self, service: str, stamp: int, content: Mapping[tuple[str, int], Mapping[str, Any]],
              damage: int = 0) -> int:
        """Append a dgram; returns its size in bytes."""
        if service == "Configure":
            edit = self._configure
            edit.updatetimestamp(stamp)
        else:
            edit = self._make(transition_id=getattr(self._services, service),
                              config_dgramedit=self._configure, ts=stamp, bufsize=self._room)
        for key, fields in content.items():
            box = self._boxes[key]
            for name, value in fields.items():
                setattr(box, name, value)
            edit.adddata(box)
        if damage:
            edit.updatedamage(damage)
        edit.save(self._out)
        self._file.write(memoryview(self._out)[:edit.size])
        self.offset += edit.size
        return int(edit.size)

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self.path.with_name(self.path.name + ".tmp"), self.path)


class _Stream:
    """A big-data file and its small-data companion, kept in step."""

    def __init__(self, directory: Path, stem: str, records: list[_Record], room: int) -> None:
        self.big = _File(directory / f"{stem}.xtc2", records, room)
        configured = sum(record.alg == "config" for record in records)
        self.small = _File(directory / "smalldata" / f"{stem}.smd.xtc2", [*records, _OFFSETS],
                           (1 + configured) << 20)

    def transition(self, service: str, stamp: int,
                   content: Mapping[tuple[str, int], Mapping[str, Any]] | None = None) -> None:
        self.big.dgram(service, stamp, content or {})
        self.small.dgram(service, stamp, {} if service == "EndRun" else content or {})

    def event(self, stamp: int, content: Mapping[tuple[str, int], Mapping[str, Any]],
              damage: int = 0) -> None:
        start = self.big.offset
        size = self.big.dgram("L1Accept", stamp, content, damage)
        self.small.dgram("L1Accept", stamp, {("smdinfo", 0): {
            "intOffset": start, "intDgramSize": size}}, damage)

    def close(self) -> None:
        self.big.close()
        self.small.close()


def write_xtc2_run(directory: Path | str, run: RawRun, events: int, *, exp: str,
                   streams: int = 1, steps: int = 1,
                   progress: Callable[[int], None] = lambda done: None) -> RunFiles:
    """Write the run into ``directory`` (the experiment's xtc directory) for psana2 to read.

    ``streams`` share the segments; ``steps`` divide the events into scan steps.  Besides
    ``{exp}-r{run:04d}-s*-c000.xtc2`` and ``smalldata/`` come ``constants.h5`` and
    ``{exp}-r{run:04d}-truth.h5``.  Raises :class:`MissingDependency` without psana2.
    """
    try:
        import psana.dgramedit  # noqa: F401
    except ImportError as error:
        raise MissingDependency(f"xtc2 files are written with psana2, which cannot be imported "
                                f"({error}); pip install 'xfel-classify[psana]', or write HDF5 "
                                "files instead") from error
    if run.kind not in ("jungfrau", "epix10ka"):
        raise ConfigurationError(f"an xtc2 run of detector {run.kind!r} was asked for; psana2 has "
                                 "no reader for it; simulate a jungfrau, or write HDF5 files")
    if not 1 <= streams <= run.segments:
        raise ConfigurationError(f"{streams} streams were asked for {run.segments} segments; "
                                 "give 1 to as many as there are segments")
    directory = Path(directory)
    (directory / "smalldata").mkdir(parents=True, exist_ok=True)
    stem = f"{exp}-r{run.conditions.run:04d}"
    shares = np.array_split(np.arange(run.segments), streams)
    layouts = [list(_SCALARS)] + [
        [_RUNINFO, *(one for s in share for one in _segment_records(run.kind, int(s)))]
        for share in shares]
    panel_bytes = 2 * run.shape[1] * run.shape[2]
    written = [_Stream(directory, f"{stem}-s{i:03d}-c000", records,
                       (1 << 20) + (len(records) - 1) * (panel_bytes + 4096) * (i > 0))
               for i, records in enumerate(layouts)]
    truth = TruthFile(directory / f"{stem}-truth.h5")

    def everywhere(service: str, stamp: int, scalars: Mapping | None = None,
                   both: Mapping | None = None) -> None:
        for i, stream in enumerate(written):
            stream.transition(service, stamp, {**(both or {}), **(scalars or {} if i == 0 else {})})

    clock = iter(range(1, 1 << 30))

    def just_before_the_run() -> int:
        return ((START_S - 1) << 32) | (next(clock) * 1000)

    configured = just_before_the_run()
    for share, stream in zip([shares[0][:0], *shares], written, strict=True):
        stream.transition("Configure", configured, {
            (f"{run.kind}/config", int(s)): _camera(run.control_PSF[s])
            for s in share if isinstance(run, Epix10kaRun)})
    everywhere("BeginRun", just_before_the_run(), both={
        ("runinfo", 0): {"expt": exp, "runnum": run.conditions.run}})
    bounds = np.linspace(0, events, steps + 1).round().astype(int)
    last = just_before_the_run()
    for step in range(steps):
        last += 1000
        everywhere("BeginStep", last, {("scan", 0): {
            "step_value": float(step), "step_docstring": f'{{"step": {step}}}'}})
        everywhere("Enable", last + 1000)
        everywhere("SlowUpdate", last + 2000, {("epics", 0): {
            "detector_z": 1000 * run.conditions.distance_m,
            "photon_energy_set": run.conditions.photon_energy_eV}})
        for event in run.events(range(bounds[step], bounds[step + 1])):
            _write_event(written, shares, event, run.kind)
            truth.add(event)
            last = event.timestamp
            progress(event.index + 1)
        everywhere("Disable", last + 1000)
        last += 2000
        everywhere("EndStep", last)
    everywhere("EndRun", last + 1000)
    for stream in written:
        stream.close()
    constants = directory / "constants.h5"
    save_constants(constants, run.kind, run.constants())
    return RunFiles(tuple(stream.big.path for stream in written), constants, truth.write())


def _camera(control_SF: np.ndarray) -> dict[str, np.ndarray]:
    """Configuration of an ePix10ka panel whose pixels have these control bits."""
    return {"cbitsConfig": control_SF,
            "asicPixelConfig": np.full((4, 178, 192), control_SF[0, 0] & 0xF, np.uint8),
            "trbit": np.full(4, control_SF[0, 0] >> 4, np.uint8)}


def _write_event(streams: list[_Stream], shares: list[np.ndarray], event: Any, kind: str) -> None:
    pulse, energy = event.truth.pulse_energy_mJ, event.truth.photon_energy_eV
    gas = dict(zip(_GAS, (pulse, pulse, 0.9 * pulse, 0.9 * pulse, 0.01 * pulse, 0.01 * pulse),
                   strict=True))
    streams[0].event(event.timestamp, {
        ("gasdet", 0): gas,
        ("ebeam", 0): {"ebeamPhotonEnergy": energy, "ebeamL3Energy": 1000 * (energy / 250) ** 0.5,
                       "damageMask": 0}})
    if event.raw_PSF is None:
        return
    for share, stream in zip(shares, streams[1:], strict=True):
        stream.event(event.timestamp, {
            (kind, int(s)): {"raw": event.raw_PSF[s:s + 1] if kind == "jungfrau"
                             else event.raw_PSF[s]} for s in share},
            damage=DAMAGE_OUT_OF_SYNC if event.damaged else 0)
