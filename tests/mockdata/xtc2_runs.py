"""A small writer of LCLS-II (xtc2) runs with every defect that the tests need.

Big and small data are written with psana's own ``DgramEdit``; pixels are a function of event and
segment (:func:`pixels`), so that a test can say what it must read.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

PANEL = (512, 1024)
START = 1_100_000_000 << 32


def pixels(event: int, segment: int) -> np.ndarray:
    """(1, 512, 1024) uint16, different in every event and segment."""
    rows, columns = np.ogrid[0:PANEL[0], 0:PANEL[1]]
    image = 2900 + (rows * 7 + columns * 3 + 101 * event + 31 * segment) % 1000
    return image.astype(np.uint16)[None]


@dataclass
class Run:
    """What to write.  ``damage`` {event: bits} and ``missing`` {event: segments without data}
    concern the area detector; ``times`` overrides the timestamps (repeats are allowed);
    ``energy`` {event: photon energy}; ``scalars`` False writes no beam detectors at all."""

    exp: str = "cxitst42"
    run: int = 7
    events: int = 8
    segments: int = 1
    streams: int = 1
    steps: int = 1
    damage: dict[int, int] = field(default_factory=dict)
    missing: dict[int, tuple[int, ...]] = field(default_factory=dict)
    energy: dict[int, float] = field(default_factory=dict)
    times: list[int] | None = None
    scalars: bool = True
    gmd: bool = False
    runinfo: str | None = None          # experiment name inside of the files
    distance_mm: float = 150.0
    codes: dict[int, tuple[int, ...]] = field(default_factory=dict)
    closed: bool = True                 # write EndRun
    chunk_at: int | None = None         # scan step at which big data go on in chunk files -c001

    def stamps(self) -> list[int]:
        """Timestamps of the events."""
        return self.times or [START | (1_000_000 * (50 + 10 * n)) for n in range(self.events)]


class _Record:
    def __init__(self, name: str, dettype: str, detid: str, algorithm: str,
                 version: tuple[int, int, int], fields: dict, segment: int = 0) -> None:
        from psana.dgramedit import AlgDef, DetectorDef

        self.key = (name, algorithm, segment)
        self.arguments = (DetectorDef(name, dettype, detid), AlgDef(algorithm, *version), fields)
        self.algorithm, self.segment = algorithm, segment


class _Stream:
    """One big-data file and its small-data companion."""

    def __init__(self, directory: Path, name: str, records: list[_Record], size: int) -> None:
        from psana.psexp import TransitionId

        self._ids = TransitionId
        self._size = size
        self._out = bytearray(size)
        self.big = directory / f"{name}.xtc2"
        self.smd = directory / "smalldata" / f"{name}.smd.xtc2"
        self._files = (self.big.open("wb"), self.smd.open("wb"))
        info = _Record("smdinfo", "offset", "", "offsetAlg", (0, 0, 0),
                       {"intOffset": (np.uint64, 0), "intDgramSize": (np.uint64, 0)})
        records = [*records, _Record("chunkinfo", "chunkinfo", "", "chunkinfo", (0, 0, 1),
                                     {"filename": (str, 1), "chunkid": (np.uint32, 0)})]
        self._configs = (self._configure(records), self._configure(records, info))
        self._offset = 0
        self._beginning = 0             # bytes of Configure, which every chunk file repeats

    def _configure(self, records: list[_Record], info: _Record | None = None) -> tuple:
        from psana.dgramedit import DgramEdit

        config = DgramEdit(transition_id=self._ids.Configure, bufsize=self._size, ts=0)
        boxes = {}
        for number, record in enumerate(records):
            handle = config.Detector(*record.arguments, nodeId=1, namesId=number,
                                     segment=record.segment)
            boxes[record.key] = getattr(handle, record.algorithm)
        if info is not None:
            handle = config.Detector(*info.arguments, nodeId=512, namesId=0, segment=0)
            boxes[info.key] = getattr(handle, info.algorithm)
        return config, boxes

    def _write(self, which: int, service: int, time: int, values: dict, damage: int = 0) -> int:
        from psana.dgramedit import DgramEdit

        config, boxes = self._configs[which]
        if service == self._ids.Configure:
            edit = config
            edit.updatetimestamp(time)
        else:
            edit = DgramEdit(transition_id=service, config_dgramedit=config, ts=time,
                             bufsize=self._size)
        for key, record in values.items():
            for name, value in record.items():
                setattr(boxes[key], name, value)
            edit.adddata(boxes[key])
        if damage:
            edit.updatedamage(damage)
        edit.save(self._out)
        self._files[which].write(memoryview(self._out)[:edit.size])
        return edit.size

    def transition(self, service: int, time: int, values: dict | None = None) -> None:
        self._offset += self._write(0, service, time, values or {})
        self._write(1, service, time, values or {})
        if service == self._ids.Configure:
            self._beginning = self._offset

    def next_chunk(self, service: int, time: int) -> None:
        """Announce a new chunk file in a transition, as the DAQ does, and go on in it."""
        path = self.big.with_name(self.big.name.replace("-c000.", "-c001."))
        record = {("chunkinfo", "chunkinfo", 0): {"filename": path.name, "chunkid": 1}}
        self._write(1, service, time, record)
        self._files[0].close()
        path.write_bytes(self.big.read_bytes()[: self._beginning])
        self._files = (path.open("ab"), self._files[1])
        self._offset = self._beginning + self._write(0, service, time, record)

    def event(self, time: int, values: dict, damage: int = 0) -> None:
        size = self._write(0, self._ids.L1Accept, time, values, damage)
        place = {("smdinfo", "offsetAlg", 0): {"intOffset": self._offset, "intDgramSize": size}}
        self._write(1, self._ids.L1Accept, time, place, damage)
        self._offset += size

    def close(self) -> None:
        for file in self._files:
            file.close()


def _scalar_records(run: Run) -> list[_Record]:
    number = (np.float64, 0)
    records = [_Record("runinfo", "runinfo", "", "runinfo", (0, 0, 1),
                       {"expt": (str, 1), "runnum": (np.uint32, 0)})]
    if run.scalars:
        records += [
            _Record("gasdet", "gasdet", "gas0", "raw", (1, 0, 0),
                    {f"f_{n}_ENRC": number for n in (11, 12, 21, 22, 63, 64)}),
            _Record("ebeam", "ebeam", "ebeam0", "raw", (2, 0, 0),
                    {"ebeamPhotonEnergy": number, "ebeamL3Energy": number}),
            _Record("timing", "ts", "ts0", "raw", (2, 0, 0), {"sequenceValues": (np.uint16, 1)}),
            _Record("scan", "scan", "scan0", "raw", (2, 0, 0),
                    {"step_value": number, "step_docstring": (str, 1)}),
            _Record("epics", "epics", "epics0", "raw", (2, 0, 0), {"detector_z": number}),
        ]
    if run.gmd:
        records.append(_Record("gmd", "gmd", "gmd0", "raw", (2, 1, 0),
                               {"milliJoulesPerPulse": number}))
    return records


def _scalar_values(run: Run, event: int) -> dict[Any, dict]:
    sequence = np.zeros(18, np.uint16)
    for code in run.codes.get(event, ()):
        sequence[code >> 4] |= 1 << (code & 15)
    values: dict[Any, dict] = {}
    if run.scalars:
        values = {
            ("gasdet", "raw", 0): {"f_11_ENRC": 2.0, "f_12_ENRC": 2.2, "f_21_ENRC": 1.8,
                                   "f_22_ENRC": 1.8, "f_63_ENRC": 0.0, "f_64_ENRC": 0.0},
            ("ebeam", "raw", 0): {"ebeamPhotonEnergy": run.energy.get(event, 9500.0 + event),
                                  "ebeamL3Energy": 5000.0},
            ("timing", "raw", 0): {"sequenceValues": sequence},
        }
    if run.gmd:
        values["gmd", "raw", 0] = {"milliJoulesPerPulse": 0.5 + event}
    return values


def write_run(directory: Path, run: Run) -> Path:
    """Write ``run`` under ``directory`` (big data, smalldata/) and return it."""
    from psana.psexp import TransitionId as ids

    (directory / "smalldata").mkdir(parents=True, exist_ok=True)
    runinfo = _scalar_records(run)[0]
    parts = np.array_split(np.arange(run.segments), run.streams)
    layouts = [_scalar_records(run)] + [
        [runinfo] + [_Record("jungfrau", "jungfrau", f"seg{s:04d}", "raw", (0, 1, 0),
                             {"raw": (np.uint16, 3)}, int(s)) for s in part] for part in parts]
    streams = []
    for number, records in enumerate(layouts):
        held = 0 if number == 0 else len(parts[number - 1])
        streams.append(_Stream(directory, f"{run.exp}-r{run.run:04d}-s{number:03d}-c000", records,
                               held * (PANEL[0] * PANEL[1] * 2 + 4096) + (1 << 18)))
    stamps = run.stamps()
    clock = [stamps[0] - 40_000_000 if run.times is None else stamps[0] - 40]

    def everywhere(service: int, first: dict | None = None, all_of: dict | None = None,
                   time: int | None = None) -> None:
        clock[0] = clock[0] + 1 if time is None else time
        for number, stream in enumerate(streams):
            stream.transition(service, clock[0],
                              {**(all_of or {}), **((first or {}) if number == 0 else {})})

    everywhere(ids.Configure)
    everywhere(ids.BeginRun, all_of={("runinfo", "runinfo", 0): {
        "expt": run.runinfo or run.exp, "runnum": run.run}})
    each = -(-run.events // run.steps)
    for step in range(run.steps):
        scan = {("scan", "raw", 0): {"step_value": float(step), "step_docstring": "step"}}
        everywhere(ids.BeginStep, scan if run.scalars else None)
        if step == run.chunk_at:
            clock[0] += 1
            for stream in streams:
                stream.next_chunk(ids.Enable, clock[0])
        else:
            everywhere(ids.Enable)
        everywhere(ids.SlowUpdate, {("epics", "raw", 0): {"detector_z": run.distance_mm}}
                   if run.scalars else None)
        for event in range(step * each, min(run.events, (step + 1) * each)):
            time = stamps[event]
            clock[0] = time
            streams[0].event(time, _scalar_values(run, event))
            for part, stream in zip(parts, streams[1:], strict=True):
                held = [int(s) for s in part if int(s) not in run.missing.get(event, ())]
                if held:
                    stream.event(time, {("jungfrau", "raw", s): {"raw": pixels(event, s)}
                                        for s in held}, run.damage.get(event, 0))
        everywhere(ids.Disable)
        everywhere(ids.EndStep)
    if run.closed:
        everywhere(ids.EndRun)
    for stream in streams:
        stream.close()
    return directory


def write_constants(path: Path, segments: int = 1, detector: str = "jungfrau") -> Path:
    """Jungfrau constants: three stages, one bad pixel per segment."""
    shape = (3, segments, *PANEL)
    pedestals = np.empty(shape, np.float32)
    gain = np.empty(shape, np.float32)
    for stage, (pedestal, slope) in enumerate(((2900, 41.5), (14600, -1.39), (14700, -0.11))):
        pedestals[stage], gain[stage] = pedestal, slope
    status = np.zeros(shape, np.uint64)
    status[:, :, 5, 6] = 1
    with h5py.File(path, "w") as file:
        for name, values in (("pedestals", pedestals), ("pixel_gain", gain),
                             ("pixel_status", status)):
            file.create_dataset(f"{detector}/{name}", data=values)
    return path
