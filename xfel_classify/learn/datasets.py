"""Simulated images for training, cached on disk.

A run is written once as HDF5 (``images`` float16, one chunk per image, and ``labels``) below
``$XFEL_CLASSIFY_CACHE`` and read from there afterwards.  :func:`quantise` rounds every image, also
those that never touch the disk, so that both routes give the network the same values.  A cached
run is compared with a fresh simulation of two of its events before it is trusted: it is made
again when the simulator has changed.

Axes: N images of a run, B images of a batch, H row, W column.
"""
from __future__ import annotations

import functools
import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ..core import ConfigurationError, Window
from ..simulate.cache import cache_directory
from .recipes import Augment, RunKey

__all__ = ["GENERATORS", "CachedRun", "ImageSet", "augment", "open_runs", "quantise", "simulate"]

log = logging.getLogger(__name__)

BLOCK = 32
"""Events simulated and written at a time."""

Generator = Callable[[RunKey, range], tuple[np.ndarray, np.ndarray]]


@functools.lru_cache(maxsize=2)
def _sfx_run(preset: str, seed: int, run: int) -> Any:
    from ..simulate.conditions import draw_conditions
    from .layouts import run_behind_panels

    return run_behind_panels(draw_conditions(seed, run, preset), seed, run)


def _sfx(run: RunKey, events: range) -> tuple[np.ndarray, np.ndarray]:
    """Crops about the beam (photons) of serial crystallography; label 1 = a crystal was hit.

    Crystals with too few visible spots on the pixels of the window are neither, as in the paper
    (2 to 10 peaks): another event of the run takes the place.
    """
    from ..simulate.sfx import LEAST_IN_WINDOW

    simulated = _sfx_run(run.preset, run.seed, run.run)
    images, labels = [], []
    for event in events:
        for number in range(event, event + 100 * SPARE, SPARE):
            photons_PSF, truth = simulated.event(number)
            if not truth.is_hit or truth.n_visible_window >= LEAST_IN_WINDOW:
                break
        images.append(photons_PSF[0])
        labels.append(truth.is_hit)
    return np.stack(images), np.array(labels)


SPARE = 1_000_000
"""Distance in event numbers between an event and the one that takes its place."""

GENERATORS: dict[str, Generator] = {"sfx": _sfx}
"""name -> function of (run, event numbers) giving (images_NHW in the card's unit, labels_N)."""


