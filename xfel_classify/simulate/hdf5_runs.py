"""Simulated runs as HDF5: raw stacks (N, P, S, F) with times and scalars beside them."""
from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np

from ..detectors import save_constants
from .raw_runs import JungfrauRun, RunFiles, TruthFile

__all__ = ["write_hdf5_run"]


def write_hdf5_run(directory: Path | str, run: JungfrauRun, events: int, *, exp: str,
                   progress: Callable[[int], None] = lambda done: None) -> RunFiles:
    """Write ``{exp}-r{run:04d}.h5``, ``constants.h5`` and the truth file into ``directory``.

    ``/jungfrau/raw`` is (N, P, S, F) uint16 in chunks of one panel, so that a reader can take
    only the panels it needs; the chunks of an event without an image are never written, which a
    reader can tell from zeros; damage flags have no place in this layout.  ``/timestamp``,
    ``/photon_energy_eV``, ``/pulse_energy_mJ``, ``/distance_m`` are (N,).
    Files appear under their names only when whole.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    stem = f"{exp}-r{run.conditions.run:04d}"
    path = directory / f"{stem}.h5"
    truth = TruthFile(directory / f"{stem}-truth.h5")
    fresh = path.with_name(path.name + ".tmp")
    times, energies, pulses = [], [], []
    with h5py.File(fresh, "w") as file:
        raw = file.create_dataset("jungfrau/raw", (events, *run.shape), np.uint16,
                                  chunks=(1, 1, *run.shape[1:]))
        for event in run.events(range(events)):
            if event.raw_PSF is not None:
                raw[event.index] = event.raw_PSF
            times.append(event.timestamp)
            energies.append(event.truth.photon_energy_eV)
            pulses.append(event.truth.pulse_energy_mJ)
            truth.add(event)
            progress(event.index + 1)
        file["timestamp"] = np.array(times, np.int64)
        file["photon_energy_eV"] = np.array(energies)
        file["pulse_energy_mJ"] = np.array(pulses)
        file["distance_m"] = np.full(events, run.conditions.distance_m)
        file.attrs["exp"], file.attrs["run"] = exp, run.conditions.run
        file.attrs["detector"] = "jungfrau"
    os.replace(fresh, path)
    constants = directory / "constants.h5"
    save_constants(constants, "jungfrau", run.constants())
    return RunFiles((path,), constants, truth.write())
