"""Frames and powder patterns as a reader sees them: panels put together, peaks drawn.

Images show the detector as seen from behind, looking towards the source: x to the right, y up,
as the network's window does.  Axes: P panel, S slow, F fast, H row, W column.
"""
from __future__ import annotations

import base64
import logging
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ..config import build, builtin_names, loads, resolve
from ..core import ConfigurationError, Geometry, Shard, XfelClassifyError
from ..detectors import flat_geometry, read_geometry
from ..preprocess import calibrate
from .markup import Markup, svg, tag
from .report_figures import GAP
from .report_runs import ReportRun

__all__ = ["Assembly", "assembly", "drawing", "frames_of", "geometry_of", "png"]

log = logging.getLogger(__name__)

PEAK = "#d55e00"        # vermillion of the Okabe-Ito palette


# --- putting panels together -----------------------------------------------------------------

@dataclass(frozen=True)
class Assembly:
    """Where each pixel of (P, S, F) goes in a picture of ``shape_HW`` picture elements.

    Each element covers ``pool`` x ``pool`` detector pixels.  ``place_PSF`` is the flat position.
    ``extent_mm`` is (left, right, bottom, top) in the laboratory frame.
    """

    place_PSF: np.ndarray
    shape_HW: tuple[int, int]
    pool: int
    extent_mm: tuple[float, float, float, float]
    geometry: Geometry

    def image(self, values_PSF: np.ndarray) -> np.ndarray:
        """Largest value under each element, NaN in gaps: single bright pixels stay visible."""
        flat = np.full(self.shape_HW[0] * self.shape_HW[1], -np.inf, np.float32)
        np.maximum.at(flat, self.place_PSF.ravel(), np.asarray(values_PSF, np.float32).ravel())
        flat[~np.isfinite(flat)] = np.nan
        return flat.reshape(self.shape_HW)

    def positions(self, peaks_N3: np.ndarray) -> np.ndarray:
        """(n, 2) column, row in picture elements of (panel, fs, ss), 0 = its outer edge."""
        if not len(peaks_N3):
            return np.zeros((0, 2))
        panels, slow, fast = self.geometry.shape
        p = np.clip(np.rint(peaks_N3[:, 0]).astype(int), 0, panels - 1)
        f = np.clip(np.floor(peaks_N3[:, 1]).astype(int), 0, max(fast - 2, 0))
        s = np.clip(np.floor(peaks_N3[:, 2]).astype(int), 0, max(slow - 2, 0))
        f1, s1 = np.minimum(f + 1, fast - 1), np.minimum(s + 1, slow - 1)
        left, _, _, top = self.extent_mm
        step_mm = 1e3 * self.geometry.pixel_size_m * self.pool
        at = []
        for axis_PSF in (self.geometry.x_m_PSF, self.geometry.y_m_PSF):
            here = axis_PSF[p, s, f].astype(np.float64)
            at.append(1e3 * (here + (peaks_N3[:, 1] - f) * (axis_PSF[p, s, f1] - here)
                             + (peaks_N3[:, 2] - s) * (axis_PSF[p, s1, f] - here)))
        return np.stack([(at[0] - left) / step_mm, (top - at[1]) / step_mm], axis=1)


