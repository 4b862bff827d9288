"""Resolution from how spots fade with the scattering angle: fixed statistics, a small head.

Ours, not published.  A crystal's resolution is a B factor: its intensities fall off as
exp(-B q^2 / 2), and what is seen is cut off by the background's noise.  The first part of the
network has no weights to learn: it finds spots (:mod:`._spots`), puts them at q = 1/d by the
geometry, and describes rings of q, numbers of spots of several strengths, mean and largest
intensity, background, share of pixels over the noise; and the line of log intensity against q^2.
The head is a perceptron on these numbers, and answers 1/d.  Rings of q make the answer the same
for any distance, wavelength and pixel.

Axes: B image, H row, W column, K spot, R ring of q, X block of 8 x 8 pixels, F number.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core import ConfigurationError
from ._geometry import inverse_d_A
from ._spots import BLOCK, Found, SpotFinder, beside_centre, peak, smooth

RINGS, RING_WIDTH = 20, 0.04            # 1/A; rings overlap by half, their weights add up to one
STRONG = (6.007, 10.007, 20.007)        # signal to noise of spots that are counted apart
OVER = (1.507, 2.507, 4.007)            # of pixels
CERTAIN = 0.503                         # weight of a spot; whole photons never tie with these
RANKS = (0, 1, 3, 7, 11)                # of the spots furthest out
DESCRIPTION = 14 * RINGS + 13 + 2 * len(RANKS)
TYPICAL = 0.4                           # 1/d, 1/A


class Network(nn.Module):
    """``size`` is the side of the quadrant in pixels, ``spots`` how many are looked at, ``width``
    that of the head's layers."""

    outputs = {"resolution": 1}
    uses_geometry = True
    ring: Tensor

    def __init__(self, size: int = 512, spots: int = 384, width: int = 128,
                 dropout: float = 0.2) -> None:
        super().__init__()
        self.finder = SpotFinder(size, spots)
        self.size = size
        self.register_buffer("ring", (torch.arange(RINGS) + 0.5) * RING_WIDTH, persistent=False)
        block = (torch.arange(size // BLOCK) + 0.5) * BLOCK
        self.register_buffer("block_1X", torch.hypot(block[:, None], block[None]).flatten()[None],
                             persistent=False)
        self.standard = nn.BatchNorm1d(DESCRIPTION, affine=False, momentum=0.02)
        self.head = nn.Sequential(
            nn.Linear(DESCRIPTION, width), nn.ReLU(), nn.Dropout(dropout),
            nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, 1))
        nn.init.constant_(list(self.head.children())[-1].get_parameter("bias"), TYPICAL)

    def forward(self, images: Tensor, geometry_B4: Tensor | None = None) -> dict[str, Tensor]:
        """{"resolution": 1/d in 1/angstrom (B, 1)} of images (B, 1, H, W) with their geometry or
        of descriptions (B, F)."""
        described_BF = images if images.dim() == 2 else self.describe(images, geometry_B4)
        return {"resolution": self.head(self.standard(described_BF).clamp(-6.0, 6.0))}

    def describe(self, images_B1HW: Tensor, geometry_B4: Tensor | None) -> Tensor:
        """float32 (B, F): everything before the head; has no weights to learn."""
        if geometry_B4 is None:
            raise ConfigurationError("the falloff network judges by the geometry and got none; "
                                     "give (B, 4): distance_mm, pixel_mm, wavelength_A, pool")
        found = self.finder(images_B1HW)
        photons_B1HW = images_B1HW * images_B1HW - found.level * found.level
        patch_BKP = self.finder.patches(photons_B1HW, found)
        weight_BK = ((found.bright_BK - 3.5) / 2).clamp(0.0, 1.0) \
            * ((beside_centre(patch_BKP) - 0.02) / 0.05).clamp(0.0, 1.0)
        column, row = found.column_BK + 0.5, found.row_BK + 0.5
        radius_BK = torch.sqrt(column * column + row * row)
        q_BK = inverse_d_A(radius_BK, geometry_B4)
        distance, pixel, wavelength, pool = (geometry_B4[:, i:i + 1] for i in range(4))
        slope = radius_BK * (pixel * pool / distance)
        # a tilted pixel further away sees less: intensities as of pixels facing the crystal
        strength_BK = patch_BKP.sum(2).clamp(min=0.5) * (1 + slope * slope) ** 1.5
        edge_q = inverse_d_A(torch.full_like(distance, 512.0), geometry_B4)
        frame = [edge_q, wavelength, pixel * pool / distance / wavelength * 512, distance / 100,
                 pixel, pool]
        return torch.cat([*self._spots(q_BK, strength_BK, found.bright_BK, weight_BK),
                          *self._pixels(images_B1HW, photons_B1HW, found, geometry_B4),
                          *self._line(q_BK, strength_BK, weight_BK), *frame,
                          *furthest(q_BK, weight_BK, found.bright_BK)], 1)

    def _share(self, q: Tensor) -> Tensor:
        """Weights of rings (..., R) at q (...)."""
        return (1 - ((q[..., None] - self.ring) / RING_WIDTH).abs()).clamp(min=0.0)

    def _spots(self, q_BK: Tensor, strength_BK: Tensor, bright_BK: Tensor,
               weight_BK: Tensor) -> list[Tensor]:
        """Numbers and intensities of the spots of each ring, seven of (B, R)."""
        share_BKR = self._share(q_BK) * weight_BK[..., None]
        count_BR = share_BKR.sum(1)
        each = strength_BK[..., None]
        return [(1 + count_BR).log(),
                (share_BKR * each.log()).sum(1) / count_BR.clamp(min=0.3),
                ((share_BKR * each * each).sum(1) + 1).log() / 2,
                ((share_BKR * each).sum(1) + 1).log(),
                *((1 + (share_BKR * (bright_BK > least).float()[..., None]).sum(1)).log()
                  for least in STRONG)]

    def _pixels(self, images: Tensor, photons: Tensor, found: Found,
                geometry_B4: Tensor) -> list[Tensor]:
        """What the pixels of each ring say, seven of (B, R)."""
        seen = peak((images > 0).float())

        def blocks(values: Tensor) -> Tensor:
            return F.avg_pool2d(values, BLOCK).flatten(1)

        share_BXR = self._share(inverse_d_A(self.get_buffer("block_1X"), geometry_B4))
        count_BR = (share_BXR * blocks(seen)[..., None]).sum(1)

        def ring(values: Tensor) -> Tensor:
            return (share_BXR * blocks(values * seen)[..., None]).sum(1) / count_BR.clamp(min=1.0)

        return [(count_BR + 0.1).log(), (ring(found.level) + 0.02).log(),
                *((ring((found.signal > least).float()) + 1e-5).log() for least in OVER),
                ring((smooth(images) - found.level).clamp(-1.0, 3.0)),
                ring(photons.clamp(max=500.0)).clamp(min=0.05).log()]

    def _line(self, q_BK: Tensor, strength_BK: Tensor, weight_BK: Tensor) -> list[Tensor]:
        """The straight line of log intensity against q^2, seven of (B, 1)."""
        weight = weight_BK * (q_BK > 0.08).float()
        total = weight.sum(1, keepdim=True).clamp(min=1.0)

        def mean(values: Tensor) -> Tensor:
            return (weight * values).sum(1, keepdim=True) / total

        x, y = q_BK * q_BK, strength_BK.log()
        mean_x, mean_y = mean(x), mean(y)
        dx, dy = x - mean_x, y - mean_y
        spread = mean(dx * dx)
        return [(weight_BK.sum(1, keepdim=True) + 1).log(), total.log(), mean_x, mean_y,
                spread.sqrt(), mean(dx * dy) / (spread + 1e-4), mean(dy * dy).sqrt()]


def furthest(q_BK: Tensor, weight_BK: Tensor, bright_BK: Tensor) -> list[Tensor]:
    """q of the spots furthest out, of all and of stronger ones, by rank (B, 1)."""
    found = []
    for counts in (weight_BK > CERTAIN, (weight_BK > CERTAIN) & (bright_BK > STRONG[0])):
        far = (q_BK * counts.float()).topk(RANKS[-1] + 1).values
        found += [far[:, rank:rank + 1] for rank in RANKS]
    return found
