"""What all peak finders share: the list of a frame's peaks, its columns, and the analysis around.

A finder is a class with ``find_peaks(frame) -> Peaks``; :class:`PeakAnalysis` turns it into an
analysis whose ragged columns hold the peaks of every event, in the order they were found in.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import msgspec
import numpy as np

from ..core import Batch, CalibratedFrame, Column, ConfigurationError, Constants, RunInfo, Total


@dataclass
class Peaks:
    """Peaks of one frame (N of them), in the order of the search.

    ``panel``, ``npix`` int16, the rest float32.  ``fs`` and ``ss`` are sub-pixel positions within
    the panel (0 = centre of the first pixel).  ``total``, ``maximum``, ``sigma`` and
    ``background`` are in the unit of the calibrated frame; total and maximum are above the local
    background.  ``found`` is how many there were before the list was cut.
    """

    panel: np.ndarray
    fs: np.ndarray
    ss: np.ndarray
    total: np.ndarray
    maximum: np.ndarray
    snr: np.ndarray
    npix: np.ndarray
    sigma: np.ndarray
    background: np.ndarray
    found: int = 0

    def __len__(self) -> int:
        return len(self.panel)

    @classmethod
    def none(cls) -> Peaks:
        """An empty list."""
        whole, real = np.zeros(0, np.int16), np.zeros(0, np.float32)
        return cls(whole, real, real, real, real, real, whole, real, real)

    def first(self, most: int) -> Peaks:
        """The first ``most`` peaks; ``found`` still counts all."""
        if len(self) <= most:
            return self
        arrays = {f.name: getattr(self, f.name)[:most] for f in fields(self) if f.name != "found"}
        return Peaks(**arrays, found=self.found)


def peak_columns(prefix: str, finder: str, min_peaks: int, max_num_peaks: int) -> dict[str, Column]:
    """The columns of a peak finder; values are in the unit of calibrated frames."""
    by = f"by {finder}"
    unit = "unit of calibrated pixels"
    columns = {
        "n": Column("int32", missing=-1, doc=f"number of peaks found {by}"),
        "hit": Column("uint8", missing=255, names=("miss", "hit"),
                      doc=f"1 where at least {min_peaks} peaks were found {by}"),
        "truncated": Column("uint8", missing=255, names=("no", "yes"),
                            doc=f"1 where more than {max_num_peaks} peaks were found: the lists "
                                "hold the first of them in the order of the search, n counts all"),
        "panel": Column("int16", (-1,), missing=-1, doc="panel of the (P, S, F) array"),
        "fs": Column("float32", (-1,), unit="pixel",
                     doc="centroid along the fast axis; 0 = centre of the panel's first pixel"),
        "ss": Column("float32", (-1,), unit="pixel",
                     doc="centroid along the slow axis; 0 = centre of the panel's first pixel"),
        "total": Column("float32", (-1,), unit=unit,
                        doc="sum over the peak's pixels, local background subtracted"),
        "max": Column("float32", (-1,), unit=unit,
                      doc="brightest pixel of the peak, local background subtracted"),
        "snr": Column("float32", (-1,), doc="signal to noise ratio as the finder defines it"),
        "npix": Column("int16", (-1,), missing=-1, unit="pixel", doc="pixels of the peak"),
        "sigma": Column("float32", (-1,), unit=unit, doc="local noise of one pixel"),
        "background": Column("float32", (-1,), unit=unit, doc="local background of one pixel"),
        "radius_px": Column("float32", (-1,), unit="pixel",
                            doc="distance from the beam, in pixels of the detector plane"),
    }
    return {f"{prefix}/{name}": column for name, column in columns.items()}


def radius_in_pixels(constants: Constants) -> np.ndarray:
    """Distance of every pixel centre from the beam, float32 (P, S, F), in pixels."""
    geometry = constants.geometry
    radius_m_PSF = np.hypot(geometry.x_m_PSF, geometry.y_m_PSF)
    return (radius_m_PSF / np.float32(geometry.pixel_size_m)).astype(np.float32)


def within(radius_px_PSF: np.ndarray, good_PSF: np.ndarray, min_res: float,
           max_res: float | None) -> np.ndarray:
    """Good pixels between the two radii (pixels, both included)."""
    chosen_PSF = good_PSF & (radius_px_PSF >= min_res)
    if max_res is not None:
        chosen_PSF &= radius_px_PSF <= max_res
    return chosen_PSF


@dataclass(frozen=True)
class Threshold:
    """A threshold on pixel values that is derived from the unit when it is not stated.

    Frames in photons: ``photons``; in keV: ``photons`` times the event's photon energy; in ADU,
    where nothing tells how many of them a photon makes: ``adu``.
    """

    stated: float | None
    photons: float
    adu: float

    def value(self, unit: str, photon_energy_eV: float) -> float:
        """The threshold in ``unit``."""
        if self.stated is not None:
            return self.stated
        if unit == "keV":
            return self.photons * photon_energy_eV / 1000
        return self.photons if unit == "photon" else self.adu

    def text(self, unit: str) -> str:
        """For the summary: what was asked for."""
        if self.stated is not None:
            return f"{self.stated:g} {unit}"
        return f"{self.adu:g} ADU" if unit == "ADU" else f"{self.photons:g} photons"


def require(condition: bool, asked: str, rule: str) -> None:
    """Raise :class:`ConfigurationError` unless ``condition``."""
    if not condition:
        raise ConfigurationError(f"peak finder: {asked} was asked for; {rule}")


class PeakConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What every peak finder is told; a finder's ``Config`` adds its own."""

    max_num_peaks: int = 2048           # kept per event; peaks/truncated tells when cut
    min_res: float = 0.0                # pixels from the beam
    max_res: float | None = None        # pixels from the beam; None = no limit
    min_peaks: int = 10                 # peaks that make a hit
    only: str = ""                      # column that gates this finder
    prefix: str = "peaks"               # of the column names


