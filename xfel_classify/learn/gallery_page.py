"""A page that shows groups of frames, clusters or class averages, for a person to judge.

Axes: N frame, H row, W column.
"""
from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .markup import Markup, join, svg, table, tag
from .report_images import grey, png
from .report_page import page, section

__all__ = ["Group", "gallery_page", "picture", "tile"]


@dataclass(frozen=True)
class Group:
    """One group: pictures (H, W) with captions, the average first; ``facts`` say what it is."""

    id: str
    heading: str
    facts: Mapping[str, Any]
    pictures: Sequence[tuple[str, np.ndarray]] = field(repr=False, default=())
    chosen: bool = False


def picture(image_HW: np.ndarray, good_HW: np.ndarray, label: str, scale: int = 3) -> Markup:
    """A frame in grey on a logarithmic scale, dark = bright, gaps transparent."""
    shown = np.isfinite(image_HW) & good_HW
    encoded = base64.b64encode(png(_grey(image_HW, shown), shown)).decode()
    height, width = image_HW.shape
    return svg(width * scale, height * scale, tag(
        "image", width=width * scale, height=height * scale, style="image-rendering:pixelated",
        href=f"data:image/png;base64,{encoded}"), label=label, class_="frame")


def _grey(image_HW: np.ndarray, shown: np.ndarray) -> np.ndarray:
    """Each frame on its own scale: brightness says nothing about its kind."""
    values = np.where(shown, image_HW, 0.0)
    top = float(np.percentile(values[shown], 99.8)) if shown.any() else 1.0
    logged = np.log1p(100.0 * np.clip(values / max(top, 1e-12), 0, 1))
    return grey(logged, 0.0, float(np.log1p(100.0)))


def tile(groups: Sequence[Group], good_HW: np.ndarray, columns: int = 8) -> bytes:
    """A PNG of all pictures, one line per group."""
    height, width = good_HW.shape
    canvas = np.full((max(1, len(groups)) * (height + 2), columns * (width + 2)), 255, np.uint8)
    for row, group in enumerate(groups):
        for column, (_, image_HW) in enumerate(list(group.pictures)[:columns]):
            shown = np.isfinite(image_HW) & good_HW
            at = row * (height + 2), column * (width + 2)
            canvas[at[0]:at[0] + height, at[1]:at[1] + width] = np.where(
                shown, _grey(image_HW, shown), 255)
    return png(canvas, np.ones(canvas.shape, bool))


def gallery_page(title: str, lead: str, groups: Sequence[Group], good_HW: np.ndarray,
                 parameters: Mapping[str, Any], footer: str = "") -> str:
    """The page; a list of all groups first, then each with its pictures."""
    keys = list(dict.fromkeys(key for group in groups for key in group.facts))
    rows = [[tag("a", group.heading, href=f"#{group.id}"),
             *[group.facts.get(key, "") for key in keys]] for group in groups]
    overview = section("Overview", tag("div", table(["group", *keys], rows, class_="numbers"),
                                       class_="wide"), id="overview")
    sections = [overview]
    for group in groups:
        figures = [tag("figure", picture(image, good_HW, f"{group.heading}: {caption}"),
                       tag("figcaption", caption)) for caption, image in group.pictures]
        facts = ", ".join(f"{key} {value}" for key, value in group.facts.items())
        sections.append(section(group.heading, tag("p", facts, class_="muted"),
                                tag("div", *figures, class_="gallery"), id=group.id))
    settings = section("Settings", table(["setting", "value"], [[key, str(value)] for key, value
                                                                in parameters.items()],
                                         class_="provenance"), id="settings")
    return page(title, lead, [("overview", "Overview"), ("settings", "Settings")],
                join(*sections), settings, footer=footer)
