"""Diffusion map of single-particle images: clusters without training [LI-HAN17; YOON11].

Every image becomes a vector of unit total; each is joined to its nearest neighbours by a
self-tuning kernel W_ij = exp(-d_ij^2 / (s_i s_j)), s_i the distance to the 7th neighbour; the
leading eigenvectors psi_k of P = D^-1 W, times lambda_k^t, are coordinates in which k-means finds
clusters; a few labels name them.  New images are placed by Nystrom extension, without another
decomposition (methods specification, section 2b; settings are choices of ours).

Nothing here is larger than (block, N): distances are computed in blocks by matrix products.

Axes: N images of the map, M new images, H row, W column, D value of a vector, K neighbour,
L eigenpair.
"""
from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core import ConfigurationError, MissingDependency

__all__ = ["SCALES", "DiffusionMap", "cluster_centres", "diffusion_map", "eigengap", "names_of",
           "nearest", "nearest_centre", "vectors"]

log = logging.getLogger(__name__)

SCALES = ("linear", "log1p", "sqrt", "rings")
TUNING_NEIGHBOUR = 7
BLOCK_BYTES = 16 * 2 ** 20      # of distances at a time
DENSE_BELOW = 200               # images; a full decomposition is quicker and exact


# --- images as vectors ---------------------------------------------------------------------------

def vectors(images_NHW: np.ndarray, good_HW: np.ndarray, scale: str = "linear",
            beam_RC: tuple[float, float] | None = None) -> np.ndarray:
    """(N, D) float32 of images in photons: the good pixels, with unit total.

    ``scale``: "linear"; "log1p" of photons before the total; "sqrt" of the shares, for which the
    Euclidean distance is Hellinger's and counting noise is the same everywhere; "rings" (ours) the
    strengths of the first angular orders on each ring about ``beam_RC`` (row, column), which do
    not change when the particle turns about the beam.
    Raises :class:`ConfigurationError` for an unknown scale or without good pixels.
    """
    if scale not in SCALES:
        raise ConfigurationError(f"images were to be compared on the scale {scale!r}; valid are "
                                 f"{', '.join(SCALES)}")
    if not good_HW.any():
        raise ConfigurationError("images were to be compared by their good pixels; the mask leaves "
                                 "none; check mask and geometry")
    values_ND = np.maximum(images_NHW[:, good_HW].astype(np.float32), 0.0)
    if scale == "log1p":
        values_ND = np.log1p(values_ND)
    total_N = values_ND.sum(1, dtype=np.float64)
    values_ND /= np.where(total_N > 0, total_N, 1.0).astype(np.float32)[:, None]
    if scale == "sqrt":
        return np.sqrt(values_ND)
    if scale == "rings":
        return _rings(values_ND, good_HW, beam_RC)
    return values_ND


ORDERS = (0, 2, 4, 6, 8, 10, 12)
LEAST_ON_RING = 12


def _rings(values_ND: np.ndarray, good_HW: np.ndarray,
           beam_RC: tuple[float, float] | None) -> np.ndarray:
    """Strength of angular orders on rings one pixel wide, of the square root of shares."""
    height, width = good_HW.shape
    row, column = beam_RC if beam_RC is not None else (height / 2, width / 2)
    rows, columns = (axis + 0.5 for axis in np.nonzero(good_HW))
    angle_D = np.arctan2(row - rows, columns - column)
    ring_D = np.hypot(row - rows, columns - column).astype(int)
    values_ND = np.sqrt(values_ND)
    found = []
    for ring in range(1, int(ring_D.max()) + 1):
        on = np.flatnonzero(ring_D == ring)
        if len(on) < LEAST_ON_RING:
            continue
        waves = np.concatenate([np.stack([np.cos(m * angle_D[on]), np.sin(m * angle_D[on])])
                                for m in ORDERS])[[0, *range(2, 2 * len(ORDERS))]]
        # least squares over the angles that are there: a half detector has no full rings
        solve = np.linalg.pinv(waves.T, rcond=1e-2).T.astype(np.float32)
        terms = values_ND[:, on] @ solve
        found += [terms[:, :1], np.hypot(terms[:, 1::2], terms[:, 2::2])]
        found[-2:] = [part * np.float32(np.sqrt(len(on))) for part in found[-2:]]
    return np.concatenate(found, axis=1)


