"""Quadrants of simulated stills for the lattice and resolution networks, cached on disk.

Images are what the networks see: windowed by the code of inference (``preprocess.image_window``),
max-pooled, turned so that the beam is at (0, 0), square root and floor, so that they are whole
numbers up to 255 and are stored as bytes without loss (see :mod:`.shards`).

Axes: N images, H row, W column, 4 = geometry (mm, mm, angstrom, pooling).
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..core import ConfigurationError, Window
from ..preprocess import image_window
from ..simulate.stills_512 import SIDE_PX, Still, draw_still, simulate_quadrant
from . import shards
from .recipes import Recipe

__all__ = ["Shard", "StillSet", "open_stills", "shards_of", "still_window"]

RUNS_PER_SHARD = 50
LABELS = ("n_lattices", "inverse_d_A", "misset_deg", "misset_sigma_deg", "n_visible", "run")
CLIP = 65025.0          # 255^2


@dataclass(frozen=True)
class Shard(shards.Shard):
    """Some runs of a split, in one file; ``side`` pixels along each axis of an image."""

    side: int

    @property
    def stem(self) -> str:
        return (f"stills_{self.preset}_s{self.seed}_r{self.first:05d}_{self.runs}x{self.events}"
                f"_{self.side}")

    def simulate(self, run: int, events: range) -> dict[str, np.ndarray]:
        rows: dict[str, list] = {name: [] for name in ("images", "geometry", *LABELS)}
        for event in events:
            still = simulate_quadrant(draw_still(self.seed, run, event, self.preset))
            c = still.conditions
            image, geometry = still_window(still, self.side)
            labels = (c.n_lattices, 1 / c.d_A, min(c.misset_deg, default=0.0), c.misset_sigma_deg,
                      still.n_visible, run)
            for name, value in zip(rows, (image, geometry, *labels), strict=True):
                rows[name].append(value)
        return {name: np.asarray(values, None if name in ("images", "geometry") else np.float32)
                for name, values in rows.items()}


def shards_of(recipe: Recipe, split: str) -> list[Shard]:
    """Shards of "training", "validation", "test" or "shifted"."""
    window = recipe.window
    if (window.kind, window.normalize) != ("quadrant", "sqrt_floor") or window.clip > CLIP \
            or window.height != window.width or SIDE_PX % window.height:
        raise ConfigurationError(
            f"recipe {recipe.name} trains on stills and looks at a {window.height} x "
            f"{window.width} {window.kind}, {window.normalize}, clipped at {window.clip:g}; stills "
            f"need a square quadrant whose side divides {SIDE_PX}, sqrt_floor and a clip of at "
            f"most {CLIP:g}")
    return [Shard(part.preset, part.seed, first, min(RUNS_PER_SHARD, part.runs - first),
                  part.events, window.height)
            for part in getattr(recipe.data, split)
            for first in range(0, part.runs, RUNS_PER_SHARD)]


def still_window(still: Still, side: int) -> tuple[np.ndarray, np.ndarray]:
    """(image uint8 (side, side), geometry float32 (4,)) of a quadrant, as a network sees it."""
    c = still.conditions
    more = SIDE_PX // side
    window = Window(kind="quadrant", height=side, width=side, pool=c.pool * more,
                    quadrant=c.quadrant, normalize="sqrt_floor", clip=CLIP)
    image = image_window(still.photons_SF, window, still.beam_center_px, still.good_SF)
    geometry = np.array(c.geometry_4, np.float32)
    geometry[3] *= more
    return image.astype(np.uint8), geometry


def open_stills(shards_to_open: Sequence[Shard], processes: int = 1,
                directory: Path | None = None) -> StillSet:
    """All images of the shards, simulated first where they are missing or out of date."""
    return StillSet(shards.cached(shards_to_open, processes, directory))


class StillSet(shards.ShardSet):
    """``labels`` maps the names of :data:`LABELS` to (N,) arrays; ``geometry_N4``."""

    def __init__(self, paths: Sequence[Path]) -> None:
        super().__init__(paths)
        self.geometry_N4 = self.labels.pop("geometry")
