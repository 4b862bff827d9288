"""What an xtc2 run holds, read from its small-data (smd) files without psana.

xtc2 files are sequences of datagrams, little endian::

    u64 time, u32 env (bits 27-24 = transition), then one Xtc whose payload is a list of Xtcs
    Xtc: u32 source, u16 damage, u16 contains (low 12 bits = type), u32 extent (with its 12 bytes)

A small-data file repeats the transitions of its big-data file; its L1Accept datagrams hold, in a
record called ``smdinfo``, the pair (u64 offset, u64 size) of the event's big-data datagram.
Blocks of datagrams of one size are decoded together, so an index costs little even at 10^5 events.
(Layout: ``xtcdata`` of slac-lcls/lcls2, checked against files that psana reads.)
"""
from __future__ import annotations

import os
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..core import RunDamaged, RunNotFound

__all__ = ["ENDRUN", "RunIndex", "Stream", "find_streams", "index_big_file", "index_run",
           "xtc_directory"]

CONFIGURE, BEGINRUN, ENDRUN, ENABLE, L1ENDOFBATCH, L1ACCEPT = 2, 4, 5, 8, 11, 12
_HEADER = struct.Struct("<QIIHHI")      # time, env, source, damage, contains, extent
_XTC = struct.Struct("<IHHI")           # source, damage, contains, extent
_TRANSITION_BYTES = 12
_SHAPES_DATA, _DATA, _NAMES = 1, 3, 4
_BLOCK = 4096                           # most datagrams of one size decoded at a time
_NAME = re.compile(r"^(?P<exp>.+)-r(?P<run>\d+)-s(?P<stream>\d+)-c(?P<chunk>\d+)")


@dataclass(frozen=True)
class Stream:
    """The events of one stream (one small-data file, or one big-data file read by itself).

    ``times_E`` uint64, ``offsets_E`` and ``sizes_E`` int64 bytes in the big-data file,
    ``damage_E`` uint16.  ``readable_E`` is False where the big-data file is too short.
    ``cut_bytes`` counts stray bytes of an incomplete datagram at the end of the file itself.
    """

    smd: Path | None
    big: Path
    times_E: np.ndarray
    offsets_E: np.ndarray
    sizes_E: np.ndarray
    damage_E: np.ndarray
    readable_E: np.ndarray
    services: frozenset[int]
    cut_bytes: int
    missing_bytes: int = 0

    @property
    def name(self) -> str:
        match = _NAME.match(self.big.name)
        return f"s{match['stream']}" if match else self.big.name

    @property
    def ended(self) -> bool:
        """The run was closed properly in this stream."""
        return ENDRUN in self.services and not self.cut_bytes


@dataclass(frozen=True)
class RunIndex:
    """All streams of a run, and the union of their events in time order.

    ``times_E`` is sorted; a time that one stream holds k times is there k times.  ``readable_E``
    is False for events of which some stream's big data is cut off.
    """

    streams: tuple[Stream, ...]
    times_E: np.ndarray
    readable_E: np.ndarray

    def __len__(self) -> int:
        return len(self.times_E)

    @property
    def repeated(self) -> int:
        """Events that have the time of the event before."""
        return int(np.count_nonzero(self.times_E[1:] == self.times_E[:-1]))

    def position(self, timestamp: int) -> int:
        """Index of the (first) event of that time; -1 when the run has none."""
        at = int(np.searchsorted(self.times_E, np.uint64(timestamp)))
        if at < len(self.times_E) and int(self.times_E[at]) == timestamp:
            return at
        return -1

    def short_streams(self) -> list[str]:
        """Sentences about streams whose big-data file ends too early."""
        return [
            f"stream {s.name}: {s.big} lacks {s.missing_bytes} bytes at its end, "
            f"{int(np.count_nonzero(~s.readable_E))} of its {len(s.times_E)} events cannot be read"
            for s in self.streams if s.missing_bytes
        ]


def xtc_directory(exp: str, directory: str | os.PathLike[str] | None) -> Path:
    """Where the xtc2 files of ``exp`` are: as stated, else where psana2 itself looks."""
    if directory is not None:
        return Path(directory).expanduser()
    return Path(os.environ.get("SIT_PSDM_DATA", "/reg/d/psdm")) / exp[:3] / exp / "xtc"


