"""Diffraction of one to several copies of a particle: expected photons on a flat detector.

Methods section 7.1: an Ewald slice of the complex transform of every copy at its orientation
(trilinear, as the published simulator did), their coherent sum with the phases of their positions,
photons = fluence r_e^2 P dOmega |F|^2 with polarisation along x.  Where copies do not interfere,
partly or at all, the pair coherence says so.

Directions: x right, y up, z along the beam; image row 0 on top.

Axes: C copy, H image row, W image column, XYZ mesh point.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..core import ConfigurationError
from ..native import ewald_slice

__all__ = ["Copy", "View", "ballistic_cluster", "expected_photons", "intensity_reference",
           "pair_coherence", "rotation_matrix", "slice_reference"]

ELECTRON_RADIUS_M = 2.8179403e-15


@dataclass(frozen=True)
class View:
    """The pixels that are computed: sample points of a flat detector and the wavelength.

    A pixel of the image is ``block`` detector pixels wide and is sampled ``oversample`` times along
    each axis; ``first_px`` (row, column) is the outer corner of the image from the beam, in
    detector pixels, rows counted downwards.
    """

    shape: tuple[int, int]
    block: int
    first_px: tuple[float, float]
    pixel_size_m: float
    distance_m: float
    wavelength_A: float
    oversample: int = 2

    @property
    def step_m(self) -> float:
        """Distance of sample points."""
        return self.block * self.pixel_size_m / self.oversample

    @property
    def x_W(self) -> np.ndarray:
        """Of the sample points along a row, metres from the beam, float32."""
        points = np.arange(self.shape[1] * self.oversample) + 0.5
        return (self.first_px[1] * self.pixel_size_m + points * self.step_m).astype(np.float32)

    @property
    def y_H(self) -> np.ndarray:
        points = np.arange(self.shape[0] * self.oversample) + 0.5
        return (-self.first_px[0] * self.pixel_size_m - points * self.step_m).astype(np.float32)

    @property
    def s_max_A(self) -> float:
        """Largest |s| on the detector pixels of the image, 1/A."""
        half = 0.5 * self.pixel_size_m
        x, y = np.abs(self.x_W).max(), np.abs(self.y_H).max()
        edge = 0.5 * self.step_m - half         # out to the centre of the outermost pixel
        radius = np.hypot(x + edge, y + edge)
        return float(2 * np.sin(0.5 * np.arctan2(radius, self.distance_m)) / self.wavelength_A)

    def pooled(self, samples_HW: np.ndarray) -> np.ndarray:
        """Mean over the sample points of every pixel of the image, float32."""
        n = self.oversample
        if n == 1:
            return np.asarray(samples_HW, np.float32)
        h, w = self.shape
        return np.asarray(samples_HW, np.float32).reshape(h, n, w, n).mean((1, 3))


@dataclass(frozen=True)
class Copy:
    """One particle in the beam.

    ``volume_XYZ`` is its transform on a mesh with ``voxel_A``; ``rotation_33`` turns the particle
    (r' = R r); ``position_3`` is its centre in angstrom; ``weight`` multiplies its amplitude.
    """

    volume_XYZ: np.ndarray
    voxel_A: float
    rotation_33: np.ndarray
    position_3: np.ndarray
    weight: float = 1.0
    fades: bool = False         # the mesh ends in zeros: there is nothing worth having beyond it

    @property
    def matrix_33(self) -> np.ndarray:
        """From a scattering vector in the laboratory to mesh points from the mesh's centre."""
        return np.ascontiguousarray(self.rotation_33.T / self.voxel_A, np.float32)


def rotation_matrix(quaternion_4: Sequence[float] | np.ndarray) -> np.ndarray:
    """The rotation of a unit quaternion (w, x, y, z)."""
    w, x, y, z = quaternion_4
    return np.array([
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)]])


def ballistic_cluster(rng: np.random.Generator, radii_C: Sequence[float],
                      separation: float = 1.0) -> np.ndarray:
    """Centres (C, 3) of spheres that flew in one by one along random chords until they touched.

    The first stays at 0.  ``separation`` stretches the finished cluster: 1 = touching.
    """
    placed = np.zeros((1, 3))
    radii = [float(r) for r in radii_C]
    for number in range(1, len(radii)):
        own = radii[number]
        middle = placed.mean(0)
        reach = max(np.linalg.norm(p - middle) + r for p, r in zip(placed, radii, strict=False))
        while True:
            direction = rng.standard_normal(3)
            direction /= np.linalg.norm(direction)
            across = np.cross(direction, rng.standard_normal(3))
            across *= (reach + own) * np.sqrt(rng.random()) / np.linalg.norm(across)
            start = middle + across - direction * 4 * (reach + own)
            # first contact: |start + t direction - p| = own + r
            relative = start - placed
            touch = own + np.array(radii[:number])
            b = relative @ direction
            under = b ** 2 - (relative ** 2).sum(1) + touch ** 2
            if (under > 0).any():
                times = np.where(under > 0, -b - np.sqrt(np.maximum(under, 0)), np.inf)
                placed = np.vstack([placed, start + times.min() * direction])
                break
    return placed * separation


