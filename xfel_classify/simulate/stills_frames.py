"""Raw runs of labelled stills: photons of :mod:`.stills_512` on the panels of a detector.

The events of a run share detector, distance and mean photon energy, as at the beamline; all else,
the crystal's orientation and lattices, resolution, background, shadows, is drawn for each as for
the labelled sets.  A raw run adds the detector: gain stages, noise, bad pixels.

Axes: P panel, S slow, F fast, N spot.
"""
from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..core import Geometry
from . import stills_512, stills_panels
from .bragg import HC_EV_A, Spots
from .panel_spots import place_spots
from .stills_512 import SPOT_PIXELS, VISIBLE_SNR
from .stills_conditions import SIDE_PX, StillConditions, draw_still, label_B_A2

__all__ = ["StillFrames", "StillRunConditions", "StillTruth"]

_CRYSTAL, _PHOTONS = 81, 82         # purposes of random numbers


@dataclass(frozen=True)
class StillRunConditions:
    """What the events of a run share, under the names that run writers look for."""

    seed: int
    run: int
    preset: str
    photon_energy_eV: float
    distance_m: float
    dead_fraction: float
    hot_fraction: float
    gain_spread: float
    salt_fraction: float

    @classmethod
    def draw(cls, seed: int, run: int, preset: str) -> StillRunConditions:
        c = draw_still(seed, run, 0, preset)
        return cls(seed, run, preset, c.photon_energy_eV, c.distance_m, c.dead_fraction, 1e-6,
                   c.panel_gain, c.stray_fraction)


@dataclass(frozen=True)
class StillTruth:
    """What was planted in an event; its visible spots as in :class:`.sfx.Truth`."""

    is_hit: bool
    conditions: StillConditions
    photon_energy_eV: float
    panel_N: np.ndarray = field(repr=False)
    fs_N: np.ndarray = field(repr=False)
    ss_N: np.ndarray = field(repr=False)
    photons_N: np.ndarray = field(repr=False)
    d_A_N: np.ndarray = field(repr=False)

    pulse_energy_mJ = 2.0

    @property
    def n_lattices(self) -> int:
        return self.conditions.n_lattices if self.is_hit else 0

    @property
    def n_visible(self) -> int:
        return len(self.fs_N)

    def columns(self) -> dict[str, Any]:
        """Values of the event for the truth file, by name."""
        c, hit = self.conditions, self.is_hit
        return {"is_hit": hit, "n_lattices": np.int16(self.n_lattices),
                "n_visible": np.int32(self.n_visible), "d_A": c.d_A if hit else np.nan,
                "B_A2": label_B_A2(c.d_A) if hit else np.nan,
                "misset_deg": min(c.misset_deg, default=0.0) if hit else np.nan,
                "photon_energy_eV": self.photon_energy_eV,
                "pulse_energy_mJ": self.pulse_energy_mJ, "distance_m": c.distance_m,
                "tilt_deg": np.array(c.tilt_deg)}


