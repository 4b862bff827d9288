"""Reflections near the Ewald sphere, found line by line instead of from a list of all.

A crystal that is seen once, to high resolution, has millions of reflections of which a few thousand
are excited.  Along a line of reciprocal space (h, k fixed) the excitation condition
|eps| < w, with eps = |q + k z| - k, is a quadratic in l: only the integers between its roots are
looked at.  The result is what :func:`~.bragg.predict` would keep of the full list, exactly.

Axes: N reflections, 3 = (h, k, l) or lab (x, y, z).  Lengths in angstrom.
"""
from __future__ import annotations

import functools

import numpy as np

from .bragg import partiality_width
from .crystal import Crystal, Reflections, reciprocal_basis, reflections, wilson_intensities

__all__ = ["excited", "near_ewald"]

_REACH = 4.3            # in partiality widths: a little more than bragg.predict keeps
_SECTOR_MARGIN = 0.03   # 1/A beyond the edge of a quadrant


def near_ewald(orient_33: np.ndarray, k: float, q_max: float, width: float) -> np.ndarray:
    """int64 (N, 3): all hkl with |q| <= ``q_max`` and ||q + k z| - k| <= ``width`` (1/A).

    ``orient_33`` has the rotated a*, b*, c* as columns; ``k`` is 1/wavelength.  The origin is left
    out.
    """
    # the line runs along the axis with most indices, so that there are fewest lines
    spans = np.linalg.norm(np.linalg.inv(orient_33), axis=1) * q_max
    line = int(np.argmax(spans))
    others = [axis for axis in range(3) if axis != line]
    h, m = (np.arange(-int(spans[axis]), int(spans[axis]) + 1) for axis in others)
    start = (h[:, None, None] * orient_33[:, others[0]]
             + m[None, :, None] * orient_33[:, others[1]]).reshape(-1, 3)
    step = orient_33[:, line]
    length2 = float(step @ step)
    # |q|^2 + 2 k qz lies in (k -+ width)^2 - k^2; with q = start + l step, a quadratic in l
    middle = -(start @ step + k * step[2]) / length2
    nearest2 = np.einsum("ni,ni->n", start, start)
    level = (nearest2 + 2 * k * start[:, 2]) / length2
    inner = (width * width - 2 * k * width) / length2
    outer = (width * width + 2 * k * width) / length2
    square = middle ** 2 - level
    # and |q| <= q_max bounds l as well
    foot = -(start @ step) / length2
    reach2 = (q_max ** 2 - nearest2) / length2 + foot ** 2
    keep = (square + outer >= 0) & (reach2 >= 0)
    h_index, m_index = np.divmod(np.flatnonzero(keep), len(m))
    middle, square, foot = middle[keep], square[keep], foot[keep]
    reach = np.sqrt(reach2[keep])
    far = np.sqrt(square + outer)
    near = np.sqrt(np.maximum(square + inner, 0.0))
    upper_low = np.ceil(np.maximum(middle + near, foot - reach)).astype(np.int64)
    upper_high = np.floor(np.minimum(middle + far, foot + reach)).astype(np.int64)
    lower_low = np.ceil(np.maximum(middle - far, foot - reach)).astype(np.int64)
    lower_high = np.floor(np.minimum(middle - near, foot + reach)).astype(np.int64)
    lower_high = np.minimum(lower_high, upper_low - 1)      # where both halves touch: once
    parts = []
    for low, high in ((lower_low, lower_high), (upper_low, upper_high)):
        count = np.maximum(high - low + 1, 0)
        row = np.repeat(np.arange(len(count)), count)
        within = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
        part = np.empty((len(row), 3), np.int64)
        part[:, others[0]] = h[h_index[row]]
        part[:, others[1]] = m[m_index[row]]
        part[:, line] = low[row] + within
        parts.append(part)
    hkl = np.concatenate(parts)
    return hkl[np.any(hkl != 0, axis=1)]


def excited(crystal: Crystal, rotation_33: np.ndarray, *, k: float, q_max: float,
            bandwidth: float, sector: tuple[int, int] | None = None) -> Reflections:
    """Reflections of one orientation that a pulse can excite, for :func:`~.bragg.predict`.

    ``sector`` is the (sign of x, sign of y) of a quadrant: reflections well outside of it are
    left out.  Crystals with a structure model take their intensities from its full list.
    """
    mosaicity = np.deg2rad(crystal.mosaicity_deg)
    if crystal.model:
        return _whole_list(crystal, 1.0 / q_max)
    basis = reciprocal_basis(crystal.cell)
    orient = rotation_33 @ basis
    widest = float(partiality_width(np.array(q_max ** 2), crystal.domain_A, mosaicity, bandwidth,
                                    1.0 / k))
    hkl = near_ewald(orient, k, q_max, _REACH * widest)
    q = hkl @ orient.T
    if sector is not None:
        keep = (sector[0] * q[:, 0] > -_SECTOR_MARGIN) & (sector[1] * q[:, 1] > -_SECTOR_MARGIN)
        hkl, q = hkl[keep], q[keep]
    q2 = np.einsum("ni,ni->n", q, q)
    width = partiality_width(q2, crystal.domain_A, mosaicity, bandwidth, 1.0 / k)
    excitation = np.sqrt(np.maximum(k * k + 2 * k * q[:, 2] + q2, 0)) - k
    keep = np.abs(excitation) < _REACH * width
    hkl, q2 = hkl[keep], q2[keep]
    value = wilson_intensities(hkl, q2, crystal)
    keep = value > 0
    return Reflections(hkl[keep].astype(np.float32), q2[keep].astype(np.float32),
                       value[keep].astype(np.float32), basis)


@functools.lru_cache(maxsize=4)
def _whole_list(crystal: Crystal, d_min_A: float) -> Reflections:
    return reflections(crystal, d_min_A, limit=4_000_000)
