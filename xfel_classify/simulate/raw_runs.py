"""Raw events of a simulated run, its constants and its truth: what the run writers write.

A photon frame becomes 16-bit words as the detector would give them, here a Jungfrau (ePix10ka: see
:mod:`.raw_epix10ka`): gain stages with their own pedestals and gains per pixel, switched by signal,
readout noise, and a gain that drifted since the constants were taken.  psana's names, shapes and
units are kept throughout.

Axes: G gain stage, P panel, S slow, F fast.
"""
from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import h5py
import numpy as np

from .. import detectors
from ..core import ConfigurationError, Geometry
from .conditions import Conditions
from .sfx import SimulatedRun, Truth

__all__ = ["DetectorRun", "JungfrauRun", "PhotonSource", "RawEvent", "RawRun", "RunFiles",
           "TruthFile"]

GAIN_ADU_PER_KEV = (41.5, -1.39, -0.11)
PEDESTAL_ADU = (2900.0, 14600.0, 14700.0)
NOISE_ADU = (3.0, 5.0, 5.0)
SWITCH_ADU = 15900.0        # above, stage 0 hands over to stage 1
LOWEST_ADU = 1500.0         # below, stage 1 hands over to stage 2
START_S = 1_100_000_000     # of the first event, seconds since 1990-01-01


@dataclass(frozen=True)
class RawEvent:
    """One event ready to be written; ``raw_PSF`` is None when the detector is missing."""

    index: int
    timestamp: int
    raw_PSF: np.ndarray | None
    truth: Any          # Truth, or what another PhotonSource plants
    damaged: bool


class PhotonSource(Protocol):
    """What hits the detector: photons of an event on its pixels, and what was planted in it."""

    def event(self, number: int) -> tuple[np.ndarray, Any]: ...


class RawRun(Protocol):
    """What a run writer writes: a run on a detector of ``kind``."""

    kind: str
    shape: tuple[int, int, int]
    segments: int
    geometry: Geometry
    conditions: Any     # seed, run, photon_energy_eV, distance_m

    def constants(self) -> dict[str, np.ndarray | str]: ...

    def events(self, numbers: range) -> Iterator[RawEvent]: ...


@dataclass(frozen=True)
class RunFiles:
    """What a writer left: the run's files, the constants and the truth."""

    files: tuple[Path, ...]
    constants: Path
    truth: Path


