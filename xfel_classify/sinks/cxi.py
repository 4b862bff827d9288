"""The hits of a run as ``{stem}.cxi``, in the layout that LCLS users and CrystFEL expect.

Frames are panels stacked along the slow axis: row ``panel * S + ss`` of a (P * S, F) image.
Peak positions are pixel indices in that stack, (0, 0) = centre of the first pixel, with their
sub-pixel part; CrystFEL adds the half pixel itself (crystfel_geometry(5), "coordinate
conventions").

The mask is stored per frame, in the dimensions of ``data``, because a geometry file that says
``dim0 = %`` describes both and readers that share one hyperslab for both exist.  It costs
nothing: the one compressed plane of the run is repeated as ready-made chunks, which any HDF5
since 1.6 reads (a virtual dataset would need 1.10 and gets slow with the number of frames).
"""
from __future__ import annotations

import logging
import os
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import h5py
import msgspec
import numpy as np

from ..core import (
    Column,
    ConfigurationError,
    Constants,
    OutputError,
    OutputFull,
    RunInfo,
    RunResult,
)
from .staging import (
    column_attributes,
    filled_column,
    set_attributes,
    staged_hdf5,
    write_array,
)

log = logging.getLogger(__name__)

CXI_VERSION = 140
FORMAT = "xfel_classify cxi"
FORMAT_VERSION = 1
LCLS2_EPOCH_UNIX_S = 631152000
"""Seconds from 1970-01-01 to 1990-01-01 UTC, where psana2 starts to count."""

PEAKS = {
    # CXI name: (column, units, doc)
    "peakTotalIntensity": ("total", None, "integrated intensity over the background"),
    "peakMaxIntensity": ("max", None, "largest pixel (name used by LUTE)"),
    "peakMaximumValue": ("max", None, "largest pixel (name used by Cheetah and OM)"),
    "peakSNR": ("snr", "", "signal to noise ratio"),
    "peakNPixels": ("npix", "pixel", "number of pixels"),
    "peakRadius": ("radius_px", "pixel", "distance from the beam"),
}

Locate = Callable[[int], tuple[str, str, int]]
HIT, HIT_PEAKS = "experiment_identifier", "experiment_identifier:peaks"


