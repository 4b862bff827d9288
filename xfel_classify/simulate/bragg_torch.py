"""Bragg spots of many shots at once with torch: the formulas of :mod:`.ewald` and :mod:`.bragg`.

The shots of a batch are laid end to end: every line of reciprocal space, every reflection and
every spot has a row in flat arrays and the number of its shot beside it, so that a batch costs as
many kernel launches as one shot.  Everything is float64, as on the processor.

Axes: E shot (one orientation of one crystal), N reflection or spot of any shot, 3 = (h, k, l) or
lab (x, y, z).  Lengths in angstrom and metres as named.
"""
from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .bragg import Spots, partiality_width
from .crystal import Crystal, laue_rotations, protein_shape, reciprocal_basis

__all__ = ["FlatSpots", "Shot", "paint_all", "predict_all"]

_REACH, _KEPT = 4.3, 4.0    # in partiality widths: what is looked at, what is kept (ewald, bragg)
_SECTOR_MARGIN = 0.03       # 1/A, as in ewald
_HALF_RANGE = 512           # of Miller indices, as in crystal
_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_KEY = np.array([4.0 * _HALF_RANGE ** 2, 2.0 * _HALF_RANGE, 1.0])
_PATCH_VALUES = 4_000_000   # painted at a time
_SELECTION = {              # two conditions (factors of h, k, l; modulus) of reflections present
    "P": (((0, 0, 0), 1), ((0, 0, 0), 1)), "A": (((0, 1, 1), 2), ((0, 0, 0), 1)),
    "C": (((1, 1, 0), 2), ((0, 0, 0), 1)), "I": (((1, 1, 1), 2), ((0, 0, 0), 1)),
    "F": (((1, 1, 0), 2), ((0, 1, 1), 2)), "R": (((-1, 1, 1), 3), ((0, 0, 0), 1)),
}


@dataclass(frozen=True)
class Shot:
    """One orientation of one crystal in one pulse, as :func:`.ewald.excited` takes it."""

    crystal: Crystal
    rotation_33: np.ndarray
    k: float                # 1/wavelength, 1/A
    distance_m: float
    bandwidth: float        # dlambda / lambda, full width
    q_max: float            # 1/A
    scale: float
    extra_B_A2: float
    sector: tuple[int, int]     # signs of x and y of the quadrant that is looked at


@dataclass(frozen=True)
class FlatSpots:
    """Spots of all shots: tensors (N,) as in :class:`.bragg.Spots`, and the shot of each."""

    shot_N: Any
    x_m_N: Any
    y_m_N: Any
    photons_N: Any
    radial_m_N: Any
    tangential_m_N: Any

    def take(self, keep: Any) -> FlatSpots:
        """The spots selected by a mask or index tensor."""
        return FlatSpots(*(getattr(self, name)[keep] for name in self.__dataclass_fields__))

    @staticmethod
    def join(torch: Any, parts: Sequence[FlatSpots]) -> FlatSpots:
        return FlatSpots(*(torch.cat([getattr(part, name) for part in parts])
                           for name in FlatSpots.__dataclass_fields__))

    @staticmethod
    def of(torch: Any, device: Any, spots: Spots, shot: int) -> FlatSpots:
        """Spots from the processor, all of one shot."""
        columns = (spots.x_m_N, spots.y_m_N, spots.photons_N, spots.radial_m_N,
                   spots.tangential_m_N)
        return FlatSpots(torch.full((len(spots),), shot, device=device), *(
            torch.from_numpy(np.asarray(one, np.float64)).to(device) for one in columns))