def find_streams(exp: str, run: int, directory: Path) -> list[Path]:
    """The small-data files of the run.

    Raises :class:`RunNotFound` when there are none, when they are another experiment's (psana2
    would read those), or when a big-data file is missing; :class:`RunDamaged` for a run that is
    still being written, or when a stream has big data and no small data (psana2 would leave its
    detectors out, silently).
    """
    smd_directory = directory / "smalldata"
    if not directory.is_dir():
        raise RunNotFound(f"run {run} of {exp} was looked for in {directory}, which is not a "
                          "directory; give the folder with the .xtc2 files with --dir")
    smd = sorted(p for p in smd_directory.glob(f"*-r{run:04d}-s*.smd.xtc2*")
                 if p.name.endswith((".smd.xtc2", ".smd.xtc2.inprogress")))
    own = [p for p in smd if p.name.startswith(f"{exp}-r")]
    big = [p for p in sorted(directory.glob(f"{exp}-r{run:04d}-s*.xtc2*"))
           if p.name.endswith((".xtc2", ".xtc2.inprogress"))]
    if not own:
        if smd:
            others = sorted({m["exp"] for p in smd if (m := _NAME.match(p.name))})
            raise RunNotFound(f"run {run} of {exp} was asked for; {directory} holds run {run} of "
                              f"{', '.join(others)}: check --exp and --dir")
        runs = sorted({int(m["run"]) for p in directory.glob(f"{exp}-r*.xtc2")
                       if (m := _NAME.match(p.name))})
        there = f"it holds runs {_ranges(runs)} of {exp}" if runs else f"it holds nothing of {exp}"
        what = ("its big data are there, but no small data: make them with smdwriter"
                if big else there)
        raise RunNotFound(f"no small-data file of run {run} of {exp} in {smd_directory}; {what}")
    if len(own) != len(smd):
        strangers = ", ".join(p.name for p in smd if p not in own)
        raise RunNotFound(f"{smd_directory} also holds run {run} of another experiment "
                          f"({strangers}), which psana2 would mix in; move these files elsewhere")
    unfinished = [p.name for p in (*own, *big) if p.name.endswith(".inprogress")]
    if unfinished:
        raise RunDamaged(
            f"run {run} of {exp} is still being written ({', '.join(unfinished)}); wait until the "
            "data acquisition has closed it: psana2 reads such files only in its live mode, which "
            "is not supported here")
    chunks = {m["stream"] for p in own if (m := _NAME.match(p.name))}
    orphans = [p.name for p in big
               if (m := _NAME.match(p.name)) and m["stream"] not in chunks]
    if orphans:
        raise RunDamaged(
            f"{', '.join(orphans)}: big data without small data, so psana2 would silently leave "
            f"out what these streams hold; put their .smd.xtc2 files into {smd_directory} (copy "
            "them again, or make them with smdwriter)")
    for path in own:
        if not _big_file(path, 0).exists():
            raise RunNotFound(
                f"{_big_file(path, 0)} does not exist, but its small data {path.name} do; psana2 "
                "cannot read the run without it: copy it again, or remove the small-data file to "
                "go on without that stream")
    return own


def index_run(smd_files: Sequence[Path]) -> RunIndex:
    """The index of a run from its small-data files.

    Raises :class:`RunDamaged` for a small-data file that is cut off, or that ends before the run
    did while others do not.
    """
    streams = tuple(_index_stream(path) for path in smd_files)
    ended = [s for s in streams if s.ended]
    for stream in streams:
        cut = (f"is cut off in the middle of a datagram ({stream.cut_bytes} stray bytes)"
               if stream.cut_bytes else "ends without EndRun, which other streams have"
               if ended and not stream.ended else None)
        if BEGINRUN not in stream.services:
            cut = "does not even hold the beginning of the run"
        if cut:
            other = max(len(s.times_E) for s in streams)
            raise RunDamaged(
                f"small-data file {stream.smd} {cut}: it lists {len(stream.times_E)} events, the "
                f"longest stream {other}; copy it again, or make it anew with smdwriter")
    return _union(streams)


def index_big_file(path: Path) -> RunIndex:
    """The index of one big-data file that is read by itself."""
    found = _big_datagrams(path)
    event = np.isin(found.services, (L1ACCEPT, L1ENDOFBATCH))
    if BEGINRUN not in found.services:
        raise RunDamaged(f"{path} does not even hold the beginning of a run ({found.cut_bytes} "
                         "stray bytes at its end); give a whole .xtc2 file")
    ends = found.at[event] + found.sizes[event]
    missing = max(0, int(ends.max(initial=0)) - path.stat().st_size)
    stream = Stream(None, path, found.times[event], found.at[event], found.sizes[event],
                    found.damage[event], ends <= path.stat().st_size,
                    frozenset(found.services.tolist()), found.cut_bytes, missing)
    return _union((stream,))


