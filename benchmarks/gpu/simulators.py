"""Crops, stills and single particles per second on a GPU beside one core; ``measure.py`` calls it.

Alone: python benchmarks/gpu/simulators.py [--device cuda] [--json FILE].  With --device cpu-torch
it runs where no GPU is, to see that it works; those numbers mean nothing for a GPU.
"""
from __future__ import annotations

import argparse
import itertools
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from xfel_classify.simulate.conditions import draw_conditions
from xfel_classify.simulate.sfx import SimulatedRun
from xfel_classify.simulate.sfx_torch import RunOnDevice
from xfel_classify.simulate.spi_conditions import draw_spi
from xfel_classify.simulate.spi_images import copies_of, expected_on, view_of
from xfel_classify.simulate.stills_512 import draw_still, simulate_quadrant
from xfel_classify.simulate.stills_torch import Bench, simulate_quadrants

log = logging.getLogger("measure")

SEED = 4242         # no training's
ROUNDS, ROUND_S = 3, 2.0
PRESETS = ("uniform_f1", "resolution_f12", "uniform_panels")
BATCHES = (1, 16, 64)


def measure_simulators(device: str = "cuda",
                       over: Callable[[float], bool] = lambda reserve: False) -> dict[str, Any]:
    """Images per second, best and median round of three; rivals take turns."""
    rows: list[dict[str, Any]] = []
    for preset in PRESETS:
        if over(60.0):
            rows.append({"preset": preset, "not_measured": "no time left"})
            continue
        steps = {("one core", 1): _on_a_core(preset)}
        for batch in BATCHES:
            steps["with copies", batch] = _with_copies(preset, batch, device)
            steps["on the device", batch] = _on_the_device(preset, batch, device)
        rows += [{"preset": preset, "how": how, "batch": batch, **found}
                 for (how, batch), found in _in_turns(steps).items()]
    rows += [{"preset": "sfx training_full", "how": how, "batch": batch, **found}
             for (how, batch), found in _in_turns(_crops(device)).items()]
    steps = {("one core", 1): _particles(""), ("on the device", 1): _particles(device)}
    rows += [{"preset": "spi paper", "how": how, "batch": batch, **found}
             for (how, batch), found in _in_turns(steps).items()]
    for row in rows:
        log.info("simulate %s", row)
    return {"device": device, "seed": SEED, "rows": rows}


def _in_turns(steps: dict[tuple[str, int], Callable[[], int]]) -> dict[tuple[str, int], dict]:
    rates: dict[tuple[str, int], list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _, (name, step) in itertools.product(range(ROUNDS), steps.items()):
        done, begun = 0, time.perf_counter()
        while time.perf_counter() - begun < ROUND_S:
            done += step()
        rates[name].append(done / (time.perf_counter() - begun))
    return {name: {"images_per_s": sorted(found)[ROUNDS // 2], "best": max(found)}
            for name, found in rates.items()}


def _stills(preset: str) -> Callable[[int], list]:
    """Conditions of the next stills, eight to a run as in the sets."""
    numbers = itertools.count()
    return lambda count: [draw_still(SEED, *divmod(next(numbers), 8), preset)
                          for _ in range(count)]


def _on_a_core(preset: str) -> Callable[[], int]:
    following = _stills(preset)

    def step() -> int:
        simulate_quadrant(following(1)[0])
        return 1
    return step


def _with_copies(preset: str, batch: int, device: str) -> Callable[[], int]:
    following = _stills(preset)

    def step() -> int:
        return len(list(simulate_quadrants(following(batch), device, batch)))
    return step


def _on_the_device(preset: str, batch: int, device: str) -> Callable[[], int]:
    """All but the copy back: for training on the device that simulates."""
    following, bench = _stills(preset), Bench(device)

    def step() -> int:
        group = following(batch)
        for c, (expected, good, _) in zip(group, bench.expected(group), strict=True):
            photons = bench.detected(c, expected, good)
        float(photons[0, 0])            # waits
        return batch
    return step


def _crops(device: str) -> dict[tuple[str, int], Callable[[], int]]:
    """Events of one run: a long run is where a device pays, its preparation is the host's."""
    run = SimulatedRun(draw_conditions(SEED, 0, "training_full"))
    there = RunOnDevice(run, device)
    numbers = itertools.count()

    def one_core() -> int:
        run.event(next(numbers))
        return 1

    def with_copies() -> int:
        return len(list(there.events([next(numbers) for _ in range(there.batch)])))

    def on_the_device() -> int:
        done = [photons for photons, _ in there.on_device(
            [next(numbers) for _ in range(there.batch)])]
        float(done[-1][0, 0, 0])        # waits
        return len(done)
    return {("one core", 1): one_core, ("with copies", there.batch): with_copies,
            ("on the device", there.batch): on_the_device}


def _particles(device: str) -> Callable[[], int]:
    """Diffraction of a particle on 256 x 256 sample points; photons are counted by the host."""
    numbers = itertools.count()
    preset = "paper:particles=2cex+1igy"

    def step() -> int:
        c = draw_spi(SEED, 0, next(numbers) % 77, preset)
        expected_on(device, copies_of(c), view_of(c), c.photons_um2 * 1e12, c.coherence_A)
        return 1
    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path, default=Path("simulators.json"))
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options.json.write_text(json.dumps(measure_simulators(options.device), indent=1))


if __name__ == "__main__":
    main()
