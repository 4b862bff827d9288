"""List, check, compile (for a GPU) and time the models that can be found."""
from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..core import EngineError, MissingDependency, ModelError

if TYPE_CHECKING:
    from ..engines import Model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("list", "check", "build", "bench"), help="list: models, "
                        "runtimes and plans; check: every runtime reproduces the models' answers; "
                        "build: compile plans for the GPUs of this machine, before a run needs "
                        "them; bench: time and accuracy of every runtime and precision here")
    parser.add_argument("model", nargs="*", help="names or directories (default: all found)")
    parser.add_argument("--backend", default="all", help="check or bench only this runtime")
    parser.add_argument("--for", dest="gpu", default="all", metavar="GPU",
                        help="build for this device (cuda:0) only; default: one of each kind here")
    parser.add_argument("--precision", help="build or bench only this one (float32, tf32, float16, "
                        "bfloat16, int8, float8); default: what the recipe prefers, all for bench")
    parser.add_argument("--batch", type=int, action="append", help="bench batches of this size "
                        "(may be repeated; default: 1 and 64)")


def execute(args: argparse.Namespace) -> int:
    from ..engines import check_model, find_model, list_models

    models = [find_model(name) for name in args.model] or list_models()
    if not models:
        raise ModelError("no model found; add a directory of models with $XFEL_CLASSIFY_MODELS")
    if args.action == "list":
        return _list(models)
    if args.action == "build":
        return _build(models, args.gpu, args.precision)
    if args.action == "bench":
        return _bench(models, args.backend, args.precision, args.batch or [1, 64])
    passed = True
    for model in models:
        report = check_model(model, args.backend)
        print(report)
        passed &= report.passed
    return 0 if passed else 1


def _list(models: list[Model]) -> int:
    from ..engines import available_backends
    from ..engines.plans import PlanCache, cache_root

    print(f"runtimes here: {', '.join(available_backends()) or 'none'}")
    for model in models:
        window = model.window
        tasks = ", ".join(f"{task.name} ({'/'.join(task.classes) or task.value})"
                          for task in model.card.tasks)
        print(f"{model.name} {model.version}  sha256 {model.sha256[:12]}...  {tasks}; "
              f"{window.kind} {window.height} x {window.width}\n  {model.directory}")
    folder = cache_root() / "plans"
    if not folder.exists():         # looking must not make it
        return 0
    cache = PlanCache(folder)
    if cache.why_not:
        print(f"no plans can be kept: {cache.why_not}")
    for path, head in cache.entries():
        if isinstance(head, str):
            print(f"plan {path.name}: unusable, {head}")
        else:
            key = head["key"]
            print(f"plan {key['model']} {key['precision']} for {key['gpu']} ({key['capability']}), "
                  f"batch {key['profile']}, {key['builder']}, {head['bytes'] / 1e6:.1f} MB\n"
                  f"  {path}")
    return 0


def _build(models: list[Model], gpu: str, precision: str | None) -> int:
    from ..engines.gpu_driver import open_driver
    from ..engines.plans import PlanCache
    from ..engines.recipes import recipe_for
    from ..engines.tensorrt import Engine

    devices = {device.name: device for device in reversed(open_driver().devices())}
    cache = PlanCache()
    if cache.why_not:
        raise EngineError(f"plans were to be built, but {cache.why_not}; point "
                          "$XFEL_CLASSIFY_CACHE to a directory of your own")
    chosen = [f"cuda:{device.index}" for device in devices.values()] if gpu == "all" else [gpu]
    failed = 0
    for device in chosen:
        for model in models:
            capability = next((d.capability for d in devices.values()
                               if device == f"cuda:{d.index}"), (0, 0))
            recipe = recipe_for(model, capability)
            for batch in sorted({recipe.batch, recipe.latency_batch}):
                engine = Engine(model, device, batch, precision, cache)
                try:
                    with engine:
                        print(f"{model.name} {engine.precision}, batch {engine.chunk}, on "
                              f"{engine.place}: ready, check.npz met within "
                              f"{engine.difference:.1e}")
                except EngineError as error:
                    failed += 1
                    print(f"{model.name}, batch {batch}, on {device}: FAILED: {error}")
    print(f"plans are in {cache.folder}")
    return 1 if failed else 0


def _bench(models: list[Model], backend: str, precision: str | None, batches: list[int]) -> int:
    print("model, runtime, precision, batch: images/s, median and 99 % time of a call, largest "
          "difference from check.npz")
    for model in models:
        for name, words, engine, batch in _candidates(model, backend, precision, batches):
            if engine is None:
                print(f"{model.name}, {name}, {batch}: not run: {words}")
                continue
            times_s, difference = _timed(model, engine, batch)
            tail_s = sorted(times_s)[int(0.99 * (len(times_s) - 1))]
            print(f"{model.name}, {name}, {words}, {batch}: "
                  f"{batch / statistics.median(times_s):.0f} images/s, "
                  f"{1e3 * statistics.median(times_s):.3f} ms, {1e3 * tail_s:.3f} ms, "
                  f"{difference:.1e}", flush=True)
    return 0


def _candidates(model: Model, backend: str, precision: str | None, batches: list[int],
                ) -> Iterator[tuple[str, str, Any, int]]:
    """(runtime, precision, opened engine or None, batch); the engine is closed afterwards."""
    from ..engines import available_backends
    from ..engines.recipes import full_name

    names = available_backends(model) if backend == "all" else [backend]
    for name in names:
        known = _component(name).precisions
        asked = [full_name(precision)] if precision else list(known)
        for kind in asked:
            if kind not in known:
                continue
            for batch in batches:
                given = {"precision": kind, "measuring": True} if len(known) > 1 else {}
                engine = _component(name)(model, device=None, max_batch=batch, **given)
                try:
                    engine.open()
                except (EngineError, MissingDependency) as error:
                    if backend != "all":
                        raise
                    yield name, f"{kind}: {error}", None, batch
                    continue
                with engine:
                    yield name, kind, engine, batch


def _component(name: str) -> Any:
    from ..config import component

    return component("engines", name)


def _timed(model: Model, engine: Any, batch: int, seconds: float = 1.0,
           ) -> tuple[list[float], float]:
    """(seconds of each call for ``batch`` images, largest difference from check.npz)."""
    import numpy as np

    from ..engines.cards import read_check

    images_BHW, geometry_B4, expected = read_check(model)
    found = engine.infer(images_BHW, geometry_B4)
    difference = max(float(np.abs(found[name] - expected[name]).max(initial=0.0))
                     for name in expected)
    rows = np.arange(batch) % len(images_BHW)
    given = [images_BHW[rows]] + ([] if geometry_B4 is None else [geometry_B4[rows]])
    for _ in range(3):
        engine.infer(*given)
    times_s: list[float] = []
    begun = time.perf_counter()
    while len(times_s) < 3 or time.perf_counter() - begun < seconds and len(times_s) < 10_000:
        before = time.perf_counter()
        engine.infer(*given)
        times_s.append(time.perf_counter() - before)
    return times_s, difference