def _ranges(numbers: Sequence[int]) -> str:
    """``[1, 2, 3, 7]`` as "1-3, 7"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)


def _big_file(smd: Path, chunk: int) -> Path:
    """The big-data file of a small-data file; ``chunk`` counts from the first one."""
    base = smd.name.split(".smd")[0]
    match = _NAME.match(base)
    if match and chunk:
        base = f"{base[:match.start('chunk')]}{int(match['chunk']) + chunk:03d}"
    return smd.parent.parent / f"{base}.xtc2"


def _union(streams: tuple[Stream, ...]) -> RunIndex:
    counts: dict[int, int] = {}
    bad: set[int] = set()
    repeats = False
    for stream in streams:
        bad.update(stream.times_E[~stream.readable_E].tolist())
        repeats = repeats or len(np.unique(stream.times_E)) != len(stream.times_E)
    if repeats:
        for stream in streams:
            for time, count in zip(*np.unique(stream.times_E, return_counts=True), strict=True):
                counts[int(time)] = max(counts.get(int(time), 0), int(count))
        times = np.repeat(np.array(sorted(counts), np.uint64), [counts[t] for t in sorted(counts)])
    else:
        times = np.unique(np.concatenate([s.times_E for s in streams] or
                                         [np.zeros(0, np.uint64)])).astype(np.uint64)
    readable = ~np.isin(times, np.array(sorted(bad), np.uint64))
    return RunIndex(streams, times, readable)


def _index_stream(smd: Path) -> Stream:
    raw = np.fromfile(smd, np.uint8)
    found = _datagrams(raw)
    where = np.flatnonzero(np.isin(found.services, (L1ACCEPT, L1ENDOFBATCH)))
    offsets, sizes = _smdinfo(smd, raw, found, where)
    # every chunk file begins with small offsets again
    chunk_E = np.concatenate([[0], np.cumsum(np.diff(offsets) < 0)]) if len(where) else (
        np.zeros(0, np.int64))
    readable = np.ones(len(where), bool)
    missing = 0
    for chunk in np.unique(chunk_E).astype(int):
        path = _big_file(smd, chunk)
        if not path.exists():
            raise RunNotFound(f"{path} does not exist, but {smd.name} lists events in it; psana2 "
                              "cannot read the run without it: copy it again")
        length = path.stat().st_size
        mine = chunk_E == chunk
        ends = offsets + sizes
        readable[mine & (ends > length)] = False
        missing += max(0, int(ends[mine].max()) - length)
    return Stream(smd, _big_file(smd, 0), found.times[where], offsets, sizes, found.damage[where],
                  readable, frozenset(found.services.tolist()), found.cut_bytes, missing)


class _Datagrams(NamedTuple):
    """What the headers of a file say, per datagram; ``cut_bytes`` at the end are no datagram."""

    services: np.ndarray
    times: np.ndarray
    at: np.ndarray
    sizes: np.ndarray
    damage: np.ndarray
    cut_bytes: int


def _datagrams(raw: np.ndarray) -> _Datagrams:
    """The datagrams of a file of small datagrams."""
    services, times, positions, sizes, damages = [], [], [], [], []
    at, end, block = 0, len(raw), 16
    while at + _HEADER.size <= end:
        extent = _HEADER.unpack_from(raw.data, at)[5]
        size = _TRANSITION_BYTES + extent
        if extent < _XTC.size or at + size > end:
            break
        # a run of datagrams of this size is decoded at once
        many = min(block, (end - at) // size)
        rows = raw[at: at + many * size].reshape(many, size)
        head = np.ascontiguousarray(rows[:, :_HEADER.size])
        same = head[:, 20:24].view("<u4")[:, 0] == extent
        many = many if same.all() else int(np.argmin(same))
        block = min(_BLOCK, 2 * max(many, 16))
        head = head[:many]
        times.append(head[:, :8].view("<u8")[:, 0])
        services.append((head[:, 8:12].view("<u4")[:, 0] >> 24) & 0xf)
        damages.append(head[:, 16:18].view("<u2")[:, 0])
        positions.append(at + size * np.arange(many))
        sizes.append(np.full(many, size))
        at += many * size
    return _Datagrams(_joined(services, np.int64), _joined(times, np.uint64),
                      _joined(positions, np.int64), _joined(sizes, np.int64),
                      _joined(damages, np.uint16), end - at)


def _big_datagrams(path: Path) -> _Datagrams:
    """As :func:`_datagrams`, reading only the headers of a file of large datagrams."""
    rows = []
    end = path.stat().st_size
    at = 0
    with path.open("rb", buffering=0) as stream:
        while at + _HEADER.size <= end:
            stream.seek(at)
            time, env, _, damage, _, extent = _HEADER.unpack(stream.read(_HEADER.size))
            size = _TRANSITION_BYTES + extent
            if extent < _XTC.size:
                break
            rows.append(((env >> 24) & 0xf, time, at, size, damage))
            if at + size > end:         # the last datagram is cut off: it is listed all the same
                break
            at += size
    columns = list(zip(*rows, strict=True)) or [()] * 5
    dtypes = (np.int64, np.uint64, np.int64, np.int64, np.uint16)
    services, times, positions, sizes, damages = (
        np.array(column, dtype) for column, dtype in zip(columns, dtypes, strict=True))
    return _Datagrams(services, times, positions, sizes, damages, end - at)


def _joined(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype)


def _smdinfo(path: Path, raw: np.ndarray, found: _Datagrams,
             where: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(offsets, sizes) int64 of the events at datagrams ``where``."""
    pairs = np.zeros((len(where), 2), np.int64)
    if not len(where):
        return pairs[:, 0], pairs[:, 1]
    at = found.at
    configure = np.flatnonzero(found.services == CONFIGURE)
    source = _smdinfo_source(raw, int(at[configure[0]])) if len(configure) else None
    if source is None:
        raise RunDamaged(f"{path} has no smdinfo record in its Configure: it is not a small-data "
                         "file; make it anew with smdwriter")
    undecoded = np.ones(len(where), bool)
    while undecoded.any():
        first = int(np.argmax(undecoded))
        start = int(at[where[first]])
        relative = _smdinfo_payload(raw, start, source)
        if relative is None:
            raise RunDamaged(f"{path}: the event at byte {start} does not say where its big data "
                             "are; make the small-data file anew with smdwriter")
        # the same place in every other event that has the same record headers there
        headers = 3 * _XTC.size
        span = np.arange(relative - headers, relative + 16)
        todo = np.flatnonzero(undecoded)
        todo = todo[at[where[todo]] + relative + 16 <= len(raw)]
        taken = raw[at[where[todo]][:, None] + span]
        same = (taken[:, :headers] == raw[start + span[:headers]]).all(axis=1)
        same |= todo == first
        pairs[todo[same]] = np.ascontiguousarray(taken[same, headers:]).view("<i8")
        undecoded[todo[same]] = False
    return pairs[:, 0], pairs[:, 1]


