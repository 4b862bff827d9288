"""Hit count and particle type whatever the brightness: two narrow residual trunks on a few views.

Ours, for fluence that varies.  Every view divides the image by its own mean first, so that a
brighter image of the same object is the same input but for its counting noise:

- ``log``: log(1 + 100 I / mean), in which the centre does not hide the outer fringes;
- ``root``: sqrt(I / mean), in which counting noise is as large everywhere;
- ``log_distances``, ``root_distances``: the amplitude of the Fourier transform of that view,
  tapered towards the edges, on a logarithmic scale.  It shows the distances between copies, as
  autocorrelations do.

The transform is written as products with cosines and sines, which every runtime has, and is done
in float32 where the rest trains in bfloat16.

A second trunk sees views over radius and angle: there a particle turned about the beam is the same
picture moved sideways, which convolutions know already.  The first one is better at fringes between
copies, the second one at particles; the answers look at the features of both.

Axes: B image, C view, H row, W column, R radius, A angle, F feature, K class.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ...core import ConfigurationError
from ._heads import PAPER_HEADS, Heads
from .resnet import Basic

VIEWS = ("log", "root", "log_distances", "root_distances")
GAIN = 100.0
DARK = 1e-3         # keeps the slope of the root finite
WRAP = 16           # angles that are shown at both ends, so that convolutions see no seam


class Views(nn.Module):
    """(B, C, H, W) of (B, 1, H, W) photons; no parameters."""

    def __init__(self, names: Sequence[str], size: int) -> None:
        super().__init__()
        self.names = tuple(names)
        place = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
        angle = 2 * torch.pi / size * torch.outer(place, place)
        taper = torch.cos(torch.pi / size * place).clamp(min=0)
        for name, values in (("cosine_HW", torch.cos(angle)), ("sine_HW", torch.sin(angle)),
                             ("taper_HW", torch.outer(taper, taper))):
            self.register_buffer(name, values.float(), persistent=False)

    def forward(self, images_B1HW: Tensor) -> Tensor:
        with torch.autocast(images_B1HW.device.type, enabled=False):
            photons = torch.relu(images_B1HW.to(self.get_buffer("taper_HW").dtype))
            relative = photons / (mean(photons) + 1e-6)
            scaled = {"log": torch.log1p(GAIN * relative),      # both are 0 where nothing is
                      "root": torch.sqrt(relative + DARK ** 2) - DARK}
            return torch.cat([self._distances(scaled[name.removesuffix("_distances")])
                              if name.endswith("_distances") else standardised(scaled[name])
                              for name in self.names], 1)

    def _distances(self, scaled_B1HW: Tensor) -> Tensor:
        cosine, sine = self.get_buffer("cosine_HW"), self.get_buffer("sine_HW")
        values = standardised(scaled_B1HW)
        # what the rounding of the mean left behind would be a peak in the middle: taken off again
        tapered = (values - mean(values)) * self.get_buffer("taper_HW")
        along_c, along_s = cosine @ tapered, sine @ tapered
        real = along_c @ cosine - along_s @ sine
        imaginary = along_c @ sine + along_s @ cosine
        amplitude = torch.sqrt(real * real + imaginary * imaginary + 1e-6)
        return standardised(torch.log(amplitude + 1.0), 1e-3)


def mean(values_BCHW: Tensor) -> Tensor:
    """(B, C, 1, 1), rows first: runtimes that add 16,384 numbers one after another lose digits."""
    return values_BCHW.mean(3, keepdim=True).mean(2, keepdim=True)


def standardised(values_BCHW: Tensor, floor: float = 1e-6) -> Tensor:
    """Each view at zero mean and unit variance; ``floor`` is added to the variance."""
    values = values_BCHW - mean(values_BCHW)
    return values / torch.sqrt(mean(values * values) + floor)


class Polar(nn.Module):
    """(B, C, R, A) of (B, C, H, W): bilinear, about the middle of the image; no parameters.

    Training samples with torch's own operator, which is thirty times faster than the products of
    gathered pixels that are exported; a test holds that both agree.
    """

    def __init__(self, size: int, radii: int, angles: int) -> None:
        super().__init__()
        radius_R1 = ((torch.arange(radii, dtype=torch.float64) + 0.5) * size / 2 / radii)[:, None]
        angle_A = (torch.arange(-WRAP, angles + WRAP) + 0.5) * 2 * torch.pi / angles
        across_RA, down_RA = radius_R1 * torch.cos(angle_A), radius_R1 * torch.sin(angle_A)
        self.register_buffer("grid_RA2", torch.stack([across_RA, down_RA], -1).float() * 2 / size,
                             persistent=False)
        column_RA, row_RA = across_RA + (size - 1) / 2, down_RA + (size - 1) / 2
        low_row, low_column = (at.floor().clamp(0, size - 2) for at in (row_RA, column_RA))
        below_RA, beside_RA = row_RA - low_row, column_RA - low_column
        places, shares = [], []
        for below, beside in ((0, 0), (0, 1), (1, 0), (1, 1)):
            places.append(((low_row + below) * size + low_column + beside).long().flatten())
            shares.append((below_RA if below else 1 - below_RA)
                          * (beside_RA if beside else 1 - beside_RA))
        self.shape = tuple(row_RA.shape)
        self.register_buffer("place", torch.cat(places), persistent=False)
        self.register_buffer("share_4RA", torch.stack(shares).float(), persistent=False)

    def forward(self, views_BCHW: Tensor) -> Tensor:
        return self.sampled(views_BCHW) if self.training else self.gathered(views_BCHW)

    def sampled(self, views_BCHW: Tensor) -> Tensor:
        grid_BRA2 = self.get_buffer("grid_RA2").expand(len(views_BCHW), -1, -1, -1)
        return nn.functional.grid_sample(views_BCHW, grid_BRA2, align_corners=False)

    def gathered(self, views_BCHW: Tensor) -> Tensor:
        count, channels = views_BCHW.shape[:2]
        taken = torch.flatten(views_BCHW, 2).index_select(2, self.get_buffer("place"))
        corners = taken.reshape(count, channels, 4, *self.shape)
        return (corners * self.get_buffer("share_4RA")).sum(2)


def trunk(channels: int, width: int, blocks: Sequence[int]) -> nn.Sequential:
    """A residual network without its end: 1/4 of the pixels a side, halved by every later stage."""
    rows: list[nn.Module] = [
        nn.Conv2d(channels, width, 7, 2, 3), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1)]
    channels = width
    for number, count in enumerate(blocks):
        for i in range(count):
            rows.append(Basic(channels, width << number, 2 if number and i == 0 else 1))
            channels = width << number
    made = nn.Sequential(*rows)
    for module in made.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return made


class Network(nn.Module):
    """``heads`` maps an answer to its number of values, 1 for a number; ``blocks`` are the residual
    blocks of each stage of a trunk; ``size`` is the side of an image in pixels.

    The first trunk sees ``views`` and has ``width`` channels in its first stage; the second one
    sees ``polar_views`` at ``polar`` radii and angles and has ``polar_width``.  [] leaves a trunk
    out.
    """

    uses_geometry = False

    def __init__(self, heads: Mapping[str, int] | None = None,
                 views: Sequence[str] = ("log", "root", "root_distances"), width: int = 16,
                 polar_views: Sequence[str] = ("log", "root"), polar_width: int = 16,
                 polar: Sequence[int] = (64, 128), blocks: Sequence[int] = (1, 1, 1, 1),
                 dropout: float = 0.25, size: int = 128) -> None:
        super().__init__()
        if len(polar) != 2 or any(n < 32 for n in polar):
            raise ConfigurationError(f"spi_fringes was asked for polar = {list(polar)!r}; give "
                                     "[radii, angles] of at least 32")
        self.outputs = dict(heads or PAPER_HEADS)
        names = [name for name in VIEWS if name in {*views, *polar_views}]
        strange = {*views, *polar_views} - set(VIEWS)
        if not names or strange:
            raise ConfigurationError(
                f"spi_fringes was asked for the views {[*views, *polar_views]!r}; valid are "
                f"{', '.join(VIEWS)}, at least one")
        self.views = Views(names, size)
        for part, chosen in (("straight", views), ("turning", polar_views)):
            places = torch.tensor([names.index(name) for name in chosen], dtype=torch.long)
            self.register_buffer(part, places, persistent=False)
        last = len(blocks) - 1
        features = 0
        if views:
            self.trunk = trunk(len(views), width, blocks)
            features += width << last
        if polar_views:
            self.polar = Polar(size, *polar)
            self.polar_trunk = trunk(len(polar_views), polar_width, blocks)
            rings = polar[0]
            for _ in range(2 + last):           # each halving keeps the odd one
                rings = -(-rings // 2)
            features += (polar_width << last) * rings
        self.dropout = nn.Dropout(dropout)
        self.heads = Heads(self.outputs, features)

    def features(self, images_B1HW: Tensor) -> dict[str, Tensor]:
        """{head: features (B, F)}, one tensor for all."""
        views = self.views(images_B1HW)
        found = []
        straight, turning = self.get_buffer("straight"), self.get_buffer("turning")
        if len(straight):
            found.append(self.trunk(views.index_select(1, straight)).mean((2, 3)))
        if len(turning):
            with torch.autocast(views.device.type, enabled=False):
                polar = self.polar(views.index_select(1, turning))
            # where along the radius is kept
            found.append(torch.flatten(self.polar_trunk(polar).mean(3), 1))
        return dict.fromkeys(self.outputs, self.dropout(torch.cat(found, 1)))

    def forward(self, images_B1HW: Tensor) -> dict[str, Tensor]:
        """{head: logits (B, K), or a number (B, 1)}."""
        return self.heads(self.features(images_B1HW))
