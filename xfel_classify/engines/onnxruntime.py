"""ONNX Runtime on the CPU: the default engine.

One thread, no spinning: under MPI every core has a rank of its own.  Images are executed one by
one by default: larger batches are not faster on a CPU (measured, ``benchmarks/engines.py``), and
an event's score then has the same bits whatever batch it came in.
"""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..core import EngineError, MissingDependency, ModelInvalid
from .cards import Model
from .runtime import Runtime


class Engine(Runtime):
    """Runs a model with ``onnxruntime``'s CPU provider, float32."""

    name = "onnxruntime"
    package = "onnxruntime"
    takes_geometry = True

    def __init__(self, model: Model, device: str | None = None, max_batch: int = 64) -> None:
        super().__init__(model, device, max_batch)
        self.chunk = 1
        self._session: Any = None

    def _start(self, onnx_path: Path) -> None:
        if self.device not in (None, "cpu"):
            raise EngineError(f"the onnxruntime engine runs on the CPU, device {self.device!r} was "
                              "asked for; leave the device out")
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingDependency(f"the onnxruntime engine needs onnxruntime ({error}); "
                                    "pip install onnxruntime") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.inter_op.allow_spinning", "0")
        options.log_severity_level = 3
        self._errors = _errors(onnxruntime)
        try:
            session = onnxruntime.InferenceSession(
                str(onnx_path), options, providers=["CPUExecutionProvider"])
        except self._errors as error:
            raise ModelInvalid(f"model {self.model.name}: onnxruntime cannot load {onnx_path} "
                               f"({error}); fetch or export the model again") from error
        self._check_signature(
            [entry.name for entry in session.get_inputs()],
            {entry.name: entry.shape[1] if len(entry.shape) == 2
             and isinstance(entry.shape[1], int) else None for entry in session.get_outputs()})
        self._session = session
        self._outputs = [task.output for task in self.model.card.tasks]

    def _run(self, images_B1HW: np.ndarray) -> dict[str, np.ndarray]:
        return self._answers({self.model.card.input: images_B1HW}, len(images_B1HW))

    def _run_with_geometry(self, images_B1HW: np.ndarray,
                           geometry_B4: np.ndarray) -> dict[str, np.ndarray]:
        card = self.model.card
        return self._answers({card.input: images_B1HW, card.geometry: geometry_B4},
                             len(images_B1HW))

    def _answers(self, given: dict[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
        try:
            values = self._session.run(self._outputs, given)
        except self._errors as error:
            raise EngineError(f"onnxruntime failed on {count} images of model "
                              f"{self.model.name}: {error}; try backend = \"torch\"") from error
        return dict(zip(self._outputs, values, strict=True))

    def _stop(self) -> None:
        self._session = None


def _errors(onnxruntime: Any) -> tuple[type[Exception], ...]:
    """Every exception type of onnxruntime; they share no root below ``Exception``."""
    module = onnxruntime.capi.onnxruntime_pybind11_state
    found = tuple(value for value in vars(module).values()
                  if isinstance(value, type) and issubclass(value, Exception))
    return (*found, RuntimeError, ValueError)
