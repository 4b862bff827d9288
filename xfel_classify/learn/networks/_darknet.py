"""Trunks of the YOLO detectors: Darknet-19 and Darknet-53.

Redmon and Farhadi, arXiv:1612.08242 and arXiv:1804.02767.  Convolutions without bias, batch
normalisation, leaky ReLU 0.1.  On three channels Darknet-19 has 19,817,376 parameters (18 of its
19 convolutions: the last belongs to the classifier) and Darknet-53 40,584,928 (52 of 53).

Axes: B image, C channel, H row, W column.
"""
from __future__ import annotations

from torch import Tensor, nn

from ...core import ConfigurationError

SLOPE = 0.1
DARKNET19: tuple[tuple[int, ...], ...] = (      # a negative number is a 1 x 1 convolution
    (32,), (64,), (128, -64, 128), (256, -128, 256), (512, -256, 512, -256, 512),
    (1024, -512, 1024, -512, 1024))
DARKNET53 = ((64, 1), (128, 2), (256, 8), (512, 8), (1024, 4))      # channels, residual pairs


def scaled(channels: int, width: float) -> int:
    """Channels of a narrower network: ``width`` = 1 is the published one."""
    return max(4, round(channels * width))


def convolution(channels: int, width: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Convolution, normalisation and leaky ReLU; the size is kept at stride 1."""
    return nn.Sequential(nn.Conv2d(channels, width, kernel, stride, kernel // 2, bias=False),
                         nn.BatchNorm2d(width), nn.LeakyReLU(SLOPE))


def check_width(name: str, width: float, size: int) -> None:
    if not 0 < width <= 1 or size < 32 or size % 32:
        raise ConfigurationError(f"{name} was asked for width = {width:g} and size = {size}; give "
                                 "a width above 0 and up to 1, and a multiple of 32 pixels")


class Darknet19(nn.Module):
    """Five halvings; answers the maps before the last one (passthrough) and at the end."""

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        channels = 3
        for steps in DARKNET19:
            rows = []
            for step in steps:
                rows.append(convolution(channels, scaled(abs(step), width), 3 if step > 0 else 1))
                channels = scaled(abs(step), width)
            stages.append(nn.Sequential(*rows))
        self.stages = nn.ModuleList(stages)
        self.pool = nn.MaxPool2d(2)
        self.channels = (scaled(512, width), channels)

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Maps of 1/16 and of 1/32 of the image's side."""
        values = images_BCHW
        for stage in self.stages[:-1]:
            fine = stage(values)
            values = self.pool(fine)
        return fine, self.stages[-1](values)


class Pair(nn.Module):
    """1 x 1 to half the channels, 3 x 3 back, and what came in added."""

    def __init__(self, channels: int, half: int) -> None:
        super().__init__()
        self.squeeze = convolution(channels, half, 1)
        self.widen = convolution(half, channels, 3)

    def forward(self, values_BCHW: Tensor) -> Tensor:
        return values_BCHW + self.widen(self.squeeze(values_BCHW))


class Darknet53(nn.Module):
    """Five halvings by strides; answers the maps of the last three."""

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        channels = scaled(32, width)
        self.stem = convolution(3, channels, 3)
        stages: list[nn.Module] = []
        for published, pairs in DARKNET53:
            wide = scaled(published, width)
            stages.append(nn.Sequential(
                convolution(channels, wide, 3, 2),
                *[Pair(wide, scaled(published // 2, width)) for _ in range(pairs)]))
            channels = wide
        self.stages = nn.ModuleList(stages)
        self.channels = tuple(scaled(c, width) for c in (256, 512, 1024))

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Maps of 1/8, 1/16 and 1/32 of the image's side."""
        values = self.stem(images_BCHW)
        found = []
        for stage in self.stages:
            values = stage(values)
            found.append(values)
        return found[2], found[3], found[4]
