"""PyTorch as an engine: executes the operators of the ONNX file with ``torch`` functions.

The weights come from the very file that the other runtimes read; no pickle, and no second copy
of the network that could disagree.  Operators: those of :data:`OPERATORS`.

Names: an ONNX operator is a function of (tensors, attributes).
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..core import EngineError, MissingDependency, ModelInvalid
from .cards import Model
from .runtime import Runtime


class Engine(Runtime):
    """Runs a model with PyTorch on "cpu" (one thread) or a CUDA device, float32."""

    name = "torch"
    package = "torch"
    takes_geometry = True

    def __init__(self, model: Model, device: str | None = None, max_batch: int = 64) -> None:
        super().__init__(model, device, max_batch)
        self._graph: TorchGraph | None = None

    def _start(self, onnx_path: Path) -> None:
        try:
            import onnx
            import torch
        except ImportError as error:
            raise MissingDependency(f"the torch engine needs torch and onnx ({error}); "
                                    "pip install 'xfel-classify[learn]'") from error
        from google.protobuf.message import DecodeError

        try:
            device = torch.device(self.device or "cpu")
            torch.zeros(1, device=device)
        except (RuntimeError, AssertionError) as error:
            raise EngineError(f"the torch engine cannot use device {self.device!r} ({error}); "
                              "leave the device out to run on the CPU") from error
        try:
            stored = onnx.load(str(onnx_path), load_external_data=False)
            onnx.checker.check_model(stored)
        except (DecodeError, onnx.checker.ValidationError, OSError) as error:
            raise ModelInvalid(f"model {self.model.name}: {onnx_path} is not a valid ONNX file "
                               f"({error}); fetch or export the model again") from error
        # On a CPU one image at a time stays in the cache and gives batch-independent bits.
        self.chunk = 1 if device.type == "cpu" else self.max_batch
        self._graph = TorchGraph(stored.graph, device)
        self._check_signature(self._graph.inputs, self._graph.outputs)

    def _run(self, images_B1HW: np.ndarray) -> dict[str, np.ndarray]:
        return self._answers(images_B1HW)

    def _run_with_geometry(self, images_B1HW: np.ndarray,
                           geometry_B4: np.ndarray) -> dict[str, np.ndarray]:
        return self._answers(images_B1HW, geometry_B4)

    def _answers(self, *inputs: np.ndarray) -> dict[str, np.ndarray]:
        import torch

        assert self._graph is not None
        with torch.inference_mode(), _one_thread():
            return self._graph(*inputs)

    def _stop(self) -> None:
        self._graph = None


@contextmanager
def _one_thread() -> Iterator[None]:
    """One torch thread inside, the caller's number again afterwards."""
    import torch

    before = torch.get_num_threads()
    if before != 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if before != 1:
            torch.set_num_threads(before)


