"""Diffraction patterns as pictures: what the detection networks of [IGN21] were shown.

"colour" is the colour map 'jet', "gray" three equal channels; "linear" clips at the 99.9th
percentile, "log" takes log10(max(I, 1)); both are brought to [0, 1] and resized bilinearly to a
square without keeping the shape (methods specification, section 3a).  "float" is ours: the
logarithm of intensity over its mean, which no clipping and no brightness changes.

:func:`represent` is the reference in numpy; :class:`Representation` does the same inside a
network and is exported with it.  Axes: B image, C channel, H row, W column.
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ..core import ConfigurationError

__all__ = ["REPRESENTATIONS", "Representation", "jet", "represent"]

REPRESENTATIONS = ("colour_linear", "colour_log", "gray_linear", "gray_log", "float")
CLIP_SHARE = 0.001
RELATIVE_GAIN = 30.0

JET = (((0.0, 0.0), (0.35, 0.0), (0.66, 1.0), (0.89, 1.0), (1.0, 0.5)),
       ((0.0, 0.0), (0.125, 0.0), (0.375, 1.0), (0.64, 1.0), (0.91, 0.0), (1.0, 0.0)),
       ((0.0, 0.5), (0.11, 1.0), (0.34, 1.0), (0.65, 0.0), (1.0, 0.0)))
"""Red, green and blue of 'jet' as polygons (value, share of the colour)."""


def jet(values: np.ndarray) -> np.ndarray:
    """Red, green and blue in [0, 1] along a new first axis, of values in [0, 1]."""
    return np.stack([np.interp(values, *np.transpose(line)) for line in JET])


def represent(image_HW: np.ndarray, kind: str, size: int) -> np.ndarray:
    """(3, size, size) float32 in [0, 1] of photons (H, W); the reference.

    Raises :class:`ConfigurationError` for a representation that is not known.
    """
    _check(kind)
    values = np.maximum(np.asarray(image_HW, np.float64), 0.0)
    if kind == "float":
        values = np.log1p(RELATIVE_GAIN * values / (values.mean() + 1e-6))
    elif kind.endswith("log"):
        values = np.log10(np.maximum(values, 1.0))
    else:
        values = np.minimum(values, np.sort(values, axis=None)[-_place(values.size)])
    values = values / (values.max() + 1e-6)
    coloured = jet(values) if kind.startswith("colour") else np.stack([values] * 3)
    rows, columns = (_resampling(n, size) for n in values.shape)
    return (rows @ coloured @ columns.T).astype(np.float32)


class Representation(nn.Module):
    """:func:`represent` for a batch: (B, 1, H, W) photons to (B, 3, size, size).

    ``region`` (first row, first column, height, width) of the images is shown, () = all of it.
    """

    def __init__(self, kind: str, size: int, region: Sequence[int] = ()) -> None:
        super().__init__()
        _check(kind)
        if region and (len(region) != 4 or min(region) < 0 or min(region[2:]) < 1):
            raise ConfigurationError(f"the region {list(region)!r} of a pattern was to be shown; "
                                     "give first row, first column, height and width in pixels")
        self.kind, self.size, self.region = kind, size, tuple(region)

    def forward(self, images_B1HW: Tensor) -> Tensor:
        values = images_B1HW.clamp(min=0.0)
        if self.region:
            row, column, height, width = self.region
            values = values[:, :, row:row + height, column:column + width]
        if self.kind == "float":
            mean = values.mean((2, 3), keepdim=True)
            values = torch.log1p(RELATIVE_GAIN * values / (mean + 1e-6))
        elif self.kind.endswith("log"):
            values = torch.log10(values.clamp(min=1.0))
        else:
            place = _place(values.shape[2] * values.shape[3])
            limit_B = torch.topk(torch.flatten(values, 1), place, dim=1).values[:, place - 1]
            values = torch.minimum(values, limit_B[:, None, None, None])
        # the largest by way of the least: our torch runtime knows ReduceMin, and no ReduceMax
        values = values / ((-(-values).amin((2, 3), keepdim=True)) + 1e-6)
        if self.kind.startswith("colour"):
            values = torch.cat([_polygon(values, line) for line in JET], 1)
        else:
            values = values.expand(-1, 3, -1, -1)
        rows, columns = (torch.from_numpy(_resampling(n, self.size)).to(values)
                         for n in values.shape[2:])
        return rows @ values @ columns.T


def _check(kind: str) -> None:
    if kind not in REPRESENTATIONS:
        raise ConfigurationError(f"patterns were to be shown as {kind!r}; valid are "
                                 f"{', '.join(REPRESENTATIONS)}")


def _place(pixels: int) -> int:
    """The 99.9th percentile is the value at this place, counted from the brightest."""
    return max(1, round(CLIP_SHARE * pixels))


def _polygon(values: Tensor, line: tuple[tuple[float, float], ...]) -> Tensor:
    """Linear interpolation as a sum of ramps, which every runtime has."""
    total = torch.full_like(values, line[0][1])
    slope = 0.0
    for (x0, y0), (x1, y1) in zip(line, line[1:], strict=False):
        own = (y1 - y0) / (x1 - x0)
        total = total + (own - slope) * torch.relu(values - x0)
        slope = own
    return total


def _resampling(places: int, size: int) -> np.ndarray:
    """(size, places) float32: bilinear interpolation along an axis, pixel centres aligned."""
    at = np.clip((np.arange(size) + 0.5) * places / size - 0.5, 0, places - 1)
    low = np.minimum(np.floor(at).astype(int), max(places - 2, 0))
    matrix = np.zeros((size, places), np.float32)
    matrix[np.arange(size), low] = 1 - (at - low)
    if places > 1:
        matrix[np.arange(size), low + 1] += at - low
    return matrix