def assembly(geometry: Geometry, longest: int) -> Assembly:
    """A picture of the detector with at most about ``longest`` elements on its longer side."""
    pixel = geometry.pixel_size_m
    x_PSF, y_PSF = (a.astype(np.float64) / pixel for a in (geometry.x_m_PSF, geometry.y_m_PSF))
    left, top = x_PSF.min() - 0.5, y_PSF.max() + 0.5
    span = max(x_PSF.max() + 0.5 - left, top - y_PSF.min() + 0.5)
    pool = max(1, int(np.ceil(span / longest)))
    column, row = ((x_PSF - left) // pool).astype(int), ((top - y_PSF) // pool).astype(int)
    height, width = int(row.max()) + 1, int(column.max()) + 1
    scale = 1e3 * pixel
    extent = (left * scale, (left + width * pool) * scale, (top - height * pool) * scale,
              top * scale)
    return Assembly(row * width + column, (height, width), pool, extent, geometry)


def geometry_of(run: ReportRun, given: str | Path | None = None) -> tuple[Geometry, str]:
    """(geometry, a remark for the reader or "") of a run.

    ``given`` overrides the ``.geom`` beside the summary; without either, the panels are shown
    below each other and the remark says so.
    """
    shape = tuple(int(n) for n in run.attributes.get("panel_shape", ()))
    kind = str(run.attributes.get("detector_kind", ""))
    path = given or run.beside(".geom")
    if path is not None:
        return read_geometry(Path(path), shape, kind), ""
    if len(shape) != 3:
        raise ConfigurationError(f"{run.path} does not state the shape of its frames; no picture "
                                 "can be made of it; classify the run again")
    return flat_geometry((shape[0], shape[1], shape[2]), 1e-4), (
        "no geometry lies beside the summary: panels are shown below each other, with pixels of "
        "0.1 mm; give one with --geometry")


# --- pixels ------------------------------------------------------------------------------------

def frames_of(run: ReportRun, rows: Sequence[int], read_run: bool = True
              ) -> tuple[dict[int, np.ndarray], str]:
    """({row: calibrated (P, S, F) float32}, a remark or "") for some rows of a summary.

    Hits come from the CXI file beside the summary.  What is not in there is read from the run
    itself, by the source of the summary's configuration, when ``read_run``; a run that cannot
    be read any more is a remark, not an error.
    """
    frames, remark = _from_cxi(run, rows)
    missing = [row for row in rows if row not in frames]
    if missing and read_run:
        try:
            frames |= _from_source(run, missing)
        except (XfelClassifyError, OSError, KeyError) as error:
            remark = f"{remark} {error}".strip()
    lost = sum(row not in frames for row in rows)
    if not lost:
        return frames, ""
    reason = f": {remark}" if remark else ""
    return frames, f"the pixels of {lost} of {len(rows)} chosen frames could not be shown{reason}"


def _from_cxi(run: ReportRun, rows: Sequence[int]) -> tuple[dict[int, np.ndarray], str]:
    path = run.beside(".cxi")
    if path is None or not rows:
        return {}, ""
    shape = tuple(run.attributes.get("panel_shape", ()))
    found = {}
    try:
        with h5py.File(path) as file:
            stored = {int(event): i for i, event in enumerate(file["LCLS/eventNumber"][()])}
            for row in rows:
                position = stored.get(int(run.index_N[row]))
                if position is not None:
                    frame = file["entry_1/data_1/data"][position].astype(np.float32)
                    bad = file["entry_1/data_1/mask"][position] != 0
                    frame[bad | ~np.isfinite(frame)] = 0
                    found[row] = frame.reshape(shape)
    except (OSError, KeyError, ValueError) as error:
        return {}, f"{path.name} cannot be read ({error})"
    return found, ""


def _from_source(run: ReportRun, rows: Sequence[int]) -> dict[int, np.ndarray]:
    """Calibrated frames read from the run again; only sources of this package are opened."""
    text = str(run.attributes.get("configuration", ""))
    config = resolve(loads(text, f"the configuration in {run.path.name}"))
    use = str(config.source.get("use", ""))
    if use not in builtin_names("sources") or use.startswith("psana"):
        raise ConfigurationError(f"frames that are not in the CXI file are not read again from a "
                                 f"source {use!r}")
    wanted = {int(run.index_N[row]): row for row in rows}
    todo = np.array(sorted(wanted), np.int64)
    given = iter(range(len(todo)))

    def claim(n: int) -> range:
        first = next(given, None)
        return range(0) if first is None else range(first, first + 1)

    frames = {}
    with build("sources", config.source) as source:
        if source.run.exp != run.exp or source.run.run != run.number:
            raise ConfigurationError(f"the files hold {source.run.exp} run {source.run.run} now")
        constants = source.constants()
        stated = str(run.attributes.get("constants_identity", constants.identity))
        if constants.identity != stated:
            raise ConfigurationError("the constants of the run have changed since")
        for frame in source.frames(Shard(claim, todo)):
            if frame.raw_PSF is not None and frame.index in wanted:
                frames[wanted[frame.index]] = calibrate(frame.raw_PSF, constants)
    return frames


# --- drawing -----------------------------------------------------------------------------------

def png(grey_HW: np.ndarray, shown_HW: np.ndarray) -> bytes:
    """An 8-bit grey PNG; picture elements that are not shown are transparent."""
    height, width = grey_HW.shape
    pixels = np.stack([grey_HW, np.where(shown_HW, 255, 0)], axis=2).astype(np.uint8)
    lines = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], axis=1)

    def chunk(name: bytes, content: bytes) -> bytes:
        return (struct.pack(">I", len(content)) + name + content
                + struct.pack(">I", zlib.crc32(name + content)))

    header = struct.pack(">IIBBBBB", width, height, 8, 4, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
            + chunk(b"IDAT", zlib.compress(lines.tobytes(), 6)) + chunk(b"IEND", b""))


def grey(image_HW: np.ndarray, low: float, high: float) -> np.ndarray:
    """Inverted grey values by the square root: ``low`` and less white, ``high`` and more black."""
    share = np.clip((np.nan_to_num(image_HW, nan=low) - low) / max(high - low, 1e-12), 0, 1)
    return np.rint(255 * (1 - np.sqrt(share))).astype(np.uint8)


def common_range(images: Mapping[int, np.ndarray]) -> tuple[float, float]:
    """Grey range for pictures to be compared: the median of all, and bright spots of the middle
    picture."""
    if not images:
        return 0.0, 1.0
    low = float(np.median([np.nanmedian(image) for image in images.values()]))
    high = float(np.median([np.nanpercentile(image, 99.8) for image in images.values()]))
    return low, max(high, low + 1e-6)


def drawing(image_HW: np.ndarray | None, peaks_N2: np.ndarray, shape_HW: tuple[int, int],
            value_range: tuple[float, float], label: str) -> Markup:
    """An inline SVG of one frame with a circle around every peak; only circles without pixels."""
    height, width = shape_HW
    picture = [tag("rect", width=width, height=height, fill=GAP)]
    if image_HW is not None:
        encoded = base64.b64encode(png(grey(image_HW, *value_range), np.isfinite(image_HW)))
        picture.append(tag("image", width=width, height=height,
                           href=f"data:image/png;base64,{encoded.decode()}"))
    radius = max(width, height) / 70
    circles = [tag("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=f"{radius:.1f}")
               for x, y in peaks_N2]
    drawn = tag("g", *circles, fill="none", stroke=PEAK, stroke_width=f"{radius / 4:.2f}")
    return svg(width, height, picture, drawn, label=label, class_="frame")


def spread(rows: np.ndarray, count: int) -> Iterator[int]:
    """At most ``count`` of ``rows``, evenly spread, first and last among them."""
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int))
    yield from (int(rows[i]) for i in chosen) if len(rows) else ()


def pictures(frames: Mapping[int, np.ndarray], place: Assembly) -> dict[int, Any]:
    """{row: assembled (H, W) picture}."""
    return {row: place.image(frame) for row, frame in frames.items()}
