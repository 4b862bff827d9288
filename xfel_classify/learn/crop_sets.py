"""A labelled set of crops, hits and misses, in one HDF5 file, for use outside of this package.

``images`` (N, 350, 350) float32 photons about the beam, 0 where ``good`` of their run is False;
``labels`` (N, 5) and ``geom`` (N, 4) float32 with their ``names``; ``good`` (R, 350, 350) bool, the
pixels of each run that exist and work; ``meta/run`` and ``meta/event``, the row of ``good`` and the
number of the event in its run; preset, seed and device are attributes.  The events are those that
training recipes see (:mod:`.datasets`): a crystal with hardly a spot on the window is neither hit
nor miss, and another event of the run takes its place.  The file is the same for any number of
workers.

Axes: N image, R run, H row, W column.
"""
from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ..core import ConfigurationError, OutputExists
from ..simulate.conditions import Conditions
from ..simulate.sfx import LEAST_IN_WINDOW, SimulatedRun, Truth
from .datasets import SPARE
from .layouts import run_behind_panels

__all__ = ["GEOM_NAMES", "LABEL_NAMES", "crops_of_run", "write_crop_set"]

log = logging.getLogger(__name__)

TRIES = 100             # events that may take another's place, as in datasets

LABEL_NAMES = ("hit", "n_lattices", "n_visible_window", "n_stray", "photons_scale")
GEOM_NAMES = ("distance_mm", "pixel_mm", "wavelength_A", "photon_energy_eV")

Part = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def crops_of_run(conditions: Conditions, events: int, device: str = "") -> Part:
    """(images_NHW, labels_NK, geom_N4, good_HW, event_N) of the first events of a run."""
    run = run_behind_panels(conditions, conditions.seed, conditions.run)
    numbers = list(range(events))
    found: dict[int, tuple[np.ndarray, Truth]] = {}
    for last in (attempt == TRIES - 1 for attempt in range(TRIES)):
        waiting = [row for row in range(events) if row not in found]
        if not waiting:
            break
        for row, (photons_PSF, truth) in zip(waiting, _simulated(
                run, [numbers[row] for row in waiting], device), strict=True):
            if not truth.is_hit or truth.n_visible_window >= LEAST_IN_WINDOW or last:
                found[row] = (photons_PSF[0], truth)
            else:
                numbers[row] += SPARE
    c = conditions
    truths = [found[row][1] for row in range(events)]
    labels = [(t.is_hit, t.n_lattices, t.n_visible_window, t.n_stray, t.photons_scale)
              for t in truths]
    geom = [(1e3 * c.distance_m, 1e3 * c.pixel_size_m, c.wavelength_A, t.photon_energy_eV)
            for t in truths]
    return (np.stack([found[row][0] for row in range(events)]), np.array(labels, np.float32),
            np.array(geom, np.float32), run.good_PSF[0], np.array(numbers, np.int64))


def _simulated(run: SimulatedRun, numbers: list[int],
               device: str) -> Iterator[tuple[np.ndarray, Truth]]:
    if not device:
        return map(run.event, numbers)
    from ..simulate.sfx_torch import RunOnDevice

    return RunOnDevice(run, device).events(numbers)


def _parts(drawn: list[tuple[Conditions, int]], processes: int,
           device: str) -> Iterator[Part]:
    """The runs of a set in order, made by ``processes`` workers."""
    if processes <= 1 or len(drawn) < 2:
        yield from (crops_of_run(c, events, device) for c, events in drawn)
        return
    with ProcessPoolExecutor(processes,
                             mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting: list[Any] = []
        for c, events in drawn:
            waiting.append(pool.submit(crops_of_run, c, events))
            if len(waiting) > 2 * processes:
                yield waiting.pop(0).result()
        for future in waiting:
            yield future.result()


def write_crop_set(path: Path | str, draw: Callable[[int], Conditions], events: int, *,
                   events_per_run: int = 28, processes: int = 1, overwrite: bool = False,
                   device: str = "", progress: Callable[[int], None] = lambda done: None) -> Path:
    """Simulate ``events`` crops into ``path``; it appears under that name when complete.

    ``draw`` gives the conditions of run 0, 1, ... of the set.  ``device`` "cuda", "cuda:1" or
    "cpu-torch" simulates pixels with torch (simulate.sfx_torch), in one process.
    Raises :class:`ConfigurationError` for values that no set can have, :class:`OutputExists`.
    """
    path = Path(path)
    if events < 1 or events_per_run < 1:
        raise ConfigurationError(f"a set of {events} crops, {events_per_run} to a run, was asked "
                                 "for; give at least one of each")
    if device and processes > 1:
        raise ConfigurationError(f"a set on the device {device!r} was asked for with {processes} "
                                 "processes; a device is used by one; leave out either")
    if path.exists() and not overwrite:
        raise OutputExists(f"{path} is already there; give another name")
    starts = range(0, events, events_per_run)
    drawn = [(draw(number), min(events_per_run, events - start))
             for number, start in enumerate(starts)]
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with h5py.File(unfinished, "w") as file:
            for number, (start, part) in enumerate(zip(starts, _parts(drawn, processes, device),
                                                       strict=True)):
                pixels, values, geometry, good_HW, numbers = part
                if number == 0:
                    _create(file, events, len(starts), good_HW.shape)
                rows = slice(start, start + len(pixels))
                file["images"][rows], file["labels"][rows] = pixels, values
                file["geom"][rows], file["good"][number] = geometry, good_HW
                file["meta/run"][rows], file["meta/event"][rows] = number, numbers
                progress(rows.stop)
            first = drawn[0][0]
            file.attrs.update(generator="xfel-classify sfx", preset=first.preset, seed=first.seed,
                              events_per_run=events_per_run, device=device)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def _create(file: h5py.File, events: int, runs: int, shape_HW: tuple[int, ...]) -> None:
    images = file.create_dataset("images", (events, *shape_HW), np.float32, chunks=(1, *shape_HW),
                                 compression="lzf", shuffle=True)
    images.attrs["unit"] = "photons"
    for name, names in (("labels", LABEL_NAMES), ("geom", GEOM_NAMES)):
        file.create_dataset(name, (events, len(names)), np.float32).attrs["names"] = list(names)
    file.create_dataset("good", (runs, *shape_HW), bool, chunks=(1, *shape_HW),
                        compression="lzf")
    file.create_dataset("meta/run", (events,), np.int32)
    file.create_dataset("meta/event", (events,), np.int64)
