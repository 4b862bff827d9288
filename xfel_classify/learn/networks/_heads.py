"""What the single-particle networks share: scaling of the input, and heads named by the recipe.

Axes: B image, H row, W column, F feature, K class.
"""
from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...core import ConfigurationError

SCALINGS = ("raw", "log1p", "log1p_standardised", "relative")
PAPER_HEADS = {"count": 4, "particle": 11}
RELATIVE_GAIN = 100.0
"""With "relative": pixels above 1/100 of the image's mean are on the logarithmic part."""


class Scaling(nn.Module):
    """From photons to what the first convolution sees; no parameters.

    "raw" leaves them as they are (the paper); "log1p" takes the logarithm of 1 + photons;
    "log1p_standardised" then brings every image to zero mean and unit variance; "relative" divides
    by the image's mean before the same, so that a brighter image of the same object is the same
    input but for counting noise.
    """

    def __init__(self, kind: str = "raw") -> None:
        super().__init__()
        if kind not in SCALINGS:
            raise ConfigurationError(f"a network was asked for scaling = {kind!r}; valid are "
                                     f"{', '.join(SCALINGS)}")
        self.kind = kind

    def forward(self, images_B1HW: Tensor) -> Tensor:
        if self.kind == "raw":
            return images_B1HW
        values = torch.relu(images_B1HW)
        if self.kind == "relative":
            mean = values.mean((2, 3), keepdim=True)
            values = values * (RELATIVE_GAIN / (mean + 1e-6))
        values = torch.log1p(values)
        if self.kind == "log1p":
            return values
        return standardised(values)


class Views(nn.Module):
    """What a trunk looks at: the scaled image, and with ``autocorrelation`` a second channel.

    That is the amplitude of the image's Fourier transform, its logarithm at zero mean and unit
    variance: copies of a particle at distances between them give peaks at these distances, whatever
    the brightness.  The transform is written as products with cosines and sines, which every
    runtime has; the image is tapered towards its edges first.
    """

    def __init__(self, scaling: str, autocorrelation: bool, size: int) -> None:
        super().__init__()
        self.scaling = Scaling(scaling)
        self.channels = 2 if autocorrelation else 1
        if autocorrelation:
            place = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
            angle = 2 * torch.pi / size * torch.outer(place, place)
            taper = torch.cos(torch.pi / size * place).clamp(min=0)
            for name, values in (("cosine_HW", torch.cos(angle)), ("sine_HW", torch.sin(angle)),
                                 ("taper_HW", torch.outer(taper, taper))):
                self.register_buffer(name, values.float(), persistent=False)

    def forward(self, images_B1HW: Tensor) -> Tensor:
        scaled = self.scaling(images_B1HW)
        if self.channels == 1:
            return scaled
        cosine, sine = self.get_buffer("cosine_HW"), self.get_buffer("sine_HW")
        tapered = standardised(scaled) * self.get_buffer("taper_HW")
        along_c, along_s = cosine @ tapered, sine @ tapered
        real = along_c @ cosine - along_s @ sine
        imaginary = along_c @ sine + along_s @ cosine
        amplitude = torch.sqrt(real * real + imaginary * imaginary + 1e-6)
        return torch.cat([scaled, standardised(torch.log(amplitude + 1.0), 1e-3)], 1)


def standardised(values_B1HW: Tensor, floor: float = 1e-6) -> Tensor:
    """Each image at zero mean and unit variance; ``floor`` is added to the variance, so that the
    rounding of an empty image stays small."""
    values = values_B1HW - values_B1HW.mean((2, 3), keepdim=True)
    return values / torch.sqrt((values * values).mean((2, 3), keepdim=True) + floor)


class Heads(nn.Module):
    """One linear layer per answer on features of its own or shared ones.

    A head of width 1 is a number: it answers ``centre + spread * linear``, which training sets
    from the labels (:meth:`set_range`), so that its weights need not learn a unit.
    """

    def __init__(self, heads: Mapping[str, int], features: int) -> None:
        super().__init__()
        if not heads or not all(isinstance(width, int) and width > 0 for width in heads.values()):
            raise ConfigurationError(f"a network was asked for heads = {dict(heads)!r}; give a "
                                     "table of name = number of values, at least one")
        self.linear = nn.ModuleDict({name: nn.Linear(features, width)
                                     for name, width in heads.items()})
        for name, width in heads.items():
            if width == 1:
                self.register_buffer(f"centre_{name}", torch.zeros(1))
                self.register_buffer(f"spread_{name}", torch.ones(1))

    def set_range(self, name: str, centre: float, spread: float) -> None:
        """A number answers about ``centre``, typically within ``spread``."""
        self.get_buffer(f"centre_{name}").fill_(centre)
        self.get_buffer(f"spread_{name}").fill_(spread)

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """{head: (B, K)} from {head: features (B, F)}."""
        found = {}
        for name, layer in self.linear.items():
            values = layer(features[name])
            if values.shape[1] == 1:
                values = (self.get_buffer(f"centre_{name}")
                          + self.get_buffer(f"spread_{name}") * values)
            found[name] = values
        return found
