"""pnCCD: four segments of 512 x 512 pixels of 75 um, one gain; LCLS-I.

psana cuts the camera's 1024 x 1024 image into segments in the order upper left, lower left,
lower right, upper right, each with its first pixel at an outer corner of the camera.
"""
from .detector import Detector

DETECTOR = Detector(
    kind="pnccd",
    panel_shape_SF=(512, 512),
    panel_counts=(4,),
    gain_bits="none",
    stages=1,
    pixel_size_m=75e-6,
    saturation_adu=16383.0,
    geometry={4: "pnccd-4.data"},
    psana_dettype="pnccd",
    data_bits=16,
    asic_shape_SF=(512, 512),
    bank_shape_SF=(512, 128),
    edge_width=0,
)
