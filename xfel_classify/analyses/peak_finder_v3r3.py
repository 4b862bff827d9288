"""peak_finder_v3r3, the adaptive ("ranker") peak finder of psana.

Each local maximum is judged against the background and noise of a ring around it, so that one
setting serves a whole detector.  Parameters are those of psana's ``peak_finder_v3r3_d2`` (psana1:
``PyAlgos.peak_finder_v3r3``).  Written from their documentation and, where that is silent, from
what psana's binary (``psana.psalg_ext``, psana 4.3.4) answers to probe frames:

1.  Along its row, a pixel is a maximum if it is not below the pixel before it, above the one
    after it, and not below any within ``rank`` pixels; of equal ones within ``rank`` the first
    counts.  Likewise along its column, and likewise minima.  Masked pixels are ignored, except
    that one which directly follows counts as 0.  At the panel's edges less is compared.
2.  Seeds are maxima of row and column that no pixel of the (2 rank + 1)^2 window exceeds.
3.  Background and noise are mean and standard deviation of the ring r0 <= distance <= r0 + dr,
    without masked pixels and without maxima and minima of any row or column; 0 and 0 if none
    is left.
4.  The peak is the seed and what is connected to it by sides within ``rank`` rows and columns
    and reaches background + nsigm x noise.  Peaks may share pixels.
5.  amp_max and amp_tot are above the background, son = amp_tot / (noise x sqrt(npix)), 0 without
    noise; the centroid is weighted by the amplitude.  Kept are peaks with npix_min <= npix <=
    npix_max, amp_max >= amax_thr, amp_tot >= atot_thr and son >= son_min, in the order of seeds.

On all test frames peak lists are those of psana.  psana compares with the value of a masked pixel
in rule 1, whatever it is (0 in calibrated frames); here it is 0 always.  Values that are not
finite count as masked.  ``peak_finder_v3r3_reference`` is the same in numpy and plain Python.
"""
from __future__ import annotations

from collections.abc import Mapping

import msgspec
import numpy as np

from ..core import CalibratedFrame, ConfigurationError, Constants, RunInfo
from ..native import peak_finder_v3r3 as native
from .peaks import PeakAnalysis, PeakConfig, Peaks, Threshold, require


class Parameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What makes a peak; thresholds in the unit of the frame."""

    rank: int = 3               # half width of the window in which a seed is the maximum, pixels
    r0: float = 3.0             # inner radius of the ring, pixels
    dr: float = 2.0             # its width, pixels
    nsigm: float = 7.0          # pixels of a peak reach background + nsigm x noise
    npix_min: int = 2
    npix_max: int = 30
    amax_thr: float = 0.0       # least brightest pixel, above background
    atot_thr: float = 0.0       # least sum of pixels, above background
    son_min: float = 7.0        # least signal over noise


class PeakFinderV3R3:
    """A peak finder for frames of one mask; ``good_PSF`` bool or uint8, 0 = never use.

    Not for use by two threads at once.
    """

    def __init__(self, good_PSF: np.ndarray, parameters: Parameters) -> None:
        self.parameters = parameters
        self._shape = good_PSF.shape
        try:
            self._finder = native.PeakFinder(
                np.ascontiguousarray(good_PSF).astype(bool).view(np.uint8), parameters.rank,
                parameters.r0, parameters.dr)
        except ValueError as error:
            raise ConfigurationError(f"peak_finder_v3r3 for frames of shape {self._shape}: {error}"
                                     ) from error

    def find(self, frame_PSF: np.ndarray, amax_thr: float | None = None,
             atot_thr: float | None = None) -> Peaks:
        """Peaks of a float32 frame (P, S, F); thresholds given here replace the parameters."""
        if frame_PSF.shape != self._shape:
            raise ConfigurationError(f"peak_finder_v3r3 was prepared for frames of {self._shape}, "
                                     f"found {frame_PSF.shape}; make another finder for them")
        parameters = self.parameters
        return Peaks(*self._finder.find(
            np.ascontiguousarray(frame_PSF, np.float32), nsigm=parameters.nsigm,
            npix_min=parameters.npix_min, npix_max=parameters.npix_max,
            amax_thr=parameters.amax_thr if amax_thr is None else amax_thr,
            atot_thr=parameters.atot_thr if atot_thr is None else atot_thr,
            son_min=parameters.son_min))


class RingConfig(PeakConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the finders of psalg share: the ring about a seed, and which peaks are kept."""

    rank: int = 3                       # pixels
    r0: float = 3.0                     # pixels
    dr: float = 2.0                     # pixels
    npix_min: int = 2
    npix_max: int = 30
    amax_thr: float | None = None       # None = 4 photons (keV: x photon energy; ADU: 80)
    atot_thr: float | None = None       # None = 6 photons (keV: x photon energy; ADU: 120)
    son_min: float = 7.0


