"""A three-layer network, small enough to read, as a complete model directory."""
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

CARD_TOML = """
name = "{name}"
version = "0.1"
summary = "three layers"
onnx_sha256 = "{sha256}"
licence = "BSD-3-Clause"
detectors = ["generic"]
photon_energy_eV = [9000.0, 10000.0]

[[tasks]]
name = "hit"
output = "hit"
classes = ["miss", "hit"]
positive = "hit"
threshold = 0.4

[window]
kind = "crop"
height = 12
width = 10
normalize = "clip"
clip = 100.0

[tolerance]
float32 = 1e-5
"""


def tiny_onnx(seed: int = 0, outputs: int = 2) -> bytes:
    """Conv 3x3 -> ReLU -> mean -> linear -> softmax on (B, 1, 12, 10), output "hit" (B, K)."""
    onnx = pytest.importorskip("onnx")
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    rng = np.random.default_rng(seed)
    weights = {"conv.w": rng.normal(size=(3, 1, 3, 3)), "conv.b": rng.normal(size=3),
               "fc.w": rng.normal(size=(outputs, 3)), "fc.b": rng.normal(size=outputs)}
    nodes = [
        helper.make_node("Conv", ["images", "conv.w", "conv.b"], ["a"], kernel_shape=[3, 3]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("GlobalAveragePool", ["b"], ["c"]),
        helper.make_node("Flatten", ["c"], ["d"]),
        helper.make_node("Gemm", ["d", "fc.w", "fc.b"], ["e"], transB=1),
        helper.make_node("Softmax", ["e"], ["hit"], axis=1),
    ]
    float32 = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        nodes, "tiny",
        [helper.make_tensor_value_info("images", float32, ["B", 1, 12, 10])],
        [helper.make_tensor_value_info("hit", float32, ["B", outputs])],
        [numpy_helper.from_array(value.astype(np.float32), name)
         for name, value in weights.items()])
    stored = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return stored.SerializeToString()


def tiny_forward(images_BHW: np.ndarray, seed: int = 0) -> np.ndarray:
    """The same network in numpy: an answer that no runtime computed."""
    rng = np.random.default_rng(seed)
    conv_w, conv_b = rng.normal(size=(3, 1, 3, 3)), rng.normal(size=3)
    fc_w, fc_b = rng.normal(size=(2, 3)), rng.normal(size=2)
    windows = np.lib.stride_tricks.sliding_window_view(images_BHW, (3, 3), axis=(1, 2))
    convolved = np.einsum("bhwij,kij->bkhw", windows, conv_w[:, 0]) + conv_b[:, None, None]
    logits = np.maximum(convolved, 0).mean((2, 3)) @ fc_w.T + fc_b
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    return exponentials / exponentials.sum(1, keepdims=True)


@pytest.fixture
def tiny_images() -> np.ndarray:
    """Five images: noise, zeros, and saturated ones."""
    images_BHW = np.random.default_rng(5).normal(2.0, 3.0, (5, 12, 10)).astype(np.float32)
    images_BHW[3] = 0.0
    images_BHW[4] = 100.0
    return images_BHW


@pytest.fixture
def write_model(tmp_path: Path, tiny_images: np.ndarray) -> Callable[..., Path]:
    """Writes a complete model; ``write_model(directory, name, seed)`` -> its directory."""

    def write(directory: str = "tiny", name: str = "tiny", seed: int = 0,
              card: str = CARD_TOML) -> Path:
        target = tmp_path / directory
        target.mkdir(parents=True)
        network = tiny_onnx(seed)
        (target / "model.onnx").write_bytes(network)
        (target / "card.toml").write_text(
            card.format(name=name, sha256=hashlib.sha256(network).hexdigest()))
        np.savez(target / "check.npz", images=tiny_images, hit=tiny_forward(tiny_images, seed))
        return target

    return write


@pytest.fixture
def forward() -> Callable[..., np.ndarray]:
    return tiny_forward
