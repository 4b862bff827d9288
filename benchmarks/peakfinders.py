"""Peak finders side by side: this package's and psana's, on the same Jungfrau 4M frames.

    python benchmarks/peakfinders.py [--json FILE] [--rounds N] [--panels P]

In every round each finder runs once after the other on the same frame; a figure is the median
over rounds of processor time, and only ratios are to be trusted.  psana's wheel is built without
optimisation: "psana -O2" is the same source, which the wheel carries, compiled here at -O2 into a
temporary folder for this run (needs g++).  psana rows are left out where psana is not installed.

Goals: P9 own peakfinder8 with psana's peaks, >= 3 x psana at -O2 and >= 8 x the wheel;
P10 own fast mode >= 3 x psana's v4r3, with no fewer planted spots found.
"""
from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from xfel_classify.analyses import peak_finder_v3r3 as v3r3
from xfel_classify.analyses import peakfinder8 as pf8

PARAMETERS = pf8.Parameters(adc_threshold=100.0, minimum_snr=7.0, min_pixel_count=2,
                            max_pixel_count=40, local_bg_radius=4)
RANKER = v3r3.Parameters(rank=4, r0=5.0, dr=1.0, nsigm=7.0, npix_min=2, npix_max=40,
                         amax_thr=200.0, atot_thr=300.0, son_min=7.0)
Places = np.ndarray         # (N, 3): panel, ss, fs
Finder = Callable[[np.ndarray], Places]