class Sink:
    """Writes ``{stem}.cxi`` from the kept rows, one frame in memory at a time."""

    name = "cxi"

    class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
        """What goes into the CXI file."""

        link: bool = False      # refer to the source's pixels instead of copying them
        compression: Literal["none", "bitshuffle-lz4", "gzip"] = "none"
        peaks: str = "peaks"    # group of the columns that hold the peaks

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or self.Config()

    @property
    def wants_pixels(self) -> bool:
        """Whether the loop must keep the calibrated pixels of hits for this sink."""
        return not self.config.link

    def check(self, run: RunInfo, constants: Constants, locate: Locate | None) -> None:
        """Before the first event: can links work?  Raises :class:`ConfigurationError` if not."""
        if self.config.link:
            try:
                places = [locate(0)] if locate is not None else []
            except IndexError:
                return                  # a run without events
            problem = _link_problem(constants, places, Stack(*run.panel_shape))
            if problem:
                raise ConfigurationError(
                    f"the CXI file of {run.exp} run {run.run} was to refer to the pixels of the "
                    f"source, but {problem}; leave out --cxi-link (cxi.link) to copy the hits")

    def write(self, result: RunResult, directory: Path) -> list[str]:
        """Write ``{stem}.cxi.tmp``; returns the final name.

        Raises :class:`OutputFull` before the first frame when the frames cannot fit,
        :class:`OutputError` when they cannot be written.
        """
        directory, name = Path(directory), f"{result.stem}.cxi"
        rows = np.unique(np.asarray(result.kept, np.int64))
        stack = Stack(*result.run.panel_shape)
        links = self._links(result, rows, stack) if self.config.link else None
        if links is None and self.config.compression == "none":
            _require_space(directory, name, 4 * len(rows) * stack.height * stack.width)
        with staged_hdf5(directory, name) as (file, check):
            file.create_dataset("cxi_version", data=CXI_VERSION)
            set_attributes(file, _root_attributes(result, len(rows), linked=bool(links)))
            self._write_results(file, result, rows, stack)
            _write_lcls(file, result, rows)
            check()
            if links:
                _write_links(file, links, stack)
            else:
                self._write_frames(file, result, rows, stack, check)
            _write_mask(file, _bad_HW(result, stack), len(rows))
            _write_instrument(file, result)
        return [name]

    def _links(
        self, result: RunResult, rows: np.ndarray, stack: Stack
    ) -> list[SourceFrames] | None:
        """Where the source holds the frames; None (and a warning) when copies are needed."""
        places = [result.locate(int(row)) for row in rows] if result.locate else []
        problem = _link_problem(result.constants, places, stack) if len(rows) else ""
        if problem:
            log.warning("CXI pixels are copied although links were asked for: %s", problem)
        return None if problem else _merge(places, stack)

    def _write_frames(
        self, file: h5py.File, result: RunResult, rows: np.ndarray, stack: Stack,
        check: Callable[[], None],
    ) -> None:
        options: dict[str, Any] = {}
        if self.config.compression == "gzip":
            options = {"compression": "gzip", "compression_opts": 1, "shuffle": True}
        elif self.config.compression == "bitshuffle-lz4":
            import hdf5plugin

            options = dict(hdf5plugin.Bitshuffle(cname="lz4"))
        frames = _per_frame(file, "entry_1/data_1/data", len(rows), stack, np.float32, **options)
        _describe_frames(frames, result)
        if len(rows) and result.pixels is None:
            raise OutputError(
                f"{result.stem}.cxi was asked for, but the pixels of its {len(rows)} hits were "
                "not kept; leave the cxi sink out, or let the run keep the pixels of hits")
        brightest = np.zeros((stack.height, stack.width), np.float32)
        for position, row in enumerate(rows):
            assert result.pixels is not None
            image = stack.image(result.pixels(int(row)))
            frames[position] = image
            np.maximum(brightest, image, out=brightest)
            check()
        if "powder_max_hits" not in result.totals:
            _write_powder(file, "powderHits", brightest, result)

    def _write_results(
        self, file: h5py.File, result: RunResult, rows: np.ndarray, stack: Stack
    ) -> None:
        for total, name in (("powder_max_hits", "powderHits"),
                            ("powder_max_misses", "powderMisses")):
            if total in result.totals:
                image = stack.image(np.asarray(result.totals[total].values, np.float32))
                _write_powder(file, name, image, result)
        group = file.create_group("entry_1/result_1")
        _write_peaks(group, result, rows, stack, self.config.peaks)
        for path, column in sorted(result.columns.items()):
            if not column.ragged and np.dtype(column.dtype).kind in "biuf":
                values = filled_column(column, result.rows.get(path), len(result))[rows]
                write_array(group, path, values, axes=HIT, **column_attributes(column))
        stamps = _stamps(result, rows)
        names = [f"{result.stem}_{stamp}" for stamp in stamps]
        width = max([1, *(len(name.encode()) for name in names)])
        file.create_dataset(
            "entry_1/experiment_identifier",
            data=np.array([n.encode() for n in names], h5py.string_dtype("utf-8", width)))
        set_attributes(file["entry_1/experiment_identifier"], {
            "axes": HIT, "units": "", "doc": "experiment, run and 64-bit time stamp of the hit"})
        write_array(file, "entry_1/experimental_identifier", _indices(result, rows), axes=HIT,
                    units="", doc="position of the event in the run, from 0")


@dataclass(frozen=True)
class Stack:
    """P panels of S x F pixels under one another."""

    panels: int
    slow: int
    fast: int

    @property
    def height(self) -> int:
        return self.panels * self.slow

    @property
    def width(self) -> int:
        return self.fast

    def image(self, values_PSF: np.ndarray) -> np.ndarray:
        """(P, S, F) as the (P * S, F) image.  Raises :class:`OutputError` on another shape."""
        if np.shape(values_PSF) != (self.panels, self.slow, self.fast):
            raise OutputError(
                f"a frame of shape {np.shape(values_PSF)} cannot go into a CXI file of "
                f"{(self.panels, self.slow, self.fast)} frames; panels changed within the run")
        return np.ascontiguousarray(values_PSF).reshape(self.height, self.width)


