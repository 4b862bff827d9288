"""Powder patterns of a run: maximum over hits, maximum over misses, mean of all frames."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np

from ..core import Batch, CalibratedFrame, Column, Constants, RunInfo, Total
from ..native import powder

FIXED_POINT = 1.0 / 1024
"""Resolution of the summed calibrated values; a frame's value may reach 2 million units."""


def accumulate_reference(frame_PSF: np.ndarray, sum_PSF: np.ndarray, maximum_PSF: np.ndarray,
                         scale: float) -> None:
    """What ``native.powder.accumulate`` does, in numpy: add to the int64 sum, raise the maximum."""
    np.maximum(maximum_PSF, frame_PSF, out=maximum_PSF)
    limit = np.float32(2147483520.0)
    fixed = np.rint(np.clip(frame_PSF * np.float32(scale), -limit, limit))
    sum_PSF += fixed.astype(np.int64)


class Analysis:
    """Reduces calibrated frames to totals; gives no column."""

    name = "statistics"
    full_frame = True
    panels = None
    columns: Mapping[str, Column] = {}

    class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
        """``hits`` names the column that tells hits from misses ("" = all count as misses)."""

        hits: str = ""
        only: str = ""

    def __init__(self, config: Config | None = None) -> None:
        self._config = config or self.Config()
        self.only = self._config.only
        self.uses = (self._config.hits,) if self._config.hits else ()
        self._maxima: tuple[np.ndarray, np.ndarray] | None = None
        self._sum: np.ndarray | None = None
        self._events = [0, 0]
        self._unit = ""

    def start(self, run: RunInfo, constants: Constants, batch: int) -> None:
        shape = constants.shape
        self._unit = constants.unit
        self._sum = np.zeros(shape, np.int64)
        self._maxima = (np.full(shape, -np.inf, np.float32), np.full(shape, -np.inf, np.float32))
        self._events = [0, 0]

    def take(self, frame: CalibratedFrame, row: int) -> None:
        assert self._maxima is not None
        hit = bool(self._config.hits and np.nan_to_num(frame.earlier(self._config.hits)) > 0)
        self._events[hit] += 1
        powder.accumulate(frame.calibrated_PSF, self._sum, self._maxima[hit], 1 / FIXED_POINT)

    def process(self, batch: Batch) -> Mapping[str, Any]:
        return {}

    def totals(self) -> Mapping[str, Total]:
        if self._sum is None or self._maxima is None:
            return {}
        misses, hits = self._maxima
        return {
            "powder_max_hits": Total(hits, "max", self._events[1], 1.0, self._unit,
                                     "largest calibrated value of each pixel over hits"),
            "powder_max_misses": Total(misses, "max", self._events[0], 1.0, self._unit,
                                       "largest calibrated value of each pixel over misses"),
            "sum": Total(self._sum, "sum", sum(self._events), FIXED_POINT, self._unit,
                         "sum of calibrated frames"),
        }

    def attributes(self) -> Mapping[str, Any]:
        return {}

    def close(self) -> None:
        self._sum = self._maxima = None
