"""From a finished training to a model directory: ONNX, check values, card.

The graph has the input "images" and, where the network uses it, "geometry" (B, 4); its outputs are
what the tasks of the card promise: probabilities (B, K) or numbers (B, 1).  What differs between
kinds of training is the exhibit of their lesson (:mod:`.lessons`).

Axes: B image, H row, W column, K class.
"""
from __future__ import annotations

import logging
import shutil
import tempfile
import warnings
from collections.abc import Sequence
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
from .lessons import Evaluated, Exhibit, lesson_of
from .recipes import SPLITS, optimiser_words
from .training import CURVE, RECIPE, Trained, open_trained

__all__ = ["GEOMETRY_INPUT", "OPSET", "export_answers", "export_model", "publish",
           "write_metrics"]

log = logging.getLogger(__name__)

OPSET, IR_VERSION = 18, 8
"""Readable by every onnxruntime since 1.14."""

GEOMETRY_INPUT = "geometry"


def export_answers(answers: nn.Module, outputs: Sequence[str], shape: tuple[int, int], path: Path,
                   geometry: bool = False) -> None:
    """Write ``answers`` (one tensor per name of ``outputs``) as ONNX, for images of ``shape``.

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
    batch = torch.export.Dim("batch", min=1)
    example: tuple[Tensor, ...] = (torch.zeros(2, 1, *shape),)
    names = ["images"]
    if geometry:
        example += (torch.tensor([[150.0, 0.1, 1.0, 1.0]] * 2),)
        names.append(GEOMETRY_INPUT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            answers.eval(), example, dynamo=True, opset_version=OPSET, input_names=names,
            output_names=list(outputs), optimize=True,
            dynamic_shapes=tuple({0: batch} for _ in example), verbose=False)
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


def export_model(training: Trained | str | Path, target: str | Path,
                 overwrite: bool = False) -> Model:
    """Write the model directory ``target`` from a finished training and verify it.

    Expected outputs of ``check.npz`` are computed in float64.  The directory appears whole or not
    at all; an existing one is replaced only with ``overwrite``.
    """
    trained = training if isinstance(training, Trained) else open_trained(training)
    target = Path(target)
    if (target / CARD).exists() and not overwrite:
        raise OutputExists(f"{target} already holds a model; give another directory or allow "
                           "overwriting")
    lesson = lesson_of(trained.recipe)
    try:
        shown = lesson.exhibit(trained)
    finally:
        lesson.close()
    outputs = [task.output for task in shown.tasks]
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export") as place:
        directory = Path(place) / "model"
        directory.mkdir()
        export_answers(shown.answers, outputs, trained.recipe.window.shape, directory / ONNX,
                       shown.geometry_B4 is not None)
        more = {} if shown.geometry_B4 is None else {GEOMETRY_INPUT: shown.geometry_B4}
        np.savez_compressed(directory / CHECK, allow_pickle=False, images=shown.images_BHW, **more,
                            **expected_outputs(shown))
        for name in (RECIPE, CURVE):
            if (trained.directory / name).exists():
                shutil.copy(trained.directory / name, directory / name)
        _write_card(directory / CARD, _card(trained, shown, directory))
        return publish(directory, target, "lower the opset or change the network")


def publish(directory: Path, target: Path, advice: str) -> Model:
    """Move the files of a finished model ``directory`` to ``target`` once every runtime gives the
    check values; ``ModelInvalid`` with ``advice`` otherwise."""
    report = check_model(directory)
    if not report.passed:
        raise ModelInvalid(f"the exported network was to give torch's answers on every runtime:\n"
                           f"{report}\n{advice}")
    log.info("%s", report)
    target.mkdir(exist_ok=True)
    for path in sorted(directory.iterdir(), key=lambda p: p.name == CARD):
        path.replace(target / path.name)            # the card last: it makes the model valid
    return load_model(target)


def expected_outputs(shown: Exhibit) -> dict[str, np.ndarray]:
    """{output: (B, K) float64} of the check images, evaluated in float64."""
    answers = shown.answers.double().eval()
    inputs = [torch.from_numpy(shown.images_BHW.astype(np.float64))[:, None]]
    if shown.geometry_B4 is not None:
        inputs.append(torch.from_numpy(shown.geometry_B4.astype(np.float64)))
    try:
        with torch.inference_mode():
            found = answers(*inputs)
        return {task.output: values.numpy()
                for task, values in zip(shown.tasks, found, strict=True)}
    finally:
        answers.float()


def _card(trained: Trained, shown: Exhibit, directory: Path) -> Card:
    recipe = trained.recipe
    return Card(
        name=recipe.name, version=recipe.version, onnx_sha256=sha256_of(directory / ONNX),
        tasks=shown.tasks, window=recipe.window, summary=recipe.summary,
        geometry="" if shown.geometry_B4 is None else GEOMETRY_INPUT, pools=shown.pools,
        architecture=recipe.architecture, detectors=recipe.detectors,
        photon_energy_eV=recipe.photon_energy_eV, licence=recipe.licence,
        tolerance=recipe.tolerance,
        provenance={
            "recipe": RECIPE, "recipe_sha256": recipe.sha256, "seed": recipe.seed,
            "parameters": sum(p.numel() for p in trained.network.parameters()),
            "seeds": {name: [split.seed for split in getattr(recipe.data, name)]
                      for name in SPLITS},
            "optimiser": optimiser_words(recipe.optimiser),
            **shown.provenance,
            "torch": torch.__version__.split("+")[0], "opset": OPSET,
        },
        metrics=shown.metrics)


def _write_card(path: Path, card: Card) -> None:
    fields = {key: value for key, value in msgspec.to_builtins(card).items()
              if value not in ("", [], {})}
    text = "# What this model means.  Written by xfel_classify.learn.export.\n" + tomli_w.dumps(
        fields)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def write_metrics(model: Model, name: str, evaluation: Evaluated, command: str) -> Model:
    """Keep an evaluation in the model's card, under ``metrics.<name>``; the model is read again.

    Raises ``ModelInvalid`` when the evaluation was made with another network.
    """
    if evaluation.sha256 != model.sha256:
        raise ModelInvalid(f"the evaluation is of network {evaluation.sha256[:12]}..., the model "
                           f"in {model.directory} is {model.sha256[:12]}...; evaluate it again")
    metrics = {**model.card.metrics, name: evaluation.as_metrics(command)}
    _write_card(model.directory / CARD, msgspec.structs.replace(model.card, metrics=metrics))
    return load_model(model.directory)
