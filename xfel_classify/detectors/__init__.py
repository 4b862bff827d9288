"""Detectors: kinds, constants, masks and geometries.  A kind is one file here."""
from .constants import (
    load_constants,
    make_constants,
    save_constants,
    uncalibrated_constants,
)
from .crystfel import write_crystfel_geom
from .detector import Detector, as_panels, detector, guess_kind, kinds
from .geometry import assembled_geometry, default_geometry, flat_geometry, read_geometry
from .masks import combine, edges, load_mask, saturated

__all__ = [
    "Detector", "as_panels", "assembled_geometry", "combine", "default_geometry", "detector",
    "edges", "flat_geometry", "guess_kind", "kinds", "load_constants", "load_mask",
    "make_constants", "read_geometry", "saturated", "save_constants", "uncalibrated_constants",
    "write_crystfel_geom",
]
