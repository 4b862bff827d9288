"""Hit count and particle type of single-particle images in one pass [CAI21], 3 to 18 layers.

Convolutions with bias, each followed by ReLU, without padding and without normalisation; dropout;
2048 features; one linear layer per answer.  The published text ("the next five with K = 2, S = 1")
cannot be literal; the ten-layer table below is the only one of its kind with 164,967 parameters
(methods specification, section 1b).  With heads count (4) and particle (11) there are 100,567 (3
layers), 74,535 (5), 164,967 (10) and 204,167 (18) parameters, and 298,631 with ten layers that
branch early.

Axes: B image, C channel, H row, W column, F feature, K class.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ...core import ConfigurationError
from ._heads import PAPER_HEADS, Heads, Views

LAYERS: dict[int, tuple[tuple[int, int, int], ...]] = {     # channels, kernel, stride
    3: ((8, 2, 2), (32, 4, 4), (128, 4, 4)),
    5: ((8, 2, 2), (16, 2, 2), (32, 2, 2), (64, 2, 2), (128, 2, 2)),
    10: ((8, 2, 2), (16, 2, 2), (32, 2, 2), (64, 2, 2), *[(64, 2, 1)] * 3, (128, 1, 1),
         (128, 2, 1)),
    18: ((8, 2, 2), (16, 2, 2), (32, 2, 2), *[(32, 2, 1)] * 7, (64, 1, 1), *[(64, 2, 1)] * 4,
         (128, 1, 1), (128, 2, 1)),
}
"""The number counts the parallel linear layers as one."""

SHARED_EARLY = 2
BRANCHES = ("late", "early")


def convolutions(steps: Sequence[tuple[int, int, int]], channels: int) -> nn.Sequential:
    """A chain of convolutions (channels, kernel, stride), each followed by ReLU."""
    rows: list[nn.Module] = []
    for width, kernel, stride in steps:
        rows += [nn.Conv2d(channels, width, kernel, stride), nn.ReLU()]
        channels = width
    return nn.Sequential(*rows)


class Network(nn.Module):
    """``layers`` is 3, 5, 10 or 18; ``branch`` is "late" (one trunk, several heads) or "early"
    (two shared convolutions, then a trunk for every head).

    ``heads`` maps an answer to its number of values, 1 for a number.  ``scaling`` is described
    in :class:`._heads.Scaling`, ``autocorrelation`` (ours, 32 more parameters) in
    :class:`._heads.Views`; ``size`` is the side of an image in pixels.
    """

    uses_geometry = False

    def __init__(self, heads: Mapping[str, int] | None = None, layers: int = 10,
                 branch: str = "late", scaling: str = "raw", dropout: float = 0.25,
                 size: int = 128, autocorrelation: bool = False) -> None:
        super().__init__()
        if layers not in LAYERS or branch not in BRANCHES:
            raise ConfigurationError(
                f"spi_multi was asked for layers = {layers!r} and branch = {branch!r}; valid are "
                f"{', '.join(map(str, LAYERS))} and {', '.join(BRANCHES)}")
        self.outputs = dict(heads or PAPER_HEADS)
        self.views = Views(scaling, autocorrelation, size)
        steps = LAYERS[layers]
        shared = len(steps) if branch == "late" else SHARED_EARLY
        self.trunk = convolutions(steps[:shared], self.views.channels)
        self.branches = nn.ModuleDict({} if branch == "late" else {
            name: convolutions(steps[shared:], steps[shared - 1][0]) for name in self.outputs})
        self.dropout = nn.Dropout(dropout)
        for _, kernel, stride in steps:
            size = (size - kernel) // stride + 1
        if size < 1:
            raise ConfigurationError(f"spi_multi with {layers} layers was asked for images too "
                                     "small for its convolutions; give size = 128")
        self.heads = Heads(self.outputs, steps[-1][0] * size * size)

    def features(self, images_B1HW: Tensor) -> dict[str, Tensor]:
        """{head: features (B, F)}; late branching has one tensor for all."""
        shared = self.trunk(self.views(images_B1HW))
        if not len(self.branches):
            flat = torch.flatten(self.dropout(shared), 1)
            return dict.fromkeys(self.outputs, flat)
        return {name: torch.flatten(self.dropout(branch(shared)), 1)
                for name, branch in self.branches.items()}

    def forward(self, images_B1HW: Tensor) -> dict[str, Tensor]:
        """{head: logits (B, K), or a number (B, 1)}."""
        return self.heads(self.features(images_B1HW))