class StillFrames:
    """Photons of the events of a run on the pixels of ``geometry``.

    ``hit_fraction`` of the events have a crystal.
    """

    def __init__(self, conditions: StillRunConditions, geometry: Geometry, *,
                 hit_fraction: float = 1.0) -> None:
        self.conditions, self.geometry, self.hit_fraction = conditions, geometry, hit_fraction
        self._x, self._y = (axis.astype(np.float64) for axis in (geometry.x_m_PSF,
                                                                 geometry.y_m_PSF))
        self._radius = np.hypot(self._x, self._y)
        p = geometry.pixel_size_m
        half = max(float(np.abs(axis).max()) for axis in (self._x, self._y)) + 0.5 * p
        # quadrants that just hold the detector
        self._pool = next(pool for pool in (1, 2, 4, 8, 16) if SIDE_PX * pool * p >= half)
        self._reach = half / (SIDE_PX * self._pool * p)
        self._seen_once = functools.lru_cache(maxsize=1)(self._seen)    # events of a run share it

    def drawn(self, number: int) -> StillConditions:
        """Conditions of an event on this detector."""
        run = self.conditions
        c = draw_still(run.seed, run.run, number, run.preset)
        rng = np.random.default_rng([run.seed, run.run, number, _CRYSTAL])
        energy = run.photon_energy_eV * (1 + 1e-3 * rng.standard_normal())
        edge = self._reach * SIDE_PX * self._pool * self.geometry.pixel_size_m
        q_edge = 2 * np.sin(0.5 * np.arctan(edge / run.distance_m)) * energy / HC_EV_A
        # a label finer than the detector's edge would not be in the picture
        return dataclasses.replace(
            c, photon_energy_eV=energy, distance_m=run.distance_m, layout="", pool=self._pool,
            pixel_size_m=self.geometry.pixel_size_m, reach=self._reach,
            d_A=max(c.d_A, 0.85 / q_edge))

    def event(self, number: int) -> tuple[np.ndarray, StillTruth]:
        """(photons_PSF float32, truth); counted photons, no detector yet."""
        run, c = self.conditions, self.drawn(number)
        rng = np.random.default_rng([run.seed, run.run, number, _PHOTONS])
        is_hit = bool(rng.random() < self.hit_fraction)
        shared = stills_512.shared_rng(c)
        expected = self._background(c)
        parts = [stills_512.grains(c, shared)]
        if is_hit:
            turns, scale = stills_512.lattices_of(c)
            parts += [stills_512.spots_of(c, turn, scale) for turn in turns]
        spots = Spots.join(parts)
        x, y = spots.x_m_N, spots.y_m_N
        if any(c.tilt_deg):
            x, y = stills_panels.on_tilted(c.tilt_deg, c.distance_m, x, y)
        p = c.pixel_size_m
        seen_PSF = self._radius >= c.beam_stop_m
        placed = place_spots(expected, self.geometry.panels, seen_PSF, spots,
                             x + p * c.center_jitter_px[0], y + p * c.center_jitter_px[1], p,
                             c.spot_sigma_px, widest_px=4.0)
        self._dim(c, shared, expected)
        expected[~seen_PSF] = 0
        photons = rng.poisson(expected).astype(np.float32)
        light, background = placed[3], placed[5]
        noise = np.sqrt(light + SPOT_PIXELS * (background + c.read_noise_photons ** 2) + 1e-9)
        panel, fs, ss, light, d = (column[light / noise >= VISIBLE_SNR] for column in placed[:5])
        return photons, StillTruth(is_hit, c, c.photon_energy_eV, panel, fs, ss, light, d)

    def _seen(self, tilt_deg: tuple[float, float],
              distance_m: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(x and y in pixels, radius in half pixels as index, polarisation factor) of the
        directions that the pixels of a tilted detector see."""
        x, y = self._x, self._y
        if any(tilt_deg):
            x, y = stills_panels.seen_from(tilt_deg, distance_m, x, y)
        radius2 = x * x + y * y
        p = self.geometry.pixel_size_m
        polarised = 1 - x * x / (radius2 + distance_m ** 2)
        return ((x / p).astype(np.float32), (y / p).astype(np.float32),
                (2 * np.sqrt(radius2) / p).astype(np.int32), polarised.astype(np.float32))

    def _background(self, c: StillConditions) -> np.ndarray:
        x, y, index, polarised = self._seen_once(c.tilt_deg, c.distance_m)
        level = stills_512.profile(c).astype(np.float32)
        expected = np.take(level, index, mode="clip")
        expected *= polarised
        slope = 1 + (c.slope[0] * self.geometry.x_m_PSF + c.slope[1] * self.geometry.y_m_PSF) / 0.1
        expected *= np.maximum(slope, np.float32(0.1))
        if c.streak_photons:
            angle, reach, width = stills_panels.streak_shape(stills_512.jet_rng(c))
            cosine, sine = np.float32(np.cos(angle)), np.float32(np.sin(angle))
            across, along = x * sine - y * cosine, x * cosine + y * sine
            expected += np.float32(c.streak_photons) * np.exp(
                -np.abs(along) / np.float32(reach) - 0.5 * (across / np.float32(width)) ** 2)
        return expected

    def _dim(self, c: StillConditions, shared: np.random.Generator,
             expected: np.ndarray) -> None:
        """The shadow of a nozzle or a beam-stop arm, in place."""
        if c.shadow >= 1:
            return
        shadow = stills_512.draw_shadow(c, shared)
        depth = (np.cos(shadow.angle) * self._x + np.sin(shadow.angle) * self._y
                 ) / c.pixel_size_m - shadow.far_px
        behind = depth > 0
        if shadow.width_px:
            behind &= depth < shadow.width_px
        expected[behind] *= np.float32(c.shadow)
