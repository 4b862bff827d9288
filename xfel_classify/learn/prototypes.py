"""Prototypes: a new question answered from a few labels, by the nearest class mean.

The embedding of a trained network (what its last layer reads) stays as it is.  Each class is the
mean of its labelled images, and an image belongs to the nearest mean, distances measured in units
of the scatter within classes, which is shrunk towards one common variance since labels are few.
That is a linear layer, so that the result is the model's own graph with other weights at its end.

A model with several tasks is cut down to one question first (:func:`single_question`).

Axes: N labelled image, F feature, K class.
"""
from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import tomli_w

from ..core import ConfigurationError, MissingDependency
from ..engines import Model
from ..engines.cards import CARD, CHECK, ONNX, load_model, read_check, sha256_of

__all__ = ["PrototypeLayer", "prototype_layer", "single_question"]

SHRINKAGES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)
FOLDS = 8
HIT_CLASSES = ("miss", "hit")


@dataclass(frozen=True)
class PrototypeLayer:
    """Logits of an image are ``weight_KF @ embedding + bias_K``; ``left_out_NK`` are those of each
    labelled image when it was left out."""

    weight_KF: np.ndarray
    bias_K: np.ndarray
    shrinkage: float
    left_out_NK: np.ndarray

    def logits(self, embedding_NF: np.ndarray) -> np.ndarray:
        """(N, K)."""
        return np.asarray(embedding_NF, np.float64) @ self.weight_KF.T + self.bias_K


def prototype_layer(embedding_NF: np.ndarray, class_N: np.ndarray, classes: int,
                    shrinkages: Sequence[float] = SHRINKAGES) -> PrototypeLayer:
    """The layer that tells the nearest class mean.

    The shrinkage (0: the scatter as measured, 1: the same variance in every direction) is the one
    whose predictions of left-out images are likeliest.  Classes count the same, however rare.
    Raises :class:`ConfigurationError` for a class with fewer than two images.
    """
    embedding_NF = np.asarray(embedding_NF, np.float64)
    class_N = np.asarray(class_N, np.int64)
    counts_K = np.bincount(class_N, minlength=classes)
    if len(counts_K) != classes or counts_K.min() < 2:
        raise ConfigurationError(
            f"prototypes of {classes} classes were asked for; the labels hold "
            f"{', '.join(map(str, counts_K))} images of each; give at least two of every class")
    fold_N = np.zeros(len(class_N), np.int64)
    for one in range(classes):      # neighbours in the run stay together
        own = np.flatnonzero(class_N == one)
        fold_N[own] = np.arange(len(own)) * FOLDS // len(own)
    best, least, left_out_NK = shrinkages[-1], np.inf, np.zeros((len(class_N), classes))
    for shrinkage in shrinkages:
        logits_NK = np.zeros((len(class_N), classes))
        for fold in np.unique(fold_N):
            out_N = fold_N == fold
            if np.bincount(class_N[~out_N], minlength=classes).min() < 1:
                continue
            weight_KF, bias_K = _layer(embedding_NF[~out_N], class_N[~out_N], classes, shrinkage)
            logits_NK[out_N] = embedding_NF[out_N] @ weight_KF.T + bias_K
        loss_N = (np.logaddexp.reduce(logits_NK, 1)
                  - logits_NK[np.arange(len(class_N)), class_N])
        loss = float((loss_N / counts_K[class_N]).sum() / classes)
        if loss < least:
            best, least, left_out_NK = shrinkage, loss, logits_NK
    return PrototypeLayer(*_layer(embedding_NF, class_N, classes, best), best, left_out_NK)


def _layer(embedding_NF: np.ndarray, class_N: np.ndarray, classes: int, shrinkage: float
           ) -> tuple[np.ndarray, np.ndarray]:
    mean_KF = np.stack([embedding_NF[class_N == one].mean(0) for one in range(classes)])
    within = embedding_NF - mean_KF[class_N]
    weight_N = 1.0 / np.bincount(class_N, minlength=classes)[class_N] / classes
    scatter_FF = (within * weight_N[:, None]).T @ within
    level = max(float(np.trace(scatter_FF)) / len(scatter_FF), 1e-12)
    scatter_FF = (1 - shrinkage) * scatter_FF + shrinkage * level * np.eye(len(scatter_FF))
    weight_KF = np.linalg.solve(scatter_FF, mean_KF.T).T
    return weight_KF, -0.5 * (weight_KF * mean_KF).sum(1)


def single_question(model: Model, task_name: str, directory: str | Path) -> Model:
    """``model`` cut down to one yes/no task, written to ``directory`` as a model of its own.

    The task is then called ``hit`` with the classes miss and hit, so that a run takes its answer
    for what to keep.  What only other tasks need, the geometry among it, is left out.  Raises
    :class:`ConfigurationError` when the model has no such yes/no task.
    """
    try:
        import onnx
        from onnx.utils import Extractor
    except ImportError as error:
        raise MissingDependency(f"a model is cut down with onnx ({error}); "
                                "pip install 'xfel-classify[learn]'") from error
    tasks = {task.name: task for task in model.card.tasks}
    asked = tasks.get(task_name)
    yes_no = [task.name for task in model.card.tasks if task.positive]
    if asked is None or not asked.positive:
        raise ConfigurationError(
            f"model {model.name} was asked about its task {task_name!r}; its yes/no tasks are "
            f"{', '.join(yes_no) or 'none'}; name one of these with --task")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    whole = onnx.load(model.onnx_path)
    part = Extractor(whole).extract_model([model.card.input], [asked.output])
    part.producer_name, part.producer_version = whole.producer_name, ""
    part.ir_version = whole.ir_version
    del part.graph.value_info[:]
    (directory / ONNX).write_bytes(part.SerializeToString(deterministic=True))
    images_BHW, _, expected = read_check(model)
    np.savez_compressed(directory / CHECK, allow_pickle=False, images=images_BHW,
                        **{asked.output: expected[asked.output]})
    if (model.directory / "recipe.toml").exists():
        shutil.copyfile(model.directory / "recipe.toml", directory / "recipe.toml")
    classes = list(HIT_CLASSES) if asked.positive_index == 1 else list(HIT_CLASSES[::-1])
    task = msgspec.structs.replace(asked, name="hit", classes=classes, positive="hit")
    card = msgspec.structs.replace(model.card, tasks=[task], geometry="",
                                   onnx_sha256=sha256_of(directory / ONNX))
    fields = {key: value for key, value in msgspec.to_builtins(card).items()
              if value not in ("", [], {})}
    (directory / CARD).write_text(tomli_w.dumps(fields), encoding="utf-8")
    return load_model(directory)
