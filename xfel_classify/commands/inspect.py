"""Describe what a summary, CXI or constants file, or a directory of a run, holds."""
from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ..core import OutputDamaged, OutputError

NOT_COLUMNS = ("totals", "timing", "reason")
"""Groups of a summary that hold something else than one value per event."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="FILE", type=Path,
                        help="a file of a run, a constants file, or the directory of a run")


def execute(args: argparse.Namespace) -> int:
    print(inspect_file(args.path))
    return 0


def inspect_file(path: str | Path) -> str:
    """Describe a summary, a CXI file, a constants file, any HDF5 file, or a directory.

    Raises :class:`OutputError` when there is nothing at ``path``, :class:`OutputDamaged` when it
    is not HDF5.
    """
    path = Path(path)
    if path.is_dir():
        return "\n".join(_directory(path))
    if not path.exists():
        raise OutputError(f"{path} does not exist; give a file written by xfel-classify run, or "
                          "the directory that holds it")
    try:
        with h5py.File(path) as file:
            kind, describe = _kind(file)
            size = path.stat().st_size
            return "\n".join([f"{path.name}: {kind}, {_bytes(size)}", *describe(file)])
    except OSError as error:
        raise OutputDamaged(f"{path} cannot be read as HDF5: {error}. If a run is still writing "
                            "it or was killed, run it again with --resume") from error


def _kind(file: h5py.File) -> tuple[str, Any]:
    stated = text(file.attrs.get("format", ""))
    if stated == "xfel_classify summary":
        return "summary of a run", _summary
    if "entry_1/result_1/nPeaks" in file or "entry_1/data_1" in file:
        return "hits of a run (CXI)", _cxi
    if any(isinstance(group, h5py.Group) and {"pedestals", "pixel_gain"} & set(group)
           for group in file.values()):
        return "calibration constants", _constants
    return "HDF5 file of another program", _tree


def _directory(path: Path) -> Iterator[str]:
    journals = sorted(path.glob("rank*.journal"))
    if journals:
        yield f"{path}: parts of an unfinished run"
        yield from _parts(path)
    nested = sorted({p.parent for p in path.glob("*/rank*.journal")})
    for folder in nested:
        yield f"{folder}: parts of an unfinished run"
        yield from _parts(folder)
    summaries = [p for p in sorted(path.glob("*.h5")) if _is_summary(p)]
    for summary in summaries:
        yield inspect_file(summary)
    others = sorted(p for p in path.iterdir() if p.is_file() and p not in summaries + journals)
    if others:
        yield "files beside it:" if summaries else f"{path}:"
        yield from (f"  {p.name}  {_bytes(p.stat().st_size)}" for p in others)
    if not (journals or nested or summaries or others):
        yield f"{path}: an empty directory"


def _parts(folder: Path) -> Iterator[str]:
    """Rows and hits of every trustworthy part (the hook to the pipeline's journal)."""
    from ..pipeline.journal import read_parts

    rows = 0
    for part in read_parts(folder):
        count = len(part.rows.get("timestamp", ()))
        rows += count
        yield f"  {part.path.name}: {count} events, {len(part.kept)} of them kept as hits"
    yield f"  {rows} events are safe; run the same command with --resume to do the others"


def _is_summary(path: Path) -> bool:
    try:
        with h5py.File(path) as file:
            return text(file.attrs.get("format", "")) == "xfel_classify summary"
    except OSError:
        return False


def _summary(file: h5py.File) -> Iterator[str]:
    attributes = file.attrs
    events = int(attributes.get("events", 0))
    expected = int(attributes.get("events_expected", -1))
    hits = int(attributes.get("hits", 0))
    yield (f"experiment {text(attributes.get('exp'))}, run {attributes.get('run')}, detector "
           f"{text(attributes.get('detector'))} ({text(attributes.get('detector_kind'))})")
    state = "complete" if bool(attributes.get("complete", False)) else "INCOMPLETE"
    known = f"{expected} expected" if expected >= 0 else "number expected unknown"
    yield f"{state}: {events} events, {known}"
    yield f"hits: {hits}" + (f" ({100 * hits / events:.2f} %)" if events else "")
    if "reason/counts" in file:
        names = [text(name) for name in file["reason/names"][()]]
        for name, count in zip(names, file["reason/counts"][()], strict=True):
            if count:
                yield f"  {count:8d}  {name}"
    yield "columns:"
    for path, dataset in datasets(file):
        if path.partition("/")[0] not in NOT_COLUMNS:
            yield f"  {_column(path, dataset)}"
    if file.get("totals"):
        yield "totals:"
        for path, dataset in datasets(file["totals"]):
            yield f"  {_column('totals/' + path, dataset)}"
    if file.get("timing"):
        yield "timing:"
        yield from _timing(file["timing"])
    yield from _other_attributes(attributes)


def _timing(group: h5py.Group) -> Iterator[str]:
    """Seconds of every stage, summed over the ranks; anything else as it is."""
    staged = {"stage", "seconds"} <= set(group) and group["seconds"].shape[-1:] == \
        group["stage"].shape
    if staged:
        seconds = group["seconds"][()].reshape(-1, len(group["stage"])).sum(axis=0)
        for stage, spent in zip(group["stage"][()], seconds, strict=True):
            yield f"  {spent:10.2f} s  {text(stage)}"
    for path, dataset in datasets(group):
        if not staged or path not in ("stage", "seconds"):
            yield f"  {path}: {_value(dataset)}"


def _cxi(file: h5py.File) -> Iterator[str]:
    attributes = file.attrs
    if "exp" in attributes:
        yield (f"experiment {text(attributes['exp'])}, run {attributes.get('run')}, pixels "
               f"{text(attributes.get('pixels', 'copied'))}")
    frames = file.get("entry_1/data_1/data")
    if frames is not None:
        yield (f"{frames.shape[0]} frames of {' x '.join(map(str, frames.shape[1:]))} pixels, "
               f"{frames.dtype}" + (", virtual" if frames.is_virtual else ""))
    peaks = file.get("entry_1/result_1/nPeaks")
    if peaks is not None and len(peaks):
        counts = peaks[()]
        yield f"peaks a hit: {counts.min()} to {counts.max()}, median {np.median(counts):g}"
    yield "datasets:"
    yield from (f"  {_column(path, dataset)}" for path, dataset in datasets(file))


def _constants(file: h5py.File) -> Iterator[str]:
    for name, group in file.items():
        if isinstance(group, h5py.Group):
            yield f"detector {name}:"
            yield from (f"  {_column(path, dataset)}" for path, dataset in datasets(group))


def _tree(file: h5py.File) -> Iterator[str]:
    yield from (f"  {_column(path, dataset)}" for path, dataset in datasets(file))


def datasets(group: h5py.Group) -> list[tuple[str, h5py.Dataset]]:
    """(path, dataset) of everything under ``group``, soft and external links not followed."""
    found: list[tuple[str, h5py.Dataset]] = []
    group.visititems(lambda path, thing: found.append((path, thing))
                     if isinstance(thing, h5py.Dataset) else None)
    return sorted(found, key=lambda pair: pair[0])


def _column(path: str, dataset: h5py.Dataset) -> str:
    shape = " x ".join(map(str, dataset.shape)) or "scalar"
    unit = text(dataset.attrs.get("units", ""))
    line = f"{path}  ({shape}) {dataset.dtype}" + (f" [{unit}]" if unit else "")
    doc = text(dataset.attrs.get("doc", ""))
    return line + (f": {doc}" if doc else "")


def _value(dataset: h5py.Dataset) -> str:
    values = dataset[()]
    if np.size(values) > 8:
        return f"{np.size(values)} values"
    return " ".join(text(v) if isinstance(v, bytes) else f"{v:.6g}" if isinstance(
        v, (float, np.floating)) else str(v) for v in np.ravel(values))


def _other_attributes(attributes: h5py.AttributeManager) -> Iterator[str]:
    shown = {"exp", "run", "detector", "detector_kind", "complete", "events", "events_expected",
             "hits", "format", "layout"}
    yield "attributes:"
    for name in sorted(set(attributes) - shown):
        value = attributes[name]
        if isinstance(value, str) and "\n" in value:
            yield f"  {name}: {len(value.splitlines())} lines"
        elif isinstance(value, np.ndarray):
            yield f"  {name}: {', '.join(text(v) for v in value.ravel())}"
        else:
            yield f"  {name}: {text(value)}"


def text(value: Any) -> str:
    """A text attribute or value, whether HDF5 gives bytes or str."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.4g} {unit}"
        size /= 1000
    return f"{size:.4g} TB"
