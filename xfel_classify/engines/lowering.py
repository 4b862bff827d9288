"""A float32 network rewritten for another precision, as an ONNX file.

TensorRT 11 and RTX type a network strongly: what the file says is what is computed.  So the file
says it, for every version alike:

* float16, bfloat16: convolutions and matrix products, and the simple operators between them, in the
  short type, with casts at the borders; everything else (means, squares, softmax) stays float32.
  float16 ends at 65504: layers that see counts are scaled by a power of two before the cast.
* int8, float8: QuantizeLinear/DequantizeLinear pairs around the inputs and weights of those layers.

Inputs and outputs of the network stay float32.  Layers are named by their weights, which are the
same in every export.
"""
from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ..core import EngineError, MissingDependency, ModelInvalid
from .recipes import Recipe

log = logging.getLogger(__name__)

VERSION = "1"
"""Part of every plan's key: change it when the same recipe gives another network."""

HEAVY = ("Conv", "ConvTranspose", "Gemm", "MatMul")
CARRIED = ("Relu", "LeakyRelu", "MaxPool", "GlobalAveragePool", "Add", "Concat", "Flatten",
           "Reshape", "Transpose", "Identity")
"""Operators that follow their inputs into the short type."""

LARGEST = {"int8": 127.0, "float8": 448.0}
FLOAT8_OPSET = 19


def digest(precision: str, recipe: Recipe) -> str:
    """Hash of everything that decides how a network is lowered."""
    parts = (VERSION, precision, sorted(recipe.scale.items()),
             sorted(recipe.keep.get(precision, [])), sorted(recipe.largest.items()))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def lower(network: bytes, precision: str, recipe: Recipe,
          examples: Mapping[str, np.ndarray] | None = None) -> bytes:
    """The network of an ONNX file for ``precision``.

    ``examples`` are arrays for the network's inputs, by name: they give the ranges of int8 and
    float8 where the recipe states none.
    "float32" and "tf32" are returned as they are.
    """
    if precision in ("float32", "tf32"):
        return network
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise MissingDependency(f"other precisions than float32 are made with onnx ({error}); "
                                "pip install onnx") from error
    try:
        stored = onnx.load_model_from_string(network)
    except DecodeError as error:
        raise ModelInvalid(f"the network is not a valid ONNX file ({error}); fetch or export the "
                           "model again") from error
    kept = set(recipe.keep.get(precision, []))
    _say_unknown(stored.graph, kept | set(recipe.scale) | set(recipe.largest))
    if precision in LARGEST:
        if precision == "float8" and stored.opset_import[0].version < FLOAT8_OPSET:
            stored = onnx.version_converter.convert_version(stored, FLOAT8_OPSET)
        _Quantised(stored.graph, precision, kept, recipe.largest).rewrite(stored, examples)
    else:
        _Short(stored.graph, precision, kept, recipe.scale).rewrite()
    onnx.checker.check_model(stored)
    return bytes(stored.SerializeToString(deterministic=True))


