"""Single-particle images from their conditions: what training sets and raw runs are made of.

Axes: H image row (0 on top), W image column (towards +x).
"""
from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .spi_bodies import BODY_VOXEL, body_volume
from .spi_conditions import (
    PAPER_FLUENCE,
    SPI_PARTICLES,
    SPI_UNSEEN,
    SpiConditions,
    draw_spi,
    spi_preset,
)
from .spi_detector import add_surroundings, detect, working_pixels
from .spi_diffraction import Copy, View, ballistic_cluster, expected_photons, rotation_matrix
from .spi_particles import load_particle, structure_directory
from .spi_volume import PAPER_VOXEL, mesh_for, particle_volume

__all__ = ["PAPER_FLUENCE", "SPI_LABELS", "SPI_PARTICLES", "SPI_UNSEEN", "SpiImage", "copies_of",
           "draw_spi", "simulate_spi", "spi_image", "spi_labels", "view_of"]

SPI_LABELS = ("count", "particle", "diameter_A", "distance_m", "photons", "quality")
PROTEIN_E_A3 = 0.43         # electrons per cubic angstrom
WATER_E_A3 = 0.334
_SAMPLE = 61                # purpose of random numbers


@dataclass(frozen=True)
class SpiImage:
    """One image.  ``image_HW``: mean photons per working detector pixel, float32, 0 where none
    works; ``expected_HW`` the same before counting, everywhere; ``good_HW`` pixels of which at
    least one detector pixel works; ``photons`` expected from the particles on the whole window."""

    conditions: SpiConditions
    image_HW: np.ndarray = field(repr=False)
    expected_HW: np.ndarray = field(repr=False)
    good_HW: np.ndarray = field(repr=False)
    photons: float
    diameter_A: float


def view_of(c: SpiConditions, oversample: int | None = None) -> View:
    """The sample points of an image, the beam where this event has it."""
    first = (c.first_px[0] + c.center_jitter_px[0], c.first_px[1] + c.center_jitter_px[1])
    if oversample is None:
        oversample = 2 if c.block >= 8 else 1
    return View(c.shape, c.block, first, c.pixel_size_m, c.distance_m, c.wavelength_A, oversample)


def copies_of(c: SpiConditions, structures: str | Path | None = None,
              mesh: int | None = None) -> list[Copy]:
    """The particles in the beam: transforms, orientations and positions.

    ``mesh`` overrides how many points a side the transforms have.
    """
    rng = np.random.default_rng([*c.code, _SAMPLE])
    if c.kind != "particles":
        return _bodies(c, rng)
    return _particles(c, rng, structures, mesh or _mesh(c))


def _turn(rng: np.random.Generator) -> np.ndarray:
    quaternion = rng.standard_normal(4)
    return rotation_matrix(quaternion / np.linalg.norm(quaternion))


def _mesh(c: SpiConditions) -> int:
    """Mesh points a side that cover every image of the preset."""
    preset = spi_preset(c.preset)
    widest = dataclasses.replace(view_of(c), distance_m=preset.distance_m[0],
                                 first_px=c.first_px)
    return mesh_for(widest.s_max_A, PAPER_VOXEL / c.finer)


def _particles(c: SpiConditions, rng: np.random.Generator, structures: str | Path | None,
               mesh: int) -> list[Copy]:
    names = [c.particle] * c.count
    if c.mixed:
        others = [name for name in spi_preset(c.preset).particles if name != c.particle]
        names[1:] = [others[int(rng.integers(len(others)))] for _ in names[1:]]
    particles = [load_particle(name, structures) for name in names]
    turns = [_turn(rng) for _ in particles]
    positions = ballistic_cluster(rng, [p.radius_A for p in particles], c.separation)
    if not c.center:
        positions = positions + np.stack([t @ p.origin_3 for t, p in zip(turns, particles,
                                                                         strict=True)])
    voxel = PAPER_VOXEL / c.finer
    return [Copy(particle_volume(p, mesh, voxel, c.hydration_A), voxel, turn, at)
            for p, turn, at in zip(particles, turns, positions, strict=True)]


def _body(shape: str, diameter_A: float, turn: np.ndarray, at: np.ndarray,
          density: float) -> Copy:
    return Copy(body_volume(shape), BODY_VOXEL / diameter_A, turn, at, density * diameter_A ** 3,
                fades=True)


def _shelled(rng: np.random.Generator, shape: str, diameter_A: float, at: np.ndarray) -> list[Copy]:
    """A body of protein; half of them with a core of another density."""
    turn = _turn(rng)
    density = PROTEIN_E_A3 * rng.uniform(0.9, 1.1)
    parts = [_body(shape, diameter_A, turn, at, density)]
    core, change = rng.uniform(0.6, 0.9), rng.uniform(-0.25, 0.25)
    if rng.random() < 0.5:
        parts.append(_body(shape, core * diameter_A, turn, at, density * change))
    return parts


