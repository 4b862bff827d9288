"""What the 2018 paper reports for each run, to be printed beside our own figures.

P.-N. Li, "Data classification for diffraction images", Stanford CS229 report (2018), table of
runs; see the methods specification, sfx_hit, Training and results.  Its runs are streptavidin
crystals at LCLS; its labels are counts of a peak finder.
"""
from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PAPER", "PAPER_CONFUSION", "PublishedRun"]


@dataclass(frozen=True)
class PublishedRun:
    """One line of the paper's table; shares are fractions."""

    run: int
    events: int
    hit_fraction: float
    sensitivity: float
    specificity: float
    accuracy: float


PAPER = {row[0]: PublishedRun(*row) for row in (
    (90, 11429, 0.3366, 0.9974, 0.8685, 0.9119),
    (91, 4755, 0.3171, 1.0000, 0.9593, 0.9722),
    (92, 14244, 0.0791, 0.9663, 0.9442, 0.9459),
    (93, 5820, 0.2864, 0.9754, 0.9839, 0.9814),
    (94, 13820, 0.3727, 0.8794, 0.9451, 0.9206),
    (95, 12647, 0.1468, 0.9822, 0.9728, 0.9741),
    (96, 12157, 0.3822, 0.9884, 0.9113, 0.9408),
    (98, 14208, 0.0934, 0.8734, 0.6071, 0.6320),
    (99, 11081, 0.8471, 0.9892, 0.1488, 0.8608),
    (100, 10730, 0.4781, 0.9004, 0.5705, 0.7282),
)}

PAPER_CONFUSION = {     # shares of all events: TP, FN, FP, TN
    93: (0.2793, 0.0070, 0.0115, 0.7021),
    95: (0.1441, 0.0026, 0.0232, 0.8300),
}
