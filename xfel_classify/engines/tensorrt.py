"""TensorRT on this rank's GPU; memory and streams are pycuda's.

Nothing is imported before the CUDA driver has answered.  The network is lowered to a precision that
the recipe prefers and the card allows, compiled once per kind of GPU (:mod:`.plans`), and used only
after it has reproduced the model's ``check.npz`` within the card's tolerance.
"""
from __future__ import annotations

import atexit
import logging
import weakref
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..core import EngineError, ModelInvalid
from . import lowering
from .cards import Model, read_check
from .gpu_driver import (
    CONTEXT_BYTES,
    Device,
    DeviceLost,
    Driver,
    check_budget,
    choose_device,
    mps_pipe,
    no_gpu,
    open_driver,
    place,
    ranks_per_gpu,
)
from .plans import Key, PlanCache, PlanUnusable, obtain
from .recipes import (
    PRECISIONS,
    Recipe,
    full_name,
    recipe_for,
    tolerance,
    usable_precisions,
)
from .runtime import Runtime
from .tensorrt_build import MODULES, Shape, build_plan, builder_name, find_tensorrt, installed
from .tensorrt_memory import Context, open_context
from .tensorrt_session import Session

log = logging.getLogger(__name__)

_open_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


class _Launch(NamedTuple):
    """Images on the GPU and where their answers go."""

    ticket: int
    pending: Pending
    rows: slice


