"""Simulated runs as HDF5: raw stacks (N, P, S, F) with times and scalars beside them."""
from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np

from ..detectors import save_constants
from .raw_runs import RawRun, RunFiles, TruthFile

__all__ = ["write_cxi_run", "write_hdf5_run"]

_EV_J = 1.602176634e-19


def write_hdf5_run(directory: Path | str, run: RawRun, events: int, *, exp: str,
                   progress: Callable[[int], None] = lambda done: None) -> RunFiles:
    """Write ``{exp}-r{run:04d}.h5``, ``constants.h5`` and the truth file into ``directory``.

    ``/jungfrau/raw`` (or another kind's) is (N, P, S, F) uint16 in chunks of one panel, so that a
    reader can take only the panels it needs; the chunks of an event without an image are never
    written, which a reader can tell from zeros; damage flags have no place in this layout.
    ``/timestamp``,
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
        raw = file.create_dataset(f"{run.kind}/raw", (events, *run.shape), np.uint16,
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
        file.attrs["detector"] = run.kind
    os.replace(fresh, path)
    constants = directory / "constants.h5"
    save_constants(constants, run.kind, run.constants())
    return RunFiles((path,), constants, truth.write())


def write_cxi_run(directory: Path | str, run: RawRun, events: int, *, exp: str,
                  progress: Callable[[int], None] = lambda done: None) -> RunFiles:
    """The same as ``{exp}-r{run:04d}.cxi`` (CXI 1.4): raw words with the panels under each other.

    ``/entry_1/data_1/data`` is (N, P S, F) uint16 in chunks of one event, a soft link to
    ``instrument_1/detector_1/data``; energies are in joule and distances in metres, as CXI has
    them.  Constants and truth as in :func:`write_hdf5_run`.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    stem = f"{exp}-r{run.conditions.run:04d}"
    path = directory / f"{stem}.cxi"
    truth = TruthFile(directory / f"{stem}-truth.h5")
    fresh = path.with_name(path.name + ".tmp")
    times, energies, pulses = [], [], []
    p, s, f = run.shape
    with h5py.File(fresh, "w") as file:
        file["cxi_version"] = 140
        entry = file.create_group("entry_1")
        entry["experiment_identifier"] = exp
        detector = entry.create_group("instrument_1/detector_1")
        images = detector.create_dataset("data", (events, p * s, f), np.uint16,
                                         chunks=(1, p * s, f))
        for event in run.events(range(events)):
            if event.raw_PSF is not None:
                images[event.index] = event.raw_PSF.reshape(p * s, f)
            times.append(event.timestamp)
            energies.append(event.truth.photon_energy_eV)
            pulses.append(event.truth.pulse_energy_mJ)
            truth.add(event)
            progress(event.index + 1)
        detector["distance"] = run.conditions.distance_m
        detector["description"] = run.kind
        detector["x_pixel_size"] = detector["y_pixel_size"] = run.geometry.pixel_size_m
        entry["data_1/data"] = h5py.SoftLink("/entry_1/instrument_1/detector_1/data")
        entry["instrument_1/source_1/energy"] = np.array(energies) * _EV_J
        entry["instrument_1/source_1/pulse_energy"] = np.array(pulses) * 1e-3
        file["LCLS/timestamp"] = np.array(times, np.int64)
        file.attrs["exp"], file.attrs["run"] = exp, run.conditions.run
        file.attrs["detector"] = run.kind
    os.replace(fresh, path)
    constants = directory / "constants.h5"
    save_constants(constants, run.kind, run.constants())
    return RunFiles((path,), constants, truth.write())
