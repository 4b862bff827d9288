"""ResNet-18/34/50 for lattices and resolution [CICH23; MEN24]: one channel, 1000-wide tail.

The first convolution has one input channel, the 1000-way ``fc`` is kept, and every head is
Linear 1000 -> 100, ReLU, Linear 100 -> 1.  With one head: 11,783,441 (18), 21,891,601 (34) and
25,650,961 (50) parameters.  Modules are named as in torchvision, so that its weights fit.
Depth 10 and narrower stages (``width``) are ours, for training on a CPU.

Axes: B image, C channel, H row, W column, 4 = geometry (see ``_geometry``).
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ...core import ConfigurationError
from ._geometry import inverse_d_A

BLOCKS = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
HEADS = ("lattice", "resolution")
BN = ("batch", "frozen_after_1")
TYPICAL_RADIUS_PX = 150.0


class Basic(nn.Module):
    """Two 3 x 3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(channels, width, stride)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, values_BCHW: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(values_BCHW)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + self.downsample(values_BCHW))


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 (with the stride) and 1 x 1 convolutions and a shortcut."""

    expansion = 4

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = _shortcut(channels, 4 * width, stride)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, values_BCHW: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(values_BCHW)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(out + self.downsample(values_BCHW))


def _shortcut(channels: int, width: int, stride: int) -> nn.Module:
    if stride == 1 and channels == width:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))


def head(dropout: float = 0.0) -> nn.Sequential:
    """Linear 1000 -> 100, ReLU, optional dropout, Linear 100 -> 1."""
    return nn.Sequential(nn.Linear(1000, 100), nn.ReLU(),
                         *([nn.Dropout(dropout)] if dropout else []), nn.Linear(100, 1))


class Network(nn.Module):
    """One trunk and one or more heads.

    ``heads`` are "lattice" (one logit of "more than one lattice") and "resolution" (1/d in
    1/angstrom; with ``geometry`` the head's number is a radius in window pixels).
    ``bn = "frozen_after_1"`` keeps the normalisation in evaluation mode from the second epoch
    on, as the published code does; training says so by :meth:`begin_epoch`.  ``width`` is the
    number of channels of the first stage (64 in the published networks).
    """

    def __init__(self, depth: int = 34, heads: Sequence[str] = ("lattice",),
                 geometry: bool = True, dropout: float = 0.0, bn: str = "batch",
                 width: int = 64) -> None:
        super().__init__()
        _check(depth, heads, bn)
        self.outputs = {name: 1 for name in heads}
        self.uses_geometry = geometry and "resolution" in heads
        self.bn, self._frozen = bn, False
        self.conv1 = nn.Conv2d(1, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        block = Bottleneck if depth == 50 else Basic
        channels = width
        for number, count in enumerate(BLOCKS[depth]):
            blocks = []
            for i in range(count):
                blocks.append(block(channels, width << number, 2 if number and i == 0 else 1))
                channels = (width << number) * block.expansion
            setattr(self, f"layer{number + 1}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, 1000)
        self.heads = nn.ModuleDict({name: head(dropout) for name in heads})
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if self.uses_geometry:      # a radius within the window from the first step on
            last = list(self.heads["resolution"].children())[-1]
            nn.init.constant_(last.get_parameter("bias"), TYPICAL_RADIUS_PX)

    def forward(self, images_B1HW: Tensor, geometry_B4: Tensor | None = None) -> dict[str, Tensor]:
        """{"lattice": logits (B, 1), "resolution": 1/d (B, 1)}, those that were asked for."""
        values = self.maxpool(self.relu(self.bn1(self.conv1(images_B1HW))))
        for name in ("layer1", "layer2", "layer3", "layer4"):
            values = self.get_submodule(name)(values)
        features = self.fc(torch.flatten(self.avgpool(values), 1))
        found = {name: one(features) for name, one in self.heads.items()}
        if self.uses_geometry:
            if geometry_B4 is None:
                raise ConfigurationError("this resolution network was built with the geometry "
                                         "layer and got no geometry; give (B, 4): distance_mm, "
                                         "pixel_mm, wavelength_A, pool")
            found["resolution"] = inverse_d_A(found["resolution"], geometry_B4)
        return found

    def begin_epoch(self, epoch: int) -> None:
        """Tell the network that epoch ``epoch`` (from 0) of its training begins."""
        self._frozen = self.bn == "frozen_after_1" and epoch >= 1
        self.train(self.training)

    def train(self, mode: bool = True) -> Network:
        super().train(mode)
        if mode and self._frozen:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def load_pretrained(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Take over torchvision weights (ImageNet, three channels) of the same depth.

        The first convolution becomes the sum over its input channels.  Returns the names of this
        network's tensors that were not among ``tensors``: the heads.
        """
        own = self.state_dict()
        fitting = {}
        for name, value in tensors.items():
            if name == "conv1.weight" and value.shape[1] == 3:
                value = value.sum(1, keepdim=True)
            if name in own and own[name].shape == value.shape:
                fitting[name] = value
        missing = [name for name in own if name not in fitting]
        trunk = [name for name in missing if not name.startswith("heads.")]
        if trunk:
            raise ConfigurationError(f"the pretrained weights lack {len(trunk)} tensors of this "
                                     f"network ({', '.join(trunk[:3])}, ...); give those of a "
                                     "ResNet of the same depth")
        self.load_state_dict(fitting, strict=False)
        return missing


def _check(depth: int, heads: Sequence[str], bn: str) -> None:
    if depth not in BLOCKS:
        raise ConfigurationError(f"resnet was asked for depth = {depth}; valid are "
                                 f"{', '.join(map(str, BLOCKS))}")
    if not heads or isinstance(heads, str) or set(heads) - set(HEADS):
        raise ConfigurationError(f"resnet was asked for heads = {heads!r}; give a list of "
                                 f"{', '.join(HEADS)}")
    if bn not in BN:
        raise ConfigurationError(f"resnet was asked for bn = {bn!r}; valid are {', '.join(BN)}")
