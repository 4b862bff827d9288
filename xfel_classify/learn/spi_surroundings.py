"""What surrounds a single particle in an experiment, drawn anew for every training image.

Fluctuation fields, loss of contrast, light that does not come from the particle, dead halves, gaps,
beam stops, and windows of which only a strip was kept: changes that leave what is to be learnt.
Their ranges are wider than any one experiment's, and no preset's.

Axes: B image, H row, W column.
"""
from __future__ import annotations

import numpy as np

from .recipes import Augment

__all__ = ["surround"]

WAVES = 24                      # of a random field
FIELD_PX = (10.0, 90.0)         # its correlation length
COUNTED = 32.0                  # detector pixels of a pixel: what noise added light has
BACKGROUND = (0.002, 0.6)       # of the image's mean
STOP_PX = (0.7, 6.0)
GAP_PX = (0.5, 6.0)             # half of it


def surround(images_BHW: np.ndarray, how: Augment, rng: np.random.Generator) -> np.ndarray:
    """The images changed as ``how`` says, in place; dead pixels are 0 before and after."""
    if not any((how.fields, how.contrast < 1, how.background, how.dead_half, how.gap, how.strip,
                how.stop)):
        return images_BHW
    h, w = images_BHW.shape[1:]
    rows_H1, columns_1W = np.arange(h)[:, None] - (h - 1) / 2, np.arange(w)[None] - (w - 1) / 2
    ring_HW = np.hypot(rows_H1, columns_1W).astype(int)
    for image_HW in images_BHW:
        dead_HW = image_HW == 0
        if how.contrast < 1 and rng.random() < 0.7:
            _fade(image_HW, dead_HW, ring_HW, float(rng.uniform(how.contrast, 1.0)))
        if rng.random() < how.fields:
            field_HW = _field(rng, h, w, float(rng.uniform(*FIELD_PX)))
            sigma = how.field_sigma * rng.random()
            image_HW *= np.maximum(1 + sigma * field_HW, 0.05).astype(np.float32)
        if rng.random() < how.background:
            _lighten(image_HW, rng, ring_HW, rows_H1, columns_1W)
            image_HW[dead_HW] = 0
        if rng.random() < how.dead_half:
            _kill_half(image_HW, int(rng.integers(4)))
        if rng.random() < how.gap:
            _gap(image_HW, rng)
        if rng.random() < how.strip:
            _strip(image_HW, rng)
        if rng.random() < how.stop:
            image_HW[ring_HW < rng.uniform(*STOP_PX)] = 0
    return images_BHW


def _fade(image_HW: np.ndarray, dead_HW: np.ndarray, ring_HW: np.ndarray, kept: float) -> None:
    """Each ring towards its mean over living pixels."""
    ring = ring_HW.ravel()
    count = np.maximum(np.bincount(ring, ~dead_HW.ravel()), 1)
    level = (np.bincount(ring, image_HW.ravel()) / count).astype(np.float32)
    image_HW *= np.float32(kept)
    image_HW += np.float32(1 - kept) * level[ring_HW]
    image_HW[dead_HW] = 0


def _field(rng: np.random.Generator, h: int, w: int, length_px: float) -> np.ndarray:
    """A field of mean 0 and variance 1 with a Gaussian covariance, as a sum of waves."""
    k_2K = rng.standard_normal((2, WAVES)) / length_px
    phase_K = rng.uniform(0, 2 * np.pi, WAVES)
    along_HK = np.arange(h)[:, None] * k_2K[0] + phase_K
    across_KW = k_2K[1][:, None] * np.arange(w)[None]
    return np.sqrt(2 / WAVES) * (np.cos(along_HK) @ np.cos(across_KW)
                                 - np.sin(along_HK) @ np.sin(across_KW))


def _lighten(image_HW: np.ndarray, rng: np.random.Generator, ring_HW: np.ndarray,
             rows_H1: np.ndarray, columns_1W: np.ndarray) -> None:
    """Flat, falling and sloped light, with its counting noise."""
    half = image_HW.shape[1] / 2
    level = float(image_HW.mean()) * np.exp(rng.uniform(*np.log(BACKGROUND)))
    share = rng.random()
    light_HW = level * (share + (1 - share) * 4 / (1 + (ring_HW / (rng.uniform(0.08, 0.4)
                                                                   * half)) ** 2))
    slope = 0.4 * rng.standard_normal(2)
    light_HW *= np.maximum(1 + (slope[0] * rows_H1 + slope[1] * columns_1W) / half, 0.1)
    noise_HW = rng.standard_normal(image_HW.shape, np.float32)
    image_HW += (light_HW + noise_HW * np.sqrt(light_HW / COUNTED)).astype(np.float32)


def _kill_half(image_HW: np.ndarray, side: int) -> None:
    h, w = image_HW.shape
    image_HW[((slice(h // 2), slice(None)), (slice(h // 2, None), slice(None)),
              (slice(None), slice(w // 2)), (slice(None), slice(w // 2, None)))[side]] = 0


def _gap(image_HW: np.ndarray, rng: np.random.Generator) -> None:
    middle, reach = image_HW.shape[0] / 2 + rng.uniform(-1.5, 1.5), rng.uniform(*GAP_PX)
    lines = slice(max(0, round(middle - reach)), max(0, round(middle + reach)))
    if rng.random() < 0.5:
        image_HW[lines] = 0
    else:
        image_HW[:, lines] = 0


def _strip(image_HW: np.ndarray, rng: np.random.Generator) -> None:
    """What a readout of a rectangle leaves, on one side of the beam or across it."""
    h, w = image_HW.shape
    kept_HW = np.zeros(image_HW.shape, bool)
    depth, width = int(rng.uniform(0.35, 0.5) * h), int(rng.uniform(0.7, 1.0) * w)
    first = (w - width) // 2
    if rng.random() < 0.3:          # across the beam
        kept_HW[(h - depth) // 2:(h + depth) // 2 + depth // 2, first:first + width] = True
    else:
        kept_HW[h // 2 - depth:h // 2, first:first + width] = True
    image_HW[~np.rot90(kept_HW, int(rng.integers(4))) if h == w else ~kept_HW] = 0