@dataclass
class SourceFrames:
    """``count`` consecutive frames of a dataset of another file, shown from ``first`` on."""

    file: str
    dataset: str
    position: int
    first: int
    count: int
    shape: tuple[int, ...]


def _link_problem(
    constants: Constants | None, places: Sequence[tuple[str, str, int]], stack: Stack
) -> str:
    if constants is None or not constants.calibrated:
        return "the source holds raw frames, which CrystFEL cannot use"
    if not places:
        return "the source is not a file that HDF5 can refer to"
    try:
        _merge(places, stack)
    except (OSError, KeyError, ValueError) as error:
        return f"a frame of it cannot be referred to ({error})"
    return ""


def _merge(places: Sequence[tuple[str, str, int]], stack: Stack) -> list[SourceFrames]:
    shapes: dict[tuple[str, str], tuple[int, ...]] = {}
    merged: list[SourceFrames] = []
    for first, (name, dataset, position) in enumerate(places):
        path = os.path.abspath(name)
        if (path, dataset) not in shapes:
            with h5py.File(path) as source:
                shapes[path, dataset] = source[dataset].shape
        shape = shapes[path, dataset]
        expected = ((stack.panels, stack.slow, stack.fast), (stack.height, stack.width))
        if shape[1:] not in expected:
            raise ValueError(f"{name}:{dataset} has shape {shape}")
        last = merged[-1] if merged else None
        if last and (last.file, last.dataset, last.position + last.count) == (
            path, dataset, position
        ):
            last.count += 1
        else:
            merged.append(SourceFrames(path, dataset, position, first, 1, shape))
    return merged


def _write_links(file: h5py.File, links: Sequence[SourceFrames], stack: Stack) -> None:
    """``data`` as a virtual dataset; a frame whose source is gone reads as NaN, not as 0."""
    count = links[-1].first + links[-1].count
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_fill_value(np.array(np.nan, np.float32))
    creation.set_obj_track_times(False)
    shape = (count, stack.height, stack.width)
    for link in links:
        here = h5py.h5s.create_simple(shape)
        here.select_hyperslab((link.first, 0, 0), (link.count, stack.height, stack.width))
        there = h5py.h5s.create_simple(link.shape)
        there.select_hyperslab((link.position, *(0 for _ in link.shape[1:])),
                               (link.count, *link.shape[1:]))
        # % starts a printf pattern in the name of a virtual source
        creation.set_virtual(here, link.file.replace("%", "%%").encode(),
                             link.dataset.replace("%", "%%").encode(), there)
    h5py.h5d.create(file.require_group("entry_1/data_1").id, b"data", h5py.h5t.IEEE_F32LE,
                    h5py.h5s.create_simple(shape), dcpl=creation)
    set_attributes(file["entry_1/data_1/data"], {
        "axes": f"{HIT}:y:x",
        "doc": "calibrated frames in the source file; apply the mask: masked pixels are not "
               "zeroed here"})


def _per_frame(
    file: h5py.File, path: str, count: int, stack: Stack, dtype: Any, **options: Any
) -> h5py.Dataset:
    shape = (count, stack.height, stack.width)
    return file.create_dataset(
        path, shape, dtype, chunks=(1, *shape[1:]), track_times=False,
        maxshape=None if count else (None, *shape[1:]), **options)


def _describe_frames(frames: h5py.Dataset, result: RunResult) -> None:
    unit = result.constants.unit if result.constants else ""
    set_attributes(frames, {
        "axes": f"{HIT}:y:x", "units": unit,
        "doc": "calibrated frames of the hits in time order, panels stacked along y; masked and "
               "non-finite pixels are 0"})


def _write_powder(file: h5py.File, name: str, image: np.ndarray, result: RunResult) -> None:
    write_array(file, f"entry_1/data_1/{name}", image,
                units=result.constants.unit if result.constants else "",
                doc=f"largest value of every pixel over the {name.removeprefix('powder').lower()}")


def _bad_HW(result: RunResult, stack: Stack) -> np.ndarray:
    if result.constants is None:
        return np.zeros((stack.height, stack.width), np.uint16)
    return stack.image(~result.constants.good_PSF).astype(np.uint16)


