"""Bragg spots on the panels of a geometry.

Axes: P panel, S slow, F fast, N spot.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..core import Panel
from .bragg import Spots, paint

__all__ = ["Located", "OnPanel", "locate_spots", "paint_located", "place_spots"]

HALF_PX = 6     # half a side of the patch that a spot is painted on


@dataclass(frozen=True)
class OnPanel:
    """Spots on or just beside a panel: pixel indices within it, photons and shapes."""

    panel: Panel
    fs_N: np.ndarray
    ss_N: np.ndarray
    photons_N: np.ndarray
    covariance_N22: np.ndarray      # pixels^2 over (fs, ss)

    @property
    def region(self) -> tuple[int, slice, slice]:
        """Where the panel's pixels are in an image (P, S, F)."""
        one = self.panel
        return (one.index, slice(one.min_ss, one.max_ss + 1), slice(one.min_fs, one.max_fs + 1))


Located = tuple[list[OnPanel], tuple[np.ndarray, ...], tuple[np.ndarray, ...]]


def locate_spots(panels: Sequence[Panel], good_PSF: np.ndarray, spots: Spots, x_m_N: np.ndarray,
                 y_m_N: np.ndarray, pixel_size_m: float, sigma_px: float,
                 widest_px: float = 2.5) -> Located:
    """(what to paint, columns of the spots on good pixels, the (P, S, F) indices of these).

    Columns are panel, fs, ss, photons, d in angstrom, x, y.  ``sigma_px`` is the detector's point
    spread; what crystal and spectrum add to it is cut off at ``widest_px``.
    """
    x, y = x_m_N, y_m_N
    pieces: list[OnPanel] = []
    found: list[tuple[np.ndarray, ...]] = []
    for panel in panels:
        fs_axis, ss_axis = np.array(panel.fs_m[:2]), np.array(panel.ss_m[:2])
        inverse = np.linalg.inv(np.stack([fs_axis, ss_axis], axis=1))
        offset = np.stack([x - panel.corner_m[0], y - panel.corner_m[1]])
        f, t = inverse @ offset - 0.5
        height, width = (panel.max_ss - panel.min_ss + 1, panel.max_fs - panel.min_fs + 1)
        inside = (f > -4) & (f < width + 3) & (t > -4) & (t < height + 3)
        if not inside.any():
            continue
        f, t = f[inside], t[inside]
        radial = np.stack([x[inside], y[inside]]) / np.maximum(
            np.hypot(x[inside], y[inside]), 1e-9)
        along = inverse @ radial * pixel_size_m
        across = inverse @ np.stack([-radial[1], radial[0]]) * pixel_size_m
        a = np.minimum(spots.radial_m_N[inside] / pixel_size_m, widest_px) ** 2
        b = np.minimum(spots.tangential_m_N[inside] / pixel_size_m, widest_px) ** 2
        covariance = (a * along[:, None] * along[None] + b * across[:, None] * across[None])
        covariance = np.moveaxis(covariance, 2, 0) + sigma_px ** 2 * np.eye(2)
        pieces.append(OnPanel(panel, f, t, spots.photons_N[inside], covariance))
        on = (f > -0.5) & (f < width - 0.5) & (t > -0.5) & (t < height - 0.5)
        f, t = f[on] + panel.min_fs, t[on] + panel.min_ss
        at = (np.full(len(f), panel.index), np.rint(t).astype(int), np.rint(f).astype(int))
        usable = good_PSF[at]
        one = (at[0], f, t, spots.photons_N[inside][on], spots.d_A_N[inside][on], x[inside][on],
               y[inside][on], *at[1:])
        found.append(tuple(column[usable] for column in one))
    if not found:
        none = np.zeros(0, int)
        return [], tuple(np.zeros(0) for _ in range(7)), (none, none, none)
    columns = tuple(np.concatenate(column) for column in zip(*found, strict=True))
    return pieces, columns[:7], (columns[0], *columns[7:])


def place_spots(expected_PSF: np.ndarray, panels: Sequence[Panel], good_PSF: np.ndarray,
                spots: Spots, x_m_N: np.ndarray, y_m_N: np.ndarray, pixel_size_m: float,
                sigma_px: float, widest_px: float = 2.5) -> tuple[np.ndarray, ...]:
    """Add spots at (x, y) to the panels they fall on, in place.

    Parameters as of :func:`locate_spots`.  Returns (panel, fs, ss, photons, d in angstrom,
    background, x, y) of the spots whose centre is on a good pixel; ``background`` are the photons
    expected there before.
    """
    return paint_located(expected_PSF, locate_spots(
        panels, good_PSF, spots, x_m_N, y_m_N, pixel_size_m, sigma_px, widest_px))


def paint_located(expected_PSF: np.ndarray, located: Located) -> tuple[np.ndarray, ...]:
    """As :func:`place_spots`, of spots that :func:`locate_spots` found."""
    pieces, columns, at = located
    background = expected_PSF[at] if len(at[0]) else np.zeros(0)
    for one in pieces:
        piece = np.ascontiguousarray(expected_PSF[one.region])
        paint(piece, one.fs_N, one.ss_N, one.photons_N, one.covariance_N22, half=HALF_PX)
        expected_PSF[one.region] = piece
    return (*columns[:5], background, *columns[5:])
