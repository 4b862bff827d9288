"""How well single bodies are told from all else, on every preset of a split.

Accuracy says little where few images are good: F1, precision and recall stand beside it, and the
errors of either kind [LI-HAN17; IGN21].

Axes: N image.
"""
from __future__ import annotations

import datetime
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..core import ConfigurationError
from ..engines import Model, find_model, open_engine
from .quality_reports import ShapeScore, shape_score
from .recipes import Recipe, model_recipe
from .selection_table import Selection, judged
from .spi_bodies import KINDS, open_bodies, shards_of

__all__ = ["COLUMNS", "QualityEvaluation", "QualityScores", "best_f1", "evaluate_quality",
           "quality_row", "quality_table", "score_quality"]

BATCH = 64
COLUMNS = ("images of", "images", "good", "accuracy %", "balanced %", "good called bad %",
           "bad called good %", "precision %", "recall %", "F1 %",
           *(f"{kind} right %" for kind in KINDS))


def best_f1(score_N: np.ndarray, good_N: np.ndarray) -> tuple[float, float]:
    """(threshold, F1): scores at or above the threshold are called good.

    The threshold lies halfway between two scores that occur; of equals the highest.
    """
    order = np.argsort(-np.asarray(score_N, np.float64), kind="stable")
    sorted_N = np.asarray(score_N, np.float64)[order]
    right_N = np.cumsum(np.asarray(good_N, bool)[order])
    f1_N = 2 * right_N / (np.arange(1, len(order) + 1) + max(1, int(np.sum(good_N))))
    last_N = np.append(sorted_N[1:] < sorted_N[:-1], True)     # equal scores go together
    place = int(np.where(last_N, f1_N, -1.0).argmax())
    below = sorted_N[place + 1] if place + 1 < len(order) else 0.0
    return float((sorted_N[place] + below) / 2), float(f1_N[place])


@dataclass(frozen=True)
class QualityScores:
    """Of one set of images at ``threshold``; ``right`` is the share of each kind called right."""

    name: str
    images: int
    threshold: float
    cross_entropy: float
    selection: Selection
    errors: ShapeScore
    best_threshold: float
    best_f1: float
    right: Mapping[str, float]

    @property
    def accuracy(self) -> float:
        return self.selection.accuracy

    @property
    def balanced(self) -> float:
        """Mean of the shares of good and of other images called right."""
        return 1 - (self.errors.fnr + self.errors.fpr) / 2

    def summary(self) -> dict[str, float]:
        """What a history and a card keep."""
        return {"validation_loss": self.cross_entropy, "accuracy": self.accuracy,
                "f1": _number(self.selection.f1), "best_f1": self.best_f1,
                "precision": _number(self.selection.precision),
                "recall": _number(self.selection.recall)}


def _number(value: float) -> float:
    """0 where nothing was selected: histories hold numbers only."""
    return 0.0 if math.isnan(value) else value


def score_quality(name: str, score_N: np.ndarray, good_N: np.ndarray, kind_N: np.ndarray,
                  threshold: float) -> QualityScores:
    """Scores of being good against the truth; ``kind_N`` numbers :data:`.spi_bodies.KINDS`."""
    score_N, good_N = np.asarray(score_N, np.float64), np.asarray(good_N, bool)
    called_N = score_N >= threshold
    truth_N = np.clip(np.where(good_N, score_N, 1 - score_N), 1e-7, 1)
    limit, f1 = best_f1(score_N, good_N)
    return QualityScores(
        name, len(score_N), threshold, float(-np.log(truth_N).mean()),
        judged(name, called_N, good_N), shape_score(name, score_N, good_N, threshold), limit, f1,
        {kind: float((called_N == good_N)[kind_N == number].mean())
         for number, kind in enumerate(KINDS) if (kind_N == number).any()})


@dataclass(frozen=True)
class QualityEvaluation:
    """Scores of a model on a split, one part for every preset."""

    model: str
    sha256: str
    backend: str
    parts: Mapping[str, QualityScores]

    def __str__(self) -> str:
        return quality_table(list(self.parts.values()))

    def as_metrics(self, command: str) -> dict[str, Any]:
        """What a card keeps of an evaluation."""
        kept: dict[str, Any] = {"date": datetime.date.today().isoformat(), "command": command,
                                "backend": self.backend}
        for preset, one in self.parts.items():
            row = {"images": one.images, "accuracy": one.accuracy, "balanced": one.balanced,
                   "f1": one.selection.f1, "precision": one.selection.precision,
                   "recall": one.selection.recall, "good_called_bad": one.errors.fnr,
                   "bad_called_good": one.errors.fpr}
            kept[preset] = {name: value if isinstance(value, int) else round(float(value), 4)
                            for name, value in row.items() if np.isfinite(value)}
        return kept


def quality_table(scores: Sequence[QualityScores]) -> str:
    """Markdown, one line for each set of images; shares in percent."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (
        COLUMNS, ["---"] * len(COLUMNS), *map(quality_row, scores)))


def quality_row(one: QualityScores) -> list[str]:
    """What stands below :data:`COLUMNS` for one set of images."""
    shares = (one.accuracy, one.balanced, one.errors.fnr, one.errors.fpr,
              one.selection.precision, one.selection.recall, one.selection.f1,
              *(one.right.get(kind, math.nan) for kind in KINDS))
    return [one.name, str(one.images), str(one.errors.good),
            *("-" if math.isnan(value) else f"{100 * value:.2f}" for value in shares)]


def evaluate_quality(model: Model | str | Path, split: str = "test",
                     recipe: Recipe | str | Path | None = None, backend: str = "auto",
                     processes: int = 1) -> QualityEvaluation:
    """Evaluate a model on a split, preset by preset, at the threshold of its card."""
    model = find_model(model)
    recipe = model_recipe(model, recipe)
    shards = shards_of(recipe, split)
    if not shards:
        raise ConfigurationError(f"recipe of model {model.name} has no images in [[data.{split}]];"
                                 " valid splits are training, validation, test, shifted")
    task = model.card.tasks[0]
    parts: dict[str, QualityScores] = {}
    with open_engine(model, backend) as engine:
        for preset in dict.fromkeys(shard.preset for shard in shards):
            images = open_bodies([one for one in shards if one.preset == preset], recipe.window,
                                 processes)
            score_N = np.concatenate([
                engine.infer(images.images(chosen))[task.output][:, task.positive_index]
                for chosen in images.batches(BATCH)])
            parts[preset] = score_quality(preset, score_N, images.good_N, images.kind_N,
                                          task.threshold)
            images.close()
    return QualityEvaluation(model.name, model.sha256, engine.name, parts)
