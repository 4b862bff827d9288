"""Rayonix MX170-HS and MX340-HS: one square CCD image, binned on the camera, one gain.

The image side tells the binning but not the camera: 3840 is an unbinned MX170 or an MX340 binned
2 x 2.  :func:`pixel_size_m` takes the larger camera; a geometry or ``source.pixel_size_m``
overrides it.  Sides: 170 mm and 340 mm (manufacturer's data sheets).
"""
from .detector import Detector

SIZES = (7680, 3840, 2560, 1920, 1536, 1280, 960, 768)
SIDE_M = {"MX170": 0.170, "MX340": 0.340}

DETECTOR = Detector(
    kind="rayonix",
    panel_shape_SF=None,
    panel_counts=(1,),
    gain_bits="none",
    stages=1,
    pixel_size_m=SIDE_M["MX340"] / 1920,
    saturation_adu=65535.0,
    psana_dettype="rayonix",
)


def pixel_size_m(side_px: int, camera: str = "MX340") -> float:
    """Side of one (binned) pixel in metres for an image of ``side_px`` x ``side_px``."""
    return SIDE_M[camera] / side_px
