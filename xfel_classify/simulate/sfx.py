"""Simulated stills of serial crystallography: the events of a run, on a window or a detector.

Physics as in methods section 7.3: excitation error, partiality, Wilson intensities and a B factor
from the resolution label (:mod:`.crystal`, :mod:`.bragg`); air and solvent background, ice rings,
jet streaks; then a detector with gaps, gain spread, hot and dead pixels, common mode, noise.
Every event has a generator of its own, ``default_rng([seed, run, event])``, so the same event has
the same pixels whoever simulates it and in whatever order.

Axes: P panel, S slow, F fast, H window row, W window column, B image, N spot.
"""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..core import Geometry, Panel
from .bragg import Spots, paint, partiality_width, predict
from .conditions import Conditions, draw_conditions
from .crystal import random_rotation, reflections, rotation_about

__all__ = ["LEAST_IN_WINDOW", "LEAST_ON_DETECTOR", "SimulatedRun", "Truth", "crops",
           "draw_conditions", "window_geometry"]

LEAST_ON_DETECTOR, LEAST_IN_WINDOW = 11, 4
"""Visible spots (S/N >= 5) that make an event a hit: more than 10 on the detector, as the paper
labels its runs, and so many in the central window, which is all that the network sees."""

VISIBLE_SNR = 5.0
SPOT_PIXELS = 12.0          # under a spot, for its signal to noise
WINDOW_PX = 350
DETECTOR_RADIUS_M = 0.075   # spots beyond do not count as "on the detector"
ICE_D_A = (3.90, 3.67, 3.44, 2.67, 2.25, 2.07, 1.95, 1.92)


@dataclass(frozen=True)
class Truth:
    """What was planted in an event.  ``spots`` are expected, before noise: panel, fs, ss (pixel
    index, 0 = centre of the first pixel), photons and d in angstrom, visible ones only."""

    is_hit: bool
    n_lattices: int
    n_visible: int
    n_visible_window: int
    photons_scale: float
    pulse_energy_mJ: float
    photon_energy_eV: float
    panel_N: np.ndarray = field(repr=False)
    fs_N: np.ndarray = field(repr=False)
    ss_N: np.ndarray = field(repr=False)
    photons_N: np.ndarray = field(repr=False)
    d_A_N: np.ndarray = field(repr=False)


def window_geometry(conditions: Conditions, size_px: int = WINDOW_PX) -> Geometry:
    """A beam-centred square at pixel resolution, with the gaps of a panel mosaic as bad pixels.

    Where the mosaic lies under the window is part of the run's conditions.
    """
    rng = np.random.default_rng([conditions.seed, conditions.run, 11])
    p = conditions.pixel_size_m
    middle = (size_px - 1) / 2
    step = (np.arange(size_px) - middle) * p
    x, y = np.broadcast_arrays(step[None, :], -step[:, None])
    bad = np.zeros((size_px, size_px), bool)
    shape = conditions.panel_px if rng.random() < 0.5 else conditions.panel_px[::-1]
    for axis in range(2):
        period = shape[axis] + conditions.gap_px[axis]
        gap = (np.arange(size_px) + int(rng.integers(period))) % period < conditions.gap_px[axis]
        bad |= gap[:, None] if axis == 0 else gap[None, :]
    panel = Panel("window", 0, 0, size_px - 1, 0, size_px - 1,
                  (-(middle + 0.5) * p, (middle + 0.5) * p, 0.0), (p, 0.0, 0.0), (0.0, -p, 0.0))
    return Geometry(x[None].astype(np.float32), y[None].astype(np.float32),
                    np.zeros((1, size_px, size_px), np.float32), p, (panel,),
                    conditions.distance_m, conditions.photon_energy_eV, bad[None], "window")


