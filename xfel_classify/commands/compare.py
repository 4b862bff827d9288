"""Compare two outputs, equal but for timings and provenance."""
from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ..core import OutputDamaged, OutputError

PROVENANCE = (
    "configuration", "created", "command", "directory", "host", "notes", "numpy_version",
    "outputs", "psana_version", "python_version", "ranks", "resumed", "source", "versions",
    "xfel_classify_version",
)
"""Root attributes that say how and where, not what; those that start with ``source_`` likewise."""

TIMINGS = ("timing",)
"""Groups that hold how long it took."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for name in ("a", "b"):
        parser.add_argument(name, metavar=name.upper(), type=Path,
                            help="a file of a run, or the directory of a run")


def execute(args: argparse.Namespace) -> int:
    """0 equal, 1 different."""
    differences = compare(args.a, args.b)
    for difference in differences:
        print(difference)
    if not differences:
        print(f"{args.a} and {args.b} are equal but for timings and provenance")
    return 1 if differences else 0


def compare(a: str | Path, b: str | Path) -> list[str]:
    """Differences between two outputs, one sentence each; [] when there are none.

    HDF5 files are compared dataset for dataset (type, shape, every value, NaN = NaN) and
    attribute for attribute, :data:`PROVENANCE` and :data:`TIMINGS` left out.  Directories are
    compared file by file.  Lists of hits are compared without the directory in their lines.
    Raises :class:`OutputError` when a file is missing, :class:`OutputDamaged` when unreadable.
    """
    a, b = Path(a), Path(b)
    for path in (a, b):
        if not path.exists():
            raise OutputError(f"cannot compare {a} and {b}: {path} does not exist")
    if a.is_dir() != b.is_dir():
        return [f"{a} and {b}: one is a directory, the other a file"]
    if a.is_dir():
        return _directories(a, b)
    if h5py.is_hdf5(a) and h5py.is_hdf5(b):
        try:
            with h5py.File(a) as first, h5py.File(b) as second:
                return _groups(first, second)
        except OSError as error:
            raise OutputDamaged(f"cannot compare {a} and {b}: {error}; try xfel-classify validate "
                                "on each of them") from error
    for path in (a, b):
        if path.suffix in (".h5", ".hdf5", ".cxi") and not h5py.is_hdf5(path):
            raise OutputDamaged(f"cannot compare {a} and {b}: {path} is not a whole HDF5 file; "
                                "run its command again with --resume")
    if a.suffix == ".lst":
        return _lines(a.name, _without_directories(a), _without_directories(b))
    if a.suffix == ".npy":
        return _array_files(a, b)
    return _lines(a.name, a.read_bytes().splitlines(), b.read_bytes().splitlines())


def _directories(a: Path, b: Path) -> list[str]:
    ours = {p.name for p in a.iterdir() if p.is_file()}
    theirs = {p.name for p in b.iterdir() if p.is_file()}
    found = [f"{name} is only in {a}" for name in sorted(ours - theirs)]
    found += [f"{name} is only in {b}" for name in sorted(theirs - ours)]
    for name in sorted(ours & theirs):
        found += [f"{name}: {problem}" for problem in compare(a / name, b / name)]
    return found


def _groups(a: h5py.Group, b: h5py.Group, path: str = "") -> list[str]:
    found = _attributes(path or "/", a.attrs, b.attrs, root=not path)
    ours, theirs = set(a), set(b)
    if not path:
        ours, theirs = ours - set(TIMINGS), theirs - set(TIMINGS)
    found += [f"{path}/{name} is only in the first" for name in sorted(ours - theirs)]
    found += [f"{path}/{name} is only in the second" for name in sorted(theirs - ours)]
    for name in sorted(ours & theirs):
        where = f"{path}/{name}"
        links = a.get(name, getlink=True), b.get(name, getlink=True)
        if any(isinstance(link, (h5py.SoftLink, h5py.ExternalLink)) for link in links):
            found += _links(where, *links)
            continue
        one, other = a[name], b[name]
        if isinstance(one, h5py.Group) and isinstance(other, h5py.Group):
            found += _groups(one, other, where)
        elif isinstance(one, h5py.Dataset) and isinstance(other, h5py.Dataset):
            found += _attributes(where, one.attrs, other.attrs)
            found += _datasets(where, one, other)
        else:
            found.append(f"{where} is a group in one and a dataset in the other")
    return found


def _links(where: str, a: Any, b: Any) -> list[str]:
    if type(a) is not type(b) or a.path != b.path or (
        isinstance(a, h5py.ExternalLink) and a.filename != b.filename
    ):
        return [f"{where} links to different places"]
    return []


def _datasets(where: str, a: h5py.Dataset, b: h5py.Dataset) -> list[str]:
    if a.shape != b.shape:
        return [f"{where}: shape {a.shape} and {b.shape}"]
    if a.dtype != b.dtype:
        return [f"{where}: type {a.dtype} and {b.dtype}"]
    if a.shape is None:
        return []
    different, first = 0, ""
    for piece in _pieces(a):
        one, other = np.asarray(a[piece]), np.asarray(b[piece])
        wrong = _unequal(one, other)
        if wrong.any():
            if not first:
                at = tuple(int(i[0]) for i in np.nonzero(wrong)) if wrong.ndim else ()
                offset = piece[0].start if piece and at else 0
                place = [at[0] + offset, *at[1:]] if at else []
                first = f"first at {place}: {one[at]!r} and {other[at]!r}"
            different += int(np.count_nonzero(wrong))
    return [f"{where}: {different} of {a.size} values differ, {first}"] if different else []


def _pieces(dataset: h5py.Dataset, limit_bytes: int = 64 * 2**20) -> list[tuple[slice, ...]]:
    """Slices along the first axis that fit in memory."""
    if not dataset.shape:
        return [()]
    row_bytes = max(1, dataset.dtype.itemsize * int(np.prod(dataset.shape[1:])))
    rows = max(1, limit_bytes // row_bytes)
    return [(slice(i, min(i + rows, dataset.shape[0])),)
            for i in range(0, dataset.shape[0], rows)]


def _unequal(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    wrong = np.asarray(a != b)
    if a.dtype.kind in "fc":
        wrong = wrong & ~(np.isnan(a) & np.isnan(b))
    return wrong


def _attributes(
    where: str, a: h5py.AttributeManager, b: h5py.AttributeManager, root: bool = False
) -> list[str]:
    def wanted(names: Any) -> set[str]:
        return {n for n in names if not root or not (
            n in PROVENANCE or n.startswith("source_"))}

    ours, theirs = wanted(a), wanted(b)
    found = [f"attribute {name} of {where} is only in the first" for name in sorted(ours - theirs)]
    found += [f"attribute {name} of {where} is only in the second"
              for name in sorted(theirs - ours)]
    for name in sorted(ours & theirs):
        one, other = np.asarray(a[name]), np.asarray(b[name])
        if one.shape != other.shape or np.any(_unequal(one, other)):
            found.append(f"attribute {name} of {where}: {_short(a[name])} and {_short(b[name])}")
    return found


def _short(value: Any) -> str:
    shown = str(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _without_directories(path: Path) -> list[bytes]:
    lines = []
    for line in path.read_bytes().splitlines():
        name, separator, frame = line.rpartition(b" //")
        lines.append((name or line).rpartition(b"/")[2] + separator + frame if separator
                     else line.rpartition(b"/")[2])
    return lines


def _lines(name: str, a: list[bytes], b: list[bytes]) -> list[str]:
    if len(a) != len(b):
        return [f"{name}: {len(a)} lines and {len(b)} lines"]
    wrong = [i for i, (one, other) in enumerate(zip(a, b, strict=True)) if one != other]
    if not wrong:
        return []
    return [f"{name}: {len(wrong)} of {len(a)} lines differ, first at line {wrong[0] + 1}"]


def _array_files(a: Path, b: Path) -> list[str]:
    try:
        one, other = (np.load(path, allow_pickle=False) for path in (a, b))
    except ValueError as error:
        raise OutputDamaged(f"cannot compare {a} and {b}: {error}") from error
    if one.shape != other.shape or one.dtype != other.dtype:
        return [f"{a.name}: {one.dtype} {one.shape} and {other.dtype} {other.shape}"]
    wrong = int(np.count_nonzero(_unequal(one, other)))
    return [f"{a.name}: {wrong} of {one.size} values differ"] if wrong else []
