"""ResNet-18, -34 and -50 (He et al., CVPR 2016) with random weights: as ONNX and as torch modules.

One channel in, two classes out, batch normalisation folded into the convolutions, as an exported
network has it.  The weights do not matter for the speed; a fixed seed makes both the same network.
"""
from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

DEPTHS = {18: (False, (2, 2, 2, 2)), 34: (False, (3, 4, 6, 3)), 50: (True, (3, 4, 6, 3))}


@dataclass(frozen=True)
class Conv:
    """A convolution with its name and what it reads."""

    name: str
    source: str
    weight: np.ndarray
    bias: np.ndarray
    stride: int

    @property
    def pad(self) -> int:
        return self.weight.shape[2] // 2

    def macs(self, size: int) -> int:
        """Multiply-adds for one image whose output is ``size`` x ``size``."""
        return int(self.weight.size) * size * size


class ResNet:
    """The layers of a ResNet in order: ("conv" | "relu" | "pool" | "add", output, ...)."""

    def __init__(self, depth: int, size: int, seed: int = 7) -> None:
        bottleneck, blocks = DEPTHS[depth]
        self.name, self.size = f"resnet{depth}", size
        self._rng = np.random.default_rng(seed)
        self.steps: list[tuple[Any, ...]] = []
        self.macs = 0
        size = self._conv("stem", "images", 1, 64, 7, 2, size)
        self.steps.append(("relu", "stem_r", "stem"))
        self.steps.append(("pool", "stem_p", "stem_r"))
        size, last, width = (size + 1) // 2, "stem_p", 64
        for stage, count in enumerate(blocks):
            for block in range(count):
                stride = 2 if stage and not block else 1
                name = f"s{stage}b{block}"
                last, width, size = self._block(name, last, width, 64 << stage, stride, size,
                                                bottleneck)
        self.head = (self._weights(2, width), np.zeros(2, np.float32))
        self.last = last

    def _weights(self, *shape: int) -> np.ndarray:
        fan = int(np.prod(shape[1:]))
        return (self._rng.standard_normal(shape) * (1.0 / fan) ** 0.5).astype(np.float32)

    def _conv(self, name: str, source: str, into: int, out: int, kernel: int, stride: int,
              size: int) -> int:
        conv = Conv(name, source, self._weights(out, into, kernel, kernel),
                    np.zeros(out, np.float32), stride)
        self.steps.append(("conv", name, conv))
        size = (size + stride - 1) // stride
        self.macs += conv.macs(size)
        return size

    def _block(self, name: str, source: str, width: int, inner: int, stride: int, size: int,
               bottleneck: bool) -> tuple[str, int, int]:
        out = 4 * inner if bottleneck else inner
        plan = ([(width, inner, 1, 1), (inner, inner, 3, stride), (inner, out, 1, 1)]
                if bottleneck else [(width, inner, 3, stride), (inner, inner, 3, 1)])
        last, now = source, size
        for i, (into, wide, kernel, step) in enumerate(plan):
            now = self._conv(f"{name}c{i}", last, into, wide, kernel, step, now)
            last = f"{name}c{i}"
            if i < len(plan) - 1:
                self.steps.append(("relu", f"{last}_r", last))
                last = f"{last}_r"
        shortcut = source
        if stride != 1 or width != out:
            self._conv(f"{name}s", source, width, out, 1, stride, size)
            shortcut = f"{name}s"
        self.steps.append(("add", f"{name}a", last, shortcut))
        self.steps.append(("relu", f"{name}o", f"{name}a"))
        return f"{name}o", out, now

    def onnx(self) -> bytes:
        """The network as an ONNX file with a free batch size."""
        from onnx import TensorProto, helper, numpy_helper

        nodes, stored = [], []
        for kind, output, *rest in self.steps:
            if kind == "conv":
                conv: Conv = rest[0]
                stored += [numpy_helper.from_array(conv.weight, f"{output}.w"),
                           numpy_helper.from_array(conv.bias, f"{output}.b")]
                nodes.append(helper.make_node(
                    "Conv", [conv.source, f"{output}.w", f"{output}.b"], [output],
                    strides=[conv.stride] * 2, pads=[conv.pad] * 4,
                    kernel_shape=list(conv.weight.shape[2:])))
            elif kind == "pool":
                nodes.append(helper.make_node("MaxPool", rest, [output], kernel_shape=[3, 3],
                                              strides=[2, 2], pads=[1] * 4))
            else:
                nodes.append(helper.make_node("Relu" if kind == "relu" else "Add", rest, [output]))
        stored += [numpy_helper.from_array(self.head[0], "head.w"),
                   numpy_helper.from_array(self.head[1], "head.b")]
        nodes += [helper.make_node("GlobalAveragePool", [self.last], ["mean"]),
                  helper.make_node("Flatten", ["mean"], ["flat"]),
                  helper.make_node("Gemm", ["flat", "head.w", "head.b"], ["logits"], transB=1),
                  helper.make_node("Softmax", ["logits"], ["hit"], axis=1)]
        float32 = TensorProto.FLOAT
        graph = helper.make_graph(
            nodes, self.name,
            [helper.make_tensor_value_info("images", float32, ["B", 1, self.size, self.size])],
            [helper.make_tensor_value_info("hit", float32, ["B", 2])], stored)
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        return bytes(made.SerializeToString())

    def torch(self) -> Any:
        """The same as a ``torch.nn.Module`` (B, 1, H, W) -> (B, 2)."""
        import torch
        from torch import nn

        network = self

        class Module(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.convs = nn.ModuleDict()
                for kind, name, *rest in network.steps:
                    if kind == "conv":
                        conv: Conv = rest[0]
                        out, into, kernel, _ = conv.weight.shape
                        layer = nn.Conv2d(into, out, kernel, conv.stride, conv.pad)
                        layer.weight.data = torch.from_numpy(conv.weight)
                        layer.bias.data = torch.from_numpy(conv.bias)
                        self.convs[name] = layer
                self.head = nn.Linear(network.head[0].shape[1], 2)
                self.head.weight.data = torch.from_numpy(network.head[0])
                self.head.bias.data = torch.from_numpy(network.head[1])

            def forward(self, images: Any) -> Any:
                values = {"images": images}
                for kind, name, *rest in network.steps:
                    if kind == "conv":
                        values[name] = self.convs[name](values[rest[0].source])
                    elif kind == "relu":
                        values[name] = values[rest[0]].relu()
                    elif kind == "pool":
                        values[name] = nn.functional.max_pool2d(values[rest[0]], 3, 2, 1)
                    else:
                        values[name] = values[rest[0]] + values[rest[1]]
                return self.head(values[network.last].mean((2, 3))).softmax(1)

        return Module().eval()


CARD = """name = "{name}"
version = "benchmark"
onnx_sha256 = "{sha256}"
architecture = "{architecture}"
[[tasks]]
name = "hit"
output = "hit"
classes = ["miss", "hit"]
positive = "hit"
[window]
kind = "crop"
height = {size}
width = {size}
[tolerance]
tf32 = 1.0
float16 = 1.0
bfloat16 = 1.0
int8 = 1.0
float8 = 1.0
"""


def write_model(directory: Path, name: str, network: bytes, size: int, expected: Any = None,
                architecture: str = "", images: int = 2) -> Path:
    """A model directory for a network; ``expected(network, images_B1HW)`` gives its answers."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "model.onnx").write_bytes(network)
    (directory / "card.toml").write_text(CARD.format(
        name=name, sha256=hashlib.sha256(network).hexdigest(), size=size,
        architecture=architecture))
    images_BHW = np.random.default_rng(5).poisson(3.0, (images, size, size)).astype(np.float32)
    answers_BK = expected(network, images_BHW[:, None]) if expected else np.zeros((images, 2))
    np.savez(directory / "check.npz", images=images_BHW, hit=answers_BK)
    return directory


def by_onnxruntime(network: bytes, images_B1HW: np.ndarray) -> np.ndarray:
    """Answers of the CPU runtime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(network, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"images": images_B1HW})[0])
