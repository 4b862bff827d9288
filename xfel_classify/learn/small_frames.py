"""Frames of a run as small pictures about the beam, for methods that compare whole patterns.

Each picture element is the mean of the working pixels under it; the beam lies on the corner of
four elements.  Any detector with a geometry will do, halves with a gap and dead parts included.

Axes: N frames, H row (0 on top, +y up), W column (+x to the right), PSF detector pixels.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..analyses.classify import photons_scale
from ..core import ConfigurationError, Constants, EventSource, EventStatus, Shard, Window
from ..pipeline.loop import DEFAULT_PHOTON_ENERGY_EV
from ..preprocess import calibrate

__all__ = ["SmallFrames", "Shrinker", "read_small", "small_frames"]

CHUNK = 256
DARK_BELOW = 20.0
"""Photons: the chance of none is 2e-9."""


@dataclass(frozen=True)
class SmallFrames:
    """Frames in the order of the run; ``images_NHW`` float32, mean photons per detector pixel.

    ``good_HW`` has a working pixel; ``beam_RC`` is the beam in elements from the upper left
    corner, ``pool`` detector pixels lie along an element of ``element_m``.  ``index_N`` and
    ``timestamp_N`` name the events; ``unusable`` had no usable image.  Photons are assumed where
    the source tells no photon energy (``assumed_energy``).
    """

    images_NHW: np.ndarray
    good_HW: np.ndarray
    beam_RC: tuple[float, float]
    pool: int
    index_N: np.ndarray
    timestamp_N: np.ndarray
    unusable: int = 0
    exp: str = ""
    run: int = 0
    detector: str = ""
    element_m: float = 0.0
    distance_m: float | None = None
    photon_energy_eV: float | None = None
    assumed_energy: bool = False
    notes: tuple[str, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.images_NHW)

    @property
    def stem(self) -> str:
        return f"{self.exp}_r{self.run:04d}"


class Shrinker:
    """From calibrated (P, S, F) frames to small pictures with at most ``side`` elements a side.

    ``reach_px`` leaves out what is further from the beam than that many detector pixels, 0 = all.
    Raises :class:`ConfigurationError` where no pixel is left.
    """

    def __init__(self, constants: Constants, side: int = 64, reach_px: float = 0.0) -> None:
        if side < 4:
            raise ConfigurationError(f"pictures of {side} elements were asked for; give at least 4")
        geometry = constants.geometry
        used = constants.good_PSF.astype(bool)
        if geometry.bad_PSF is not None:
            used = used & ~geometry.bad_PSF
        x = geometry.x_m_PSF.astype(np.float64) / geometry.pixel_size_m
        y = geometry.y_m_PSF.astype(np.float64) / geometry.pixel_size_m
        if reach_px > 0:
            used = used & (np.abs(x) <= reach_px) & (np.abs(y) <= reach_px)
        if not used.any():
            where = f"within {reach_px:g} pixels of the beam" if reach_px > 0 else "on the detector"
            raise ConfigurationError(f"no working pixel lies {where}; check mask, geometry and "
                                     "reach")
        x, y = x[used], y[used]
        span = max(x.max() - x.min(), y.max() - y.min()) + 1
        self.pool = max(1, int(np.ceil(span / side)))
        column, row = (np.floor(v / self.pool).astype(np.int64) for v in (x, -y))
        self.beam_RC = float(-row.min()), float(-column.min())
        row, column = row - row.min(), column - column.min()
        self.shape = int(row.max()) + 1, int(column.max()) + 1
        self._pixels = np.flatnonzero(used)
        self._target = row * self.shape[1] + column
        members = np.bincount(self._target, minlength=self.shape[0] * self.shape[1])
        self.good_HW = (members > 0).reshape(self.shape)
        self._share = 1.0 / np.maximum(members, 1)
        self._ring = np.hypot(x, y).astype(np.int64)
        self.sum_P = np.zeros(len(self._pixels))        # of all frames, on the pixels used

    def __call__(self, calibrated_PSF: np.ndarray) -> np.ndarray:
        """float32 (H, W); 0 where no pixel works."""
        values = calibrated_PSF.ravel()[self._pixels]
        self.sum_P += values
        sums = np.bincount(self._target, values, minlength=self._share.size)
        return (sums * self._share).reshape(self.shape).astype(np.float32)

    def lit(self, least: float = DARK_BELOW) -> tuple[np.ndarray, int]:
        """((H, W) share of the pixels that answer, how many do not), after all frames.

        A pixel does not answer when it was 0 in every frame although the pixels at its distance
        from the beam have ``least`` photons on average: a gap or a dead part that no mask names.
        """
        answers_P = self.sum_P != 0
        count_R = np.bincount(self._ring)
        mean_R = np.bincount(self._ring, self.sum_P) / np.maximum(count_R, 1)
        dark_P = ~answers_P & (mean_R[self._ring] >= least)
        left = np.bincount(self._target, ~dark_P, minlength=self._share.size) * self._share
        return left.reshape(self.shape), int(dark_P.sum())


def small_frames(source: EventSource, side: int = 64, reach_px: float = 0.0,
                 chunk: int = CHUNK, shrink: Shrinker | None = None) -> Iterator[SmallFrames]:
    """Small frames of an opened source, ``chunk`` at a time, so that memory is bounded.

    The last piece may be empty of frames but counts the unusable ones.
    """
    constants = source.constants()
    shrink = shrink or Shrinker(constants, side, reach_px)
    geometry = constants.geometry
    stated = geometry.photon_energy_eV
    images: list[np.ndarray] = []
    events: list[tuple[int, int]] = []
    energies: list[float] = []
    assumed, unusable = False, 0

    def piece() -> SmallFrames:
        run = source.run
        index, stamp = (np.array([one[i] for one in events], np.int64) for i in (0, 1))
        stack = np.stack(images) if images else np.zeros((0, *shrink.shape), np.float32)
        return SmallFrames(
            stack, shrink.good_HW, shrink.beam_RC, shrink.pool, index, stamp, unusable, run.exp,
            run.run, run.detector, geometry.pixel_size_m * shrink.pool, geometry.distance_m,
            float(np.median(energies)) if energies else stated, assumed, tuple(run.notes))

    for frame in source.frames(whole_run(source)):
        raw = frame.raw_PSF
        if frame.status is not EventStatus.OK or raw is None or raw.shape != constants.shape:
            unusable += 1
            continue
        energy = float(frame.scalars.get("photon_energy_eV", np.nan))
        if not energy > 0:
            energy, assumed = stated or DEFAULT_PHOTON_ENERGY_EV, assumed or not stated
        scale = photons_scale(Window(unit="photon"), constants.unit, energy)
        energies.append(energy)
        images.append(shrink(calibrate(raw, constants)) * np.float32(scale))
        events.append((frame.index, frame.timestamp))
        if len(images) == chunk:
            yield piece()
            images, events, unusable = [], [], 0
    yield piece()


def whole_run(source: EventSource) -> Shard:
    """Every event of the source for this process."""
    total = source.expected_events()
    position = 0

    def claim(count: int) -> range:
        nonlocal position
        first = position
        position = first + count if total is None else min(first + count, total)
        return range(first, max(first, position))

    return Shard(claim)


def read_small(source: EventSource, side: int = 64, reach_px: float = 0.0,
               report: Callable[[int], Any] = lambda done: None) -> SmallFrames:
    """All usable frames of an opened source; 64 x 64 elements are 16 KiB a frame.

    Pixels that never answer (:meth:`Shrinker.lit`) count as masked; a note tells their number.
    """
    pieces = []
    shrink = Shrinker(source.constants(), side, reach_px)
    for piece in small_frames(source, side, reach_px, shrink=shrink):
        pieces.append(piece)
        report(sum(len(one) for one in pieces))
    last = pieces[-1]
    images_NHW = np.concatenate([one.images_NHW for one in pieces])
    left_HW, dark = shrink.lit()
    notes, good_HW = last.notes, last.good_HW & (left_HW > 0)
    if dark:        # they added nothing to the sums: the mean is over the others
        images_NHW /= np.where(good_HW, left_HW, 1.0).astype(np.float32)
        notes = (*notes, f"{dark} pixels are 0 in every frame though others at their distance from "
                 "the beam are not; they are taken as masked")
    return SmallFrames(
        images_NHW, good_HW, last.beam_RC, last.pool,
        np.concatenate([one.index_N for one in pieces]),
        np.concatenate([one.timestamp_N for one in pieces]),
        sum(one.unusable for one in pieces), last.exp, last.run, last.detector, last.element_m,
        last.distance_m, last.photon_energy_eV, last.assumed_energy, notes)
