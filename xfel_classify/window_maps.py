"""Which detector pixel goes where in a window: maps made once per run for ``preprocess``.

Pure functions of pixel positions; nothing here looks at a frame.  Positions are in detector pixels
in the window's own frame: row and column 0 are its upper and left edges.

P panel, S slow axis, F fast axis, H window row, W window column.
"""
from __future__ import annotations

import numpy as np

from .core import ConfigurationError, Window

__all__ = ["NORMALIZE", "TIE_PX", "check_window", "covering_pixels", "segments", "strips",
           "window_axes"]

TIE_PX = 1 / 256
"""Sampling points lie this far off window pixel centres, so that rounding noise of positions
(float32: about 1e-4 pixel) cannot decide which of two equally near pixels is taken."""

NORMALIZE = ("none", "clip", "sqrt_floor", "standardize")
POOL_BY = ("max", "mean")

# Window row and column as (detector axis, sign): x to the right and y up as seen in the window.
# Quadrants are turned so that the beam is at their pixel (0, 0): rot90 by 2, 3, 1, 0.
_AXES = {"": (("y", -1), ("x", 1)), "A": (("y", 1), ("x", -1)), "B": (("x", 1), ("y", 1)),
         "C": (("x", -1), ("y", -1)), "D": (("y", -1), ("x", 1))}


def window_axes(window: Window) -> tuple[tuple[str, int, float], tuple[str, int, float]]:
    """(axis, sign, shift in detector pixels) of window rows and columns."""
    quadrant = window.kind == "quadrant"
    (row, row_sign), (column, column_sign) = _AXES[window.quadrant if quadrant else ""]
    half = 0.0 if quadrant else window.pool / 2
    return (row, row_sign, window.height * half), (column, column_sign, window.width * half)


def check_window(window: Window) -> None:
    """Raises :class:`ConfigurationError` for a window no frame can fill."""
    wrong = ""
    if window.kind not in ("crop", "downsample", "quadrant"):
        wrong = f"kind {window.kind!r} is none of crop, downsample, quadrant"
    elif window.normalize not in NORMALIZE:
        wrong = f"normalize {window.normalize!r} is none of {', '.join(NORMALIZE)}"
    elif window.kind == "quadrant" and window.quadrant not in _AXES:
        wrong = f"quadrant {window.quadrant!r} is none of A, B, C, D"
    elif window.pool_by not in POOL_BY:
        wrong = f"pool_by {window.pool_by!r} is none of {', '.join(POOL_BY)}"
    elif min(window.height, window.width, window.pool) < 1:
        wrong = f"height, width and pool are {window.height}, {window.width}, {window.pool}"
    elif window.normalize in ("clip", "sqrt_floor") and not window.clip > 0:
        wrong = f"clip is {window.clip}"
    if wrong:
        raise ConfigurationError(f"a window was to be planned; {wrong}; correct the model's card")


def covering_pixels(row: np.ndarray, column: np.ndarray, shape: tuple[int, int],
                    placed: np.ndarray) -> np.ndarray:
    """int64 (H, W): the pixel that covers the sampling point of each window pixel, or -1."""
    height, width = shape
    steps = [_steps(row, column, axis) for axis in (1, 2)]
    near = placed & (row > -1) & (row < height + 1) & (column > -1) & (column < width + 1)
    pixel = np.flatnonzero(near)
    r, c = row.ravel()[pixel], column.ravel()[pixel]
    ss, fs = (np.stack([v.ravel()[pixel] for v in step]) for step in steps)
    area = ss[0] * fs[1] - ss[1] * fs[0]
    area[area == 0] = np.nan            # pixels on one spot cover nothing
    best = np.full(height * width, np.iinfo(np.int64).max)
    for up in (0, 1):
        for left in (0, 1):
            at_r, at_c = np.floor(r - 0.5) + up, np.floor(c - 0.5) + left
            dr, dc = at_r + 0.5 + TIE_PX - r, at_c + 0.5 + TIE_PX - c
            along_s = (dr * fs[1] - dc * fs[0]) / area
            along_f = (ss[0] * dc - ss[1] * dr) / area
            half = 0.5 + 0.25 * TIE_PX
            covers = ((np.abs(along_s) <= half) & (np.abs(along_f) <= half)
                      & (at_r >= 0) & (at_r < height) & (at_c >= 0) & (at_c < width))
            distance = ((dr * dr + dc * dc)[covers] * 2**24).astype(np.int64)
            cell = (at_r * width + at_c)[covers].astype(np.int64)
            np.minimum.at(best, cell, distance << 36 | pixel[covers])
    found = best != np.iinfo(np.int64).max
    return np.where(found, best & (1 << 36) - 1, -1).reshape(shape)


