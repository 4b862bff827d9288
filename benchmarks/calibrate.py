"""Calibration side by side: this package, psana's installed routine, and two plain C loops.

    python benchmarks/calibrate.py [--json FILE] [--rounds N] [--panels P]

Frames are a Jungfrau 4M (8, 512, 1024) with 0, 0.2 and 5 % of pixels out of gain stage 0.  In
every round each contender runs once after the other on the same frames; a figure is the median
over rounds of processor time per frame, and only ratios are to be trusted.  Needs gcc; psana rows
are left out where psana is not installed.

Goals: P1 full frame <= 1.7 x the stream kernel, >= 2.3 x psana's loop at -O2 and equal bits;
P2 window <= 0.35 x reading the frame from the page cache, >= 30 x the -O2 loop, >= 60 x the wheel;
P3 common mode >= 8 x psana's Python; P4 fused max-pooling <= 2 x the full-frame calibration.
"""
from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from xfel_classify import preprocess
from xfel_classify.core import Constants, Window
from xfel_classify.detectors import default_geometry, detector, make_constants

C_LOOPS = r"""
#include <stdint.h>
/* One stage, no mask: what memory allows. */
void stream(const uint16_t *raw, const float *ped, const float *gain, float *out, long n) {
    for (long i = 0; i < n; ++i) out[i] = ((float)raw[i] - ped[i]) * gain[i];
}
/* psana's production layout: (4 codes, pixels, {pedestal, factor}), one look-up per pixel. */
void lookup(const uint16_t *raw, const float *table, float *out, long n) {
    for (long i = 0; i < n; ++i) {
        const uint16_t word = raw[i];
        const long at = 2 * (i + n * (word >> 14));
        out[i] = ((word & 0x3fff) - table[at]) * table[at + 1];
    }
}
"""


def c_library(flags: list[str]) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        source, shared = Path(folder) / "loops.c", Path(folder) / "loops.so"
        source.write_text(C_LOOPS)
        subprocess.run(["gcc", *flags, "-shared", "-fPIC", str(source), "-o", str(shared)],
                       check=True)
        return ctypes.CDLL(str(shared))


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return array.ctypes.data_as(ctypes.c_void_p)


def jungfrau_constants(panels: int, rng: np.random.Generator) -> Constants:
    kind = detector("jungfrau")
    geometry = default_geometry(kind, panels)
    shape = geometry.shape
    pedestals = np.stack([rng.normal(m, 20, shape) for m in (2900, 15000, 14500)])
    gain = np.stack([g * rng.normal(1, 0.02, shape) for g in (41.5, -1.39, -0.11)])
    status = np.repeat((rng.random(shape) < 0.01)[None], 3, axis=0).astype(np.uint64)
    return make_constants(kind, shape, {"pedestals": pedestals, "pixel_gain": gain,
                                        "pixel_status": status}, geometry)


def frames(shape: tuple[int, ...], switched: float, rng: np.random.Generator, n: int) -> np.ndarray:
    ring = (rng.normal(2900, 60, (n, *shape)).astype(np.uint16)) & 0x3FFF
    chance = rng.random(ring.shape, dtype=np.float32)
    ring[chance < switched] |= 1 << 14
    ring[chance < switched / 20] |= 3 << 14
    return ring


def interleaved(contenders: dict[str, Callable[[np.ndarray], object]], ring: np.ndarray,
                rounds: int) -> dict[str, float]:
    """Median processor time per frame in ms; contenders take turns, slow ones see fewer frames."""
    spent: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, run in contenders.items():
            n = 1 if "Python" in name else len(ring)
            start = time.process_time()
            for frame in ring[:n]:
                run(frame)
            if number:                                  # the first round warms caches
                spent[name].append((time.process_time() - start) / n)
    return {name: 1e3 * float(np.median(times)) for name, times in spent.items()}


