"""Per-rank part files: append-only, checksummed, and readable after a crash at any byte.

A part of rank 3 in its second generation (one generation per start of the job) is::

    rank0003.g2.journal     checkpoints: the rows since the one before, fsynced
    rank0003.g2.totals-K    the reductions over all events up to checkpoint K
    rank0003.g2.pixels      calibrated frames of kept events, float32, one after the other

A checkpoint counts once its record is whole, its checksum right and its totals file there; what
comes after it never happened.  A record is a fixed header (magic, checkpoint number, length,
crc32) and a payload: a JSON directory of the arrays and their bytes.  No pickles.
"""
from __future__ import annotations

import errno
import json
import logging
import os
import re
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..core import OutputDamaged, OutputError, OutputFull, Total

log = logging.getLogger(__name__)

_HEADER = struct.Struct("<8sIQI")
_MAGIC = b"xfcpart1"
_NAME = re.compile(r"rank(\d{4,})\.g(\d+)\.journal")


def pack(arrays: Mapping[str, np.ndarray], note: Any = None) -> bytes:
    """Bytes of named arrays and a JSON-able note."""
    directory, chunks = [], []
    for name, array in arrays.items():
        array = np.ascontiguousarray(array)
        directory.append([name, array.dtype.str, list(array.shape)])
        chunks.append(array.tobytes())
    head = json.dumps([directory, note]).encode()
    return struct.pack("<Q", len(head)) + head + b"".join(chunks)


def unpack(payload: bytes) -> tuple[dict[str, np.ndarray], Any]:
    """Inverse of :func:`pack`; the arrays are views of ``payload``."""
    (length,) = struct.unpack_from("<Q", payload)
    directory, note = json.loads(payload[8:8 + length])
    offset, arrays = 8 + length, {}
    for name, dtype, shape in directory:
        count = int(np.prod(shape))
        arrays[name] = np.frombuffer(payload, dtype, count, offset).reshape(shape)
        offset += arrays[name].nbytes
    return arrays, note


def _record(number: int, payload: bytes) -> bytes:
    return _HEADER.pack(_MAGIC, number, len(payload), zlib.crc32(payload)) + payload


def _records(path: Path) -> Iterator[tuple[int, bytes]]:
    """Whole records of a file, in order; ends at the first that is not."""
    with path.open("rb") as file:
        while len(header := file.read(_HEADER.size)) == _HEADER.size:
            magic, number, length, crc = _HEADER.unpack(header)
            if magic != _MAGIC or length > os.fstat(file.fileno()).st_size - file.tell():
                return
            payload = file.read(length)
            if zlib.crc32(payload) != crc:
                return
            yield number, payload


def output_error(error: OSError, path: Path) -> OutputError:
    """What an OSError while writing means to the user."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return OutputFull(
            f"cannot write {path}: {os.strerror(error.errno)}. Everything up to the last "
            "checkpoint is kept; free space, then run the same command with --resume"
        )
    return OutputError(f"cannot write {path}: {error.strerror or error}; give a writable "
                       "directory with -o")


class PartWriter:
    """Writes the part of one rank.  Rows wait in memory until :meth:`checkpoint`."""

    def __init__(self, directory: Path, rank: int, generation: int) -> None:
        self._stem = directory / f"rank{rank:04d}.g{generation}"
        self._journal_path = self._stem.with_name(self._stem.name + ".journal")
        self._pixels_path = self._stem.with_name(self._stem.name + ".pixels")
        self._journal: Any = None
        self._pixels: Any = None
        self._rows: list[Mapping[str, Any]] = []
        self._kept: list[tuple[int, int, int]] = []
        self._number = 0
        self._last_totals: list[Path] = []
        self.pending = 0

    def add(self, rows: Mapping[str, Any]) -> None:
        """Rows of one batch: equal-length arrays, or lists of 1-D arrays where ragged."""
        self._rows.append(rows)
        self.pending += len(rows["timestamp"])

    def keep(self, index: int, pixels_PSF: np.ndarray) -> None:
        """Append the calibrated pixels of event ``index``."""
        try:
            if self._pixels is None:
                self._pixels = self._pixels_path.open("ab")
            offset = self._pixels.tell()
            content = np.ascontiguousarray(pixels_PSF, np.float32)
            self._pixels.write(content.data)
        except OSError as error:
            raise output_error(error, self._pixels_path) from error
        self._kept.append((index, offset, zlib.crc32(content.data)))

    def checkpoint(self, totals: Mapping[str, Total], note: Mapping[str, Any]) -> None:
        """Make everything added so far durable."""
        if not self._rows and self._number:
            return
        self._number += 1
        try:
            if self._pixels is not None:
                _sync(self._pixels)
            if totals:
                path = self._stem.with_name(f"{self._stem.name}.totals-{self._number}")
                with path.open("wb") as file:
                    file.write(_record(self._number, _pack_totals(totals)))
                    _sync(file)
                self._last_totals.append(path)
            if self._journal is None:
                self._journal = self._journal_path.open("ab")
            payload = pack(_concatenate(self._rows) | {"kept": np.array(
                self._kept, np.int64).reshape(-1, 3)}, {"totals": bool(totals), **note})
            self._journal.write(_record(self._number, payload))
            _sync(self._journal)
            while len(self._last_totals) > 2:
                self._last_totals.pop(0).unlink()
        except OSError as error:
            raise output_error(error, self._journal_path) from error
        self._rows.clear()
        self._kept.clear()
        self.pending = 0

    def close(self) -> None:
        for file in (self._journal, self._pixels):
            if file is not None:
                file.close()


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _concatenate(batches: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Columns over all batches; a ragged column becomes NAME (values) and NAME#n (lengths)."""
    arrays: dict[str, np.ndarray] = {}
    for name in batches[0] if batches else ():
        parts = [batch[name] for batch in batches]
        if isinstance(parts[0], list):
            rows = [row for part in parts for row in part]
            arrays[name] = np.concatenate(rows) if rows else np.zeros(0)
            arrays[name + "#n"] = np.array([len(row) for row in rows], np.int64)
        else:
            arrays[name] = np.concatenate(parts)
    return arrays


