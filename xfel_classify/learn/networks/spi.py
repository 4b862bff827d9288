"""Our network for single particles: count, particle, quality and size from one trunk.

What it looks at does not change with brightness, and little with what surrounds a particle.  From
photons come, by fixed arithmetic inside the graph, five pictures: the logarithm relative to the
image's mean; the logarithm relative to the smooth radial trend, in which the last ring is as strong
as the first; the same with the mean of every ring removed (what is left varies with the angle); the
amplitude of the Fourier transform of the second (distances between copies); and which pixels are
alive.  The profile of the rings is read by convolutions of its own.  A ring's mean is over its
living pixels, so that gaps, dead halves and beam stops do not move it.

The trunk does not know the geometry.  It measures a size in pixels of the image; the second input
(distance, pixel, wavelength, pooling) turns that into nanometres.

Axes: B image, C channel, H row, W column, Q place in a quarter, R ring, F feature, K class.
"""
from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...core import ConfigurationError
from ._heads import Heads
from .resnet import Basic

DEFAULT_HEADS = {"count": 4, "particle": 11, "quality": 2, "size_nm": 1}
RELATIVE_GAIN = 100.0       # pixels above 1/100 of the mean are on the logarithmic part
TREND_RINGS = 9.0           # sigma of the smooth radial trend, pixels
TREND_GAIN = 4.0            # pixels above 1/4 of the trend are on the logarithmic part
EVEN = 1.5                  # about what that logarithm is on average
FLOOR = 1e-4                # of the trend, relative to the image's mean
ALIVE_WITHIN = 5            # a part is dead where none of 5 x 5 pixels has a value ...
LOST_AMONG = 0.54           # ... and an empty pixel where so many of them have
LOG_CENTRE, LOG_SPREAD = -2.2, 0.5      # of log(size x pixel / (wavelength x distance))


