"""How well lattices and resolution are judged: the figures of [CICH23; MEN24].

Resolution: Pearson and Spearman correlation of 1/d, share within 0.07 per angstrom, and the
quotient of a crystal's d at two distances.  Lattice: accuracy, Jaccard index, area under the ROC
curve, and accuracy against the mis-setting angle.

Axes: N images.
"""
from __future__ import annotations

import datetime
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..core import ConfigurationError
from ..engines import Model, Task, find_model, open_engine
from .recipes import Recipe, model_recipe
from .stills import StillSet, open_stills, shards_of

__all__ = ["LatticeScores", "ResolutionScores", "StillsEvaluation", "evaluate_stills",
           "score_answers"]

log = logging.getLogger(__name__)

WITHIN = 0.07                           # 1/A
ANGLES_DEG = (0.0, 0.3, 1.0, 3.0, 10.0, 30.0, 90.0, 180.0)


def pearson(one_N: np.ndarray, two_N: np.ndarray) -> float:
    """Linear correlation; NaN when one does not vary."""
    a, b = (np.asarray(v, np.float64) - np.mean(v, dtype=np.float64) for v in (one_N, two_N))
    norm = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / norm) if norm > 0 else float("nan")


def ranks(values_N: np.ndarray) -> np.ndarray:
    """Ranks from 0; equal values share the mean of theirs."""
    _, place, count = np.unique(values_N, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count + 1) / 2)[place]


@dataclass(frozen=True)
class ResolutionScores:
    """Of predicted against true 1/d."""

    images: int
    pearson: float
    spearman: float
    within: float                   # share with an error of 1/d below 0.07 per angstrom
    mean_error: float               # of 1/d, absolute, 1/A: the training's loss
    median_d_error: float           # of d, relative

    @property
    def figure_of_merit(self) -> float:
        """Larger is better; decides the epoch that is kept."""
        return 1.0 - self.mean_error

    def summary(self) -> dict[str, float]:
        return {"validation_loss": self.mean_error, "pearson": self.pearson,
                "spearman": self.spearman, "within": self.within}

    def __str__(self) -> str:
        return ("| images | Pearson | Spearman | within 0.07/A | mean error 1/A | median error d |"
                "\n|---|---|---|---|---|---|\n"
                f"| {self.images} | {self.pearson:.4f} | {self.spearman:.4f} | {self.within:.4f} "
                f"| {self.mean_error:.4f} | {self.median_d_error:.4f} |")


@dataclass(frozen=True)
class LatticeScores:
    """Of the question "more than one lattice?"; ``by_angle`` maps (from, to) degrees to
    (images, sensitivity) of the shots with several lattices, by their smallest mis-setting."""

    images: int
    accuracy: float
    balanced_accuracy: float
    jaccard: float
    roc_area: float
    cross_entropy: float
    by_angle: Mapping[tuple[float, float], tuple[int, float]]

    @property
    def figure_of_merit(self) -> float:
        return self.balanced_accuracy

    def summary(self) -> dict[str, float]:
        return {"validation_loss": self.cross_entropy, "accuracy": self.accuracy,
                "balanced_accuracy": self.balanced_accuracy, "roc_area": self.roc_area}

    def __str__(self) -> str:
        lines = ["| images | accuracy | balanced | Jaccard | ROC area |", "|---|---|---|---|---|",
                 f"| {self.images} | {self.accuracy:.4f} | {self.balanced_accuracy:.4f} | "
                 f"{self.jaccard:.4f} | {self.roc_area:.4f} |", "",
                 "| smallest mis-setting | images | called multiple |", "|---|---|---|"]
        lines += [f"| {low:g} to {high:g} deg | {count} | {share:.4f} |"
                  for (low, high), (count, share) in self.by_angle.items() if count]
        return "\n".join(lines)


