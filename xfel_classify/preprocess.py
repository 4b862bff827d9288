"""From a raw frame to what an analysis looks at: calibration, common mode, windows.

Pure functions over arrays.  Each has a numpy reference beside the compiled path, and the laws
between them are tests: fused == reference, bit for bit, and
``render(raw) == window(calibrate(raw))``.

P panel, S slow axis, F fast axis, G gain stage, H window row, W window column.

Windows show the detector as seen against the beam direction, from behind: column grows with x,
row grows with -y (row 0 on top), the beam at the middle for "crop" and "downsample".  At pixel
resolution every window pixel takes the detector pixel that covers its centre.  With a pooling
factor f every detector pixel goes to the one window pixel (f x f detector pixels) that contains its
centre.  The largest value wins, so that one-pixel spots survive whatever the tilt of the panel, or,
with ``pool_by = "mean"``, the good pixels are averaged.

**Masked pixels** (``constants.good_PSF`` False) never influence anything.  A pixel whose value is
not finite counts as masked in its frame.
"""
from __future__ import annotations

import importlib
import logging
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np

from .core import ConfigurationError, Constants, ConstantsError, EventError, EventStatus, Window
from .window_maps import (
    NORMALIZE,
    TIE_PX,
    check_window,
    covering_pixels,
    segments,
    strips,
    window_axes,
)

try:
    _native: Any = importlib.import_module(".native.calibrate", __package__)
    _native_common: Any = importlib.import_module(".native.common_mode", __package__)
except ImportError:             # a checkout that was never built
    _native = _native_common = None

__all__ = [
    "RenderPlan", "calibrate", "calibrate_reference", "common_mode", "common_mode_reference",
    "image_window", "plan_render", "render", "window",
]

log = logging.getLogger(__name__)

_NATIVE_DTYPES = ("uint8", "uint16", "int16", "int32", "uint32", "float32", "float64")


def compiled() -> bool:
    """True when the compiled paths are there; without them the references serve."""
    return _native is not None


# --- calibration ----------------------------------------------------------------------------------

@dataclass(frozen=True)
class _Stage0:
    """Pedestal + offset and 1/gain of stage 0, both 0 where bad; and all stages, contiguous."""

    pedestal_PSF: np.ndarray
    factor_PSF: np.ndarray
    good_PSF: np.ndarray
    stages: tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]

    def barred(self) -> tuple[np.ndarray, np.ndarray]:
        """Tables by which a bad pixel becomes -inf, the neutral element of max-pooling."""
        return (np.where(self.good_PSF, self.pedestal_PSF, np.float32(np.inf)),
                np.where(self.good_PSF, self.factor_PSF, np.float32(1)))


_prepared: dict[int, tuple[weakref.ref[Constants], _Stage0]] = {}


def _stage0(constants: Constants) -> _Stage0:
    """Tables of stage 0, made once per :class:`Constants` object."""
    key = id(constants)
    kept = _prepared.get(key)
    if kept is not None and kept[0]() is constants:
        return kept[1]
    good = np.ascontiguousarray(constants.good_PSF, bool)
    if constants.calibrated:
        pedestal, factor = np.zeros(good.shape, np.float32), good.astype(np.float32)
    else:
        pedestal, factor = _pedestal(constants, 0), _factor(constants, 0)
        pedestal = np.where(good, pedestal, np.float32(0))
        factor = np.where(good, factor, np.float32(0))
    tables = _Stage0(pedestal, factor, good, (
        _float32(constants.pedestals_GPSF), _float32(constants.gain_GPSF),
        _float32(constants.offset_GPSF)))
    _prepared[key] = (weakref.ref(constants, lambda _: _prepared.pop(key, None)), tables)
    return tables


def _float32(array: np.ndarray | None) -> np.ndarray | None:
    return None if array is None else np.ascontiguousarray(array, np.float32)


def _pedestal(constants: Constants, g: int) -> np.ndarray:
    assert constants.pedestals_GPSF is not None
    pedestal = constants.pedestals_GPSF[g].astype(np.float32, copy=False)
    return pedestal if constants.offset_GPSF is None else pedestal + constants.offset_GPSF[g]


