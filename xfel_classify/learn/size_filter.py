"""Diameter of a single particle from the rings of its pattern: the fit of a sphere.

The intensity of a homogeneous sphere is (3 (sin x - x cos x) / x^3)^2 at x = 2 pi s R with
s = 2 sin(theta) / lambda; the radius is the one whose profile, brightness and background free, is
nearest to the logarithm of the measured one (methods specification, section 3; [ASS20] keep 55 to
84 nm).  Of another body it is the sphere of about its volume: 0.85 of an icosahedron's largest
diameter.

Axes: N pattern, H row, W column, R ring, D diameter that is tried.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..core import ConfigurationError

__all__ = ["MINIMA", "PUBLISHED_NM", "SphereFit", "fit_spheres", "minima_px", "ring_photons",
           "sphere_intensity"]

PUBLISHED_NM = (55.0, 84.0)
MINIMA = (4.4934095, 7.7252518, 10.9041217, 14.0661939, 17.2207553)
"""x at which the sphere scatters nothing: tan x = x."""

FLOORS = tuple(10.0 ** (power / 3) for power in range(-18, 1))
"""Part of the forward intensity that is everywhere: background."""

CONTRASTS = (1.0, 0.7, 0.4)
"""Part of the fringes; the rest is their average: facets, shells, the width of the beam."""

MODEL_ERROR = 0.15
"""Relative deviation of a real profile from the sphere's that counts as much as noise."""


def sphere_intensity(x: np.ndarray) -> np.ndarray:
    """(3 (sin x - x cos x) / x^3)^2, 1 at x = 0."""
    x = np.asarray(x, np.float64)
    safe = np.maximum(np.abs(x), 1e-2)
    value = 3 * (np.sin(safe) - safe * np.cos(safe)) / safe ** 3
    return np.where(np.abs(x) < 1e-2, 1 - x ** 2 / 10, value) ** 2


@dataclass(frozen=True)
class SphereFit:
    """``diameter_nm_N`` of the sphere that fits best, NaN without photons; ``misfit_N`` is chi
    squared per ring, where counting noise and :data:`MODEL_ERROR` are the errors."""

    diameter_nm_N: np.ndarray
    misfit_N: np.ndarray

    def within(self, low_nm: float, high_nm: float) -> np.ndarray:
        """bool (N,)"""
        return (self.diameter_nm_N >= low_nm) & (self.diameter_nm_N <= high_nm)


