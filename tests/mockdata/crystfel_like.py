"""Reads a hit list as CrystFEL documents that it does, with h5py and cfelpyutils alone."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from cfelpyutils.geometry import load_crystfel_geometry


@dataclass
class Pattern:
    """One line of the list: panels of pixels, panels of bad pixels, peaks in the laboratory."""

    panels: dict[str, np.ndarray]
    bad: dict[str, np.ndarray]
    peaks: list[tuple[str, float, float, float]]        # panel, x_m, y_m, intensity
    photon_energy_eV: float
    clen_m: float


def read_list(lst: Path, geom: Path) -> list[Pattern]:
    parsed = load_crystfel_geometry(str(geom))
    panels = parsed.detector["panels"]
    peak_list = next(line.partition("=")[2].strip() for line in geom.read_text().splitlines()
                     if line.startswith("peak_list "))
    patterns = []
    for line in lst.read_text().splitlines():
        name, _, frame = line.rpartition(" //")
        with h5py.File(lst.parent / name) as file:
            patterns.append(_pattern(file, int(frame), panels, parsed.beam, peak_list))
    return patterns


def _pattern(file, frame, panels, beam, peak_list):
    def area(panel, path):
        assert panel["dim_structure"] == ["%", "ss", "fs"]
        return file[path][frame, panel["orig_min_ss"]:panel["orig_max_ss"] + 1,
                          panel["orig_min_fs"]:panel["orig_max_fs"] + 1]

    pixels = {name: area(p, p["data"]) for name, p in panels.items()}
    bad = {}
    for name, p in panels.items():
        words = area(p, p["mask"])
        bad[name] = (words & 0xffff) != 0
    group = file[peak_list]
    peaks = []
    for k in range(int(group["nPeaks"][frame])):
        # the half pixel from the centre of pixel (0, 0) to its corner
        fs = float(group["peakXPosRaw"][frame, k]) + 0.5
        ss = float(group["peakYPosRaw"][frame, k]) + 0.5
        name = next(n for n, p in panels.items()
                    if p["orig_min_fs"] <= fs < p["orig_max_fs"] + 1
                    and p["orig_min_ss"] <= ss < p["orig_max_ss"] + 1)
        p = panels[name]
        fs, ss = fs - p["orig_min_fs"], ss - p["orig_min_ss"]
        peaks.append((name, (p["cnx"] + fs * p["fsx"] + ss * p["ssx"]) / p["res"],
                      (p["cny"] + fs * p["fsy"] + ss * p["ssy"]) / p["res"],
                      float(group["peakTotalIntensity"][frame, k])))
    energy = float(file[beam["photon_energy_from"]][frame]) if beam["photon_energy_from"] \
        else beam["photon_energy"]
    first = next(iter(panels.values()))
    clen = float(file[first["clen_from"]][frame]) * 1e-3 if first["clen_from"] else first["clen"]
    return Pattern(pixels, bad, peaks, energy, clen)
