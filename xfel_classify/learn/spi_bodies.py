"""Images of bodies for training: one body or not, placed in the window that a run is seen through.

The simulator's window need not have the beam in its middle (``pr772`` looks at 123 x 240 pixels
above the gap); a card's window has.  Images are therefore laid into the card's window where the
beam tells, everything else 0, as masked pixels are in a run.

Axes: N images, B images of a batch, H row, W column, E event.
"""
from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..core import ConfigurationError, Window
from ..simulate.spi_bodies import BODY_VOXEL, body_volume
from ..simulate.spi_conditions import SpiConditions, SpiPreset, draw_spi, spi_preset
from ..simulate.spi_images import copies_of
from . import shards, spi
from .recipes import Recipe

__all__ = ["KINDS", "BodySet", "Shard", "open_bodies", "place_in_window", "shards_of"]

KINDS = ("one", "several", "neither")
"""What an image shows: one body; two to five; a contaminant or nothing."""

DRAWN_AT_A_TIME = 1000


@dataclass(frozen=True)
class Shard(spi.Shard):
    """As of any single particles; ``positives`` of the events of each run show one body, exactly
    (0: as many as the preset draws)."""

    positives: int = 0

    def event(self, row: int) -> tuple[int, int]:
        """(run, event) of an image."""
        run, place = divmod(row, self.events)
        if self.positives:
            place = _events(self.preset, self.seed, self.first + run, self.events,
                            self.positives)[place]
        return self.first + run, place

    @property
    def stem(self) -> str:
        return super().stem + (f"_p{self.positives}" if self.positives else "")

    def simulate(self, run: int, events: range) -> dict[str, np.ndarray]:
        if not self.positives:
            return super().simulate(run, events)
        chosen_E = _events(self.preset, self.seed, run, self.events, self.positives)
        parts = [super(Shard, self).simulate(run, range(event, event + 1))
                 for event in chosen_E[events.start:events.stop]]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@functools.lru_cache(maxsize=64)
def _events(preset: str, seed: int, run: int, count: int, positives: int) -> tuple[int, ...]:
    """The first ``positives`` events of a run with one body and the first others, in order."""
    wanted = [count - positives, positives]
    found: list[int] = []
    event, limit = 0, 1000 * count + DRAWN_AT_A_TIME
    while sum(wanted) and event < limit:
        one = draw_spi(seed, run, event, preset).kind == "good"
        if wanted[one]:
            wanted[one] -= 1
            found.append(event)
        event += 1
    if sum(wanted):
        raise ConfigurationError(
            f"{positives} of {count} images of preset {preset} were to show one body; after "
            f"{limit} events {wanted[1]} of these and {wanted[0]} others are missing; give "
            "another preset or number")
    return tuple(found)


