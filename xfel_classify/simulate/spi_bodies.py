"""Bodies of simple shape and their form factors (methods section 7.2).

f(s) = integral over the body of exp(2 pi i s r): polyhedra exactly by their faces and edges (the
divergence theorem applied twice, [Wuttke, J. Appl. Cryst. 54 (2021) 580]), solids of revolution by
slices along their axis, the sphere in closed form.  All bodies have a *diameter* of 1: twice the
largest distance from the centre.  All are symmetric under x -> -x, y -> -y, z -> -z, so that f is
real and one octant of it is enough.

Axes: N vector, F face, E edge, XYZ mesh point.
"""
from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable

import numpy as np

from ..core import ConfigurationError
from .spi_volume import cached_volume

__all__ = ["BODY_MESH", "BODY_VOXEL", "body_form_factor", "body_names", "body_vertices",
           "body_volume", "contains", "form_factor_of_polyhedron", "solid_volume"]

BODY_VOXEL = 1 / 6          # of the mesh, in units of 1 / diameter
BODY_MESH = 181             # out to 15 / diameter
GOLDEN = (1 + np.sqrt(5)) / 2
TORUS_RATIO = 2.0           # R : r
CAPSULE_RATIO = 2.0         # length : width
VERSION = 2


def body_names() -> tuple[str, ...]:
    return ("icosahedron", "truncated_icosahedron", "torus", "sphere", "dodecahedron", "capsule")


# --- polyhedra ------------------------------------------------------------------------------------

def _signed(*triples: tuple[float, float, float]) -> np.ndarray:
    """All sign changes and cyclic permutations of some triples, each point once."""
    found = set()
    for triple in triples:
        for signs in itertools.product((1, -1), repeat=3):
            point = [round(a * b, 12) + 0.0 for a, b in zip(triple, signs, strict=True)]
            found |= {tuple(point[i:] + point[:i]) for i in range(3)}
    return np.array(sorted(found))


_VERTICES: dict[str, Callable[[], np.ndarray]] = {
    "icosahedron": lambda: _signed((0, 1, GOLDEN)),
    "dodecahedron": lambda: _signed((1, 1, 1), (0, GOLDEN, 1 / GOLDEN)),
    "truncated_icosahedron": lambda: _signed(
        (0, 1, 3 * GOLDEN), (1, 2 + GOLDEN, 2 * GOLDEN), (GOLDEN, 2, 2 * GOLDEN + 1)),
}


@functools.cache
def body_vertices(name: str) -> np.ndarray:
    """Corners (M, 3) of a polyhedron of diameter 1."""
    points = _VERTICES[name]()
    return 0.5 * points / np.linalg.norm(points, axis=1).max()


@functools.cache
def _faces(name: str) -> tuple[np.ndarray, ...]:
    """Corners (K, 3) of every face, anticlockwise from outside."""
    points = body_vertices(name)
    faces = []
    for other in ("icosahedron", "dodecahedron"):       # their corners are all the face normals
        for normal in body_vertices(other) / 0.5:
            height = points @ normal
            corners = points[height > height.max() - 1e-9]
            if len(corners) < 3:
                continue
            middle = corners.mean(0)
            first = (corners[0] - middle) / np.linalg.norm(corners[0] - middle)
            second = np.cross(normal, first)
            angle = np.arctan2((corners - middle) @ second, (corners - middle) @ first)
            faces.append(corners[np.argsort(angle)])
    return tuple(faces)


def _unit_sinc(x: np.ndarray) -> np.ndarray:
    return np.sinc(x / np.pi)


def _outward(corners: np.ndarray) -> np.ndarray:
    normal = np.cross(corners[1] - corners[0], corners[2] - corners[1])
    return normal / np.linalg.norm(normal)


def _over_face(corners: np.ndarray, q: np.ndarray, even: bool) -> tuple[np.ndarray, np.ndarray]:
    """(q along the normal, integral of exp(i q r) over the face), both (N,).

    ``even`` asks for the imaginary part of the integral only, which needs no sines.  Where q is
    nearly along the normal the sum over edges cancels, and its series is used.
    """
    edges = np.roll(corners, -1, axis=0) - corners
    normal = _outward(corners)
    along = q @ normal
    flat = q - along[:, None] * normal
    flat2 = (flat ** 2).sum(1)
    tiny = flat2 < 1e-6
    total = np.zeros(len(q), np.float64 if even else np.complex128)
    for corner, edge in zip(corners, edges, strict=True):
        phase = q @ (corner + 0.5 * edge)
        wave = -np.cos(phase) if even else -1j * np.exp(1j * phase)
        total += (flat @ np.cross(edge, normal)) * _unit_sinc(0.5 * (q @ edge)) * wave
    total /= np.where(tiny, 1.0, flat2)
    if tiny.any():
        area, center, inertia = _face_moments(corners)
        phase = q[tiny] @ center
        bend = np.einsum("ni,ij,nj->n", flat[tiny], inertia, flat[tiny])
        total[tiny] = (np.sin(phase) if even else np.exp(1j * phase)) * (area - 0.5 * bend)
    return along, total


