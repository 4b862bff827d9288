"""VGG-16 as the single-particle study used it [CAI21]: 15,089,871 parameters.

The thirteen convolutions of Simonyan and Zisserman (arXiv:1409.1556, configuration D) on one
channel, 7 x 7 adaptive average pooling, and one linear layer per answer in place of the
classifier.  Modules are numbered as in torchvision, so that its weights fit.

Axes: B image, C channel, H row, W column, F feature, K class.
"""
from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...core import ConfigurationError
from ._heads import PAPER_HEADS, Heads, Scaling

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
REDUCTION = 2 ** len(STAGES)
POOLED = 7


def averaging(size: int, bins: int) -> Tensor:
    """(bins, size): adaptive average pooling along one axis as a matrix.

    Bin i averages the places from floor(i size / bins) to ceil((i + 1) size / bins), which also
    works where bins are more than places; the exporter has no such pooling.
    """
    matrix = torch.zeros(bins, size)
    for i in range(bins):
        first, last = i * size // bins, -(-(i + 1) * size // bins)
        matrix[i, first:last] = 1.0 / (last - first)
    return matrix


class Network(nn.Module):
    """``heads``, ``scaling`` and ``size`` as in :mod:`.spi_multi`; ``dropout`` is that of the
    features (the study's is not active)."""

    uses_geometry = False

    def __init__(self, heads: Mapping[str, int] | None = None, scaling: str = "raw",
                 dropout: float = 0.0, size: int = 128) -> None:
        super().__init__()
        if size < REDUCTION:
            raise ConfigurationError(f"spi_vgg was asked for size = {size}; give at least "
                                     f"{REDUCTION}")
        self.outputs = dict(heads or PAPER_HEADS)
        self.scaling = Scaling(scaling)
        rows: list[nn.Module] = []
        channels = 1
        for stage in STAGES:
            for width in stage:
                rows += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
                channels = width
            rows.append(nn.MaxPool2d(2, 2))
        self.convolutions = nn.Sequential(*rows)
        self.register_buffer("average_PS", averaging(size // REDUCTION, POOLED), persistent=False)
        self.dropout = nn.Dropout(dropout)
        self.heads = Heads(self.outputs, channels * POOLED * POOLED)
        for module in self.convolutions:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.get_parameter("bias"))

    def features(self, images_B1HW: Tensor) -> dict[str, Tensor]:
        """{head: features (B, 25088)}, one tensor for all."""
        maps = self.convolutions(self.scaling(images_B1HW))
        average = self.get_buffer("average_PS")
        maps = average @ maps @ average.T
        return dict.fromkeys(self.outputs, self.dropout(torch.flatten(maps, 1)))

    def forward(self, images_B1HW: Tensor) -> dict[str, Tensor]:
        """{head: logits (B, K), or a number (B, 1)}."""
        return self.heads(self.features(images_B1HW))