def _write_mask(file: h5py.File, bad_HW: np.ndarray, count: int) -> None:
    """The same plane for every frame, compressed once."""
    stack = Stack(1, *bad_HW.shape)
    mask = _per_frame(file, "entry_1/data_1/mask", count, stack, np.uint16, compression="gzip",
                      compression_opts=4, shuffle=True)
    shuffled = np.ascontiguousarray(bad_HW.astype("<u2").view(np.uint8).reshape(-1, 2).T)
    chunk = zlib.compress(shuffled.tobytes(), 4)
    for position in range(count):
        mask.id.write_direct_chunk((position, 0, 0), chunk)
    set_attributes(mask, {"axes": f"{HIT}:y:x", "units": "", "names": ["good", "bad"],
                          "doc": "0 = good, 1 = bad; the same for every frame of the run"})


def _write_instrument(file: h5py.File, result: RunResult) -> None:
    """``entry_1/instrument_1/detector_1``, where readers of CXI proper look."""
    group = file.create_group("entry_1/instrument_1/detector_1")
    for name in ("data", "mask"):
        group[name] = h5py.SoftLink(f"/entry_1/data_1/{name}")
    set_attributes(group, {"description": result.run.detector,
                           "detector_kind": result.run.detector_kind})
    if result.constants is not None:
        geometry = result.constants.geometry
        for name in ("x_pixel_size", "y_pixel_size"):
            write_array(group, name, geometry.pixel_size_m, units="m", doc="pixel pitch")
        if geometry.distance_m is not None:
            write_array(group, "distance", geometry.distance_m, units="m",
                        doc="sample to detector, as stated by the geometry")


def _write_peaks(
    group: h5py.Group, result: RunResult, rows: np.ndarray, stack: Stack, prefix: str
) -> None:
    unit = result.constants.unit if result.constants else ""
    columns: Mapping[str, Column] = result.columns
    present = all(f"{prefix}/{name}" in columns and f"{prefix}/{name}" in result.rows
                  for name in ("panel", "fs", "ss"))

    def of_hits(name: str) -> list[np.ndarray]:
        values = result.rows[f"{prefix}/{name}"]
        return [np.asarray(values[row], np.float64) for row in rows]

    fast = of_hits("fs") if present else [np.zeros(0)] * len(rows)
    counts = np.array([len(row) for row in fast], np.int64)
    width = max(1, int(counts.max(initial=0)))
    write_array(group, "nPeaks", counts, axes=HIT_PEAKS, minPeaks=int(counts.min(initial=width)),
                maxPeaks=width, units="", doc="peaks of the hit; later slots are 0")

    def padded(name: str, values: list[np.ndarray], units: str | None, doc: str) -> None:
        table = np.zeros((len(rows), width), np.float32)
        for position, row in enumerate(values):
            table[position, :len(row)] = row
        write_array(group, name, table, axes=HIT_PEAKS, units=unit if units is None else units,
                    doc=doc)

    index = "pixel index in the stacked frame, 0 = centre of the first pixel"
    panel = of_hits("panel") if present else fast
    slow = of_hits("ss") if present else fast
    # a centroid stays within its panel, or CrystFEL would find it on the next one
    inside = [np.clip(row, -0.49, stack.slow - 0.51) for row in slow]
    padded("peakXPosRaw", [np.clip(row, -0.49, stack.fast - 0.51) for row in fast], "pixel",
           f"along the fast axis: {index}")
    padded("peakYPosRaw",
           [p * stack.slow + s for p, s in zip(panel, inside, strict=True)], "pixel",
           f"along the slow axis: {index}")
    for name, (column, units, doc) in PEAKS.items():
        known = present and f"{prefix}/{column}" in result.rows
        if known or column == "total":
            padded(name, of_hits(column) if known else [row * 0 for row in fast], units, doc)


def _stamps(result: RunResult, rows: np.ndarray) -> np.ndarray:
    return np.asarray(result.rows["timestamp"], np.int64)[rows]


def _indices(result: RunResult, rows: np.ndarray) -> np.ndarray:
    return np.asarray(result.rows["index"], np.int64)[rows]


