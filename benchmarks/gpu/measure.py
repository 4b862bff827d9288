"""Latency and throughput of TensorRT on a GPU, beside torch and ONNX Runtime, in one run.

Usage: python benchmarks/gpu/measure.py [--seconds 400] [--json FILE] [--only WORD] [--precision P]

Every shipped model and ResNet-18/34/50 at 512 x 512 in each precision: from device memory, with
copies, single images (median, 99 %, 99.9 %), what the wrapper adds to TensorRT's enqueue, several
ranks on one GPU; torch eager, torch.compile and ONNX Runtime's CUDA provider on the same network.
The simulators of crops, stills and particles per second (``simulators.py``).
Rivals take turns in short rounds, so that a disturbance meets all of them; the best and the median
round are given.  The file is written after every network: a run that is cut short keeps what it
has.  ``chart.py`` draws it.
"""
from __future__ import annotations

import argparse
import datetime
import json
import logging
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from networks import DEPTHS, ResNet, by_onnxruntime, write_model
from simulators import measure_simulators

from xfel_classify.core import ConfigurationError, EngineError, MissingDependency
from xfel_classify.engines import find_model, list_models
from xfel_classify.engines.cards import read_check
from xfel_classify.engines.gpu_driver import mps_pipe, open_driver
from xfel_classify.engines.recipes import PRECISIONS, full_name
from xfel_classify.engines.tensorrt import Engine
from xfel_classify.engines.tensorrt_build import builder_name, find_tensorrt

log = logging.getLogger("measure")

BATCHES = (1, 8, 64, 256)
RANKS = (1, 2, 4, 8)
ROUND_S = 0.25
PEAK_TFLOPS = {"float16": 989.0, "bfloat16": 989.0, "tf32": 495.0, "float32": 67.0,
               "int8": 1979.0, "float8": 1979.0}
"""Dense peak of an H100 SXM by its data sheet; other devices: read the numbers without it."""


