"""How well a model does on runs whose truth is known: the paper's table, one line per run.

Sensitivity = TP / (TP + FN), specificity = TN / (TN + FP), accuracy = right / events.
Axes: N events.
"""
from __future__ import annotations

import datetime
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..core import ConfigurationError
from ..engines import Model, find_model, open_engine
from .datasets import CachedRun, open_runs
from .recipes import Recipe, model_recipe, runs_of

__all__ = ["Evaluation", "RunScore", "choose_threshold", "evaluate", "evaluate_recipe",
           "score_run", "table"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunScore:
    """One line of the table; counts of events."""

    name: str
    true_positive: int
    false_negative: int
    false_positive: int
    true_negative: int

    @property
    def events(self) -> int:
        return (self.true_positive + self.false_negative + self.false_positive
                + self.true_negative)

    @property
    def hit_fraction(self) -> float:
        return _share(self.true_positive + self.false_negative, self.events)

    @property
    def sensitivity(self) -> float:
        """NaN for a run without hits."""
        return _share(self.true_positive, self.true_positive + self.false_negative)

    @property
    def specificity(self) -> float:
        """NaN for a run without misses."""
        return _share(self.true_negative, self.true_negative + self.false_positive)

    @property
    def accuracy(self) -> float:
        return _share(self.true_positive + self.true_negative, self.events)

    @property
    def balanced_accuracy(self) -> float:
        return (self.sensitivity + self.specificity) / 2


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")


def _worst(shares: Sequence[float]) -> float:
    known = [share for share in shares if not math.isnan(share)]
    return min(known, default=float("nan"))


@dataclass(frozen=True)
class Evaluation:
    """Scores of one model on several runs, at one threshold."""

    model: str
    sha256: str
    backend: str
    threshold: float
    runs: tuple[RunScore, ...]
    scores: tuple[np.ndarray, ...] = ()     # of the positive class, one (N,) array per run
    labels: tuple[np.ndarray, ...] = ()

    @property
    def pooled(self) -> RunScore:
        return RunScore("all", *(sum(getattr(run, name) for run in self.runs) for name in (
            "true_positive", "false_negative", "false_positive", "true_negative")))

    @property
    def worst_sensitivity(self) -> float:
        """Of the runs that have hits."""
        return _worst([run.sensitivity for run in self.runs])

    @property
    def worst_specificity(self) -> float:
        """Of the runs that have misses."""
        return _worst([run.specificity for run in self.runs])

    def __str__(self) -> str:
        return table([*self.runs, self.pooled])

    def as_metrics(self, command: str) -> dict[str, Any]:
        """What a card keeps of an evaluation."""
        return {
            "date": datetime.date.today().isoformat(), "command": command,
            "backend": self.backend, "threshold": self.threshold,
            "worst_sensitivity": round(self.worst_sensitivity, 4),
            "worst_specificity": round(self.worst_specificity, 4),
            "accuracy": round(self.pooled.accuracy, 4),
            "runs": [{"run": run.name, "events": run.events,
                      "hit_fraction": round(run.hit_fraction, 4),
                      "sensitivity": round(run.sensitivity, 4),
                      "specificity": round(run.specificity, 4),
                      "accuracy": round(run.accuracy, 4)} for run in self.runs],
        }


def table(rows: Sequence[RunScore]) -> str:
    """Markdown table in the paper's form: run, events, % hit, Sen, Spe, Acc."""
    lines = ["| run | events | % hit | Sen | Spe | Acc |", "|---|---|---|---|---|---|"]
    lines += [f"| {row.name} | {row.events} | {row.hit_fraction:.4f} | {row.sensitivity:.4f} | "
              f"{row.specificity:.4f} | {row.accuracy:.4f} |" for row in rows]
    return "\n".join(lines)


def score_run(name: str, scores_N: np.ndarray, labels_N: np.ndarray,
              threshold: float) -> RunScore:
    """Counts of a run: an event is called a hit when its score is at least ``threshold``."""
    called_N, truth_N = np.asarray(scores_N) >= threshold, np.asarray(labels_N) == 1
    return RunScore(name, int((called_N & truth_N).sum()), int((~called_N & truth_N).sum()),
                    int((called_N & ~truth_N).sum()), int((~called_N & ~truth_N).sum()))


AS_GOOD = 0.1
"""Of the error that a target allows: thresholds are not told apart by less."""


def choose_threshold(scores_N: np.ndarray, labels_N: np.ndarray, runs_N: np.ndarray,
                     sensitivity: float = 0.98, specificity: float = 0.97,
                     pseudo_events: float = 1000.0) -> tuple[float, float]:
    """(threshold, margin) that maximises the worst run's margin over both targets.

    The margin of a run is the smaller of Sen - ``sensitivity`` and Spe - ``specificity``, each
    divided by the error that the target allows (1 - target), so that 1 is perfection.  A run's
    share is taken together with ``pseudo_events`` that do as all runs do: of a run with thirty
    hits a single one says little about the run.  Margins within :data:`AS_GOOD` of the best are as
    good, which is what the validation runs can tell; the middle one (in log-odds) of the thresholds
    that reach them is taken, far from where either kind of event begins to be lost.
    """
    odds = np.linspace(-6.0, 6.0, 481)
    all_logits_N = _log_odds(np.asarray(scores_N, np.float64))
    pooled = {}
    for truth in (True, False):
        values = np.sort(all_logits_N[(np.asarray(labels_N) == 1) == truth])
        pooled[truth] = np.searchsorted(values, odds, side="left") / max(1, len(values))
    margins = np.full(len(odds), np.inf)
    for run in np.unique(runs_N):
        chosen = runs_N == run
        logits_N = all_logits_N[chosen]
        truth_N = labels_N[chosen] == 1
        for truth, target, below in ((True, sensitivity, False), (False, specificity, True)):
            values = np.sort(logits_N[truth_N == truth])
            if len(values) == 0:
                continue
            share = (np.searchsorted(values, odds, side="left") + pseudo_events * pooled[truth]
                     ) / (len(values) + pseudo_events)
            reached = share if below else 1 - share
            margins = np.minimum(margins, (reached - target) / (1 - target))
    best = np.nonzero(margins >= margins.max() - AS_GOOD)[0]
    middle = float(odds[best[len(best) // 2]])
    return round(float(1 / (1 + np.exp(-middle))), 4), float(margins.max())


def _log_odds(scores_N: np.ndarray) -> np.ndarray:
    clipped = np.clip(scores_N, 1e-7, 1 - 1e-7)
    return np.log(clipped / (1 - clipped))


def evaluate(model: Model | str | Path, runs: Sequence[CachedRun], backend: str = "auto",
             task: str = "", threshold: float | None = None) -> Evaluation:
    """Score every event of ``runs`` with ``model`` at the threshold of its card.

    ``task`` is the yes/no task to judge (default: the card's first).
    """
    model = find_model(model)
    asked = model.card.task(task) if task else model.card.tasks[0]
    if not asked.positive:
        raise ConfigurationError(f"task {asked.name} of model {model.name} has no positive class; "
                                 "sensitivity needs one")
    threshold = asked.threshold if threshold is None else threshold
    rows, all_scores = [], []
    with open_engine(model, backend=backend) as engine:
        for run in runs:
            scores_N = np.concatenate([
                engine.infer(images_BHW)[asked.output][:, asked.positive_index]
                for images_BHW in run.blocks(model.window)])
            row = score_run(f"{run.run.preset} {run.run.seed}/{run.run.run}", scores_N,
                            run.labels_N, threshold)
            log.info("%s: Sen %.4f Spe %.4f", row.name, row.sensitivity, row.specificity)
            rows.append(row)
            all_scores.append(scores_N)
    return Evaluation(model.name, model.sha256, engine.name, threshold, tuple(rows),
                      tuple(all_scores), tuple(run.labels_N for run in runs))


def evaluate_recipe(model: Model | str | Path, split: str = "test",
                    recipe: Recipe | str | Path | None = None, backend: str = "auto",
                    processes: int = 1) -> Evaluation:
    """Evaluate on the runs of a recipe's split ("test", "shifted", "validation").

    The recipe is the model's own ``recipe.toml`` unless another is given.
    """
    model = find_model(model)
    runs = runs_of(model_recipe(model, recipe), split)
    if not runs:
        raise ConfigurationError(f"recipe of model {model.name} has no runs in [[data.{split}]]; "
                                 "valid splits are training, validation, test, shifted")
    return evaluate(model, open_runs(runs, processes), backend)
