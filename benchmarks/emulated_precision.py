"""How far tf32 and float16 move a model's answers, emulated on a CPU: what a card's tolerances for
these precisions rest on until a GPU has measured them.

    python benchmarks/emulated_precision.py MODEL [--images N]

tf32: inputs and weights of every convolution and matrix product are rounded to ten bits of
mantissa, sums are float32, as tensor cores do it.  float16: the graph as it is lowered for
TensorRT, run by ONNX Runtime's CPU kernels.  Both are compared with float32 on the card's check
images and, for hit models, on N images of each test and shifted run of the recipe (default 200;
simulated where they are not in the cache).

Axes: B images, K answers.
"""
from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import numpy as np

from xfel_classify.engines import Model, find_model, lowering
from xfel_classify.engines import torch as torch_engine
from xfel_classify.engines.cards import read_check
from xfel_classify.engines.recipes import recipe_for

PRODUCTS = ("Conv", "Gemm", "MatMul")
ORDINARY_GPU = (9, 0)       # compute capability whose recipe is lowered
BATCH = 16


def tf32(value: Any) -> Any:
    """A float32 tensor rounded to the nearest of ten bits of mantissa; others unchanged."""
    import torch

    if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
        return value
    bits = value.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1fff).view(torch.float32)


def rounded(function: Any) -> Any:
    """``function`` of (tensors, attributes) with tensors rounded as tensor cores read them."""
    return lambda tensors, attributes: function([tf32(tensor) for tensor in tensors], attributes)


class Contenders:
    """One model in float32, float16 and tf32; answers are {output: (B, K)}."""

    def __init__(self, model: Model) -> None:
        import onnx
        import onnxruntime
        import torch

        self.names = [model.card.input] + ([model.card.geometry] if model.card.geometry else [])
        images, geometry, self.expected = read_check(model)
        self.check = (images[:, None], geometry)
        example = dict(zip(self.names, (images[:, None], geometry), strict=False))
        stored = model.onnx_path.read_bytes()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.sessions = {}
        for precision in ("float32", "float16"):
            graph = stored if precision == "float32" else lowering.lower(
                stored, precision, recipe_for(model, ORDINARY_GPU), example)
            self.sessions[precision] = onnxruntime.InferenceSession(
                graph, options, providers=["CPUExecutionProvider"])
        ordinary = dict(torch_engine.OPERATORS)
        torch_engine.OPERATORS.update({name: rounded(ordinary[name]) for name in PRODUCTS})
        self.tf32 = torch_engine.TorchGraph(onnx.load_from_string(stored).graph,
                                            torch.device("cpu"))
        torch_engine.OPERATORS.update(ordinary)

    def answers(self, precision: str, images: np.ndarray, geometry: np.ndarray | None
                ) -> dict[str, np.ndarray]:
        import torch

        parts = []
        for start in range(0, len(images), BATCH):
            inputs = [array[start:start + BATCH] for array in (images, geometry)
                      if array is not None]
            if precision == "tf32":
                with torch.inference_mode():
                    parts.append(self.tf32(*inputs))
            else:
                session = self.sessions[precision]
                names = [value.name for value in session.get_outputs()]
                parts.append(dict(zip(names, session.run(
                    None, dict(zip(self.names, inputs, strict=True))), strict=True)))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def hit_images(model: Model, of_each: int) -> Iterator[np.ndarray]:
    """Crops (B, 1, H, W) of the test and shifted runs of a hit model's recipe."""
    from xfel_classify.learn.datasets import simulate
    from xfel_classify.learn.recipes import read_recipe, runs_of

    recipe = read_recipe(model.directory / "recipe.toml")
    for split in ("test", "shifted"):
        for run in runs_of(recipe, split):
            for start in range(0, min(of_each, run.events), BATCH):
                images, _ = simulate(run, range(start, min(start + BATCH, of_each, run.events)))
                yield np.clip(images.astype(np.float32), -recipe.window.clip,
                              recipe.window.clip)[:, None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--images", type=int, default=200, metavar="N")
    args = parser.parse_args()
    model = find_model(args.model)
    contenders = Contenders(model)
    print(f"{model.name} {model.card.version}, largest difference from float32")
    for precision in ("float16", "tf32"):
        found = contenders.answers(precision, *contenders.check)
        print(f"  {precision}, {len(contenders.check[0])} check images: " + ", ".join(
            f"{name} {np.abs(found[name] - values).max():.2g}"
            for name, values in contenders.expected.items()))
    task = model.card.tasks[0]
    if not task.positive or model.window.kind != "crop":
        return
    largest, changed, seen = {"float16": 0.0, "tf32": 0.0}, {"float16": 0, "tf32": 0}, 0
    for images in hit_images(model, args.images):
        answer = contenders.answers("float32", images, None)[task.output][:, task.positive_index]
        seen += len(images)
        for precision in largest:
            other = contenders.answers(precision, images, None)[task.output][
                :, task.positive_index]
            largest[precision] = max(largest[precision], float(np.abs(other - answer).max()))
            changed[precision] += int(((other >= task.threshold)
                                       != (answer >= task.threshold)).sum())
    for precision, value in largest.items():
        print(f"  {precision}, {seen} images of test and shifted runs: {task.output} {value:.2g}, "
              f"{changed[precision]} decisions changed")


if __name__ == "__main__":
    main()