class Analysis(PeakAnalysis):
    """peak_finder_v3r3 on every event."""

    finder = "peak_finder_v3r3"

    class Config(RingConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
        """Names and values as in PyAlgos and LUTE, thresholds by the unit of the frames."""

        nsigm: float = 7.0

    def __init__(self, config: Config | None = None) -> None:
        config = config or self.Config()
        super().__init__(config)
        require(1 <= config.npix_min <= config.npix_max,
                f"{config.npix_min} to {config.npix_max} pixels",
                "npix_min must be at least 1 and at most npix_max")

    def thresholds(self) -> Mapping[str, Threshold]:
        return amplitude_thresholds(self._config.amax_thr, self._config.atot_thr)

    def open_finder(self, run: RunInfo, constants: Constants, radius_px_PSF: np.ndarray,
                    good_PSF: np.ndarray) -> None:
        config = self._config
        self._finder = PeakFinderV3R3(good_PSF, Parameters(**{
            name: getattr(config, name) for name in Parameters.__struct_fields__
            if name not in ("amax_thr", "atot_thr")}))

    def find_peaks(self, frame: CalibratedFrame) -> Peaks:
        least = {name: threshold.value(self._unit, frame.photon_energy_eV)
                 for name, threshold in self.thresholds().items()}
        return self._finder.find(frame.calibrated_PSF, **least)


def amplitude_thresholds(amax_thr: float | None, atot_thr: float | None) -> dict[str, Threshold]:
    """The stated thresholds, else 4 and 6 photons (80 and 120 ADU, as LUTE has them)."""
    return {"amax_thr": Threshold(amax_thr, photons=4.0, adu=80.0),
            "atot_thr": Threshold(atot_thr, photons=6.0, adu=120.0)}


# --- the numpy reference --------------------------------------------------------------------------

def _maxima_of_line(value: np.ndarray, usable: np.ndarray, rank: int) -> np.ndarray:
    """Rule 1 on one row or column: bool of its length."""
    n = len(value)
    filled = np.where(usable, value, -np.inf)
    chosen = np.zeros(n, bool)
    i = 0
    while i < n:
        after = value[i + 1] if i + 1 < n else -np.inf
        if (usable[i] and not (i > 0 and filled[i - 1] > value[i]) and after < value[i]
                and filled[max(i - rank, 0):i + rank + 1].max() <= value[i]):
            chosen[i] = True
            i += rank
        i += 1
    return chosen


def _extrema(value: np.ndarray, usable: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Maxima of their row, and of their column: two bool images."""
    rows = np.array([_maxima_of_line(v, u, rank) for v, u in zip(value, usable, strict=True)])
    columns = np.array([_maxima_of_line(v, u, rank)
                        for v, u in zip(value.T, usable.T, strict=True)]).T
    return rows, columns


def peak_finder_v3r3_reference(frame_PSF: np.ndarray, good_PSF: np.ndarray,
                               parameters: Parameters) -> Peaks:
    """The rules of the module's text, one by one; a second per few ten thousand pixels."""
    usable_PSF = good_PSF.astype(bool) & np.isfinite(frame_PSF)
    value_PSF = np.where(usable_PSF, frame_PSF, 0).astype(np.float32)
    found = [(panel, *peak) for panel in range(len(frame_PSF))
             for peak in _peaks_of_panel(value_PSF[panel], usable_PSF[panel], parameters)]
    table = np.array(found, np.float64).reshape(-1, 9)
    columns = {name: table[:, i].astype(np.int16 if name in ("panel", "npix") else np.float32)
               for i, name in enumerate(("panel", "fs", "ss", "total", "maximum", "snr", "npix",
                                         "sigma", "background"))}
    return Peaks(**columns, found=len(found))


def _peaks_of_panel(value: np.ndarray, usable: np.ndarray,
                    parameters: Parameters) -> list[tuple[float, ...]]:
    """(fs, ss, total, max, son, npix, noise, background) of each peak (rules 2 to 5)."""
    rank, (height, width) = parameters.rank, value.shape
    in_row, in_column = _extrema(value, usable, rank)
    low_in_row, low_in_column = _extrema(-value, usable, rank)
    calm = usable & ~(in_row | in_column | low_in_row | low_in_column)
    filled = np.where(usable, value, -np.inf)
    y, x = np.mgrid[:height, :width]
    peaks: list[tuple[float, ...]] = []
    for ss, fs in np.argwhere(in_row & in_column):
        near = np.s_[max(ss - rank, 0):ss + rank + 1, max(fs - rank, 0):fs + rank + 1]
        if filled[near].max() > value[ss, fs]:
            continue
        distance = np.hypot(y - ss, x - fs)
        ring = value[calm & (distance >= parameters.r0)
                     & (distance <= parameters.r0 + parameters.dr)].astype(np.float64)
        background = ring.sum() / len(ring) if len(ring) else 0.0
        variance = (ring ** 2).sum() / len(ring) - background ** 2 if len(ring) else 0.0
        noise = np.sqrt(max(variance, 0.0))
        strong = filled[near] >= np.float32(background + parameters.nsigm * noise)
        region = np.zeros_like(strong)
        region[ss - near[0].start, fs - near[1].start] = strong[ss - near[0].start,
                                                                fs - near[1].start]
        for _ in range(region.size):
            grown = region.copy()
            grown[1:] |= region[:-1]
            grown[:-1] |= region[1:]
            grown[:, 1:] |= region[:, :-1]
            grown[:, :-1] |= region[:, 1:]
            grown &= strong
            if np.array_equal(grown, region):
                break
            region = grown
        npix = int(region.sum())
        amplitude = value[near][region].astype(np.float64) - background
        total = float(np.float32(amplitude.sum()))
        son = np.float32(total / (noise * np.sqrt(npix)) if npix and noise > 0 else 0)
        if (parameters.npix_min <= npix <= parameters.npix_max and son >= parameters.son_min
                and total >= np.float32(parameters.atot_thr)
                and np.float32(value[ss, fs] - background) >= np.float32(parameters.amax_thr)):
            weight = amplitude / total if total > 0 else np.zeros(npix)
            peaks.append(tuple(float(told) for told in (
                fs + (weight * (x[near][region] - fs)).sum(),
                ss + (weight * (y[near][region] - ss)).sum(), total,
                value[ss, fs] - background, son, npix, noise, background)))
    return peaks
