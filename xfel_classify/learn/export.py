"""From a finished training to a model directory: ONNX, check values, card.

Axes: B image, H row, W column, K class, N validation image.
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
import tomli_w
import torch
from torch import Tensor, nn

from ..core import MissingDependency, ModelInvalid, OutputExists
from ..engines import Card, Model, check_model
from ..engines.cards import CARD, CHECK, ONNX, load_model, sha256_of
from .datasets import ImageSet, open_runs
from .evaluation import Evaluation, choose_threshold
from .recipes import runs_of
from .training import CURVE, RECIPE, Trained, open_trained

__all__ = ["OPSET", "export_model", "export_network", "write_metrics"]

log = logging.getLogger(__name__)

OPSET, IR_VERSION = 18, 8
"""Readable by every onnxruntime since 1.14."""


class _Probabilities(nn.Module):
    """The network with its softmax; outputs in the order of ``network.outputs``."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(logits.softmax(1) for logits in self.network(images).values())


def export_network(network: Any, height: int, width: int, path: Path) -> None:
    """Write ``network`` as ONNX: input "images" (B, 1, H, W), outputs named by the network.

    The file holds no source paths and no training-only nodes.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401  (torch's exporter needs it)
    except ImportError as error:
        raise MissingDependency(f"export needs onnx and onnxscript ({error}); "
                                "pip install 'xfel-classify[learn]'") from error
    # it warns about torchvision, which nothing here needs
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    network = network.eval()
    example = (torch.zeros(2, 1, height, width),)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            _Probabilities(network).eval(), example, dynamo=True, opset_version=OPSET,
            input_names=["images"], output_names=list(network.outputs), optimize=True,
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},), verbose=False)
    assert program is not None
    stored = program.model_proto
    _strip(stored)
    onnx.checker.check_model(stored, full_check=True)
    path.write_bytes(stored.SerializeToString(deterministic=True))


def _strip(stored: Any) -> None:
    """Remove doc strings and exporter metadata: stack traces with paths of this machine."""
    del stored.metadata_props[:]
    stored.ir_version = IR_VERSION
    stored.doc_string = ""
    stored.producer_name, stored.producer_version = "xfel-classify", ""
    graph = stored.graph
    graph.doc_string = ""
    del graph.metadata_props[:]
    del graph.value_info[:]
    for part in (*graph.node, *graph.initializer, *graph.input, *graph.output):
        part.doc_string = ""
        del part.metadata_props[:]


def check_images(trained: Trained, images: ImageSet, threshold: float) -> np.ndarray:
    """Eight images as the network sees them, float32 (8, H, W): easy, hard and degenerate ones.

    Hits and misses (typical and nearest to the threshold), a hit with a gap, hot and saturated
    pixels, an empty image and a saturated one.
    """
    order_N = np.argsort(np.abs(trained.scores_N - threshold), kind="stable")
    hits = [int(n) for n in order_N if trained.labels_N[n] == 1]
    misses = [int(n) for n in order_N if trained.labels_N[n] != 1]
    chosen = [hits[0], hits[len(hits) // 2], hits[-1], misses[0], misses[-1]]
    images_BHW = images.images(chosen)
    clip = images.window.clip if images.window.normalize == "clip" else 1e4
    hurt_HW = images_BHW[1].copy()
    tenth = hurt_HW.shape[0] // 10
    hurt_HW[3 * tenth:3 * tenth + 8, 3 * tenth:3 * tenth + 8] = clip     # a saturated reflection
    hurt_HW[5 * tenth:6 * tenth] = 0.0                                   # a gap
    hurt_HW[-tenth:, -tenth:] -= 1.0
    hurt_HW[::67, ::59] = clip                                           # hot pixels
    constant = [np.zeros_like(hurt_HW), np.full_like(hurt_HW, clip)]
    return np.stack([*images_BHW, hurt_HW, *constant]).astype(np.float32)


def export_model(training: Trained | str | Path, target: str | Path,
                 overwrite: bool = False) -> Model:
    """Write the model directory ``target`` from a finished training and verify it.

    The decision threshold is chosen on the validation runs.  Expected outputs of ``check.npz``
    are computed in float64.  The directory appears whole or not at all; an existing one is
    replaced only with ``overwrite``.
    """
    trained = training if isinstance(training, Trained) else open_trained(training)
    target = Path(target)
    if (target / CARD).exists() and not overwrite:
        raise OutputExists(f"{target} already holds a model; give another directory or allow "
                           "overwriting")
    recipe = trained.recipe
    threshold, margin = choose_threshold(trained.scores_N, trained.labels_N, trained.runs_N,
                                         recipe.target.sensitivity, recipe.target.specificity)
    images = ImageSet(open_runs(runs_of(recipe, "validation"), verify=False), recipe.window)
    images_BHW = check_images(trained, images, threshold)
    images.close()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export") as place:
        directory = Path(place) / "model"
        directory.mkdir()
        export_network(trained.network, *recipe.window.shape, directory / ONNX)
        np.savez_compressed(directory / CHECK, allow_pickle=False, images=images_BHW,
                            **expected_outputs(trained.network, images_BHW))
        shutil.copy(trained.directory / RECIPE, directory / RECIPE)
        if (trained.directory / CURVE).exists():
            shutil.copy(trained.directory / CURVE, directory / CURVE)
        _write_card(directory / CARD, _card(trained, threshold, margin, directory))
        report = check_model(directory)
        if not report.passed:
            raise ModelInvalid(f"the exported network does not reproduce torch's answers:\n"
                               f"{report}\nlower the opset or change the network")
        log.info("%s", report)
        target.mkdir(exist_ok=True)
        for path in sorted(directory.iterdir(), key=lambda p: p.name == CARD):
            path.replace(target / path.name)        # the card last: it makes the model valid
    return load_model(target)


def expected_outputs(network: Any, images_BHW: np.ndarray) -> dict[str, np.ndarray]:
    """{output: probabilities (B, K) float64} of ``network`` evaluated in float64."""
    network = network.double().eval()
    try:
        with torch.inference_mode():
            logits = network(torch.from_numpy(images_BHW.astype(np.float64))[:, None])
            return {name: values.softmax(1).numpy() for name, values in logits.items()}
    finally:
        network.float()


def _card(trained: Trained, threshold: float, margin: float, directory: Path) -> Card:
    recipe, how = trained.recipe, trained.recipe.optimiser
    best = max(trained.history, key=lambda row: row["balanced_accuracy"])
    task = msgspec.structs.replace(
        recipe.task, threshold=threshold,
        threshold_chosen=f"on the validation runs: largest worst-run margin over sensitivity "
                         f"{recipe.target.sensitivity} and specificity "
                         f"{recipe.target.specificity} (margin {margin:.2f} of the allowed "
                         f"error)")
    return Card(
        name=recipe.name, version=recipe.version, onnx_sha256=sha256_of(directory / ONNX),
        tasks=[task], window=recipe.window, summary=recipe.summary,
        architecture=recipe.architecture, detectors=recipe.detectors,
        photon_energy_eV=recipe.photon_energy_eV, licence=recipe.licence,
        tolerance=recipe.tolerance,
        provenance={
            "recipe": RECIPE, "recipe_sha256": recipe.sha256, "seed": recipe.seed,
            "parameters": sum(p.numel() for p in trained.network.parameters()),
            "training_images": sum(run.events for run in runs_of(recipe, "training")),
            "training_runs": len(runs_of(recipe, "training")),
            "seeds": {name: [split.seed for split in getattr(recipe.data, name)]
                      for name in ("training", "validation", "test", "shifted")},
            "optimiser": f"{how.kind}, learning rate {how.learning_rate}, {how.schedule}, batch "
                         f"{how.batch}, {how.epochs} epochs; best epoch {best['epoch']}",
            "torch": torch.__version__.split("+")[0], "opset": OPSET,
        },
        metrics={"validation": {"balanced_accuracy": round(best["balanced_accuracy"], 4),
                                "threshold_of_that": 0.5, "worst_run_margin": round(margin, 3)}},
    )


def _write_card(path: Path, card: Card) -> None:
    fields = {key: value for key, value in msgspec.to_builtins(card).items()
              if value not in ("", [], {})}
    text = "# What this model means.  Written by xfel_classify.learn.export.\n" + tomli_w.dumps(
        fields)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def write_metrics(model: Model, name: str, evaluation: Evaluation, command: str) -> Model:
    """Keep an evaluation in the model's card, under ``metrics.<name>``; the model is read again.

    Raises ``ModelInvalid`` when the evaluation was made with another network.
    """
    if evaluation.sha256 != model.sha256:
        raise ModelInvalid(f"the evaluation is of network {evaluation.sha256[:12]}..., the model "
                           f"in {model.directory} is {model.sha256[:12]}...; evaluate it again")
    metrics = {**model.card.metrics, name: evaluation.as_metrics(command)}
    _write_card(model.directory / CARD, msgspec.structs.replace(model.card, metrics=metrics))
    return load_model(model.directory)