def radius(panels: int) -> np.ndarray:
    """Modules of 512 x 1024 in two columns around the beam, distance in pixels."""
    panel, ss, fs = np.indices((panels, 512, 1024))
    rows = (panels + 1) // 2
    y = ss + (panel // 2 - rows / 2) * 544 + 16
    x = fs + (panel % 2 - 1) * 1032 + 4
    return np.hypot(y, x).astype(np.float32)


def frame(kind: str, spots: int, radius_px_PSF: np.ndarray, seed: int) -> tuple[np.ndarray, Places]:
    """A frame in ADU (100 a photon when sparse) with planted spots, and where they are."""
    rng = np.random.default_rng(seed)
    shape = radius_px_PSF.shape
    ring_PSF = np.exp(-(((radius_px_PSF - 600) / 180) ** 2))
    planted, extra_PSF = [], np.zeros(shape, np.float32)
    ss, fs = np.mgrid[-4:5, -4:5]
    while len(planted) < spots:
        panel, y, x = (int(rng.integers(low, high)) for low, high in
                       ((0, shape[0]), (12, shape[1] - 12), (12, shape[2] - 12)))
        if any(p == panel and abs(a - y) < 20 and abs(b - x) < 20 for p, a, b in planted):
            continue
        planted.append((panel, y, x))
        extra_PSF[panel, y - 4:y + 5, x - 4:x + 5] += (
            rng.uniform(600, 3000) * np.exp(-(ss**2 + fs**2) / 2))
    if kind == "sparse":
        photons_PSF = rng.poisson(0.03 + 0.2 * ring_PSF + extra_PSF / 100)
        values_PSF = 100.0 * photons_PSF + rng.normal(0, 3, shape)
    else:
        level_PSF = 40 + 120 * ring_PSF
        values_PSF = level_PSF + extra_PSF + rng.normal(0, 1.2, shape) * np.sqrt(level_PSF)
    return values_PSF.astype(np.float32), np.array(planted).reshape(-1, 3)


def parameters_for(kind: str) -> tuple[pf8.Parameters, float]:
    """peakfinder8's parameters and v4r3's lower threshold."""
    if kind == "sparse":
        return pf8.Parameters(**{**_fields(PARAMETERS), "adc_threshold": 280.0}), 260.0
    return PARAMETERS, 250.0


def _fields(parameters: pf8.Parameters) -> dict[str, float]:
    return {name: getattr(parameters, name) for name in parameters.__struct_fields__}


def own_finders(radius_px_PSF: np.ndarray, good_PSF: np.ndarray, parameters: pf8.Parameters
                ) -> dict[str, Finder]:
    def places(find: Callable) -> Finder:
        def run(values_PSF: np.ndarray) -> Places:
            peaks = find(values_PSF)
            return np.stack([peaks.panel, peaks.ss, peaks.fs], axis=1)
        return run

    finders: dict[str, Finder] = {}
    best = pf8.native.variants()[-1]
    for variant in pf8.native.variants():
        pf8.native.set_variant(variant)
        finder = pf8.PeakFinder8(radius_px_PSF, good_PSF, parameters)
        finders["peakfinder8" if variant == best else f"peakfinder8 ({variant})"] = places(
            finder.find)
    finders["peakfinder8 fast"] = places(
        pf8.PeakFinder8(radius_px_PSF, good_PSF, parameters, fast=True).find)
    finders["peak_finder_v3r3"] = places(v3r3.PeakFinderV3R3(good_PSF, RANKER).find)
    return finders


def psana_finders(radius_px_PSF: np.ndarray, good_PSF: np.ndarray, parameters: pf8.Parameters,
                  low: float) -> dict[str, Finder]:
    try:
        from psana.peakfinder8 import peakfinder_8
        from psana.psalg_ext import peak_finder_algos
    except ImportError:
        return {}
    panels, height, width = good_PSF.shape
    mask = good_PSF.reshape(-1, width).astype(np.int8)
    radii = radius_px_PSF.reshape(-1, width)
    settings = (parameters.adc_threshold, parameters.minimum_snr, parameters.min_pixel_count,
                parameters.max_pixel_count, parameters.local_bg_radius)

    def wheel(values_PSF: np.ndarray) -> Places:
        found = peakfinder_8(parameters.max_num_peaks, values_PSF.reshape(-1, width), mask, radii,
                             width, height, 1, panels, *settings)
        fs, row = np.array(found[0]), np.array(found[1])
        panel = np.floor((row + 0.5) / height)
        return np.stack([panel, row - panel * height, fs], axis=1).reshape(-1, 3)

    good16_PSF = good_PSF.astype(np.uint16)
    algorithms = []
    for panel in range(panels):
        algorithms.append(peak_finder_algos(panel, 0))
        algorithms[-1].set_peak_selection_parameters(RANKER.npix_min, RANKER.npix_max,
                                                     RANKER.amax_thr, RANKER.atot_thr,
                                                     RANKER.son_min)

    def by_panel(name: str, *arguments: float) -> Finder:
        def run(values_PSF: np.ndarray) -> Places:
            found = [(p.seg, p.row_cgrav, p.col_cgrav) for algorithm, values, good in
                     zip(algorithms, values_PSF, good16_PSF, strict=True)
                     for p in getattr(algorithm, name)(values, good, *arguments)]
            return np.array(found).reshape(-1, 3)
        return run

    finders: dict[str, Finder] = {"psana peakfinder8": wheel}
    optimised = optimised_reference(radii, mask, height, panels, parameters)
    if optimised is not None:
        finders["psana peakfinder8 -O2"] = optimised
    finders["psana v3r3"] = by_panel("peak_finder_v3r3_d2", RANKER.rank, RANKER.r0, RANKER.dr,
                                     RANKER.nsigm)
    finders["psana v4r3"] = by_panel("peak_finder_v4r3_d2", low, low + 100, RANKER.rank, RANKER.r0,
                                     RANKER.dr)
    return finders


def optimised_reference(radii: np.ndarray, mask: np.ndarray, height: int, panels: int,
                        parameters: pf8.Parameters) -> Finder | None:
    """psana's peakfinder8 compiled at -O2, for its time only: gives no places."""
    import psana

    source = Path(next(iter(psana.__path__))) / "peakFinder" / "peakfinder8.cc"
    if not source.exists() or shutil.which("g++") is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        shared = Path(folder) / "reference.so"
        subprocess.run(["g++", "-O2", "-w", "-shared", "-fPIC", f"-I{source.parent}", str(source),
                        "-o", str(shared)], check=True)
        names = [line.split()[-1] for line in subprocess.run(
            ["nm", "-D", str(shared)], check=True, capture_output=True, text=True
        ).stdout.splitlines() if " T " in line]
        library = ctypes.CDLL(str(shared))
    allocate = getattr(library, next(n for n in names if "allocatePeakList" in n))
    find = getattr(library, next(n for n in names if "peakfinder8" in n))
    peak_list = ctypes.create_string_buffer(1024)       # more than the structure needs
    allocate(peak_list, ctypes.c_long(parameters.max_num_peaks))

    def pointer(array: np.ndarray) -> ctypes.c_void_p:
        return array.ctypes.data_as(ctypes.c_void_p)

    grid = [ctypes.c_long(n) for n in (mask.shape[1], height, 1, panels)]
    limits = [ctypes.c_float(parameters.adc_threshold), ctypes.c_float(parameters.minimum_snr),
              ctypes.c_long(parameters.min_pixel_count), ctypes.c_long(parameters.max_pixel_count),
              ctypes.c_long(parameters.local_bg_radius)]

    def run(values_PSF: np.ndarray) -> Places:
        find(peak_list, pointer(values_PSF), pointer(mask), pointer(radii), *grid, *limits, None)
        return np.zeros((0, 3))
    return run


def recovered(planted: Places, found: Places) -> int:
    """Planted spots with a found one within 3 pixels."""
    return sum(1 for panel, ss, fs in planted if len(found) and np.where(
        found[:, 0] == panel, np.hypot(found[:, 1] - ss, found[:, 2] - fs), np.inf).min() < 3)


def measure(finders: dict[str, Finder], values_PSF: np.ndarray, planted: Places, rounds: int
            ) -> dict[str, dict[str, float]]:
    spent: dict[str, list[float]] = {name: [] for name in finders}
    places: dict[str, Places] = {}
    for number in range(rounds + 1):
        for name, find in finders.items():
            start = time.process_time()
            places[name] = find(values_PSF)
            if number:                                  # the first round warms caches
                spent[name].append(time.process_time() - start)
    return {name: {"ms": 1e3 * float(np.median(times)), "found": len(places[name]),
                   "planted_found": recovered(planted, places[name])}
            for name, times in spent.items()}


def same_places(one: Places, other: Places) -> bool:
    return len(one) == len(other) and bool(np.allclose(one, other, atol=0.01))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--panels", type=int, default=8)
    args = parser.parse_args()
    radius_px_PSF = radius(args.panels)
    good_PSF = np.random.default_rng(1).random(radius_px_PSF.shape) > 0.005
    report = {"machine": platform.processor() or platform.machine(), "load": os.getloadavg()[0],
              "variants": pf8.native.variants(), "shape": good_PSF.shape, "frames": []}
    print(f"load {report['load']:.1f}, instruction sets {', '.join(report['variants'])}, "
          f"frames {good_PSF.shape}; ms of processor time")
    for kind, spots in (("ring", 0), ("ring", 15), ("ring", 150), ("sparse", 0), ("sparse", 150)):
        values_PSF, planted = frame(kind, spots, radius_px_PSF, seed=spots)
        values_PSF = np.where(good_PSF, values_PSF, np.float32(0))
        parameters, low = parameters_for(kind)
        finders = {**own_finders(radius_px_PSF, good_PSF, parameters),
                   **psana_finders(radius_px_PSF, good_PSF, parameters, low)}
        figures = measure(finders, values_PSF, planted, args.rounds)
        print(f"\n{kind}, {spots} spots planted")
        for name, figure in figures.items():
            told = "" if name.endswith("-O2") else (
                f"found {figure['found']:5d}, {figure['planted_found']} of the planted")
            print(f"  {name:26s} {figure['ms']:8.2f}  {told}")
        ratios = {}
        for label, slow, fast in (("own : wheel", "psana peakfinder8", "peakfinder8"),
                                  ("own : -O2", "psana peakfinder8 -O2", "peakfinder8"),
                                  ("own fast : v4r3", "psana v4r3", "peakfinder8 fast"),
                                  ("own v3r3 : psana v3r3", "psana v3r3", "peak_finder_v3r3")):
            if slow in figures:
                ratios[label] = figures[slow]["ms"] / figures[fast]["ms"]
        equal = {f"{own} = {theirs}": same_places(finders[own](values_PSF),
                                                  finders[theirs](values_PSF))
                 for own, theirs in (("peakfinder8", "psana peakfinder8"),
                                     ("peak_finder_v3r3", "psana v3r3")) if theirs in finders}
        print("  " + ", ".join([*(f"{k} {v:.1f}x" for k, v in ratios.items()),
                                *(f"{k}: {v}" for k, v in equal.items())]))
        report["frames"].append({"kind": kind, "spots": spots, "finders": figures,
                                 "ratios": ratios, "equal": equal})
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
