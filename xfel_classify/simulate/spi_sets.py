"""A labelled set of single-particle images in one HDF5 file.

``images`` (N, H, W) float32, mean photons per detector pixel, chunked per image; ``labels`` (N, 6)
float32 with ``names``; ``geom`` (N, 4): wavelength in angstrom, distance in m, pixel of the image
in m, photon energy in eV, with ``names``; ``meta/run``, ``meta/event``, ``meta/fluence``,
``meta/particle`` (what was asked for), ``meta/source`` (the file or stand-in that was used),
``meta/kind``; ``classes`` the names of label "particle".  Preset, seed and which
structures were stand-ins are attributes.  The file is the same for any number of workers.

Axes: N image, H row, W column.
"""
from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ..core import ConfigurationError, OutputExists
from .spi_conditions import SPI_PARTICLES, SpiConditions, draw_spi, spi_preset
from .spi_images import SPI_LABELS, simulate_spi, spi_labels
from .spi_particles import load_particle

__all__ = ["GEOM_NAMES", "spi_rows", "write_spi_set"]

log = logging.getLogger(__name__)

GEOM_NAMES = ("wavelength_A", "distance_m", "pixel_m", "photon_energy_eV")
CHUNK = 77              # rows that a worker makes at a time: a run of the standard presets


def spi_rows(seed: int, preset: str, rows: Sequence[int], structures: str | None = None,
             device: str = "") -> tuple[np.ndarray, np.ndarray, list[SpiConditions]]:
    """(images_NHW, labels_N6, conditions) of some rows of a set.

    Row r is event r % k of run r // k, where k events hold every particle in its shares.
    """
    size = _events_per_run(preset)
    images, labels, drawn = [], [], []
    for row in rows:
        c = draw_spi(seed, *divmod(row, size), preset)
        images.append(simulate_spi(c, structures, device))
        values = spi_labels(c, structures, device)
        labels.append([values[name] for name in SPI_LABELS])
        drawn.append(c)
    return np.stack(images), np.array(labels, np.float32), drawn


def _events_per_run(preset: str) -> int:
    chosen = spi_preset(preset)
    return CHUNK if chosen.bodies else chosen.block_events


def _parts(seed: int, preset: str, events: int, structures: str | None,
           processes: int, device: str) -> Iterator[tuple[int, Any]]:
    """(first row, its part) in order, made by ``processes`` workers."""
    starts = range(0, events, CHUNK)
    jobs = [(start, range(start, min(start + CHUNK, events))) for start in starts]
    if processes <= 1 or len(jobs) < 2:
        for start, rows in jobs:
            yield start, spi_rows(seed, preset, rows, structures, device)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        waiting: list[tuple[int, Any]] = []
        for start, rows in jobs:
            waiting.append((start, pool.submit(spi_rows, seed, preset, rows, structures)))
            if len(waiting) > 2 * processes:
                first, future = waiting.pop(0)
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()


def write_spi_set(path: Path | str, preset: str, seed: int, events: int, *,
                  structures: str | Path | None = None, processes: int = 1,
                  overwrite: bool = False, device: str = "",
                  progress: Callable[[int], None] = lambda done: None) -> Path:
    """Simulate ``events`` images into ``path``; it appears under that name when complete.

    ``device`` "cuda", "cuda:1" or "cpu-torch" computes the diffraction with torch, in one process.
    Raises :class:`ConfigurationError` for values that no set can have, :class:`OutputExists`.
    """
    path = Path(path)
    if events < 1:
        raise ConfigurationError(f"a set of {events} images was asked for; give at least one")
    if device and processes > 1:
        raise ConfigurationError(f"a set on the device {device!r} was asked for with {processes} "
                                 "processes; a device is used by one; leave out either")
    chosen = spi_preset(preset)
    if path.exists() and not overwrite:
        raise OutputExists(f"{path} is already there; give another name")
    stated = None if structures is None else str(structures)
    sources = {} if chosen.bodies else {name: load_particle(name, stated)
                                        for name in chosen.particles}
    if processes > 1 and not chosen.bodies:
        _warm(seed, preset, min(events, chosen.block_events), stated)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    height, width = chosen.shape
    try:
        with h5py.File(unfinished, "w") as file:
            images = file.create_dataset("images", (events, height, width), np.float32,
                                         chunks=(1, height, width), compression="lzf",
                                         shuffle=True)
            images.attrs["unit"] = "photons per detector pixel"
            labels = file.create_dataset("labels", (events, len(SPI_LABELS)), np.float32)
            geom = file.create_dataset("geom", (events, len(GEOM_NAMES)), np.float64)
            labels.attrs["names"], geom.attrs["names"] = list(SPI_LABELS), list(GEOM_NAMES)
            text = h5py.string_dtype()
            file["classes"] = np.array(SPI_PARTICLES, dtype=object)
            meta = {name: file.create_dataset(f"meta/{name}", (events,), dtype)
                    for name, dtype in (("run", np.int32), ("event", np.int32),
                                        ("fluence", np.float64), ("particle", text),
                                        ("source", text), ("kind", text))}
            stand_ins = sorted(f"{name}: {one.source}" for name, one in sources.items()
                               if one.stand_in)
            file.attrs.update(
                generator="xfel-classify spi", preset=preset, seed=seed, device=device,
                stand_ins=", ".join(stand_ins) or "none")
            for start, (pixels, values, drawn) in _parts(seed, preset, events, stated, processes,
                                                        device):
                rows = slice(start, start + len(drawn))
                images[rows], labels[rows] = pixels, values
                geom[rows] = [(c.wavelength_A, c.distance_m, c.block * c.pixel_size_m,
                               c.photon_energy_eV) for c in drawn]
                meta["run"][rows] = [c.run for c in drawn]
                meta["event"][rows] = [c.event for c in drawn]
                meta["fluence"][rows] = [c.fluence for c in drawn]
                meta["particle"][rows] = [c.particle for c in drawn]
                meta["source"][rows] = [sources[c.particle].source if c.particle in sources
                                        else c.stand_in for c in drawn]
                meta["kind"][rows] = [c.kind for c in drawn]
                progress(rows.stop)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def _warm(seed: int, preset: str, events: int, structures: str | None) -> None:
    """Make the volumes of all particles once, before workers ask for them at the same time."""
    seen: set[tuple[str, float]] = set()
    size = _events_per_run(preset)
    for row in range(events):
        c = draw_spi(seed, *divmod(row, size), preset)
        if (c.particle, c.hydration_A) not in seen:
            seen.add((c.particle, c.hydration_A))
            simulate_spi(c, structures)