class Engine(Runtime):
    """Runs a model with TensorRT on an NVIDIA GPU.

    ``device`` is None (the ranks of a node share its GPUs) or "cuda:N".  ``precision`` is one of
    :data:`~xfel_classify.engines.recipes.PRECISIONS`; None takes the best that the recipe prefers
    and that passes.  ``max_batch`` up to the recipe's ``latency_batch`` opens the engine for quick
    single answers, more for throughput.  ``cache`` keeps the plans.  ``measuring`` lifts the
    card's tolerance, to find out what it could be; ``difference`` tells the result.
    """

    name = "tensorrt"
    package = MODULES[0]
    precisions = PRECISIONS
    takes_geometry = True

    @classmethod
    def absence(cls) -> str:
        return no_gpu() or ("" if installed() else "TensorRT is not installed")

    def __init__(self, model: Model, device: str | None = None, max_batch: int = 64,
                 precision: str | None = None, cache: PlanCache | None = None,
                 measuring: bool = False) -> None:
        super().__init__(model, device, max_batch)
        self._measuring = measuring
        self._asked = precision
        self._cache = cache
        self._launches: deque[_Launch] = deque()
        self._context: Context | None = None
        self._session: Session | None = None
        self.place = ""                     # the GPU in words, once open

    # --- opening ---------------------------------------------------------------------------------

    def _start(self, onnx_path: Path) -> None:
        if self.device == "cpu":
            raise EngineError("the tensorrt engine runs on a GPU, device 'cpu' was asked for; use "
                              "--backend onnxruntime")
        driver = open_driver()
        module = find_tensorrt()
        devices = driver.devices()
        device = choose_device(devices, self.device, place())
        self._ranks = ranks_per_gpu(len(devices), self.device, place())
        recipe = recipe_for(self.model, device.capability)
        candidates = [full_name(self._asked or "float32")] if self._measuring else (
            usable_precisions(self.model.card, recipe, self._asked))
        self._context = open_context(driver, device)
        try:
            self._session = self._first_that_passes(module, driver, device, recipe, candidates,
                                                    onnx_path)
        except BaseException:
            self._stop()
            raise
        self.chunk = self._session.batch
        self.place = str(device)
        _open_engines.add(self)
        self._say_where(device, builder_name(module))

    def _first_that_passes(self, module: Any, driver: Driver, device: Device, recipe: Recipe,
                           candidates: list[str], onnx_path: Path) -> Session:
        refusals = []
        for precision in candidates:
            try:
                session = self._open_plan(module, driver, device, recipe, precision, onnx_path)
            except PlanUnusable as error:
                refusals.append(f"{precision}: {error}")
                continue
            if refusals:
                log.warning("model %s runs in %s on %s (%s)", self.model.name, precision, device,
                            "; ".join(refusals))
            self.precision = precision
            return session
        raise EngineError(f"no precision of model {self.model.name} passes its check on {device}: "
                          f"{'; '.join(refusals)}; use --backend onnxruntime")

    def _open_plan(self, module: Any, driver: Driver, device: Device, recipe: Recipe,
                   precision: str, onnx_path: Path) -> Session:
        quick = self.max_batch <= recipe.latency_batch
        card = self.model.card
        inputs: list[tuple[str, tuple[int, ...]]] = [(card.input, (1, *card.window.shape))]
        if card.geometry:
            inputs.append((card.geometry, (4,)))
        shape = Shape(tuple(inputs), recipe.latency_batch if quick else recipe.batch)
        widths = {task.output: task.width for task in card.tasks}
        probabilities = {task.output for task in card.tasks if task.kind == "classes"}
        assert self._context is not None
        context = self._context

        def budget(need: int, still: int) -> None:
            free, _ = driver.free_memory()
            check_budget(device, CONTEXT_BYTES + need, self._ranks, free, still)

        def start(plan: bytes) -> Session:
            session = Session(module, driver, context, plan, shape, widths, budget=budget,
                              probabilities=probabilities, quick=quick,
                              batch=min(self.max_batch, shape.batch))
            try:
                self._check_parity(session, precision)
            except BaseException:
                session.close()
                raise
            return session

        def build() -> bytes:
            with context.current():
                network = self._lowered(precision, recipe, onnx_path)
                return build_plan(module, network, precision, shape, recipe, self._check_signature)

        key = Key(model=self.model.name, onnx_sha256=self.model.sha256,
                  lowering=lowering.digest(precision, recipe), precision=precision,
                  profile=str(shape), builder=builder_name(module), gpu=device.name,
                  capability=f"sm_{device.capability[0]}{device.capability[1]}",
                  driver=str(driver.version),
                  options=f"workspace {recipe.workspace_MiB}, optimisation {recipe.optimisation}")
        return obtain(self._cache or PlanCache(), key, build, start,
                      lambda session: {"difference": session.difference})

    def _lowered(self, precision: str, recipe: Recipe, onnx_path: Path) -> bytes:
        try:
            network = onnx_path.read_bytes()
        except OSError as error:
            raise ModelInvalid(f"model {self.model.name}: {onnx_path} cannot be read ({error}); "
                               "fetch or export the model again") from error
        images_BHW, geometry_B4, _ = read_check(self.model)
        card = self.model.card
        examples = {card.input: images_BHW[:, None]}
        if geometry_B4 is not None:
            examples[card.geometry] = geometry_B4
        return lowering.lower(network, precision, recipe, examples)

    def _check_parity(self, session: Session, precision: str) -> None:
        """Reproduce ``check.npz`` within the card's tolerance, or ``PlanUnusable``."""
        images_BHW, geometry_B4, expected = read_check(self.model)
        largest = 0.0
        for first in range(0, len(images_BHW), session.batch):
            rows = slice(first, first + session.batch)
            try:
                found = session.finish(session.start(*_rows(images_BHW, geometry_B4, rows)))
            except EngineError as error:
                raise PlanUnusable(str(error)) from error
            for name, wanted_BK in expected.items():
                difference = np.abs(found[name] - wanted_BK[rows])
                largest = max(largest, float(difference.max(initial=0.0))
                              if np.isfinite(difference).all() else float("inf"))
        session.difference = largest
        allowed = tolerance(self.model.card, precision) or 0.0
        if self._measuring:
            allowed = 1.0
        if not largest <= allowed:
            raise PlanUnusable(f"check.npz is missed by {largest:.1e}, the card allows "
                               f"{allowed:.0e}")

    def _say_where(self, device: Device, builder: str) -> None:
        assert self._session is not None
        log.info("model %s: %s, %s on %s, %d images per launch%s", self.model.name, builder,
                 self.precision, device, self._session.batch,
                 ", captured as a CUDA graph" if self._session.graphs else "")
        if self._ranks > 1:
            pipe = mps_pipe()
            log.info("%d ranks share %s %s", self._ranks, device, f"through MPS ({pipe})" if pipe
                     else "and take turns on it: there is no MPS daemon "
                          "(nvidia-cuda-mps-control -d, by whoever may start one)")

    @property
    def difference(self) -> float:
        """Largest difference from ``check.npz``, as found when the engine was opened."""
        return self._session.difference if self._session is not None else float("nan")

    @property
    def session(self) -> Session:
        """What runs on the GPU, for measurements."""
        if self._session is None:
            raise EngineError(f"tensorrt engine of model {self.model.name} is not open; call "
                              "open() first")
        return self._session

    # --- running ---------------------------------------------------------------------------------

    def infer(self, images_BHW: np.ndarray,
              geometry_B4: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """{output name: (B, K) float32}, fresh arrays; see :class:`Runtime`."""
        return self.submit(images_BHW, geometry_B4).result()

    def submit(self, images_BHW: np.ndarray, geometry_B4: np.ndarray | None = None) -> Pending:
        """Put images on their way and return at once; ``result()`` waits for their answers.

        Two launches may be on their way; for a third the oldest is waited for.
        """
        images_BHW, geometry_B4, outputs = self._accept(images_BHW, geometry_B4)
        pending = Pending(self, outputs)
        for first in range(0, len(images_BHW), self.chunk):
            rows = slice(first, min(first + self.chunk, len(images_BHW)))
            session = self._session
            assert session is not None
            try:
                while not session.free_slots:
                    self._collect()
                ticket = session.start(*_rows(images_BHW, geometry_B4, rows))
            except EngineError as error:
                raise self._lost(error) from error
            self._launches.append(_Launch(ticket, pending, rows))
            pending.waiting += 1
        return pending

    def _collect(self) -> None:
        """Wait for the oldest launch and put its answers in place."""
        launch = self._launches.popleft()
        assert self._session is not None
        for name, values_BK in self._session.finish(launch.ticket).items():
            launch.pending.outputs[name][launch.rows] = values_BK
        launch.pending.waiting -= 1

    def finish(self, pending: Pending) -> None:
        """Collect every launch up to the last one of ``pending``."""
        while pending.waiting and self._launches:
            try:
                self._collect()
            except EngineError as error:
                raise self._lost(error) from error
        if pending.waiting:
            raise DeviceLost(f"answers of model {self.model.name} were on their way when its "
                             f"engine failed or was closed on {self.place}; ask for them before "
                             "close()")

    def _lost(self, error: EngineError) -> DeviceLost:
        self._launches.clear()
        if isinstance(error, DeviceLost):
            return error
        return DeviceLost(f"model {self.model.name} failed on {self.place}: {error}. Finished work "
                          "is kept and --resume continues from it; --backend auto would go on "
                          "without the GPU")

    # --- the end ---------------------------------------------------------------------------------

    def _stop(self) -> None:
        self._launches.clear()
        _open_engines.discard(self)
        if self._session is not None:
            self._session.close()
            self._session = None
        if self._context is not None:
            try:
                self._context.close()
            except EngineError as error:
                log.warning("the CUDA context was not given back: %s", error)
            self._context = None


def _rows(images_BHW: np.ndarray, geometry_B4: np.ndarray | None,
          rows: slice) -> list[np.ndarray]:
    """The inputs of some images, in the network's shape."""
    images_B1HW = images_BHW[rows, None]
    return [images_B1HW] if geometry_B4 is None else [images_B1HW, geometry_B4[rows]]


class Pending:
    """Answers on their way; see :class:`~xfel_classify.engines.submit.Pending`."""

    def __init__(self, engine: Engine, outputs: dict[str, np.ndarray]) -> None:
        self._engine = engine
        self.outputs = outputs
        self.waiting = 0                    # launches whose answers are not in place

    def result(self) -> dict[str, np.ndarray]:
        """The outputs, once they are all there."""
        self._engine.finish(self)
        return self.outputs


@atexit.register
def _close_all() -> None:
    """Free GPU memory while Python and the driver are whole; nothing may be left at their end."""
    for engine in list(_open_engines):
        engine.close()
