"""From a finished training on stills to a model directory: ONNX, check values, card.

The graph has the input "images" and, where the network uses it, "geometry" (B, 4); its output is
(B, 2) probabilities [one lattice, several] or (B, 1) inverse resolution.
"""
from __future__ import annotations

import logging
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from ..core import MissingDependency, ModelInvalid, OutputExists
from ..engines import Card, Model, Task, check_model
from ..engines.cards import CARD, CHECK, ONNX, load_model, sha256_of
from . import export
from .export import OPSET
from .stills import StillSet, open_stills, shards_of
from .stills_scores import StillsEvaluation, score_answers
from .stills_training import StillsTrained, open_stills_training
from .training import CURVE, RECIPE

__all__ = ["GEOMETRY_INPUT", "export_stills_model", "export_stills_network", "write_stills_metrics"]

log = logging.getLogger(__name__)

GEOMETRY_INPUT = "geometry"


class _Answers(nn.Module):
    """The network with what its task means: probabilities of both classes, or the number."""

    def __init__(self, network: nn.Module, task: Task) -> None:
        super().__init__()
        self.network = network
        self.output, self.regression = task.output, task.kind == "regression"

    def forward(self, images: Tensor, geometry: Tensor | None = None) -> Tensor:
        inputs = (images,) if geometry is None else (images, geometry)
        values_B1 = self.network(*inputs)[self.output]
        if self.regression:
            return values_B1
        several_B1 = values_B1.sigmoid()
        return torch.cat([1 - several_B1, several_B1], dim=1)


def export_stills_network(network: Any, task: Task, side: int, path: Path) -> None:
    """Write ``network`` as ONNX for images of (side, side) pixels."""
    try:
        import onnx
        import onnxscript  # noqa: F401  (torch's exporter needs it)
    except ImportError as error:
        raise MissingDependency(f"export needs onnx and onnxscript ({error}); "
                                "pip install 'xfel-classify[learn]'") from error
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    batch = torch.export.Dim("batch", min=1)
    example: tuple[Tensor, ...] = (torch.zeros(2, 1, side, side),)
    names = ["images"]
    if network.uses_geometry:
        example += (torch.tensor([[150.0, 0.1, 1.0, 1.0]] * 2),)
        names.append(GEOMETRY_INPUT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            _Answers(network, task).eval(), example, dynamo=True, opset_version=OPSET,
            input_names=names, output_names=[task.output], optimize=True,
            dynamic_shapes=tuple({0: batch} for _ in example), verbose=False)
    assert program is not None
    stored = program.model_proto
    export._strip(stored)
    onnx.checker.check_model(stored, full_check=True)
    path.write_bytes(stored.SerializeToString(deterministic=True))


def expected_answers(network: Any, task: Task, images_BHW: np.ndarray,
                     geometry_B4: np.ndarray) -> np.ndarray:
    """(B, K) of ``network`` in float64."""
    answers = _Answers(network, task).double().eval()
    try:
        with torch.inference_mode():
            inputs = [torch.from_numpy(images_BHW.astype(np.float64))[:, None]]
            if network.uses_geometry:
                inputs.append(torch.from_numpy(geometry_B4.astype(np.float64)))
            return answers(*inputs).numpy()
    finally:
        network.float()


