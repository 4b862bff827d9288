"""An already assembled 2-D image: one panel, square pixels, beam along its normal.

Its geometry is :func:`xfel_classify.detectors.assembled_geometry`, from pixel size, distance and
beam centre of the configuration.
"""
from .detector import Detector

DETECTOR = Detector(
    kind="assembled",
    panel_shape_SF=None,
    panel_counts=(1,),
    gain_bits="none",
    stages=1,
    pixel_size_m=75e-6,
)
