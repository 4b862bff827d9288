"""The Fourier transform of a particle on a cube of scattering vectors.

F(s) = sum over atoms of f(|s|/2) exp(2 pi i s r), with s = (k_out - k_in) / (2 pi) in 1/A, as
methods section 7.1.  The atoms are spread onto a periodic grid with a smooth kernel, transformed by
one FFT, and divided by the kernel's transform (a type-1 non-uniform FFT, [Barnett et al., SIAM J.
Sci. Comput. 41 (2019) C479]).  Form factors of different elements differ so little at these angles
that two functions of |s| reproduce all of them: they travel as real and imaginary part.  The error
is below 1e-3 of the amplitude that as many atoms would have at random places.

Volumes are kept on disk (``.npy``, mapped into memory, so that worker processes share them).

Axes: N atom, XYZ mesh point.
"""
from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..core import ConfigurationError
from ..native import ewald_slice
from .cache import cache_directory
from .spi_particles import Particle

__all__ = ["PAPER_MESH", "PAPER_VOXEL", "amplitudes_direct", "form_factor", "mesh_for",
           "particle_volume", "volume_directory", "volume_of_points"]

log = logging.getLogger(__name__)

PAPER_VOXEL = 2 * 0.0684031105 / 150    # 1/A: from corner to corner of the paper's detector
PAPER_MESH = 151
OVERSAMPLING = 1.5
VERSION = 1             # of the formulas: a cached volume of another version is not looked at
WATER_E_A3 = 0.334      # electrons per cubic angstrom

# f(s) = sum a_i exp(-b_i s^2 / 4) + c, [Waasmaier & Kirfel, Acta Cryst. A51 (1995) 416]: a, b, c.
_WAASMAIER_KIRFEL = {
    1: ((0.413048, 0.294953, 0.187491, 0.080701, 0.023736),
        (15.569946, 32.398468, 5.711404, 61.889874, 1.334118), 0.000049),
    6: ((2.657506, 1.078079, 1.490909, -4.241070, 0.713791),
        (14.780758, 0.776775, 42.086842, -0.000239, 0.239535), 4.297983),
    7: ((11.893780, 3.277479, 1.858092, 0.858927, 0.912985),
        (0.000158, 10.232723, 30.344690, 0.656065, 0.217287), -11.804902),
    8: ((2.960427, 2.508818, 0.637853, 0.722838, 1.142756),
        (14.182259, 5.936858, 0.112726, 34.958481, 0.390240), 0.027014),
    15: ((1.950541, 4.146930, 1.494560, 1.522042, 5.729711),
         (0.908139, 27.044952, 0.071280, 67.520187, 1.981173), 0.155233),
    16: ((6.372157, 5.154568, 1.473732, 1.635073, 1.209372),
         (1.514347, 22.092527, 0.061373, 55.445175, 0.646925), 0.154722),
}
# The rarer ones of packaged particles: [International Tables C (1992), table 6.1.1.4].
_TABLES_C = {
    17: ((11.4604, 7.1964, 6.2556, 1.6455), (0.0104, 1.1662, 18.5194, 47.7784), -9.5574),
    20: ((8.6266, 7.3873, 1.5899, 1.0211), (10.4421, 0.6599, 85.7484, 178.437), 1.3751),
    30: ((14.0743, 7.0318, 5.1652, 2.4100), (3.2655, 0.2333, 10.3163, 58.7097), 1.3041),
}


def form_factor(number: int, s_A: np.ndarray) -> np.ndarray:
    """Electrons that atom ``number`` scatters with at |s| = 2 sin(theta) / lambda, in 1/A.

    Elements outside of the tables here are looked up with gemmi (International Tables C).
    """
    a: tuple[float, ...]
    b: tuple[float, ...]
    if number in _WAASMAIER_KIRFEL:
        a, b, c = _WAASMAIER_KIRFEL[number]
    elif number in _TABLES_C:
        a, b, c = _TABLES_C[number]
    else:
        import gemmi

        values = gemmi.Element(number).it92
        if number == 0 or values is None:
            raise ConfigurationError(f"an atom of element {number} was found in a structure; no "
                                     "form factor is known for it; remove it from the file")
        coefficients = values.get_coefs()
        a, b, c = tuple(coefficients[:4]), tuple(coefficients[4:8]), coefficients[8]
    quarter = np.asarray(s_A, np.float64)[..., None] ** 2 / 4
    return (np.array(a) * np.exp(-np.array(b) * quarter)).sum(-1) + c