def _factor(constants: Constants, g: int) -> np.ndarray:
    assert constants.gain_GPSF is not None
    with np.errstate(divide="ignore"):
        return np.float32(1) / constants.gain_GPSF[g].astype(np.float32, copy=False)


def _stages(words: np.ndarray, gain_bits: str) -> tuple[np.ndarray, list[np.ndarray]]:
    """14-bit values and one mask per gain stage; words in no stage are in no mask."""
    if gain_bits == "top2":
        return words & 0x3FFF, [words >> 14 == code for code in (0, 1, 3)]
    if gain_bits == "bit14":
        return words & 0x3FFF, [words >> 14 & 1 == code for code in (0, 1)]
    return words, [np.ones(words.shape, bool)]


def _raw(raw_PSF: np.ndarray, shape: tuple[int, int, int], gain_bits: str) -> np.ndarray:
    """The frame as a contiguous array of a type the kernels know."""
    if raw_PSF.shape != shape:
        raise EventError(
            EventStatus.WRONG_SHAPE,
            f"a frame of shape {shape} was expected from the run's constants; it has "
            f"{raw_PSF.shape}; panels are missing, or the constants are another detector's")
    if gain_bits != "none" and raw_PSF.dtype != np.uint16:
        if not np.issubdtype(raw_PSF.dtype, np.integer):
            raise ConstantsError(
                f"raw words with gain bits ({gain_bits}) were expected; the frame is "
                f"{raw_PSF.dtype}; for calibrated frames give no constants")
        raw_PSF = raw_PSF.astype(np.uint16)
    if raw_PSF.dtype.name not in _NATIVE_DTYPES or not raw_PSF.dtype.isnative:
        name = raw_PSF.dtype.name
        raw_PSF = raw_PSF.astype(name if name in _NATIVE_DTYPES else np.float64)
    return np.ascontiguousarray(raw_PSF)


def calibrate(raw_PSF: np.ndarray, constants: Constants, out: np.ndarray | None = None
              ) -> np.ndarray:
    """Calibrated frame, float32 (P, S, F) in ``constants.unit``; bad and non-finite pixels are 0.

    ``((word & 0x3fff) - (pedestal[g] + offset[g])) * (1 / gain[g])`` in float32, with the gain
    stage g of each word: bit-equal to psana 4.3.4's ``det.raw.calib`` for Jungfrau on good pixels.
    A word in no stage (Jungfrau bits 10) gives 0.  For ``constants.calibrated`` the frame is cast.
    ``out`` (float32, contiguous) is filled and returned when given.

    Raises :class:`EventError` (WRONG_SHAPE), :class:`ConstantsError` (floats with gain bits).
    """
    raw_PSF = _raw(raw_PSF, constants.shape, constants.gain_bits)
    if _native is None:
        return _into(out, calibrate_reference(raw_PSF, constants))
    if out is None:
        out = np.empty(raw_PSF.shape, np.float32)
    tables = _stage0(constants)
    _native.calibrate(raw_PSF, tables.pedestal_PSF, tables.factor_PSF, *tables.stages,
                      constants.gain_bits, out)
    return out


def calibrate_reference(raw_PSF: np.ndarray, constants: Constants) -> np.ndarray:
    """What :func:`calibrate` computes, in plain numpy."""
    if constants.calibrated:
        with np.errstate(over="ignore"):
            values = raw_PSF.astype(np.float32)
    else:
        values = np.zeros(raw_PSF.shape, np.float32)
        words, stages = _stages(raw_PSF, constants.gain_bits)
        with np.errstate(over="ignore", invalid="ignore"):
            for g, chosen in enumerate(stages):
                value = (words.astype(np.float32) - _pedestal(constants, g)) * _factor(constants, g)
                values = np.where(chosen, value, values)
    return np.where(constants.good_PSF & np.isfinite(values), values, np.float32(0))


def _into(out: np.ndarray | None, values: np.ndarray) -> np.ndarray:
    if out is None:
        return values
    out[...] = values
    return out


# --- common mode ----------------------------------------------------------------------------------

