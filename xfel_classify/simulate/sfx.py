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
from typing import Any

import numpy as np

from ..core import Geometry, Panel
from .bragg import Spots, partiality_width, predict
from .conditions import Conditions, draw_conditions
from .crystal import random_rotation, reflections, rotation_about
from .panel_spots import Located, locate_spots, paint_located
from .sfx_nuisances import grains, more_background, shadow_on, strays
from .stills_panels import on_tilted, seen_from

__all__ = ["LEAST_IN_WINDOW", "LEAST_ON_DETECTOR", "Light", "Scene", "SimulatedRun", "Truth",
           "crops", "draw_conditions", "window_geometry"]

LEAST_ON_DETECTOR, LEAST_IN_WINDOW = 11, 4
"""Visible spots (S/N >= 5) that make an event a hit: more than 10 on the detector, as the paper
labels its runs, and so many in the central window, which is all that the network sees."""

VISIBLE_SNR = 5.0
SPOT_PIXELS = 12.0          # under a spot, for its signal to noise
WINDOW_PX = 350
DETECTOR_RADIUS_M = 0.075   # spots beyond do not count as "on the detector"
_SAMPLE = (slice(None), slice(None, None, 16), slice(None, None, 16))     # of a detector's pixels
ICE_D_A = (3.90, 3.67, 3.44, 2.67, 2.25, 2.07, 1.95, 1.92)


@dataclass(frozen=True)
class Truth:
    """What was planted in an event.  Spots are expected, before noise: panel, fs, ss (pixel
    index, 0 = centre of the first pixel), photons and d in angstrom, visible ones only.

    ``n_visible`` counts them all; ``n_stray`` of them are the stray ones of presets that have
    such, which ``n_visible_window`` leaves out: they make no hit.
    """

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
    n_stray: int = 0


@dataclass(frozen=True)
class Light:
    """What is drawn of an event's background: air and solvent, ice rings, a streak."""

    pulse: float
    thickness: float                                        # of the jet, relative
    ice: tuple[tuple[float, float, float], ...]             # (d in A, photons, width in 1/A)
    streak: tuple[float, float, float, float] | None        # (angle, photons, reach and width, m)


