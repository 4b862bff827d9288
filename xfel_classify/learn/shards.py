"""Simulated images with labels, cached on disk in shards of some runs each.

A shard is one HDF5 file: ``images`` (one compressed chunk per image) and a row of every label.  It
has its name only when complete, and its first and last image are compared with the simulator
before it is trusted: it is made again when the simulator has changed.  A kind of training set
derives from :class:`Shard` and says how its images are simulated.

Axes: N images, B images of a batch, H row, W column.
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

from ..simulate.cache import cache_directory

__all__ = ["Shard", "ShardSet", "cached"]

log = logging.getLogger(__name__)

IMAGES = "images"


@dataclass(frozen=True)
class Shard:
    """Runs ``first`` to ``first + runs`` of a seed, ``events`` each, in one file."""

    preset: str
    seed: int
    first: int
    runs: int
    events: int

    @property
    def stem(self) -> str:
        """Name of the file; two shards of one name hold the same images."""
        raise NotImplementedError

    def simulate(self, run: int, events: range) -> dict[str, np.ndarray]:
        """{"images": (events, H, W), label: (events, ...)} of run ``run`` of the seed."""
        raise NotImplementedError

    def __len__(self) -> int:
        return self.runs * self.events

    def write(self, path: Path) -> str:
        """Simulate all into ``path``; visible under its name only when complete."""
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            with h5py.File(unfinished, "w") as file:
                for number in range(self.runs):
                    found = self.simulate(self.first + number, range(self.events))
                    if number == 0:
                        for name, values in found.items():
                            _create(file, name, len(self), values)
                    rows = slice(number * self.events, (number + 1) * self.events)
                    for name, values in found.items():
                        file[name][rows] = values
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
        return path.name

    def is_current(self, path: Path) -> bool:
        """True when the first and last image are what the simulator gives today."""
        try:
            with h5py.File(path) as file:
                for number, event in {(0, 0), (self.runs - 1, self.events - 1)}:
                    found = self.simulate(self.first + number, range(event, event + 1))
                    row = number * self.events + event
                    if not all(np.array_equal(file[name][row], values[0])
                               for name, values in found.items()):
                        return False
        except (OSError, KeyError, IndexError, ValueError):
            return False
        return True


def _create(file: h5py.File, name: str, count: int, values: np.ndarray) -> None:
    more = {"chunks": (1, *values.shape[1:]), "compression": "lzf"} if name == IMAGES else {}
    file.create_dataset(name, (count, *values.shape[1:]), values.dtype, **more)


def _write(shard: Shard, path: Path) -> str:
    return shard.write(path)


def cached(shards: Sequence[Shard], processes: int = 1, directory: Path | None = None
           ) -> list[Path]:
    """Files of ``shards``, simulated first where they are missing or out of date.

    ``processes`` is how many simulate at the same time; images are the same for any number.
    """
    folder = directory or cache_directory()
    paths = [folder / f"{shard.stem}.h5" for shard in shards]
    todo = [(shard, path) for shard, path in zip(shards, paths, strict=True)
            if not path.exists() or not shard.is_current(path)]
    if processes > 1 and len(todo) > 1:
        with ProcessPoolExecutor(processes,
                                 mp_context=multiprocessing.get_context("spawn")) as pool:
            for done, future in enumerate([pool.submit(_write, *one) for one in todo], 1):
                log.info("simulated %s (%d of %d)", future.result(), done, len(todo))
    else:
        for done, one in enumerate(todo, 1):
            log.info("simulated %s (%d of %d)", _write(*one), done, len(todo))
    return paths


class ShardSet:
    """Images of several shards under one index; labels in memory, files kept open.

    ``labels`` maps each dataset but the images to an array with N rows.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._files = [h5py.File(path, rdcc_nbytes=0) for path in paths]
        self._images = [file[IMAGES] for file in self._files]
        self._starts = np.cumsum([0, *(len(images) for images in self._images)])
        names = [name for name in self._files[0] if name != IMAGES]
        self.labels = {name: np.concatenate([file[name][:] for file in self._files])
                       for name in names}

    def __len__(self) -> int:
        return int(self._starts[-1])

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