def common_mode(calibrated_PSF: np.ndarray, good_PSF: np.ndarray,
                kinds: tuple[str, ...] = ("banks", "rows", "columns"),
                bank_shape: tuple[int, int] | None = None, *, limit: float = np.inf,
                minimum: int = 10) -> np.ndarray:
    """Subtract medians of good pixels in place, in the order of ``kinds``; returns its argument.

    ``bank_shape`` (S, F) cuts each panel into banks (None: the panel).  "banks" subtracts the
    median of each bank, "rows" of each row of each bank, "columns" of each column of each bank.
    A median is subtracted from the good pixels it was made of, if there are at least ``minimum`` of
    them and it is below ``limit`` in size.  Medians are exact; of an even number of values it is
    the mean of the middle two.  Give as ``good_PSF`` only pixels whose common mode is comparable
    (psana takes those in gain stage 0).

    Raises :class:`ConfigurationError` for unknown kinds or banks that do not tile the panel.
    """
    rows, columns = _check_common(calibrated_PSF, good_PSF, kinds, bank_shape)
    if _native_common is None:
        return common_mode_reference(calibrated_PSF, good_PSF, kinds, bank_shape, limit=limit,
                                     minimum=minimum)
    _native_common.subtract(calibrated_PSF, np.ascontiguousarray(good_PSF, bool), list(kinds), rows,
                            columns, float(limit), int(minimum))
    return calibrated_PSF