class TorchGraph:
    """An ONNX graph whose nodes are called one after the other as torch functions.

    ``inputs`` are the names of the free inputs, ``outputs`` maps names to K (None = unknown).
    Raises ``EngineError`` naming the operators it does not know.
    """

    def __init__(self, graph: Any, device: Any) -> None:
        import onnx
        import torch

        self.device = device
        self.weights = {
            tensor.name: torch.from_numpy(np.array(onnx.numpy_helper.to_array(tensor))).to(device)
            for tensor in graph.initializer}
        self.inputs = [value.name for value in graph.input if value.name not in self.weights]
        self.outputs = {value.name: _width(value) for value in graph.output}
        unknown = sorted({node.op_type for node in graph.node
                          if node.op_type not in OPERATORS and node.op_type != "Constant"})
        if unknown:
            raise EngineError(f"the torch engine has no operator {', '.join(unknown)}; use "
                              "backend = \"onnxruntime\", or add them to engines/torch.py")
        self.steps: list[tuple[Callable, list[str], dict[str, Any], list[str]]] = []
        for node in graph.node:
            attributes = {entry.name: onnx.helper.get_attribute_value(entry)
                          for entry in node.attribute}
            if node.op_type == "Constant":
                value = onnx.numpy_helper.to_array(attributes["value"])
                self.weights[node.output[0]] = torch.from_numpy(np.array(value)).to(device)
                continue
            if len([name for name in node.output if name]) != 1 and node.op_type != "TopK":
                raise EngineError(f"the torch engine runs nodes with one output; {node.op_type} "
                                  f"{node.name!r} has {len(node.output)}: use onnxruntime")
            self.steps.append((OPERATORS[node.op_type], list(node.input), attributes,
                               list(node.output)))

    def __call__(self, *inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Outputs for arrays in the order of ``inputs``."""
        import torch

        values: dict[str, Any] = dict(self.weights)
        for name, array in zip(self.inputs, inputs, strict=True):
            values[name] = torch.from_numpy(array).to(self.device)
        self.evaluate(values)
        return {name: values[name].cpu().numpy() for name in self.outputs}

    def evaluate(self, values: dict[str, Any], until: str = "") -> None:
        """Add what each node gives to ``values``, up to the node that gives ``until``."""
        for function, names, attributes, found in self.steps:
            answer = function([values[name] if name else None for name in names], attributes)
            values.update(zip(found, answer if isinstance(answer, tuple) else (answer,),
                              strict=False))
            if until in found:
                return


def _width(value: Any) -> int | None:
    dims = value.type.tensor_type.shape.dim
    return int(dims[1].dim_value) if len(dims) == 2 and dims[1].dim_value else None


# --- operators ---------------------------------------------------------------------------------

Tensors = list[Any]
Attributes = dict[str, Any]


def _functional() -> Any:
    import torch

    return torch.nn.functional


def _padding(attributes: Attributes, name: str) -> tuple[int, int]:
    """Symmetric (rows, columns) padding of a 2-D window operator."""
    if attributes.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        raise EngineError(f"the torch engine runs {name} with explicit pads only; use onnxruntime")
    pads = attributes.get("pads", [0, 0, 0, 0])
    if len(pads) != 4 or list(pads[:2]) != list(pads[2:]):
        raise EngineError(f"the torch engine runs 2-D {name} with symmetric pads, this one has "
                          f"{list(pads)}; use onnxruntime")
    return int(pads[0]), int(pads[1])


def _conv(tensors: Tensors, attributes: Attributes) -> Any:
    bias = tensors[2] if len(tensors) > 2 else None
    return _functional().conv2d(
        tensors[0], tensors[1], bias, stride=tuple(attributes.get("strides", (1, 1))),
        padding=_padding(attributes, "Conv"), dilation=tuple(attributes.get("dilations", (1, 1))),
        groups=attributes.get("group", 1))


def _max_pool(tensors: Tensors, attributes: Attributes) -> Any:
    return _functional().max_pool2d(
        tensors[0], tuple(attributes["kernel_shape"]),
        stride=tuple(attributes.get("strides", (1, 1))),
        padding=_padding(attributes, "MaxPool"),
        dilation=tuple(attributes.get("dilations", (1, 1))),
        ceil_mode=bool(attributes.get("ceil_mode", 0)))


def _average_pool(tensors: Tensors, attributes: Attributes) -> Any:
    return _functional().avg_pool2d(
        tensors[0], tuple(attributes["kernel_shape"]),
        stride=tuple(attributes.get("strides", (1, 1))),
        padding=_padding(attributes, "AveragePool"),
        ceil_mode=bool(attributes.get("ceil_mode", 0)),
        count_include_pad=bool(attributes.get("count_include_pad", 0)))


def _gemm(tensors: Tensors, attributes: Attributes) -> Any:
    left = tensors[0].T if attributes.get("transA", 0) else tensors[0]
    right = tensors[1].T if attributes.get("transB", 0) else tensors[1]
    product = attributes.get("alpha", 1.0) * (left @ right)
    return product if len(tensors) < 3 else product + attributes.get("beta", 1.0) * tensors[2]


def _batch_norm(tensors: Tensors, attributes: Attributes) -> Any:
    values, scale, shift, mean, variance = tensors
    return _functional().batch_norm(values, mean, variance, scale, shift,
                                    eps=attributes.get("epsilon", 1e-5))


def _mean(tensors: Tensors, attributes: Attributes) -> Any:
    axes = tensors[1].tolist() if len(tensors) > 1 else attributes.get("axes")
    if axes is None:
        axes = list(range(tensors[0].dim()))
    return tensors[0].mean(dim=axes, keepdim=bool(attributes.get("keepdims", 1)))


def _reshape(tensors: Tensors, attributes: Attributes) -> Any:
    shape = tensors[1].tolist()
    if not attributes.get("allowzero", 0):
        shape = [tensors[0].shape[axis] if size == 0 else size for axis, size in enumerate(shape)]
    return tensors[0].reshape(shape)


def _flatten(tensors: Tensors, attributes: Attributes) -> Any:
    axis = attributes.get("axis", 1)
    return tensors[0].reshape(int(np.prod(tensors[0].shape[:axis])), -1)


def _concat(tensors: Tensors, attributes: Attributes) -> Any:
    import torch

    return torch.cat(tensors, dim=attributes["axis"])


def _slice(tensors: Tensors, attributes: Attributes) -> Any:
    starts, ends = tensors[1].tolist(), tensors[2].tolist()
    axes = tensors[3].tolist() if len(tensors) > 3 else range(len(starts))
    steps = tensors[4].tolist() if len(tensors) > 4 else [1] * len(starts)
    found = tensors[0]
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        if step < 1:
            raise EngineError(f"the torch engine slices forwards only, this Slice has the step "
                              f"{step}; use onnxruntime")
        place = [slice(None)] * found.dim()
        place[axis] = slice(start, end, step)
        found = found[tuple(place)]
    return found


def _unsqueeze(tensors: Tensors, attributes: Attributes) -> Any:
    rank = tensors[0].dim() + len(tensors[1])
    found = tensors[0]
    for axis in sorted(axis % rank for axis in tensors[1].tolist()):
        found = found.unsqueeze(axis)
    return found


def _clip(tensors: Tensors, attributes: Attributes) -> Any:
    bounds = [*tensors[1:], None, None][:2]
    return tensors[0].clamp(min=bounds[0], max=bounds[1])


def _pad(tensors: Tensors, attributes: Attributes) -> Any:
    if attributes.get("mode", b"constant") != b"constant" or len(tensors) > 3:
        raise EngineError("the torch engine pads all axes with a constant only; use onnxruntime")
    pads = tensors[1].tolist()
    rank = len(pads) // 2
    value = float(tensors[2]) if len(tensors) > 2 and tensors[2] is not None else 0.0
    ends = [size for axis in reversed(range(rank)) for size in (pads[axis], pads[rank + axis])]
    return _functional().pad(tensors[0], ends, value=value)


def _resize(tensors: Tensors, attributes: Attributes) -> Any:
    """2-D, bilinear, half-pixel: what networks here enlarge by."""
    if attributes.get("mode") != b"linear" or attributes.get(
            "coordinate_transformation_mode", b"half_pixel") not in (b"half_pixel",
                                                                     b"pytorch_half_pixel"):
        raise EngineError("the torch engine resizes bilinearly by half pixels only; "
                          "use onnxruntime")
    if len(tensors) > 3 and tensors[3] is not None:
        size = tensors[3].tolist()[2:]
    else:
        size = [int(n * factor) for n, factor in zip(tensors[0].shape[2:],
                                                     tensors[2].tolist()[2:], strict=True)]
    return _functional().interpolate(tensors[0], size=size, mode="bilinear", align_corners=False)


def _top_k(tensors: Tensors, attributes: Attributes) -> Any:
    if not attributes.get("largest", 1):
        raise EngineError("the torch engine finds the largest values only; use onnxruntime")
    found = tensors[0].topk(int(tensors[1]), dim=attributes.get("axis", -1))
    return found.values, found.indices


def _reduced(name: str) -> Callable[[Tensors, Attributes], Any]:
    def reduce(tensors: Tensors, attributes: Attributes) -> Any:
        axes = tensors[1].tolist() if len(tensors) > 1 and tensors[1] is not None \
            else list(range(tensors[0].dim()))
        return getattr(tensors[0], name)(dim=axes, keepdim=bool(attributes.get("keepdims", 1)))
    return reduce


def _cast(tensors: Tensors, attributes: Attributes) -> Any:
    import onnx
    import torch

    numpy_type = onnx.helper.tensor_dtype_to_np_dtype(attributes["to"])
    return tensors[0].to(torch.from_numpy(np.zeros(1, numpy_type)).dtype)


def _shape(tensors: Tensors, attributes: Attributes) -> Any:
    import torch

    shape = tuple(tensors[0].shape)
    return torch.tensor(shape[attributes.get("start", 0):attributes.get("end", len(shape))])


def _gather(tensors: Tensors, attributes: Attributes) -> Any:
    axis, (values, index) = attributes.get("axis", 0), tensors
    index = index.to(values.device)
    found = values.index_select(axis, index.flatten())
    return found.reshape(*values.shape[:axis], *index.shape, *values.shape[axis + 1:])


def _extreme(name: str) -> Callable[[Tensors, Attributes], Any]:
    def extreme(tensors: Tensors, attributes: Attributes) -> Any:
        import torch

        found = tensors[0]
        for other in tensors[1:]:
            found = getattr(torch, name)(found, other)
        return found
    return extreme


def _expand(tensors: Tensors, attributes: Attributes) -> Any:
    import torch

    return tensors[0].expand(torch.broadcast_shapes(tensors[0].shape, tensors[1].tolist()))


def _where(tensors: Tensors, attributes: Attributes) -> Any:
    import torch

    return torch.where(*tensors)


OPERATORS: dict[str, Callable[[Tensors, Attributes], Any]] = {
    "Abs": lambda t, a: t[0].abs(),
    "Add": lambda t, a: t[0] + t[1],
    "And": lambda t, a: t[0] & t[1],
    "Atan": lambda t, a: t[0].atan(),
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "Clip": _clip,
    "Concat": _concat,
    "Conv": _conv,
    "Cos": lambda t, a: t[0].cos(),
    "Div": lambda t, a: t[0] / t[1],
    "Expand": _expand,
    "Flatten": _flatten,
    "Floor": lambda t, a: t[0].floor(),
    "Gather": _gather,
    "GatherElements": lambda t, a: t[0].gather(a.get("axis", 0), t[1]),
    "Gemm": _gemm,
    "GlobalAveragePool": lambda t, a: t[0].mean(dim=(2, 3), keepdim=True),
    "Greater": lambda t, a: t[0] > t[1],
    "GreaterOrEqual": lambda t, a: t[0] >= t[1],
    "Identity": lambda t, a: t[0],
    "LeakyRelu": lambda t, a: _functional().leaky_relu(t[0], a.get("alpha", 0.01)),
    "Less": lambda t, a: t[0] < t[1],
    "Log": lambda t, a: t[0].log(),
    "MatMul": lambda t, a: t[0] @ t[1],
    "Max": _extreme("maximum"),
    "MaxPool": _max_pool,
    "Min": _extreme("minimum"),
    "Mul": lambda t, a: t[0] * t[1],
    "Neg": lambda t, a: -t[0],
    "Pad": _pad,
    "Pow": lambda t, a: t[0] ** t[1],
    "Reciprocal": lambda t, a: t[0].reciprocal(),
    "ReduceMean": _mean,
    "ReduceMin": _reduced("amin"),
    "ReduceSum": _reduced("sum"),
    "Relu": lambda t, a: t[0].relu(),
    "Reshape": _reshape,
    "Resize": _resize,
    "Round": lambda t, a: t[0].round(),
    "Shape": _shape,
    "Sigmoid": lambda t, a: t[0].sigmoid(),
    "Sin": lambda t, a: t[0].sin(),
    "Slice": _slice,
    "Softmax": lambda t, a: t[0].softmax(dim=a.get("axis", -1)),
    "Sqrt": lambda t, a: t[0].sqrt(),
    "Sub": lambda t, a: t[0] - t[1],
    "TopK": _top_k,
    "Transpose": lambda t, a: t[0].permute(a["perm"]),
    "Unsqueeze": _unsqueeze,
    "Where": _where,
}
