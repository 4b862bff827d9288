"""peakfinder8: Bragg peaks above a radially averaged background.

Written from the published description, A. Barty et al., "Cheetah: software for high-throughput
reduction and analysis of serial femtosecond X-ray diffraction data", J. Appl. Cryst. 47 (2014)
1118-1131, doi 10.1107/S1600576714007626.  Details which the paper leaves open were settled by
running psana's binary (``psana.peakfinder8``, psana 4.3.4) on probe frames:

1.  A pixel belongs to the ring ``rint(radius)`` (ties to even).  Masked pixels belong to none.
2.  Five times: mean and standard deviation of the ring's pixels between the limits of the round
    before (all at first), then limits mean +- minimum_snr x sigma, the upper one raised to at
    least ``adc_threshold``; pixels on a limit are out.  A ring with nothing left starts again
    from its pixels above 0.
3.  Candidates are pixels above the upper limit.  ASIC by ASIC (rows of ASICs first), row by row,
    a candidate that is not on the outermost rows and columns of its ASIC and in no earlier region
    starts a region: all candidates connected to it by sides or corners in the same ASIC.
4.  Regions of fewer than ``min_pixel_count`` or more than ``max_pixel_count`` pixels are dropped,
    and those whose values do not sum to more than 0 or whose centroid is outside of the ASIC.
5.  The reported centroid is weighted by pixel values as they are; that of values above the ring's
    mean, rounded, is the centre of the local background: pixels at most
    2 x ``local_bg_radius`` away (offsets from -2r to 2r - 1), below their ring's limit, unmasked,
    in the same ASIC.  Dropped are peaks without any such pixel, with one brighter than the peak's
    brightest, or where they do not vary (sigma 0).
6.  total = sum - npix x background mean, snr = total / background sigma, at least
    ``minimum_snr``; max = brightest - background mean.
7.  At most ``max_num_peaks`` are kept, the first of the search.

The reference looks for neighbours of one list entry too many: the entry after a region's last
pixel, which an earlier region of at least that size left there.  When that one lay in another
ASIC, a region swallows the candidates around that position of its own ASIC (at the first region
of all, around the ASIC's first pixel), wherever they are.  With ``carry_over`` the same is done
here, so that peak lists are the same; False gives the regions that one would expect.

What still differs, and why:

- The reference sums a ring in float32 in frame order, here sums are exact to about 1e-7: limits
  differ by up to 1e-4 of a sigma, so a pixel closer to its limit than that may change sides.
  Positions differ by up to 0.003 pixels on rows beyond 2000 for the same reason.
- Infinite pixels crash the reference and NaN pixels empty their ring; here both count as masked.
- Radii below -0.5 pixels (they do not occur) are taken as their absolute value.

``peakfinder8_reference`` is the same in numpy and plain Python, slow and short.  ``fast = True``
takes a ring's statistics from at most ``fast_samples`` of its pixels, evenly spread over the
ring (OM and CrystFEL draw them at random): about twice as fast, and nearly the same peaks.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping

import msgspec
import numpy as np

from ..core import CalibratedFrame, ConfigurationError, Constants, RunInfo
from ..native import peakfinder8 as native
from .peaks import PeakAnalysis, PeakConfig, Peaks, Threshold, require


class Parameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What decides about a peak; names as in Cheetah, OM and CrystFEL."""

    adc_threshold: float            # least pixel value, in the unit of the frame
    minimum_snr: float = 7.0
    min_pixel_count: int = 2
    max_pixel_count: int = 30
    local_bg_radius: int = 4        # pixels
    max_num_peaks: int = 2048       # kept per frame
    carry_over: bool = True         # see the module's text


