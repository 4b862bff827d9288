"""psana's own peak_finder_v3r3 (``psana.psalg_ext``), and what it shares with peak_finder_v4r3.

psana's ``peakFinder_ext`` has a finder of the same name that crashes the process on frames with
many seeds; ``psalg_ext`` does not, and is the one used here.  Both want uint16 masks.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..core import CalibratedFrame, Constants, MissingDependency, RunInfo
from .peak_finder_v3r3 import RingConfig, amplitude_thresholds
from .peaks import PeakAnalysis, Peaks, Threshold

# what psana tells of a peak, in the order of ``parameters()``
_TOLD = ("seg", "row", "col", "npix", "amp_max", "amp_tot", "row_cgrav", "col_cgrav", "row_sigma",
         "col_sigma", "row_min", "row_max", "col_min", "col_max", "bkgd", "noise", "son")
_COLUMN = {"panel": "seg", "fs": "col_cgrav", "ss": "row_cgrav", "total": "amp_tot",
           "maximum": "amp_max", "snr": "son", "npix": "npix", "sigma": "noise",
           "background": "bkgd"}


class PsalgAnalysis(PeakAnalysis):
    """A finder of ``psana.psalg_ext``, panel by panel; base of the two analyses."""

    instead = "peak_finder_v3r3, which needs nothing and finds the same peaks"

    def open_finder(self, run: RunInfo, constants: Constants, radius_px_PSF: np.ndarray,
                    good_PSF: np.ndarray) -> None:
        try:
            from psana.psalg_ext import peak_finder_algos
        except ImportError as error:
            raise MissingDependency(
                f"the peak finder {self.finder} was asked for, psana is not installed: "
                f"pip install 'xfel-classify[psana]', or take {self.instead}") from error
        self._algorithms = [peak_finder_algos(panel, 0) for panel in range(len(good_PSF))]
        self._mask_PSF = np.ascontiguousarray(good_PSF, np.uint16)

    def search(self, algorithms: Any, least: Mapping[str, float]) -> Callable[..., Any]:
        """psana's function of (panel, mask), after setting what selects peaks."""
        raise NotImplementedError

    def thresholds(self) -> Mapping[str, Threshold]:
        return amplitude_thresholds(self._config.amax_thr, self._config.atot_thr)

    def find_peaks(self, frame: CalibratedFrame) -> Peaks:
        config = self._config
        least = {name: threshold.value(self._unit, frame.photon_energy_eV)
                 for name, threshold in self.thresholds().items()}
        values_PSF = np.ascontiguousarray(frame.calibrated_PSF, np.float32)
        mask_PSF = self._mask_PSF
        if not np.isfinite(values_PSF.sum(dtype=np.float64)):
            finite_PSF = np.isfinite(values_PSF)
            mask_PSF = mask_PSF * finite_PSF.astype(np.uint16)
            values_PSF = np.where(finite_PSF, values_PSF, np.float32(0))
        rows = []
        for algorithms, values, mask in zip(self._algorithms, values_PSF, mask_PSF, strict=True):
            algorithms.set_peak_selection_parameters(
                config.npix_min, config.npix_max, least["amax_thr"], least["atot_thr"],
                config.son_min)
            rows += [peak.parameters() for peak in self.search(algorithms, least)(values, mask)]
        table = np.array(rows, np.float64).reshape(-1, len(_TOLD))
        columns = {name: table[:, _TOLD.index(told)].astype(
                       np.int16 if name in ("panel", "npix") else np.float32)
                   for name, told in _COLUMN.items()}
        return Peaks(**columns, found=len(rows))


class Analysis(PsalgAnalysis):
    """psana's peak_finder_v3r3 on every event."""

    finder = "psana-v3r3"

    class Config(RingConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
        """As for peak_finder_v3r3."""

        nsigm: float = 7.0

    def __init__(self, config: Config | None = None) -> None:
        super().__init__(config or self.Config())

    def search(self, algorithms: Any, least: Mapping[str, float]) -> Callable[..., Any]:
        config = self._config
        return lambda values, mask: algorithms.peak_finder_v3r3_d2(
            values, mask, config.rank, config.r0, config.dr, config.nsigm)
