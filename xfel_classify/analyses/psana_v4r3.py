"""psana's own peak_finder_v4r3 (``psana.psalg_ext``), the two-threshold ("droplet") finder."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from .peaks import Threshold
from .psana_v3r3 import PsalgAnalysis


class Analysis(PsalgAnalysis):
    """psana's peak_finder_v4r3 on every event."""

    finder = "psana-v4r3"
    instead = "peakfinder8, which needs nothing"

    class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
        """Names as in PyAlgos; thresholds by the unit of the frames."""

        thr_low: float | None = None        # pixels of a peak; None = 2.5 photons (ADU: 50)
        thr_high: float | None = None       # its brightest one; None = 4 photons (ADU: 80)
        rank: int = 3                       # pixels
        r0: float = 3.0                     # pixels
        dr: float = 2.0                     # pixels
        npix_min: int = 2
        npix_max: int = 30
        amax_thr: float | None = None       # None = 4 photons (keV: x photon energy; ADU: 80)
        atot_thr: float | None = None       # None = 6 photons (keV: x photon energy; ADU: 120)
        son_min: float = 7.0
        max_num_peaks: int = 2048           # kept per event; peaks/truncated tells when cut
        min_res: float = 0.0                # pixels from the beam
        max_res: float | None = None        # pixels from the beam; None = no limit
        min_peaks: int = 10                 # peaks that make a hit
        only: str = ""                      # column that gates this finder
        prefix: str = "peaks"               # of the column names

    def __init__(self, config: Config | None = None) -> None:
        super().__init__(config or self.Config())

    def thresholds(self) -> Mapping[str, Threshold]:
        return {**super().thresholds(),
                "thr_low": Threshold(self._config.thr_low, photons=2.5, adu=50.0),
                "thr_high": Threshold(self._config.thr_high, photons=4.0, adu=80.0)}

    def search(self, algorithms: Any, least: Mapping[str, float]) -> Callable[..., Any]:
        config = self._config
        return lambda values, mask: algorithms.peak_finder_v4r3_d2(
            values, mask, least["thr_low"], least["thr_high"], config.rank, config.r0, config.dr)