def _steps(row: np.ndarray, column: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Step to the nearer neighbour along an axis, as (rows, columns) per pixel.

    Steps longer than usual (wide pixels at ASIC borders) are cut to the usual length.
    """
    n = row.shape[axis]
    if n == 1:                  # no neighbour: at right angles to the other axis
        if row.shape[3 - axis] == 1:
            return np.full(row.shape, 2.0 - axis), np.full(row.shape, axis - 1.0)
        other = _steps(row, column, 3 - axis)
        return other[1], -other[0]
    d = np.stack([np.diff(row, axis=axis), np.diff(column, axis=axis)])
    ahead = np.concatenate([d, np.take(d, [-1], axis=axis + 1)], axis=axis + 1)
    behind = np.concatenate([np.take(d, [0], axis=axis + 1), d], axis=axis + 1)
    step = np.where(np.hypot(*ahead) <= np.hypot(*behind), ahead, behind)
    length = np.maximum(np.hypot(*step), 1e-9)
    step *= np.minimum(1.0, max(1.0, float(np.median(length))) / length)
    return step[0], step[1]


def strips(target_PSF: np.ndarray) -> dict[str, np.ndarray]:
    """Row by row, where pixels go: runs of equal target, and strips of evenly spaced runs.

    ``strips`` is int32 (n, 5): first column, number of runs, pixels per run, first target, step;
    ``row_strips`` (rows + 1) delimits those of a row; ``repeats`` marks rows whose targets are
    those of the row before, which the kernel reduces together.
    """
    f = target_PSF.shape[-1]
    rows = target_PSF.reshape(-1, f)
    new_run = np.ones(rows.shape, bool)
    new_run[:, 1:] = rows[:, 1:] != rows[:, :-1]
    start = np.flatnonzero(new_run)
    length = np.diff(np.append(start, rows.size))
    target = rows.ravel()[start]
    start, length, target = (v[target >= 0].astype(np.int64) for v in (start, length, target))
    repeats = np.zeros(len(rows), np.uint8)
    repeats[1:] = (rows[1:] == rows[:-1]).all(axis=1)
    joined = ((start[1:] == start[:-1] + length[:-1]) & (length[1:] == length[:-1])
              & (start[1:] // f == start[:-1] // f))
    step = np.diff(target)
    first = np.ones(len(start), bool)
    first[1:] = ~joined
    first[2:] |= joined[:-1] & (step[1:] != step[:-1])
    at = np.flatnonzero(first)
    runs = np.diff(np.append(at, len(start)))
    strips = np.stack([start[at] % f, runs, length[at], target[at],
                       np.where(runs > 1, np.append(step, 0)[at], 0)] if len(at) else
                      [np.zeros(0, np.int64)] * 5, axis=1)
    row_strips = np.searchsorted(start[at] // f, np.arange(len(rows) + 1))
    return {"strips": np.ascontiguousarray(strips, np.int32),
            "row_strips": row_strips.astype(np.int64), "repeats": repeats}


def segments(index_HW: np.ndarray) -> np.ndarray | None:
    """Pieces of window rows or columns whose pixels lie side by side in the frame.

    int32 (n, 4): window pixel, step to the next one (1, or W along columns), frame pixel, length
    (negative: backwards).  None where pieces are short (tilted panels): gathering is better then.
    """
    height, width = index_HW.shape
    rows = _pieces(index_HW.ravel(), width * height + 1)
    columns = _pieces(np.ascontiguousarray(index_HW.T).ravel(), height)
    best = min(rows, columns, key=len)
    if not len(best) or np.abs(best[:, 2]).mean() < 8:
        return None
    step = np.ones(len(best), np.int64)
    if best is columns:
        column, row = np.divmod(best[:, 0], height)
        best[:, 0], step = row * width + column, step * width
    return np.ascontiguousarray(np.insert(best, 1, step, axis=1), np.int32)


def _pieces(index: np.ndarray, line: int) -> np.ndarray:
    """int64 (n, 3): start, frame pixel, signed length of the pieces; cut every ``line`` pixels."""
    step = np.diff(index, prepend=index[:1] - 2)
    beside = (np.abs(step) == 1) & (index >= 0) & (np.roll(index, 1) >= 0)
    turned = beside & np.roll(beside, 1) & (step != np.roll(step, 1))
    begins = (index >= 0) & (~beside | turned | (np.arange(len(index)) % line == 0))
    at = np.flatnonzero(begins)
    ends = np.append(np.flatnonzero(begins | (index < 0)), len(index))
    length = ends[np.searchsorted(ends, at) + 1] - at
    after = index[np.minimum(at + 1, len(index) - 1)]
    backwards = (length > 1) & (after < index[at])
    return np.stack([at, index[at], np.where(backwards, -length, length)], axis=1)