class Clock:
    """How much of the time given is left."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def over(self, reserve: float = 0.0) -> bool:
        return time.monotonic() + reserve > self._end


def per_second(step: Callable[[], None], wait: Callable[[], None], images: int) -> float:
    """Images/s of one round of ``step`` with a wait at its end."""
    wait()
    count, begun = 0, time.perf_counter()
    while count < 3 or time.perf_counter() - begun < ROUND_S:
        for _ in range(4):
            step()
        count += 4
        if count % 32 == 0:
            wait()                                  # bounds what is queued
    wait()
    return images * count / (time.perf_counter() - begun)


def latencies(step: Callable[[], None], count: int = 3000,
              limit_s: float = 3.0) -> dict[str, float]:
    """Microseconds of single calls: median, 99 %, 99.9 %."""
    for _ in range(50):
        step()
    times_us, begun = [], time.perf_counter()
    while len(times_us) < count and (len(times_us) < 100
                                     or time.perf_counter() - begun < limit_s):
        before = time.perf_counter()
        step()
        times_us.append(1e6 * (time.perf_counter() - before))
    p50, p99, p999 = np.percentile(times_us, [50, 99, 99.9])
    return {"p50_us": float(p50), "p99_us": float(p99), "p999_us": float(p999),
            "calls": len(times_us)}


def inputs_of(model: Any, batch: int) -> list[np.ndarray]:
    images_BHW, geometry_B4, _ = read_check(model)
    rows = np.arange(batch) % len(images_BHW)
    return [np.ascontiguousarray(a[rows]) for a in (images_BHW, geometry_B4) if a is not None]


# --- one network -------------------------------------------------------------------------------

def measure_tensorrt(model: Any, precision: str, batch: int, macs: int) -> dict[str, Any]:
    """Rows of one precision and batch; raises ``EngineError`` when it cannot run."""
    (model.directory / "gpu.toml").write_text(f"[any]\nbatch = {max(batch, 2)}\n"
                                              "workspace_MiB = 2048\n" + extra_recipe(model))
    with Engine(model, None, batch, precision, measuring=True) as engine:
        given = inputs_of(model, batch)
        session = engine.session
        row: dict[str, Any] = {
            "runtime": "tensorrt", "precision": precision, "batch": batch,
            "difference": engine.difference, "graph": session.graphs}
        row["device_images_per_s"] = [per_second(session.compute_only, session.wait, batch)
                                      for _ in range(5)]
        row["infer_images_per_s"] = [per_second(lambda: engine.infer(*given), session.wait, batch)
                                     for _ in range(3)]
        row["submit_images_per_s"] = [submitted(engine, given, batch) for _ in range(3)]
        if macs:
            best = max(row["device_images_per_s"])
            row["tflops"] = 2e-12 * macs * best
            row["part_of_h100_peak"] = row["tflops"] / PEAK_TFLOPS[precision]
        if batch == 1:
            row |= latencies(lambda: engine.infer(*given))
            row["wrapper"] = wrapper_cost(session)
        return row


def extra_recipe(model: Any) -> str:
    """What the shipped recipe says of scale and float32 layers, for the same network."""
    from xfel_classify.engines.recipes import recipe_for

    (model.directory / "gpu.toml").unlink(missing_ok=True)
    recipe = recipe_for(model, (9, 0))
    lines = [f"[any.scale]\n{json.dumps(k)} = {v!r}\n" for k, v in recipe.scale.items()]
    if recipe.keep:
        lines.append("[any.keep]\n" + "".join(
            f"{kind} = {json.dumps(names)}\n" for kind, names in recipe.keep.items()))
    return "".join(lines)


def submitted(engine: Any, given: list[np.ndarray], batch: int) -> float:
    """Images/s with one batch always ahead, copies included."""
    begun, count, pending = time.perf_counter(), 0, engine.submit(*given)
    while count < 3 or time.perf_counter() - begun < ROUND_S:
        ahead = engine.submit(*given)
        pending.result()
        pending = ahead
        count += 1
    pending.result()
    return batch * (count + 1) / (time.perf_counter() - begun)


def wrapper_cost(session: Any) -> dict[str, float]:
    """Microseconds of a waited-for launch: TensorRT's enqueue alone, and ours (poison, graph)."""
    def bare() -> None:
        session.enqueue_only()
        session.wait()

    def ours() -> None:
        session.compute_only()
        session.wait()

    with session.current():
        found = {"enqueue_us": latencies(bare, 1000)["p50_us"],
                 "ours_us": latencies(ours, 1000)["p50_us"]}
    return found | {"added_us": found["ours_us"] - found["enqueue_us"]}


def measure_torch(module: Any, given: list[np.ndarray], precision: str, compiled: bool,
                  ) -> dict[str, Any]:
    """The same network in torch from device memory; copies not included."""
    import torch

    if not torch.cuda.is_available():
        raise EngineError("this torch sees no GPU")
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.benchmark = True
    kinds = {"float16": torch.float16, "bfloat16": torch.bfloat16}
    network = module.cuda()
    if compiled:
        network = torch.compile(network, mode="reduce-overhead", dynamic=False)
    images = [torch.from_numpy(given[0])[:, None].cuda(),
              *(torch.from_numpy(a).cuda() for a in given[1:])]

    def step() -> None:
        with torch.inference_mode(), torch.autocast("cuda", kinds.get(precision, torch.float16),
                                                    enabled=precision in kinds):
            network(*images)

    for _ in range(5):
        step()
    torch.cuda.synchronize()
    row: dict[str, Any] = {
        "runtime": "torch.compile" if compiled else "torch", "precision": precision,
        "batch": len(given[0]),
        "device_images_per_s": [per_second(step, torch.cuda.synchronize, len(given[0]))
                                for _ in range(5)]}
    if len(given[0]) == 1:
        row |= latencies(lambda: (step(), torch.cuda.synchronize())[0])
    return row


