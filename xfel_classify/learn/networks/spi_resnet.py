"""ResNet-18 as the single-particle study used it [CAI21]: 11,177,999 parameters.

The layout of He et al. (arXiv:1512.03385) on one channel, whose first convolution has a bias; one
linear layer per answer on the 512 features.  With raw photons it collapses to the majority class
in the study; ``scaling = "log1p_standardised"`` and reshuffled batches mend that.

Axes: B image, C channel, H row, W column, F feature, K class.
"""
from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...core import ConfigurationError
from ._heads import PAPER_HEADS, Heads, Views
from .resnet import BLOCKS, Basic


class Network(nn.Module):
    """``heads``, ``scaling``, ``autocorrelation`` and ``size`` as in :mod:`.spi_multi`; ``depth``
    is 10, 18 or 34 and ``width`` the number of channels of the first stage (64 in the study).

    Other depths and widths and the autocorrelation are ours; for fluence that varies,
    :mod:`.spi_fringes` is better.
    """

    uses_geometry = False

    def __init__(self, heads: Mapping[str, int] | None = None, depth: int = 18,
                 scaling: str = "raw", dropout: float = 0.0, width: int = 64,
                 autocorrelation: bool = False, size: int = 128) -> None:
        super().__init__()
        depths = sorted(set(BLOCKS) - {50})
        if depth not in depths:
            raise ConfigurationError(f"spi_resnet was asked for depth = {depth!r}; valid are "
                                     f"{', '.join(map(str, depths))}")
        self.outputs = dict(heads or PAPER_HEADS)
        self.views = Views(scaling, autocorrelation, size)
        rows: list[nn.Module] = [
            nn.Conv2d(self.views.channels, width, 7, 2, 3), nn.BatchNorm2d(width),
            nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
        channels = width
        for number, count in enumerate(BLOCKS[depth]):
            for i in range(count):
                rows.append(Basic(channels, width << number, 2 if number and i == 0 else 1))
                channels = width << number
        self.trunk = nn.Sequential(*rows, nn.AdaptiveAvgPool2d(1))
        self.dropout = nn.Dropout(dropout)
        self.heads = Heads(self.outputs, channels)
        for module in self.trunk.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def features(self, images_B1HW: Tensor) -> dict[str, Tensor]:
        """{head: features (B, 512)}, one tensor for all."""
        pooled = self.trunk(self.views(images_B1HW))
        return dict.fromkeys(self.outputs, self.dropout(torch.flatten(pooled, 1)))

    def forward(self, images_B1HW: Tensor) -> dict[str, Tensor]:
        """{head: logits (B, K), or a number (B, 1)}."""
        return self.heads(self.features(images_B1HW))