def _check_images(trained: StillsTrained, stills: StillSet) -> tuple[np.ndarray, np.ndarray]:
    """Six quadrants over the range of answers, one with a gap, an empty and a saturated one."""
    order = np.argsort(trained.answers_N)
    chosen = order[np.linspace(0, len(order) - 1, 6).astype(int)]
    images = stills.images(chosen)
    hurt = images[2].copy()
    hurt[len(hurt) // 3:len(hurt) // 2] = 0
    more = [hurt, np.zeros_like(hurt), np.full_like(hurt, 255)]
    geometry = stills.geometry_N4[chosen]
    return (np.stack([*images, *more]).astype(np.float32),
            np.concatenate([geometry, geometry[[2, 0, 0]]]))


def export_stills_model(trained_or_dir: StillsTrained | str | Path, target: str | Path,
                        overwrite: bool = False) -> Model:
    """Write the model directory ``target`` from a finished training and verify it.

    The directory appears whole or not at all; an existing one is replaced only with
    ``overwrite``.
    """
    trained = trained_or_dir if isinstance(trained_or_dir, StillsTrained) \
        else open_stills_training(trained_or_dir)
    target = Path(target)
    if (target / CARD).exists() and not overwrite:
        raise OutputExists(f"{target} already holds a model; give another directory or allow "
                           "overwriting")
    recipe = trained.recipe
    stills = open_stills(shards_of(recipe, "validation"))
    images, geometry = _check_images(trained, stills)
    stills.close()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export") as place:
        directory = Path(place) / "model"
        directory.mkdir()
        export_stills_network(trained.network, recipe.task, recipe.window.height,
                              directory / ONNX)
        more = {"geometry": geometry} if trained.network.uses_geometry else {}
        np.savez_compressed(directory / CHECK, allow_pickle=False, images=images, **more, **{
            recipe.task.output: expected_answers(trained.network, recipe.task, images, geometry)})
        for name in (RECIPE, CURVE):
            if (trained.directory / name).exists():
                shutil.copy(trained.directory / name, directory / name)
        export._write_card(directory / CARD, _card(trained, directory))
        report = check_model(directory)
        if not report.passed:
            raise ModelInvalid(f"the exported network does not reproduce torch's answers:\n"
                               f"{report}\nlower the opset or change the network")
        log.info("%s", report)
        target.mkdir(exist_ok=True)
        for path in sorted(directory.iterdir(), key=lambda p: p.name == CARD):
            path.replace(target / path.name)        # the card last: it makes the model valid
    return load_model(target)


def _card(trained: StillsTrained, directory: Path) -> Card:
    recipe, how = trained.recipe, trained.recipe.optimiser
    scores = score_answers(recipe.task, trained.answers_N, trained.labels)
    task = recipe.task
    if task.kind == "classes" and not task.threshold_chosen:
        task = msgspec.structs.replace(task, threshold_chosen="stated in the recipe")
    pools = sorted({int(pool) for pool in np.unique(trained.labels["geometry"][:, 3])})
    counts = {name: len_of(recipe, name) for name in ("training", "validation", "test")}
    return Card(
        name=recipe.name, version=recipe.version, onnx_sha256=sha256_of(directory / ONNX),
        tasks=[task], window=recipe.window, summary=recipe.summary,
        geometry=GEOMETRY_INPUT if trained.network.uses_geometry else "", pools=pools,
        architecture=recipe.architecture, detectors=recipe.detectors,
        photon_energy_eV=recipe.photon_energy_eV, licence=recipe.licence,
        tolerance=recipe.tolerance,
        provenance={
            "recipe": RECIPE, "recipe_sha256": recipe.sha256, "seed": recipe.seed,
            "parameters": sum(p.numel() for p in trained.network.parameters()),
            "images": counts,
            "seeds": {name: [split.seed for split in getattr(recipe.data, name)]
                      for name in ("training", "validation", "test", "shifted")},
            "optimiser": f"{how.kind}, learning rate {how.learning_rate}, {how.schedule}, batch "
                         f"{how.batch}, {how.epochs} epochs",
            "torch": torch.__version__.split("+")[0], "opset": OPSET,
        },
        metrics={"validation": {name: round(float(value), 4)
                                for name, value in scores.summary().items()}})


def len_of(recipe: Any, split: str) -> int:
    """Images of a split."""
    return sum(len(shard) for shard in shards_of(recipe, split))


def write_stills_metrics(model: Model, name: str, evaluation: StillsEvaluation,
                         command: str) -> Model:
    """Keep an evaluation in the model's card, under ``metrics.<name>``; the model is read again."""
    if evaluation.sha256 != model.sha256:
        raise ModelInvalid(f"the evaluation is of network {evaluation.sha256[:12]}..., the model "
                           f"in {model.directory} is {model.sha256[:12]}...; evaluate it again")
    metrics = {**model.card.metrics, name: evaluation.as_metrics(command)}
    export._write_card(model.directory / CARD, msgspec.structs.replace(model.card,
                                                                       metrics=metrics))
    return load_model(model.directory)
