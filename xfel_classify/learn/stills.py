"""Quadrants of simulated stills for the lattice and resolution networks, cached on disk.

Images are what the networks see: windowed by the code of inference (``preprocess.image_window``),
max-pooled, turned so that the beam is at (0, 0), square root and floor, so that they are whole
numbers up to 255 and are stored as bytes without loss.  A split is stored in shards of some runs
each below the cache directory; a shard is compared with the simulator before it is trusted.

Axes: N images, B images of a batch, H row, W column, 4 = geometry (mm, mm, angstrom, pooling).
"""
from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from ..core import ConfigurationError, Window
from ..preprocess import image_window
from ..simulate.stills_512 import SIDE_PX, Still, draw_still, simulate_quadrant
from .datasets import cache_directory
from .recipes import Recipe, read_recipe

__all__ = ["GENERATOR", "Shard", "StillSet", "open_stills", "shards_of", "still_window",
           "trains_on_stills"]

log = logging.getLogger(__name__)

GENERATOR = "stills"
RUNS_PER_SHARD = 50
LABELS = ("n_lattices", "inverse_d_A", "misset_deg", "misset_sigma_deg", "n_visible", "run")
CLIP = 65025.0          # 255^2


@dataclass(frozen=True)
class Shard:
    """Some runs of a split, in one file."""

    preset: str
    seed: int
    first: int
    runs: int
    events: int
    side: int

    @property
    def stem(self) -> str:
        return (f"stills_{self.preset}_s{self.seed}_r{self.first:05d}_{self.runs}x{self.events}"
                f"_{self.side}")

    def __len__(self) -> int:
        return self.runs * self.events


def trains_on_stills(recipe_path: str | Path) -> bool:
    """True for recipes of the lattice and resolution networks."""
    return read_recipe(recipe_path).data.generator == GENERATOR


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


def _simulate(shard: Shard, run: int, events: range) -> dict[str, np.ndarray]:
    rows: dict[str, list] = {name: [] for name in ("images", "geometry", *LABELS)}
    for event in events:
        still = simulate_quadrant(draw_still(shard.seed, run, event, shard.preset))
        c = still.conditions
        image, geometry = still_window(still, shard.side)
        labels = (c.n_lattices, 1 / c.d_A, min(c.misset_deg, default=0.0), c.misset_sigma_deg,
                  still.n_visible, run)
        for name, value in zip(rows, (image, geometry, *labels), strict=True):
            rows[name].append(value)
    return {name: np.asarray(values, np.float32 if name not in ("images", "geometry") else None)
            for name, values in rows.items()}


def _write(shard: Shard, path: Path) -> str:
    """Simulate a shard; visible under its name only when complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        with h5py.File(unfinished, "w") as file:
            side, n = shard.side, len(shard)
            images = file.create_dataset("images", (n, side, side), np.uint8,
                                         chunks=(1, side, side), compression="lzf")
            others = {name: file.create_dataset(name, (n, 4) if name == "geometry" else (n,),
                                                np.float32)
                      for name in ("geometry", *LABELS)}
            for number in range(shard.runs):
                found = _simulate(shard, shard.first + number, range(shard.events))
                rows = slice(number * shard.events, (number + 1) * shard.events)
                images[rows] = found["images"]
                for name, dataset in others.items():
                    dataset[rows] = found[name]
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path.name


def _is_current(shard: Shard, path: Path) -> bool:
    """True when the first and last image are what the simulator gives today."""
    try:
        with h5py.File(path) as file:
            for number, event in {(0, 0), (shard.runs - 1, shard.events - 1)}:
                found = _simulate(shard, shard.first + number, range(event, event + 1))
                row = number * shard.events + event
                if not all(np.array_equal(file[name][row], values[0])
                           for name, values in found.items()):
                    return False
    except (OSError, KeyError, IndexError, ValueError):
        return False
    return True


def open_stills(shards: Sequence[Shard], processes: int = 1,
                directory: Path | None = None) -> StillSet:
    """All images of ``shards``, simulated first where they are missing or out of date."""
    folder = directory or cache_directory()
    paths = [folder / f"{shard.stem}.h5" for shard in shards]
    todo = [(shard, path) for shard, path in zip(shards, paths, strict=True)
            if not path.exists() or not _is_current(shard, path)]
    if processes > 1 and len(todo) > 1:
        with ProcessPoolExecutor(processes,
                                 mp_context=multiprocessing.get_context("spawn")) as pool:
            for done, future in enumerate([pool.submit(_write, *one) for one in todo], 1):
                log.info("simulated %s (%d of %d)", future.result(), done, len(todo))
    else:
        for done, one in enumerate(todo, 1):
            log.info("simulated %s (%d of %d)", _write(*one), done, len(todo))
    return StillSet(paths)


class StillSet:
    """Images of several shards under one index; labels in memory, files kept open.

    ``labels`` maps the names of :data:`LABELS` to (N,) arrays; ``geometry_N4``.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._files = [h5py.File(path, rdcc_nbytes=0) for path in paths]
        self._images = [file["images"] for file in self._files]
        self._starts = np.cumsum([0, *(len(images) for images in self._images)])
        self.labels = {name: np.concatenate([file[name][:] for file in self._files])
                       for name in LABELS}
        self.geometry_N4 = np.concatenate([file["geometry"][:] for file in self._files])

    def __len__(self) -> int:
        return len(self.geometry_N4)

    def images(self, indices_B: np.ndarray | Sequence[int]) -> np.ndarray:
        """float32 (B, H, W) in the order of ``indices_B``."""
        shards_B = np.searchsorted(self._starts, indices_B, side="right") - 1
        return np.stack([self._images[shard][index - self._starts[shard]] for shard, index in zip(
            shards_B, indices_B, strict=True)]).astype(np.float32)

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """Indices of all images in order, at most ``size`` at a time."""
        for start in range(0, len(self), size):
            yield np.arange(start, min(start + size, len(self)))

    def close(self) -> None:
        for file in self._files:
            file.close()
