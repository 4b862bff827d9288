"""Jungfrau: 512 x 1024 pixels of 75 um per module, three gain stages that switch per pixel.

Bits 15-14 of a raw word are 00, 01, 11 for stages 0, 1, 2 (10 never occurs in valid frames);
the other 14 bits are the value.  In stages 1 and 2 the signal *falls* with energy, so their
gain is negative.  (Mozzanica et al. 2016, J. Instrum. 11 C02047; psana ``jungfrau_raw``.)
A module is 2 x 4 ASICs of 256 x 256, read out in banks of 256 x 64.
"""
from .detector import Detector

DETECTOR = Detector(
    kind="jungfrau",
    panel_shape_SF=(512, 1024),
    panel_counts=(1, 2, 8, 32),
    gain_bits="top2",
    stages=3,
    pixel_size_m=75e-6,
    saturation_adu=16383.0,
    geometry={1: "jungfrau-1.data", 2: "jungfrau-2.data", 8: "jungfrau-8.data",
              32: "jungfrau-32.data"},
    psana_dettype="jungfrau",
    data_bits=14,
    asic_shape_SF=(256, 256),
    bank_shape_SF=(256, 64),
    edge_width=1,
)
