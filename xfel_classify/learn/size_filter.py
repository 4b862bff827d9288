"""Diameter of a single particle from the rings of its pattern: the fit of a sphere.

The intensity of a homogeneous sphere is (3 (sin x - x cos x) / x^3)^2 at x = 2 pi s R with
s = 2 sin(theta) / lambda; the radius is the one whose profile, brightness and background free, is
nearest to the logarithm of the measured one (methods specification, section 3; [ASS20] keep 55 to
84 nm).  Of another body it is the sphere of about its volume: 0.85 of an icosahedron's largest
diameter.

Several particles a distance apart scatter as something larger than one: their interference
changes within fewer pixels than any pattern of one particle can.  :func:`fine_share` measures it,
as the size filter does the rings.

Axes: N pattern, H row, W column, R ring, D diameter that is tried.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..core import ConfigurationError

__all__ = ["MINIMA", "PUBLISHED_NM", "SphereFit", "fine_share", "fit_spheres",
           "hot_elements", "minima_px", "ring_photons", "speckle_elements", "sphere_intensity"]

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


# --- structure that one particle cannot have -----------------------------------------------------

LAGS_IN_SPECKLE = 8
"""Elements an eighth of a speckle apart are nearly alike in a pattern of one particle."""

LEAST_IN_SPECKLE = 4
RINGS_FROM = 1.5        # speckles; further in the rings are too steep for the beam's uncertainty
LEAST_PHOTONS = 1.0     # of a ring's mean element
HOT, CERTAIN_PHOTONS = 3.0, 50.0
MOST_WEIGHT = 30.0      # photons: what is brighter counts no more


def speckle_elements(diameter_nm: float, *, element_m: float, distance_m: float,
                     wavelength_A: float) -> float:
    """Elements over which a pattern of something of this diameter changes: lambda L / D."""
    return 1e-10 * wavelength_A * distance_m / (1e-9 * diameter_nm) / element_m


def fine_share(images_NHW: np.ndarray, good_HW: np.ndarray, beam_RC: tuple[float, float],
               pool: int, speckle: float) -> np.ndarray:
    """(N,) share of the angular structure that lies within a few elements; NaN where it is dark.

    Every element is divided by the mean of its ring, less 1.  The squared difference of two
    elements, up to an eighth of ``speckle`` elements apart along rows or columns, over twice the
    variance, both less counting noise, is near 0 for one particle and near 1 for fine interference;
    brightness does not change it.  Raises :class:`ConfigurationError` for pictures too coarse.
    """
    if speckle < LEAST_IN_SPECKLE:
        raise ConfigurationError(
            f"fine structure was to be looked for in pictures with {speckle:.1f} elements to a "
            f"speckle of the largest particle; at least {LEAST_IN_SPECKLE} are needed; give a "
            "larger --side, a smaller --reach, or smaller sizes")
    height, width = good_HW.shape
    row, column = np.mgrid[:height, :width] + 0.5
    radius = np.hypot(row - beam_RC[0], column - beam_RC[1])
    used = good_HW & (radius >= RINGS_FROM * speckle)
    ring = radius.astype(int)
    members_R = np.maximum(np.bincount(ring[used], minlength=ring.max() + 1), 1)
    steps = range(1, max(1, round(speckle / LAGS_IN_SPECKLE)) + 1)
    found_N = np.full(len(images_NHW), np.nan)
    for number, image_HW in enumerate(images_NHW):
        photons = image_HW.astype(np.float64) * pool ** 2
        mean = (np.bincount(ring[used], photons[used], minlength=len(members_R))
                / members_R)[ring]
        lit = used & (mean > LEAST_PHOTONS)
        if not lit.any():
            continue
        mean = np.where(lit, mean, 1.0)
        value = np.where(lit, photons / mean - 1, 0.0)
        weight = np.where(lit, np.minimum(mean, MOST_WEIGHT), 0.0)
        variance = (weight * (value ** 2 - 1 / mean)).sum() / weight.sum()
        fine = max(_difference(value, weight, 1 / mean, axis, step)
                   for step in steps for axis in (0, 1))
        found_N[number] = fine / (2 * max(variance, 1e-3))
    return found_N


def hot_elements(images_NHW: np.ndarray, good_HW: np.ndarray, pool: int) -> np.ndarray:
    """bool (H, W): elements that are brighter than their neighbours in the mean of all frames.

    More than :data:`HOT` times the median of the working ones of eight, and not by chance.  A
    single hot pixel that no mask names is fine structure in every frame.
    """
    mean_HW = images_NHW.mean(0, dtype=np.float64)
    around = np.pad(np.where(good_HW, mean_HW, np.nan), 1, constant_values=np.nan)
    height, width = good_HW.shape
    neighbours = np.stack([around[row:row + height, column:column + width]
                           for row in range(3) for column in range(3) if (row, column) != (1, 1)])
    alone_HW = np.isnan(neighbours).all(0)
    neighbours[0][alone_HW] = 0.0
    usual_HW = np.nanmedian(neighbours, axis=0)
    enough_HW = mean_HW * len(images_NHW) * pool ** 2 > CERTAIN_PHOTONS
    return good_HW & ~alone_HW & enough_HW & (mean_HW > HOT * usual_HW)


def _difference(value: np.ndarray, weight: np.ndarray, noise: np.ndarray, axis: int, step: int
                ) -> float:
    """Weighted mean squared difference of elements ``step`` apart, less noise."""
    here = (slice(step, None), slice(None))[::1 - 2 * axis]
    there = (slice(None, -step), slice(None))[::1 - 2 * axis]
    both = np.minimum(weight[here], weight[there])
    squared = (value[here] - value[there]) ** 2 - noise[here] - noise[there]
    return float((both * squared).sum() / max(float(both.sum()), 1e-9))
