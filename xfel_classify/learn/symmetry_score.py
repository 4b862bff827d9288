"""Which rotational symmetries a class average has, and the choice of classes by them.

Each ring of the average is correlated with itself turned by every angle; the cosine transform of
that is the strength of each order of symmetry (methods specification, section 3, after [ASS20]).
Particles of an icosahedral virus show orders 6 and 10 (axes of three and five, with Friedel); two
particles side by side show order 2.

Axes: K class, G grid point a side, T angle, R ring, M order 1 ... 50.
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..core import ConfigurationError

__all__ = ["ORDERS", "chosen_by_symmetry", "order_scores", "polar"]

ORDERS = 50
ANGLES = 256
ICOSAHEDRAL = (6, 10)


def polar(average_GG: np.ndarray, radii_R: np.ndarray, angles: int = ANGLES) -> np.ndarray:
    """(R, T) bilinear lookup of an average whose middle is the beam; NaN where it has no value."""
    half = average_GG.shape[0] // 2
    angle_T = np.arange(angles) * 2 * np.pi / angles
    x = half + radii_R[:, None] * np.cos(angle_T)
    y = half + radii_R[:, None] * np.sin(angle_T)
    low_x, low_y = (np.clip(np.floor(a).astype(int), 0, average_GG.shape[0] - 2) for a in (x, y))
    right, up = x - low_x, y - low_y
    return ((1 - up) * ((1 - right) * average_GG[low_y, low_x]
                        + right * average_GG[low_y, low_x + 1])
            + up * ((1 - right) * average_GG[low_y + 1, low_x]
                    + right * average_GG[low_y + 1, low_x + 1]))


def order_scores(average_GG: np.ndarray, inner: float, outer: float) -> np.ndarray:
    """(50,) strength of the orders 1 ... 50 between two radii (grid steps), 0 where nothing is.

    Rings with holes are left out.  Every ring counts by its variance over its squared mean, so
    that a bright inner ring does not hide the outer ones; counting noise, which is the same in
    all orders, is taken out by the median of the even ones (the others vanish with Friedel).
    """
    half = average_GG.shape[0] // 2
    radii = np.arange(max(inner, 1.0), min(outer, half - 1.0) + 1e-9, 1.0)
    score_M = np.zeros(ORDERS)
    if not len(radii):
        return score_M
    for ring_T in polar(average_GG, radii):
        if not np.isfinite(ring_T).all() or ring_T.mean() <= 0:
            continue
        ring_T = ring_T / ring_T.mean() - 1
        correlation_T = np.fft.irfft(np.abs(np.fft.rfft(ring_T)) ** 2, len(ring_T)) / len(ring_T)
        strength_M = _cosine_transform(correlation_T)[1:]
        score_M += np.maximum(strength_M - np.median(strength_M[1::2]), 0.0)
    return score_M / len(radii)


def _cosine_transform(periodic_T: np.ndarray) -> np.ndarray:
    """Strength of cos(m t) in an even periodic function: twice its mean product with it."""
    angle_T = np.arange(len(periodic_T)) * 2 * np.pi / len(periodic_T)
    orders = np.arange(ORDERS + 1)
    return 2 * np.cos(orders[:, None] * angle_T) @ periodic_T / len(periodic_T)


def chosen_by_symmetry(averages_KGG: np.ndarray, inner: float, outer: float,
                       orders: Sequence[int] = ICOSAHEDRAL, share: float = 0.5
                       ) -> tuple[np.ndarray, np.ndarray]:
    """(bool (K,), scores (K, 50)): classes in which ``orders`` hold more than ``share`` of all.

    Raises :class:`ConfigurationError` for orders outside of 1 ... 50.
    """
    wrong = [order for order in orders if not 1 <= order <= ORDERS]
    if wrong or not len(orders) or not 0 <= share < 1:
        raise ConfigurationError(f"classes were to be chosen by symmetry of order "
                                 f"{', '.join(map(str, orders)) or '(none)'} above a share of "
                                 f"{share:g}; give orders from 1 to {ORDERS} and a share below 1")
    scores_KM = np.array([order_scores(one, inner, outer) for one in averages_KGG])
    total_K = scores_KM.sum(1)
    own_K = scores_KM[:, np.asarray(orders) - 1].sum(1)
    return own_K > share * np.where(total_K > 0, total_K, np.inf), scores_KM
