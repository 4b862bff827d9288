"""The whole chain of an event side by side with what it is made of, one core.

    python benchmarks/chain.py [--json FILE] [--rounds N]

A raw Jungfrau 4M frame (8, 512, 1024) lies in the page cache.  In every round each contender runs
once after the other; a figure is the median over rounds of processor time per event.  Goals:
P5 direct kernel >= 2.5 x the best runtime; P7 read + window + network <= 2.0 x reading the whole
frame (direct kernel), <= 4.5 x (ONNX Runtime); P8 window + network >= 20 x the full-frame peak
finder; P12 hand-out, loop, journal and summary <= 20 us per event.
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from xfel_classify import detectors
from xfel_classify.analyses import peakfinder8
from xfel_classify.config import LoopConfig, RunConfig
from xfel_classify.core import Frame, RunInfo
from xfel_classify.detectors import make_constants
from xfel_classify.engines import find_model, open_engine
from xfel_classify.pipeline.loop import OpenFrame
from xfel_classify.pipeline.run import classify_run
from xfel_classify.pipeline.stages import Stages
from xfel_classify.preprocess import calibrate, plan_render, render
from xfel_classify.simulate.conditions import draw_conditions
from xfel_classify.simulate.raw_runs import JungfrauRun
from xfel_classify.sinks.summary import Sink as Summary

EMPTY_EVENTS = 20_000


def interleaved(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median processor time of each contender in milliseconds."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, run in contenders.items():
            start = time.process_time_ns()
            run()
            times[name].append((time.process_time_ns() - start) / 1e6)
    return {name: float(np.median(values[1:])) for name, values in times.items()}


class EmptySource:
    """Events without pixels: what is left is the loop, the journal and the summary."""

    distributes, keeps_raw = False, True
    run = RunInfo("bench", 1, "none", "generic", (1, 4, 4), "float32", "memory")

    def constants(self):
        return detectors.uncalibrated_constants(
            (1, 4, 4), detectors.assembled_geometry((4, 4), 1e-4), unit="photon")

    def expected_events(self) -> int:
        return EMPTY_EVENTS

    def scalar_columns(self):
        return {}

    def works(self) -> bool:
        return True

    def frames(self, shard):
        for index in shard.indices(8):
            yield Frame(None, index, index)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        pass


def loop_overhead_us() -> float:
    """Microseconds per event of hand-out, loop, journal, join and summary."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time_ns()
        classify_run(EmptySource(), [], [Summary(Summary.Config())], out=Path(folder) / "out",
                     config=RunConfig(loop=LoopConfig(batch=8)))
        return (time.process_time_ns() - start) / 1e3 / EMPTY_EVENTS


def measure(rounds: int) -> dict[str, float]:
    run = JungfrauRun(draw_conditions(95, 95, "demo", hit_fraction=1.0), 8)
    raw = next(run.events(range(1))).raw_PSF
    constants = make_constants(detectors.detector("jungfrau"), run.shape, run.constants(),
                               run.geometry)
    model = find_model("sfx-hit")
    plan = plan_render(constants, model.window)
    direct, general = (open_engine(model, name) for name in ("direct", "onnxruntime"))
    window = np.zeros((1, *model.window.shape), np.float32)
    calibrated = np.empty(run.shape, np.float32)
    finder = peakfinder8.Analysis(peakfinder8.Analysis.Config())
    finder.start(RunInfo("bench", 95, "jungfrau", "jungfrau", run.shape, "uint16", "memory"),
                 constants, 1)
    view = OpenFrame(constants, Stages())
    whole, part = np.empty_like(raw), np.zeros_like(raw)
    panel_bytes = whole[0].nbytes
    with tempfile.NamedTemporaryFile() as file:
        file.write(raw.tobytes())
        file.flush()
        descriptor = file.fileno()

        def read_whole():
            os.preadv(descriptor, [whole], 0)

        def read_panels():
            for panel in plan.panels:
                os.preadv(descriptor, [part[panel]], int(panel) * panel_bytes)

        def see(source):
            render(source, plan, window[0], scale=1000 / 9500)

        def find():
            view.load(Frame(whole, 0, 0), whole, 9500.0, {}, 0)
            finder.take(view, 0)

        def chain(engine):
            read_panels()
            see(part)
            engine.infer(window)

        read_whole()
        return interleaved({
            "read the whole frame (page cache)": read_whole,
            "read the panels under the window": read_panels,
            "window: gather, calibrate, clip": lambda: see(whole),
            "network, direct kernel": lambda: direct.infer(window),
            "network, ONNX Runtime": lambda: general.infer(window),
            "full-frame calibration": lambda: calibrate(whole, constants, out=calibrated),
            "full-frame calibration + peakfinder8": find,
            "chain: panels + window + direct kernel": lambda: chain(direct),
            "chain: panels + window + ONNX Runtime": lambda: chain(general),
        }, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    load = os.getloadavg()[0]
    ms = measure(args.rounds)
    read = ms["read the whole frame (page cache)"]
    finder = ms["full-frame calibration + peakfinder8"] - ms["full-frame calibration"]
    network = ms["window: gather, calibrate, clip"] + ms["network, direct kernel"]
    ratios = {
        "P5 ONNX Runtime / direct kernel (>= 2.5)":
            ms["network, ONNX Runtime"] / ms["network, direct kernel"],
        "P7 chain with direct kernel / read (<= 2.0)":
            ms["chain: panels + window + direct kernel"] / read,
        "P7 chain with ONNX Runtime / read (<= 4.5)":
            ms["chain: panels + window + ONNX Runtime"] / read,
        "P8 peakfinder8 / window + network (>= 20)": finder / network,
        "P12 us per event of loop, journal and summary (<= 20)": loop_overhead_us(),
    }
    print(f"{platform.processor() or platform.machine()}, load {load:.1f}, {args.rounds} rounds")
    for name, value in ms.items():
        print(f"{value:9.3f} ms  {name}")
    for name, value in ratios.items():
        print(f"{value:9.2f}     {name}")
    if args.json:
        args.json.write_text(json.dumps({"load": load, "ms": ms, "ratios": ratios}, indent=1))


if __name__ == "__main__":
    main()
