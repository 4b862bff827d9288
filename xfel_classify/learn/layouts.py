"""Which pixels of a beam-centred window real detectors do not have: masks for simulated crops.

A network trained on straight gaps alone calls the hole of a pinwheel of panels a hit.  Simulated
runs therefore look through the panels of the detectors the package knows, with the beam somewhat
off the place it has in the default geometry.

Axes: H window row, W window column.
"""
from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

import numpy as np

from ..core import Window
from ..detectors import default_geometry, detector
from ..detectors.constants import uncalibrated_constants
from ..preprocess import plan_render

if TYPE_CHECKING:
    from ..simulate.conditions import Conditions
    from ..simulate.sfx import SimulatedRun

__all__ = ["LAYOUTS", "draw_gaps", "layout_gaps", "run_behind_panels"]

LAYOUTS = (("jungfrau", 1), ("jungfrau", 2), ("jungfrau", 8), ("jungfrau", 8), ("epix10ka", 4),
           ("epix10ka", 16), ("cspad", 32), ("cspad", 32), ("pnccd", 4))
"""(detector, panels), as often as it is to be drawn."""

LAYOUT_SHARE = 0.6
"""Share of the runs that are seen through the panels of a detector the package knows."""

REACH_PX = 30
"""The beam is up to so many pixels from its place, along both axes."""

MOST_MISSING = 0.5
"""Share of the window without pixels beyond which nobody would look for hits there."""


@functools.cache
def layout_gaps(kind: str, panels: int, size: int) -> np.ndarray:
    """True (H, W) = (size, size) where a detector has no pixel, beam in the middle."""
    geometry = default_geometry(detector(kind), panels)
    constants = uncalibrated_constants(geometry.shape, geometry, None, unit="photon")
    return ~plan_render(constants, Window(height=size, width=size)).good_HW


def draw_gaps(rng: np.random.Generator, size: int = 350) -> np.ndarray | None:
    """Gaps (H, W) of a random layout at a random place and turn; None when too little is left."""
    kind, panels = LAYOUTS[int(rng.integers(len(LAYOUTS)))]
    wide = layout_gaps(kind, panels, size + 2 * REACH_PX)
    # a quarter of the runs have the beam exactly where the default geometry puts it
    row, column = ((REACH_PX, REACH_PX) if rng.random() < 0.25
                   else rng.integers(0, 2 * REACH_PX + 1, 2))
    gaps_HW = wide[row:row + size, column:column + size]
    gaps_HW = np.rot90(gaps_HW, int(rng.integers(4)))
    if rng.random() < 0.5:
        gaps_HW = gaps_HW[:, ::-1]
    return np.ascontiguousarray(gaps_HW) if gaps_HW.mean() <= MOST_MISSING else None


def run_behind_panels(conditions: Conditions, seed: int, run: int) -> SimulatedRun:
    """A run of crops about the beam, behind the panels of a detector or behind straight gaps.

    Which of them is drawn from ``seed`` and ``run``.
    """
    from ..simulate.sfx import SimulatedRun, window_geometry

    geometry = window_geometry(conditions)
    rng = np.random.default_rng([seed, run, 31])
    gaps_HW = draw_gaps(rng) if rng.random() < LAYOUT_SHARE else None
    if gaps_HW is not None:
        geometry = dataclasses.replace(geometry, bad_PSF=gaps_HW[None])
    return SimulatedRun(conditions, geometry)
