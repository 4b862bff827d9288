"""Classes of single-particle patterns by expectation maximisation, turned in the detector plane.

[ASS20], the reference selection of [IGN21] (methods specification, section 3): K class averages
M_k on a square grid and R rotations phi_r over half a turn (Friedel) or a whole one.

E: L_nkr = sum_p d_np ln(s_n M_krp) - s_n sum_p M_krp, with M_krp the average looked up bilinearly
at the pixel turned by phi_r; P_nkr is the softmax over (k, r), or the best of them ("hard");
s_n = sum_p d_np / sum_kr P_nkr sum_p M_krp, then mean 1.  M: M_k is what the patterns, turned back,
put on the grid, over what their scales would put there.  Turning back is the transpose of the
lookup, so that gaps, masks and half detectors leave holes in no average that another pattern fills.

Axes: N pattern, B patterns of a block, K class, R rotation, P pixel, G grid point, T run of EM.
"""
from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..core import ConfigurationError, MissingDependency

__all__ = ["Classes", "EmSettings", "Lookup", "em_classes", "e_step", "prepared"]

log = logging.getLogger(__name__)

BLOCK_BYTES = 64 * 2 ** 20          # of posteriors at a time
FLOOR = 1e-4                        # of the mean: averages are not smaller than this
NEGLIGIBLE = 1e-7                   # of a posterior


@dataclass(frozen=True)
class EmSettings:
    """``iterations`` of each of ``starts`` random starts, of which the likeliest is kept.

    It ends earlier once the likelihood grows by less than ``tolerance`` of itself.
    ``log`` compares log(1 + photons); ``hard`` gives every pattern to its best class and turn.
    """

    classes: int = 20
    rotations: int = 100
    iterations: int = 30
    starts: int = 1
    friedel: bool = True
    log: bool = False
    hard: bool = False
    tolerance: float = 1e-6
    seed: int = 0


@dataclass(frozen=True)
class Lookup:
    """How pixels (x_P, y_P), in grid steps from the beam, look up an average in each rotation.

    ``matrix`` is sparse (R P, G): row r P + p holds the weights of four grid points.  The grid has
    ``side`` points a side, the beam at its middle.
    """

    side: int
    rotations: int
    pixels: int
    matrix: Any = field(repr=False)

    def turned(self, averages_KG: np.ndarray) -> np.ndarray:
        """(K, R, P) float32 values at the turned pixels."""
        found = (self.matrix @ averages_KG.T).T
        return np.ascontiguousarray(found, np.float32).reshape(-1, self.rotations, self.pixels)

    def back(self, values_KRP: np.ndarray) -> np.ndarray:
        """(K, G): values of turned pixels put on the grid, summed over rotations."""
        flat = values_KRP.reshape(len(values_KRP), -1).astype(np.float64)
        return (self.matrix.T @ flat.T).T


def lookup(x_P: np.ndarray, y_P: np.ndarray, rotations: int, friedel: bool) -> Lookup:
    """The lookup of pixels at these places for ``rotations`` over half or all of a turn."""
    try:
        from scipy import sparse
    except ImportError as error:
        raise MissingDependency(f"EM classes need scipy ({error}); "
                                "pip install 'xfel-classify[learn]'") from error
    half = int(np.ceil(np.hypot(x_P, y_P).max())) + 1
    side = 2 * half + 1
    phi_R1 = (np.arange(rotations) * (np.pi if friedel else 2 * np.pi) / rotations)[:, None]
    at_x = (np.cos(phi_R1) * x_P - np.sin(phi_R1) * y_P + half).ravel()
    at_y = (np.sin(phi_R1) * x_P + np.cos(phi_R1) * y_P + half).ravel()
    low_x, low_y = (np.clip(np.floor(a).astype(np.int64), 0, side - 2) for a in (at_x, at_y))
    right, up = at_x - low_x, at_y - low_y
    columns = np.stack([low_y * side + low_x, low_y * side + low_x + 1,
                        (low_y + 1) * side + low_x, (low_y + 1) * side + low_x + 1], 1)
    weights = np.stack([(1 - right) * (1 - up), right * (1 - up), (1 - right) * up, right * up], 1)
    matrix = sparse.csr_matrix(
        (weights.ravel().astype(np.float32), columns.ravel(),
         np.arange(0, columns.size + 1, 4)), shape=(len(at_x), side * side))
    return Lookup(side, rotations, len(x_P), matrix)


