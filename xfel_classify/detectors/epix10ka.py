"""ePix10ka family: panels of 352 x 384 pixels of 100 um; single, quad (4) and 2M (16).

A raw word has a 14-bit value and bit 14, which is set when a pixel that is allowed to switch has
switched to low gain.  **The word alone does not tell the gain**: psana keeps seven planes of
constants per panel,

    0 FH   fixed high      3 AHL-H  automatic, before switching, high     5 AHL-L  after
    1 FM   fixed medium    4 AML-M  automatic, before switching, medium   6 AML-L  after
    2 FL   fixed low

and which two of them apply to a pixel is set by the camera's configuration record (``trbit`` per
ASIC and four bits per pixel).  :func:`select_stages` reduces the seven planes to the two that bit
14 chooses between, by the name of a mode (all pixels alike) or per pixel from control bits.
(Blaj et al. 2019, AIP Conf. Proc. 2054, 060062; numbering as in psana's calibration files.)
"""
from __future__ import annotations

import numpy as np

from ..core import ConstantsError
from .detector import Detector

DETECTOR = Detector(
    kind="epix10ka",
    panel_shape_SF=(352, 384),
    panel_counts=(1, 4, 16),
    gain_bits="bit14",
    stages=2,
    pixel_size_m=100e-6,
    saturation_adu=16383.0,
    geometry={1: "epix10ka-1.data", 4: "epix10ka-4.data", 16: "epix10ka-16.data"},
    psana_dettype="epix10ka",
    data_bits=14,
    asic_shape_SF=(176, 192),
    bank_shape_SF=(176, 48),
    edge_width=1,
)

PLANES = 7
MODES = {"FH": (0, 0), "FM": (1, 1), "FL": (2, 2), "AHL": (3, 5), "AML": (4, 6)}

# Control bits of a pixel: g (4), ga (8) and the ASIC's trbit (16).
_G, _GA, _TR = 4, 8, 16


def planes_of_control_bits(control_PSF: np.ndarray) -> np.ndarray:
    """int8 (2, P, S, F): calibration plane for bit 14 clear and set, per pixel; -1 = no mode.

    ``control_PSF`` holds g (bit 2), ga (bit 3) and trbit (bit 4) of each pixel.
    """
    g, ga, tr = ((control_PSF & bit) != 0 for bit in (_G, _GA, _TR))
    fixed = np.where(g & ga, np.where(tr, 0, 1), 2)
    chosen = np.stack([np.where(ga, fixed, np.where(tr, 3, 4)),
                       np.where(ga, fixed, np.where(tr, 5, 6))]).astype(np.int8)
    chosen[:, g & ~ga] = -1
    return chosen


def select_stages(planes_GPSF: np.ndarray, mode: str | np.ndarray) -> np.ndarray:
    """The two planes (2, P, S, F) that bit 14 chooses between, out of seven.

    ``mode`` is a key of :data:`MODES` or the control bits of every pixel.  Pixels whose control
    bits name no mode get NaN (and so become bad pixels).

    Raises :class:`ConstantsError` for another number of planes or an unknown mode.
    """
    if planes_GPSF.shape[0] != PLANES:
        raise ConstantsError(
            f"ePix10ka constants with {PLANES} planes were expected; the array is "
            f"{planes_GPSF.shape}; give psana's calibration array, or two planes and no mode")
    if isinstance(mode, str):
        if mode not in MODES:
            raise ConstantsError(
                f"ePix10ka gain mode {mode!r} was asked for; the modes are {', '.join(MODES)}; "
                "set the one the run was taken with, or pass the control bits")
        return planes_GPSF[list(MODES[mode])]
    chosen = planes_of_control_bits(mode)
    picked = np.take_along_axis(planes_GPSF, np.maximum(chosen, 0).astype(np.intp), axis=0)
    if np.issubdtype(picked.dtype, np.floating):
        return np.where(chosen < 0, np.float32(np.nan), picked).astype(np.float32)
    return np.where(chosen < 0, np.ones_like(picked), picked)
