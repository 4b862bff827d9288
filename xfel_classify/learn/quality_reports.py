"""What a good/bad network confuses, shape by shape, and what its layers answer [LI-HAN17].

The study trained on simulated icosahedra and tested on shapes the network had not seen: nothing bad
was called good, but 58.7 % of the truncated icosahedra and 84.8 % of the tori were called bad
(methods specification, section 2c).

Axes: N image, B, C channel, H row, W column.
"""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core import ConfigurationError
from .gallery_page import Group, gallery_page

__all__ = ["PUBLISHED", "ShapeScore", "activation_page", "robustness_table", "shape_score"]

PUBLISHED = {"icosahedron": (0.0, 0.0), "truncated_icosahedron": (0.587, 0.0),
             "torus": (0.848, 0.0)}
"""{shape: (share of good called bad, share of bad called good)} of ResNet(2,2)."""

ALLOWED = 0.01


@dataclass(frozen=True)
class ShapeScore:
    """Errors on one shape: ``fnr`` good called bad and ``fpr`` bad called good at ``threshold``;
    ``fnr_allowed`` at the threshold that calls at most :data:`ALLOWED` of the bad good."""

    shape: str
    good: int
    bad: int
    threshold: float
    fnr: float
    fpr: float
    fnr_allowed: float


def shape_score(shape: str, score_N: np.ndarray, good_N: np.ndarray, threshold: float = 0.5
                ) -> ShapeScore:
    """Errors from scores of being good and the truth; NaN for a kind that is not there."""
    score_N, good_N = np.asarray(score_N, float), np.asarray(good_N, bool)
    if score_N.shape != good_N.shape or not np.isfinite(score_N).all():
        raise ConfigurationError(f"errors on {shape} were to be counted from {score_N.shape} "
                                 f"scores and {good_N.shape} labels; give one finite score per "
                                 "label")
    good, bad = score_N[good_N], np.sort(score_N[~good_N])[::-1]
    allowed = math.floor(ALLOWED * len(bad))
    limit = bad[allowed] if len(bad) else math.nan      # scores above it let so many through
    return ShapeScore(
        shape, len(good), len(bad), threshold,
        float((good < threshold).mean()) if len(good) else math.nan,
        float((bad >= threshold).mean()) if len(bad) else math.nan,
        float((good <= limit).mean()) if len(good) and len(bad) else math.nan)


def robustness_table(scores: Sequence[ShapeScore]) -> str:
    """Markdown: good called bad and bad called good for each shape, the paper's beside."""
    lines = ["| shape | good / bad | good called bad % | bad called good % | "
             f"good called bad % when at most {ALLOWED:.0%} of bad pass | "
             "paper: good called bad % | paper: bad called good % |", "|---" * 7 + "|"]
    for one in scores:
        paper = PUBLISHED.get(one.shape, (math.nan, math.nan))
        cells = [_percent(value) for value in (one.fnr, one.fpr, one.fnr_allowed, *paper)]
        lines.append(f"| {one.shape} | {one.good} / {one.bad} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f}"


def activation_page(network: Any, images_NHW: np.ndarray, names: Sequence[str],
                    channels: int = 16, parameters: Mapping[str, Any] | None = None) -> str:
    """A page with what each stage of ``spi_quality`` answers to some images, brightest first.

    Every picture is one channel, drawn on its own scale at the size of the image; the channels
    are those with the largest mean answer over all images.
    """
    import torch

    if len(names) != len(images_NHW) or not len(names):
        raise ConfigurationError(f"{len(names)} names were given for {len(images_NHW)} images; "
                                 "give one for each")
    network.eval()
    with torch.no_grad():
        images = torch.from_numpy(np.asarray(images_NHW, np.float32))[:, None]
        stages = {name: values.numpy() for name, values in network.activations(images).items()}
    height, width = images_NHW.shape[1:]
    groups = []
    for stage, values_NCHW in stages.items():
        order = np.argsort(-np.abs(values_NCHW).mean((0, 2, 3)), kind="stable")[:channels]
        factor = height // values_NCHW.shape[2], width // values_NCHW.shape[3]
        pictures = []
        for image, name in zip(values_NCHW, names, strict=True):
            for channel in order:
                shown = np.kron(image[channel], np.ones(factor, np.float32))
                pictures.append((f"{name}, channel {channel}", shown - min(shown.min(), 0.0)))
        groups.append(Group(stage, stage, {
            "channels": values_NCHW.shape[1],
            "size": f"{values_NCHW.shape[2]} x {values_NCHW.shape[3]}"}, pictures))
    return gallery_page("Activations of spi_quality", f"{len(names)} images through "
                        f"{len(stages)} stages.", groups, np.ones((height, width), bool),
                        parameters or {})