def measure_onnxruntime(network: bytes, names: list[str], given: list[np.ndarray],
                        precision: str) -> dict[str, Any]:
    """ONNX Runtime's CUDA provider on inputs that are in device memory already."""
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise EngineError("this onnxruntime has no CUDA provider")
    options = {"use_tf32": "1" if precision == "tf32" else "0"}
    session = onnxruntime.InferenceSession(network, providers=[("CUDAExecutionProvider", options)])
    if "CUDAExecutionProvider" not in session.get_providers():
        raise EngineError("onnxruntime's CUDA provider does not load here")
    binding = session.io_binding()
    arrays = [given[0][:, None], *given[1:]]
    for name, array in zip(names, arrays, strict=True):
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(
            np.ascontiguousarray(array), "cuda", 0))
    for output in session.get_outputs():
        binding.bind_output(output.name, "cuda", 0)

    def step() -> None:
        session.run_with_iobinding(binding)

    for _ in range(5):
        step()
    row: dict[str, Any] = {
        "runtime": "onnxruntime CUDA", "precision": precision, "batch": len(given[0]),
        "device_images_per_s": [per_second(step, binding.synchronize_outputs, len(given[0]))
                                for _ in range(5)]}
    if len(given[0]) == 1:
        row |= latencies(step)
    return row


def cases(folder: Path, only: str) -> Iterator[tuple[Any, Any, int]]:
    """(model, maker of a torch module or None, multiply-adds or 0)."""
    for shipped in list_models():
        if only in shipped.name:
            copy = folder / shipped.name
            copy.mkdir()
            for name in ("card.toml", "model.onnx", "check.npz"):
                (copy / name).write_bytes((shipped.directory / name).read_bytes())
            yield find_model(copy), torch_twin(shipped), 0
    for depth in DEPTHS:
        if only in f"resnet{depth}":
            made = ResNet(depth, 512)
            model = find_model(write_model(folder / made.name, made.name, made.onnx(), 512,
                                           by_onnxruntime))
            yield model, made.torch, made.macs


