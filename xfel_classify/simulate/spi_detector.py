"""What stands between expected photons and an image: the sample's surroundings and the detector.

Everything is computed on the pixels of the image, each the mean over a block of detector pixels: a
block counts with as many detector pixels as work, and is 0 where none does.

Axes: H image row, W image column, both of blocks; S, F rows and columns of detector pixels.
"""
from __future__ import annotations

import functools

import numpy as np

from .spi_conditions import SpiConditions

__all__ = ["add_surroundings", "detect", "good_pixels", "radius_px"]

_PIXELS, _FIELD = 51, 52        # purposes of random numbers
BANK_PX = 128                   # columns that share a common mode


def _centres(c: SpiConditions, per_block: int) -> tuple[np.ndarray, np.ndarray]:
    """(row, column) of pixel centres from the beam, detector pixels; rows grow downwards."""
    step = c.block / per_block
    rows = c.first_px[0] + (np.arange(c.shape[0] * per_block) + 0.5) * step
    columns = c.first_px[1] + (np.arange(c.shape[1] * per_block) + 0.5) * step
    return rows, columns


def radius_px(c: SpiConditions) -> np.ndarray:
    """Distance of the image's pixels from the (unshifted) beam in detector pixels, (H, W)."""
    rows, columns = _centres(c, 1)
    return np.hypot(rows[:, None], columns[None, :])


def good_pixels(c: SpiConditions) -> np.ndarray:
    """Detector pixels of the window that exist and work, bool (S, F); the same for a whole run."""
    rows, columns = _centres(c, c.block)
    good = np.ones((len(rows), len(columns)), bool)
    good[np.abs(rows) < c.gap_px / 2] = False
    if c.half in ("left", "right"):
        good[:, (columns < 0) == (c.half == "left")] = False
    if c.half in ("top", "bottom"):
        good[(rows < 0) == (c.half == "top")] = False
    if c.stop_px:
        near_r, near_c = np.abs(rows) < c.stop_px, np.abs(columns) < c.stop_px
        inside = np.hypot(rows[near_r][:, None], columns[near_c][None]) < c.stop_px
        good[np.ix_(near_r, near_c)] &= ~inside
    if c.dead_fraction:
        rng = np.random.default_rng([c.seed, c.run, _PIXELS])
        good &= rng.random(good.shape, np.float32) >= c.dead_fraction
    return good


@functools.lru_cache(maxsize=8)
def _counts(c_key: tuple, holder: _Run) -> np.ndarray:
    c = holder.conditions
    h, w = c.shape
    return good_pixels(c).reshape(h, c.block, w, c.block).sum((1, 3)).astype(np.float32)


class _Run:
    """Carries one event's conditions to what depends on its run only."""

    def __init__(self, conditions: SpiConditions) -> None:
        self.conditions = conditions

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Run)

    def __hash__(self) -> int:
        return 0


def working_pixels(c: SpiConditions) -> np.ndarray:
    """Detector pixels that work in every pixel of the image, float32 (H, W)."""
    key = (c.seed, c.run, c.shape, c.block, c.first_px, c.gap_px, c.half, c.stop_px,
           c.dead_fraction)
    return _counts(key, _Run(c))


# --- around the sample ----------------------------------------------------------------------------

def _random_field(rng: np.random.Generator, shape: tuple[int, int], length_px: float) -> np.ndarray:
    """A Gaussian random field of mean 0 and variance 1 with this correlation length, (H, W)."""
    h, w = (2 * n for n in shape)           # twice the size: the image is no torus
    fy, fx = np.fft.fftfreq(h)[:, None], np.fft.rfftfreq(w)[None, :]
    # a kernel exp(-r^2 / (2 l^2)) in the covariance
    shaping = np.exp(-(np.pi * length_px) ** 2 * (fy ** 2 + fx ** 2))
    field = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((h, w))) * shaping, s=(h, w))
    weight = np.full(fx.shape[1], 2.0)
    weight[0] = weight[-1] = 1.0
    return (field / np.sqrt((shaping ** 2 @ weight).sum() / (h * w)))[:shape[0], :shape[1]]


def add_surroundings(c: SpiConditions, expected_HW: np.ndarray) -> np.ndarray:
    """Expected photons per detector pixel with loss of contrast, fluctuations and background."""
    out = expected_HW
    radius = radius_px(c) if c.contrast < 1 or c.background_radial else None
    if c.contrast < 1 and radius is not None:
        ring = (radius / c.block).astype(int)
        level = np.bincount(ring.ravel(), out.ravel()) / np.maximum(np.bincount(ring.ravel()), 1)
        out = c.contrast * out + np.float32(1 - c.contrast) * level[ring].astype(np.float32)
    if c.fluctuation_sigma:
        rng = np.random.default_rng([*c.code, _FIELD])
        field = _random_field(rng, c.shape, c.fluctuation_px)
        out = out * np.maximum(1 + c.fluctuation_sigma * field, 0.05).astype(np.float32)
    if c.background or c.background_radial:
        rows, columns = _centres(c, 1)
        half = max(c.shape) * c.block / 2
        level = np.full(c.shape, c.background)
        if radius is not None:
            level += c.background_radial / (1 + (radius / (0.15 * half)) ** 2)
        tilt = (1 + c.background_slope[0] * columns[None, :] / half
                + c.background_slope[1] * rows[:, None] / half)
        out = out + (level * np.maximum(tilt, 0.1)).astype(np.float32)
    return out


# --- the detector ---------------------------------------------------------------------------------

def detect(c: SpiConditions, expected_HW: np.ndarray) -> np.ndarray:
    """Mean photons per working detector pixel, float32 (H, W), 0 where no pixel works.

    Without noise and faults a value is k / n exactly, with k Poisson photons on n pixels.
    """
    rng = np.random.default_rng([*c.code, _PIXELS])
    count = working_pixels(c)
    expected = expected_HW * count
    photons = (rng.poisson(expected) if c.poisson else expected).astype(np.float32)
    sure = np.maximum(count, 1)
    image = photons / sure
    if np.isfinite(c.saturation_photons):
        np.minimum(image, np.float32(c.saturation_photons), out=image)
    if c.gain_noise:        # belongs to pixels: the same in all events of a run
        own = np.random.default_rng([c.seed, c.run, _PIXELS, 1])
        image *= 1 + c.gain_noise * own.standard_normal(c.shape, np.float32) / np.sqrt(sure)
    if c.read_noise_photons:
        image += c.read_noise_photons * rng.standard_normal(c.shape, np.float32) / np.sqrt(sure)
    if c.common_mode_photons:
        banks = -(-c.shape[1] * c.block // BANK_PX)
        lines = c.common_mode_photons * rng.standard_normal((c.shape[0], banks), np.float32)
        column = np.minimum(np.arange(c.shape[1]) * c.block // BANK_PX, banks - 1)
        image += lines[:, column] / np.float32(np.sqrt(c.block))
    if c.hot_fraction:
        own = np.random.default_rng([c.seed, c.run, _PIXELS, 2])
        size = image.size
        where = own.integers(size, size=own.poisson(c.hot_fraction * size * c.block ** 2))
        bright = np.exp(own.uniform(np.log(20), np.log(5000), len(where)))
        np.add.at(image.reshape(-1), where, (bright * rng.exponential(1.0, len(where))).astype(
            np.float32) / sure.reshape(-1)[where])
    image[count == 0] = 0
    return image.astype(np.float32, copy=False)