def score_answers(task: Task, answers_N: np.ndarray,
                  labels: Mapping[str, np.ndarray]) -> ResolutionScores | LatticeScores:
    """Scores of 1/d (regression) or of the probability of several lattices (classes)."""
    answers = np.asarray(answers_N, np.float64)
    if task.kind == "regression":
        truth = labels["inverse_d_A"].astype(np.float64)
        error = np.abs(answers - truth)
        d = 1 / np.maximum(answers, 1e-3)
        return ResolutionScores(
            len(answers), pearson(answers, truth), pearson(ranks(answers), ranks(truth)),
            float((error < WITHIN).mean()), float(error.mean()),
            float(np.median(np.abs(d * truth - 1))))
    return _lattice_scores(answers, labels["n_lattices"] > 1, labels["misset_deg"],
                           task.threshold)


def _lattice_scores(answers: np.ndarray, truth: np.ndarray, angle: np.ndarray,
                    threshold: float) -> LatticeScores:
    called = answers >= threshold
    both, either = (called & truth).sum(), (called | truth).sum()
    sensitivity = float(called[truth].mean()) if truth.any() else float("nan")
    specificity = float((~called[~truth]).mean()) if (~truth).any() else float("nan")
    n_true, n_false = int(truth.sum()), int((~truth).sum())
    area = float("nan")
    if n_true and n_false:
        area = (ranks(answers)[truth].sum() - n_true * (n_true - 1) / 2) / (n_true * n_false)
    likelihood = np.clip(np.where(truth, answers, 1 - answers), 1e-7, 1)
    by_angle = {}
    for low, high in zip(ANGLES_DEG[:-1], ANGLES_DEG[1:], strict=True):
        chosen = truth & (angle >= low) & (angle < high)
        by_angle[low, high] = (int(chosen.sum()),
                               float(called[chosen].mean()) if chosen.any() else float("nan"))
    return LatticeScores(len(answers), float((called == truth).mean()),
                         (sensitivity + specificity) / 2, float(both / max(either, 1)),
                         float(area), float(-np.log(likelihood).mean()), by_angle)


@dataclass(frozen=True)
class StillsEvaluation:
    """Scores of a model on a split, with what they were made of."""

    model: str
    sha256: str
    backend: str
    scores: ResolutionScores | LatticeScores
    answers_N: np.ndarray
    labels: Mapping[str, np.ndarray]

    def __str__(self) -> str:
        return str(self.scores)

    def as_metrics(self, command: str) -> dict[str, Any]:
        """What a card keeps of an evaluation."""
        kept = {name: round(float(value), 4) for name, value in vars(self.scores).items()
                if isinstance(value, float) and np.isfinite(value)}
        return {"date": datetime.date.today().isoformat(), "command": command,
                "backend": self.backend, "images": self.scores.images, **kept}


def evaluate_stills(model: Model | str | Path, split: str = "test",
                    recipe: Recipe | str | Path | None = None, backend: str = "auto",
                    processes: int = 1) -> StillsEvaluation:
    """Evaluate a lattice or resolution model on the stills of a recipe's split."""
    model = find_model(model)
    shards = shards_of(model_recipe(model, recipe), split)
    if not shards:
        raise ConfigurationError(f"recipe of model {model.name} has no stills in [[data.{split}]];"
                                 " valid splits are training, validation, test, shifted")
    stills = open_stills(shards, processes)
    answers_N = model_answers(model, stills, backend)
    stills.close()
    scores = score_answers(model.card.tasks[0], answers_N, stills.labels)
    return StillsEvaluation(model.name, model.sha256, backend, scores, answers_N, stills.labels)


def model_answers(model: Model, stills: StillSet, backend: str = "auto") -> np.ndarray:
    """float32 (N,): probability of the positive class, or the number, of the card's first task."""
    task = model.card.tasks[0]
    column = 0 if task.kind == "regression" else task.positive_index
    with open_engine(model, backend) as engine:
        return np.concatenate([
            engine.infer(stills.images(chosen), stills.geometry_N4[chosen])[task.output][:, column]
            for chosen in stills.batches(32)])
