"""psana's own peak_finder_v4r3 (``psana.psalg_ext``), the two-threshold ("droplet") finder."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .peak_finder_v3r3 import RingConfig
from .peaks import Threshold
from .psana_v3r3 import PsalgAnalysis


class Analysis(PsalgAnalysis):
    """psana's peak_finder_v4r3 on every event."""

    finder = "psana-v4r3"
    instead = "peakfinder8, which needs nothing"

    class Config(RingConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
        """Names as in PyAlgos; thresholds by the unit of the frames."""

        thr_low: float | None = None        # pixels of a peak; None = 2.5 photons (ADU: 50)
        thr_high: float | None = None       # its brightest one; None = 4 photons (ADU: 80)

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
