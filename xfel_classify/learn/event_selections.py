"""Selected events of a run as lists, in the form of the hits of a run (``sinks/event_lists.py``).

``NAME.npy`` holds uint64 time stamps, sorted, for ``DataSource(timestamps=...)`` of psana2;
``NAME.txt`` lines "run index", the position of the event in the run, from 0.

Axes: N event.
"""
from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ..core import ConfigurationError, OutputDamaged, OutputExists
from ..sinks.staging import output_error, staged_bytes
from .labels import read_labels, rows_of

__all__ = ["Written", "check_free", "event_lists", "labels_of", "new_directory", "selected_events"]


def event_lists(name: str, run: int, index_N: np.ndarray, timestamp_N: np.ndarray
                ) -> dict[str, bytes]:
    """{file name: content} of the two lists of some events."""
    order = np.argsort(index_N, kind="stable")
    array_file = io.BytesIO()
    np.save(array_file, np.sort(np.asarray(timestamp_N, np.int64)).astype(np.uint64),
            allow_pickle=False)
    lines = "".join(f"{run} {int(index)}\n" for index in np.asarray(index_N)[order])
    return {f"{name}.npy": array_file.getvalue(), f"{name}.txt": lines.encode()}


def selected_events(path: str | Path, index_N: np.ndarray, timestamp_N: np.ndarray) -> np.ndarray:
    """bool (N,): which of these events a list (.npy or .txt) holds.

    Raises :class:`OutputDamaged` for a file that is no such list.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigurationError(f"selected events were to be read from {path}, which is no file; "
                                 "give a .npy of time stamps or a .txt of lines 'run index'")
    try:
        if path.suffix == ".npy":
            return np.isin(np.asarray(timestamp_N, np.uint64),
                           np.load(path, allow_pickle=False).astype(np.uint64))
        listed = [int(line.split()[1]) for line in path.read_text("utf-8").splitlines() if line]
    except (ValueError, IndexError, OSError) as error:
        raise OutputDamaged(f"selected events were to be read from {path}, which is neither a .npy "
                            f"of time stamps nor lines 'run index' ({error}); write it again"
                            ) from error
    return np.isin(index_N, listed)


def labels_of(path: str | Path, index_N: np.ndarray, timestamp_N: np.ndarray, *,
              column: str = "quality", file: str = "") -> np.ndarray:
    """(N,) 1, 0, or -1 where there is none: what a label file says of these events.

    A labelled set (HDF5 with ``labels`` and their ``names``) tells by ``column`` and position;
    everything else is read as :func:`.labels.read_labels` does.
    """
    import h5py

    path = Path(path)
    found = np.full(len(index_N), -1, np.int64)
    if path.is_file() and h5py.is_hdf5(path):
        with h5py.File(path) as opened:
            if "labels" in opened and "names" in opened["labels"].attrs:
                names = [str(name) for name in opened["labels"].attrs["names"]]
                if column not in names:
                    raise ConfigurationError(f"labels {column!r} were to be read from {path}, "
                                             f"which has {', '.join(names)}; choose one of these")
                values = opened["labels"][:, names.index(column)]
                there = index_N < len(values)
                found[there] = values[index_N[there]] > 0
                return found
    labels = read_labels(path, file=file, column="peaks/n" if column == "quality" else column)
    rows = rows_of(labels, index_N, timestamp_N)
    if not (rows >= 0).any():
        raise ConfigurationError(f"labels {labels.name} name {len(labels)} events; none of them is "
                                 "among these frames; give the labels of these frames")
    found[rows[rows >= 0]] = labels.label_N[rows >= 0]
    return found


class Written:
    """Files of one directory that get their names together at the end."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.names: list[str] = []

    def add(self, contents: Mapping[str, bytes]) -> None:
        for name, content in contents.items():
            staged_bytes(self.directory, name, content)
            self.names.append(name)

    def staged(self, name: str) -> None:
        """``name`` was written as ``name.tmp`` by somebody else."""
        self.names.append(name)


@contextmanager
def new_directory(directory: str | Path, overwrite: bool, form: str) -> Iterator[Written]:
    """Write into ``directory``; all files get their names at the end, or none.

    One that holds something is refused, unless ``overwrite`` and an earlier output of this kind
    lies there: an HDF5 file whose ``format`` is ``form`` and whose ``files`` lists what belongs to
    it, all of which is replaced.  Raises :class:`OutputExists`.
    """
    directory = Path(directory)
    earlier = check_free(directory, overwrite, form)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise output_error(directory, error) from error
    written = Written(directory)
    complete = False
    try:
        yield written
        complete = True
    finally:
        if not complete:
            for name in written.names:
                (directory / f"{name}.tmp").unlink(missing_ok=True)
    for name in written.names:
        (directory / f"{name}.tmp").replace(directory / name)
    for name in set(earlier) - set(written.names):
        (directory / Path(name).name).unlink(missing_ok=True)


def check_free(directory: str | Path, overwrite: bool, form: str) -> list[str]:
    """Names of earlier files that would be replaced.  Raises :class:`OutputExists`."""
    directory = Path(directory)
    earlier = _earlier(directory, form) if directory.is_dir() else []
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())) \
            and not (overwrite and earlier):
        raise OutputExists(f"{directory} already exists" + (
            " and holds nothing that this command wrote; choose another with -o" if overwrite
            else "; choose another with -o, or replace it with --overwrite"))
    return earlier


def _earlier(directory: Path, form: str) -> list[str]:
    import h5py

    for path in sorted(directory.glob("*.h5")):
        if h5py.is_hdf5(path):
            with h5py.File(path) as file:
                if file.attrs.get("format") == form:
                    return [path.name, *(str(name) for name in file.attrs.get("files", ()))]
    return []
