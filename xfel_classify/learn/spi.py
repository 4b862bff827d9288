"""Simulated single-particle images for training, cached on disk, and how they are augmented.

Images are what a network sees of a run: mean photons per detector pixel over blocks, beam in the
middle (see :mod:`.shards`).  The file names say whether structures were the entries themselves or
stand-ins.

Axes: N images, B images of a batch, H row, W column.
"""
from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..core import ConfigurationError
from ..simulate.spi_conditions import draw_spi, spi_preset
from ..simulate.spi_particles import SPI_PARTICLES, find_structure, structure_directory
from . import shards
from .recipes import Augment, Recipe

__all__ = ["COUNTS", "Changes", "Shard", "SpiSet", "drawn_labels", "geometry_rows", "open_spi",
           "shards_of", "structures_word"]

COUNTS = ("single", "double", "triple", "quadruple")
LABELS = ("count", "particle", "diameter_A", "distance_m", "photons")
EVENTS_PER_SHARD = 1100
LOAD = 4                # purpose of random numbers: changes that are drawn once


@dataclass(frozen=True)
class Shard(shards.Shard):
    """Some runs of a split, in one file."""

    structures: str

    @property
    def stem(self) -> str:
        plain = "".join(c if c.isalnum() or c in "._-" else "_" for c in self.preset)
        if plain != self.preset:        # the switches of a preset: what is replaced matters
            plain += "_" + hashlib.sha256(self.preset.encode()).hexdigest()[:6]
        return (f"spi_{plain}_s{self.seed}_r{self.first:05d}_{self.runs}x{self.events}_"
                f"{self.structures}")

    def simulate(self, run: int, events: range) -> dict[str, np.ndarray]:
        from ..simulate.spi_images import simulate_spi, spi_labels

        rows: dict[str, list] = {name: [] for name in ("images", "total", "run", *LABELS)}
        for event in events:
            conditions = draw_spi(self.seed, run, event, self.preset)
            image_HW = simulate_spi(conditions)
            labels = spi_labels(conditions)
            values = (image_HW, image_HW.sum(dtype=np.float64), run,
                      *(labels[name] for name in LABELS))
            for name, value in zip(rows, values, strict=True):
                rows[name].append(value)
        return {name: np.asarray(values, np.float32) for name, values in rows.items()}


def structures_word() -> str:
    """What the particles are made of, for the name of a data set: "standins", or "entries" with
    how many of the eleven the user's directory has and which, as a short hash."""
    directory = structure_directory()
    real = [] if directory is None else [name for name in SPI_PARTICLES
                                         if find_structure(name, directory)]
    if not real:
        return "standins"
    return f"entries{len(real)}_{hashlib.sha256(' '.join(real).encode()).hexdigest()[:6]}"


