"""Raw runs of single particles: photons on a detector, and the pnCCD that turns them into words.

Hits and misses of one preset on every pixel of a detector; the pnCCD is that of methods section 1a
(1024 x 1024 pixels of 75 um, here with the gap of the run between its halves); on a Jungfrau 1M,
which has as many pixels of that size, the same run can be written as xtc2.

Axes: P panel, S slow, F fast, C copy.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .. import detectors
from ..core import Geometry
from .raw_runs import JungfrauRun, RawEvent, timestamp
from .spi_conditions import SpiConditions, draw_spi
from .spi_detector import add_surroundings
from .spi_images import copies_of, expected_on, spi_labels, view_of
from .spi_volume import PAPER_VOXEL, mesh_for

__all__ = ["PnccdRun", "SpiFrames", "SpiRunConditions", "SpiTruth", "spi_run"]

_HIT, _PHOTONS, _WORDS, _CONSTANTS = 71, 72, 73, 74     # purposes of random numbers
PIXEL_M = 75e-6
GAIN_ADU_PER_PHOTON = 1.3       # at the photon energy of the run
NOISE_ADU = 0.6
PEDESTAL_ADU = 900.0
FULL_ADU = 16383
_MOST_COPIES = 8


@dataclass(frozen=True)
class SpiRunConditions:
    """What the events of a run share, under the names that run writers look for."""

    seed: int
    run: int
    preset: str
    photon_energy_eV: float
    distance_m: float
    dead_fraction: float
    hot_fraction: float
    gain_spread: float = 0.0
    salt_fraction: float = 0.0

    @classmethod
    def draw(cls, seed: int, run: int, preset: str) -> SpiRunConditions:
        c = draw_spi(seed, run, 0, preset)
        return cls(seed, run, preset, c.photon_energy_eV, c.distance_m, c.dead_fraction,
                   c.hot_fraction)


@dataclass(frozen=True)
class SpiTruth:
    """What was planted in an event; of a miss, that it is one.

    Rotations are matrices R (r' = R r), positions in angstrom.
    """

    is_hit: bool
    conditions: SpiConditions
    labels: dict[str, float | int]
    rotation_C33: np.ndarray = field(repr=False)
    position_C3: np.ndarray = field(repr=False)

    @property
    def photon_energy_eV(self) -> float:
        return self.conditions.photon_energy_eV

    @property
    def pulse_energy_mJ(self) -> float:
        return 2.0 * self.conditions.fluence

    def columns(self) -> dict[str, Any]:
        """Values of the event for the truth file, by name."""
        rotation = np.full((_MOST_COPIES, 3, 3), np.nan)
        position = np.full((_MOST_COPIES, 3), np.nan)
        n = min(len(self.rotation_C33), _MOST_COPIES)
        rotation[:n], position[:n] = self.rotation_C33[:n], self.position_C3[:n]
        c, hit = self.conditions, self.is_hit
        return {
            "is_hit": hit, "count": np.int16(c.count if hit else 0),
            "particle": np.int16(self.labels["particle"] if hit else -1),
            "name": np.bytes_(c.particle if hit else ""), "kind": np.bytes_(c.kind if hit else ""),
            "stand_in": np.bytes_(c.stand_in if hit else ""),
            "quality": np.int16(self.labels["quality"] if hit else 0),
            "diameter_A": float(self.labels["diameter_A"]) if hit else np.nan,
            "photons": float(self.labels["photons"]) if hit else 0.0, "fluence": c.fluence,
            "photon_energy_eV": c.photon_energy_eV, "pulse_energy_mJ": self.pulse_energy_mJ,
            "distance_m": c.distance_m, "copies/rotation": rotation, "copies/position_A": position}


class SpiFrames:
    """Photons of the events of a run on the pixels of a detector."""

    def __init__(self, conditions: SpiRunConditions, geometry: Geometry, *,
                 hit_fraction: float = 0.5, structures: str | Path | None = None,
                 device: str = "") -> None:
        self.conditions, self.hit_fraction = conditions, hit_fraction
        self.structures, self.device = structures, device
        x, y = geometry.x_m_PSF.astype(np.float64), geometry.y_m_PSF.astype(np.float64)
        # a square grid about the beam that reaches over the detector by half a pixel
        half = int(np.ceil(max(np.abs(x).max(), np.abs(y).max()) / PIXEL_M + 1.0))
        self._side = 2 * half
        column, row = x / PIXEL_M + half - 0.5, half - 0.5 - y / PIXEL_M
        self._low = (np.floor(row).astype(np.int32), np.floor(column).astype(np.int32))
        self._share = (np.float32(row - self._low[0]), np.float32(column - self._low[1]))

    def event(self, number: int) -> tuple[np.ndarray, SpiTruth]:
        """(photons_PSF float32, truth); counted photons, no detector yet."""
        run = self.conditions
        c = draw_spi(run.seed, run.run, number, run.preset)
        rng = np.random.default_rng([run.seed, run.run, number, _HIT])
        is_hit = bool(rng.random() < self.hit_fraction)
        side = self._side
        wide = dataclasses.replace(c, shape=(side, side), block=1, first_px=(-side / 2, -side / 2))
        view = view_of(wide)
        # rounded up, so that one cached volume serves all gaps
        mesh = -(-mesh_for(view.s_max_A, PAPER_VOXEL / c.finer) // 16) * 16 + 1
        copies = copies_of(c, self.structures, mesh) if is_hit else []
        expected = add_surroundings(wide, expected_on(
            self.device, copies, view, c.photons_um2 * 1e12, c.coherence_A))
        if is_hit:
            labels = spi_labels(c, self.structures, self.device)
        else:
            labels = {"particle": -1, "quality": 0, "diameter_A": np.nan, "photons": 0.0}
        counting = np.random.default_rng([run.seed, run.run, number, _PHOTONS])
        on_panels = self._on_panels(expected)
        photons = counting.poisson(on_panels) if c.poisson else on_panels
        return photons.astype(np.float32), SpiTruth(
            is_hit, c, labels, np.array([one.rotation_33 for one in copies]).reshape(-1, 3, 3),
            np.array([one.position_3 for one in copies]).reshape(-1, 3))

    def _on_panels(self, expected_HW: np.ndarray) -> np.ndarray:
        (row, column), (down, right) = self._low, self._share
        flat = expected_HW.reshape(-1)
        first = row * self._side + column
        top = flat[first] * (1 - right) + flat[first + 1] * right
        first = first + self._side
        bottom = flat[first] * (1 - right) + flat[first + 1] * right
        return top * (1 - down) + bottom * down


class PnccdRun:
    """A simulated run on a pnCCD: four segments of 512 x 512 pixels, one gain, 14 bits used.

    ``gap_px`` is the distance of its halves in pixels.
    """

    kind = "pnccd"
    segments = 4

    def __init__(self, conditions: SpiRunConditions, *, gap_px: float = 0.0,
                 hit_fraction: float = 0.5, structures: str | Path | None = None,
                 rate_Hz: float = 120.0, missing: Collection[int] = (),
                 device: str = "") -> None:
        self.conditions, self.rate_Hz = conditions, rate_Hz
        self.missing = frozenset(missing)
        self.shape = (4, 512, 512)
        self.geometry_text = pnccd_geometry(gap_px, conditions.distance_m)
        self.geometry = detectors.read_geometry(self.geometry_text, self.shape, "pnccd")
        self.frames = SpiFrames(conditions, self.geometry, hit_fraction=hit_fraction,
                                structures=structures, device=device)
        rng = np.random.default_rng([conditions.seed, conditions.run, _CONSTANTS])
        stages = (1, *self.shape)
        self.pedestals = PEDESTAL_ADU + 40 * rng.standard_normal(stages, np.float32)
        self.gain = (GAIN_ADU_PER_PHOTON / conditions.photon_energy_eV * 1000) * (
            1 + 0.02 * rng.standard_normal(stages, np.float32))
        self.noise = np.full(stages, NOISE_ADU, np.float32)
        bad = rng.random(stages, np.float32) < conditions.dead_fraction + conditions.hot_fraction
        self.status = bad.astype(np.uint64)
        self._bad = np.flatnonzero(bad)

    def constants(self) -> dict[str, np.ndarray | str]:
        """Constants under psana's names: (1, P, S, F) arrays and the geometry text."""
        return {"pedestals": self.pedestals, "pixel_gain": self.gain, "pixel_rms": self.noise,
                "pixel_status": self.status, "geometry": self.geometry_text}

    def events(self, numbers: range) -> Iterator[RawEvent]:
        """The events of the run; each is the same whatever came before."""
        for number in numbers:
            photons_PSF, truth = self.frames.event(number)
            raw = None if number in self.missing else self.encode(photons_PSF, truth, number)
            yield RawEvent(number, timestamp(number, self.rate_Hz), raw, truth, False)

    def encode(self, photons_PSF: np.ndarray, truth: SpiTruth, number: int) -> np.ndarray:
        """uint16 words of a photon frame: pedestal, gain, noise, common mode of lines of 128."""
        c = self.conditions
        rng = np.random.default_rng([c.seed, c.run, number, _WORDS])
        keV = photons_PSF * np.float32(truth.photon_energy_eV / 1000)
        keV.reshape(-1)[self._bad] = rng.exponential(300.0, len(self._bad))
        adu = self.pedestals[0] + self.gain[0] * keV
        adu += NOISE_ADU * rng.standard_normal(self.shape, np.float32)
        lines = 0.3 * rng.standard_normal((4, 512, 4), np.float32)
        adu += np.repeat(lines, 128, axis=2)
        return np.clip(np.rint(adu), 0, FULL_ADU).astype(np.uint16)


def pnccd_geometry(gap_px: float, distance_m: float) -> str:
    """psana's description of a pnCCD whose halves are ``gap_px`` pixels apart."""
    design = (detectors.detector("pnccd").geometry or {})[4]
    from importlib import resources

    text = (resources.files(detectors) / "geometry" / design).read_text(encoding="utf-8")
    lines = []
    for line in text.splitlines():
        words = line.split()
        if line.startswith("DETPNCCD"):     # the place of a half, micrometres
            sign = -1 if float(words[5]) < 0 else 1
            words[5] = f"{sign * 1e6 * PIXEL_M * gap_px / 2:.1f}"
        if line.startswith("IP:"):
            words[6] = f"{1e6 * distance_m:.1f}"
        lines.append(line if line.startswith("#") else " ".join(words))
    return "\n".join(lines) + "\n"


def spi_run(seed: int, run: int, preset: str, detector: str = "pnccd", *,
            hit_fraction: float = 0.5, structures: str | Path | None = None, device: str = "",
            ) -> PnccdRun | JungfrauRun:
    """Run ``run`` of the data set ``seed`` on a pnCCD or a Jungfrau 1M ("jungfrau").

    ``device`` computes the diffraction with torch (:mod:`.spi_torch`).
    """
    conditions = SpiRunConditions.draw(seed, run, preset)
    if detector == "jungfrau":
        return JungfrauRun(conditions, 2, photons=lambda geometry: SpiFrames(
            conditions, geometry, hit_fraction=hit_fraction, structures=structures,
            device=device))
    return PnccdRun(conditions, gap_px=draw_spi(seed, run, 0, preset).gap_px,
                    hit_fraction=hit_fraction, structures=structures, device=device)