def _bodies(c: SpiConditions, rng: np.random.Generator) -> list[Copy]:
    if c.kind == "contaminant":
        return _contaminant(c, rng)
    copies: list[Copy] = []
    places: list[np.ndarray] = []
    for number in range(c.count):
        size = c.diameter_A if number == 0 else float(rng.uniform(*spi_preset(c.preset).diameter_A))
        at = np.zeros(3)
        while number and (not places or min(np.linalg.norm(at - p) for p in places) < 1000.0):
            direction = rng.standard_normal(3)
            at = direction / np.linalg.norm(direction) * rng.uniform(3000.0, 15000.0)
        places.append(at)
        copies += _shelled(rng, c.particle, size, at)
    return copies


def _contaminant(c: SpiConditions, rng: np.random.Generator) -> list[Copy]:
    """A cluster of small spheres, a water droplet, or a body of quite another size."""
    what, still = int(rng.integers(3)), np.eye(3)
    if what == 0:
        sizes = list(rng.uniform(0.15, 0.6, int(rng.integers(3, 9))) * c.diameter_A)
        places = ballistic_cluster(rng, [0.5 * size for size in sizes])
        return [_body("sphere", size, still, at, PROTEIN_E_A3 * rng.uniform(0.8, 1.2))
                for size, at in zip(sizes, places - places.mean(0), strict=True)]
    if what == 1:
        size = rng.uniform(0.5, 1.1) * spi_preset(c.preset).diameter_A[1]
        return [_body("sphere", size, still, np.zeros(3), WATER_E_A3)]
    return _shelled(rng, c.particle, rng.uniform(0.3, 0.6) * c.diameter_A, np.zeros(3))


def spi_image(conditions: SpiConditions, structures: str | Path | None = None,
              device: str = "") -> SpiImage:
    """Simulate one image, with what it is made of.

    ``device`` "cuda", "cuda:1" or "cpu-torch" computes the diffraction with torch
    (:mod:`.spi_torch`); photons are counted by the host.
    """
    directory = structure_directory(structures) if conditions.kind == "particles" else None
    return _image(conditions, None if directory is None else str(directory.resolve()), device)


@functools.lru_cache(maxsize=2)
def _image(c: SpiConditions, structures: str | None, device: str) -> SpiImage:
    copies = copies_of(c, structures)
    particles_HW = expected_on(device, copies, view_of(c), c.photons_um2 * 1e12, c.coherence_A)
    expected_HW = add_surroundings(c, particles_HW)
    diameter = c.diameter_A
    if c.kind == "particles" and structures is not None:
        diameter = 2 * load_particle(c.particle, structures).radius_A
    return SpiImage(c, detect(c, expected_HW), expected_HW, working_pixels(c) > 0,
                    float(particles_HW.sum(dtype=np.float64)) * c.block ** 2, diameter)


def expected_on(device: str, copies: list[Copy], view: View, photons_m2: float,
                coherence_A: float) -> np.ndarray:
    """Expected photons by the compiled code, or by torch where a device is named."""
    if not device:
        return expected_photons(copies, view, photons_m2, coherence_A)
    from .spi_torch import expected_photons_torch

    return expected_photons_torch(copies, view, photons_m2, coherence_A, device)


def simulate_spi(conditions: SpiConditions, structures: str | Path | None = None,
                 device: str = "") -> np.ndarray:
    """Mean photons per detector pixel in every pixel of the image, float32 (H, W).

    (128, 128) for every preset but ``pr772``, whose window is (123, 240).  Gaps and masked pixels
    are 0.  ``structures`` is a directory of real entries, see :mod:`.spi_particles`.
    """
    return spi_image(conditions, structures, device).image_HW.copy()


def spi_labels(conditions: SpiConditions, structures: str | Path | None = None,
               device: str = "") -> dict[str, float | int]:
    """What a network may learn of an image, by name (:data:`SPI_LABELS`).

    ``count`` 0 to 3 for one to four copies (4: five; -1: a blank or a contaminant); ``particle``
    0 to 10, -1 unknown; ``diameter_A``; ``distance_m``; ``photons`` expected from the particles on
    the window, without losses; ``quality`` 1 for a single particle, else 0.  Ask right after
    :func:`simulate_spi` of the same conditions: the image is then not computed again.
    """
    c = conditions
    made = spi_image(c, structures, device)
    return {"count": c.count - 1 if c.kind in ("particles", "good", "bad") else -1,
            "particle": -1 if c.mixed else c.particle_index, "diameter_A": made.diameter_A,
            "distance_m": c.distance_m, "photons": made.photons,
            "quality": int(c.count == 1 and c.kind in ("particles", "good"))}
