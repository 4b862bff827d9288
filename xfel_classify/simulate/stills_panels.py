"""Panels of real detectors under a still: gaps and tilt, and what differs from panel to panel.

A layout is "kind:panels" of a geometry that the package ships ("jungfrau:8"), or the path of a
psana ``.data`` or CrystFEL ``.geom`` file.  Its panels are laid on the regular grid of a still; the
geometry's own bad regions are bad there too.

Axes: S along |y|, F along |x| of a quadrant as the beam sees it (beam at (0, 0)); N spots.
Lab frame: z along the beam, y up.
"""
from __future__ import annotations

import functools
from pathlib import Path

import numpy as np

from ..core import ConfigurationError, Geometry
from ..detectors import default_geometry, detector, read_geometry

__all__ = ["LAYOUTS", "layout_geometry", "layout_pools", "on_tilted", "panel_map", "seen_from",
           "streak", "streak_shape", "tilt_axes"]

LAYOUTS = ("jungfrau:8", "jungfrau:2", "epix10ka:16", "cspad:32")
SIDE_PX = 512
LEAST_REACH = 0.75      # of a quadrant that a detector fills, for a pooling to make sense


@functools.lru_cache(maxsize=16)
def layout_geometry(layout: str) -> Geometry:
    """The geometry that ``layout`` means.  Raises :class:`GeometryError` where there is none."""
    kind, _, count = layout.rpartition(":")
    if count.isdigit() and kind and "/" not in kind:
        return default_geometry(detector(kind), int(count))
    return read_geometry(Path(layout))


def layout_pools(layout: str) -> tuple[int, ...]:
    """Poolings 1, 2, 4 at which the detector fills most of each quadrant of 512 pixels.

    Raises :class:`ConfigurationError` for a detector too small for any.
    """
    geometry = layout_geometry(layout)
    reach = min(float(side) for axis in (geometry.x_m_PSF, geometry.y_m_PSF)
                for side in (-axis.min(), axis.max())) / geometry.pixel_size_m
    pools = tuple(pool for pool in (1, 2, 4) if reach >= LEAST_REACH * SIDE_PX * pool)
    if not pools:
        raise ConfigurationError(
            f"stills on the geometry {layout} were asked for; on one side it reaches "
            f"{reach:.0f} pixels from the beam, a quadrant has {SIDE_PX}; give the geometry of a "
            "larger detector, with the beam on it")
    return pools


@functools.lru_cache(maxsize=12)
def panel_map(layout: str, signs: tuple[int, int], side_px: int,
              shift_m: tuple[float, float]) -> np.ndarray:
    """int16 (side, side): number of the panel under each pixel of a quadrant, -1 = none.

    ``signs`` are of x and y in the quadrant; the detector is moved by ``shift_m`` against the
    beam.  A pixel belongs to the panel that its centre lies on.
    """
    geometry = layout_geometry(layout)
    p = geometry.pixel_size_m
    found = np.full((side_px, side_px), -1, np.int16)
    for number, panel in enumerate(geometry.panels):
        corner = np.array(panel.corner_m[:2]) + shift_m
        fs, ss = np.array(panel.fs_m[:2]), np.array(panel.ss_m[:2])
        width, height = panel.max_fs - panel.min_fs + 1, panel.max_ss - panel.min_ss + 1
        outline = np.array([corner + a * width * fs + b * height * ss
                            for a in (0, 1) for b in (0, 1)]) * signs / p
        low = np.maximum(np.floor(outline.min(axis=0) - 1), 0).astype(int)
        high = np.minimum(np.ceil(outline.max(axis=0) + 1), side_px).astype(int)
        if (low >= high).any():
            continue
        x = signs[0] * (np.arange(low[0], high[0]) + 0.5) * p - corner[0]
        y = signs[1] * (np.arange(low[1], high[1]) + 0.5) * p - corner[1]
        inverse = np.linalg.inv(np.stack([fs, ss], axis=1))
        f = np.floor(inverse[0, 0] * x[None, :] + inverse[0, 1] * y[:, None]).astype(int)
        s = np.floor(inverse[1, 0] * x[None, :] + inverse[1, 1] * y[:, None]).astype(int)
        inside = (f >= 0) & (f < width) & (s >= 0) & (s < height)
        if geometry.bad_PSF is not None:
            inside[inside] &= ~geometry.bad_PSF[panel.index, s[inside] + panel.min_ss,
                                                f[inside] + panel.min_fs]
        part = found[low[1]:high[1], low[0]:high[0]]
        part[inside] = number
    return found


# --- tilt ------------------------------------------------------------------------------------

def tilt_axes(tilt_deg: tuple[float, float]) -> np.ndarray:
    """Columns: the detector's x and y axis and its normal, turned about x, then about y."""
    a, b = np.deg2rad(tilt_deg)
    about_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    about_y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    return about_y @ about_x


def on_tilted(tilt_deg: tuple[float, float], distance_m: float, x_m: np.ndarray,
              y_m: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where rays that would meet an upright detector at (x, y) meet a tilted one, in its axes."""
    axes = tilt_axes(tilt_deg)
    normal = axes[:, 2]
    stretch = distance_m * normal[2] / (normal[0] * x_m + normal[1] * y_m
                                        + normal[2] * distance_m)
    at = np.stack([stretch * x_m, stretch * y_m, distance_m * (stretch - 1)])
    return axes[:, 0] @ at, axes[:, 1] @ at


def seen_from(tilt_deg: tuple[float, float], distance_m: float, u_m: np.ndarray,
              v_m: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where an upright detector would have what lies at (u, v) of a tilted one."""
    axes = tilt_axes(tilt_deg)
    x, y, z = (axes[i, 0] * u_m + axes[i, 1] * v_m for i in range(3))
    stretch = distance_m / (distance_m + z)
    return stretch * x, stretch * y


# --- the jet --------------------------------------------------------------------------------

def streak_shape(rng: np.random.Generator) -> tuple[float, float, float]:
    """A draw of (angle against x in radians, reach along it, width) of a streak, in pixels."""
    angle = rng.normal(0, 0.2) + (np.pi / 2 if rng.random() < 0.5 else 0)
    return angle, rng.uniform(15, 80), rng.uniform(1.0, 4.0)


def streak(rng: np.random.Generator, photons: float, signs: tuple[int, int],
           side_px: int) -> np.ndarray:
    """A streak of the jet through the beam, float32 (side, side): a line that falls off."""
    angle, reach, width = streak_shape(rng)
    step = np.arange(side_px, dtype=np.float32) + np.float32(0.5)
    x, y = signs[0] * step[None, :], signs[1] * step[:, None]
    across = x * np.float32(np.sin(angle)) - y * np.float32(np.cos(angle))
    along = x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle))
    return np.float32(photons) * np.exp(-np.abs(along) / np.float32(reach)
                                        - 0.5 * (across / np.float32(width)) ** 2)
