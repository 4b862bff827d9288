"""Compiling a network with TensorRT 8.6, 10, 11 or TensorRT-RTX.

The versions are told apart by what their enums and objects have, never by their numbers.  11 and
RTX type networks strongly, 10 is told to, and 8.6 is held to the types of the file layer by layer.
Kernels come from TensorRT alone: no cuDNN and no cuBLAS is needed.
"""
from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..core import EngineError, MissingDependency
from .lowering import for_old_parser
from .recipes import Recipe

log = logging.getLogger(__name__)

MODULES = ("tensorrt", "tensorrt_rtx")
"""Python modules that are TensorRT, best first."""

_WEAK_FLAGS = {"float16": "FP16", "bfloat16": "BF16", "int8": "INT8", "float8": "FP8"}


@dataclass(frozen=True)
class Shape:
    """What a plan is built for: the inputs and the largest (and best) batch; it serves 1 and up.

    One batch profile a plan: with two, TensorRT does not promise that an image's answer is
    independent of its place in the batch.  Quick single answers get a plan of their own.
    """

    inputs: tuple[tuple[str, tuple[int, ...]], ...]     # ("images", (1, H, W)), ("geometry", (4,))
    batch: int

    def __str__(self) -> str:
        one = " and ".join(str(shape) for _, shape in self.inputs)
        return f"1..{self.batch} of {one}"


def installed() -> list[str]:
    """TensorRT modules that Python can find; none of them is imported."""
    return [name for name in MODULES if importlib.util.find_spec(name) is not None]


@functools.cache
def find_tensorrt() -> Any:
    """The first TensorRT module that imports and can build; asked only after the driver.

    Raises ``MissingDependency`` with the first cause.
    """
    causes = []
    for name in MODULES:
        try:
            module = importlib.import_module(name)
        except (ImportError, OSError, RuntimeError) as error:
            if importlib.util.find_spec(name) is not None:
                causes.append(f"{name} is installed without what it needs ({error})")
            continue
        if hasattr(module, "Builder") and hasattr(module, "Runtime"):
            return module
        causes.append(f"{name} has no builder (is it the lean runtime?)")
    raise MissingDependency(
        f"the tensorrt engine needs TensorRT; {'; '.join(causes) or 'it is not installed'}: "
        "pip install tensorrt (or tensorrt_rtx), or use --backend onnxruntime")


@functools.cache
def logger(module: Any) -> Any:
    """TensorRT's messages as records of this module's logger; one per process."""
    severity = module.ILogger.Severity
    levels = {severity.INTERNAL_ERROR: logging.ERROR, severity.ERROR: logging.ERROR,
              severity.WARNING: logging.WARNING, severity.INFO: logging.DEBUG,
              severity.VERBOSE: logging.DEBUG}

    class Forward(module.ILogger):
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            level = levels.get(severity, logging.DEBUG)
            # what fails is raised as an EngineError with this text before it in the log
            log.log(min(level, logging.INFO), "TensorRT: %s", message)

    return Forward()


def builder_name(module: Any) -> str:
    """Module and version, as part of a plan's key."""
    return f"{module.__name__} {module.__version__}"