def timestamp(index: int, rate_Hz: float) -> int:
    """psana2's 64-bit stamp of an event: seconds since 1990 in the high half, ns in the low."""
    nanoseconds = START_S * 10**9 + round((index + 1) * 1e9 / rate_Hz)
    return (nanoseconds // 10**9) << 32 | nanoseconds % 10**9


class DetectorRun:
    """A simulated run on a detector with gain stages: what its kinds share.

    ``segments`` are panels (None: the kind's usual number).  ``photons`` makes the source of
    photons for the detector's geometry; the default is protein crystals under ``conditions``.
    A kind draws its constants in ``_prepare`` and makes words in ``encode``.
    """

    kind = ""
    usual_segments = 1
    pedestals: np.ndarray       # (G, P, S, F), ADU, float32 like the two below
    gain: np.ndarray            # ADU/keV
    noise: np.ndarray           # ADU
    status: np.ndarray          # uint64; not 0: bad

    def __init__(self, conditions: Conditions | Any, segments: int | None = None, *,
                 rate_Hz: float = 120.0, damaged: Collection[int] = (),
                 missing: Collection[int] = (),
                 photons: Callable[[Geometry], PhotonSource] | None = None) -> None:
        detector = detectors.detector(self.kind)
        shipped = detector.geometry or {}
        segments = self.usual_segments if segments is None else segments
        if segments not in shipped:
            raise ConfigurationError(f"a {self.kind} of {segments} segments was asked for; it has "
                                     f"{', '.join(map(str, sorted(shipped)))}")
        self.conditions, self.segments, self.rate_Hz = conditions, segments, rate_Hz
        self.damaged, self.missing = frozenset(damaged), frozenset(missing)
        self.geometry_text = (resources.files(detectors) / "geometry"
                              / str(shipped[segments])).read_text(encoding="utf-8")
        self.geometry = detectors.default_geometry(detector, segments)
        self._run: PhotonSource = (SimulatedRun(conditions, self.geometry, calm=True)
                                   if photons is None else photons(self.geometry))
        self.shape = self.geometry.shape
        self._prepare(np.random.default_rng([conditions.seed, conditions.run, 21]))

    def _prepare(self, rng: np.random.Generator) -> None:
        raise NotImplementedError

    def constants(self) -> dict[str, np.ndarray | str]:
        """Constants under psana's names: (G, P, S, F) arrays and the geometry text."""
        return {"pedestals": self.pedestals, "pixel_gain": self.gain, "pixel_rms": self.noise,
                "pixel_status": self.status, "geometry": self.geometry_text}

    def events(self, numbers: range) -> Iterator[RawEvent]:
        """The events of the run, one after the other; each is the same whatever came before."""
        for number in numbers:
            photons_PSF, truth = self._run.event(number)
            raw = None if number in self.missing else self.encode(photons_PSF, truth, number)
            yield RawEvent(number, timestamp(number, self.rate_Hz), raw, truth,
                           number in self.damaged)

    def encode(self, photons_PSF: np.ndarray, truth: Any, number: int) -> np.ndarray:
        """uint16 words of a photon frame."""
        raise NotImplementedError

    def energies(self, rng: np.random.Generator, photons_PSF: np.ndarray,
                 truth: Any) -> np.ndarray:
        """keV that pixels see, float32 (P, S, F): bad, hot and stray pixels have their own."""
        keV = photons_PSF * np.float32(truth.photon_energy_eV / 1000)
        flat = keV.reshape(-1)
        flat[self._bad] = rng.exponential(200.0, len(self._bad))
        flat[self._hot] += rng.exponential(100.0, len(self._hot))
        stray = rng.integers(flat.size, size=rng.poisson(
            self.conditions.salt_fraction * flat.size))
        flat[stray] += np.exp(rng.uniform(np.log(20), np.log(5000), len(stray)))
        return keV

    def _fail_pixels(self, rng: np.random.Generator, stages: int) -> None:
        """Pixels that the constants know to be bad, the gain's drift, pixels gone hot since."""
        c = self.conditions
        bad = rng.random(self.shape, np.float32) < c.dead_fraction + c.hot_fraction
        self.status = np.zeros((stages, *self.shape), np.uint64)
        self.status[:, bad] = 1
        drift = 1 + c.gain_spread * rng.standard_normal((self.segments, 1, 1), np.float32)
        self._true_gain = self.gain * drift
        self._bad = np.flatnonzero(bad)
        self._hot = np.flatnonzero(rng.random(self.shape, np.float32) < 0.3 * c.hot_fraction)


class JungfrauRun(DetectorRun):
    """A simulated run on a Jungfrau of 1, 2, 8 or 32 modules."""

    kind = "jungfrau"
    usual_segments = 2

    def _prepare(self, rng: np.random.Generator) -> None:
        stages = (3, *self.shape)
        self.pedestals = np.empty(stages, np.float32)
        self.gain = np.empty(stages, np.float32)
        self.noise = np.empty(stages, np.float32)
        for g in range(3):
            self.pedestals[g] = PEDESTAL_ADU[g] + 60 * rng.standard_normal(self.shape, np.float32)
            self.gain[g] = GAIN_ADU_PER_KEV[g] * (
                1 + 0.02 * rng.standard_normal(self.shape, np.float32))
            self.noise[g] = NOISE_ADU[g]
        self._fail_pixels(rng, 3)
        self._noise_pool = [NOISE_ADU[0] * rng.standard_normal(self.shape, np.float32)
                            for _ in range(4)]

    def encode(self, photons_PSF: np.ndarray, truth: Any, number: int) -> np.ndarray:
        """16-bit words of a photon frame: value in the low 14 bits, gain stage in the top 2."""
        c = self.conditions
        rng = np.random.default_rng([c.seed, c.run, number, 2])
        keV = self.energies(rng, photons_PSF, truth)
        noise = np.roll(self._noise_pool[number % len(self._noise_pool)],
                        int(rng.integers(self.shape[2])), axis=2)
        common = NOISE_ADU[0] * rng.standard_normal((self.segments, 1, 1), np.float32)
        adu = self.pedestals[0] + self._true_gain[0] * keV + noise
        adu += common
        words = np.clip(np.rint(adu), 0, 0x3FFF).astype(np.uint16)
        over = np.nonzero(adu > SWITCH_ADU)
        if over[0].size:
            medium = self.pedestals[1][over] + self._true_gain[1][over] * keV[over]
            low = self.pedestals[2][over] + self._true_gain[2][over] * keV[over]
            lowest = medium < LOWEST_ADU
            value = np.clip(np.rint(np.where(lowest, low, medium)), 0, 0x3FFF).astype(np.uint16)
            words[over] = value | np.where(lowest, 3 << 14, 1 << 14).astype(np.uint16)
        return words


class TruthFile:
    """Collects the truth of a run's events and writes it beside the run, whole or not at all.

    ``timestamp`` (N,) int64, ``is_hit`` (N,) bool, ``n_lattices``, ``n_visible`` (spots with
    S/N >= 5), ``n_stray`` (of these), ``photon_energy_eV``, ``pulse_energy_mJ``, ``damaged``,
    ``missing``; the visible spots of event i are rows offsets[i] to offsets[i + 1] of
    ``spots/panel``, ``spots/fs``, ``spots/ss`` (pixel index, 0 = centre of the first pixel),
    ``spots/photons``, ``spots/d_A``.
    Where the truth of an event has ``columns()``, those are written in place of all but the first,
    the flags and the spots, and the spots where it has such.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._events: list[RawEvent] = []

    def add(self, event: RawEvent) -> None:
        self._events.append(RawEvent(event.index, event.timestamp,
                                     None if event.raw_PSF is None else event.raw_PSF[:0],
                                     event.truth, event.damaged))

    def write(self) -> Path:
        truths = [event.truth for event in self._events]
        fresh = self.path.with_name(self.path.name + ".tmp")
        with h5py.File(fresh, "w") as file:
            file["timestamp"] = np.array([e.timestamp for e in self._events], np.int64)
            file["damaged"] = np.array([e.damaged for e in self._events], bool)
            file["missing"] = np.array([e.raw_PSF is None for e in self._events], bool)
            if truths and hasattr(truths[0], "columns"):
                rows = [truth.columns() for truth in truths]
                for name in rows[0]:
                    file[name] = np.array([row[name] for row in rows])
            else:
                for name, dtype in (("is_hit", bool), ("n_lattices", np.int16),
                                    ("n_visible", np.int32), ("n_stray", np.int32),
                                    ("photon_energy_eV", np.float64),
                                    ("pulse_energy_mJ", np.float64)):
                    file[name] = np.array([getattr(t, name) for t in truths], dtype)
            if not truths or hasattr(truths[0], "fs_N"):
                self._write_spots(file, truths)
        os.replace(fresh, self.path)
        return self.path

    @staticmethod
    def _write_spots(file: h5py.File, truths: list[Truth]) -> None:
        lengths = [len(t.fs_N) for t in truths]
        file["spots/offsets"] = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        for name in ("panel", "fs", "ss", "photons", "d_A"):
            column = [getattr(t, f"{name}_N") for t in truths]
            file[f"spots/{name}"] = np.concatenate([np.zeros(0), *column]).astype(np.float32)
