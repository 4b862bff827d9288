"""Images per second of the good/bad network and of the diffusion map, on the same cores.

    python benchmarks/spi_quality.py [--model MODEL] [--threads N] [--rounds N] [--json FILE]

ResNet(2,2) runs through ONNX Runtime in batches of 64; without a model with weights from chance,
which take as long; once as it is and once with weights and activations of eight bits, calibrated
on some of the pictures (how far scores move by that is printed; no shipped model does so).  The
diffusion map is made of ``--frames`` pictures of 128 x 128 pixels shrunk to 64 x 64, with k-means
into 20 clusters; a second figure places as many further pictures in it.  Best and median of the
rounds are given, per second of the clock and per second of processor time: on a shared machine
only the latter says something.  The study [LI-HAN17]: 233 and 48 images/s.
"""
from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

BATCH, BATCHES = 64, 16


def pictures(count: int, seed: int = 1) -> np.ndarray:
    """(count, 128, 128) float32: spheres of several sizes, one or two, counted."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:128, :128] - 63.5
    q = np.hypot(y, x)
    found = np.empty((count, 128, 128), np.float32)
    for number in range(count):
        phase = q * rng.uniform(0.15, 0.35)
        mean = (3 * (np.sin(phase) - phase * np.cos(phase)) / np.maximum(phase, 0.1) ** 3) ** 2
        if number % 2:
            mean *= 1 + np.cos(rng.uniform(0.2, 1.0) * x + rng.uniform(-1, 1) * y)
        found[number] = rng.poisson(mean * 10 ** rng.uniform(4, 6) / mean.sum()) / 16
    return found


def timed(work: Callable[[], Any], images: int, rounds: int) -> dict[str, float]:
    """Images per second: best and median over the rounds, by the clock and by processor time."""
    clock, processor = [], []
    for _ in range(rounds):
        wall, used = time.perf_counter(), time.process_time()
        work()
        clock.append(images / (time.perf_counter() - wall))
        processor.append(images / max(time.process_time() - used, 1e-9))
    return {"best": max(clock), "median": statistics.median(clock),
            "best_per_cpu_s": max(processor), "median_per_cpu_s": statistics.median(processor)}


def network_file(model: str, folder: Path) -> Path:
    from xfel_classify.engines import find_model

    if model:
        return find_model(model).onnx_path
    from xfel_classify.engines import Task
    from xfel_classify.learn.export import export_answers
    from xfel_classify.learn.lessons import Answers
    from xfel_classify.learn.networks import build_network

    path = folder / "model.onnx"
    task = Task(name="quality", output="quality", classes=["bad", "good"])
    export_answers(Answers(build_network("spi_quality"), [task]), ["quality"], (128, 128), path)
    return path


def eight_bits(path: Path, images_N1HW: np.ndarray) -> Path:
    """The same network with weights and activations of eight bits."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    class Reader(CalibrationDataReader):
        """Gives the images once."""

        def __init__(self) -> None:
            self._left = iter([{"images": images_N1HW}])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self._left, None)

    made = path.with_name("eight_bits.onnx")
    quantize_static(str(path), str(made), Reader(), quant_format=QuantFormat.QDQ,
                    activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
                    per_channel=True)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="", help="default: the network with random weights")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--frames", type=int, default=3000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(args.threads)        # before numpy's library is asked for products
    import onnxruntime

    from xfel_classify.learn.diffusion_map import (
        cluster_centres,
        diffusion_map,
        nearest_centre,
        vectors,
    )

    images = pictures(max(args.frames, BATCH))
    found: dict[str, dict[str, float]] = {}
    batch = images[:BATCH, None]
    answers = {}
    with tempfile.TemporaryDirectory() as place:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = args.threads
        whole_file = Path(place) / "whole.onnx"
        whole_file.write_bytes(network_file(args.model, Path(place)).read_bytes())
        for name, path in (("ResNet(2,2), float32", whole_file),
                           ("ResNet(2,2), int8", eight_bits(whole_file, batch))):
            session = onnxruntime.InferenceSession(str(path), options,
                                                   providers=["CPUExecutionProvider"])
            fresh = images[-BATCH:, None]
            answers[name] = session.run(None, {"images": fresh})[0][:, 1]

            def some(session: Any = session) -> None:
                for _ in range(BATCHES):
                    session.run(None, {"images": batch})

            found[name] = timed(some, BATCH * BATCHES, args.rounds)
    moved = float(np.abs(np.subtract(*answers.values())).max())
    small = images.reshape(len(images), 64, 2, 64, 2).mean((2, 4))
    good = np.ones((64, 64), bool)
    for scale in ("sqrt", "rings"):
        def whole(scale: str = scale) -> Any:
            made = diffusion_map(vectors(small, good, scale), 30, 1.0, 20)
            points = made.coordinates()
            return made, nearest_centre(points, cluster_centres(points, 20))

        found[f"diffusion map, {scale}"] = timed(whole, len(small), max(1, args.rounds // 3))
        made, _ = whole()
        found[f"placed in the map, {scale}"] = timed(
            lambda made=made, scale=scale: made.extend(vectors(small, good, scale)), len(small),
            max(1, args.rounds // 3))
    print(f"images/s, {args.threads} threads, load of the machine {os.getloadavg()[0]:.1f}\n")
    print("| what | best | median | best per CPU-second | median per CPU-second |\n" + "|---" * 5
          + "|")
    for name, row in found.items():
        print(f"| {name} | " + " | ".join(f"{value:.0f}" for value in row.values()) + " |")
    print(f"\nlargest difference of a score by eight bits: {moved:.3f}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