# --- neighbours ----------------------------------------------------------------------------------

def nearest(points_ND: np.ndarray, neighbours: int, others_MD: np.ndarray | None = None
            ) -> tuple[np.ndarray, np.ndarray]:
    """(distance (M, K) float32, index (M, K)) of the nearest points, nearest first.

    Of ``others_MD`` among ``points_ND``; without others, of the points among themselves, never
    naming a point as its own neighbour.  Blocks of BLAS products bound the memory.
    """
    asked_MD = points_ND if others_MD is None else others_MD
    own = others_MD is None
    if neighbours < 1 or neighbours > len(points_ND) - own:
        raise ConfigurationError(f"{neighbours} neighbours were asked for among {len(points_ND)} "
                                 "images; give fewer neighbours or more images")
    points_ND = np.ascontiguousarray(points_ND, np.float32)
    centre_D = points_ND.mean(0)        # distances do not change, rounding errors do
    points_ND = points_ND - centre_D
    square_N = np.einsum("nd,nd->n", points_ND, points_ND)
    rows = max(1, BLOCK_BYTES // (4 * len(points_ND)))
    distance = np.empty((len(asked_MD), neighbours), np.float32)
    index = np.empty((len(asked_MD), neighbours), np.int64)
    for first in range(0, len(asked_MD), rows):
        block_BD = asked_MD[first:first + rows].astype(np.float32) - centre_D
        squared_BN = block_BD @ points_ND.T
        squared_BN *= -2.0
        squared_BN += square_N
        if own:
            here = np.arange(len(block_BD))
            squared_BN[here, first + here] = np.inf
        chosen_BK = np.argpartition(squared_BN, neighbours - 1, axis=1)[:, :neighbours]
        values_BK = np.take_along_axis(squared_BN, chosen_BK, 1)
        order = np.argsort(values_BK, axis=1, kind="stable")
        last = first + len(block_BD)
        index[first:last] = np.take_along_axis(chosen_BK, order, 1)
        values_BK = np.take_along_axis(values_BK, order, 1)
        values_BK += np.einsum("bd,bd->b", block_BD, block_BD)[:, None]
        distance[first:last] = np.sqrt(np.maximum(values_BK, 0.0))
    return distance, index


# --- the map -------------------------------------------------------------------------------------

@dataclass(frozen=True)
class DiffusionMap:
    """A map of N images: eigenvalues (L,) from the largest, 1 left out, and psi_NL.

    ``points_ND``, ``scale_N`` (distance to the tuning neighbour), ``density_N`` and the settings
    are what :meth:`extend` needs.
    """

    points_ND: np.ndarray
    eigenvalues_L: np.ndarray
    psi_NL: np.ndarray
    scale_N: np.ndarray
    density_N: np.ndarray
    neighbours: int
    alpha: float

    def coordinates(self, psi_ML: np.ndarray | None = None, time: float = 1.0,
                    count: int | None = None) -> np.ndarray:
        """(N, count) diffusion coordinates lambda_k^t psi_k, of the images or of given psi."""
        psi = self.psi_NL if psi_ML is None else psi_ML
        count = psi.shape[1] if count is None else count
        return psi[:, :count] * np.abs(self.eigenvalues_L[:count]) ** time

    def extend(self, points_MD: np.ndarray) -> np.ndarray:
        """psi (M, L) of new images by Nystrom: the average of their neighbours' over lambda."""
        if points_MD.ndim != 2 or points_MD.shape[1] != self.points_ND.shape[1]:
            raise ConfigurationError(
                f"images of {points_MD.shape[1:]} values were to be placed in a map of images of "
                f"{self.points_ND.shape[1]}; prepare both in the same way")
        distance_MK, index_MK = nearest(self.points_ND, self.neighbours, points_MD)
        tuning = min(TUNING_NEIGHBOUR, self.neighbours) - 1
        scale_M = np.maximum(distance_MK[:, tuning].astype(np.float64), TINY)
        weight_MK = np.exp(-distance_MK.astype(np.float64) ** 2
                           / (scale_M[:, None] * self.scale_N[index_MK]))
        if self.alpha:
            weight_MK /= self.density_N[index_MK] ** self.alpha
        weight_MK /= np.maximum(weight_MK.sum(1, keepdims=True), TINY)
        usable_L = np.where(np.abs(self.eigenvalues_L) > 1e-6, self.eigenvalues_L, np.inf)
        return np.einsum("mk,mkl->ml", weight_MK, self.psi_NL[index_MK]) / usable_L


TINY = 1e-30


def diffusion_map(points_ND: np.ndarray, neighbours: int = 30, alpha: float = 0.0,
                  eigenpairs: int = 12) -> DiffusionMap:
    """The map of images as :func:`vectors`; ``alpha`` = 1 takes out the density of images.

    Raises :class:`ConfigurationError` for too few images or values that are not finite.
    """
    sparse, eigsh = _scipy()
    if not np.isfinite(points_ND).all():
        raise ConfigurationError("a diffusion map was asked for of images with values that are not "
                                 "finite; leave those images out, or mask the pixels")
    count = len(points_ND)
    eigenpairs = min(eigenpairs, count - 2)
    if eigenpairs < 1:
        raise ConfigurationError(f"a diffusion map was asked for of {count} images; give at least "
                                 "three, better thousands")
    distance_NK, index_NK = nearest(points_ND, min(neighbours, count - 1))
    tuning = min(TUNING_NEIGHBOUR, distance_NK.shape[1]) - 1
    scale_N = np.maximum(distance_NK[:, tuning].astype(np.float64), TINY)
    weight_NK = np.exp(-distance_NK.astype(np.float64) ** 2
                       / (scale_N[:, None] * scale_N[index_NK]))
    ends = np.arange(0, index_NK.size + 1, index_NK.shape[1])
    graph = sparse.csr_matrix((weight_NK.ravel(), index_NK.ravel(), ends), shape=(count, count))
    graph = graph.maximum(graph.T) + sparse.identity(count, format="csr")
    density_N = np.asarray(graph.sum(1)).ravel()
    if alpha:
        factor = sparse.diags(density_N ** -alpha)
        graph = factor @ graph @ factor
    degree_N = np.asarray(graph.sum(1)).ravel()
    root_N = np.sqrt(degree_N)
    scaled = sparse.diags(1 / root_N) @ graph @ sparse.diags(1 / root_N)
    values_L, vectors_NL = _leading(scaled, root_N / np.linalg.norm(root_N), eigenpairs, eigsh)
    psi_NL = vectors_NL / root_N[:, None]
    psi_NL /= np.sqrt((degree_N[:, None] * psi_NL ** 2).sum(0) / degree_N.sum())
    psi_NL *= np.where(psi_NL[np.abs(psi_NL).argmax(0), np.arange(psi_NL.shape[1])] < 0, -1, 1)
    return DiffusionMap(np.asarray(points_ND, np.float32), values_L, psi_NL, scale_N, density_N,
                        distance_NK.shape[1], alpha)


def _leading(matrix: Any, trivial_N: np.ndarray, count: int, eigsh: Any
             ) -> tuple[np.ndarray, np.ndarray]:
    """Largest eigenpairs of a symmetric matrix but the trivial one, which is known.

    A graph in pieces has the eigenvalue 1 several times; taking out the known vector leaves
    exactly the others.
    """
    size = len(trivial_N)
    if size < DENSE_BELOW:
        values, found = np.linalg.eigh(matrix.toarray() - np.outer(trivial_N, trivial_N))
        order = np.argsort(-values)[:count]
        return values[order], found[:, order]
    from scipy.sparse.linalg import LinearOperator

    def product(x: np.ndarray) -> np.ndarray:
        x = x.ravel()
        return matrix @ x - trivial_N * (trivial_N @ x)

    start = np.random.default_rng(0).standard_normal(size)
    operator = LinearOperator((size, size), matvec=product, dtype=np.float64)
    values, found = eigsh(operator, k=count, which="LA", v0=start, tol=1e-6,
                          ncv=min(size - 1, max(4 * count, 40)))
    order = np.argsort(-values)
    return values[order], found[:, order]


def _scipy() -> tuple[Any, Any]:
    try:
        from scipy import sparse
        from scipy.sparse.linalg import eigsh
    except ImportError as error:
        raise MissingDependency(f"a diffusion map needs scipy ({error}); "
                                "pip install 'xfel-classify[learn]'") from error
    return sparse, eigsh


# --- clusters ------------------------------------------------------------------------------------

def eigengap(eigenvalues_L: np.ndarray, least: int = 2, most: int | None = None) -> int:
    """Number of clusters: one more than the eigenvalues before the widest gap."""
    gaps = eigenvalues_L[:-1] - eigenvalues_L[1:]
    most = min(len(gaps) + 1, most or len(gaps) + 1)
    if len(gaps) == 0 or most < least:
        return least
    return least + int(gaps[least - 2:most - 1].argmax())


def cluster_centres(points_NL: np.ndarray, count: int, seed: int = 0, starts: int = 4,
                    rounds: int = 50) -> np.ndarray:
    """(count, L) centres of k-means, the best of ``starts`` spread-out starts."""
    if not 1 <= count <= len(points_NL):
        raise ConfigurationError(f"{count} clusters of {len(points_NL)} images were asked for; "
                                 "give from 1 to the number of images")
    points_NL = np.asarray(points_NL, np.float64)
    best, least = points_NL[:count], np.inf
    for start in range(starts):
        rng = np.random.default_rng([seed, start])
        centres = _spread_out(points_NL, count, rng)
        for _ in range(rounds):
            cluster_N, squared_N = _assigned(points_NL, centres)
            members_C = np.bincount(cluster_N, minlength=count)
            moved = np.stack([np.bincount(cluster_N, axis_N, count)
                              for axis_N in points_NL.T], 1) / np.maximum(members_C, 1)[:, None]
            moved[members_C == 0] = points_NL[squared_N.argmax()]
            if np.array_equal(moved, centres):
                break
            centres = moved
        error = float(_assigned(points_NL, centres)[1].sum())
        if error < least:
            best, least = centres, error
    return best


def _spread_out(points_NL: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """k-means++: each next centre with a chance in proportion to its squared distance."""
    chosen = [int(rng.integers(len(points_NL)))]
    squared_N = np.square(points_NL - points_NL[chosen[0]]).sum(1)
    while len(chosen) < count:
        total = squared_N.sum()
        next_one = int(np.searchsorted(np.cumsum(squared_N), rng.random() * total)) \
            if total > 0 else int(rng.integers(len(points_NL)))
        chosen.append(min(next_one, len(points_NL) - 1))
        squared_N = np.minimum(squared_N, np.square(points_NL - points_NL[chosen[-1]]).sum(1))
    return points_NL[chosen]


def _assigned(points_NL: np.ndarray, centres_CL: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    squared_NC = (np.square(points_NL).sum(1)[:, None] - 2 * points_NL @ centres_CL.T
                  + np.square(centres_CL).sum(1))
    cluster_N = squared_NC.argmin(1)
    return cluster_N, np.maximum(squared_NC[np.arange(len(points_NL)), cluster_N], 0)


def nearest_centre(points_NL: np.ndarray, centres_CL: np.ndarray) -> np.ndarray:
    """(N,) number of the nearest centre."""
    return _assigned(np.asarray(points_NL, np.float64), centres_CL)[0]


def names_of(cluster_N: np.ndarray, label_N: np.ndarray, count: int) -> np.ndarray:
    """(count,) label of each cluster by the majority of its labelled images.

    ``label_N`` is -1 where there is no label.  A tie goes to the smaller label; a cluster without
    any labelled image gets -1: nobody said what it is.
    """
    labels = np.unique(label_N[label_N >= 0])
    found = np.full(count, -1, np.int64)
    for number in range(count):
        counted = np.array([((cluster_N == number) & (label_N == label)).sum()
                            for label in labels], np.int64)
        if counted.any():
            found[number] = labels[int(counted.argmax())]
    return found