def simulate(run: RunKey, events: range | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(images_NHW float16, labels_N int8) of some events of a run (default: all)."""
    if run.generator not in GENERATORS:
        raise ConfigurationError(f"no generator is called {run.generator!r}; known: "
                                 f"{', '.join(sorted(GENERATORS))}")
    images_NHW, labels_N = GENERATORS[run.generator](
        run, range(run.events) if events is None else events)
    return quantise(images_NHW), np.asarray(labels_N, np.int8)


def quantise(images_NHW: np.ndarray) -> np.ndarray:
    """float16 with values clipped to +-65504: 0.05 % of a pixel value, far below its noise."""
    return np.clip(images_NHW, -65504, 65504).astype(np.float16)


def normalised(images_NHW: np.ndarray, window: Window) -> np.ndarray:
    """float32 images as the network sees them: the window's normalization."""
    images = np.asarray(images_NHW, np.float32)
    if window.normalize == "clip":
        return np.clip(images, -window.clip, window.clip)
    if window.normalize == "none":
        return images
    raise ConfigurationError(f"training on crops supports normalize = \"clip\" or \"none\", the "
                             f"window says {window.normalize!r}")


# --- cache --------------------------------------------------------------------------------------

def _write_run(run: RunKey, path: Path) -> str:
    """Simulate a run into ``path``; visible under that name only when complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        with h5py.File(unfinished, "w") as file:
            for start in range(0, run.events, BLOCK):
                events = range(start, min(start + BLOCK, run.events))
                images_NHW, labels_N = simulate(run, events)
                if start == 0:
                    shape = images_NHW.shape[1:]
                    images = file.create_dataset("images", (run.events, *shape), np.float16,
                                                 chunks=(1, *shape))
                    labels = file.create_dataset("labels", (run.events,), np.int8)
                images[start:events.stop] = images_NHW
                labels[start:events.stop] = labels_N
            for name in ("generator", "preset", "seed", "run", "events"):
                file.attrs[name] = getattr(run, name)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path.name


def _is_current(run: RunKey, path: Path) -> bool:
    """True when the first and last event of a cached run are what the simulator gives today."""
    try:
        with h5py.File(path) as file:
            for event in {0, run.events - 1}:
                image_1HW, label_1 = simulate(run, range(event, event + 1))
                if (not np.array_equal(file["images"][event], image_1HW[0])
                        or file["labels"][event] != label_1[0]):
                    return False
    except (OSError, KeyError, IndexError, ValueError):
        return False
    return True


def open_runs(runs: Sequence[RunKey], processes: int = 1, verify: bool = True,
              directory: Path | None = None) -> list[CachedRun]:
    """Cached images of ``runs``, simulated first where they are missing or out of date.

    ``processes`` is how many simulate at the same time; one event has the same pixels for any
    number of them.  ``verify`` compares cached runs with the simulator (0.2 s per run or so).
    """
    folder = directory or cache_directory()
    paths = {run: folder / f"{run.stem}.h5" for run in runs}
    todo = [run for run, path in paths.items()
            if not path.exists() or (verify and not _is_current(run, path))]
    if todo:
        log.info("simulating %d of %d runs into %s", len(todo), len(runs), folder)
    if processes > 1 and len(todo) > 1:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, mp_context=context) as pool:
            futures = [pool.submit(_write_run, run, paths[run]) for run in todo]
            for done, future in enumerate(futures, 1):
                log.info("simulated %s (%d of %d)", future.result(), done, len(todo))
    else:
        for done, run in enumerate(todo, 1):
            log.info("simulated %s (%d of %d)", _write_run(run, paths[run]), done, len(todo))
    return [CachedRun.open(run, paths[run]) for run in runs]


@dataclass(frozen=True)
class CachedRun:
    """A run on disk; images are read one by one."""

    run: RunKey
    path: Path
    labels_N: np.ndarray

    @classmethod
    def open(cls, run: RunKey, path: Path) -> CachedRun:
        with h5py.File(path) as file:
            return cls(run, path, file["labels"][:])

    def __len__(self) -> int:
        return len(self.labels_N)

    def blocks(self, window: Window, size: int = BLOCK) -> Iterator[np.ndarray]:
        """Images in order as the network sees them, float32 (up to ``size``, H, W)."""
        with h5py.File(self.path) as file:
            for start in range(0, len(self), size):
                yield normalised(file["images"][start:start + size], window)


class ImageSet:
    """All images of several runs under one index; keeps the files open."""

    def __init__(self, runs: Sequence[CachedRun], window: Window) -> None:
        self.window = window
        self.labels_N = np.concatenate([run.labels_N for run in runs]).astype(np.int64)
        self._starts = np.cumsum([0, *(len(run) for run in runs)])
        self._files = [h5py.File(run.path, rdcc_nbytes=0) for run in runs]
        self._images = [file["images"] for file in self._files]

    def __len__(self) -> int:
        return len(self.labels_N)

    def images(self, indices_B: Sequence[int] | np.ndarray) -> np.ndarray:
        """float32 (B, H, W) as the network sees them, in the order of ``indices_B``."""
        runs_B = np.searchsorted(self._starts, indices_B, side="right") - 1
        images_BHW = np.stack([self._images[run][index - self._starts[run]]
                               for run, index in zip(runs_B, indices_B, strict=True)])
        return normalised(images_BHW, self.window)

    def close(self) -> None:
        for file in self._files:
            file.close()


def augment(images_BHW: np.ndarray, how: Augment, rng: np.random.Generator) -> np.ndarray:
    """Each image flipped, rotated and scaled at random; square images stay (B, H, W)."""
    out_BHW = np.empty_like(images_BHW)
    for slot, image_HW in enumerate(images_BHW):
        flip_rows, flip_columns, turns = rng.integers(2), rng.integers(2), int(rng.integers(4))
        factor = np.exp(how.intensity * rng.standard_normal())
        if how.flips:
            image_HW = image_HW[::-1 if flip_rows else 1, ::-1 if flip_columns else 1]
        if how.rotations:
            image_HW = np.rot90(image_HW, turns)
        np.multiply(image_HW, np.float32(factor), out=out_BHW[slot])
    return out_BHW