class PeakAnalysis:
    """Finds peaks while a frame's pixels are at hand; base of the analyses of that kind.

    A subclass sets ``finder``, calls this ``__init__`` with its :class:`PeakConfig` and
    implements :meth:`open_finder` and :meth:`find_peaks`.
    """

    finder = ""
    full_frame = True
    panels: tuple[int, ...] | None = None
    uses: tuple[str, ...] = ()

    def __init__(self, config: Any) -> None:
        require(config.min_peaks >= 1, f"min_peaks = {config.min_peaks}", "it must be at least 1")
        require(config.max_num_peaks >= config.min_peaks,
                f"max_num_peaks = {config.max_num_peaks}", "it must reach min_peaks")
        require(config.max_res is None or config.max_res > config.min_res,
                f"max_res = {config.max_res}", f"it must exceed min_res = {config.min_res} pixels")
        self._config = config
        self.only: str = config.only
        self.name = self.finder
        self.columns = peak_columns(config.prefix, self.finder, config.min_peaks,
                                    config.max_num_peaks)
        self._found: dict[int, Peaks] = {}
        self._unit = ""

    def open_finder(self, run: RunInfo, constants: Constants, radius_px_PSF: np.ndarray,
                    good_PSF: np.ndarray) -> None:
        """Prepare for a run; ``good_PSF`` excludes what lies outside min_res..max_res."""
        raise NotImplementedError

    def find_peaks(self, frame: CalibratedFrame) -> Peaks:
        """The peaks of a frame, all or at most ``max_num_peaks``, in the order of the search."""
        raise NotImplementedError

    def start(self, run: RunInfo, constants: Constants, batch: int) -> None:
        self._unit = constants.unit
        self._radius_px_PSF = radius_in_pixels(constants)
        good_PSF = within(self._radius_px_PSF, constants.good_PSF, self._config.min_res,
                          self._config.max_res)
        self.open_finder(run, constants, self._radius_px_PSF, good_PSF)
        self._found = {}

    def take(self, frame: CalibratedFrame, row: int) -> None:
        self._found[row] = self.find_peaks(frame)

    def process(self, batch: Batch) -> Mapping[str, Any]:
        config = self._config
        none = Peaks.none()
        lists = [self._found.get(row, none) if batch.selected_B[row] else none
                 for row in range(len(batch))]
        self._found = {}
        kept = [peaks.first(config.max_num_peaks) for peaks in lists]
        n_B = np.array([peaks.found for peaks in lists], np.int32)
        answers: dict[str, Any] = {
            "n": n_B,
            "hit": (n_B >= config.min_peaks).astype(np.uint8),
            "truncated": (n_B > [len(peaks) for peaks in kept]).astype(np.uint8),
            "max": [peaks.maximum for peaks in kept],
            "radius_px": [self._radius_at(peaks) for peaks in kept],
        }
        for name in ("panel", "fs", "ss", "total", "snr", "npix", "sigma", "background"):
            answers[name] = [getattr(peaks, name) for peaks in kept]
        answers = {f"{config.prefix}/{name}": answer for name, answer in answers.items()}
        for name in [name for name in self.columns if not batch.selected_B.all()]:
            if not self.columns[name].ragged:
                answers[name][~batch.selected_B] = self.columns[name].missing
        return answers

    def _radius_at(self, peaks: Peaks) -> np.ndarray:
        _, height, width = self._radius_px_PSF.shape
        ss = np.clip(np.rint(peaks.ss).astype(np.int64), 0, height - 1)
        fs = np.clip(np.rint(peaks.fs).astype(np.int64), 0, width - 1)
        return self._radius_px_PSF[peaks.panel, ss, fs]

    def totals(self) -> Mapping[str, Total]:
        return {}

    def thresholds(self) -> Mapping[str, Threshold]:
        """The thresholds that may be derived from the unit, by the name of their option."""
        return {}

    def attributes(self) -> Mapping[str, Any]:
        prefix = self._config.prefix
        return {f"{prefix}_finder": self.finder} | {
            f"{prefix}_{name}": threshold.text(self._unit)
            for name, threshold in self.thresholds().items()}

    def close(self) -> None:
        self._found = {}