class Pictures(nn.Module):
    """(pictures (B, 5, H, W), ring profiles (B, 3, 1, R)) of images (B, 1, H, W) of photons."""

    channels, profiles = 5, 3

    def __init__(self, size: int) -> None:
        super().__init__()
        half = size // 2
        self.side = half
        place = torch.arange(half, dtype=torch.float64) + 0.5
        radius_Q = torch.hypot(place[:, None], place[None, :]).reshape(-1)
        self.rings = int(radius_Q.max()) + 2
        number_R = torch.arange(self.rings, dtype=torch.float64)
        # each pixel belongs to its two nearest rings in shares
        share_QR = (1 - (radius_Q[:, None] - number_R[None, :]).abs()).clamp(min=0)
        near_RR = torch.exp(-0.5 * ((number_R[:, None] - number_R[None, :]) / TREND_RINGS) ** 2)
        centred = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
        angle = 2 * torch.pi / size * torch.outer(centred, centred)
        taper = torch.cos(torch.pi / size * centred).clamp(min=0)
        beside_HH = (centred[:, None] - centred[None, :]).abs() <= ALIVE_WITHIN // 2
        near_H = 1.0 / beside_HH.sum(0)
        for name, values in (("share_QR", share_QR), ("near_RR", near_RR),
                             ("whole_R", 4 * share_QR.sum(0) + 1e-3),
                             ("flip_HH", torch.eye(half).flip(1)),
                             ("beside_HH", beside_HH),
                             ("share_HW", torch.outer(near_H, near_H)),
                             ("cosine_HW", angle.cos()),
                             ("sine_HW", angle.sin()), ("taper_HW", torch.outer(taper, taper))):
            self.register_buffer(name, values.float(), persistent=False)

    def living(self, images_B1HW: Tensor) -> Tensor:
        """1 where a pixel is alive, (B, 1, H, W): not one of many empty ones (dead parts; single
        empty pixels far out are counts of 0), nor a few empty ones among others (gaps, faults)."""
        beside = self.get_buffer("beside_HH")
        # steps as steep slopes, cut off: no comparison and no cast, in any precision
        some = (images_B1HW.abs() * 1e20).clamp(0, 1)
        around = beside @ some @ beside * self.get_buffer("share_HW")
        far = 1 - (around * 1e4).clamp(0, 1)    # opened again: borders stay in place
        dead = (beside @ far @ beside).clamp(0, 1)
        lost = (1 - some) * ((around - LOST_AMONG) * 1e4).clamp(0, 1)
        return (1 - dead) * (1 - lost)

    def on_rings(self, values_B1HW: Tensor) -> Tensor:
        """Sums over rings, (B, R)."""
        flip, n = self.get_buffer("flip_HH"), self.side
        upper, lower = values_B1HW[:, :, :n], values_B1HW[:, :, n:]
        both = flip @ upper + lower
        quarter = both[:, :, :, :n] @ flip + both[:, :, :, n:]
        return quarter.flatten(1) @ self.get_buffer("share_QR")

    def on_pixels(self, rings_BR: Tensor) -> Tensor:
        """(B, 1, H, W): the value of the ring at every pixel."""
        flip, n = self.get_buffer("flip_HH"), self.side
        quarter = (rings_BR @ self.get_buffer("share_QR").T).reshape(-1, 1, n, n)
        lower = torch.cat([quarter @ flip, quarter], 3)
        return torch.cat([flip @ lower, lower], 2)

    def autocorrelation(self, values_B1HW: Tensor) -> Tensor:
        """Logarithm of the amplitude of the Fourier transform, at zero mean, unit variance.

        One half is computed: the other is its image through the centre.
        """
        n, flip = self.side, self.get_buffer("flip_HH")
        cosine, sine = self.get_buffer("cosine_HW"), self.get_buffer("sine_HW")
        tapered = values_B1HW * self.get_buffer("taper_HW")
        along_c, along_s = tapered @ cosine[:, n:], tapered @ sine[:, n:]
        real = cosine @ along_c - sine @ along_s
        imaginary = sine @ along_c + cosine @ along_s
        right = torch.log(torch.sqrt(real * real + imaginary * imaginary + 1e-6) + 1.0)
        turned = torch.cat([flip @ right[:, :, n:], flip @ right[:, :, :n]], 2) @ flip
        amplitude = torch.cat([turned, right], 3)
        amplitude = amplitude - amplitude.mean((2, 3), keepdim=True)
        return amplitude / torch.sqrt((amplitude * amplitude).mean((2, 3), keepdim=True) + 1e-3)

    def forward(self, images_B1HW: Tensor) -> tuple[Tensor, Tensor]:
        photons = torch.relu(images_B1HW)
        live = self.living(images_B1HW)
        mean = photons.mean((2, 3), keepdim=True) / (live.mean((2, 3), keepdim=True) + 1e-6) + 1e-6
        relative = photons * live / mean
        count_BR = self.on_rings(live)
        # a ring of which a fifth is alive is as good as a whole one
        weight_BR = 1 - torch.relu(1 - 5 * count_BR / self.get_buffer("whole_R"))
        # by square roots: a hot pixel does not make a ring
        root_BR = self.on_rings(torch.sqrt(relative + 1e-12)) / (count_BR + 1e-3)
        level_BR = torch.log(root_BR * root_BR + FLOOR)
        near = self.get_buffer("near_RR")
        trend_BR = ((level_BR * weight_BR) @ near) / (weight_BR @ near + 1e-3)
        # exp(-v) = s(-v) / s(v), of operators that all runtimes have
        gain = self.on_pixels(TREND_GAIN * torch.sigmoid(-trend_BR) / torch.sigmoid(trend_BR))
        even = torch.log1p(relative * gain) * live
        ring_BR = self.on_rings(even) / (count_BR + 1e-3)
        flat = (even - EVEN) * live
        angular = (even - self.on_pixels(ring_BR)) * live
        scaled = (torch.log1p(RELATIVE_GAIN * relative) - 2.0) * live
        pictures = torch.cat([scaled, flat, angular, self.autocorrelation(flat), live], 1)
        profile = torch.stack([(ring_BR - EVEN) * weight_BR, 0.2 * level_BR * weight_BR,
                               weight_BR], 1)
        return pictures, profile[:, :, None]


