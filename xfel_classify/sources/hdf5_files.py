"""Opening HDF5 files that may be truncated, dead-linked, half written or only virtual.

HDF5 itself is silent about most of this: a virtual dataset whose source file is gone, a chunk that
was never written and a region that nobody mapped all read as fill values, without an error.  Here
they are found before the event loop and become statuses of the events concerned.
"""
from __future__ import annotations

import logging
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ..core import EventStatus, MissingDependency, RunDamaged, RunNotFound

__all__ = ["H5_ERRORS", "DeadLink", "Walk", "event_status", "open_file", "require_filters", "walk"]

log = logging.getLogger(__name__)

H5_ERRORS = (OSError, RuntimeError, KeyError, ValueError, TypeError, OverflowError, MemoryError)
"""What h5py raises over damaged metadata, depending on where the damage is."""

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_MAX_OBJECTS = 20_000
_MAX_DEPTH = 16


def open_file(path: str | os.PathLike[str]) -> h5py.File:
    """The file, opened for reading.

    Raises :class:`RunNotFound`, or :class:`RunDamaged` when it is not HDF5, shorter than its own
    superblock says, or cannot be opened.
    """
    import hdf5plugin  # noqa: F401  registers bitshuffle, lz4, zstd, ... with HDF5

    path = Path(path)
    if not path.is_file():
        raise RunNotFound(f"file {path} of the run does not exist; check the path, or the glob")
    _check_superblock(path)
    try:
        return h5py.File(path, "r", locking="best-effort")
    except OSError as error:
        raise RunDamaged(f"file {path} cannot be opened as HDF5 ({error}); if it is still being "
                         "written wait until it is closed, else copy it again") from error


