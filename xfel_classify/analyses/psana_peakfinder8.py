"""psana's own peakfinder8, called as psana 4.3 has it (``psana.peakfinder8.peakfinder_8``).

For comparison with :mod:`xfel_classify.analyses.peakfinder8`, which gives the same peaks in a
fraction of the time.  psana's holds Python's global lock while it works, crashes on infinite
pixels and cuts long lists without saying so: frames are made finite, and one peak more than
wanted is asked for.
"""
from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..core import CalibratedFrame, Constants, MissingDependency, RunInfo
from .peakfinder8 import CheetahConfig, adc_threshold, asics_of
from .peaks import PeakAnalysis, Peaks, Threshold


class Analysis(PeakAnalysis):
    """psana's peakfinder8 on every event."""

    finder = "psana-peakfinder8"

    class Config(CheetahConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
        """As for peakfinder8."""

    def __init__(self, config: Config | None = None) -> None:
        super().__init__(config or self.Config())

    def thresholds(self) -> Mapping[str, Threshold]:
        return {"adc_threshold": adc_threshold(self._config.adc_threshold)}

    def open_finder(self, run: RunInfo, constants: Constants, radius_px_PSF: np.ndarray,
                    good_PSF: np.ndarray) -> None:
        try:
            from psana.peakfinder8 import peakfinder_8
        except ImportError as error:
            raise MissingDependency(
                "the peak finder psana-peakfinder8 was asked for, psana is not installed: "
                "pip install 'xfel-classify[psana]', or take peakfinder8, which needs nothing and "
                "finds the same peaks") from error
        self._find = peakfinder_8
        panels, height, width = good_PSF.shape
        asics_ss, asics_fs = asics_of(self._config.asics, run.detector_kind, good_PSF.shape)
        self._asics = (width // asics_fs, height // asics_ss, asics_fs, panels * asics_ss)
        self._height = height
        self._mask = np.ascontiguousarray(good_PSF.reshape(-1, width), np.int8)
        radius = np.where(good_PSF, radius_px_PSF, 0)
        self._radius = np.ascontiguousarray(radius.reshape(-1, width), np.float32)

    def find_peaks(self, frame: CalibratedFrame) -> Peaks:
        config = self._config
        threshold = self.thresholds()["adc_threshold"]
        values = np.ascontiguousarray(frame.calibrated_PSF, np.float32)
        values = values.reshape(self._mask.shape)
        mask = self._mask
        if not np.isfinite(values.sum(dtype=np.float64)):
            finite = np.isfinite(values)
            values, mask = np.where(finite, values, np.float32(0)), mask * finite.astype(np.int8)
        fs, row, total, _, npix, maximum, sigma, snr = (
            np.array(column, np.float32) for column in self._find(
                config.max_num_peaks + 1, values, mask, self._radius, *self._asics,
                threshold.value(self._unit, frame.photon_energy_eV), config.minimum_snr,
                config.min_pixel_count, config.max_pixel_count, config.local_bg_radius))
        panel = np.floor((row + np.float32(0.5)) / self._height).astype(np.int16)
        ss = row - np.float32(self._height) * panel
        background = np.full(len(fs), np.nan, np.float32)   # psana does not tell
        return Peaks(panel, fs, ss.astype(np.float32), total, maximum, snr, npix.astype(np.int16),
                     sigma, background, len(fs))