def form_factor_of_polyhedron(faces: tuple[np.ndarray, ...], s_N3: np.ndarray) -> np.ndarray:
    """f of a polyhedron with these faces at s (in units of 1 / length), complex128 (N,)."""
    q = 2 * np.pi * np.asarray(s_N3, np.float64)
    total = np.zeros(len(q), np.complex128)
    for corners in faces:
        along, surface = _over_face(corners, q, False)
        total += along * surface
    return _divided(faces, q, -1j * total)


def _even_polyhedron(faces: tuple[np.ndarray, ...], s_N3: np.ndarray) -> np.ndarray:
    """The same for a body with a centre at 0, float64 (N,): opposite faces are conjugate."""
    q = 2 * np.pi * np.asarray(s_N3, np.float64)
    total = np.zeros(len(q))
    for corners in faces:
        if tuple(np.round(corners.mean(0), 9)) < (0.0, 0.0, 0.0):
            continue
        along, surface = _over_face(corners, q, True)
        total += 2 * along * surface
    return _divided(faces, q, total)


def _divided(faces: tuple[np.ndarray, ...], q: np.ndarray, total: np.ndarray) -> np.ndarray:
    """``total`` / q^2, close to 0 by the moments of the solid."""
    square = (q ** 2).sum(1)
    near = square < 1e-5
    total = total / np.where(near, 1.0, square)
    if near.any():
        solid, inertia = _solid_moments(faces)
        total[near] = solid - 0.5 * np.einsum("ni,ij,nj->n", q[near], inertia, q[near])
    return total


