"""CSPAD: 32 sensors ("2x1") of 185 x 388 pixels of 109.92 um, in four quadrants; LCLS-I.

Two layouts are in use.  psana keeps (4, 8, 185, 388) = (quadrant, sensor, slow, fast), which is
the same memory as (32, 185, 388).  Cheetah writes a slab of (1480, 1552): quadrant q fills the
columns 388 q .. 388 q + 387, and its eight sensors lie below each other.
"""
import numpy as np

from .detector import Detector

DETECTOR = Detector(
    kind="cspad",
    panel_shape_SF=(185, 388),
    panel_counts=(32,),
    gain_bits="none",
    stages=1,
    pixel_size_m=109.92e-6,
    saturation_adu=16383.0,
    geometry={32: "cspad-32.data"},
    psana_dettype="cspad",
    data_bits=16,
    asic_shape_SF=(185, 194),
    bank_shape_SF=(185, 194),
    edge_width=1,
)

QUADRANTS, SENSORS = 4, 8
SLAB_SHAPE = (SENSORS * 185, QUADRANTS * 388)


def panels_from_slab(slab: np.ndarray) -> np.ndarray:
    """(1480, 1552) in Cheetah's order -> (32, 185, 388); always a copy."""
    quads = slab.reshape(SENSORS, 185, QUADRANTS, 388).transpose(2, 0, 1, 3)
    return np.ascontiguousarray(quads).reshape(QUADRANTS * SENSORS, 185, 388)


def slab_from_panels(panels_PSF: np.ndarray) -> np.ndarray:
    """(32, 185, 388) -> Cheetah's slab (1480, 1552); the inverse of :func:`panels_from_slab`."""
    quads = panels_PSF.reshape(QUADRANTS, SENSORS, 185, 388).transpose(1, 2, 0, 3)
    return np.ascontiguousarray(quads).reshape(SLAB_SHAPE)