def torch_twin(model: Any) -> Callable[[], Any] | None:
    """A maker of the model's torch network with random weights, where the package has it."""
    if model.card.architecture != "sfx_hit":
        return None

    def make() -> Any:
        import torch

        from xfel_classify.learn.networks import build_network

        class Probabilities(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.network = build_network("sfx_hit", norm="row")

            def forward(self, images: Any) -> Any:
                return next(iter(self.network(images).values())).softmax(1)

        return Probabilities().eval()

    return make


def measure_network(model: Any, twin: Any, macs: int, precisions: list[str], clock: Clock,
                    ) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []

    def attempt(what: str, measure: Callable[[], dict[str, Any]]) -> None:
        if clock.over():
            rows.append({"what": what, "not_measured": "the time was over"})
            return
        try:
            rows.append(measure())
        except (EngineError, ImportError, RuntimeError, ValueError) as error:
            rows.append({"what": what, "not_measured": f"{type(error).__name__}: {error}"})
        log.info("%s: %s", model.name, summary(rows[-1]))

    names = [model.card.input] + ([model.card.geometry] if model.card.geometry else [])
    for precision in precisions:
        for batch in BATCHES:
            given = inputs_of(model, batch)
            attempt(f"tensorrt {precision} {batch}",
                    lambda p=precision, b=batch: measure_tensorrt(model, p, b, macs))
            if precision in ("int8", "float8") or batch not in (1, 64):
                continue
            for compiled in (False, True) if twin is not None else ():
                attempt(f"torch {precision} {batch}", lambda p=precision, g=given, c=compiled:
                        measure_torch(twin(), g, p, c))
            if precision in ("float32", "tf32"):
                attempt(f"onnxruntime {precision} {batch}", lambda p=precision, g=given:
                        measure_onnxruntime(model.onnx_path.read_bytes(), names, g, p))
    return rows


def summary(row: dict[str, Any]) -> str:
    """One line of a row."""
    if "not_measured" in row:
        return f"{row['what']}: not measured, {row['not_measured']}"
    best = max(row["device_images_per_s"])
    line = (f"{row['runtime']} {row['precision']} batch {row['batch']}: {best:.0f} images/s "
            f"(median {statistics.median(row['device_images_per_s']):.0f})")
    return line + (f", {row['p50_us']:.0f} us p50, {row['p99_us']:.0f} us p99"
                   if "p50_us" in row else "")


# --- several ranks -------------------------------------------------------------------------------

def worker(directory: str, precision: str, seconds: float) -> None:
    """One rank: say when ready, wait for the word, count images for a while."""
    model = find_model(Path(directory))
    with Engine(model, None, 64, precision, measuring=True) as engine:
        given = inputs_of(model, engine.chunk)
        engine.infer(*given)
        print("ready", flush=True)
        sys.stdin.readline()
        count, begun, pending = 0, time.perf_counter(), engine.submit(*given)
        while time.perf_counter() - begun < seconds:
            ahead = engine.submit(*given)
            pending.result()
            pending = ahead
            count += engine.chunk
        pending.result()
        print(count / (time.perf_counter() - begun), flush=True)


def several_ranks(model: Any, precision: str, seconds: float = 3.0) -> list[dict[str, Any]]:
    """Images/s of 1, 2, 4, 8 processes on one GPU, each with copies and one batch ahead."""
    rows = []
    for ranks in RANKS:
        started = [subprocess.Popen(
            [sys.executable, __file__, "--worker", str(model.directory), "--precision", precision,
             "--seconds", str(seconds)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for _ in range(ranks)]
        try:
            if any(one.stdout.readline().strip() != "ready" for one in started):
                rows.append({"ranks": ranks, "not_measured": "a rank could not start"})
                break
            for one in started:
                one.stdin.write("go\n")
                one.stdin.flush()
            found = [float(one.stdout.readline()) for one in started]
        finally:
            for one in started:
                one.kill()
                one.wait()
        rows.append({"ranks": ranks, "images_per_s": sum(found), "mps": bool(mps_pipe())})
        log.info("%s: %d ranks on one GPU: %.0f images/s", model.name, ranks, sum(found))
    return rows


def machine() -> dict[str, Any]:
    driver = open_driver()
    device = driver.devices()[0]
    found = {"device": device.name, "memory_bytes": device.memory_bytes,
             "capability": list(device.capability), "driver_cuda": driver.version,
             "tensorrt": builder_name(find_tensorrt()), "python": platform.python_version(),
             "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
             "mps": mps_pipe()}
    for name in ("torch", "onnxruntime", "pycuda"):
        try:
            found[name] = getattr(__import__(name), "__version__", "installed")
        except ImportError:
            found[name] = "not installed"
    return found


def simulators(clock: Clock) -> dict[str, Any]:
    """Simulated images/s, or why they were not measured."""
    if clock.over(120.0):
        return {"not_measured": "no time left"}
    try:
        return measure_simulators("cuda", clock.over)
    except (ConfigurationError, MissingDependency) as error:
        return {"not_measured": str(error)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=400.0, help="stop after this long")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"))
    parser.add_argument("--only", default="", help="networks whose name contains this, "
                        "or simulators")
    parser.add_argument("--precision", action="append", help="only these (default: all)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.precision[0], options.seconds)
        return
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    precisions = [full_name(p) for p in options.precision or PRECISIONS]
    clock = Clock(options.seconds)
    results: dict[str, Any] = {"machine": machine(), "networks": {}}
    with tempfile.TemporaryDirectory() as folder:
        for model, twin, macs in cases(Path(folder), options.only):
            found: dict[str, Any] = {"gmacs": macs / 1e9}
            found["rows"] = measure_network(model, twin, macs, precisions, clock)
            if not clock.over(60.0) and not model.name.startswith("resnet"):
                found["ranks"] = several_ranks(model, precisions[-1] if options.precision
                                               else "float16")
            results["networks"][model.name] = found
            options.json.write_text(json.dumps(results, indent=1))
    if options.only in "simulators":
        results["simulators"] = simulators(clock)
        options.json.write_text(json.dumps(results, indent=1))
    log.info("written to %s", options.json)


if __name__ == "__main__":
    main()