def _face_moments(corners: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Area, centroid and second moments about it of a flat polygon."""
    a, b, c = corners[0], corners[1:-1], corners[2:]
    areas = 0.5 * np.linalg.norm(np.cross(b - a, c - a), axis=1)
    center = (areas[:, None] * (a + b + c) / 3).sum(0) / areas.sum()
    inertia = np.zeros((3, 3))
    for one, left, right in zip(areas, b, c, strict=True):
        for point in (0.5 * (a + left), 0.5 * (left + right), 0.5 * (a + right)):
            inertia += one / 3 * np.outer(point - center, point - center)
    return float(areas.sum()), center, inertia


def _solid_moments(faces: tuple[np.ndarray, ...]) -> tuple[float, np.ndarray]:
    """Volume and second moments about the origin, from tetrahedra with a corner there."""
    volume, inertia = 0.0, np.zeros((3, 3))
    for corners in faces:
        for b, c in itertools.pairwise(corners[1:]):
            points = np.stack([corners[0], b, c])
            one = np.linalg.det(points) / 6
            volume += one
            total = points.sum(0)
            inertia += one / 20 * (points.T @ points + np.outer(total, total))
    return float(volume), inertia


# --- solids of revolution -------------------------------------------------------------------------

def _disc(x: np.ndarray) -> np.ndarray:
    """2 J1(x) / x, by Gauss-Chebyshev quadrature; exact to 1e-12 for |x| < 100."""
    n = 140
    angle = np.arange(1, n + 1) * np.pi / (n + 1)
    weight = 4 / (n + 1) * np.sin(angle) ** 2
    total = np.zeros(np.shape(x))
    for t, w in zip(np.cos(angle[:n // 2]), weight[:n // 2], strict=True):
        total += w * np.cos(x * t)
    return total


def _slices(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(z, weight, outer radius, inner radius) of slices of the upper half of a solid."""
    node, weight = np.polynomial.legendre.leggauss(80)
    angle, share = np.pi / 4 * (node + 1), np.pi / 4 * weight
    if name == "torus":
        small = 0.5 / (1 + TORUS_RATIO)
        half = small * np.cos(angle)
        return (small * np.sin(angle), share * half, small * TORUS_RATIO + half,
                small * TORUS_RATIO - half)
    width = 0.5 / CAPSULE_RATIO         # capsule: a cylinder with half a sphere on either end
    half_length = 0.5 - width
    straight = (0.5 * half_length * (node + 1), 0.5 * half_length * weight)
    z = np.concatenate([straight[0], half_length + width * np.sin(angle)])
    outer = np.concatenate([np.full(80, width), width * np.cos(angle)])
    return (z, np.concatenate([straight[1], share * width * np.cos(angle)]), outer,
            np.zeros_like(z))


def _of_revolution(name: str, across_N: np.ndarray, along_M: np.ndarray) -> np.ndarray:
    """f at all |s across the axis| and all s along it: (M, N)."""
    total = np.zeros((len(along_M), len(across_N)))
    for z, weight, outer, inner in zip(*_slices(name), strict=True):
        ring = outer ** 2 * _disc(2 * np.pi * across_N * outer)
        if inner > 0:
            ring = ring - inner ** 2 * _disc(2 * np.pi * across_N * inner)
        total += np.outer(np.cos(2 * np.pi * along_M * z), 2 * np.pi * weight * ring)
    return total


def _sphere(length: np.ndarray) -> np.ndarray:
    x = np.pi * np.asarray(length, np.float64)
    near = np.abs(x) < 1e-2
    safe = np.where(near, 1.0, x)
    value = np.where(near, 1 - x ** 2 / 10, 3 * (np.sin(safe) - safe * np.cos(safe)) / safe ** 3)
    return np.pi / 6 * value


# --- one body -------------------------------------------------------------------------------------

def body_form_factor(name: str, s_N3: np.ndarray) -> np.ndarray:
    """f of the body of diameter 1 at s (in units of 1 / diameter): float64 (N,), f(0) its volume.

    Raises :class:`ConfigurationError` for a body that is not one of :func:`body_names`.
    """
    s_N3 = np.asarray(s_N3, np.float64)
    if name in _VERTICES:
        return _even_polyhedron(_faces(name), s_N3)
    if name == "sphere":
        return _sphere(np.linalg.norm(s_N3, axis=1))
    if name not in body_names():
        raise ConfigurationError(f"no body is called {name!r}; known: {', '.join(body_names())}")
    return np.array([_of_revolution(name, np.hypot(s[:1], s[1:2]), s[2:])[0, 0] for s in s_N3])


def solid_volume(name: str) -> float:
    """Volume of the body of diameter 1."""
    return float(body_form_factor(name, np.zeros((1, 3)))[0])


def contains(name: str, points_N3: np.ndarray) -> np.ndarray:
    """Which points lie in the body of diameter 1: for tests against a transform of a mask."""
    x, y, z = np.asarray(points_N3, np.float64).T
    if name in _VERTICES:
        inside = np.ones(len(x), bool)
        for corners in _faces(name):
            inside &= (points_N3 - corners[0]) @ _outward(corners) <= 0
        return inside
    if name == "sphere":
        return x ** 2 + y ** 2 + z ** 2 <= 0.25
    if name == "torus":
        small = 0.5 / (1 + TORUS_RATIO)
        return (np.hypot(x, y) - TORUS_RATIO * small) ** 2 + z ** 2 <= small ** 2
    width = 0.5 / CAPSULE_RATIO
    beyond = np.maximum(np.abs(z) - (0.5 - width), 0)
    return x ** 2 + y ** 2 + beyond ** 2 <= width ** 2


def _octant(name: str) -> np.ndarray:
    """f on the mesh points with no negative coordinate."""
    axis = np.arange(BODY_MESH // 2 + 1) * BODY_VOXEL
    n = len(axis)
    if name in ("torus", "capsule"):
        fine = np.linspace(0, np.sqrt(2) * axis[-1], 12 * n)
        table = _of_revolution(name, fine, axis)
        across = np.hypot(axis[:, None], axis[None, :])
        return np.stack([np.interp(across, fine, row) for row in table], axis=-1)
    octant = np.empty((n, n, n))
    for i, x in enumerate(axis):
        y, z = np.meshgrid(axis, axis, indexing="ij")
        points = np.stack([np.full(n * n, x), y.ravel(), z.ravel()], axis=1)
        octant[i] = body_form_factor(name, points).reshape(n, n)
    return octant


@functools.cache
def body_volume(name: str) -> np.ndarray:
    """f of the body of diameter 1 on a mesh of ``BODY_MESH`` points with ``BODY_VOXEL``, complex64,
    0 on its faces.

    Made once and kept with the volumes of particles.
    """
    key = hashlib.sha256(f"{VERSION} {name} {BODY_MESH} {BODY_VOXEL}".encode()).hexdigest()

    def whole() -> np.ndarray:
        octant = _octant(name).astype(np.complex64)
        octant[-1], octant[:, -1], octant[:, :, -1] = 0, 0, 0   # a lookup beyond finds nothing
        fold = np.abs(np.arange(BODY_MESH) - BODY_MESH // 2)
        return octant[np.ix_(fold, fold, fold)]

    return cached_volume(f"body_{name}", key, BODY_MESH, whole)
