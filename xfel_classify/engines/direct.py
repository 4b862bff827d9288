"""The project's own kernel for the SFX hit network: float32, one core, no runtime.

General runtimes reach a fifth of a core's multiply-add rate on this small network; the direct
kernel in ``native/sfx_hit.cpp`` several times that.  It runs exactly one graph: the weights and
constants are read from the ONNX file, and any other sequence of operators is refused.
"""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..core import EngineError, MissingDependency, ModelInvalid
from .cards import Model
from .runtime import Runtime

_CENTRE = ["ReduceMean", "ReduceMean", "Sub"]
_NORM = ["ReduceMean", "Sub", "ReduceMean", "Sub", "Mul", "ReduceMean", "Mul", "Mul", "Add",
         "Sqrt", "Add", "Reciprocal", "Mul", "Mul", "Add"]
_LAYER = ["Conv", *_NORM, "Relu", "MaxPool"]
OPERATORS = [*_CENTRE, *_LAYER, *_LAYER, "Reshape", "Gemm", "Relu", "Gemm", "Softmax"]
"""The graph of the network with row normalisation, as the export writes it."""

PREFIX = "network.rows."


class Engine(Runtime):
    """Runs ``sfx_hit`` networks (350 x 350, row normalisation) on one core."""

    name = "direct"
    package = "onnx"

    @classmethod
    def executes(cls, model: Model) -> bool:
        return model.card.architecture == "sfx_hit"

    def _start(self, onnx_path: Path) -> None:
        if self.device not in (None, "cpu"):
            raise EngineError(f"the direct engine runs on the CPU only, device {self.device!r} "
                              "was asked for; leave the device out or name another backend")
        if not self.executes(self.model):
            raise EngineError(f"the direct engine runs the sfx_hit network only, model "
                              f"{self.model.name} is {self.model.card.architecture or 'another'}; "
                              "use --backend onnxruntime")
        try:
            import onnx
            from google.protobuf.message import DecodeError
            from onnx import numpy_helper
        except ImportError as error:
            raise MissingDependency(f"the direct engine reads weights with onnx ({error}); "
                                    "pip install onnx") from error
        from ..native.sfx_hit import SfxHit

        try:
            graph = onnx.load(str(onnx_path), load_external_data=False).graph
        except (DecodeError, OSError) as error:
            raise ModelInvalid(f"model {self.model.name}: {onnx_path} is not a valid ONNX file "
                               f"({error}); fetch or export the model again") from error
        found = [node.op_type for node in graph.node]
        if found != OPERATORS:
            raise EngineError(f"the direct engine runs the row-normalised sfx_hit graph only, "
                              f"model {self.model.name} has other operators; use --backend "
                              "onnxruntime")
        stored = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
        weights = {name.removeprefix(PREFIX): values.astype(np.float32)
                   for name, values in stored.items()}
        self._check_signature([one.name for one in graph.input],
                              {one.name: None for one in graph.output})
        first, second = (_norm_constants(graph, stored, start)
                         for start in (len(_CENTRE) + 1, len(_CENTRE) + len(_LAYER) + 1))
        if first != second:
            raise EngineError(f"the two normalisations of model {self.model.name} have different "
                              "constants; use --backend onnxruntime")
        try:
            self._kernel: Any = SfxHit(weights, *first)
        except (KeyError, ValueError) as error:
            raise EngineError(f"model {self.model.name} is not the published sfx_hit network: "
                              f"{error}; use --backend onnxruntime") from error

    def _run(self, images_B1HW: np.ndarray) -> dict[str, np.ndarray]:
        return {self.model.card.tasks[0].output: self._kernel.run(images_B1HW[:, 0])}

    def _stop(self) -> None:
        self._kernel = None


def _norm_constants(graph: Any, stored: Mapping[str, np.ndarray],
                    start: int) -> tuple[float, float, float]:
    """(floor, 0, epsilon) of the normalisation whose operators begin at ``start``.

    The kernel's second constant, added below the square root, is for training only.
    """
    nodes = graph.node[start:start + len(_NORM)]
    values = []
    for position in (6, 10):            # floor * mean, + epsilon
        constants = [stored[name] for name in nodes[position].input if name in stored]
        values.append(float(constants[0].ravel()[0]) if constants else float("nan"))
    return values[0], 0.0, values[1]
