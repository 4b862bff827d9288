"""Files that appear whole or not at all: ``<name>.tmp``, synced, renamed later by the caller.

HDF5 does not survive a write that fails: once a flush has met a full disk, closing the file
fails as well and the process may crash when the library cleans up.  :class:`Spool` therefore
stands between HDF5 and the disk.  It never reports a failure to HDF5; it remembers the first one,
drops what comes after, and raises it from :meth:`Spool.check`, when HDF5 is not on the stack.
"""
from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ..core import Column, OutputError, OutputFull

SMALL_BYTES = 64 * 1024
"""Arrays up to this size are stored contiguous; larger ones in chunks, compressed."""

CHUNK_BYTES = 512 * 1024

TEXT = h5py.string_dtype("utf-8")


class Spool(io.RawIOBase):
    """A read/write file for ``h5py.File(spool, "w")`` whose writes never raise.

    Call :meth:`check` between HDF5 calls and after closing the HDF5 file: it raises the
    ``OSError`` of the first write that failed.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.error: OSError | None = None
        self._position = 0
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)

    def check(self) -> None:
        if self.error is not None:
            raise self.error

    def sync(self) -> None:
        """Make everything durable.  Raises ``OSError``, earlier failures included."""
        self.check()
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            self.error = error
            raise

    def close(self) -> None:
        if not self.closed:
            os.close(self._descriptor)
        super().close()

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {
            os.SEEK_SET: 0,
            os.SEEK_CUR: self._position,
            os.SEEK_END: os.fstat(self._descriptor).st_size,
        }[whence]
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        piece = os.pread(self._descriptor, len(view), self._position)
        view[:len(piece)] = piece
        self._position += len(piece)
        return len(piece)

    def write(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        length, done = len(view), 0
        try:
            while done < length and self.error is None:
                done += os.pwrite(self._descriptor, view[done:], self._position + done)
        except OSError as error:
            self.error = error
        self._position += length
        return length

    def truncate(self, size: int | None = None) -> int:
        size = self._position if size is None else size
        try:
            if self.error is None:
                os.ftruncate(self._descriptor, size)
        except OSError as error:
            self.error = error
        return size


@contextmanager
def staged_hdf5(directory: Path, name: str) -> Iterator[tuple[h5py.File, Callable[[], None]]]:
    """``(file, check)`` for writing ``directory/name.tmp``; synced at the end, removed on failure.

    Call ``check()`` now and then while writing much: it stops early when the disk is full.
    Raises :class:`OutputError`.
    """
    path = directory / f"{name}.tmp"
    try:
        spool = Spool(path)
    except OSError as error:
        raise output_error(path, error) from error
    complete = False
    try:
        with h5py.File(spool, "w") as file:
            yield file, spool.check
        spool.sync()
        complete = True
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        if spool.error is None:
            raise                       # not the disk: the rows, the pixels, or a bug
        raise output_error(path, spool.error) from error
    finally:
        spool.close()
        if not complete:
            path.unlink(missing_ok=True)


def staged_bytes(directory: Path, name: str, content: bytes) -> None:
    """Write ``directory/name.tmp`` durably.  Raises :class:`OutputError`, leaving nothing."""
    path = directory / f"{name}.tmp"
    try:
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        raise output_error(path, error) from error


def output_error(path: Path, error: OSError) -> OutputError:
    """What to tell the user about ``error`` met while writing ``path``."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return OutputFull(
            f"{path} cannot be written: the disk, the quota or the file size limit is exhausted. "
            "The events analysed so far are kept; free some space, then run the same command "
            "with --resume")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return OutputError(f"{path} cannot be written: its directory does not allow it; "
                           "correct its permissions, or give a directory of your own with -o")
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return OutputError(f"{path} cannot be written: its directory does not exist; make it, "
                           "or give another with -o")
    return OutputError(f"{path} cannot be written: {error}; check the file system, then run the "
                       "same command with --resume")


def write_array(
    parent: h5py.Group, path: str, values: Any, *, chunk: tuple[int, ...] | None = None,
    compress: bool = True, **attributes: Any,
) -> h5py.Dataset:
    """``values`` as a dataset; compressed in chunks (whole rows) when it is not small.

    The layout depends on shape and type alone, so equal arrays give equal bytes.
    ``attributes`` that are None are left out.
    """
    array = storable(values)
    options: dict[str, Any] = {}
    if array.nbytes > SMALL_BYTES and array.ndim > 0 and array.dtype.kind != "O":
        row_bytes = max(1, array.nbytes // array.shape[0])
        rows = min(array.shape[0], max(1, CHUNK_BYTES // row_bytes))
        options["chunks"] = chunk or (rows, *array.shape[1:])
        if compress:
            options |= {"compression": "gzip", "compression_opts": 4, "shuffle": True}
    dtype = TEXT if array.dtype.kind == "O" else array.dtype
    dataset = parent.create_dataset(path, data=array, dtype=dtype, track_times=False, **options)
    set_attributes(dataset, attributes)
    return dataset


def storable(values: Any) -> np.ndarray:
    """As a contiguous array that HDF5 can hold; texts become UTF-8 strings."""
    array = np.ascontiguousarray(values) if np.ndim(values) else np.asarray(values)
    if array.dtype.kind == "U":
        return array.astype(object)
    return array


def set_attributes(target: h5py.HLObject, attributes: Mapping[str, Any]) -> None:
    """Texts, numbers, arrays and sequences of texts; None is left out."""
    for name, value in attributes.items():
        if value is None:
            continue
        if isinstance(value, str):
            target.attrs.create(name, value, dtype=TEXT)
        elif isinstance(value, (tuple, list)) and all(isinstance(v, str) for v in value):
            target.attrs.create(name, np.array(value, dtype=object), (len(value),), dtype=TEXT)
        else:
            target.attrs[name] = value


def column_attributes(column: Column) -> dict[str, Any]:
    """``units``, ``doc``, ``missing`` and ``names`` of a column, as attributes."""
    return {
        "units": column.unit,
        "doc": column.doc,
        "missing": None if column.ragged else np.asarray(column.missing, column.dtype)
        if np.dtype(column.dtype).kind in "biuf" else str(column.missing),
        "names": list(column.names) or None,
    }


def filled_column(column: Column, values: Any, rows: int) -> np.ndarray:
    """A column as an array of ``rows`` rows; None (no such column in the rows) is all missing."""
    if values is None:
        return np.full((rows, *column.shape), column.missing, column.dtype)
    return np.ascontiguousarray(values, column.dtype).reshape(rows, *column.shape)