def _children(raw: np.ndarray, start: int, end: int) -> list[tuple[int, int, int, int]]:
    """(position, source, type, extent) of the Xtcs between two bytes."""
    found = []
    while start + _XTC.size <= end:
        source, _, contains, extent = _XTC.unpack_from(raw.data, start)
        if extent < _XTC.size or start + extent > end:
            break
        found.append((start, source, contains & 0xfff, extent))
        start += extent
    return found


def _body(raw: np.ndarray, start: int) -> tuple[int, int]:
    extent = _HEADER.unpack_from(raw.data, start)[5]
    return start + _HEADER.size, start + _TRANSITION_BYTES + extent


def _smdinfo_source(raw: np.ndarray, configure: int) -> int | None:
    """The names id under which Configure announces the record ``smdinfo``."""
    for at, source, kind, extent in _children(raw, *_body(raw, configure)):
        if kind == _NAMES and b"smdinfo\0" in raw[at: at + extent].tobytes():
            return source
    return None


def _smdinfo_payload(raw: np.ndarray, start: int, source: int) -> int | None:
    """Bytes from the beginning of an event datagram to its (offset, size) pair."""
    for at, found, kind, extent in _children(raw, *_body(raw, start)):
        if kind == _SHAPES_DATA and found == source:
            for inner, _, what, length in _children(raw, at + _XTC.size, at + extent):
                if what == _DATA and length >= _XTC.size + 16:
                    return inner + _XTC.size - start
    return None
