"""Bragg spots of one crystal in one pulse: which, where, how strong, what shape.

Excitation error, partiality, intensity and spot shape as in the specification of simulated
stills: q = R A* h, k = 1/lambda, eps = |q + k z| - k,
gamma^2 = (0.45/L)^2 + (eta |q| / 2)^2 + (dlambda |q|^2 / 2)^2, partiality exp(-eps^2/2 gamma^2).
The specification has 1/L, which is nearer a full width than the standard deviation that gamma is:
0.45/L is that of the sinc^2 of a block of length L, and takes the median correlation of
intensities with a peer's stills from 0.86 to 0.99.
Axes: N spots.  Lab frame: z along the beam, y up; lengths in angstrom and metres as named.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from xfel_classify.simulate.crystal import Reflections

__all__ = ["HC_EV_A", "Spots", "paint", "predict"]

HC_EV_A = 12398.419843
_REACH = 4.0           # |eps| < 4 gamma is kept
_BLOCK_WIDTH = 0.45    # standard deviation of a block's reflection, in 1/L


@dataclass(frozen=True)
class Spots:
    """Predicted spots, positions on the plane at ``distance_m``.

    ``photons_N`` is the expected integrated intensity; ``radial_m_N`` and ``tangential_m_N``
    are the Gaussian widths (sigma) that the crystal and the spectrum add to the detector's
    point spread, along and across the direction from the beam.
    """

    x_m_N: np.ndarray
    y_m_N: np.ndarray
    photons_N: np.ndarray
    radial_m_N: np.ndarray
    tangential_m_N: np.ndarray
    d_A_N: np.ndarray
    hkl_N3: np.ndarray
    excitation_N: np.ndarray

    def __len__(self) -> int:
        return len(self.x_m_N)

    def take(self, keep: np.ndarray) -> Spots:
        """The spots selected by a mask or index array."""
        return Spots(*(getattr(self, name)[keep] for name in self.__dataclass_fields__))

    @staticmethod
    def join(parts: list[Spots]) -> Spots:
        """All spots of several lattices."""
        return Spots(*(np.concatenate([getattr(p, name) for p in parts])
                       for name in Spots.__dataclass_fields__))


def partiality_width(q2_N: np.ndarray, domain_A: float, mosaicity_rad: float, bandwidth: float,
                     wavelength_A: float) -> np.ndarray:
    """gamma in 1/A of reflections at |q|^2; ``bandwidth`` is dlambda/lambda."""
    return np.sqrt((_BLOCK_WIDTH / domain_A) ** 2 + (0.5 * mosaicity_rad) ** 2 * q2_N
                   + (0.5 * bandwidth * wavelength_A * q2_N) ** 2)


def predict(table: Reflections, rotation_33: np.ndarray, *, photon_energy_eV: float,
            distance_m: float, domain_A: float, mosaicity_rad: float, bandwidth: float,
            scale: float, extra_B_A2: float = 0.0, polarization: float = 1.0,
            width_N: np.ndarray | None = None) -> Spots:
    """Spots of one lattice; expected photons = scale |F|^2 p/(gamma L) LP exp(-2 dB s^2).

    ``width_N`` are precomputed :func:`partiality_width` values of the table.  ``polarization``
    is the share polarised along x.  Photons include the obliquity cos^3(2 theta) of a flat
    detector.  Reflections that do not reach the forward half-space are dropped.
    """
    k = photon_energy_eV / HC_EV_A
    if width_N is None:
        width_N = partiality_width(table.q2_N, domain_A, mosaicity_rad, bandwidth, 1.0 / k)
    orient = rotation_33 @ table.basis_33
    # eps = sqrt(k^2 + 2 k qz + q^2) - k is, to first order, qz + q^2/2k: needs only q's z
    coarse = table.hkl_N3 @ orient[2].astype(np.float32)
    coarse += table.q2_N * np.float32(0.5 / k)
    np.abs(coarse, out=coarse)
    index = np.nonzero(coarse < (_REACH + 0.3) * width_N)[0]
    hkl = table.hkl_N3[index]
    q = hkl.astype(np.float64) @ orient.T
    q2 = np.einsum("ni,ni->n", q, q)
    radius = np.sqrt(np.maximum(k * k + 2 * k * q[:, 2] + q2, 0))
    excitation = radius - k
    gamma = width_N[index].astype(np.float64)
    along = q[:, 2] + k
    keep = (np.abs(excitation) < _REACH * gamma) & (along > 0.05 * k)
    index, hkl, q, q2, radius = index[keep], hkl[keep], q[keep], q2[keep], radius[keep]
    excitation, gamma, along = excitation[keep], gamma[keep], along[keep]
    x, y = distance_m * q[:, 0] / along, distance_m * q[:, 1] / along
    cos_2theta = along / radius
    horizontal, vertical = (q[:, 0] / radius) ** 2, (q[:, 1] / radius) ** 2
    factor = polarization * (1 - horizontal) + (1 - polarization) * (1 - vertical)
    photons = (scale * table.intensity_N[index]
               * np.exp(-0.5 * (excitation / gamma) ** 2) / (gamma * domain_A)
               * factor * cos_2theta ** 3 * np.exp(-0.5 * extra_B_A2 * q2))
    distance = np.hypot(x, y)
    # FWHM-like full spreads -> sigma: 1/2.355
    radial = distance * bandwidth / 2.355 / cos_2theta ** 2
    tangential = distance * mosaicity_rad / 2.355
    return Spots(x, y, photons, radial, tangential, 1.0 / np.sqrt(q2), hkl, excitation)


def paint(expected_SF: np.ndarray, fs_N: np.ndarray, ss_N: np.ndarray, photons_N: np.ndarray,
          covariance_N22: np.ndarray, half: int | None = None) -> None:
    """Add Gaussian spots to one panel's expected photons, in place.

    ``covariance_N22`` in pixels^2 over (fs, ss).  Each spot is sampled at pixel centres within
    ``half`` pixels (4 sigma of the widest spot by default, at most 12), normalised to its
    photons, and cut off at the panel's edge.
    """
    if len(fs_N) == 0:
        return
    height, width = expected_SF.shape
    if half is None:
        widest = float(np.sqrt(np.max(covariance_N22[:, [0, 1], [0, 1]])))
        half = int(np.clip(np.ceil(4 * widest), 3, 12))
    step = np.arange(-half, half + 1)
    f0, s0 = np.rint(fs_N).astype(int), np.rint(ss_N).astype(int)
    df = step[None, :] - (fs_N - f0)[:, None]
    ds = step[None, :] - (ss_N - s0)[:, None]
    a, b, d = covariance_N22[:, 0, 0], covariance_N22[:, 0, 1], covariance_N22[:, 1, 1]
    determinant = a * d - b * b
    power = ((d / determinant)[:, None, None] * (df ** 2)[:, None, :]
             + (a / determinant)[:, None, None] * (ds ** 2)[:, :, None]
             - (2 * b / determinant)[:, None, None] * ds[:, :, None] * df[:, None, :])
    patch = np.exp(-0.5 * power)
    patch *= (photons_N / patch.sum(axis=(1, 2)))[:, None, None]
    rows = np.broadcast_to((s0[:, None] + step)[:, :, None], patch.shape)
    columns = np.broadcast_to((f0[:, None] + step)[:, None, :], patch.shape)
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    flat = rows[inside] * width + columns[inside]
    low, high = int(flat.min(initial=0)), int(flat.max(initial=0)) + 1
    added = np.bincount(flat - low, weights=patch[inside], minlength=high - low)
    expected_SF.reshape(-1)[low:high] += added.astype(expected_SF.dtype)
