"""Spots of a quadrant by fixed arithmetic, for networks that judge positions and intensities.

Images are square roots of photons, floored, 0 in gaps.  The background is the mean of the
surroundings without bright spots and gaps; a spot is a pixel whose smoothed value is the largest
of 3 x 3 and stands out over the background and over the four averages six pixels away, so that
the edge of a shadow is no spot.  Nothing here is learnt, and everything exports to ONNX.

Axes: B image, H row, W column, K spot, P pixel of a 5 x 5 patch.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core import ConfigurationError

BLOCK = 8                   # pixels over which the background is averaged, then 3 x 3 blocks
NOISE = 0.18                # of a smoothed pixel: the square root of counts has 0.5, and is floored
BRIGHT = 12.0               # of a pixel that counts in the background
CENTRE = 12


class Found(NamedTuple):
    """Maps of (B, 1, H, W) and the brightest spots; ``index_BK`` is into the flattened image."""

    level: Tensor
    signal: Tensor          # over the background, in units of its noise
    bright_BK: Tensor       # the same at the spots
    index_BK: Tensor
    row_BK: Tensor
    column_BK: Tensor


class SpotFinder(nn.Module):
    """Finds the brightest ``spots`` local maxima of quadrants of ``size`` x ``size`` pixels."""

    row: Tensor
    column: Tensor
    patch: Tensor

    def __init__(self, size: int, spots: int) -> None:
        super().__init__()
        if size % BLOCK or not 8 <= spots <= 1024:
            raise ConfigurationError(f"spots were asked for with size = {size} and spots = "
                                     f"{spots}; size is a multiple of {BLOCK}, spots are 8 to 1024")
        self.size, self.spots = size, spots
        row, column = torch.arange(-2, 3)[:, None], torch.arange(-2, 3)[None, :]
        for name, value in (("row", (row + 0 * column).flatten().float()),
                            ("column", (column + 0 * row).flatten().float()),
                            ("patch", (row * (size + 4) + column).flatten())):
            self.register_buffer(name, value, persistent=False)

    def forward(self, images: Tensor) -> Found:
        level = background(images)
        nearby = F.pad(F.avg_pool2d(torch.minimum(images, level + 1), 5, 1, 2), (6, 6, 6, 6))
        beyond = torch.maximum(
            torch.maximum(nearby[:, :, 6:-6, 12:], nearby[:, :, 6:-6, :-12]),
            torch.maximum(nearby[:, :, 12:, 6:-6], nearby[:, :, :-12, 6:-6]))
        signal = (smooth(images) - torch.maximum(level, beyond)) / NOISE
        tops = torch.where(signal >= peak(signal), signal, torch.zeros_like(signal))
        bright_BK, index_BK = tops.flatten(1).topk(self.spots)
        row_BK = torch.floor((index_BK.float() + 0.5) / self.size)
        return Found(level, signal, bright_BK, index_BK, row_BK,
                     index_BK.float() - row_BK * self.size)

    def patches(self, values_B1HW: Tensor, found: Found) -> Tensor:
        """(B, K, P) of a map about the spots, 0 beyond its edge."""
        flat = F.pad(values_B1HW, (2, 2, 2, 2)).flatten(1)
        corner = found.index_BK + 4 * found.row_BK.long() + 2 * (self.size + 4) + 2
        return torch.gather(flat, 1, (corner[:, :, None] + self.patch).flatten(1)).reshape(
            -1, self.spots, 25)


def background(images: Tensor) -> Tensor:
    """Mean of the surroundings, (B, 1, H, W)."""
    seen = peak((images > 0).float())
    count = around(seen).clamp(min=0.02)
    dim = images.clamp(max=BRIGHT)
    level = dim
    for last in (False, False, True):
        level = F.interpolate(around(level * seen) / count, scale_factor=float(BLOCK),
                              mode="bilinear", align_corners=False)
        if not last:
            level = torch.minimum(dim, level + 1)
    # nowhere below the least of a block: a saturated area is no heap of spots
    least = F.interpolate(-F.max_pool2d(-images, BLOCK), scale_factor=float(BLOCK),
                          mode="bilinear", align_corners=False)
    return torch.maximum(level, least)


def around(values: Tensor) -> Tensor:
    """Means of blocks, averaged over 3 x 3 blocks."""
    return F.avg_pool2d(F.avg_pool2d(values, BLOCK), 3, 1, 1)


def peak(values: Tensor) -> Tensor:
    """Maximum of 3 x 3 pixels, 0 beyond the edge."""
    wide = F.pad(values, (1, 1, 0, 0))
    values = torch.maximum(torch.maximum(wide[..., :-2], wide[..., 2:]), values)
    high = F.pad(values, (0, 0, 1, 1))
    return torch.maximum(torch.maximum(high[..., :-2, :], high[..., 2:, :]), values)


def smooth(values: Tensor) -> Tensor:
    """Weighted mean of 3 x 3 pixels with 1/4, 1/2, 1/4 along each axis."""
    wide = F.pad(values, (1, 1, 0, 0))
    values = values * 0.5 + (wide[..., :-2] + wide[..., 2:]) * 0.25
    high = F.pad(values, (0, 0, 1, 1))
    return values * 0.5 + (high[..., :-2, :] + high[..., 2:, :]) * 0.25


def beside_centre(patch_BKP: Tensor) -> Tensor:
    """Mean of a patch's four direct neighbours of the centre, relative to the centre: near 0 for
    a single stray pixel."""
    beside = (patch_BKP[..., 7] + patch_BKP[..., 11] + patch_BKP[..., 13]
              + patch_BKP[..., 17]) / 4
    return beside / patch_BKP[..., CENTRE].clamp(min=0.1)
