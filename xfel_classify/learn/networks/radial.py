"""Resolution from radial statistics: a small network for training on a CPU (ours, not published).

Diffraction fades with the radius, so that the image is described ring by ring: a few convolutions
find spots, their maps are averaged over rings about the beam at pixel (0, 0), and a one-dimensional
network reads the radius at which the spots end.  The geometry layer is that of the ResNets.

Axes: B image, C channel, H row, W column, R ring, 4 = geometry (see ``_geometry``).
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from ...core import ConfigurationError
from ._geometry import inverse_d_A

REDUCTION = 8           # of the maps that are averaged over rings


class Network(nn.Module):
    """``size`` is the side of the quadrant in pixels, ``rings`` the number of radial bins."""

    outputs = {"resolution": 1}
    uses_geometry = True

    def __init__(self, size: int = 512, rings: int = 64, channels: int = 24,
                 dropout: float = 0.1) -> None:
        super().__init__()
        if size % REDUCTION or rings < 4:
            raise ConfigurationError(f"radial was asked for size = {size} and rings = {rings}; "
                                     f"size is a multiple of {REDUCTION}, rings at least 4")
        self.maps = nn.Sequential(
            nn.Conv2d(1, 8, 5, 2, 2, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(),
            nn.MaxPool2d(2))
        self.typical_px = 0.5 * size
        side = size // REDUCTION
        step = (torch.arange(side) + 0.5) * REDUCTION
        radius = torch.hypot(step[:, None], step[None, :]).flatten()
        edges = size * 2 ** 0.5 / rings
        member = (radius // edges).long().clamp(max=rings - 1)
        mean = torch.zeros(side * side, rings)
        mean[torch.arange(side * side), member] = 1.0
        self.register_buffer("mean_PR", mean / mean.sum(0).clamp(min=1), persistent=False)
        self.register_buffer("radius_1R", ((torch.arange(rings) + 0.5) * edges)[None],
                             persistent=False)
        self.rings = nn.Sequential(
            nn.Conv2d(channels + 1, 32, (1, 5), 1, (0, 2)), nn.ReLU(),
            nn.Conv2d(32, 32, (1, 5), 1, (0, 2)), nn.ReLU(), nn.Flatten(),
            nn.Dropout(dropout), nn.Linear(32 * rings, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, images_B1HW: Tensor, geometry_B4: Tensor | None = None) -> dict[str, Tensor]:
        """{"resolution": 1/d in 1/angstrom (B, 1)}."""
        if geometry_B4 is None:
            raise ConfigurationError("the radial network judges by the geometry and got none; "
                                     "give (B, 4): distance_mm, pixel_mm, wavelength_A, pool")
        maps = torch.log1p(self.maps(images_B1HW)).flatten(2)
        rings_BCR = maps @ self.get_buffer("mean_PR")
        ruler_BR = inverse_d_A(self.get_buffer("radius_1R"), geometry_B4)
        values = torch.cat([rings_BCR, ruler_BR[:, None]], 1)[:, :, None]
        radius_B1 = self.typical_px * (1 + self.rings(values))
        return {"resolution": inverse_d_A(radius_B1, geometry_B4)}