def build_plan(module: Any, network: bytes, precision: str, shape: Shape, recipe: Recipe,
               check: Callable[[list[str], dict[str, int | None]], None]) -> bytes:
    """A plan for the GPU of the current context (RTX: for any) from a lowered ONNX file.

    ``check(inputs, {output: width or None})`` may refuse the network's signature.
    ``EngineError`` when TensorRT does not know an operator or cannot build the network.
    """
    try:
        builder = module.Builder(logger(module))
    except TypeError as error:                  # pybind11's words for a null pointer
        raise EngineError(f"{builder_name(module)} cannot start its builder ({error}); see the log "
                          "(-v), or use --backend onnxruntime") from error
    strong, flags = _network_flags(module)
    definition = builder.create_network(flags)
    parser = module.OnnxParser(definition, logger(module))
    if not parser.parse(network if strong else for_old_parser(network)):
        errors = [str(parser.get_error(i)) for i in range(parser.num_errors)]
        raise EngineError(f"{builder_name(module)} cannot read the network in {precision}: "
                           f"{'; '.join(errors) or 'no reason given'}; use --backend onnxruntime")
    outputs = [definition.get_output(i) for i in range(definition.num_outputs)]
    check([definition.get_input(i).name for i in range(definition.num_inputs)],
          {one.name: int(one.shape[1]) if len(one.shape) == 2 and one.shape[1] > 0 else None
           for one in outputs})
    config = builder.create_builder_config()
    config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, recipe.workspace_MiB << 20)
    if hasattr(config, "builder_optimization_level"):
        config.builder_optimization_level = recipe.optimisation
    _set_types(module, config, definition, precision, strong)
    _own_kernels_only(module, config)
    if "DISTRIBUTIVE_INDEPENDENCE" in module.BuilderFlag.__members__:
        config.set_flag(module.BuilderFlag.DISTRIBUTIVE_INDEPENDENCE)
    profile = builder.create_optimization_profile()
    for name, one in shape.inputs:
        profile.set_shape(name, (1, *one), (shape.batch, *one), (shape.batch, *one))
    if config.add_optimization_profile(profile) < 0:
        raise EngineError(f"{builder_name(module)} refuses batches of {shape} for this network; "
                          "its inputs must be (B, ...) with a free B: export the model again")
    plan = builder.build_serialized_network(definition, config)
    if plan is None:
        raise EngineError(f"{builder_name(module)} cannot build the network in {precision} for "
                          f"batches {shape}; the log says why (-v), or use --backend onnxruntime")
    return bytes(plan)


def _network_flags(module: Any) -> tuple[bool, int]:
    """(networks are typed strongly, flags of ``create_network``)."""
    known = module.NetworkDefinitionCreationFlag.__members__
    flags = sum(1 << int(known[name]) for name in ("EXPLICIT_BATCH", "STRONGLY_TYPED")
                if name in known)
    weak = "STRONGLY_TYPED" not in known and "FP16" in module.BuilderFlag.__members__
    return not weak, flags


def _set_types(module: Any, config: Any, definition: Any, precision: str, strong: bool) -> None:
    known = module.BuilderFlag.__members__
    if "TF32" in known:
        # on by default: float32 would silently be tf32
        change = config.set_flag if precision == "tf32" else config.clear_flag
        change(known["TF32"])
    if strong or precision not in _WEAK_FLAGS:
        return
    flag = _WEAK_FLAGS[precision]
    if flag not in known:
        raise EngineError(f"{builder_name(module)} has no {precision}; use another precision")
    config.set_flag(known[flag])
    if precision == "float16" and "OBEY_PRECISION_CONSTRAINTS" in known:
        config.set_flag(known["OBEY_PRECISION_CONSTRAINTS"])
        for index in range(definition.num_layers):
            _keep_types(module, definition.get_layer(index))


def _keep_types(module: Any, layer: Any) -> None:
    """Hold a layer of a weakly typed network (8.6) to float32 where the file says float32."""
    outputs = [layer.get_output(i) for i in range(layer.num_outputs)]
    casts = {"CAST", "CONSTANT", "SHAPE", "IDENTITY"}
    if layer.type.name in casts or not outputs:
        return
    if all(output.dtype == module.DataType.FLOAT for output in outputs):
        layer.precision = module.DataType.FLOAT
        for i in range(layer.num_outputs):
            layer.set_output_type(i, module.DataType.FLOAT)


def _own_kernels_only(module: Any, config: Any) -> None:
    known = getattr(getattr(module, "TacticSource", None), "__members__", {})
    if "CUDNN" not in known:
        return
    sources = config.get_tactic_sources()
    for name in ("CUBLAS", "CUBLAS_LT", "CUDNN"):
        if name in known:
            sources &= ~(1 << int(known[name]))
    config.set_tactic_sources(sources)