def prepared(images_NHW: np.ndarray, good_HW: np.ndarray, beam_RC: tuple[float, float],
             pool: int, inner: float = 0.0, outer: float = np.inf
             ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(photons_NP, x_P, y_P) of the good elements between two radii (elements) about the beam.

    ``images_NHW`` is mean photons per detector pixel; counts are per element of pool x pool.
    Raises :class:`ConfigurationError` where nothing is left.
    """
    row, column = np.mgrid[:good_HW.shape[0], :good_HW.shape[1]] + 0.5
    y, x = beam_RC[0] - row, column - beam_RC[1]
    radius = np.hypot(x, y)
    used = good_HW & (radius >= inner) & (radius <= outer)
    if not used.any():
        raise ConfigurationError(f"no working element lies between {inner:g} and {outer:g} "
                                 "elements from the beam; give a wider range, or check the mask")
    photons_NP = np.maximum(images_NHW[:, used], 0.0).astype(np.float32) * np.float32(pool ** 2)
    return photons_NP, x[used], y[used]


@dataclass(frozen=True)
class Classes:
    """The outcome of one EM run.

    ``averages_KG`` float32 (K, side, side), y upwards, NaN where no pixel ever was; ``class_N``
    the most probable class, ``probability_N`` of it; ``turn_N`` the most probable rotation in
    radians, ``scale_N`` relative brightness; ``likelihood`` by iteration.
    """

    averages_KGG: np.ndarray
    class_N: np.ndarray
    probability_N: np.ndarray
    turn_N: np.ndarray
    scale_N: np.ndarray
    likelihood: tuple[float, ...]


def em_classes(photons_NP: np.ndarray, x_P: np.ndarray, y_P: np.ndarray,
               settings: EmSettings | None = None,
               report: Callable[[str], Any] = lambda line: None) -> Classes:
    """Classes of patterns; positions in grid steps from the beam.

    Raises :class:`ConfigurationError` for settings nobody can mean, or no photons.
    """
    how = settings or EmSettings()
    if min(how.classes, how.rotations, how.iterations, how.starts) < 1:
        raise ConfigurationError(f"EM with {how.classes} classes, {how.rotations} rotations, "
                                 f"{how.iterations} iterations and {how.starts} starts was asked "
                                 "for; give at least one of each")
    if len(photons_NP) < how.classes:
        raise ConfigurationError(f"{how.classes} classes of {len(photons_NP)} patterns were asked "
                                 "for; give fewer classes or more patterns")
    data_NP = np.log1p(photons_NP) if how.log else np.asarray(photons_NP, np.float32)
    if not np.isfinite(data_NP).all() or data_NP.min() < 0 or not data_NP.any():
        raise ConfigurationError("EM was asked for of patterns with values that are not finite or "
                                 "below zero, or without any photon; mask those pixels")
    table = lookup(x_P, y_P, how.rotations, how.friedel)
    found: Classes | None = None
    for start in range(how.starts):
        rng = np.random.default_rng([how.seed, start])
        one = _run(data_NP, table, how, rng, report)
        if found is None or one.likelihood[-1] > found.likelihood[-1]:
            found = one
    assert found is not None
    return found


def _run(data_NP: np.ndarray, table: Lookup, how: EmSettings, rng: np.random.Generator,
         report: Callable[[str], Any]) -> Classes:
    total_N = data_NP.sum(1, dtype=np.float64)
    scale_N = np.maximum(total_N, 1e-9)
    level = scale_N.mean() / table.pixels
    scale_N = scale_N / scale_N.mean()
    averages_KG = level * (0.99 + 0.01 * rng.random((how.classes, table.side ** 2)))
    seen_G = np.asarray(table.matrix.sum(0)).ravel() > 0
    if how.friedel:
        seen_G |= seen_G[::-1]
    likelihood: list[float] = []
    for iteration in range(how.iterations):
        averages_KG, scale_N, state = _iteration(data_NP, total_N, averages_KG, scale_N, table,
                                                 how, level, seen_G)
        likelihood.append(state[0])
        report(f"iteration {iteration + 1}/{how.iterations}, log-likelihood {state[0]:.6g}")
        if len(likelihood) > 5 and abs(likelihood[-1] - likelihood[-2]) \
                < how.tolerance * abs(likelihood[-1]):
            break
    _, class_N, probability_N, rotation_N = state
    shown = np.where(seen_G, averages_KG, np.nan).astype(np.float32)
    step = (np.pi if how.friedel else 2 * np.pi) / how.rotations
    return Classes(shown.reshape(-1, table.side, table.side), class_N, probability_N,
                   rotation_N * step, scale_N, tuple(likelihood))


def _iteration(data_NP: np.ndarray, total_N: np.ndarray, averages_KG: np.ndarray,
               scale_N: np.ndarray, table: Lookup, how: EmSettings, level: float,
               seen_G: np.ndarray) -> tuple[np.ndarray, np.ndarray, tuple]:
    """One E and M step: (averages, scales, (likelihood, class_N, probability_N, rotation_N))."""
    from scipy import sparse

    model_KRP = np.maximum(table.turned(averages_KG), np.float32(FLOOR * level))
    flat = model_KRP.reshape(-1, table.pixels)
    logs = np.log(flat)
    middle_P = logs.mean(0)             # the same for all (k, r): smaller numbers, same posterior
    logs -= middle_P
    sums_KR = flat.sum(1, dtype=np.float64)
    count, pairs = len(data_NP), len(flat)
    rows = max(1, BLOCK_BYTES // (8 * pairs))
    gathered = np.zeros((pairs, table.pixels), np.float32)
    weight_KR = np.zeros(pairs)
    new_scale_N = np.empty(count)
    best = (np.empty(count, np.int64), np.empty(count), np.empty(count, np.int64))
    likelihood = 0.0
    for first in range(0, count, rows):
        block = slice(first, first + rows)
        posterior, height_B = e_step(data_NP[block], logs, sums_KR, scale_N[block], how.hard)
        likelihood += float((height_B + data_NP[block] @ middle_P.astype(np.float64)
                             + total_N[block] * np.log(scale_N[block])).sum())
        expected_B = posterior @ sums_KR
        new_scale_N[block] = total_N[block] / np.maximum(expected_B, 1e-30)
        posterior[posterior < NEGLIGIBLE] = 0
        thin = sparse.csr_matrix(posterior.astype(np.float32))
        if thin.nnz > 0.1 * posterior.size:
            gathered += posterior.T.astype(np.float32) @ data_NP[block]
        else:
            gathered += thin.T @ data_NP[block]
        weight_KR += posterior.T @ new_scale_N[block]
        by_class = posterior.reshape(len(posterior), how.classes, -1)
        share_BK = by_class.sum(2)
        best[0][block] = share_BK.argmax(1)
        best[1][block] = share_BK.max(1)
        best[2][block] = by_class[np.arange(len(posterior)), best[0][block]].argmax(1)
    mean = new_scale_N.mean() if new_scale_N.mean() > 0 else 1.0
    shape = how.classes, table.rotations, -1
    above = table.back(gathered.reshape(shape))
    # the weight of a rotation is the same for all of its pixels
    below = table.back(np.broadcast_to(weight_KR.reshape(shape) / mean,
                                       (how.classes, table.rotations, table.pixels)))
    if how.friedel:
        above, below = above + above[:, ::-1], below + below[:, ::-1]
    filled = below > 1e-12 * max(below.max(), 1e-30)
    averages_KG = np.where(filled, above / np.where(filled, below, 1.0), 0.0)
    # a point that this class has not seen has the value of all classes together
    together = above.sum(0) / np.maximum(below.sum(0), 1e-30)
    averages_KG = np.where(filled | ~seen_G, averages_KG, together)
    return averages_KG, new_scale_N / mean, (likelihood, *best)


def e_step(data_BP: np.ndarray, logs: np.ndarray, sums_KR: np.ndarray, scale_B: np.ndarray,
           hard: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(posterior (B, K R) float64, log of the summed likelihoods (B,)) from ln M and sum_p M.

    One matrix product; terms without (k, r) are left to the caller.
    """
    heights = (data_BP @ logs.T).astype(np.float64)
    heights -= scale_B[:, None] * sums_KR
    top_B = heights.max(1, keepdims=True)
    if hard:
        posterior = np.zeros_like(heights)
        posterior[np.arange(len(heights)), heights.argmax(1)] = 1.0
        return posterior, top_B[:, 0]
    np.subtract(heights, top_B, out=heights)
    np.exp(heights, out=heights)
    total_B = heights.sum(1, keepdims=True)
    heights /= total_B
    return heights, top_B[:, 0] + np.log(total_B[:, 0])