def _write_lcls(file: h5py.File, result: RunResult, rows: np.ndarray) -> None:
    """``/LCLS``.  machineTime keeps psana's own count, so machineTime << 32 | ns = timestamp."""
    stamps = _stamps(result, rows).astype(np.uint64)
    seconds = (stamps >> np.uint64(32)).astype(np.int64)
    nanoseconds = (stamps & np.uint64(0xFFFFFFFF)).astype(np.int64)
    psana2 = bool(len(rows)) and bool(np.all((seconds > 0) & (nanoseconds < 10**9)))
    group = file.create_group("LCLS")

    def per_hit(name: str, values: Any, units: str, doc: str, **more: Any) -> None:
        write_array(group, name, values, axes=HIT, units=units, doc=doc, **more)

    per_hit("eventNumber", _indices(result, rows), "", "position of the event in the run, from 0")
    per_hit("timestamp", stamps.astype(np.int64), "",
            "64-bit time stamp as psana2's evt.timestamp, or what the source has instead")
    per_hit("machineTime", seconds, "s",
            "upper 32 bits of the time stamp: for psana2 seconds since the LCLS-II epoch",
            epoch="1990-01-01T00:00:00Z", epoch_unix_s=LCLS2_EPOCH_UNIX_S)
    per_hit("machineTimeNanoSeconds", nanoseconds, "ns", "lower 32 bits of the time stamp")
    per_hit("unixTime", (seconds + LCLS2_EPOCH_UNIX_S + nanoseconds * 1e-9) if psana2
            else np.full(len(rows), np.nan), "s",
            "seconds since 1970-01-01 UTC; NaN where the time stamps of the source are no times")
    per_hit("fiducial", np.zeros(len(rows), np.int64), "",
            "always 0: psana2 events have no fiducial; use timestamp")
    energy = per_event(result, ("photon_energy_eV",))
    geometry = result.constants.geometry if result.constants else None
    energy = _or_else(energy, geometry.photon_energy_eV if geometry else None)
    per_hit("photon_energy_eV", energy[rows], "eV", "photon energy of the event; NaN = unknown")
    distance = 1e3 * per_event(result, ("distance_m", "detector_distance_m"))
    distance = _or_else(distance, geometry.distance_m * 1e3
                        if geometry and geometry.distance_m is not None else None)
    per_hit("detector_1/EncoderValue", distance[rows], "mm",
            "sample to detector distance (clen), not an offset; NaN = unknown")


def per_event(result: RunResult, names: Sequence[str]) -> np.ndarray:
    """The first scalar column of one of these names (in any group), else NaN; (N,) float64."""
    for name in names:
        for path in sorted(result.columns, key=lambda p: (p.count("/"), p)):
            column = result.columns[path]
            if path.rpartition("/")[2] == name and column.shape == () and path in result.rows:
                return np.array(result.rows[path], np.float64)
    return np.full(len(result), np.nan)


def _or_else(values: np.ndarray, fallback: float | None) -> np.ndarray:
    unknown = ~np.isfinite(values) | (values <= 0)
    return np.where(unknown, np.nan if fallback is None else fallback, values)


def _root_attributes(result: RunResult, hits: int, linked: bool) -> dict[str, Any]:
    run = result.run
    return {
        "format": FORMAT, "format_version": FORMAT_VERSION, "exp": run.exp, "run": run.run,
        "detector": run.detector, "detector_kind": run.detector_kind,
        "panel_shape": np.array(run.panel_shape, np.int64), "hits": hits,
        "summary": f"{result.stem}.h5", "pixels": "linked" if linked else "copied",
        "constants_identity": result.constants.identity if result.constants else None,
        "complete": result.attributes.get("complete"),
    }


def _require_space(directory: Path, name: str, needed_bytes: int) -> None:
    try:
        usage = shutil.disk_usage(directory)
    except OSError:
        return                      # opening the file will say what is wrong
    if usage.total and usage.free < needed_bytes:
        raise OutputFull(
            f"{directory / name} needs {needed_bytes / 1e9:.3g} GB for its frames, but only "
            f"{usage.free / 1e9:.3g} GB are free there. Free some space and run the same command "
            "with --resume, or set cxi.compression=\"bitshuffle-lz4\"; the events analysed so "
            "far are kept")