def shards_of(recipe: Recipe, split: str) -> list[Shard]:
    """Shards of a split of a recipe; its window must show the preset's."""
    found = []
    for part in getattr(recipe.data, split):
        preset = spi_preset(part.preset)
        if not preset.bodies:
            raise ConfigurationError(f"recipe {recipe.name} asks whether images show one body; "
                                     f"preset {part.preset} is of particles; give one such as "
                                     "quality or pr772")
        if not 0 <= part.positives <= part.events:
            raise ConfigurationError(f"recipe {recipe.name}: {part.positives} positives of "
                                     f"{part.events} events were asked for; give from 0 to "
                                     f"{part.events}")
        _corner(preset, recipe.window, f"recipe {recipe.name}, preset {part.preset}")
        at_a_time = max(1, spi.EVENTS_PER_SHARD // part.events)
        found += [Shard(part.preset, part.seed, first, min(at_a_time, part.runs - first),
                        part.events, "standins", part.positives)
                  for first in range(0, part.runs, at_a_time)]
    return found


def _corner(preset: SpiPreset, window: Window, where: str) -> tuple[int, int]:
    """(row, column) in the window of the preset's first pixel."""
    first = preset.first_px or tuple(-side * preset.block / 2 for side in preset.shape)
    corner = [side / 2 + place / preset.block
              for side, place in zip(window.shape, first, strict=True)]
    fits = all(at == int(at) and 0 <= at <= side - own for at, side, own in zip(
        corner, window.shape, preset.shape, strict=True))
    if not fits or (window.pool, window.normalize, window.unit) != (preset.block, "none", "photon"
                                                                    ) or (
            preset.block > 1 and window.pool_by != "mean"):
        raise ConfigurationError(
            f"{where}: the window is {window.height} x {window.width} {window.unit}s, "
            f"{window.normalize}, pooled {window.pool} by {window.pool_by}; images are "
            f"{preset.shape[0]} x {preset.shape[1]} photons, mean of {preset.block} x "
            f"{preset.block}, from {first[0]:g}, {first[1]:g} pixels of the beam: write a window "
            "about the beam that holds them, with normalize = \"none\"")
    return int(corner[0]), int(corner[1])


def place_in_window(images_BHW: np.ndarray, preset: str, window: Window) -> np.ndarray:
    """float32 (B, window.height, window.width): images of ``preset`` where the window has them."""
    row, column = _corner(spi_preset(preset), window, f"preset {preset}")
    if images_BHW.shape[1:] == window.shape:
        return images_BHW
    placed = np.zeros((len(images_BHW), *window.shape), np.float32)
    placed[:, row:row + images_BHW.shape[1], column:column + images_BHW.shape[2]] = images_BHW
    return placed


def shows_one(c: SpiConditions) -> bool:
    """Does an image show one body of the preset's shape and sizes?

    True also for a contaminant "of another size" whose size good ones have too (preset
    ``quality``: 0.6 % of the images): nothing in the image tells them apart.
    """
    if c.kind != "contaminant":
        return c.kind == "good"
    smallest, largest = spi_preset(c.preset).diameter_A
    shape = body_volume(c.particle)
    copies = copies_of(c)
    sizes = [BODY_VOXEL / one.voxel_A for one in copies]
    return smallest <= max(sizes) <= largest and all(
        one.volume_XYZ is shape and not one.position_3.any() for one in copies)


class BodySet(shards.ShardSet):
    """Images as a window shows them; ``good_N`` True for one body (:func:`shows_one`),
    ``kind_N`` one of :data:`KINDS`."""

    def __init__(self, paths: Sequence[Path], opened: Sequence[Shard], window: Window) -> None:
        super().__init__(paths)
        self._preset_of = [shard.preset for shard in opened]
        self._window = window
        count_N = self.labels["count"].astype(int)
        self.kind_N = np.where(count_N == 0, 0, np.where(count_N > 0, 1, 2))
        # a blank has no photons of a body
        for row in np.flatnonzero((count_N < 0) & (self.labels["photons"] > 0)):
            number = int(np.searchsorted(self._starts, row, side="right")) - 1
            shard = opened[number]
            run, event = shard.event(int(row - self._starts[number]))
            if shows_one(draw_spi(shard.seed, run, event, shard.preset)):
                self.kind_N[row] = 0
        self.good_N = self.kind_N == 0

    def images(self, indices_B: np.ndarray | Sequence[int]) -> np.ndarray:
        """float32 (B, H, W) of the window, in the order of ``indices_B``."""
        indices_B = np.asarray(indices_B)
        of_B = np.searchsorted(self._starts, indices_B, side="right") - 1
        out = np.empty((len(indices_B), *self._window.shape), np.float32)
        for number in np.unique(of_B):
            rows = np.flatnonzero(of_B == number)
            out[rows] = place_in_window(super().images(indices_B[rows]), self._preset_of[number],
                                        self._window)
        return out


def open_bodies(shards_to_open: Sequence[Shard], window: Window, processes: int = 1,
                directory: Path | None = None) -> BodySet:
    """All images of the shards, simulated first where they are missing or out of date."""
    return BodySet(shards.cached(shards_to_open, processes, directory), shards_to_open, window)
