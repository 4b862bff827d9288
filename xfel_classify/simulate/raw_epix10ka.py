"""Raw ePix10ka events of a simulated run: bit 14 says that a pixel has switched to low gain.

Gains per keV are in the ratio 1 : 1/3 : 1/100 for high, medium and low (Blaj et al. 2019, AIP Conf.
Proc. 2054, 060062).  In the automatic modes "AHL" and "AML" a pixel starts at high or medium gain
and switches to low where its value would leave the converter's range; the camera's control bits
say which of the two modes it is in.

Axes: G gain stage or calibration plane, P panel, S slow, F fast.
"""
from __future__ import annotations

from typing import Any

import numpy as np

from ..core import ConfigurationError
from ..detectors.epix10ka import MODES, PLANES
from .raw_runs import DetectorRun

__all__ = ["Epix10kaRun"]

GAIN_ADU_PER_KEV = (16.4, 5.466, 0.164)     # high, medium, low
PEDESTAL_ADU = (3000.0, 3200.0, 4000.0)
NOISE_ADU = (2.0, 1.5, 1.5)
SWITCH_ADU = 14500.0        # above, a pixel switches to low gain
_HAS_SWITCHED = 1 << 14
_TRBIT = 1 << 4             # among the control bits of a pixel: starts at high gain


class Epix10kaRun(DetectorRun):
    """A simulated run on an ePix10ka of 1, 4 (quad) or 16 (2M) panels, all pixels in one mode.

    ``constants()`` has the two planes between which bit 14 chooses; :meth:`all_planes` has psana's
    seven, of which :attr:`control_PSF` selects the same two.  Parameters as of
    :class:`.raw_runs.DetectorRun`.
    """

    kind = "epix10ka"
    usual_segments = 4

    def __init__(self, *args: Any, mode: str = "AML", **more: Any) -> None:
        if mode not in ("AHL", "AML"):
            raise ConfigurationError(f"an ePix10ka in gain mode {mode!r} was asked for; modes in "
                                     "which pixels switch are AHL and AML; give one")
        self.mode = mode
        super().__init__(*args, **more)

    def _prepare(self, rng: np.random.Generator) -> None:
        # what a plane's gain is: fixed high, medium, low, then before and after switching
        self._planes = np.array([0, 1, 2, 0, 1, 2, 2])
        shape = (PLANES, *self.shape)
        level = np.array(PEDESTAL_ADU, np.float32)[self._planes]
        self._all_pedestals = level[:, None, None, None] + 40 * rng.standard_normal(
            shape, np.float32)
        slope = np.array(GAIN_ADU_PER_KEV, np.float32)[self._planes]
        self._all_gain = slope[:, None, None, None] * (
            1 + 0.02 * rng.standard_normal(shape, np.float32))
        chosen = list(MODES[self.mode])
        self.pedestals = self._all_pedestals[chosen]
        self.gain = self._all_gain[chosen]
        self._sigma = np.array(NOISE_ADU, np.float32)[self._planes[chosen]]
        self.noise = np.broadcast_to(self._sigma[:, None, None, None], (2, *self.shape)).copy()
        self._fail_pixels(rng, 2)

    @property
    def control_PSF(self) -> np.ndarray:
        """The camera's control bits of each pixel, uint8, as psana's ``cbitsConfig``."""
        return np.full(self.shape, _TRBIT if self.mode == "AHL" else 0, np.uint8)

    def all_planes(self) -> dict[str, np.ndarray | str]:
        """As :meth:`constants` with psana's seven planes."""
        sigma = np.array(NOISE_ADU, np.float32)[self._planes]
        return {"pedestals": self._all_pedestals, "pixel_gain": self._all_gain,
                "pixel_rms": np.broadcast_to(sigma[:, None, None, None],
                                             (PLANES, *self.shape)).copy(),
                "pixel_status": np.broadcast_to(self.status[:1], (PLANES, *self.shape)).copy(),
                "geometry": self.geometry_text}

    def encode(self, photons_PSF: np.ndarray, truth: Any, number: int) -> np.ndarray:
        """Words of a photon frame: value in the low 14 bits, bit 14 after switching."""
        c = self.conditions
        rng = np.random.default_rng([c.seed, c.run, number, 2])
        keV = self.energies(rng, photons_PSF, truth)
        noise = rng.standard_normal(self.shape, np.float32)
        common = rng.standard_normal((self.segments, 1, 1), np.float32)
        adu = self.pedestals[0] + self._true_gain[0] * keV + self._sigma[0] * (noise + common)
        low = self.pedestals[1] + self._true_gain[1] * keV + self._sigma[1] * noise
        switched = adu > SWITCH_ADU
        value = np.clip(np.rint(np.where(switched, low, adu)), 0, 0x3FFF).astype(np.uint16)
        value[switched] |= _HAS_SWITCHED
        return value
