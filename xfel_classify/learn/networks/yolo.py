"""YOLOv2 with one class as a classifier of single hits [IGN21].

``head = "slides"`` is Darknet-19 with one 3 x 3 convolution and the detection layer, the reading
of "20 convolutional layers": 29,287,358 parameters; ``head = "full"`` the published network with
passthrough, 23 convolutions: 50,558,014.  Five anchors x (4 + 1 + 1) on a grid of 1/32.

The pattern comes as photons (B, 1, H, W) and is rendered inside the network as the study did
(:mod:`..spi_representations`), so that an exported model takes what the detector measured.

Axes: B image, H row, W column, A anchor, G cell.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ...core import ConfigurationError
from ..spi_representations import Representation
from ._darknet import Darknet19, check_width, convolution, scaled
from ._yolo_boxes import NUMBERS, detection_loss, image_logits

ANCHORS_CELLS = ((1.3221, 1.73145), (3.19275, 4.00944), (5.05587, 8.09892), (9.47112, 4.84053),
                 (11.2364, 10.0071))
"""Of 13 cells; arXiv:1612.08242 on VOC."""

HEADS = ("slides", "full")
WHOLE = (0.5, 0.5, 1.0, 1.0)


class Network(nn.Module):
    """``representation`` as in :class:`..spi_representations.Representation`; ``size`` is the side
    in pixels of what the convolutions see; ``width`` scales the number of channels (1 =
    published); ``box`` is where the object of a positive is said to be (cx, cy, w, h).  ``region``
    is the part of the image that is looked at (first row, first column, height, width), () = all:
    a window about the beam holds more than the study's 123 x 240 pixels above the gap."""

    uses_geometry = False

    def __init__(self, head: str = "full", representation: str = "colour_linear",
                 size: int = 416, width: float = 1.0, box: Sequence[float] = WHOLE,
                 region: Sequence[int] = ()) -> None:
        super().__init__()
        if head not in HEADS:
            raise ConfigurationError(f"yolo was asked for head = {head!r}; valid are "
                                     f"{', '.join(HEADS)}")
        check_width("yolo", width, size)
        check_box("yolo", box)
        self.outputs = {"single": 2}
        self.box = tuple(float(value) for value in box)
        self.representation = Representation(representation, size, region)
        self.trunk = Darknet19(width)
        middle, last = self.trunk.channels
        wide, narrow = scaled(1024, width), scaled(64, width)
        self.passthrough: nn.Module | None = None
        if head == "slides":
            self.neck: nn.Module = nn.Identity()
            self.final = convolution(last, wide, 3)
        else:
            self.neck = nn.Sequential(convolution(last, wide, 3), convolution(wide, wide, 3))
            self.passthrough = convolution(middle, narrow, 1)
            self.final = convolution(wide + 4 * narrow, wide, 3)
        self.detect = nn.Conv2d(wide, len(ANCHORS_CELLS) * NUMBERS, 1)
        self.register_buffer("anchors_A2", torch.tensor(ANCHORS_CELLS) / 13, persistent=False)
        start(self, self.detect)

    def detections(self, images_B1HW: Tensor) -> list[Tensor]:
        """One map (B, A, 6, G, G)."""
        fine, values = self.trunk(self.representation(images_B1HW))
        values = self.neck(values)
        if self.passthrough is not None:
            kept = nn.functional.pixel_unshuffle(self.passthrough(fine), 2)
            values = torch.cat([kept, values], 1)
        return [in_boxes(self.detect(self.final(values)))]

    def loss(self, images_B1HW: Tensor, positive_B: Tensor) -> Tensor:
        """Detection loss of a batch, mean per image."""
        return self.loss_of(named(self.detections(images_B1HW)), positive_B)

    def loss_of(self, outputs: Mapping[str, Tensor], positive_B: Tensor) -> Tensor:
        """As :meth:`loss`, of what :meth:`forward` answers while training."""
        return detection_loss(list(outputs.values()), [self.get_buffer("anchors_A2")], positive_B,
                              self.box, "v2")

    def forward(self, images_B1HW: Tensor) -> dict[str, Tensor]:
        """{"single": logits (B, 2)}; softmax gives (1 - s, s), s the score of the best box.
        While training the maps instead, {"map0": (B, A, 6, G, G)}."""
        maps = self.detections(images_B1HW)
        return named(maps) if self.training else {"single": image_logits(maps)}


def named(maps: Sequence[Tensor]) -> dict[str, Tensor]:
    """Maps by names, as the answers of a network have them."""
    return {f"map{number}": one for number, one in enumerate(maps)}


def in_boxes(maps_BCGG: Tensor) -> Tensor:
    """(B, A, 6, G, G) from what the detection layer answers."""
    rows, columns = maps_BCGG.shape[-2:]
    return maps_BCGG.reshape(-1, maps_BCGG.shape[1] // NUMBERS, NUMBERS, rows, columns)


def check_box(name: str, box: Sequence[float]) -> None:
    if len(box) != 4 or not all(0 < float(value) <= 1 for value in box):
        raise ConfigurationError(f"{name} was asked for box = {list(box)!r}; give centre x, y, "
                                 "width and height in parts of the image, each up to 1")


def start(network: nn.Module, *detect: nn.Conv2d) -> None:
    """Initial weights; at first no box holds anything."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, a=0.1, nonlinearity="leaky_relu")
    for layer in detect:
        nn.init.normal_(layer.weight, std=0.01)
        assert layer.bias is not None
        with torch.no_grad():
            layer.bias.view(-1, NUMBERS).copy_(torch.tensor([0, 0, 0, 0, -3.0, 0]))
