"""Milliseconds per image of every runtime for one model, batches 1, 8 and 64, one thread.

Usage: python benchmarks/engines.py [MODEL] [--rounds N] [--json FILE]

Runtimes and batch sizes take turns, so that another process on the machine disturbs all of them
alike; the lowest and the median of the rounds are given.  Images are made with a fixed seed.
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

import numpy as np

from xfel_classify.engines import available_backends, find_model, open_engine

BATCHES = (1, 8, 64)


def made_images(count: int, shape: tuple[int, int]) -> np.ndarray:
    """Counting noise with a few sharp spots, float32 (count, H, W)."""
    rng = np.random.default_rng(2026)
    images_BHW = rng.poisson(5.0, (count, *shape)).astype(np.float32)
    for image_HW in images_BHW:
        rows, columns = rng.integers(0, shape[0], 30), rng.integers(0, shape[1], 30)
        image_HW[rows, columns] += rng.exponential(200.0, 30).astype(np.float32)
    return images_BHW


def measure(name: str, rounds: int) -> list[dict[str, object]]:
    """One row per runtime and batch size."""
    model = find_model(name)
    images_BHW = made_images(max(BATCHES), model.window.shape)
    engines = {backend: open_engine(model, backend) for backend in available_backends(model)}
    cases = [(backend, batch) for backend in engines for batch in BATCHES]
    seconds: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
    for engine in engines.values():
        engine.infer(images_BHW[:2])                    # warm-up
    for _ in range(rounds):
        for backend, batch in cases:
            calls = max(1, 16 // batch)
            begun = time.perf_counter()
            for _ in range(calls):
                engines[backend].infer(images_BHW[:batch])
            seconds[backend, batch].append((time.perf_counter() - begun) / (calls * batch))
    scores = {backend: engine.infer(images_BHW) for backend, engine in engines.items()}
    reference = next(iter(scores.values()))
    rows = []
    for backend, batch in cases:
        spread = seconds[backend, batch]
        rows.append({
            "model": model.name, "backend": backend, "precision": engines[backend].precision,
            "batch": batch, "ms_min": 1e3 * min(spread), "ms_median": 1e3 * statistics.median(
                spread), "rounds": rounds,
            "difference": max(float(np.abs(scores[backend][key] - reference[key]).max())
                              for key in reference)})
    for engine in engines.values():
        engine.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="sfx-hit")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the table and the machine here")
    options = parser.parse_args()
    rows = measure(options.model, options.rounds)
    print("| backend | batch | ms/image, lowest | median | largest difference of a score |")
    print("|---|---|---|---|---|")
    for row in rows:
        print(f"| {row['backend']} | {row['batch']} | {row['ms_min']:.2f} | "
              f"{row['ms_median']:.2f} | {row['difference']:.1e} |")
    if options.json:
        machine = {"processor": platform.processor() or platform.machine(),
                   "cores": os.cpu_count(), "load": os.getloadavg()[0]}
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