def ring_photons(images_NHW: np.ndarray, good_HW: np.ndarray, beam_RC: tuple[float, float],
                 pool: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(photons_NR, elements_R, radius_R in elements): photons on rings one element wide."""
    rows, columns = (axis + 0.5 for axis in np.nonzero(good_HW))
    radius = np.hypot(rows - beam_RC[0], columns - beam_RC[1])
    ring = radius.astype(int)
    members = np.bincount(ring)
    kept = np.flatnonzero(members)
    order = np.argsort(ring, kind="stable")
    starts = np.searchsorted(ring[order], kept)
    values = np.maximum(images_NHW[:, good_HW], 0.0)[:, order]
    photons = np.add.reduceat(values.astype(np.float64), starts, axis=1) * pool ** 2
    return photons, members[kept], np.bincount(ring, radius)[kept] / members[kept]


def fit_spheres(photons_NR: np.ndarray, elements_R: np.ndarray, radius_R: np.ndarray, *,
                element_m: float, distance_m: float, wavelength_A: float,
                search_nm: tuple[float, float] = (20.0, 150.0), steps: int = 261) -> SphereFit:
    """Diameters of patterns given by the photons on their rings.

    Each profile is compared with spheres of ``steps`` diameters, with the fringe contrasts of
    :data:`CONTRASTS` over the backgrounds of :data:`FLOORS`; brightness is free.
    Raises :class:`ConfigurationError` for a geometry that is not known.
    """
    if not (element_m > 0 and distance_m > 0 and wavelength_A > 0 < search_nm[0] < search_nm[1]):
        raise ConfigurationError(
            f"diameters were to be fitted with elements of {element_m} m at {distance_m} m, "
            f"wavelength {wavelength_A} A, from {search_nm[0]} to {search_nm[1]} nm; state the "
            "distance and the photon energy (--set source.distance_m=..., "
            "--set source.photon_energy_eV=...)")
    theta_R = 0.5 * np.arctan(radius_R * element_m / distance_m)
    s_nm_R = 2 * np.sin(theta_R) / (0.1 * wavelength_A)
    diameter_D = np.linspace(*search_nm, steps)
    photons_NR = np.asarray(photons_NR, np.float64)
    x_DR = np.pi * diameter_D[:, None] * s_nm_R
    width_DR = np.pi * diameter_D[:, None] * (np.gradient(s_nm_R) if len(s_nm_R) > 1 else 0.0)
    fringes_DR = _averaged(x_DR, width_DR)      # a ring is as wide as an element
    smooth_DR = _averaged(x_DR, np.maximum(width_DR, np.pi))
    weight_NR = np.where(photons_NR > 0, 1 / (1 / np.maximum(photons_NR, 0.5) + MODEL_ERROR ** 2),
                         0.0)
    log_NR = np.log(np.maximum(photons_NR, 0.5) / elements_R)
    total_N = np.maximum(weight_NR.sum(1), 1e-30)
    own_N = (weight_NR * log_NR).sum(1)
    square_N = (weight_NR * log_NR ** 2).sum(1) - own_N ** 2 / total_N
    error_ND = np.full((len(photons_NR), steps), np.inf)
    for contrast in CONTRASTS:
        for floor in FLOORS:
            model_DR = np.log(contrast * fringes_DR + (1 - contrast) * smooth_DR + floor)
            mean_ND = weight_NR @ model_DR.T
            error = (weight_NR @ np.square(model_DR).T - mean_ND ** 2 / total_N[:, None]
                     - 2 * ((weight_NR * log_NR) @ model_DR.T
                            - mean_ND * (own_N / total_N)[:, None]))
            error_ND = np.minimum(error_ND, error)
    error_ND += square_N[:, None]
    best_N = error_ND.argmin(1)
    diameter_N = _refined(-error_ND, best_N, diameter_D)
    misfit_N = error_ND[np.arange(len(error_ND)), best_N] / max(1, len(s_nm_R) - 2)
    empty = photons_NR.sum(1) <= 0
    diameter_N[empty] = misfit_N[empty] = np.nan
    return SphereFit(diameter_N, misfit_N)


def _averaged(x_DR: np.ndarray, width_DR: np.ndarray, points: int = 7) -> np.ndarray:
    """Intensity of the sphere, averaged over the width of x."""
    steps = (np.arange(points) + 0.5) / points - 0.5
    return np.mean([sphere_intensity(x_DR + step * width_DR) for step in steps], axis=0)


def _refined(height_ND: np.ndarray, top_N: np.ndarray, diameter_D: np.ndarray) -> np.ndarray:
    """The vertex of a parabola through the best value and its neighbours."""
    middle = np.clip(top_N, 1, len(diameter_D) - 2)
    rows = np.arange(len(top_N))
    left, here, right = (height_ND[rows, middle + step] for step in (-1, 0, 1))
    bend = left - 2 * here + right
    shift = np.where((bend < 0) & (middle == top_N), 0.5 * (left - right)
                     / np.where(bend < 0, bend, -1.0), 0.0)
    return diameter_D[top_N] + np.clip(shift, -1, 1) * (diameter_D[1] - diameter_D[0])


def minima_px(diameter_nm: float, *, element_m: float, distance_m: float, wavelength_A: float
              ) -> np.ndarray:
    """Radii in elements of the minima of a sphere, those of :data:`MINIMA` that exist."""
    s_nm = np.array(MINIMA) / (np.pi * diameter_nm)
    sine = 0.05 * wavelength_A * s_nm
    theta = np.arcsin(sine[sine < np.sin(np.pi / 4.01)])
    return np.tan(2 * theta) * distance_m / element_m
