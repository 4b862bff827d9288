"""SFX hit finder: the 18-row network of [PNLI18], 11,098 parameters.

Rows as printed in the paper, with the two readings of the specification (methods, section 4b):
rows 3 and 7 normalise each image row by itself, the last two rows have two outputs.

Axes: B image, C channel, H row, W column, K class (miss, hit).
"""
from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...core import ConfigurationError

NORMS = ("row", "batch_axis", "channel")
INPUT_HW = (350, 350)
EPSILON = 1e-3


class RowNorm(nn.Module):
    """gamma_W (x - mean) / (std + eps) + beta_W over every image row by itself.

    This is what early Keras' sample-wise batch normalisation does with channels first; there are
    no running statistics.  A row of equal values has a standard deviation of pure rounding, which
    grows with the values: ``floor`` times the mean is added to it in quadrature, so that such a
    row gives beta on every runtime.  Counting noise is far above this floor up to 1e7 photons.
    """

    def __init__(self, width: int, floor: float = 1e-4) -> None:
        super().__init__()
        self.floor = floor
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, values_BCHW: Tensor) -> Tensor:
        mean_BCH1 = values_BCHW.mean(-1, keepdim=True)
        centred_BCHW = values_BCHW - mean_BCH1
        if not self.training:   # what rounding left of the mean; decides on rows of equal values
            centred_BCHW = centred_BCHW - centred_BCHW.mean(-1, keepdim=True)
        variance_BCH1 = (centred_BCHW * centred_BCHW).mean(-1, keepdim=True)
        floor_BCH1 = self.floor * mean_BCH1
        spread_BCH1 = variance_BCH1 + floor_BCH1 * floor_BCH1
        if self.training:       # the slope of the square root stays finite at zero
            spread_BCH1 = spread_BCH1 + 1e-12
        std_BCH1 = torch.sqrt(spread_BCH1)
        return centred_BCHW * (1.0 / (std_BCH1 + EPSILON)) * self.weight + self.bias


class RowIndexNorm(nn.Module):
    """Batch statistics per row index: feature = row, over images, channels and columns."""

    def __init__(self, height: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(height, eps=EPSILON)

    def forward(self, values_BCHW: Tensor) -> Tensor:
        return self.norm(values_BCHW.transpose(1, 2)).transpose(1, 2)


def _norm(kind: str, channels: int, size: int) -> nn.Module:
    if kind == "row":
        return RowNorm(size)
    if kind == "batch_axis":
        return RowIndexNorm(size)
    if kind == "channel":
        return nn.BatchNorm2d(channels, eps=EPSILON)
    raise ConfigurationError(f"sfx_hit was asked for norm = {kind!r}; valid are "
                             f"{', '.join(NORMS)}")


class Network(nn.Module):
    """Rows 1 to 16 of the table; row 17 (softmax) is added by the export.

    ``norm`` is "row" (default), "batch_axis" or "channel"; ``dropout`` are the rates of rows 2,
    10 and 15, which the paper does not state.
    """

    outputs = {"hit": 2}

    def __init__(self, norm: str = "row", dropout: Sequence[float] = (0.25, 0.25, 0.5)) -> None:
        super().__init__()
        if len(dropout) != 3 or not all(0 <= rate < 1 for rate in dropout):
            raise ConfigurationError(f"sfx_hit was asked for dropout = {list(dropout)}; give "
                                     "three rates from 0 to below 1")
        self.centre = norm == "row"
        self.rows = nn.Sequential(OrderedDict([
            ("conv_1", nn.Conv2d(1, 4, 7)),
            ("dropout_2", nn.Dropout(dropout[0])),
            ("norm_3", _norm(norm, 4, 344)),
            ("relu_4", nn.ReLU()),
            ("pool_5", nn.MaxPool2d(5)),
            ("conv_6", nn.Conv2d(4, 4, 7)),
            ("norm_7", _norm(norm, 4, 62)),
            ("relu_8", nn.ReLU()),
            ("pool_9", nn.MaxPool2d(5)),
            ("dropout_10", nn.Dropout(dropout[1])),
            ("flatten_11", nn.Flatten()),
            ("fc_12", nn.Linear(576, 16)),
            ("norm_13", nn.BatchNorm1d(16, eps=EPSILON)),
            ("relu_14", nn.ReLU()),
            ("dropout_15", nn.Dropout(dropout[2])),
            ("fc_16", nn.Linear(16, 2)),
        ]))

    def forward(self, images_B1HW: Tensor) -> dict[str, Tensor]:
        """{"hit": logits (B, 2)} of photons clipped to +-5e4.

        With row normalisation a constant added to an image changes nothing (row 3 removes what
        it adds to row 1), so the image's mean is taken off first: sums stay small, and float32
        answers of runtimes agree to 1e-6, also for empty and wholly saturated images.  (Where a
        large part of an image is saturated they differ by up to 1e-4.)
        """
        if self.centre:
            # of rows first: a single sum over 122,500 pixels loses digits
            images_B1HW = images_B1HW - images_B1HW.mean(3, keepdim=True).mean(2, keepdim=True)
        return {"hit": self.rows(images_B1HW)}


def parameter_count(module: nn.Module) -> int:
    """Trainable parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def row_table(network: Network) -> list[tuple[str, tuple[int, ...], int]]:
    """(name, output shape without the batch, parameters) of rows 0 to 17, as in the paper."""
    values = torch.zeros(1, 1, *INPUT_HW)
    table: list[tuple[str, tuple[int, ...], int]] = [("input_0", tuple(values.shape[1:]), 0)]
    training = network.training
    network.eval()
    with torch.no_grad():
        for name, row in network.rows.named_children():
            values = row(values)
            table.append((name, tuple(values.shape[1:]), parameter_count(row)))
    network.train(training)
    table.append(("softmax_17", table[-1][1], 0))
    return table
