"""A labelled set of quadrants in one HDF5 file, for use outside of this package.

``images`` (N, H, W) uint8 as the networks see them (max-pooled, beam at pixel (0, 0), square root,
floor), ``labels`` (N, 7) and ``geom`` (N, 4) float32 with their ``names``, ``cell`` (N, 6),
``detector`` and ``quadrant``; the presets, seed and version are attributes.

Axes: N images, H row, W column.
"""
from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np

from ..core import ConfigurationError, OutputExists
from ..simulate.stills_512 import SIDE_PX, Still, draw_still, simulate_quadrant
from ..simulate.stills_conditions import GEOMETRY, label_B_A2
from .stills import still_window

__all__ = ["LABEL_NAMES", "write_labelled_set"]

AT_A_TIME = 64      # stills that are drawn before a device is given them

LABEL_NAMES = ("n_lattices", "d_A", "B_A2", "misset_deg", "misset_sigma_deg", "n_visible", "run")


def write_labelled_set(path: Path | str, preset: str, seed: int, events: int, *,
                       events_per_run: int = 8, side: int = SIDE_PX, layout: str = "",
                       overwrite: bool = False, device: str = "",
                       progress: Callable[[int], None] = lambda done: None) -> Path:
    """Simulate ``events`` quadrants into ``path``; it appears under that name when complete.

    ``layout`` names a geometry whose panels, tilted, lie under them (simulate.stills_panels).
    ``device`` "cuda", "cuda:1" or "cpu-torch" simulates with torch: the same labels and expected
    images, other noise (simulate.stills_torch).
    ``misset_deg`` is the smallest angle between the first lattice and another, 0 for one lattice.
    """
    path = Path(path)
    if events < 1 or side < 8 or SIDE_PX % side:
        raise ConfigurationError(f"{events} quadrants of {side} pixels were asked for; give at "
                                 f"least one, and a side that divides {SIDE_PX}")
    if path.exists() and not overwrite:
        raise OutputExists(f"{path} is already there; give another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with h5py.File(unfinished, "w") as file:
            images = file.create_dataset("images", (events, side, side), np.uint8,
                                         chunks=(1, side, side), compression="lzf")
            labels = file.create_dataset("labels", (events, len(LABEL_NAMES)), np.float32)
            geom = file.create_dataset("geom", (events, len(GEOMETRY)), np.float32)
            cell = file.create_dataset("cell", (events, 6), np.float32)
            text = h5py.string_dtype()
            detector = file.create_dataset("detector", (events,), text)
            quadrant = file.create_dataset("quadrant", (events,), text)
            labels.attrs["names"], geom.attrs["names"] = list(LABEL_NAMES), list(GEOMETRY)
            file.attrs.update(preset=preset, seed=seed, events_per_run=events_per_run,
                              layout=Path(layout).name, device=device,
                              generator="xfel-classify stills")
            for row, still in enumerate(_stills(preset, seed, events, events_per_run, layout,
                                                device)):
                run, c = row // events_per_run, still.conditions
                images[row], geom[row] = still_window(still, side)
                labels[row] = (c.n_lattices, c.d_A, label_B_A2(c.d_A),
                               min(c.misset_deg, default=0.0), c.misset_sigma_deg,
                               still.n_visible, run)
                cell[row], detector[row], quadrant[row] = c.crystal.cell, c.detector, c.quadrant
                progress(row + 1)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def _stills(preset: str, seed: int, events: int, events_per_run: int, layout: str,
            device: str) -> Iterator[Still]:
    if device:
        from ..simulate.stills_torch import simulate_quadrants
    for first in range(0, events, AT_A_TIME):
        rows = range(first, min(first + AT_A_TIME, events))
        drawn = [draw_still(seed, *divmod(row, events_per_run), preset, layout) for row in rows]
        if device:
            yield from simulate_quadrants(drawn, device)
        else:
            yield from map(simulate_quadrant, drawn)