class _Table:
    """What is known of each shot, as tensors with a row per shot."""

    def __init__(self, torch: Any, device: Any, shots: Sequence[Shot]) -> None:
        def put(values: Any, dtype: Any = np.float64) -> Any:
            return torch.from_numpy(np.array(values, dtype)).to(device)

        orients = [one.rotation_33 @ reciprocal_basis(one.crystal.cell) for one in shots]
        spans = [np.linalg.norm(np.linalg.inv(orient), axis=1) * one.q_max
                 for orient, one in zip(orients, shots, strict=True)]
        line = [int(np.argmax(span)) for span in spans]
        order = [[*(axis for axis in range(3) if axis != along), along] for along in line]
        self.orient = put(orients)
        self.permuted = put([orient[:, axes] for orient, axes in zip(orients, order, strict=True)])
        self.places = put([np.argsort(axes) for axes in order], np.int64)
        self.halves = put([[int(span[axis]) for axis in axes[:2]]
                           for span, axes in zip(spans, order, strict=True)], np.int64)
        crystals = [one.crystal for one in shots]
        self.k, self.q_max = put([one.k for one in shots]), put([one.q_max for one in shots])
        self.domain = put([c.domain_A for c in crystals])
        self.mosaicity = put([np.deg2rad(c.mosaicity_deg) for c in crystals])
        self.bandwidth = put([one.bandwidth for one in shots])
        self.widest = put([float(partiality_width(
            np.array(one.q_max ** 2), one.crystal.domain_A, np.deg2rad(one.crystal.mosaicity_deg),
            one.bandwidth, 1 / one.k)) for one in shots])
        self.sector = put([one.sector for one in shots])
        self.scale, self.extra_B = (put([one.scale for one in shots]),
                                    put([one.extra_B_A2 for one in shots]))
        self.distance = put([one.distance_m for one in shots])
        self.wilson_B = put([c.wilson_B_A2 for c in crystals])
        shapes = [protein_shape(c) for c in crystals]
        self.dip, self.bump = put([one[0] for one in shapes]), put([one[1] for one in shapes])
        # seed * golden + golden, wrapped to 64 bits
        wrapped = [((c.structure_seed % 2**63 + 1) * _GOLDEN) % 2**64 for c in crystals]
        self.salt = put([_signed(value) for value in wrapped], np.int64)
        self.origin = int(_HALF_RANGE * _KEY.sum())
        turned = [_turned_key(c.laue) for c in crystals]
        most = max(len(one) for one in turned)
        self.weights = put([np.concatenate([one, np.repeat(one[:1], most - len(one), axis=0)])
                            for one in turned], np.int64)
        rules = [_SELECTION[c.centring] for c in crystals]
        self.factors = put([[rule[0] for rule in both] for both in rules], np.int64)
        self.moduli = put([[rule[1] for rule in both] for both in rules], np.int64)


@functools.lru_cache(maxsize=16)
def _turned_key(laue: str) -> np.ndarray:
    """(M, 3): factors of h, k, l that make the index of each equivalent reflection."""
    return laue_rotations(laue) @ _KEY


def _signed(value: int) -> int:
    """The int64 with the bits of an unsigned 64-bit integer."""
    return value - 2**64 if value >= 2**63 else value


def _logical_shift(z: Any, bits: int) -> Any:
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _width(table: _Table, shot: Any, q2: Any) -> Any:
    """As :func:`.bragg.partiality_width`."""
    return ((0.45 / table.domain[shot]) ** 2 + (0.5 * table.mosaicity[shot]) ** 2 * q2
            + (0.5 * table.bandwidth[shot] / table.k[shot] * q2) ** 2).sqrt()