def pair_coherence(positions_C3: np.ndarray, view: View, coherence_A: float = np.inf) -> np.ndarray:
    """Visibility of the fringes of every pair of copies, (C, C) with a diagonal of 1.

    A distance beyond ``coherence_A`` leaves none; the finite size of a sample point (the fringes
    are averaged over it) leaves sinc(dx a) sinc(dy a), with a its width in 1/A.
    """
    apart = positions_C3[:, None] - positions_C3[None]
    width = view.step_m / (view.distance_m * view.wavelength_A)
    seen = np.sinc(apart[..., 0] * width) * np.sinc(apart[..., 1] * width)
    seen[(apart ** 2).sum(-1) > coherence_A ** 2] = 0
    np.fill_diagonal(seen, 1)
    return seen


def check_reach(one: Copy, view: View) -> None:
    """Raises :class:`ConfigurationError` when a mesh does not reach the corner of the image."""
    if len(one.volume_XYZ) // 2 * one.voxel_A < 0.9 * view.s_max_A and not one.fades:
        raise ConfigurationError(
            f"an image out to {view.s_max_A:.4f} 1/A was asked for; the mesh of the particle "
            f"reaches {len(one.volume_XYZ) // 2 * one.voxel_A:.4f} 1/A; take more points")


def expected_photons(copies: Sequence[Copy], view: View, photons_m2: float,
                     coherence_A: float = np.inf) -> np.ndarray:
    """Mean expected photons per *detector pixel* in every pixel of the image, float32 (H, W).

    ``photons_m2`` is the fluence.  Copies of weight 0 and no copies at all give zeros.
    Raises :class:`ConfigurationError` when a mesh does not reach the corner of the image.
    """
    x_W, y_H = view.x_W, view.y_H
    if not copies:
        return np.zeros(view.shape, np.float32)
    wavenumber = 1 / view.wavelength_A
    amplitudes_CHW = np.empty((len(copies), len(y_H), len(x_W)), np.complex64)
    for number, one in enumerate(copies):
        check_reach(one, view)
        ewald_slice.slice(np.asarray(one.volume_XYZ), one.matrix_33, x_W, y_H, view.distance_m,
                          wavenumber, amplitudes_CHW[number])
        if one.weight != 1:
            amplitudes_CHW[number] *= np.float32(one.weight)
    positions_C3 = np.stack([one.position_3 for one in copies])
    pairs = pair_coherence(positions_C3, view, coherence_A)
    out_HW = np.empty(amplitudes_CHW.shape[1:], np.float32)
    scale = photons_m2 * ELECTRON_RADIUS_M ** 2 * view.pixel_size_m ** 2
    ewald_slice.combine(amplitudes_CHW, positions_C3.astype(np.float32), pairs.astype(np.float32),
                        x_W, y_H, view.distance_m, wavenumber, scale, out_HW)
    return np.maximum(view.pooled(out_HW), 0)       # rounding where copies cancel


# --- the reference --------------------------------------------------------------------------------

def _scattering(x_W: np.ndarray, y_H: np.ndarray, distance_m: float,
                wavelength_A: float) -> tuple[np.ndarray, np.ndarray]:
    """(s_HW3 in 1/A, polarisation and solid angle of a unit area HW), float64."""
    x, y = np.broadcast_arrays(x_W.astype(np.float64)[None, :], y_H.astype(np.float64)[:, None])
    r = np.sqrt(x ** 2 + y ** 2 + distance_m ** 2)
    s_HW3 = np.stack([x / r, y / r, distance_m / r - 1], axis=-1) / wavelength_A
    return s_HW3, (1 - (x / r) ** 2) * distance_m / r ** 3


def slice_reference(volume_XYZ: np.ndarray, matrix_33: np.ndarray, x_W: np.ndarray,
                    y_H: np.ndarray, distance_m: float, wavelength_A: float) -> np.ndarray:
    """What the compiled slice does, in numpy: complex128 (H, W)."""
    n = len(volume_XYZ)
    s_HW3, _ = _scattering(x_W, y_H, distance_m, wavelength_A)
    at = np.clip(s_HW3 @ matrix_33.T.astype(np.float64) + (n - 1) / 2, 0, n - 1)
    low = np.minimum(at.astype(int), n - 2)
    share = at - low
    total = np.zeros(at.shape[:2], np.complex128)
    for corner in np.ndindex(2, 2, 2):
        weight = np.prod(np.where(corner, share, 1 - share), axis=-1)
        index = low + corner
        total += weight * volume_XYZ[index[..., 0], index[..., 1], index[..., 2]]
    return total


def intensity_reference(amplitudes_CHW: np.ndarray, positions_C3: np.ndarray, pairs_CC: np.ndarray,
                        x_W: np.ndarray, y_H: np.ndarray, distance_m: float, wavelength_A: float,
                        scale: float) -> np.ndarray:
    """What the compiled sum of copies does, in numpy: float64 (H, W)."""
    s_HW3, factor_HW = _scattering(x_W, y_H, distance_m, wavelength_A)
    waves = amplitudes_CHW * np.exp(2j * np.pi * np.einsum("hwi,ci->chw", s_HW3, positions_C3))
    return scale * factor_HW * np.einsum("chw,cd,dhw->hw", waves, pairs_CC, waves.conj()).real
