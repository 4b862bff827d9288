"""How well the particle of a single hit can be told at all: the image against all orientations.

A classifier that knows the simulator: each candidate's expected photons at an orientation, the
likelihood of the counted ones, the candidate with the larger likelihood.  Fluence is not told: the
likelihood is that of the counts given their sum.

1. Coarse: a library of evenly spread orientations of every candidate, on the middle half of the
   image in blocks of two.
2. Fine: from the best of them the likelihood is climbed in the three angles (Fisher scoring), first
   on the coarse pixels, then on all.

No classifier is better than the one that weighs all orientations (Bayes).  ``fine`` takes the best
orientation instead, which comes to the same where photons are many; ``coarse`` weighs those of the
library, on the coarse pixels only.  Both can be reached, so the bound lies at or above the better
one; a search that misses the best orientation makes ``fine`` worse than the bound, never better.

Axes: N images, P candidate particle, R orientation, H row, W column.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..simulate.spi_conditions import SpiConditions
from ..simulate.spi_diffraction import Copy, View, expected_photons, rotation_matrix
from ..simulate.spi_images import view_of
from ..simulate.spi_particles import load_particle
from ..simulate.spi_volume import PAPER_VOXEL, particle_volume

__all__ = ["Matches", "Matching", "rotations"]

START_RAD = 0.02        # of the first numerical derivative
SUMMIT_RAD = 0.03       # climbs that end closer than this have found the same maximum
HALF_TURN_33 = np.diag((-1.0, -1.0, 1.0))       # about the beam
FLOOR = 1e-4            # of a template against its mean: a pixel without photons is never certain


def rotations(count: int) -> np.ndarray:
    """``count`` evenly spread rotations (R, 3, 3): a super-Fibonacci spiral (M. Alexa, CVPR 2022).

    Neighbours are about (8 pi^2 / count)^(1/3) radians apart.
    """
    place_R = np.arange(count) + 0.5
    inner_R, outer_R = np.sqrt(place_R / count), np.sqrt(1 - place_R / count)
    first_R = 2 * np.pi * place_R / np.sqrt(2)
    second_R = 2 * np.pi * place_R / 1.533751168755204288118041
    quaternions_R4 = np.stack([inner_R * np.sin(first_R), inner_R * np.cos(first_R),
                               outer_R * np.sin(second_R), outer_R * np.cos(second_R)], 1)
    return np.stack([rotation_matrix(q) for q in quaternions_R4])


@dataclass(frozen=True)
class Matches:
    """Log likelihoods (N, P): the best orientation climbed to, and the mean over the library."""

    fine_NP: np.ndarray
    coarse_NP: np.ndarray
    turn_NP33: np.ndarray           # the orientation of ``fine``


class Matching:
    """Templates of some particles as they are seen under ``conditions`` (of one copy)."""

    def __init__(self, particles: Sequence[str], conditions: SpiConditions,
                 orientations: int = 50_000, starts: int = 12, finalists: int = 3) -> None:
        self.starts, self.finalists = starts, finalists
        height, width = conditions.shape
        self.full = view_of(conditions, 1)
        self.exact = view_of(conditions)
        self.coarse = View((height // 4, width // 4), conditions.block * 2,
                           (-height * conditions.block / 4, -width * conditions.block / 4),
                           conditions.pixel_size_m, conditions.distance_m,
                           conditions.wavelength_A, 1)
        self._volumes = [particle_volume(load_particle(name)) for name in particles]
        self._turns_R33 = rotations(orientations)
        self._log_PRF = np.stack([
            np.stack([np.log(self._shares(volume, turn_33, self.coarse))
                      for turn_33 in self._turns_R33]) for volume in self._volumes])

    def match(self, images_NHW: np.ndarray) -> Matches:
        """Of images in mean photons per detector pixel, the beam in the middle."""
        full_NF = images_NHW.reshape(len(images_NHW), -1) * self.full.block ** 2
        coarse_NF = self.coarse_counts(images_NHW).reshape(len(images_NHW), -1)
        shape = (len(images_NHW), len(self._volumes))
        fine_NP, coarse_NP = np.empty(shape), np.empty(shape)
        turn_NP33 = np.empty((*shape, 3, 3))
        for p, volume in enumerate(self._volumes):
            library_NR = coarse_NF.astype(np.float32) @ self._log_PRF[p].T
            for n, found_R in enumerate(library_NR.astype(np.float64)):
                coarse_NP[n, p] = found_R.max() + np.log(np.exp(found_R - found_R.max()).mean())
                begun = self._turns_R33[np.argsort(found_R)[-self.starts:]]
                climbed = [self._climb(volume, turn_33, coarse_NF[n], self.coarse)
                           for turn_33 in begun]
                ends = [self._climb(volume, turn_33, full_NF[n], self.full)[1]
                        for turn_33 in self._finalists(climbed)]
                values = [self.log_likelihood(images_NHW[n], p, end) for end in ends]
                fine_NP[n, p] = max(values)
                turn_NP33[n, p] = ends[int(np.argmax(values))]
        return Matches(fine_NP, coarse_NP, turn_NP33)

    def log_likelihood(self, image_HW: np.ndarray, particle: int, turn_33: np.ndarray) -> float:
        """Of an image, for one of the particles at an orientation; as in ``fine_NP``."""
        shares_F = self._shares(self._volumes[particle], turn_33, self.exact)
        return float(image_HW.ravel() * self.full.block ** 2 @ np.log(shares_F))

    def _finalists(self, climbed: Sequence[tuple[float, np.ndarray]]) -> list[np.ndarray]:
        """The best orientations, of those on one summit only one, and each after half a turn
        about the beam: that is the same picture but for the curvature of Ewald's sphere."""
        found: list[np.ndarray] = []
        for _, turn_33 in sorted(climbed, key=lambda one: -one[0]):
            if all(abs(np.trace(half_33 @ turn_33 @ other_33.T) - 3) > SUMMIT_RAD ** 2
                   for other_33 in found for half_33 in (np.eye(3), HALF_TURN_33)):
                found.append(turn_33)
        return [half_33 @ turn_33 for turn_33 in found[:self.finalists]
                for half_33 in (np.eye(3), HALF_TURN_33)]

    def coarse_counts(self, images_NHW: np.ndarray) -> np.ndarray:
        """Photons on the coarse pixels (N, H / 4, W / 4)."""
        n, h, w = images_NHW.shape
        middle = images_NHW[:, h // 4:h - h // 4, w // 4:w - w // 4] * self.full.block ** 2
        return middle.reshape(n, h // 4, 2, w // 4, 2).sum((2, 4))

    def _shares(self, volume: np.ndarray, turn_33: np.ndarray, view: View) -> np.ndarray:
        """Where a photon of the view falls: (H W,) float64 that sum to 1."""
        copy = Copy(volume, PAPER_VOXEL, turn_33, np.zeros(3))
        photons_F = expected_photons([copy], view, 1e30).ravel().astype(np.float64)
        photons_F += FLOOR * photons_F.mean()
        return photons_F / photons_F.sum()

    def _climb(self, volume: np.ndarray, turn_33: np.ndarray, counts_F: np.ndarray, view: View,
               steps: int = 10) -> tuple[float, np.ndarray]:
        """(log likelihood, orientation) at the maximum next to ``turn_33``."""
        shares_F = self._shares(volume, turn_33, view)
        value, damping, reach = counts_F @ np.log(shares_F), 1e-3, START_RAD
        for _ in range(steps):
            slope_3F = np.stack([self._shares(volume, turned(turn_33, reach * axis_3), view)
                                 - shares_F for axis_3 in np.eye(3)]) / reach
            gradient_3 = slope_3F @ (counts_F / shares_F)
            fisher_33 = counts_F.sum() * (slope_3F / shares_F) @ slope_3F.T
            while damping < 1e6:
                step_3 = np.linalg.solve(fisher_33 + damping * np.diag(np.diag(fisher_33)),
                                         gradient_3)
                step_3 *= min(1.0, 0.1 / max(float(np.linalg.norm(step_3)), 1e-12))
                tried_33 = turned(turn_33, step_3)
                tried_F = self._shares(volume, tried_33, view)
                found = counts_F @ np.log(tried_F)
                if found > value:
                    break
                damping = max(10 * damping, 1e-2)
            else:
                break
            gained, value, turn_33, shares_F = found - value, found, tried_33, tried_F
            damping /= 10
            reach = min(START_RAD, max(1e-3, float(np.linalg.norm(step_3))))
            if gained < 0.05:
                break
        return float(value), turn_33


def turned(turn_33: np.ndarray, by_3: np.ndarray) -> np.ndarray:
    """``turn_33``, then turned about ``by_3`` by its length in radians."""
    angle = float(np.linalg.norm(by_3))
    if angle == 0:
        return turn_33
    w, s = np.cos(angle / 2), np.sin(angle / 2) / angle
    return rotation_matrix((w, *(s * np.asarray(by_3)))) @ turn_33