def common_mode_reference(calibrated_PSF: np.ndarray, good_PSF: np.ndarray,
                          kinds: tuple[str, ...] = ("banks", "rows", "columns"),
                          bank_shape: tuple[int, int] | None = None, *, limit: float = np.inf,
                          minimum: int = 10) -> np.ndarray:
    """What :func:`common_mode` computes, in plain numpy."""
    rows, columns = _check_common(calibrated_PSF, good_PSF, kinds, bank_shape)
    p, s, f = calibrated_PSF.shape
    tiled = (p, s // rows, rows, f // columns, columns)
    values, good = calibrated_PSF.reshape(tiled), good_PSF.reshape(tiled)
    axes = {"banks": (2, 4), "rows": (4,), "columns": (2,)}
    for kind in kinds:
        used = good & np.isfinite(values)
        flat = np.moveaxis(values, axes[kind], range(5 - len(axes[kind]), 5))
        chosen = np.moveaxis(used, axes[kind], range(5 - len(axes[kind]), 5))
        lead = flat.shape[:5 - len(axes[kind])]
        pairs = zip(flat.reshape(-1, int(np.prod(flat.shape[len(lead):]))),
                    chosen.reshape(-1, int(np.prod(flat.shape[len(lead):]))), strict=True)
        median = np.array([np.median(v[m]) if m.sum() >= max(minimum, 1) else 0.0
                           for v, m in pairs], np.float32)
        median = np.where(np.abs(median) < limit, median, np.float32(0)).reshape(lead)
        shift = np.expand_dims(median, axes[kind])
        values[...] = np.where(used, values - shift, values)
    return calibrated_PSF


def _check_common(calibrated_PSF: np.ndarray, good_PSF: np.ndarray, kinds: tuple[str, ...],
                  bank_shape: tuple[int, int] | None) -> tuple[int, int]:
    rows, columns = bank_shape or calibrated_PSF.shape[1:]
    unknown = [kind for kind in kinds if kind not in ("banks", "rows", "columns")]
    if unknown:
        raise ConfigurationError(f"common mode of {unknown[0]!r} was asked for; there are banks, "
                                 "rows and columns; use any of these")
    if calibrated_PSF.shape != good_PSF.shape or calibrated_PSF.dtype != np.float32 \
            or not calibrated_PSF.flags.c_contiguous:
        raise ConfigurationError(
            "common mode works on a contiguous float32 frame and its mask; found "
            f"{calibrated_PSF.dtype} {calibrated_PSF.shape} and {good_PSF.shape}; calibrate first")
    if rows < 1 or columns < 1 or calibrated_PSF.shape[1] % rows \
            or calibrated_PSF.shape[2] % columns:
        raise ConfigurationError(
            f"banks of {bank_shape} were asked for; panels are {calibrated_PSF.shape[1:]}; choose "
            "a bank shape that divides the panel")
    return rows, columns


# --- windows --------------------------------------------------------------------------------------

@dataclass(frozen=True)
class RenderPlan:
    """How a window is filled from a frame of ``shape``; made once per run by :func:`plan_render`.

    At pixel resolution ``index_HW`` (int32) is the place of the pixel in ``raw.ravel()``, -1 in
    gaps and where masked, and ``pedestal_HW``, ``factor_HW``, ``pedestals_GHW`` (with offset) and
    ``gains_GHW`` are the constants there.  With pooling, ``target_PSF`` (int32) is the place of
    each detector pixel in the window, or -1.  ``good_HW`` is True where any good pixel lies.
    ``panels`` are the only panels that are looked at.
    """

    window: Window
    shape: tuple[int, int, int]
    gain_bits: str
    good_HW: np.ndarray
    panels: tuple[int, ...]
    good_PSF: np.ndarray
    index_HW: np.ndarray | None = None
    pedestal_HW: np.ndarray | None = None
    factor_HW: np.ndarray | None = None
    pedestals_GHW: np.ndarray | None = None
    gains_GHW: np.ndarray | None = None
    segments: np.ndarray | None = None
    target_PSF: np.ndarray | None = None
    pooling: dict[str, Any] | None = None


def plan_render(constants: Constants, window: Window) -> RenderPlan:
    """Find the detector pixels of a window, and gather their constants.

    Raises :class:`ConfigurationError` for a window no frame can fill.
    """
    check_window(window)
    good = np.ascontiguousarray(constants.good_PSF, bool)
    geometry = constants.geometry
    placed = np.ones(good.shape, bool) if geometry.bad_PSF is None else ~geometry.bad_PSF
    row, column = _window_position(constants, window)
    if window.pool > 1:
        return _plan_pooled(constants, window, row, column, good, placed)
    index = covering_pixels(row, column, window.shape, placed)
    index[index >= 0] = np.where(good.ravel()[index[index >= 0]], index[index >= 0], -1)
    inside = index >= 0
    there = np.where(inside, index, 0)
    tables = _stage0(constants)
    more: dict[str, Any] = {}
    if constants.pedestals_GPSF is not None and len(constants.pedestals_GPSF) > 1:
        assert constants.gain_GPSF is not None
        g = len(constants.pedestals_GPSF)
        more = {"pedestals_GHW": np.stack([_pedestal(constants, i).ravel()[there]
                                           for i in range(g)]),
                "gains_GHW": np.stack([gain.astype(np.float32, copy=False).ravel()[there]
                                       for gain in constants.gain_GPSF])}
    per_panel = good.shape[1] * good.shape[2]
    return RenderPlan(
        window=window, shape=constants.shape, gain_bits=constants.gain_bits, good_HW=inside,
        panels=tuple(int(p) for p in np.unique(index[inside] // per_panel)),
        good_PSF=good, index_HW=index.astype(np.int32),
        pedestal_HW=np.where(inside, tables.pedestal_PSF.ravel()[there], np.float32(0)),
        factor_HW=np.where(inside, tables.factor_PSF.ravel()[there], np.float32(0)),
        segments=segments(index), **more)


def _window_position(constants: Constants, window: Window) -> tuple[np.ndarray, np.ndarray]:
    """Window row and column of every pixel centre, in detector pixels, float64 (P, S, F)."""
    geometry = constants.geometry
    metres = {"x": geometry.x_m_PSF, "y": geometry.y_m_PSF}
    row, column = (sign * (metres[axis].astype(np.float64) / geometry.pixel_size_m) + shift
                   for axis, sign, shift in window_axes(window))
    return row, column


def _plan_pooled(constants: Constants, window: Window, row: np.ndarray, column: np.ndarray,
                 good: np.ndarray, placed: np.ndarray) -> RenderPlan:
    height, width = window.shape
    r = np.floor((row - TIE_PX) / window.pool)
    c = np.floor((column - TIE_PX) / window.pool)
    inside = placed & (r >= 0) & (r < height) & (c >= 0) & (c < width)
    target = np.where(inside, r * width + c, -1).astype(np.int32)
    used = inside & good
    good_HW = np.zeros(height * width, bool)
    good_HW[target[used]] = True
    pedestal, factor = _stage0(constants).barred()
    pooling: dict[str, Any] = {"pedestal_PSF": pedestal, "factor_PSF": factor,
                               "constants": constants, **strips(target)}
    return RenderPlan(
        window=window, shape=constants.shape, gain_bits=constants.gain_bits,
        good_HW=good_HW.reshape(height, width),
        panels=tuple(int(p) for p in np.flatnonzero(used.any(axis=(1, 2)))),
        good_PSF=good, target_PSF=target, pooling=pooling)


def render(raw_PSF: np.ndarray, plan: RenderPlan, out_HW: np.ndarray, scale: float = 1.0) -> None:
    """Fill ``out_HW`` (float32, a batch slot) with the window of a raw frame, in one pass.

    Only the pixels of the window are read, calibrated, multiplied by ``scale`` (> 0, for example
    1 / photon energy in keV), pooled and normalized.  Equal bit for bit to
    ``window(calibrate(raw), plan, scale)`` as long as all pixels are finite.

    Raises :class:`EventError` (WRONG_SHAPE).
    """
    raw_PSF = _raw(raw_PSF, plan.shape, plan.gain_bits)
    if _native is None or plan.window.normalize == "standardize" and raw_PSF.dtype.kind == "f":
        out_HW[...] = _render_reference(raw_PSF, plan, scale)
        return
    mode = NORMALIZE.index(plan.window.normalize)
    clip, mode = float(plan.window.clip), 0 if mode == 3 else mode
    filled = out_HW if out_HW.flags.c_contiguous else np.empty(out_HW.shape, np.float32)
    if plan.pooling is None:
        _native.render(raw_PSF, plan.index_HW, plan.segments, plan.pedestal_HW,
                       plan.factor_HW, plan.pedestals_GHW, plan.gains_GHW, plan.gain_bits,
                       float(scale), mode, clip, filled)
    else:
        steps, constants = plan.pooling, plan.pooling["constants"]
        pool = _native.pool_mean if plan.window.pool_by == "mean" else _native.pool
        pool(raw_PSF, steps["pedestal_PSF"], steps["factor_PSF"], *_stage0(constants).stages,
             plan.gain_bits, steps["strips"], steps["row_strips"], steps["repeats"], float(scale),
             mode, clip, filled)
    if plan.window.normalize == "standardize":
        filled[...] = _normalized(filled, plan.good_HW, plan.window)
    if filled is not out_HW:
        out_HW[...] = filled


def _render_reference(raw_PSF: np.ndarray, plan: RenderPlan, scale: float) -> np.ndarray:
    """:func:`render` in numpy; pixels that are not finite count as masked."""
    if plan.pooling is not None:
        constants: Constants = plan.pooling["constants"]
        values = calibrate_reference(raw_PSF, constants)
        if raw_PSF.dtype.kind == "f":
            values = np.where(np.isfinite(raw_PSF), values, np.float32(np.nan))
        return window(values, plan, scale)
    assert plan.index_HW is not None and plan.factor_HW is not None
    assert plan.pedestal_HW is not None
    there = np.where(plan.good_HW, plan.index_HW, 0)
    words, stages = _stages(raw_PSF.ravel()[there], plan.gain_bits)
    values = np.zeros(there.shape, np.float32)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        values = np.where(stages[0], (words.astype(np.float32) - plan.pedestal_HW)
                          * plan.factor_HW, values)
        for g in range(1, len(stages)):
            assert plan.pedestals_GHW is not None and plan.gains_GHW is not None
            value = (words.astype(np.float32) - plan.pedestals_GHW[g]) \
                * (np.float32(1) / plan.gains_GHW[g])
            values = np.where(stages[g], value, values)
    return _finished(values, plan.good_HW & np.isfinite(values), plan.window, scale)


def window(calibrated_PSF: np.ndarray, plan: RenderPlan, scale: float = 1.0) -> np.ndarray:
    """The window of a calibrated frame, float32 (H, W): the reference route of :func:`render`.

    Pixels that are not finite count as masked.
    """
    if plan.target_PSF is None:
        assert plan.index_HW is not None
        values = calibrated_PSF.ravel()[np.where(plan.good_HW, plan.index_HW, 0)]
        return _finished(values, plan.good_HW & np.isfinite(values), plan.window, scale)
    used = (plan.target_PSF >= 0) & plan.good_PSF & np.isfinite(calibrated_PSF)
    if plan.window.pool_by == "mean":       # added up in the frame's order, as the kernel does
        target, size = plan.target_PSF[used], plan.good_HW.size
        counts = np.bincount(target, minlength=size)
        sums = np.bincount(target, calibrated_PSF[used].astype(np.float64), size)
        mean_HW = (sums / np.maximum(counts, 1)).astype(np.float32).reshape(plan.good_HW.shape)
        return _finished(mean_HW, counts.reshape(mean_HW.shape) > 0, plan.window, scale)
    pooled = np.full(plan.good_HW.size, -np.inf, np.float32)
    np.maximum.at(pooled, plan.target_PSF[used], calibrated_PSF[used])
    pooled_HW = pooled.reshape(plan.good_HW.shape)
    return _finished(pooled_HW, pooled_HW > -np.inf, plan.window, scale)


def _finished(values_HW: np.ndarray, good_HW: np.ndarray, window: Window, scale: float
              ) -> np.ndarray:
    values = np.where(good_HW, values_HW, np.float32(0)).astype(np.float32) * np.float32(scale)
    return _normalized(values, good_HW, window)


def _normalized(values_HW: np.ndarray, good_HW: np.ndarray, window: Window) -> np.ndarray:
    """Normalization of the model's card; ``values_HW`` is 0 where not good and stays so."""
    clip = np.float32(window.clip)
    if window.normalize == "clip":
        return np.clip(values_HW, -clip, clip)
    if window.normalize == "sqrt_floor":
        return np.floor(np.sqrt(np.clip(values_HW, np.float32(0), clip)))
    if window.normalize == "standardize":
        n = int(np.count_nonzero(good_HW))
        mean = float(values_HW.sum(dtype=np.float64)) / max(n, 1)
        centred = np.where(good_HW, values_HW - mean, 0.0)
        deviation = float(np.sqrt(np.square(centred).sum() / max(n, 1)))
        return (centred / deviation if deviation > 0 else np.zeros_like(centred)).astype(np.float32)
    return values_HW


def image_window(image_HW: np.ndarray, window: Window,
                 beam_center_px: tuple[float, float] | None = None,
                 good_HW: np.ndarray | None = None, scale: float = 1.0) -> np.ndarray:
    """The window of an assembled image, float32: what :func:`render` gives for such a detector.

    ``beam_center_px`` is (fast, slow) from the outer corner of the first pixel (None: the middle);
    row 0 of the image is its top.  What lies outside of the image is 0, as are masked pixels.

    Raises :class:`ConfigurationError` for a window no frame can fill.
    """
    check_window(window)
    n_s, n_f = image_HW.shape
    fast, slow = (n_f / 2, n_s / 2) if beam_center_px is None else beam_center_px
    picks = []
    for (axis, sign, shift), n in zip(window_axes(window), window.shape, strict=True):
        at = sign * (np.arange(n * window.pool) + 0.5 + TIE_PX - shift)
        picks.append((axis, np.floor(fast + at if axis == "x" else slow - at).astype(np.int64)))
    (row_axis, row), (_, column) = picks
    turned = image_HW if row_axis == "y" else image_HW.T
    good = None if good_HW is None else good_HW if row_axis == "y" else good_HW.T
    inside = (((row >= 0) & (row < turned.shape[0]))[:, None]
              & ((column >= 0) & (column < turned.shape[1]))[None, :])
    grid = np.ix_(np.clip(row, 0, turned.shape[0] - 1), np.clip(column, 0, turned.shape[1] - 1))
    with np.errstate(over="ignore"):
        values = turned[grid].astype(np.float32)
    inside &= np.isfinite(values)
    if good is not None:
        inside &= good[grid].astype(bool)
    if window.pool > 1:
        f, (height, width) = window.pool, window.shape
        tiled = (height, f, width, f)
        if window.pool_by == "mean":
            counts = inside.reshape(tiled).sum(axis=(1, 3))
            sums = np.where(inside, values, 0.0).astype(np.float64).reshape(tiled).sum(axis=(1, 3))
            values, inside = (sums / np.maximum(counts, 1)).astype(np.float32), counts > 0
        else:
            values = np.where(inside, values, np.float32(-np.inf)).reshape(tiled).max(axis=(1, 3))
            inside = values > -np.inf
    return _finished(values, inside, window, scale)
