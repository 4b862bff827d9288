"""A plan on a GPU: buffers, streams, graphs and the order in which they are used and freed.

Every launch has the same number of images: a batch of another size is padded.  So an image meets
the same kernels whatever batch it came in, and the launch can be captured as a CUDA graph.  Two or
three slots of buffers take turns: while one computes, the next is filled and the last one read.

Outputs are filled with a NaN of our own before each launch; a word of it that comes back was not
computed.  Axes: B image, H row, W column, K class.
"""
from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Container, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core import EngineError
from .gpu_driver import Driver, Graph
from .plans import PlanUnusable
from .tensorrt_build import Shape, builder_name, logger
from .tensorrt_memory import Context, Memory

log = logging.getLogger(__name__)

POISON = 0xFFF0DEAD
"""Bits of a float32 NaN that no arithmetic gives."""


@dataclass
class _Slot:
    """One launch's buffers: page-locked arrays and their addresses on the device."""

    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]
    device_inputs: dict[str, int]
    device_outputs: dict[str, int]
    arrived: int                    # events
    computed: int
    returned: int
    graph: Graph | None = None
    ticket: int = 0                 # which launch it serves
    count: int = 0
    busy: bool = False


class Session:
    """One plan opened on one GPU.  All calls belong to one thread at a time.

    ``outputs`` are {name: width}, of which ``probabilities`` lie between 0 and 1.
    ``batch`` is the images per launch, at most the plan's.  ``quick`` puts copies and computing
    on one stream and into one graph, and waits by spinning: for single answers; otherwise copies
    overlap with computing.
    ``budget(need, still)`` may refuse, knowing the bytes of GPU memory that this session needs
    besides its CUDA context, and how many of them are not yet taken.
    """

    def __init__(self, module: Any, driver: Driver, context: Context, plan: bytes, shape: Shape,
                 outputs: dict[str, int], *, batch: int, quick: bool,
                 probabilities: Container[str] = (), slots: int = 2, graphs: bool = True,
                 budget: Callable[[int, int], None] | None = None) -> None:
        self.batch = batch
        self.graphs = graphs
        self.difference = float("nan")      # from check.npz, once compared
        self._driver, self._context, self._shape = driver, context, shape
        self._widths = outputs
        self._probabilities = probabilities
        self._quick = quick
        self._lanes: list[Any] = []
        self._slots: list[_Slot] = []
        self._turns: deque[_Slot] = deque()
        self._launches = 0
        self._runtime: Any = None
        self._engine: Any = None
        self._execution: Any = None
        self._module = module
        try:
            with context.current():
                self._load(plan)
                if budget is not None:
                    still = self._still_needed(1 if quick else slots)
                    budget(len(plan) + still, still)
                self._prepare()
                self._allocate(1 if quick else slots)
        except BaseException:
            self.close()
            raise

    # --- opening ---------------------------------------------------------------------------------

    def _load(self, plan: bytes) -> None:
        module = self._module
        try:
            self._runtime = module.Runtime(logger(module))
        except TypeError as error:              # pybind11's words for a null pointer
            raise EngineError(f"{builder_name(module)} cannot start its runtime ({error}); see the "
                              "log (-v), or use --backend onnxruntime") from error
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise PlanUnusable("this TensorRT or this GPU refuses it")
        names = {self._engine.get_tensor_name(i): self._engine.get_tensor_mode(
            self._engine.get_tensor_name(i)) for i in range(self._engine.num_io_tensors)}
        inputs = [n for n, mode in names.items() if mode == module.TensorIOMode.INPUT]
        missing = set(self._widths) - set(names)
        if set(inputs) != {name for name, _ in self._shape.inputs} or missing:
            raise PlanUnusable(f"it takes {inputs} and gives {sorted(set(names) - set(inputs))}")
        for name in (*inputs, *(n for n in names if n not in inputs)):
            if self._engine.get_tensor_dtype(name) != module.DataType.FLOAT:
                raise PlanUnusable(f"its tensor {name} is not float32")
        self._all_outputs = [n for n in names if n not in inputs]

    def _still_needed(self, slots: int) -> int:
        """Bytes of GPU memory for what comes after the weights: activations and buffers."""
        engine = self._engine
        if hasattr(engine, "get_device_memory_size_for_profile_v2"):
            activations = int(engine.get_device_memory_size_for_profile_v2(0))
        else:
            activations = int(getattr(engine, "device_memory_size_v2", 0)
                              or getattr(engine, "device_memory_size", 0))
        values = sum(int(np.prod(one)) for _, one in self._shape.inputs)
        values += sum(self._widths.values())
        return activations + slots * 4 * self.batch * values

    def _prepare(self) -> None:
        self._execution = self._new_execution()
        if self._execution is None:
            raise EngineError("TensorRT cannot make an execution context: too little GPU memory is "
                              "free; use a smaller batch or fewer ranks per GPU")
        self._lanes = [self._context.memory() for _ in range(1 if self._quick else 3)]
        # one lane: everything on it; three: images in, computing, answers out
        self._into: Memory = self._lanes[0]
        self._run: Memory = self._lanes[len(self._lanes) // 2]
        self._out: Memory = self._lanes[-1]
        for name, one in self._shape.inputs:
            self._must(self._execution.set_input_shape(name, (self.batch, *one)),
                       "take this batch size")
        unknown = self._execution.infer_shapes()
        if unknown:
            raise PlanUnusable(f"the shapes of {unknown} stay unknown")
        self._sizes: dict[str, tuple[int, ...]] = {}
        for name in self._all_outputs:
            shape = tuple(int(n) for n in self._execution.get_tensor_shape(name))
            width = self._widths.get(name)
            if width is not None and shape != (self.batch, width):
                raise PlanUnusable(f"its output {name} has the shape {shape}, the card says "
                                   f"{(self.batch, width)}")
            self._sizes[name] = shape

    def _new_execution(self) -> Any:
        if hasattr(self._engine, "create_runtime_config"):          # RTX compiles kernels on use
            config = self._engine.create_runtime_config()
            kinds = getattr(self._module, "DynamicShapesKernelSpecializationStrategy", None)
            if kinds is not None and hasattr(config, "dynamic_shapes_kernel_specialization_"
                                                     "strategy"):
                # before the first launch, not in the background: the same bits from then on
                config.dynamic_shapes_kernel_specialization_strategy = kinds.EAGER
            return self._engine.create_execution_context(config)
        return self._engine.create_execution_context()

    def _allocate(self, slots: int) -> None:
        sizes = {name: (self.batch, *one) for name, one in self._shape.inputs}
        for _ in range(slots):
            inputs = {name: self._into.pinned(size, np.float32) for name, size in sizes.items()}
            outputs = {name: self._out.pinned(size, np.float32)
                       for name, size in self._sizes.items()}
            slot = _Slot(
                inputs, outputs,
                {name: self._into.alloc(array.nbytes) for name, array in inputs.items()},
                {name: self._out.alloc(array.nbytes) for name, array in outputs.items()},
                arrived=self._driver.event(spin=self._quick),
                computed=self._driver.event(spin=self._quick),
                returned=self._driver.event(spin=self._quick))
            self._slots.append(slot)
            self._turns.append(slot)
        for slot in self._slots:
            self._compute(slot)             # a launch outside of a graph first: lazy loading
            self._run.sync()
            if self.graphs:
                self._capture(slot)

    def _capture(self, slot: _Slot) -> None:
        def enqueue() -> None:
            if self._quick:
                self._bring(slot, self.batch)
            self._compute(slot)
            if self._quick:
                self._fetch(slot)

        try:
            slot.graph = self._driver.capture(self._run.stream, enqueue)
        except EngineError as error:
            log.info("launches are not captured as a CUDA graph (%s)", error)
            self.graphs = False

    def _must(self, done: Any, what: str) -> None:
        if done is False:
            raise EngineError(f"TensorRT refuses to {what}; see the log (-v), or use --backend "
                              "onnxruntime")

    # --- running ---------------------------------------------------------------------------------

    def _compute(self, slot: _Slot) -> None:
        """Poison the outputs and compute, on the computing stream."""
        for name, address in slot.device_outputs.items():
            self._driver.fill(address, POISON, slot.outputs[name].nbytes, self._run.stream)
            self._must(self._execution.set_tensor_address(name, address), f"use memory for {name}")
        for name, address in slot.device_inputs.items():
            self._must(self._execution.set_tensor_address(name, address), f"use memory for {name}")
        self._must(self._execution.execute_async_v3(self._run.stream), "run the network")

    def _bring(self, slot: _Slot, count: int) -> None:
        for name, host in slot.inputs.items():
            self._into.h2d(slot.device_inputs[name], host[:count])

    def _fetch(self, slot: _Slot) -> None:
        for name, host in slot.outputs.items():
            self._out.d2h(host, slot.device_outputs[name])

    def start(self, *inputs: np.ndarray) -> int:
        """Put 1 to ``batch`` images on their way; returns a ticket for :meth:`finish`.

        One array per input, in the order of the shape's; they are copied at once.
        Raises ``EngineError`` when every slot is in use.
        """
        slot = self._turns[0]
        if slot.busy:
            raise EngineError(f"{len(self._slots)} launches are on their way; finish one first")
        self._turns.rotate(-1)
        count = len(inputs[0])
        for host, given in zip(slot.inputs.values(), inputs, strict=True):
            host[:count] = given
        with self._context.current():
            if self._quick:
                self._start_quick(slot)
            else:
                self._start_overlapped(slot, count)
        self._launches += 1
        slot.ticket, slot.count, slot.busy = self._launches, count, True
        return slot.ticket

    def _start_quick(self, slot: _Slot) -> None:
        if slot.graph is not None:
            slot.graph.launch(self._run.stream)
        else:
            self._bring(slot, self.batch)
            self._compute(slot)
            self._fetch(slot)
        self._driver.record(slot.returned, self._out.stream)

    def _start_overlapped(self, slot: _Slot, count: int) -> None:
        # rows after ``count`` hold images of an earlier launch: any image will do as padding
        self._bring(slot, count)
        self._driver.record(slot.arrived, self._into.stream)
        self._driver.wait_on(self._run.stream, slot.arrived)
        if slot.graph is not None:
            slot.graph.launch(self._run.stream)
        else:
            self._compute(slot)
        self._driver.record(slot.computed, self._run.stream)
        self._driver.wait_on(self._out.stream, slot.computed)
        self._fetch(slot)
        self._driver.record(slot.returned, self._out.stream)

    @property
    def free_slots(self) -> int:
        """Launches that may be started before one has to be finished."""
        return sum(not slot.busy for slot in self._slots)

    def finish(self, ticket: int) -> dict[str, np.ndarray]:
        """Outputs {name: (B, K)} of a launch, fresh arrays; waits for it."""
        slot = next((s for s in self._slots if s.busy and s.ticket == ticket), None)
        if slot is None:
            raise EngineError(f"launch {ticket} was finished before, or never started")
        with self._context.current():
            self._driver.wait(slot.returned)
        slot.busy = False
        found = {name: slot.outputs[name][:slot.count].copy() for name in self._widths}
        self._inspect(found, slot)
        return found

    def _inspect(self, outputs: dict[str, np.ndarray], slot: _Slot) -> None:
        """Refuse answers that were not computed, or that finite images cannot give."""
        for name, values_BK in outputs.items():
            if np.any(values_BK.view(np.uint32) == POISON):
                raise EngineError(f"the GPU left values of the output {name} uncomputed")
            if values_BK.shape[1] > 1 and values_BK.size and not values_BK.any():
                raise EngineError(f"the GPU gave nothing but zeros as the output {name}")
            fine_BK = np.isfinite(values_BK)
            if name in self._probabilities:
                fine_BK = (values_BK >= -1e-3) & (values_BK <= 1.001)
            wrong_B = ~fine_BK.all(axis=1)
            if wrong_B.any() and np.all([_finite(host[:slot.count][wrong_B])
                                         for host in slot.inputs.values()], axis=0).any():
                raise EngineError(f"the output {name} holds impossible values for finite images; "
                                  "this precision is not good enough here")

    # --- for benchmarks --------------------------------------------------------------------------

    def compute_only(self) -> None:
        """Launch the network on what is in the first slot's device memory; no copies, no wait."""
        slot = self._slots[0]
        with self._context.current():
            if slot.graph is not None and not self._quick:
                slot.graph.launch(self._run.stream)
            else:
                self._compute(slot)

    def enqueue_only(self) -> None:
        """TensorRT's bare enqueue, nothing of ours around it; call it inside :meth:`current`."""
        self._execution.execute_async_v3(self._run.stream)

    def current(self) -> AbstractContextManager[None]:
        """The session's CUDA context is the thread's inside."""
        return self._context.current()

    def wait(self) -> None:
        """Wait for everything that was launched."""
        with self._context.current():
            for lane in self._lanes:
                lane.sync()

    @property
    def stream(self) -> int:
        """Handle of the stream that computes."""
        return self._run.stream

    # --- the end ---------------------------------------------------------------------------------

    def close(self) -> None:
        """Give everything back: graphs, events, TensorRT's objects, memory and streams.

        Carries on when the GPU is lost, so that the rest of the process can.
        """
        slot: _Slot | None
        with _Closing() as closing, self._context.current():
            for lane in self._lanes:
                closing.try_to(lane.sync)
            for slot in self._slots:
                if slot.graph is not None:
                    closing.try_to(slot.graph.close)
                for event in (slot.arrived, slot.computed, slot.returned):
                    closing.try_to(self._driver.drop_event, event)
            slot = None                 # holds page-locked memory as well
            self._execution = None
            self._engine = None
            self._runtime = None
            self._slots.clear()
            self._turns.clear()
            for lane in self._lanes:
                closing.try_to(lane.close)
            self._lanes = []


def _finite(values_B: np.ndarray) -> np.ndarray:
    """(B,) True where everything of an image is finite."""
    return np.isfinite(values_B).reshape(len(values_B), -1).all(axis=1)


class _Closing:
    """Goes through the steps of an orderly end although some fail; the first failure is logged."""

    def __init__(self) -> None:
        self._failed: list[EngineError] = []

    def __enter__(self) -> _Closing:
        return self

    def try_to(self, step: Any, *arguments: Any) -> None:
        try:
            step(*arguments)
        except EngineError as error:
            self._failed.append(error)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        lost = isinstance(error, EngineError)
        failures: Sequence[Any] = [*self._failed, *([error] if lost else [])]
        if failures:
            log.warning("the GPU's memory was not given back in order: %s", failures[0])
        return lost