def _pack_totals(totals: Mapping[str, Total]) -> bytes:
    return pack({name: total.values for name, total in totals.items()},
                {name: [t.how, t.events, t.scale, t.unit, t.doc] for name, t in totals.items()})


def _unpack_totals(payload: bytes) -> dict[str, Total]:
    arrays, note = unpack(payload)
    return {name: Total(arrays[name], how, events, scale, unit, doc)
            for name, (how, events, scale, unit, doc) in note.items()}


@dataclass
class Part:
    """What one part file holds: rows (ragged columns as lists), kept pixels, totals, notes."""

    path: Path
    rows: dict[str, Any] = field(default_factory=dict)
    kept: np.ndarray = field(default_factory=lambda: np.zeros((0, 3), np.int64))
    totals: dict[str, Total] = field(default_factory=dict)
    notes: list[dict[str, Any]] = field(default_factory=list)

    @property
    def pixels_path(self) -> Path:
        return self.path.with_suffix(".pixels")

    @property
    def rank(self) -> int:
        return int(_NAME.fullmatch(self.path.name)[1])  # type: ignore[index]


def read_part(path: Path, verify_pixels: bool = False) -> Part | None:
    """The checkpoints of a part; None (and a warning) when it cannot be trusted.

    Rows and totals must belong together, so a part whose journal ends before its oldest totals
    file is not used at all: its events count as not done and a resumed run does them again.
    """
    part, last = Part(path), 0
    records = []
    for number, payload in _records(path):
        arrays, note = unpack(payload)
        records.append(arrays)
        part.notes.append(note)
        last = number
    distrust = "" if records or not path.stat().st_size else "it holds no whole checkpoint"
    if records:
        part.kept = np.concatenate([arrays.pop("kept") for arrays in records])
        distrust = _kept_fault(part, verify_pixels)
        if part.notes[-1]["totals"] and not distrust:
            totals_path = path.with_name(f"{path.name.removesuffix('.journal')}.totals-{last}")
            found = list(_records(totals_path)) if totals_path.exists() else []
            if found and found[0][0] == last:
                part.totals = _unpack_totals(found[0][1])
            else:
                distrust = f"the totals of its checkpoint {last} are missing or damaged"
    if distrust:
        log.warning("part %s is not used: %s; its events count as not done", path.name, distrust)
    if distrust or not records:
        return None
    for name in next((arrays for arrays in records if arrays), {}):
        if not name.endswith("#n"):
            part.rows[name] = _column(name, records)
    return part


def _kept_fault(part: Part, verify: bool) -> str:
    """What is wrong with the kept pixels of a part, or ""."""
    if not len(part.kept):
        return ""
    size = part.pixels_path.stat().st_size if part.pixels_path.exists() else 0
    if size <= part.kept[:, 1].max():
        return f"its pixels end at byte {size}, before those of its last hit"
    if verify:
        frame_bytes = size - int(part.kept[:, 1].max()) if len(part.kept) == 1 else int(
            np.diff(np.sort(part.kept[:, 1])).min())
        with part.pixels_path.open("rb") as file:
            for index, offset, crc in part.kept:
                file.seek(offset)
                if zlib.crc32(file.read(frame_bytes)) != crc:
                    return f"the pixels of event {index} do not have their checksum"
    return ""


def _column(name: str, records: Sequence[Mapping[str, np.ndarray]]) -> Any:
    parts = [arrays[name] for arrays in records if name in arrays]
    values = np.concatenate(parts)
    lengths = [arrays[name + "#n"] for arrays in records if name + "#n" in arrays]
    if not lengths:
        return values
    return np.split(values, np.cumsum(np.concatenate(lengths))[:-1]) if sum(map(len, lengths)) \
        else []


def read_parts(directory: Path, verify_pixels: bool = False) -> list[Part]:
    """All trustworthy parts of a run, by rank and generation."""
    parts = [read_part(path, verify_pixels) for path in sorted(directory.glob("rank*.journal"))
             if _NAME.fullmatch(path.name)]
    return [part for part in parts if part is not None]


def next_generation(directory: Path) -> int:
    """A number no file in ``directory`` uses yet."""
    found = re.findall(r"\.g(\d+)\.", " ".join(p.name for p in directory.glob("rank*")))
    return max(map(int, found), default=0) + 1


class KeptPixels:
    """The kept frames of all parts, by event index; checks every frame it returns."""

    def __init__(self, parts: Sequence[Part], panel_shape: tuple[int, int, int]) -> None:
        self._shape = panel_shape
        self._where = {int(index): (part.pixels_path, int(offset), int(crc))
                       for part in parts for index, offset, crc in part.kept}

    def __contains__(self, index: int) -> bool:
        return index in self._where

    def read(self, index: int) -> np.ndarray:
        path, offset, crc = self._where[index]
        pixels = np.fromfile(path, np.float32, int(np.prod(self._shape)), offset=offset)
        if pixels.size != np.prod(self._shape) or zlib.crc32(pixels.data) != crc:
            raise OutputDamaged(
                f"the pixels of event {index} in {path} do not have their checksum: "
                "run the same command with --resume, which does those events again"
            )
        return pixels.reshape(self._shape)