def for_old_parser(network: bytes) -> bytes:
    """The same network in ONNX opset 17, the newest that TensorRT 8.6 reads, where it can be.

    Opset 18 moved the axes of means and sums from an attribute to an input; our exports use
    nothing else of it.  A network that does stays as it is, and the parser says what it lacks.
    """
    import onnx

    stored = onnx.load_model_from_string(network)
    if stored.opset_import[0].version != 18:
        return network
    constants = {one.name: one for one in stored.graph.initializer}
    for node in stored.graph.node:
        if node.op_type.startswith("Reduce") and node.op_type != "ReduceSum" and len(
                node.input) == 2 and node.input[1] in constants:
            axes = onnx.numpy_helper.to_array(constants[node.input[1]]).ravel().tolist()
            del node.input[1]
            kept = [one for one in node.attribute if one.name != "noop_with_empty_axes"]
            del node.attribute[:]
            node.attribute.extend([*kept, onnx.helper.make_attribute("axes", axes)])
    stored.opset_import[0].version = 17
    used = {name for node in stored.graph.node for name in node.input}
    for one in [one for one in stored.graph.initializer if one.name not in used]:
        stored.graph.initializer.remove(one)
    try:
        onnx.checker.check_model(stored, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
        return network
    return bytes(stored.SerializeToString())


def layer_of(node: Any) -> str:
    """The name by which recipes call a layer: that of its weights."""
    return str(node.input[1]) if len(node.input) > 1 else str(node.name)


def _say_unknown(graph: Any, named: set[str]) -> None:
    layers = [layer_of(node) for node in graph.node if node.op_type in HEAVY]
    unknown = sorted(named - set(layers) - {node.op_type for node in graph.node})
    if unknown:
        log.warning("the GPU recipe names %s, which the network does not have; its layers are %s",
                    ", ".join(unknown), ", ".join(layers))


def _left_out(node: Any, kept: Iterable[str]) -> bool:
    return node.op_type in kept or layer_of(node) in kept


class _Short:
    """Rewrites a graph for float16 or bfloat16."""

    def __init__(self, graph: Any, precision: str, kept: set[str],
                 scale: Mapping[str, float]) -> None:
        import onnx

        self._onnx = onnx
        self._graph, self._kept = graph, kept
        self._short = precision == "float16"
        self._type = onnx.TensorProto.FLOAT16 if self._short else onnx.TensorProto.BFLOAT16
        self._suffix = "__" + precision
        self._scale = dict(scale) if self._short else {}
        self._weights = {one.name: one for one in graph.initializer}
        self._nodes: list[Any] = []
        self._full: set[str] = {one.name for one in graph.input}    # tensors there in float32
        self._low: set[str] = set()                                 # tensors there in short

    def rewrite(self) -> None:
        nodes = list(self._graph.node)
        for node in nodes:
            if self._is_low(node):
                self._add_low(node)
            else:
                for name in node.input:
                    self._want_full(name)
                self._nodes.append(node)
                self._full.update(node.output)
        for output in self._graph.output:
            self._want_full(output.name)
        del self._graph.node[:]
        self._graph.node.extend(self._nodes)
        del self._graph.value_info[:]
        used = {name for node in self._nodes for name in node.input}
        stale = [one for one in self._graph.initializer if one.name not in used]
        for one in stale:
            self._graph.initializer.remove(one)

    def _is_low(self, node: Any) -> bool:
        if _left_out(node, self._kept):
            return False
        if node.op_type in HEAVY:
            return True
        if node.op_type not in CARRIED:
            return False
        produced = [name for name in node.input if name and name not in self._weights]
        return bool(produced) and all(name in self._low for name in produced)

    def _want_full(self, name: str) -> None:
        if name in self._low and name not in self._full:
            self._cast(name + self._suffix, name, self._onnx.TensorProto.FLOAT)
            self._full.add(name)

    def _want_low(self, name: str) -> str:
        """Name of the short version of a tensor or of a weight."""
        if name in self._weights:
            return self._weight(name, 1.0)
        if name not in self._low:
            self._cast(name, name + self._suffix, self._type)
            self._low.add(name)
        return name + self._suffix

    def _cast(self, source: str, target: str, kind: int) -> None:
        self._nodes.append(self._onnx.helper.make_node("Cast", [source], [target],
                                                       name=f"cast {target}", to=kind))

    def _weight(self, name: str, factor: float) -> str:
        if self._weights[name].data_type != self._onnx.TensorProto.FLOAT:
            return name                                             # shapes and the like
        short = f"{name}{self._suffix}" + (f"_{factor:g}" if factor != 1 else "")
        if short in self._weights:
            return short
        values = self._onnx.numpy_helper.to_array(self._weights[name]) * np.float32(factor)
        if self._short and np.abs(values).max(initial=0.0) > 65504:
            raise EngineError(f"the weights {name} do not fit into float16; use another precision")
        stored = self._onnx.helper.make_tensor(short, self._type, values.shape,
                                               values.astype(np.float32).ravel())
        self._graph.initializer.append(stored)
        self._weights[short] = stored
        return short

    def _constant(self, name: str, value: float) -> str:
        if name not in self._weights:
            stored = self._onnx.numpy_helper.from_array(np.array(value, np.float32), name)
            self._graph.initializer.append(stored)
            self._weights[name] = stored
        return name

    def _add_low(self, node: Any) -> None:
        factor = self._scale.get(layer_of(node), 1.0) if node.op_type in HEAVY else 1.0
        if factor == 1.0:
            inputs = [self._want_low(name) if name else "" for name in node.input]
            outputs = [name + self._suffix for name in node.output]
            self._low.update(node.output)
        else:
            inputs, outputs = self._scaled_inputs(node, factor), []
        low = self._onnx.NodeProto()
        low.CopyFrom(node)
        del low.input[:], low.output[:]
        low.input.extend(inputs)
        low.output.extend(outputs or [f"{node.output[0]}{self._suffix}_scaled"])
        self._nodes.append(low)
        if factor != 1.0:
            self._scale_back(node.output[0], low.output[0], factor)

    def _scaled_inputs(self, node: Any, factor: float) -> list[str]:
        """(factor x) in short, the weights, and (factor bias): the layer gives factor times y."""
        make = self._onnx.helper.make_node
        source = node.input[0]
        self._want_full(source)
        by = self._constant(f"scale_{factor:g}", factor)
        scaled = f"{source}_times_{factor:g}"
        if scaled not in self._full:
            self._nodes.append(make("Mul", [source, by], [scaled], name=f"scale {source}"))
            self._full.add(scaled)
        return [self._want_low(scaled), self._weight(node.input[1], 1.0),
                *(self._weight(name, factor) for name in node.input[2:])]

    def _scale_back(self, output: str, scaled: str, factor: float) -> None:
        make = self._onnx.helper.make_node
        self._cast(scaled, f"{scaled}_full", self._onnx.TensorProto.FLOAT)
        back = self._constant(f"scale_{1 / factor:g}", 1 / factor)
        self._nodes.append(make("Mul", [f"{scaled}_full", back], [output],
                                name=f"scale back {output}"))
        self._full.add(output)


class _Quantised:
    """Rewrites a graph with Q/DQ pairs: weights per output channel (int8) or whole (float8)."""

    def __init__(self, graph: Any, precision: str, kept: set[str],
                 largest: Mapping[str, float]) -> None:
        import onnx

        self._onnx = onnx
        self._graph, self._precision, self._kept = graph, precision, kept
        self._limit = LARGEST[precision]
        self._type = (onnx.TensorProto.INT8 if precision == "int8"
                      else onnx.TensorProto.FLOAT8E4M3FN)
        self._largest = dict(largest)
        self._uses: dict[str, int] = {}     # of each layer's weights
        self._weights = {one.name: onnx.numpy_helper.to_array(one) for one in graph.initializer}

    def rewrite(self, stored: Any, examples: Mapping[str, np.ndarray] | None) -> None:
        layers = [node for node in self._graph.node
                  if node.op_type in HEAVY and not _left_out(node, self._kept)
                  and node.input[1] in self._weights]
        missing = [node for node in layers if layer_of(node) not in self._largest]
        if missing:
            self._largest.update(self._measure(stored, missing, examples))
        nodes: list[Any] = []
        wanted = {id(node) for node in layers}
        for node in list(self._graph.node):
            if id(node) in wanted:
                nodes += self._pairs(node)
            nodes.append(node)
        nodes = [self._onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del self._graph.node[:]
        self._graph.node.extend(nodes)

    def _measure(self, stored: Any, layers: list[Any],
                 examples: Mapping[str, np.ndarray] | None) -> dict[str, float]:
        """Largest absolute input of each layer over the examples."""
        if not examples:
            raise EngineError(f"{self._precision} needs example images for its ranges; give the "
                              "model a check.npz, or state [any.largest] in its GPU recipe")
        whole = self._onnx.ModelProto()
        whole.CopyFrom(stored)
        names = sorted({node.input[0] for node in layers} - set(examples))
        del whole.graph.output[:]
        whole.graph.output.extend(
            self._onnx.helper.make_tensor_value_info(name, self._onnx.TensorProto.FLOAT, None)
            for name in names)
        found = {name: float(np.abs(values).max(initial=0.0)) for name, values in examples.items()}
        if names:
            values = _evaluated(whole, names, examples)
            found |= {name: float(np.abs(value).max(initial=0.0))
                      for name, value in zip(names, values, strict=True)}
        largest: dict[str, float] = {}
        for node in layers:             # weights that serve twice have one range
            name = layer_of(node)
            largest[name] = max(largest.get(name, 0.0), found[node.input[0]])
        return largest

    def _pairs(self, node: Any) -> list[Any]:
        name = layer_of(node)
        weight = self._weights[node.input[1]].astype(np.float32)
        # the axis of output channels
        axis = 0 if node.op_type == "Conv" or self._attribute(node, "transB", 0) else 1
        if self._precision == "int8":
            others = tuple(a for a in range(weight.ndim) if a != axis)
            spread = np.abs(weight).max(axis=others)
        else:
            spread = np.abs(weight).max(initial=0.0)
        by_weight = (np.maximum(spread, 1e-12) / self._limit).astype(np.float32)
        by_input = np.float32(max(self._largest[name], 1e-12) / self._limit)
        self._uses[name] = self._uses.get(name, 0) + 1
        place = name if self._uses[name] == 1 else f"{name}#{self._uses[name]}"
        pairs = [*self._pair(node.input[0], f"{place}/input", by_input, None),
                 *self._pair(node.input[1], f"{place}/weight", by_weight,
                             axis if self._precision == "int8" else None)]
        node.input[0], node.input[1] = f"{place}/input_dq", f"{place}/weight_dq"
        return pairs

    @staticmethod
    def _attribute(node: Any, name: str, default: int) -> int:
        return next((int(one.i) for one in node.attribute if one.name == name), default)

    def _pair(self, source: str, name: str, scale: Any, axis: int | None) -> list[Any]:
        make = self._onnx.helper.make_node
        scale = np.asarray(scale, np.float32)
        zero = self._onnx.helper.make_tensor(f"{name}_zero", self._type, scale.shape,
                                             np.zeros(scale.size, np.float32).astype(
                                                 np.int8 if self._precision == "int8"
                                                 else np.float32))
        self._graph.initializer.append(self._onnx.numpy_helper.from_array(scale, f"{name}_scale"))
        self._graph.initializer.append(zero)
        given: dict[str, Any] = {} if axis is None else {"axis": axis}
        return [make("QuantizeLinear", [source, f"{name}_scale", f"{name}_zero"], [f"{name}_q"],
                     name=f"{name} quantise", **given),
                make("DequantizeLinear", [f"{name}_q", f"{name}_scale", f"{name}_zero"],
                     [f"{name}_dq"], name=f"{name} dequantise", **given)]


def _evaluated(stored: Any, names: list[str], examples: Mapping[str, np.ndarray]
               ) -> list[np.ndarray]:
    """Values inside a network; ONNX's own evaluator serves where ONNX Runtime is not installed.

    It does not know every operator in full (GatherElements along long axes).
    """
    try:
        import onnxruntime
    except ImportError:
        from onnx.reference import ReferenceEvaluator

        return list(ReferenceEvaluator(stored).run(names, dict(examples)))
    session = onnxruntime.InferenceSession(stored.SerializeToString(),
                                           providers=["CPUExecutionProvider"])
    return session.run(names, dict(examples))