class PeakFinder8:
    """A peak finder for frames of one geometry and mask.

    ``radius_px_PSF`` float32, distance from the beam in pixels (below 65535); ``good_PSF`` bool or
    uint8, 0 = never use.  ``asics`` = (along slow, along fast) is the grid of ASICs of one panel;
    peaks do not cross their borders.  Not for use by two threads at once.
    """

    def __init__(self, radius_px_PSF: np.ndarray, good_PSF: np.ndarray, parameters: Parameters, *,
                 asics: tuple[int, int] = (1, 1), fast: bool = False,
                 fast_samples: int = 100) -> None:
        self.parameters = parameters
        self.fast = fast
        self._shape = radius_px_PSF.shape
        try:
            self._finder = native.PeakFinder(
                np.ascontiguousarray(radius_px_PSF, np.float32),
                np.ascontiguousarray(good_PSF).astype(bool).view(np.uint8),
                *asics, fast_samples)
        except ValueError as error:
            raise ConfigurationError(
                f"peakfinder8 for frames of shape {self._shape} with {asics} ASICs per panel: "
                f"{error}; check the geometry and 'asics'") from error

    def find(self, frame_PSF: np.ndarray, adc_threshold: float | None = None) -> Peaks:
        """Peaks of a float32 frame (P, S, F); ``adc_threshold`` replaces the parameter."""
        if frame_PSF.shape != self._shape:
            raise ConfigurationError(f"peakfinder8 was prepared for frames of {self._shape}, found "
                                     f"{frame_PSF.shape}; make another finder for them")
        settings = msgspec.structs.asdict(self.parameters)
        if adc_threshold is not None:
            settings["adc_threshold"] = adc_threshold
        found = self._finder.find(np.ascontiguousarray(frame_PSF, np.float32),
                                  native.Parameters(**settings), self.fast)
        return Peaks(*found)

    def radial(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and threshold of each ring (by rounded radius) of the latest frame."""
        return self._finder.radial()


class CheetahConfig(PeakConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Names and units as in OM, Cheetah and CrystFEL.

    OM's own defaults are minimum_snr 5 and min_pixel_count 1; on photon-sparse frames they
    call noise peaks.  On simulated Jungfrau 4M runs with weak spots the values here find
    three quarters of the spots with less than one false peak per frame.
    """

    adc_threshold: float | None = None  # least pixel value in the unit of calibrated frames;
                                        # None = 3 photons (keV: x photon energy; ADU: 100)
    minimum_snr: float = 7.0
    min_pixel_count: int = 2
    max_pixel_count: int = 30
    local_bg_radius: int = 4            # pixels
    asics: tuple[int, int] | None = None  # per panel, (slow, fast); None = by detector


class Analysis(PeakAnalysis):
    """peakfinder8 on every event."""

    finder = "peakfinder8"

    class Config(CheetahConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
        """What only our own implementation can be told."""

        carry_over: bool = True             # psana's peak lists exactly, see the module
        fast: bool = False                  # ring statistics from a sample
        fast_samples: int = 100             # pixels per ring then

    def __init__(self, config: Config | None = None) -> None:
        config = config or self.Config()
        super().__init__(config)
        require(1 <= config.min_pixel_count <= config.max_pixel_count,
                f"{config.min_pixel_count} to {config.max_pixel_count} pixels",
                "min_pixel_count must be at least 1 and at most max_pixel_count")
        require(config.local_bg_radius >= 1, f"local_bg_radius = {config.local_bg_radius}",
                "it must be at least 1 pixel")
        require(config.minimum_snr > 0, f"minimum_snr = {config.minimum_snr}", "it must exceed 0")

    def open_finder(self, run: RunInfo, constants: Constants, radius_px_PSF: np.ndarray,
                    good_PSF: np.ndarray) -> None:
        config = self._config
        parameters = Parameters(
            adc_threshold=np.inf if config.adc_threshold is None else config.adc_threshold,
            **{name: getattr(config, name) for name in Parameters.__struct_fields__
               if name != "adc_threshold"})
        self._finder = PeakFinder8(
            radius_px_PSF, good_PSF, parameters, fast=config.fast,
            fast_samples=config.fast_samples,
            asics=asics_of(config.asics, run.detector_kind, constants.shape))

    def thresholds(self) -> Mapping[str, Threshold]:
        return {"adc_threshold": adc_threshold(self._config.adc_threshold)}

    def find_peaks(self, frame: CalibratedFrame) -> Peaks:
        threshold = self.thresholds()["adc_threshold"]
        return self._finder.find(frame.calibrated_PSF,
                                 threshold.value(self._unit, frame.photon_energy_eV))


def adc_threshold(stated: float | None) -> Threshold:
    """The stated threshold, else 3 photons (100 ADU, as OM and Cheetah have it)."""
    return Threshold(stated, photons=3.0, adu=100.0)


def asics_of(stated: tuple[int, int] | None, detector_kind: str,
             shape: tuple[int, int, int]) -> tuple[int, int]:
    """ASICs of one panel (slow, fast): a CSPAD 2x1 has two side by side, others count as one."""
    if stated is not None:
        return stated
    return (1, 2) if detector_kind == "cspad" and shape[2] == 388 else (1, 1)


# --- the numpy reference --------------------------------------------------------------------------

_NEIGHBOURS = ((0, 0), (-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))


def radial_limits(frame_PSF: np.ndarray, ring_PSF: np.ndarray, usable_PSF: np.ndarray,
                  parameters: Parameters) -> tuple[np.ndarray, np.ndarray]:
    """Mean and upper limit of each ring, float32 (rules 1 and 2)."""
    rings = int(ring_PSF.max()) + 1
    values, ring = frame_PSF[usable_PSF].astype(np.float64), ring_PSF[usable_PSF]
    low, high = np.full(rings, -np.inf), np.full(rings, np.inf)
    for _ in range(5):
        inside = (values > low[ring]) & (values < high[ring])
        n = np.bincount(ring[inside], minlength=rings)
        some = np.maximum(n, 1)
        mean = np.bincount(ring[inside], values[inside], rings) / some
        residual = values[inside] - mean[ring[inside]]
        sigma = np.sqrt(np.bincount(ring[inside], residual ** 2, rings) / some)
        low = (mean - parameters.minimum_snr * sigma).astype(np.float32)
        high = (mean + parameters.minimum_snr * sigma).astype(np.float32)
        high = np.where(n > 0, np.maximum(high, np.float32(parameters.adc_threshold)), np.inf)
    return mean.astype(np.float32), high.astype(np.float32)


def peakfinder8_reference(frame_PSF: np.ndarray, radius_px_PSF: np.ndarray, good_PSF: np.ndarray,
                          parameters: Parameters, asics: tuple[int, int] = (1, 1)) -> Peaks:
    """The rules of the module's text, one by one; seconds for a frame with many candidates."""
    panels, height, width = frame_PSF.shape
    rows, columns = height // asics[0], width // asics[1]
    usable_PSF = good_PSF.astype(bool) & np.isfinite(frame_PSF)
    ring_PSF = np.rint(np.abs(np.where(usable_PSF, radius_px_PSF, 0))).astype(np.int64)
    mean, high = radial_limits(frame_PSF, ring_PSF, usable_PSF, parameters)
    below_PSF = usable_PSF & (frame_PSF < high[ring_PSF])
    free_PSF = usable_PSF & (frame_PSF > high[ring_PSF])    # candidates in no region yet
    entries = [(0, 0)] * (rows * columns + 2)
    found: list[tuple[float, ...]] = []
    for panel in range(panels):
        for top in range(0, height, rows):
            for left in range(0, width, columns):
                window = (panel, slice(top, top + rows), slice(left, left + columns))
                values = frame_PSF[window]
                for n in _regions(free_PSF[window], entries, parameters.carry_over):
                    if not parameters.min_pixel_count <= n <= parameters.max_pixel_count:
                        continue
                    peak = _measure(values, below_PSF[window], mean[ring_PSF[window]],
                                    np.array(entries[:n]), (panel * height + top, left), parameters)
                    if peak is not None:
                        found.append((panel, peak[0] + left, peak[1] + top, *peak[2:]))
    kept = np.array(found[:parameters.max_num_peaks], np.float64).reshape(-1, 9)
    columns_of = {name: kept[:, i].astype(np.int16 if name in ("panel", "npix") else np.float32)
                  for i, name in enumerate(("panel", "fs", "ss", "total", "maximum", "snr", "npix",
                                            "sigma", "background"))}
    return Peaks(**columns_of, found=len(found))


def _regions(free: np.ndarray, entries: list[tuple[int, int]], carry_over: bool) -> Iterator[int]:
    """Rule 3 in one ASIC: yields the number of pixels of a region, which are ``entries[:n]``."""
    rows, columns = free.shape
    for ss, fs in np.argwhere(free[1:-1, 1:-1]) + 1:
        if not free[ss, fs]:
            continue
        free[ss, fs] = False
        entries[0] = (int(ss), int(fs))
        n, before = 1, 0
        while n != before:
            before, k = n, 0
            while k < n + carry_over:
                for step_ss, step_fs in _NEIGHBOURS:
                    y, x = entries[k][0] + step_ss, entries[k][1] + step_fs
                    if 0 <= y < rows and 0 <= x < columns and free[y, x]:
                        free[y, x] = False
                        entries[n] = (y, x)
                        n += 1
                k += 1
        yield n


def _measure(values: np.ndarray, below: np.ndarray, mean: np.ndarray, pixels: np.ndarray,
             origin: tuple[int, int], parameters: Parameters) -> tuple[float, ...] | None:
    """Rules 4 to 6: (fs, ss, total, max, snr, npix, sigma, background), or None."""
    rows, columns = values.shape
    ss, fs = pixels.T
    value = values[ss, fs]
    total = value.sum(dtype=np.float64)
    net = net_ss = net_fs = np.float32(0)
    for weight, y, x in zip(value - mean[ss, fs], ss, fs, strict=True):
        net += weight                       # float32 and in this order: half-way cases
        net_ss += weight * np.float32(y + origin[0])
        net_fs += weight * np.float32(x + origin[1])
    if total <= 0 or net <= 0:
        return None
    centroid_ss = (value.astype(np.float64) * ss).sum() / total
    centroid_fs = (value.astype(np.float64) * fs).sum() / total
    if not (0 <= np.rint(centroid_ss) < rows and 0 <= np.rint(centroid_fs) < columns):
        return None
    y0 = int(np.rint(net_ss / net)) - origin[0]
    x0 = int(np.rint(net_fs / net)) - origin[1]
    reach = 2 * parameters.local_bg_radius
    near = np.s_[max(y0 - reach, 0):max(y0 + reach, 0), max(x0 - reach, 0):max(x0 + reach, 0)]
    y, x = np.mgrid[:rows, :columns][(slice(None), *near)]
    disc = below[near] & ((y - y0) ** 2 + (x - x0) ** 2 <= reach ** 2)
    around = values[near][disc].astype(np.float64)
    if len(around) == 0 or around.max() > value.max():
        return None
    background, sigma = around.mean(), around.std()
    if sigma <= 1e-9 * abs(background):
        return None
    net_total = total - len(value) * background
    snr = np.float32(net_total) / np.float32(sigma)
    if snr < np.float32(parameters.minimum_snr):
        return None
    return (centroid_fs, centroid_ss, net_total, value.max() - background, float(snr),
            len(value), sigma, background)