def mesh_for(s_max_A: float, voxel_A: float = PAPER_VOXEL) -> int:
    """Odd number of mesh points a side that cover |s| up to ``s_max_A``; the paper's is 151."""
    return 2 * int(np.ceil(s_max_A / voxel_A - 1e-3)) + 1


def amplitudes_direct(particle: Particle, s_N3: np.ndarray) -> np.ndarray:
    """F at some scattering vectors (1/A) by the direct sum: the reference, complex128 (N,)."""
    s_N3 = np.asarray(s_N3, np.float64)
    total = np.zeros(len(s_N3), np.complex128)
    length = np.linalg.norm(s_N3, axis=1)
    for number in np.unique(particle.number_N):
        chosen = particle.number_N == number
        atoms = particle.atoms_N3[chosen].astype(np.float64)
        weight = particle.weight_N[chosen].astype(np.float64)
        sums = np.array([(weight * np.exp(2j * np.pi * (atoms @ s))).sum() for s in s_N3])
        total += form_factor(int(number), length) * sums
    return total


# --- the transform --------------------------------------------------------------------------------

def _smooth_length(least: float) -> int:
    """The smallest even number from ``least`` on without prime factors above 5."""
    n = int(np.ceil(least / 2)) * 2
    while True:
        rest = n
        for p in (2, 3, 5):
            while rest % p == 0:
                rest //= p
        if rest == 1:
            return n
        n += 2


def _kernel_transform(mesh: int, n: int, beta: float) -> np.ndarray:
    """Fourier transform of the spreading kernel at the frequencies of the mesh, (mesh,)."""
    z, weight = np.polynomial.legendre.leggauss(64)
    half = ewald_slice.WIDTH / 2
    value = np.exp(beta * (np.sqrt(1 - z ** 2) - 1)) * weight * half
    k = np.arange(mesh) - mesh // 2
    return np.cos(2 * np.pi * np.outer(k, z * half) / n) @ value