def psana_table(constants: Constants) -> np.ndarray:
    assert constants.pedestals_GPSF is not None and constants.gain_GPSF is not None
    factor = (np.float32(1) / constants.gain_GPSF) * constants.good_PSF
    zero = np.zeros_like(factor[0])
    stages = [(constants.pedestals_GPSF[0], factor[0]), (constants.pedestals_GPSF[1], factor[1]),
              (zero, zero), (constants.pedestals_GPSF[2], factor[2])]
    return np.ascontiguousarray(np.stack([np.stack([p.ravel(), f.ravel()], 1)
                                          for p, f in stages]), np.float32).ravel()


def full_frame(constants: Constants, args: argparse.Namespace, rng: np.random.Generator
               ) -> dict[str, dict[str, float]]:
    n = constants.good_PSF.size
    table, out = psana_table(constants), np.empty(constants.shape, np.float32)
    gold = np.empty(n, np.float32)
    pedestal = np.ascontiguousarray(constants.pedestals_GPSF[0])        # type: ignore[index]
    factor = np.float32(1) / constants.gain_GPSF[0]                      # type: ignore[index]
    fast, plain = c_library(["-O3", "-march=native"]), c_library(["-O2"])
    size = ctypes.c_long(n)
    crop = preprocess.plan_render(constants, Window(height=350, width=350, clip=5e4))
    pools = {f: preprocess.plan_render(constants, Window(
        kind="downsample", pool=f, height=2304 // f, width=2304 // f, clip=5e4)) for f in (2, 4)}
    slot = np.empty((350, 350), np.float32)
    pooled = {f: np.empty((2304 // f, 2304 // f), np.float32) for f in pools}
    buffer = np.empty(constants.shape, np.uint16)
    results = {}
    with tempfile.NamedTemporaryFile() as file:
        file.write(frames(constants.shape, 0, rng, 1).tobytes())
        file.flush()
        contenders: dict[str, Callable[[np.ndarray], object]] = {
            "stream kernel -O3": lambda raw: fast.stream(
                pointer(raw), pointer(pedestal), pointer(factor), pointer(out), size),
            "psana loop -O2": lambda raw: plain.lookup(pointer(raw), pointer(table), pointer(gold),
                                                       size),
            "calibrate": lambda raw: preprocess.calibrate(raw, constants, out),
            "window 350x350": lambda raw: preprocess.render(raw, crop, slot, 1 / 9.5),
            "max-pool 2x2": lambda raw: preprocess.render(raw, pools[2], pooled[2], 1 / 9.5),
            "max-pool 4x4": lambda raw: preprocess.render(raw, pools[4], pooled[4], 1 / 9.5),
            "page-cache read": lambda raw: os.preadv(file.fileno(), [buffer], 0),
        }
        try:
            from psana.utilsdetector_ext import cy_calib_jungfrau_v3
            contenders["psana wheel"] = lambda raw: cy_calib_jungfrau_v3(
                raw.ravel(), table, n, 512 * 1024, gold)
        except ImportError:
            print("psana is not installed: its rows are left out")
        for switched in (0.0, 0.002, 0.05):
            ring = frames(constants.shape, switched, rng, 6)
            times = interleaved(contenders, ring, args.rounds)
            ring0 = ring[-1]
            plain.lookup(pointer(ring0), pointer(table), pointer(gold), size)
            good = constants.good_PSF.ravel()
            mine = preprocess.calibrate(ring0, constants).ravel()
            times["bits differing from psana's loop"] = float(
                np.count_nonzero(mine[good].view(np.uint32) != gold[good].view(np.uint32)))
            results[f"{100 * switched:g} % switched"] = times
    return results


def common_mode(constants: Constants, args: argparse.Namespace, rng: np.random.Generator
                ) -> dict[str, float]:
    raw = frames(constants.shape, 0.0, rng, 1)
    good = constants.good_PSF
    work = preprocess.calibrate(raw[0], constants)
    kinds = ("banks", "rows", "columns")

    def mine(_: np.ndarray) -> None:        # bisection takes as long whatever the values are
        preprocess.common_mode(work, good, kinds, (256, 64))
    contenders: dict[str, Callable[[np.ndarray], object]] = {"common mode": mine}
    try:
        from psana.detector.UtilsJungfrau import calib_jungfrau_single_panel
        gain = np.float32(1) / constants.gain_GPSF                      # type: ignore[operator]
        mask = good.astype(np.uint8)

        def theirs(cm: tuple[int, ...] | None) -> Callable[[np.ndarray], None]:
            def run(frame: np.ndarray) -> None:
                for p in range(frame.shape[0]):
                    one = slice(p, p + 1)
                    calib_jungfrau_single_panel(
                        frame[one], gain[:, one], constants.pedestals_GPSF[:, one],
                        mask[one], cm)
            return run
        contenders["psana Python with common mode"] = theirs((7, 7, 100, 10))
        contenders["psana Python without"] = theirs(None)
    except ImportError:
        pass
    return interleaved(contenders, raw, args.rounds)


def ratios(full: dict[str, dict[str, float]], common: dict[str, float]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []

    def add(goal: str, what: str, value: float, bound: float, at_most: bool) -> None:
        rows.append({"goal": goal, "what": what, "ratio": value, "bound": bound,
                     "met": value <= bound if at_most else value >= bound})
    for case, t in full.items():
        bits = t["bits differing from psana's loop"]
        add("P1", f"{case}: calibrate / stream kernel", t["calibrate"] / t["stream kernel -O3"],
            1.7, True)
        add("P1", f"{case}: psana loop -O2 / calibrate", t["psana loop -O2"] / t["calibrate"], 2.3,
            False)
        add("P1", f"{case}: pixels with other bits", bits, 0, True)
        add("P2", f"{case}: window / page-cache read",
            t["window 350x350"] / t["page-cache read"], 0.35, True)
        add("P2", f"{case}: psana loop -O2 / window", t["psana loop -O2"] / t["window 350x350"], 30,
            False)
        if "psana wheel" in t:
            add("P2", f"{case}: psana wheel / window", t["psana wheel"] / t["window 350x350"], 60,
                False)
        for f in (2, 4):
            add("P4", f"{case}: max-pool {f}x{f} / calibrate",
                t[f"max-pool {f}x{f}"] / t["calibrate"], 2.0, True)
    if "psana Python without" in common:
        theirs = common["psana Python with common mode"] - common["psana Python without"]
        add("P3", "psana Python common mode / common mode", theirs / common["common mode"], 8,
            False)
    return rows


def machine() -> dict[str, object]:
    found: dict[str, object] = {"python": platform.python_version(), "load": os.getloadavg()[0],
                                "variants": preprocess.compiled() and
                                preprocess._native.variants()}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().split("\n\n")[0].splitlines():
            key, _, value = (part.strip() for part in line.partition(":"))
            if key == "model name":
                found["cpu"] = value
            elif key == "flags":
                found["flags"] = " ".join(f for f in value.split() if f.startswith(("avx", "amx")))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--panels", type=int, default=8, choices=(1, 2, 8))
    args = parser.parse_args()
    rng = np.random.default_rng(95)
    about = machine()
    for key, value in about.items():
        print(f"{key:10s} {value}")
    constants = jungfrau_constants(args.panels, rng)
    full = full_frame(constants, args, rng)
    common = common_mode(constants, args, rng)
    for case, times in full.items():
        print(f"\n{case}")
        for name, ms in times.items():
            print(f"  {name:36s} {ms:9.3f}" + ("" if "bits" in name else " ms"))
    print("\ncommon mode (banks, rows, columns)")
    for name, ms in common.items():
        print(f"  {name:36s} {ms:9.3f} ms")
    table = ratios(full, common)
    print(f"\n{'goal':5s}{'what':52s}{'ratio':>9s}{'bound':>8s}  met")
    for row in table:
        print(f"{row['goal']:5s}{row['what']:52s}{row['ratio']:9.2f}{row['bound']:8.2f}  "
              f"{'yes' if row['met'] else 'NO'}")
    if args.json:
        args.json.write_text(json.dumps({"machine": about, "full_frame_ms": full,
                                         "common_mode_ms": common, "ratios": table}, indent=1))


if __name__ == "__main__":
    main()
