"""Boxes of one class as the YOLO detectors predict and learn them, and a score for the image.

A map holds for each cell (G x G) and each anchor six numbers: t_x, t_y, t_w, t_h, objectness,
class.  The box is centred at (cell + sigmoid(t_x, t_y)) / G with size anchor * exp(t_w, t_h), all
in parts of the image.  Redmon and Farhadi, arXiv:1612.08242 (v2) and arXiv:1804.02767 (v3); an
image is judged by its best box (methods specification, section 3b).

Axes: B image, A anchor, G cell, 6 as above, N box.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NUMBERS = 6
OBJECT, NO_OBJECT = 5.0, 0.5        # weights of objectness [v2]
CLEAR = {"v2": 0.6, "v3": 0.5}
"""A box that overlaps the true one more than this is not told to be empty."""

FEWEST = 1e-6       # probabilities are kept this far from 0 and 1


def box_scores(maps: Sequence[Tensor]) -> Tensor:
    """(B, N): objectness x class probability of every box of maps (B, A, 6, G, G)."""
    return torch.cat([(torch.sigmoid(one[:, :, 4]) * torch.sigmoid(one[:, :, 5])).flatten(1)
                      for one in maps], 1)


def image_logits(maps: Sequence[Tensor]) -> Tensor:
    """(B, 2) logits whose softmax is (1 - s, s) with s the highest score of a box."""
    score_B = -(-box_scores(maps)).amin(1).clamp(-(1 - FEWEST), -FEWEST)    # see Representation
    return torch.stack([torch.log1p(-score_B), torch.log(score_B)], 1)


def boxes(one: Tensor, anchors_A2: Tensor) -> Tensor:
    """(B, A, 4, G, G) centre x, y, width, height in parts of the image, of a map."""
    cells = one.shape[-1]
    place = torch.arange(cells, dtype=one.dtype, device=one.device)
    x = (torch.sigmoid(one[:, :, 0]) + place) / cells
    y = (torch.sigmoid(one[:, :, 1]) + place[:, None]) / cells
    size = anchors_A2[:, :, None, None] * torch.exp(one[:, :, 2:4].clamp(max=8.0))
    return torch.stack([x, y, size[:, :, 0], size[:, :, 1]], 2)


def overlap(found: Tensor, box: Sequence[float]) -> Tensor:
    """Intersection over union of boxes (..., 4, G, G) along axis 2 with one box."""
    x, y, w, h = (found[:, :, i] for i in range(4))
    cx, cy, bw, bh = box
    wide = torch.minimum(x + w / 2, torch.full_like(x, cx + bw / 2)) - torch.maximum(
        x - w / 2, torch.full_like(x, cx - bw / 2))
    high = torch.minimum(y + h / 2, torch.full_like(y, cy + bh / 2)) - torch.maximum(
        y - h / 2, torch.full_like(y, cy - bh / 2))
    common = wide.clamp(min=0) * high.clamp(min=0)
    return common / (w * h + bw * bh - common).clamp(min=1e-9)


def detection_loss(maps: Sequence[Tensor], anchors: Sequence[Tensor], positive_B: Tensor,
                   box: Sequence[float], kind: str) -> Tensor:
    """Mean loss per image when positives hold ``box`` (cx, cy, w, h) and the others nothing.

    The box belongs to the anchor whose shape fits best, over all maps, in the cell of its centre.
    "v2": squared errors of sigmoid(t_x, t_y), t_w, t_h, of objectness (target: the overlap; weight
    5, 0.5 without object) and class.  "v3": squared errors of the place, binary cross-entropy of
    objectness and class.
    """
    total = maps[0].new_zeros(())
    sizes = [torch.minimum(a, a.new_tensor(box[2:])).prod(1)
             / (a.prod(1) + box[2] * box[3] - torch.minimum(a, a.new_tensor(box[2:])).prod(1))
             for a in anchors]
    best = max(range(len(maps)), key=lambda i: float(sizes[i].max()))
    positive_B = positive_B.to(maps[0].dtype)
    for number, (one, own) in enumerate(zip(maps, anchors, strict=True)):
        share = overlap(boxes(one, own), box)
        owns = torch.zeros_like(share)
        if number == best:
            cells = one.shape[-1]
            column, row = (min(int(centre * cells), cells - 1) for centre in box[:2])
            owns[:, int(sizes[number].argmax()), row, column] = positive_B
        ignored = (share > CLEAR[kind]) & (positive_B[:, None, None, None] > 0) & (owns == 0)
        empty = (1 - owns) * ~ignored
        objectness, klass = one[:, :, 4], one[:, :, 5]
        if kind == "v2":
            there = torch.sigmoid(objectness)
            total = total + (OBJECT * owns * (there - share.detach()) ** 2
                             + NO_OBJECT * empty * there ** 2).sum()
            total = total + (owns * (torch.sigmoid(klass) - 1) ** 2).sum()
        else:
            log1p = torch.nn.functional.softplus
            total = total + (owns * log1p(-objectness) + empty * log1p(objectness)).sum()
            total = total + (owns * log1p(-klass)).sum()
        if number == best:
            total = total + _place_errors(one, own, owns, box)
    return total / max(1, len(maps[0]))


def _place_errors(one: Tensor, anchors_A2: Tensor, owns: Tensor, box: Sequence[float]) -> Tensor:
    cells = one.shape[-1]
    errors = torch.zeros_like(owns)
    for i in range(2):
        target = box[i] * cells - min(int(box[i] * cells), cells - 1)
        wanted_A = torch.log(box[2 + i] / anchors_A2[:, i])
        errors = errors + (torch.sigmoid(one[:, :, i]) - target) ** 2
        errors = errors + (one[:, :, 2 + i] - wanted_A[:, None, None]) ** 2
    return (owns * errors).sum()
