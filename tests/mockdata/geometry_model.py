"""A model with a geometry input whose answer is plain arithmetic: no runtime computed it.

The mean of the quadrant is taken as a radius in window pixels and turned into 1/d.
"""
from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

SIDE = 16
CARD_TOML = """
name = "{name}"
version = "0.1"
onnx_sha256 = "{sha256}"
licence = "BSD-3-Clause"
geometry = "geometry"
pools = [1, 2, 4]

[[tasks]]
name = "resolution"
output = "inverse"
kind = "regression"
value = "d_A"
unit = "A"
transform = "reciprocal"

[window]
kind = "quadrant"
height = 16
width = 16
normalize = "none"

[tolerance]
float32 = 1e-5
"""


def inverse_d(images_BHW: np.ndarray, geometry_B4: np.ndarray) -> np.ndarray:
    """(B, 1) 1/d by the textbook: Bragg's law at the angle under which the radius is seen."""
    radius = images_BHW.astype(np.float64).mean(axis=(1, 2))
    distance, pixel, wavelength, pool = np.asarray(geometry_B4, np.float64).T
    two_theta = np.arctan(radius * pool * pixel / distance)
    return (2 * np.sin(two_theta / 2) / wavelength)[:, None]


def geometry_onnx() -> bytes:
    """mean -> radius; Slice, Mul, Div, Atan, Sin -> 1/d."""
    import onnx
    from onnx import helper, numpy_helper

    nodes = [helper.make_node("GlobalAveragePool", ["images"], ["mean"]),
             helper.make_node("Flatten", ["mean"], ["radius"])]
    constants = {"axis": np.array([1]), "half": np.array(0.5, np.float32),
                 "two": np.array(2.0, np.float32)}
    for i, name in enumerate(("distance", "pixel", "wavelength", "pool")):
        constants |= {f"from{i}": np.array([i]), f"to{i}": np.array([i + 1])}
        nodes.append(helper.make_node("Slice", ["geometry", f"from{i}", f"to{i}", "axis"], [name]))
    for op, inputs, output in (
            ("Mul", ["pixel", "pool"], "step"), ("Div", ["step", "distance"], "slope"),
            ("Mul", ["radius", "slope"], "tangent"), ("Atan", ["tangent"], "two_theta"),
            ("Mul", ["two_theta", "half"], "theta"), ("Sin", ["theta"], "sine"),
            ("Div", ["two", "wavelength"], "factor"), ("Mul", ["sine", "factor"], "inverse")):
        nodes.append(helper.make_node(op, inputs, [output]))
    float32 = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        nodes, "geometry",
        [helper.make_tensor_value_info("images", float32, ["B", 1, SIDE, SIDE]),
         helper.make_tensor_value_info("geometry", float32, ["B", 4])],
        [helper.make_tensor_value_info("inverse", float32, ["B", 1])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)],
                             ir_version=8).SerializeToString()


def write_geometry_model(directory: Path, name: str = "rings") -> Path:
    """A complete model directory."""
    directory.mkdir(parents=True)
    network = geometry_onnx()
    (directory / "model.onnx").write_bytes(network)
    (directory / "card.toml").write_text(
        CARD_TOML.format(name=name, sha256=hashlib.sha256(network).hexdigest()))
    rng = np.random.default_rng(0)
    images = rng.uniform(0, 20, (5, SIDE, SIDE)).astype(np.float32)
    geometry = np.stack([rng.uniform(60, 300, 5), rng.uniform(0.05, 0.2, 5),
                         rng.uniform(0.9, 1.4, 5), [1, 2, 4, 1, 2]], 1).astype(np.float32)
    np.savez(directory / "check.npz", images=images, geometry=geometry,
             inverse=inverse_d(images, geometry))
    return directory
