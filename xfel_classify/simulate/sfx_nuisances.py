"""What later presets add to the events of a simulated run; nothing of it touches the first three.

Stray spots, grains of ice and salt, backgrounds of lipid and plastic, the shadow of a nozzle.
Random numbers are the run's or the event's, of purposes of their own, so that a run with nuisances
is the same run without them otherwise.

Axes: P panel, S slow, F fast, N spot.
"""
from __future__ import annotations

import numpy as np

from ..core import Geometry
from .bragg import Spots
from .conditions import Conditions
from .stills_512 import ICE_D_A, SALT_D_A

__all__ = ["grains", "more_background", "shadow_on", "strays"]

STRAY_APART_PX = 25         # of stray spots, so that each is a peak of its own
ICE_PHOTONS, SALT_PHOTONS = 20.0, 2000.0    # mean of a grain's spot, exponentially distributed
_STRAYS, _GRAINS = 5, 6                     # purposes of random numbers: of events ...
_SMOOTH, _SHADOW = 13, 14                   # ... and of runs


def strays(c: Conditions, number: int, geometry: Geometry, others: int) -> Spots:
    """Up to ``stray_spots`` bright spots far from each other, anywhere on the pixels.

    They are as sharp as Bragg spots or a little wider.  With ``others``, spots of the same kind
    that the event has already, there are never more than ``stray_spots``, so that a miss stays
    below what the paper's labels call a hit.
    """
    rng = np.random.default_rng([c.seed, c.run, number, _STRAYS])
    n = int(rng.integers(1, c.stray_spots + 1)) if rng.random() < c.stray_chance else 0
    n = max(min(n, c.stray_spots - others), 0)
    half = np.array([np.abs(axis).max() for axis in (geometry.x_m_PSF, geometry.y_m_PSF)])
    places = np.zeros((0, 2))
    for place in rng.uniform(-1, 1, (20 * n, 2)) * half:
        apart = np.hypot(*(places - place).T) >= STRAY_APART_PX * c.pixel_size_m
        if len(places) < n and apart.all():
            places = np.vstack([places, place])
    n = len(places)
    low, high = np.log(c.stray_photons)
    photons = np.exp(rng.uniform(low, high, n))
    wide = (rng.random(n) < 0.4) * rng.uniform(0, 1.2, (2, n)) * c.pixel_size_m
    s = np.maximum(c.inverse_d_A(np.hypot(*places.T)), 1e-4)
    return Spots(places[:, 0], places[:, 1], photons, wide[0], wide[1], 1 / s,
                 np.zeros((n, 3), np.float32), np.zeros(n))


def grains(c: Conditions, number: int, has_ice: bool) -> Spots:
    """Spots of ice grains and of salt, anywhere on their rings.

    A run that has salt shows it on a share of its events, ``salt_chance``; ice grains come with
    ice rings.
    """
    rng = np.random.default_rng([c.seed, c.run, number, _GRAINS])
    salty = rng.random() < c.salt_chance
    d = np.concatenate([
        rng.choice(ICE_D_A[:6], int(rng.integers(c.ice_spots + 1)) if has_ice else 0),
        rng.choice(SALT_D_A, int(rng.integers(1, c.salt_spots + 1)) if salty else 0)])
    mean = np.where(np.isin(d, SALT_D_A), SALT_PHOTONS, ICE_PHOTONS)
    photons = mean * rng.exponential(1.0, len(d))
    azimuth = rng.uniform(0, 2 * np.pi, len(d))
    seen = c.wavelength_A / (2 * d) < 0.65
    d, photons, azimuth = d[seen], photons[seen], azimuth[seen]
    radius = c.distance_m * np.tan(2 * np.arcsin(c.wavelength_A / (2 * d)))
    n = len(d)
    return Spots(radius * np.cos(azimuth), radius * np.sin(azimuth), photons, np.zeros(n),
                 np.zeros(n), d, np.zeros((n, 3), np.float32), np.zeros(n))


def more_background(c: Conditions, s_PSF: np.ndarray) -> np.ndarray:
    """Photons per pixel of lipid, plastic and three smooth terms at 1/d, float32, per mean pulse.

    Positions and widths of the rings as in the stills (methods section 7.3).
    """
    level = c.lipid_photons * np.exp(-0.5 * ((s_PSF - 1 / 4.5) / 0.018) ** 2)
    level += c.plastic_photons * np.exp(-0.5 * ((s_PSF - 1 / 5.2) / 0.03) ** 2)
    rng = np.random.default_rng([c.seed, c.run, _SMOOTH])
    for _ in range(3):
        level += c.smooth_photons * rng.uniform(0, 1) * np.exp(-0.5 * (
            (s_PSF - rng.uniform(0.0, 0.3)) / rng.uniform(0.02, 0.2)) ** 2)
    return level.astype(np.float32)


def shadow_on(c: Conditions, geometry: Geometry) -> np.ndarray:
    """Transmission of each pixel, float32 (P, S, F): half a plane, or a strip, behind an edge."""
    rng = np.random.default_rng([c.seed, c.run, _SHADOW])
    angle = rng.uniform(0, 2 * np.pi)
    x, y = geometry.x_m_PSF, geometry.y_m_PSF
    half = min(float(np.abs(axis).max()) for axis in (x, y))
    depth = np.cos(angle) * x + np.sin(angle) * y - rng.uniform(0.2, 0.9) * half
    behind = depth > 0
    if rng.random() < 0.5:
        behind &= depth < rng.uniform(10, 80) * c.pixel_size_m
    return np.where(behind, np.float32(c.shadow), np.float32(1))