@dataclass(frozen=True)
class Scene:
    """What is drawn of an event: ``spots`` may make it a hit, ``more`` never do."""

    number: int
    energy_eV: float
    light: Light
    shift_m: np.ndarray
    is_hit: bool
    scale: float
    lattices: int
    spots: Spots
    more: Spots
    expected_PSF: np.ndarray = field(repr=False)    # background, to be painted on; or nothing
    rng: np.random.Generator = field(repr=False)    # of the photons and the detector


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
        seen = radius
        if any(c.tilt_deg):         # each pixel has the background of the direction it sees
            seen = np.hypot(*seen_from(c.tilt_deg, c.distance_m, x, y))
        s = c.inverse_d_A(seen.astype(np.float64)).astype(np.float32)
        tilt = 1 + (c.slope[0] * x + c.slope[1] * y) / 0.1
        polarisation = 1 - (x / np.sqrt(x * x + y * y + np.float32(c.distance_m) ** 2)) ** 2
        common = np.maximum(tilt, 0.1) * polarisation
        self.air_PSF = (c.air_photons * np.exp(-(s / 0.06) ** 2) * common).astype(np.float32)
        ring = np.exp(-0.5 * ((s - c.ring_s_A) / c.ring_width_A) ** 2) + 0.15
        self.ring_PSF = (c.ring_photons * ring * common).astype(np.float32)
        if c.lipid_photons or c.plastic_photons or c.smooth_photons:
            self.ring_PSF += more_background(c, s) * common
        self.shadow_PSF = shadow_on(c, self.geometry) if c.shadow < 1 else None
        self.s_PSF = s
        good = np.ones(shape, bool)
        self.hot = np.zeros(0, np.int64)
        self.gain_PSF: np.ndarray | None = None
        if not calm:
            if self.geometry.bad_PSF is not None:
                good &= ~self.geometry.bad_PSF
            self.gain_PSF = self._gains(rng)
            good &= rng.random(shape, np.float32) >= c.dead_fraction
            self.hot = np.flatnonzero(rng.random(shape, np.float32) < c.hot_fraction)
            self.hot_photons = np.exp(rng.uniform(np.log(5), np.log(3000), len(self.hot)))
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
        scene = self.scene(number)
        expected = scene.expected_PSF
        placed = self._paint(expected, scene.spots, scene)
        more = self._paint(expected, scene.more, scene) if len(scene.more) else None
        if self.shadow_PSF is not None:
            expected *= self.shadow_PSF
        return self._detect(scene.rng, expected), self.truth(scene, placed, more)

    def scene(self, number: int, coarse: bool = False) -> Scene:
        """All that is drawn of an event before its photons are counted.

        ``coarse`` leaves out the expected photons of the whole detector.
        """
        c = self.conditions
        rng = np.random.default_rng([c.seed, c.run, number, 1])
        pulse = max(0.2, 1 + c.pulse_spread * rng.standard_normal())
        energy = c.photon_energy_eV * (1 + 1e-3 * rng.standard_normal())
        light = self.draw_light(rng, pulse)
        expected = np.zeros(0, np.float32) if coarse else self.background(light)
        shift = rng.normal(0, max(c.center_jitter_px, 1e-9), 2) * c.pixel_size_m
        spots = self._stray(rng)
        others = len(spots)
        is_hit = bool(rng.random() < c.hit_fraction)
        scale, lattices = 0.0, 0
        if is_hit:
            sample = self.background(light, _SAMPLE) if coarse else expected[_SAMPLE]
            crystal, scale, lattices = self._crystal(rng, sample, pulse)
            spots = Spots.join([crystal, spots])
        more = spots.take(np.zeros(0, int))
        if c.stray_spots or c.salt_chance or c.ice_spots:
            more = Spots.join([strays(c, number, self.geometry, others),
                               grains(c, number, bool(light.ice))])
        return Scene(number, energy, light, shift, is_hit, scale, lattices, spots, more, expected,
                     rng)

    def truth(self, scene: Scene, placed: tuple[np.ndarray, ...],
              more: tuple[np.ndarray, ...] | None) -> Truth:
        """The truth of an event whose spots, and ``more`` that make no hit, were placed."""
        c = self.conditions
        placed = self._visible(placed)
        in_window = (np.abs(placed[6]) < 170 * c.pixel_size_m) & (
            np.abs(placed[7]) < 170 * c.pixel_size_m)
        fallen = 0
        if more is not None:
            more = self._visible(more)
            fallen = len(more[0])
            placed = tuple(np.concatenate(both) for both in zip(placed, more, strict=True))
        panel, fs, ss, photons, d = placed[:5]
        return Truth(scene.is_hit, scene.lattices, len(panel), int(in_window.sum()), scene.scale,
                     2.0 * scene.light.pulse, scene.energy_eV, panel, fs, ss, photons, d, fallen)

    def draw_light(self, rng: np.random.Generator, pulse: float) -> Light:
        """The background of an event."""
        c = self.conditions
        thickness = max(0.1, 1 + 0.3 * rng.standard_normal())
        ice = []
        if rng.random() < c.ice_chance:
            for d in ICE_D_A[:int(rng.integers(1, len(ICE_D_A) + 1))]:
                height = c.ring_photons * pulse * rng.uniform(0.2, 3)
                ice.append((d, height, rng.uniform(0.002, 0.006)))
        streak = None
        if rng.random() < c.streak_chance:
            angle = rng.normal(0, 0.2) + (np.pi / 2 if rng.random() < 0.5 else 0)
            height = pulse * np.exp(rng.uniform(np.log(1), np.log(100)))
            reach = rng.uniform(15, 80) * c.pixel_size_m
            streak = (angle, height, reach, rng.uniform(1.0, 4.0) * c.pixel_size_m)
        return Light(pulse, thickness, tuple(ice), streak)

    def background(self, light: Light, part: Any = ...) -> np.ndarray:
        """Expected photons without spots, float32; ``part`` indexes the pixels that are wanted."""
        expected = self.air_PSF[part] * np.float32(light.pulse)
        expected += self.ring_PSF[part] * np.float32(light.pulse * light.thickness)
        for d, height, width in light.ice:
            expected += np.float32(height) * np.exp(
                -0.5 * ((self.s_PSF[part] - np.float32(1 / d)) / np.float32(width)) ** 2)
        if light.streak:    # of the jet: a line through the beam, falling off along and across
            angle, height, reach, width = light.streak
            x, y = self.geometry.x_m_PSF[part], self.geometry.y_m_PSF[part]
            across = x * np.float32(np.sin(angle)) - y * np.float32(np.cos(angle))
            along = x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle))
            expected += np.float32(height) * np.exp(-np.abs(along) / np.float32(reach) - 0.5 * (
                across / np.float32(width)) ** 2)
        return expected

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

    def _crystal(self, rng: np.random.Generator, sample_PSF: np.ndarray,
                 pulse: float) -> tuple[Spots, float, int]:
        """Spots of the crystal that was hit: bright enough to be one for the paper's labels."""
        c = self.conditions
        low, high = np.log(c.spot_photons)
        scale = float(np.exp(rng.uniform(low, high)))
        lattices = 1 if rng.random() < 0.85 else int(rng.integers(2, 4))
        level = self._typical_background(sample_PSF)
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

    def _typical_background(self, sample_PSF: np.ndarray):
        """Expected photons per pixel as a function of 1/d, from a coarse sample."""
        s = self.s_PSF[_SAMPLE].ravel()
        level = sample_PSF.ravel()
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

    def locate(self, spots: Spots, scene: Scene) -> Located:
        """Where spots of an event fall (:func:`.panel_spots.locate_spots`)."""
        c = self.conditions
        spots = spots.take(spots.photons_N > 0.3)
        x, y = spots.x_m_N, spots.y_m_N
        if any(c.tilt_deg):
            x, y = on_tilted(c.tilt_deg, c.distance_m, x, y)
        return locate_spots(self._panels, self.good_PSF, spots, x + scene.shift_m[0],
                            y + scene.shift_m[1], c.pixel_size_m, c.spot_sigma_px)

    def _paint(self, expected_PSF: np.ndarray, spots: Spots,
               scene: Scene) -> tuple[np.ndarray, ...]:
        """Add spots to the panels they fall on; (panel, fs, ss, photons, d, background, x, y)."""
        return paint_located(expected_PSF, self.locate(spots, scene))

    def _visible(self, placed: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
        """Those of the spots that :meth:`_paint` placed that stand out of the noise."""
        if self.shadow_PSF is not None:
            at = tuple(np.rint(placed[i]).astype(int) for i in (0, 2, 1))
            dimmed = self.shadow_PSF[at]
            placed = (*placed[:3], placed[3] * dimmed, placed[4], placed[5] * dimmed, *placed[6:])
        photons, background = placed[3], placed[5]
        seen = photons / np.sqrt(photons + SPOT_PIXELS * background + 1e-9) >= VISIBLE_SNR
        return tuple(column[seen] for column in placed)

    def _detect(self, rng: np.random.Generator, expected_PSF: np.ndarray) -> np.ndarray:
        """Counting noise and the detector's faults; photons, float32."""
        c = self.conditions
        photons = rng.poisson(expected_PSF).astype(np.float32)
        if self.gain_PSF is not None:
            photons *= self.gain_PSF
            noise = rng.standard_normal(photons.shape, np.float32)
            photons += np.float32(c.read_noise_photons) * noise
            photons += np.float32(c.common_mode_photons) * rng.standard_normal(
                (len(photons), 1, 1), np.float32)
            flat = photons.reshape(-1)
            flat[self.hot] += self.hot_photons * rng.uniform(0.5, 1.5, len(self.hot))
            stray = rng.integers(flat.size, size=rng.poisson(c.salt_fraction * flat.size))
            flat[stray] += np.exp(rng.uniform(np.log(5), np.log(1000), len(stray)))
            if c.saturation_photons:
                np.minimum(photons, np.float32(c.saturation_photons), out=photons)
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