def _near_ewald(torch: Any, table: _Table) -> tuple[Any, Any]:
    """(shot_N, hkl_N3 int64): as :func:`.ewald.near_ewald` of every shot."""
    halves, device = table.halves, table.k.device
    wide = 2 * halves + 1
    lines = wide[:, 0] * wide[:, 1]
    shot = torch.repeat_interleave(torch.arange(len(lines), device=device), lines)
    number = torch.arange(len(shot), device=device) - (lines.cumsum(0) - lines)[shot]
    h = number // wide[shot, 1] - halves[shot, 0]
    m = number % wide[shot, 1] - halves[shot, 1]
    one, other, step = (table.permuted[:, :, axis] for axis in range(3))
    start = h[:, None] * one[shot] + m[:, None] * other[shot]
    length2 = (step * step).sum(1)[shot]
    k, step = table.k[shot], step[shot]
    width = _REACH * table.widest[shot]
    along = (start * step).sum(1)
    middle = -(along + k * step[:, 2]) / length2
    nearest2 = (start * start).sum(1)
    level = (nearest2 + 2 * k * start[:, 2]) / length2
    inner = (width * width - 2 * k * width) / length2
    outer = (width * width + 2 * k * width) / length2
    square = middle ** 2 - level
    foot = -along / length2
    reach2 = (table.q_max[shot] ** 2 - nearest2) / length2 + foot ** 2
    keep = torch.nonzero((square + outer >= 0) & (reach2 >= 0))[:, 0]
    shot, h, m = shot[keep], h[keep], m[keep]
    middle, square, foot, reach = middle[keep], square[keep], foot[keep], reach2[keep].sqrt()
    far = (square + outer[keep]).sqrt()
    near = (square + inner[keep]).clamp(min=0).sqrt()
    upper_low = torch.maximum(middle + near, foot - reach).ceil().long()
    upper_high = torch.minimum(middle + far, foot + reach).floor().long()
    lower_low = torch.maximum(middle - far, foot - reach).ceil().long()
    lower_high = torch.minimum(middle - near, foot + reach).floor().long()
    lower_high = torch.minimum(lower_high, upper_low - 1)
    low = torch.cat([lower_low, upper_low])
    count = (torch.cat([lower_high, upper_high]) - low + 1).clamp(min=0)
    row = torch.repeat_interleave(torch.arange(len(low), device=device), count)
    within = torch.arange(len(row), device=device) - (count.cumsum(0) - count)[row]
    line = row % len(shot)
    shot = shot[line]
    hml = torch.stack([h[line], m[line], low[row] + within], 1)
    hkl = torch.gather(hml, 1, table.places[shot])
    keep = (hkl != 0).any(1)
    return shot[keep], hkl[keep]


def _rows_times(matrices_E33: Any, shot: Any, hkl: Any) -> Any:
    """q of each reflection, float64 (N, 3)."""
    return sum(hkl[:, axis, None] * matrices_E33[:, :, axis][shot] for axis in range(3))


def _wilson(torch: Any, table: _Table, shot: Any, hkl: Any, q2: Any) -> Any:
    """As :func:`.crystal.wilson_intensities`."""
    best = torch.full_like(shot, -1)
    for number in range(table.weights.shape[1]):
        key = (hkl * table.weights[:, number][shot]).sum(1).abs() + table.origin
        best = torch.maximum(best, key)
    z = best + table.salt[shot]
    z = (z ^ _logical_shift(z, 30)) * _signed(_FIRST)
    z = (z ^ _logical_shift(z, 27)) * _signed(_SECOND)
    z = z ^ _logical_shift(z, 31)
    value = -(_logical_shift(z, 11).double() * 2.0 ** -53 + 2.0 ** -54).log()
    for rule in (0, 1):
        rest = (hkl * table.factors[:, rule][shot]).sum(1) % table.moduli[:, rule][shot]
        value = torch.where(rest == 0, value, torch.zeros_like(value))
    q = q2.sqrt()
    mean = 1.0 - table.dip[shot] * (-((q - 1 / 6.2) / 0.035) ** 2).exp()
    mean = mean + table.bump[shot] * (-((q - 1 / 4.4) / 0.04) ** 2).exp()
    return value * mean * (-2.0 * table.wilson_B[shot] * q2 / 4.0).exp()


