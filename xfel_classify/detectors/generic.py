"""Any single-gain array of panels; its geometry and constants come from the user."""
from .detector import Detector

DETECTOR = Detector(
    kind="generic",
    panel_shape_SF=None,
    panel_counts=(),
    gain_bits="none",
    stages=1,
    pixel_size_m=75e-6,
)