def shards_of(recipe: Recipe, split: str) -> list[Shard]:
    """Shards of "training", "validation", "test" or "shifted"."""
    window, word = recipe.window, structures_word()
    found = []
    for part in getattr(recipe.data, split):
        preset = spi_preset(part.preset)
        pool = preset.block if preset.block in recipe.pools else window.pool
        if (window.shape, pool, window.normalize, window.unit) != (
                preset.shape, preset.block, "none", "photon") or (
                preset.block > 1 and window.pool_by != "mean"):
            raise ConfigurationError(
                f"recipe {recipe.name} looks at {window.height} x {window.width} {window.unit}s, "
                f"{window.normalize}, pooled {window.pool} by {window.pool_by}; images of preset "
                f"{part.preset} are {preset.shape[0]} x {preset.shape[1]} photons, mean of "
                f"{preset.block} x {preset.block}: write the window so, with normalize = "
                "\"none\", or name that pooling in pools")
        at_a_time = max(1, EVENTS_PER_SHARD // part.events)
        found += [Shard(part.preset, part.seed, first, min(at_a_time, part.runs - first),
                        part.events, word) for first in range(0, part.runs, at_a_time)]
    return found


class SpiSet(shards.ShardSet):
    """``labels`` maps the names of :data:`LABELS`, "total" (sum of the image), "run" and what
    :func:`drawn_labels` adds to (N,) float32 arrays; "count" is 0 for one copy, "particle" -1 for
    one that is not a class."""


def open_spi(shards_to_open: Sequence[Shard], processes: int = 1,
             directory: Path | None = None) -> SpiSet:
    """All images of the shards, simulated first where they are missing or out of date."""
    images = SpiSet(shards.cached(shards_to_open, processes, directory))
    drawn = [drawn_labels(shard) for shard in shards_to_open]
    images.labels |= {name: np.concatenate([one[name] for one in drawn]) for name in drawn[0]}
    return images


def drawn_labels(shard: Shard) -> dict[str, np.ndarray]:
    """What the conditions of the images say that their files do not hold, float32 (N,).

    "quality" is 1 for exactly one particle, 0 for several, contaminants and blanks; "body" 1 for
    shapes; "photon_energy_eV", "pixel_m" of the detector and "pool" of the image.
    """
    rows = []
    for run in range(shard.first, shard.first + shard.runs):
        for event in range(shard.events):
            c = draw_spi(shard.seed, run, event, shard.preset)
            rows.append((c.count == 1 and c.kind in ("particles", "good"), c.kind != "particles",
                         c.photon_energy_eV, c.pixel_size_m, c.block))
    columns = np.array(rows, np.float32).T
    return dict(zip(("quality", "body", "photon_energy_eV", "pixel_m", "pool"), columns,
                    strict=True))


def geometry_rows(labels: Mapping[str, np.ndarray]) -> np.ndarray:
    """float32 (N, 4): distance in mm, pixel in mm, wavelength in angstrom, pooling."""
    return np.stack([1e3 * labels["distance_m"], 1e3 * labels["pixel_m"],
                     12398.419843 / labels["photon_energy_eV"], labels["pool"]],
                    axis=1).astype(np.float32)


@dataclass(frozen=True)
class Changes:
    """Random changes of images, one row each: flips, quarter turns and a common factor."""

    flip_rows_B: np.ndarray
    flip_columns_B: np.ndarray
    turns_B: np.ndarray
    factor_B: np.ndarray

    @classmethod
    def draw(cls, how: Augment, count: int, rng: np.random.Generator) -> Changes:
        flips = rng.integers(2, size=(2, count)) * bool(how.flips)
        turns = rng.integers(4, size=count) * bool(how.rotations)
        factor = np.exp(how.intensity * rng.standard_normal(count))
        return cls(flips[0], flips[1], turns, factor.astype(np.float32))

    def of(self, chosen_B: np.ndarray) -> Changes:
        """Those of some images."""
        return Changes(*(values[chosen_B] for values in (
            self.flip_rows_B, self.flip_columns_B, self.turns_B, self.factor_B)))

    def apply(self, images_BHW: np.ndarray) -> np.ndarray:
        """float32 (B, H, W); turns need square images."""
        out = np.empty_like(images_BHW)
        for slot, image_HW in enumerate(images_BHW):
            image_HW = image_HW[::-1 if self.flip_rows_B[slot] else 1,
                                ::-1 if self.flip_columns_B[slot] else 1]
            if self.turns_B[slot]:
                image_HW = np.rot90(image_HW, self.turns_B[slot])
            np.multiply(image_HW, self.factor_B[slot], out=out[slot])
        return out


def label_of(labels: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """A label by name, also those that follow from others: "edge_resolution_A" (of the outermost
    pixels along an axis of the published window, at 4.6 keV), "size_nm",
    "single_nm" (NaN where there is not exactly one particle), "log_photons"."""
    if name == "edge_resolution_A":
        half_m, wavelength_A = 63.5 * 8 * 75e-6, 12398.419843 / 4600.0
        return wavelength_A / (2 * np.sin(0.5 * np.arctan(half_m / labels["distance_m"])))
    if name == "size_nm":
        return labels["diameter_A"] / 10
    if name == "single_nm":         # of what is one particle
        return np.where(labels["quality"] > 0, labels["diameter_A"] / 10, np.float32(np.nan))
    if name == "count":             # five, and what is no particle, are none of the classes
        return np.where(labels[name] < len(COUNTS), labels[name], np.float32(-1))
    if name == "log_photons":
        return np.log(np.maximum(labels["photons"], math.exp(-20)))
    if name not in labels:
        raise ConfigurationError(f"a task asks for the label {name!r}; images of single particles "
                                 f"have {', '.join(sorted(labels))}, edge_resolution_A, size_nm, "
                                 "single_nm, log_photons: name it with label = in the task")
    return labels[name]