class Network(nn.Module):
    """``width`` channels after the first convolution, then blocks of ``widths``; ``heads`` is
    {name: number of values}, a head of width 1 is a size in nm; ``size`` the image's side."""

    uses_geometry = True

    def __init__(self, heads: Mapping[str, int] | None = None, width: int = 32,
                 widths: tuple[int, ...] = (32, 64, 128), dropout: float = 0.2,
                 profile: int = 32, size: int = 128) -> None:
        super().__init__()
        if size < 32 or size % 16:
            raise ConfigurationError(f"network spi was asked for size = {size}; give a multiple "
                                     "of 16, at least 32")
        self.outputs = dict(heads or DEFAULT_HEADS)
        self.numbers = [name for name, values in self.outputs.items() if values == 1]
        self.pictures = Pictures(size)
        rows: list[nn.Module] = [nn.Conv2d(Pictures.channels, width, 5, 2, 2, bias=False),
                                 nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        channels = width
        for one in widths:
            rows.append(Basic(channels, one, 2))
            channels = one
        self.trunk = nn.Sequential(*rows)
        self.profile = nn.Sequential(
            nn.Conv2d(Pictures.profiles, profile, (1, 9), (1, 2), bias=False),
            nn.BatchNorm2d(profile), nn.ReLU(inplace=True),
            nn.Conv2d(profile, profile, (1, 7), (1, 2), bias=False), nn.BatchNorm2d(profile),
            nn.ReLU(inplace=True), nn.Conv2d(profile, profile, (1, 5), (1, 2), bias=False),
            nn.BatchNorm2d(profile), nn.ReLU(inplace=True))
        length = self.pictures.rings
        for kernel in (9, 7, 5):
            length = (length - kernel) // 2 + 1
        self.embed = nn.Sequential(nn.Linear(2 * channels + profile * length, 128, bias=False),
                                   nn.BatchNorm1d(128), nn.ReLU(inplace=True))
        self.dropout = nn.Dropout(dropout)
        self.heads = Heads(self.outputs, 128)
        for name in self.numbers:
            self.heads.set_range(name, LOG_CENTRE, LOG_SPREAD)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def embedding(self, images_B1HW: Tensor) -> Tensor:
        """(B, 128): what all heads read."""
        # sums over rings and Fourier sums lose too much in half precision
        with torch.autocast(images_B1HW.device.type, enabled=False):
            pictures, profile = self.pictures(images_B1HW)
        maps = self.trunk(pictures)
        strongest = nn.functional.max_pool2d(maps, maps.shape[2:])
        pooled = torch.cat([maps.mean((2, 3)), strongest.flatten(1),
                            self.profile(profile).flatten(1)], 1)
        return self.embed(pooled)

    def features(self, images_B1HW: Tensor) -> dict[str, Tensor]:
        """{head: features (B, 128)}, one tensor for all."""
        return dict.fromkeys(self.outputs, self.dropout(self.embedding(images_B1HW)))

    def in_units(self, outputs: Mapping[str, Tensor], geometry_B4: Tensor) -> dict[str, Tensor]:
        """Numbers of the heads (logarithms, in pixels) as nanometres.

        ``geometry_B4`` is distance in mm, pixel in mm, wavelength in angstrom, pooling.
        """
        scale_B1 = (0.1 * geometry_B4[:, 2:3] * geometry_B4[:, 0:1]
                    / (geometry_B4[:, 1:2] * geometry_B4[:, 3:4]))
        found = dict(outputs)
        for name in self.numbers:       # exp(v) = s(v) / s(-v), of operators that all runtimes have
            log_B1 = outputs[name].clamp(-6.0, 2.0)
            found[name] = log_B1.sigmoid() / (-log_B1).sigmoid() * scale_B1
        return found

    def forward(self, images_B1HW: Tensor, geometry_B4: Tensor) -> dict[str, Tensor]:
        """{head: logits (B, K), or nanometres (B, 1)}."""
        return self.in_units(self.heads(self.features(images_B1HW)), geometry_B4)