class SimulatedRun:
    """A run on a detector: everything its events share, prepared once.

    ``geometry`` is that of a detector, or of :func:`window_geometry` (None: that one).
    ``calm`` leaves out gaps, faults and gain errors, for raw runs whose detector brings its own.
    """

    def __init__(self, conditions: Conditions, geometry: Geometry | None = None, *,
                 calm: bool = False) -> None:
        self.conditions = c = conditions
        self.geometry = window_geometry(c) if geometry is None else geometry
        shape = self.geometry.shape
        rng = np.random.default_rng([c.seed, c.run, 12])
        x, y = self.geometry.x_m_PSF, self.geometry.y_m_PSF
        radius = np.hypot(x, y)
        s = c.inverse_d_A(radius.astype(np.float64)).astype(np.float32)
        tilt = 1 + (c.slope[0] * x + c.slope[1] * y) / 0.1
        polarisation = 1 - (x / np.sqrt(x * x + y * y + np.float32(c.distance_m) ** 2)) ** 2
        common = np.maximum(tilt, 0.1) * polarisation
        self._air_PSF = (c.air_photons * np.exp(-(s / 0.06) ** 2) * common).astype(np.float32)
        ring = np.exp(-0.5 * ((s - c.ring_s_A) / c.ring_width_A) ** 2) + 0.15
        self._ring_PSF = (c.ring_photons * ring * common).astype(np.float32)
        self._s_PSF = s
        good = np.ones(shape, bool)
        self._hot = np.zeros(0, np.int64)
        self._gain_PSF: np.ndarray | None = None
        if not calm:
            if self.geometry.bad_PSF is not None:
                good &= ~self.geometry.bad_PSF
            self._gain_PSF = self._gains(rng)
            good &= rng.random(shape, np.float32) >= c.dead_fraction
            self._hot = np.flatnonzero(rng.random(shape, np.float32) < c.hot_fraction)
            self._hot_photons = np.exp(rng.uniform(np.log(5), np.log(3000), len(self._hot)))
        good &= radius >= c.beam_stop_px * c.pixel_size_m
        self.good_PSF = good
        self._panels = self.geometry.panels
        edge_A = 1.0 / float(s.max())
        self._table = reflections(c.crystal, max(edge_A, 2.5), limit=250_000)
        self._width_N = partiality_width(
            self._table.q2_N, c.crystal.domain_A, np.deg2rad(c.crystal.mosaicity_deg),
            c.bandwidth, c.wavelength_A)

    def _gains(self, rng: np.random.Generator) -> np.ndarray:
        c, shape = self.conditions, self.geometry.shape
        gain = 1 + c.gain_noise * rng.standard_normal(shape, np.float32)
        if shape[0] > 1:
            gain *= 1 + c.gain_spread * rng.standard_normal((shape[0], 1, 1), np.float32)
        else:       # a window over several panels: a step along one axis
            axis = 1 + int(rng.integers(2))
            edge = int(rng.integers(1, shape[axis]))
            part = (slice(None), slice(edge, None)) if axis == 1 else (
                slice(None), slice(None), slice(edge, None))
            gain[part] *= 1 + c.gain_spread * rng.standard_normal()
        return gain

    def event(self, number: int) -> tuple[np.ndarray, Truth]:
        """(photons_PSF float32, truth) of one event; masked pixels are 0."""
        c = self.conditions
        rng = np.random.default_rng([c.seed, c.run, number, 1])
        pulse = max(0.2, 1 + c.pulse_spread * rng.standard_normal())
        energy = c.photon_energy_eV * (1 + 1e-3 * rng.standard_normal())
        expected = self._background(rng, pulse)
        shift = rng.normal(0, max(c.center_jitter_px, 1e-9), 2) * c.pixel_size_m
        spots = self._stray(rng)
        is_hit = bool(rng.random() < c.hit_fraction)
        scale, lattices = 0.0, 0
        if is_hit:
            crystal, scale, lattices = self._crystal(rng, expected, pulse)
            spots = Spots.join([crystal, spots])
        placed = self._paint(expected, spots, shift)
        photons = self._detect(rng, expected)
        snr = placed[3] / np.sqrt(placed[3] + SPOT_PIXELS * placed[5] + 1e-9)
        seen = snr >= VISIBLE_SNR
        in_window = (np.abs(placed[6][seen]) < 170 * c.pixel_size_m) & (
            np.abs(placed[7][seen]) < 170 * c.pixel_size_m)
        truth = Truth(is_hit, lattices, int(seen.sum()), int(in_window.sum()), scale, 2.0 * pulse,
                      energy, *(column[seen] for column in placed[:5]))
        return photons, truth

    def _background(self, rng: np.random.Generator, pulse: float) -> np.ndarray:
        c = self.conditions
        thickness = max(0.1, 1 + 0.3 * rng.standard_normal())
        expected = self._air_PSF * np.float32(pulse)
        expected += self._ring_PSF * np.float32(pulse * thickness)
        if rng.random() < c.ice_chance:
            for d in ICE_D_A[:int(rng.integers(1, len(ICE_D_A) + 1))]:
                height = c.ring_photons * pulse * rng.uniform(0.2, 3)
                width = rng.uniform(0.002, 0.006)
                expected += np.float32(height) * np.exp(
                    -0.5 * ((self._s_PSF - np.float32(1 / d)) / np.float32(width)) ** 2)
        if rng.random() < c.streak_chance:
            self._streak(rng, expected, pulse)
        return expected

    def _streak(self, rng: np.random.Generator, expected: np.ndarray, pulse: float) -> None:
        """A streak of the jet: a line through the beam, falling off along and across."""
        angle = rng.normal(0, 0.2) + (np.pi / 2 if rng.random() < 0.5 else 0)
        x, y = self.geometry.x_m_PSF, self.geometry.y_m_PSF
        across = x * np.float32(np.sin(angle)) - y * np.float32(np.cos(angle))
        along = x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle))
        height = pulse * np.exp(rng.uniform(np.log(1), np.log(100)))
        p = self.conditions.pixel_size_m
        reach = rng.uniform(15, 80) * p
        expected += np.float32(height) * np.exp(-np.abs(along) / np.float32(reach) - 0.5 * (
            across / np.float32(rng.uniform(1.0, 4.0) * p)) ** 2)

    def _stray(self, rng: np.random.Generator) -> Spots:
        """At most one spot that belongs to no crystal: salt, a fragment, a cosmic ray."""
        c = self.conditions
        n = int(rng.random() < c.chance_spot)
        reach = 0.5 * WINDOW_PX * c.pixel_size_m
        x, y = rng.uniform(-reach, reach, (2, n))
        photons = np.exp(rng.uniform(np.log(30), np.log(3000), n))
        s = np.maximum(c.inverse_d_A(np.hypot(x, y)), 1e-4)
        return Spots(x, y, photons, np.zeros(n), np.zeros(n), 1 / s, np.zeros((n, 3), np.float32),
                     np.zeros(n))

    def _crystal(self, rng: np.random.Generator, expected_PSF: np.ndarray,
                 pulse: float) -> tuple[Spots, float, int]:
        """Spots of the crystal that was hit: bright enough to be one for the paper's labels."""
        c = self.conditions
        low, high = np.log(c.spot_photons)
        scale = float(np.exp(rng.uniform(low, high)))
        lattices = 1 if rng.random() < 0.85 else int(rng.integers(2, 4))
        level = self._typical_background(expected_PSF)
        while True:
            first = random_rotation(rng)
            turns = [first] + [rotation_about(rng.standard_normal(3), np.deg2rad(
                rng.uniform(1, 180))) @ first for _ in range(lattices - 1)]
            spots = Spots.join([self._predict(turn, scale * pulse / lattices) for turn in turns])
            radius = np.hypot(spots.x_m_N, spots.y_m_N)
            s = c.inverse_d_A(radius)
            noise = np.sqrt(spots.photons_N + SPOT_PIXELS * level(s) + 1e-9)
            visible = (spots.photons_N / noise >= 1.2 * VISIBLE_SNR) & (
                radius > 1.2 * c.beam_stop_px * c.pixel_size_m)
            here = visible & (radius < DETECTOR_RADIUS_M)
            half = 160 * c.pixel_size_m
            window = visible & (np.abs(spots.x_m_N) < half) & (np.abs(spots.y_m_N) < half)
            if here.sum() >= LEAST_ON_DETECTOR and window.sum() >= LEAST_IN_WINDOW + 2:
                return spots, scale, lattices
            scale *= 1.3        # a crystal too small to be labelled a hit: take a larger one

    def _typical_background(self, expected_PSF: np.ndarray):
        """Expected photons per pixel as a function of 1/d, from a coarse sample."""
        s = self._s_PSF[:, ::16, ::16].ravel()
        level = expected_PSF[:, ::16, ::16].ravel()
        bins = np.linspace(0, float(s.max()) * 1.001 + 1e-6, 24)
        index = np.digitize(s, bins) - 1
        count = np.maximum(np.bincount(index, minlength=23)[:23], 1)
        mean = np.bincount(index, level, minlength=23)[:23] / count
        middle = 0.5 * (bins[1:] + bins[:-1])
        return lambda wanted: np.interp(wanted, middle, mean)

    def _predict(self, rotation_33: np.ndarray, scale: float) -> Spots:
        c = self.conditions
        return predict(self._table, rotation_33, photon_energy_eV=c.photon_energy_eV,
                       distance_m=c.distance_m, domain_A=c.crystal.domain_A,
                       mosaicity_rad=np.deg2rad(c.crystal.mosaicity_deg), bandwidth=c.bandwidth,
                       scale=scale, extra_B_A2=c.extra_B_A2, width_N=self._width_N)

    def _paint(self, expected_PSF: np.ndarray, spots: Spots,
               shift_m: np.ndarray) -> tuple[np.ndarray, ...]:
        """Add spots to the panels they fall on; (panel, fs, ss, photons, d, background, x, y)."""
        c = self.conditions
        keep = spots.photons_N > 0.3
        spots = spots.take(keep)
        x, y = spots.x_m_N + shift_m[0], spots.y_m_N + shift_m[1]
        found: list[tuple[np.ndarray, ...]] = []
        background = expected_PSF.copy()
        for panel in self._panels:
            fs_axis, ss_axis = np.array(panel.fs_m[:2]), np.array(panel.ss_m[:2])
            inverse = np.linalg.inv(np.stack([fs_axis, ss_axis], axis=1))
            offset = np.stack([x - panel.corner_m[0], y - panel.corner_m[1]])
            f, t = inverse @ offset - 0.5
            height, width = (panel.max_ss - panel.min_ss + 1, panel.max_fs - panel.min_fs + 1)
            inside = (f > -4) & (f < width + 3) & (t > -4) & (t < height + 3)
            if not inside.any():
                continue
            f, t = f[inside], t[inside]
            radial = np.stack([x[inside], y[inside]]) / np.maximum(
                np.hypot(x[inside], y[inside]), 1e-9)
            along = inverse @ radial * c.pixel_size_m
            across = inverse @ np.stack([-radial[1], radial[0]]) * c.pixel_size_m
            a = np.minimum(spots.radial_m_N[inside] / c.pixel_size_m, 2.5) ** 2
            b = np.minimum(spots.tangential_m_N[inside] / c.pixel_size_m, 2.5) ** 2
            covariance = (a * along[:, None] * along[None] + b * across[:, None] * across[None])
            covariance = np.moveaxis(covariance, 2, 0) + c.spot_sigma_px ** 2 * np.eye(2)
            region = (panel.index, slice(panel.min_ss, panel.max_ss + 1),
                      slice(panel.min_fs, panel.max_fs + 1))
            piece = np.ascontiguousarray(expected_PSF[region])
            paint(piece, f, t, spots.photons_N[inside], covariance, half=6)
            expected_PSF[region] = piece
            on = (f > -0.5) & (f < width - 0.5) & (t > -0.5) & (t < height - 0.5)
            f, t = f[on] + panel.min_fs, t[on] + panel.min_ss
            at = (panel.index, np.rint(t).astype(int), np.rint(f).astype(int))
            usable = self.good_PSF[at]
            one = [np.full(len(f), panel.index), f, t, spots.photons_N[inside][on],
                   spots.d_A_N[inside][on], background[at], x[inside][on], y[inside][on]]
            found.append(tuple(column[usable] for column in one))
        if not found:
            return tuple(np.zeros(0) for _ in range(8))
        return tuple(np.concatenate(columns) for columns in zip(*found, strict=True))

    def _detect(self, rng: np.random.Generator, expected_PSF: np.ndarray) -> np.ndarray:
        """Counting noise and the detector's faults; photons, float32."""
        c = self.conditions
        photons = rng.poisson(expected_PSF).astype(np.float32)
        if self._gain_PSF is not None:
            photons *= self._gain_PSF
            noise = rng.standard_normal(photons.shape, np.float32)
            photons += np.float32(c.read_noise_photons) * noise
            photons += np.float32(c.common_mode_photons) * rng.standard_normal(
                (len(photons), 1, 1), np.float32)
            flat = photons.reshape(-1)
            flat[self._hot] += self._hot_photons * rng.uniform(0.5, 1.5, len(self._hot))
            stray = rng.integers(flat.size, size=rng.poisson(c.salt_fraction * flat.size))
            flat[stray] += np.exp(rng.uniform(np.log(5), np.log(1000), len(stray)))
        photons[~self.good_PSF] = 0
        return photons


def crops(conditions: Conditions, events: Iterable[int] | Sequence[int],
          size_px: int = WINDOW_PX) -> tuple[np.ndarray, list[Truth]]:
    """(images_BHW float32 photons, truths) of beam-centred windows of some events."""
    run = SimulatedRun(conditions, window_geometry(conditions, size_px))
    images, truths = [], []
    for number in events:
        photons_PSF, truth = run.event(number)
        images.append(photons_PSF[0])
        truths.append(truth)
    return np.stack(images) if images else np.zeros((0, size_px, size_px), np.float32), truths
