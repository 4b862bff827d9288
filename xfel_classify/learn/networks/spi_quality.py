"""Good or bad single-particle image [LI-HAN17]: ResNet(n, m) on per-pixel standardised images.

Convolution 1 -> 16 with stride 2; n residual blocks of 32 channels and m of 64, the first of
either with stride 2; 2 x 2 average pooling; dropout; one linear layer on 4096 features.  Batch
normalisation and ReLU after every convolution, convolutions without bias, zero-padded shortcuts
(option A of He et al., arXiv:1512.03385) where the size changes.  On 128 x 128 pixels: 77,874
parameters for (1, 1), 170,418 (2, 2), 262,962 (3, 3), 355,506 (4, 4), 448,050 (5, 5); (2, 2) has
173,170 with projections and 171,058 with a 7 x 7 stem (methods specification, section 2b).

Axes: B image, C channel, H row, W column, F feature, K class.
"""
from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from ...core import ConfigurationError

SHORTCUTS = ("zero", "projection")
NORMS = ("pixel", "image", "none")
STEMS = (3, 7)
REDUCTION = 16


class Standardisation(nn.Module):
    """Every pixel to zero mean and unit variance, and no parameters to learn.

    "pixel" uses the mean and the deviation of each pixel over the training set, kept with the
    weights (:meth:`learn`; until then 0 and 1); "image" those of each image over its pixels;
    "none" leaves the values.  A pixel that never varied (masked, gap) becomes 0.
    """

    def __init__(self, kind: str, size: int) -> None:
        super().__init__()
        if kind not in NORMS:
            raise ConfigurationError(f"a network was asked for norm = {kind!r}; valid are "
                                     f"{', '.join(NORMS)}")
        self.kind = kind
        if kind == "pixel":
            self.register_buffer("mean_HW", torch.zeros(size, size))
            self.register_buffer("std_HW", torch.ones(size, size))

    def learn(self, batches: Iterable[np.ndarray]) -> int:
        """Take mean and deviation from training images (B, H, W); returns how many there were."""
        if self.kind != "pixel":
            return 0
        mean = self.get_buffer("mean_HW")
        count, total = 0, np.zeros(tuple(mean.shape))
        squares = np.zeros_like(total)
        for batch in batches:
            images_BHW = np.asarray(batch, np.float64)
            if images_BHW.shape[1:] != total.shape:
                raise ConfigurationError(
                    f"mean and deviation were to be taken from images of {images_BHW.shape[1:]} "
                    f"pixels; the network is made for {total.shape}; set size in [network]")
            if not count:
                shift = images_BHW.mean(0)      # keeps the sums of squares small
            count += len(images_BHW)
            total += (images_BHW - shift).sum(0)
            squares += np.square(images_BHW - shift).sum(0)
        if not count:
            raise ConfigurationError("mean and deviation of each pixel were to be taken from the "
                                     "training images; there were none; give at least two")
        offset = total / count
        variance = np.maximum(squares / count - np.square(offset), 0.0)
        mean.copy_(torch.from_numpy(shift + offset))
        self.get_buffer("std_HW").copy_(torch.from_numpy(np.sqrt(variance)))
        return count

    def forward(self, images_B1HW: Tensor) -> Tensor:
        if self.kind == "none":
            return images_B1HW
        if self.kind == "image":
            centred = images_B1HW - images_B1HW.mean((2, 3), keepdim=True)
            return centred / torch.sqrt(
                (centred * centred).mean((2, 3), keepdim=True) + 1e-12)
        mean, std = self.get_buffer("mean_HW"), self.get_buffer("std_HW")
        gain = torch.where(std > 0, 1.0 / std.clamp(min=1e-12), torch.zeros_like(std))
        return (images_B1HW - mean) * gain


class Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut that keeps the values where it can."""

    def __init__(self, channels: int, width: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.extra = stride, width - channels
        self.project: nn.Module | None = None
        if shortcut == "projection" and (stride > 1 or self.extra):
            self.project = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False),
                                         nn.BatchNorm2d(width))

    def forward(self, values_BCHW: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(values_BCHW)))
        out = self.bn2(self.conv2(out))
        if self.project is not None:
            kept = self.project(values_BCHW)
        else:
            kept = values_BCHW[:, :, ::self.stride, ::self.stride]
            if self.extra:
                kept = nn.functional.pad(kept, (0, 0, 0, 0, 0, self.extra))
        return torch.relu(out + kept)


class Network(nn.Module):
    """``n`` blocks of 32 and ``m`` of 64 channels (at ``width`` = 16, the published one).

    ``shortcut`` is "zero" or "projection", ``stem`` the first kernel (3 or 7), ``norm`` as in
    :class:`Standardisation`, ``size`` the side of an image in pixels.
    """

    uses_geometry = False

    def __init__(self, n: int = 2, m: int = 2, shortcut: str = "zero", stem: int = 3,
                 norm: str = "pixel", dropout: float = 0.5, width: int = 16,
                 size: int = 128) -> None:
        super().__init__()
        if n < 1 or m < 1 or shortcut not in SHORTCUTS or stem not in STEMS:
            raise ConfigurationError(
                f"spi_quality was asked for n = {n}, m = {m}, shortcut = {shortcut!r}, stem = "
                f"{stem}; give n and m of at least 1, one of {', '.join(SHORTCUTS)}, and one of "
                f"{', '.join(map(str, STEMS))}")
        if size < REDUCTION or size % REDUCTION:
            raise ConfigurationError(f"spi_quality was asked for size = {size}; give a multiple "
                                     f"of {REDUCTION}")
        self.outputs = {"quality": 2}
        self.standardisation = Standardisation(norm, size)
        self.stem = nn.Sequential(nn.Conv2d(1, width, stem, 2, stem // 2, bias=False),
                                  nn.BatchNorm2d(width), nn.ReLU())
        for name, count, channels in (("stage1", n, width), ("stage2", m, 2 * width)):
            blocks = [Block(channels, 2 * channels, 2, shortcut)]
            blocks += [Block(2 * channels, 2 * channels, 1, shortcut) for _ in range(count - 1)]
            self.add_module(name, nn.Sequential(*blocks))
        self.pool = nn.AvgPool2d(2)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(4 * width * (size // REDUCTION) ** 2, 2)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def learn_input(self, batches: Iterable[np.ndarray]) -> int:
        """Mean and deviation of each pixel from the training images, before the first step."""
        return self.standardisation.learn(batches)

    def activations(self, images_B1HW: Tensor) -> dict[str, Tensor]:
        """What each stage answers, (B, C, H, W): "input", "stem", "stage1", "stage2"."""
        found = {"input": self.standardisation(images_B1HW)}
        values = found["input"]
        for name in ("stem", "stage1", "stage2"):
            values = found[name] = self.get_submodule(name)(values)
        return found

    def forward(self, images_B1HW: Tensor) -> dict[str, Tensor]:
        """{"quality": logits (B, 2)}: bad, good."""
        values = self.pool(self.activations(images_B1HW)["stage2"])
        return {"quality": self.fc(self.dropout(torch.flatten(values, 1)))}