def _check_superblock(path: Path) -> None:
    """Compare the end of file that the superblock records with the size on disk."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        offset = 0
        while offset + 64 <= max(size, 64):
            stream.seek(offset)
            head = stream.read(64)
            if head[:8] == _SIGNATURE:
                break
            offset = 512 if offset == 0 else 2 * offset
        else:
            head = b""
    if head[:8] != _SIGNATURE:
        raise RunDamaged(f"file {path} ({size} bytes) is not an HDF5 file; give HDF5, CXI or NeXus "
                         "files, or --set source.use=images for image files")
    version = head[8]
    widths, at = (head[13], {0: 40, 1: 44}.get(version)) if version < 2 else (head[9], 28)
    if widths != 8 or at is None or len(head) < at + 8:
        return
    end = struct.unpack_from("<Q", head, at)[0]
    if end != 2 ** 64 - 1 and size < end:
        raise RunDamaged(f"file {path} is truncated: it records {end} bytes and has {size} "
                         f"({end - size} are missing); copy it again from where it was written")


@dataclass(frozen=True)
class DeadLink:
    """A soft or external link that leads nowhere."""

    path: str
    target: str


@dataclass(frozen=True)
class Walk:
    """Every dataset that can be reached in a file, links followed, and the links that are dead."""

    datasets: dict[str, h5py.Dataset]
    dead: tuple[DeadLink, ...]


def walk(file: h5py.File) -> Walk:
    """All datasets of ``file`` by path; aliases of one dataset are all listed."""
    datasets: dict[str, h5py.Dataset] = {}
    dead: list[DeadLink] = []
    for path, found in _descend(file, "", (), dead):
        datasets[path] = found
        if len(datasets) > _MAX_OBJECTS:
            log.warning("%s holds more than %d datasets; the rest is not looked at",
                        file.filename, _MAX_OBJECTS)
            break
    return Walk(datasets, tuple(dead))


def _descend(group: h5py.Group, prefix: str, above: tuple[Any, ...],
             dead: list[DeadLink]) -> Iterator[tuple[str, h5py.Dataset]]:
    identity = _identity(group)
    if identity in above or len(above) > _MAX_DEPTH:
        return
    for name in group:
        path = f"{prefix}/{name}" if prefix else name
        link = group.get(name, getlink=True)
        try:
            found = group[name]
        except (KeyError, OSError) as error:
            if isinstance(link, h5py.ExternalLink):
                dead.append(DeadLink(path, f"{link.filename}:{link.path}"))
            elif isinstance(link, h5py.SoftLink):
                dead.append(DeadLink(path, link.path))
            else:
                dead.append(DeadLink(path, f"unreadable object ({error})"))
            continue
        if isinstance(found, h5py.Dataset):
            yield path, found
        elif isinstance(found, h5py.Group):
            yield from _descend(found, path, (*above, identity), dead)


def _identity(found: h5py.Group | h5py.Dataset) -> tuple[str, Any]:
    return found.file.filename, h5py.h5o.get_info(found.id).addr


def require_filters(dataset: h5py.Dataset) -> None:
    """Raise :class:`MissingDependency` when HDF5 has no decoder for a filter of ``dataset``."""
    plist = dataset.id.get_create_plist()
    for number in range(plist.get_nfilters()):
        code, _, _, name = plist.get_filter(number)
        if not h5py.h5z.filter_avail(code):
            raise MissingDependency(
                f"{dataset.file.filename}:{dataset.name} is compressed with HDF5 filter {code} "
                f"({name.decode(errors='replace')}), which neither HDF5 nor hdf5plugin "
                "provides; set HDF5_PLUGIN_PATH to the folder of that filter's plugin")


def event_status(dataset: h5py.Dataset, problems: list[str]) -> np.ndarray:
    """(N,) int8 :class:`EventStatus` of the pixels of every event along axis 0.

    ``problems`` receives a sentence for each kind of trouble found.
    """
    opened: dict[str, h5py.File | None] = {}
    try:
        return _status(dataset, problems, opened, 0)
    finally:
        for file in opened.values():
            if file is not None:
                file.close()


def _status(dataset: h5py.Dataset, problems: list[str], opened: dict[str, h5py.File | None],
            depth: int) -> np.ndarray:
    events = dataset.shape[0]
    fine = np.zeros(events, np.int8)
    if events == 0 or dataset.size == 0:
        return fine
    where = f"{dataset.file.filename}:{dataset.name}"
    if dataset.is_virtual:
        return _virtual_status(dataset, where, problems, opened, depth)
    for name, _, _ in dataset.external or ():
        raw = Path(dataset.file.filename).parent / os.fsdecode(name)
        if not raw.exists() and not Path(os.fsdecode(name)).exists():
            problems.append(f"{where}: pixels are in {os.fsdecode(name)}, which is missing")
            return np.full(events, EventStatus.UNREADABLE, np.int8)
    if dataset.chunks is None:
        if dataset.id.get_storage_size() == 0:
            problems.append(f"{where}: no pixel was ever written")
            return np.full(events, EventStatus.NO_DETECTOR, np.int8)
        return fine
    return _chunk_status(dataset, where, problems)


def _chunk_status(dataset: h5py.Dataset, where: str, problems: list[str]) -> np.ndarray:
    """Events whose chunks were never written read as fill values: find them."""
    fine = np.zeros(dataset.shape[0], np.int8)
    grid = [-(-n // c) for n, c in zip(dataset.shape, dataset.chunks, strict=True)]
    if dataset.id.get_num_chunks() >= int(np.prod(grid)):
        return fine
    written = np.zeros(grid[0], np.int64)

    def count(chunk: Any) -> None:
        written[chunk.chunk_offset[0] // dataset.chunks[0]] += 1

    dataset.id.chunk_iter(count)
    per_block = int(np.prod(grid[1:]))
    status = np.select([written == 0, written < per_block],
                       [int(EventStatus.NO_DETECTOR), int(EventStatus.WRONG_SHAPE)], 0)
    status = np.repeat(status, dataset.chunks[0])[: len(fine)].astype(np.int8)
    problems.append(f"{where}: pixels of {np.count_nonzero(status)} of {len(fine)} events were "
                    "never (or only partly) written; was the writer interrupted?")
    return status


def _virtual_status(dataset: h5py.Dataset, where: str, problems: list[str],
                    opened: dict[str, h5py.File | None], depth: int) -> np.ndarray:
    events = dataset.shape[0]
    status = np.zeros(events, np.int8)
    covered = np.zeros(events, np.int64)
    missing: set[str] = set()
    for source in dataset.virtual_sources():
        try:
            low, high = source.vspace.get_select_bounds()
            points = source.vspace.get_select_npoints()
        except (ValueError, RuntimeError):      # an unlimited mapping has no bounds
            low, high, points = (0,), (events - 1,), dataset.size
        first, last = int(low[0]), min(int(high[0]), events - 1)
        span = slice(first, last + 1)
        covered[span] += points // max(1, last + 1 - first)
        part, name = _virtual_part(dataset, source, opened)
        if part is None:
            missing.add(name)
            status[span] = EventStatus.UNREADABLE
            continue
        inner = _part_status(part, source, problems, opened, depth)
        if len(inner) == last + 1 - first:
            status[span] = np.maximum(status[span], inner)
        elif inner.any():
            status[span] = np.maximum(status[span], inner.max())
    for name in sorted(missing):
        problems.append(f"{where}: part file {name} is missing or has no such dataset; its events "
                        "are reported as unreadable, not read as fill values")
    frame = int(np.prod(dataset.shape[1:]))
    holes = np.select([covered == 0, covered < frame],
                      [int(EventStatus.NO_DETECTOR), int(EventStatus.WRONG_SHAPE)], 0)
    if holes.any():
        problems.append(f"{where}: {np.count_nonzero(holes)} of {events} events are not, or only "
                        "partly, mapped to any part file")
    return np.where(status == 0, holes, status).astype(np.int8)


def _virtual_part(dataset: h5py.Dataset, source: Any,
                  opened: dict[str, h5py.File | None]) -> tuple[h5py.Dataset | None, str]:
    """The dataset that one mapping of a virtual dataset points at (None when it is not there)."""
    name = source.file_name
    if name == ".":
        file: h5py.File | None = dataset.file
    else:
        beside = Path(dataset.file.filename).parent / name
        path = beside if beside.exists() else Path(name)
        key = str(path.resolve())
        if key not in opened:
            try:
                opened[key] = open_file(path)
            except (RunNotFound, RunDamaged) as error:
                log.warning("%s", error)
                opened[key] = None
        file = opened[key]
    try:
        part = None if file is None else file[source.dset_name]
    except (KeyError, OSError):
        part = None
    return (part if isinstance(part, h5py.Dataset) else None), f"{name}:{source.dset_name}"


def _part_status(part: h5py.Dataset, source: Any, problems: list[str],
                 opened: dict[str, h5py.File | None], depth: int) -> np.ndarray:
    """Status of the events of ``part`` that a mapping selects; too short a part is unreadable."""
    if depth > _MAX_DEPTH:
        raise RunDamaged(f"virtual dataset {part.file.filename}:{part.name} refers to itself; "
                         "write its parts again")
    inner = _status(part, problems, opened, depth + 1)
    try:
        low, high = source.src_space.get_select_bounds()
    except (ValueError, RuntimeError):
        return inner
    wanted = np.full(int(high[0]) - int(low[0]) + 1, EventStatus.UNREADABLE, np.int8)
    there = inner[int(low[0]): int(high[0]) + 1]
    wanted[: len(there)] = there
    if len(there) < len(wanted):
        problems.append(f"{part.file.filename}:{part.name} holds {len(inner)} events where "
                        f"{int(high[0]) + 1} are mapped; the others are unreadable")
    return wanted
