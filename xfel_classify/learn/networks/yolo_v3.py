"""YOLOv3 with one class as a classifier of single hits [IGN21]: 61,523,734 parameters.

Darknet-53, three scales (1/32, 1/16, 1/8 of the side) of three anchors x 6 = 18 filters, joined by
upsampling: 75 convolutions (Redmon and Farhadi, arXiv:1804.02767).  Input, output and options are
those of :mod:`.yolo`.

Axes: B image, C channel, H row, W column, A anchor, G cell.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..spi_representations import Representation
from ._darknet import Darknet53, check_width, convolution, scaled
from ._yolo_boxes import NUMBERS, detection_loss, image_logits
from .yolo import WHOLE, check_box, in_boxes, named, start

ANCHORS_PX = (((116, 90), (156, 198), (373, 326)), ((30, 61), (62, 45), (59, 119)),
              ((10, 13), (16, 30), (33, 23)))
"""Of 416 pixels, coarse to fine; arXiv:1804.02767."""

CHANNELS = (512, 256, 128)


class Scale(nn.Module):
    """Five convolutions 1 x 1 / 3 x 3 in turn; a sixth and the detection layer on top."""

    def __init__(self, channels: int, half: int, wide: int) -> None:
        super().__init__()
        self.neck = nn.Sequential(
            convolution(channels, half, 1), convolution(half, wide, 3), convolution(wide, half, 1),
            convolution(half, wide, 3), convolution(wide, half, 1))
        self.final = convolution(half, wide, 3)
        self.detect = nn.Conv2d(wide, 3 * NUMBERS, 1)

    def forward(self, values_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """(what the next scale goes on with, the map of this one)."""
        kept = self.neck(values_BCHW)
        return kept, in_boxes(self.detect(self.final(kept)))


def twice(values_BCHW: Tensor) -> Tensor:
    """Every value four times, as a square: nearest-neighbour upsampling in operators that every
    runtime has."""
    count, channels, height, width = values_BCHW.shape
    squares = values_BCHW[:, :, :, None, :, None].expand(count, channels, height, 2, width, 2)
    return squares.reshape(count, channels, 2 * height, 2 * width)


class Network(nn.Module):
    """Options as in :class:`.yolo.Network`; ``size`` is 608 in the study."""

    uses_geometry = False

    def __init__(self, representation: str = "colour_linear", size: int = 608,
                 width: float = 1.0, box: Sequence[float] = WHOLE,
                 region: Sequence[int] = ()) -> None:
        super().__init__()
        check_width("yolo_v3", width, size)
        check_box("yolo_v3", box)
        self.outputs = {"single": 2}
        self.box = tuple(float(value) for value in box)
        self.representation = Representation(representation, size, region)
        self.trunk = Darknet53(width)
        scales, links = [], []
        above = 0
        for published, from_trunk in zip(CHANNELS, reversed(self.trunk.channels), strict=True):
            half, wide = scaled(published, width), scaled(2 * published, width)
            scales.append(Scale(from_trunk + above, half, wide))
            above = scaled(published // 2, width)
            if published != CHANNELS[-1]:
                links.append(convolution(half, above, 1))
        self.scales, self.links = nn.ModuleList(scales), nn.ModuleList(links)
        for number, anchors in enumerate(ANCHORS_PX):
            self.register_buffer(f"anchors{number}_A2", torch.tensor(anchors) / 416.0,
                                 persistent=False)
        start(self, *[scale.detect for scale in scales])

    def detections(self, images_B1HW: Tensor) -> list[Tensor]:
        """Three maps (B, A, 6, G, G), coarse to fine."""
        trunk = self.trunk(self.representation(images_B1HW))
        found, values = [], trunk[-1]
        for number, scale in enumerate(self.scales):
            kept, one = scale(values)
            found.append(one)
            if number < len(self.links):
                finer = twice(self.links[number](kept))
                values = torch.cat([finer, trunk[-2 - number]], 1)
        return found

    def loss(self, images_B1HW: Tensor, positive_B: Tensor) -> Tensor:
        """Detection loss of a batch, mean per image."""
        return self.loss_of(named(self.detections(images_B1HW)), positive_B)

    def loss_of(self, outputs: Mapping[str, Tensor], positive_B: Tensor) -> Tensor:
        """As :meth:`loss`, of what :meth:`forward` answers while training."""
        anchors = [self.get_buffer(f"anchors{i}_A2") for i in range(len(ANCHORS_PX))]
        return detection_loss(list(outputs.values()), anchors, positive_B, self.box, "v3")

    def forward(self, images_B1HW: Tensor) -> dict[str, Tensor]:
        """{"single": logits (B, 2)}; softmax gives (1 - s, s), s the score of the best box.
        While training the maps instead, {"map0": (B, A, 6, G, G), ...}, coarse to fine."""
        maps = self.detections(images_B1HW)
        return named(maps) if self.training else {"single": image_logits(maps)}