def volume_of_points(points_N3: np.ndarray, weights_N2: np.ndarray, mesh: int,
                     voxel_A: float) -> tuple[np.ndarray, np.ndarray]:
    """Transforms of two sets of real weights at the same points: complex64 (XYZ), (XYZ).

    ``points_N3`` in angstrom, within 1 / (2 voxel) of the origin; sum of w exp(2 pi i s r).
    """
    n = _smooth_length(max(OVERSAMPLING * mesh, 2 * ewald_slice.WIDTH))
    beta = 0.97 * np.pi * ewald_slice.WIDTH * (1 - 0.5 * mesh / n)
    turns = np.asarray(points_N3, np.float64) * voxel_A
    if np.abs(turns).max() >= 0.5:
        raise ConfigurationError(
            f"a particle reaches {np.abs(points_N3).max():.0f} A from its centre; a mesh of "
            f"{voxel_A:.2e} 1/A holds {0.5 / voxel_A:.0f} A; take a finer mesh")
    grid = np.zeros((n, n, n), np.complex64)
    ewald_slice.spread(np.ascontiguousarray((turns % 1.0) * n % n),
                       np.ascontiguousarray(weights_N2, np.float32), grid, beta)
    index = (np.arange(mesh) - mesh // 2) % n
    # one axis at a time, dropping what the mesh does not need
    part: np.ndarray = grid
    for axis in range(3):
        part = np.fft.ifft(part, axis=axis, norm="forward")
        part = np.take(part, index, axis=axis).astype(np.complex64, copy=False)
    one = 1 / _kernel_transform(mesh, n, beta)
    part *= (one[:, None, None] * one[:, None] * one).astype(np.float32)
    mirrored = np.conj(part[::-1, ::-1, ::-1])
    return ((part + mirrored) * np.float32(0.5),
            (part - mirrored) * np.complex64(-0.5j))


def _lengths(mesh: int, voxel_A: float) -> np.ndarray:
    axis = (np.arange(mesh) - mesh // 2) * voxel_A
    return np.sqrt(axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis ** 2)


def _two_functions(numbers: np.ndarray, amounts: np.ndarray,
                   s_max_A: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(s_K, two functions (2, K), coefficients (E, 2)) that reproduce the form factors, those of
    the elements with the largest ``amounts`` best."""
    s = np.linspace(0, s_max_A, 400)
    table = np.stack([form_factor(int(number), s) for number in numbers])
    if len(numbers) == 1:
        return s, np.stack([table[0], np.zeros_like(s)]), np.array([[1.0, 0.0]])
    _, _, rows = np.linalg.svd(table * amounts[:, None], full_matrices=False)
    return s, rows[:2], table @ rows[:2].T


def _transform(particle: Particle, mesh: int, voxel_A: float, hydration_A: float) -> np.ndarray:
    numbers, kind = np.unique(particle.number_N, return_inverse=True)
    amounts = np.bincount(kind, particle.weight_N, minlength=len(numbers))
    s, functions, coefficients = _two_functions(numbers, amounts,
                                                np.sqrt(3) * (mesh // 2) * voxel_A)
    weights = coefficients[kind] * particle.weight_N[:, None]
    first, second = volume_of_points(particle.atoms_N3, weights, mesh, voxel_A)
    length = _lengths(mesh, voxel_A)
    total = first * np.interp(length, s, functions[0]).astype(np.float32)
    total += second * np.interp(length, s, functions[1]).astype(np.float32)
    if hydration_A > 0:
        points, electrons = _shell(particle, hydration_A)
        water, _ = volume_of_points(points, np.stack([electrons, 0 * electrons], 1), mesh, voxel_A)
        total += water * (form_factor(8, length) / 8).astype(np.float32)
    return total


def _shell(particle: Particle, thickness_A: float, step_A: float = 3.0,
           ) -> tuple[np.ndarray, np.ndarray]:
    """Points of a water layer over the surface and their electrons: cells of a 3 A grid that are
    within ``thickness_A`` of an atom but not within 3 A."""
    low = particle.atoms_N3.min(0) - thickness_A - 3 * step_A
    cell = np.floor((particle.atoms_N3 - low) / step_A).astype(int)
    shape = cell.max(0) + int(thickness_A / step_A) + 5
    body = np.zeros(shape, bool)
    body[tuple(cell.T)] = True
    body = _grown(body, 1)
    shell = _grown(body, max(1, round(thickness_A / step_A))) & ~body
    points = low + (np.argwhere(shell) + 0.5) * step_A
    return points, np.full(len(points), WATER_E_A3 * step_A ** 3)


def _grown(mask: np.ndarray, times: int) -> np.ndarray:
    for _ in range(times):
        grown = mask.copy()
        for axis in range(3):
            for shift in (1, -1):
                grown |= np.roll(mask, shift, axis)
        mask = grown
    return mask


# --- the cache ------------------------------------------------------------------------------------

def volume_directory() -> Path:
    """``spi_volumes`` in the cache directory."""
    return cache_directory() / "spi_volumes"


def cached_volume(name: str, key: str, mesh: int, make: Callable[[], np.ndarray]) -> np.ndarray:
    """``make()`` (complex64, a cube of ``mesh``), or what an earlier call left under ``key``.

    A directory that cannot be written costs time, not the result.
    """
    path = volume_directory() / f"{name}-{key[:20]}.npy"
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
        if found.shape == (mesh,) * 3 and found.dtype == np.complex64:
            return found
        log.warning("%s is not the volume it should be and is made again", path)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        log.warning("%s cannot be read (%s) and is made again", path, error)
    volume = np.ascontiguousarray(make(), np.complex64)
    unfinished = path.with_name(f"{path.stem}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("wb") as stream:
            np.save(stream, volume, allow_pickle=False)
        unfinished.replace(path)
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        log.warning("the volume of %s cannot be kept in %s (%s); every process makes its own",
                    name, path.parent, error)
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        return volume


@functools.lru_cache(maxsize=64)
def _opened(particle_key: str, mesh: int, voxel_A: float, hydration_A: float,
            holder: _Held) -> np.ndarray:
    words = f"{VERSION} {particle_key} {mesh} {voxel_A:.12e} {hydration_A:.3f}"
    key = hashlib.sha256(words.encode()).hexdigest()
    return cached_volume(Path(holder.particle.source).name.split(".")[0], key, mesh, lambda:
                         _transform(holder.particle, mesh, voxel_A, hydration_A))


class _Held:
    """Lets a particle ride along without being part of the key of a memory cache."""

    def __init__(self, particle: Particle) -> None:
        self.particle = particle

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Held)

    def __hash__(self) -> int:
        return 0


def particle_volume(particle: Particle, mesh: int = PAPER_MESH, voxel_A: float = PAPER_VOXEL,
                    hydration_A: float = 0.0) -> np.ndarray:
    """F of the particle, complex64 (mesh, mesh, mesh), read-only; index (i, j, k) is the vector
    s = (i - mesh // 2, j - mesh // 2, k - mesh // 2) voxel.

    Made in seconds the first time and kept in :func:`volume_directory` under a key over atoms and
    parameters.  ``hydration_A`` adds a layer of water of that thickness.
    """
    return _opened(particle.digest, mesh, float(voxel_A), float(hydration_A), _Held(particle))