def predict_all(torch: Any, device: Any, shots: Sequence[Shot],
                least_photons: float) -> FlatSpots:
    """Spots of every shot with more than ``least_photons``.

    What :func:`.ewald.excited` and :func:`.bragg.predict` find for one, but for reflections whose
    expected photons or excitation lie within rounding of a limit.  Crystals with a structure
    model are not for this function.
    """
    if not shots:
        empty = torch.zeros(0, dtype=torch.float64, device=device)
        return FlatSpots(empty.long(), *(empty for _ in range(5)))
    table = _Table(torch, device, shots)
    shot, hkl = _near_ewald(torch, table)
    q = _rows_times(table.orient, shot, hkl)
    sector = table.sector[shot]
    keep = (sector * q[:, :2] > -_SECTOR_MARGIN).all(1)
    shot, hkl, q = shot[keep], hkl[keep], q[keep]
    q2 = (q * q).sum(1)
    k = table.k[shot]
    radius = (k * k + 2 * k * q[:, 2] + q2).clamp(min=0).sqrt()
    keep = (radius - k).abs() < _REACH * _width(table, shot, q2)
    shot, hkl, q, q2, k, radius = (one[keep] for one in (shot, hkl, q, q2, k, radius))
    value = _wilson(torch, table, shot, hkl, q2).float().double()
    # the list of reflections holds |q|^2 as float32
    gamma = _width(table, shot, q2.float().double())
    excitation, along = radius - k, q[:, 2] + k
    keep = (value > 0) & (excitation.abs() < _KEPT * gamma) & (along > 0.05 * k)
    shot, q, q2, radius, value, gamma, excitation, along = (
        one[keep] for one in (shot, q, q2, radius, value, gamma, excitation, along))
    x, y = (table.distance[shot] * q[:, axis] / along for axis in (0, 1))
    cos_2theta = along / radius
    photons = (table.scale[shot] * value * (-0.5 * (excitation / gamma) ** 2).exp()
               / (gamma * table.domain[shot]) * (1 - (q[:, 0] / radius) ** 2) * cos_2theta ** 3
               * (-0.5 * table.extra_B[shot] * q2).exp())
    away = torch.hypot(x, y)
    radial = away * table.bandwidth[shot] / 2.355 / cos_2theta ** 2
    tangential = away * table.mosaicity[shot] / 2.355
    spots = FlatSpots(shot, x, y, photons, radial, tangential)
    return spots.take(photons > least_photons)


def paint_all(torch: Any, image_N: Any, fs_N: Any, ss_N: Any, photons_N: Any,
              covariance_N22: Any, added_BSF: Any, half: int) -> None:
    """Add Gaussian spots to float64 ``added_BSF``, each to image ``image_N``, in place.

    As :func:`.bragg.paint`: sampled at pixel centres within ``half`` pixels, normalised, cut off
    at the edge.
    """
    _, height, width = added_BSF.shape
    flat = added_BSF.reshape(-1)
    step = torch.arange(-half, half + 1, device=flat.device)
    at_a_time = max(1, _PATCH_VALUES // len(step) ** 2)
    for first in range(0, len(fs_N), at_a_time):
        part = slice(first, first + at_a_time)
        f, s = fs_N[part], ss_N[part]
        f0, s0 = f.round().long(), s.round().long()
        df = (step - (f - f0)[:, None])[:, None, :]
        ds = (step - (s - s0)[:, None])[:, :, None]
        cov = covariance_N22[part]
        a, b, d = cov[:, 0, 0], cov[:, 0, 1], cov[:, 1, 1]
        determinant = a * d - b * b
        power = ((d / determinant)[:, None, None] * df ** 2
                 + (a / determinant)[:, None, None] * ds ** 2
                 - (2 * b / determinant)[:, None, None] * ds * df)
        patch = (-0.5 * power).exp()
        patch = patch * (photons_N[part] / patch.sum((1, 2)))[:, None, None]
        rows = (s0[:, None] + step)[:, :, None].expand(patch.shape)
        columns = (f0[:, None] + step)[:, None, :].expand(patch.shape)
        inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
        index = (image_N[part][:, None, None] * height + rows) * width + columns
        flat.index_add_(0, index[inside], patch[inside])
