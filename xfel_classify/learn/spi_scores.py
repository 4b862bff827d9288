"""How well single-particle images are judged, with what their brightness alone would give.

With constant fluence the total number of photons is proportional to the number of copies, so that
a count can be right without a fringe having been read.  Every accuracy of the count is therefore
printed beside that of a one-dimensional classifier that sees the image's sum and nothing else.

Axes: N images, K classes.
"""
from __future__ import annotations

import datetime
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..core import ConfigurationError
from ..engines import Model, Task, find_model, open_engine
from .curves import curves
from .quality_reports import ShapeScore, shape_score
from .recipes import Recipe, model_recipe
from .spi import SpiSet, geometry_rows, label_of, open_spi, shards_of

__all__ = ["Brightness", "SpiEvaluation", "SpiScores", "brightness_alone", "calibration_error",
           "evaluate_spi", "score_spi"]

log = logging.getLogger(__name__)

HARD_PAIR = ("7dx8", "7dx9")
"""The two spikes with a receptor, in models 10 degrees apart; counted apart in every table."""

BINS = 15
FOLDS = 5


@dataclass(frozen=True)
class Brightness:
    """Accuracies that the sum of an image alone reaches; five-fold cross-validated."""

    count: float                # 4-way, the particle told
    single: float               # one copy or several, the particle told
    count_blind: float          # the particle not told
    single_blind: float


def brightness_alone(total_N: np.ndarray, count_N: np.ndarray, particle_N: np.ndarray
                     ) -> Brightness:
    """A normal distribution of log(total) for every (particle, count), with their frequencies.

    Fitted on four fifths of the images and judged on the rest, in turn (every fifth image).
    """
    log_N = np.log(np.maximum(np.asarray(total_N, np.float64), 1e-6))
    count_N, particle_N = np.asarray(count_N).astype(int), np.asarray(particle_N).astype(int)
    counts, particles = np.unique(count_N), np.unique(particle_N)
    told_N, blind_N = np.empty_like(count_N), np.empty_like(count_N)
    folds_N = np.arange(len(log_N)) % FOLDS
    for fold in range(FOLDS):
        judged, fitted = folds_N == fold, folds_N != fold
        density = np.zeros((len(particles), len(counts), int(judged.sum())))
        for i, particle in enumerate(particles):
            for j, count in enumerate(counts):
                values = log_N[fitted & (particle_N == particle) & (count_N == count)]
                if len(values) < 2:
                    continue
                sigma = max(float(values.std()), 1e-3)
                distance = (log_N[judged] - values.mean()) / sigma
                density[i, j] = len(values) / sigma * np.exp(-0.5 * distance ** 2)
        place = np.searchsorted(particles, particle_N[judged])
        told_N[judged] = counts[density[place, :, np.arange(len(place))].argmax(1)]
        blind_N[judged] = counts[density.sum(0).argmax(0)]
    one_N = count_N == 0
    return Brightness(float((told_N == count_N).mean()), float(((told_N == 0) == one_N).mean()),
                      float((blind_N == count_N).mean()), float(((blind_N == 0) == one_N).mean()))


def calibration_error(probability_NK: np.ndarray, label_N: np.ndarray) -> float:
    """Expected calibration error: |share right - probability stated| over fifteen equal bins of
    the largest probability, weighted by their images."""
    stated_N = probability_NK.max(1)
    right_N = probability_NK.argmax(1) == label_N
    bin_N = np.minimum((stated_N * BINS).astype(int), BINS - 1)
    gap = np.bincount(bin_N, right_N - stated_N.astype(np.float64), BINS)
    return float(np.abs(gap).sum() / max(1, len(label_N)))


@dataclass(frozen=True)
class TaskScores:
    """Of one task with classes: ``confusion_KK[truth, answer]`` counts images; ``errors`` are those
    of a yes/no question at its threshold."""

    classes: tuple[str, ...]
    accuracy: float
    calibration_error: float
    confusion_KK: np.ndarray
    errors: ShapeScore | None = None

    def recall(self, name: str) -> float:
        """Share of the images of a class that are called so; NaN when there are none."""
        row = self.confusion_KK[self.classes.index(name)]
        return float(row[self.classes.index(name)] / row.sum()) if row.sum() else float("nan")


@dataclass(frozen=True)
class NumberScores:
    """Of one regression, in the unit of its column (``transform`` applied)."""

    mean_error: float
    median_relative_error: float
    pearson: float
    within: float = float("nan")            # share of relative errors of at most 5 %


@dataclass(frozen=True)
class SpiScores:
    """Of all tasks on one set of images."""

    images: int
    cross_entropy: float                    # mean over the class tasks
    total: float                            # every class task right
    single: float                           # one copy or several; NaN without a count
    tasks: Mapping[str, TaskScores]
    numbers: Mapping[str, NumberScores]
    brightness: Brightness | None = None

    @property
    def figure_of_merit(self) -> float:
        """Larger is better; decides the epoch that is kept."""
        if self.tasks:
            return self.total
        return -float(np.mean([one.median_relative_error for one in self.numbers.values()]))

    def summary(self) -> dict[str, float]:
        """What a history and a card keep."""
        return {"validation_loss": self.cross_entropy, "total": self.total,
                **{name: one.accuracy for name, one in self.tasks.items()},
                **{f"{name}_error": one.median_relative_error
                   for name, one in self.numbers.items()},
                **{f"{name}_within_5_percent": one.within for name, one in self.numbers.items()},
                **{f"{name}_{key}": value for name, one in self.tasks.items() if one.errors
                   for key, value in yes_no(one.errors).items()}}


def yes_no(one: ShapeScore) -> dict[str, float]:
    """Figures of a yes/no question: balanced accuracy, F1, precision, recall, errors of both kinds,
    and how many positives are missed when at most 1 % of the others pass."""
    found, wrong = (1 - one.fnr) * one.good, one.fpr * one.bad if one.bad else 0.0
    return {"balanced": 1 - (one.fnr + one.fpr) / 2,
            "f1": 2 * found / (found + wrong + one.good) if one.good else float("nan"),
            "precision": found / (found + wrong) if found + wrong else float("nan"),
            "recall": 1 - one.fnr, "fpr": one.fpr, "fnr_at_1_percent": one.fnr_allowed}


def score_spi(recipe: Recipe, outputs: Mapping[str, np.ndarray],
              labels: Mapping[str, np.ndarray]) -> SpiScores:
    """Scores of {output: probabilities (N, K) or numbers (N, 1)} against the labels."""
    classes: dict[str, TaskScores] = {}
    numbers: dict[str, NumberScores] = {}
    entropy, right, single, brightness = [], [], float("nan"), None
    for task in recipe.tasks:
        label = recipe.goal(task).label
        truth_N = label_of(labels, label)
        if task.kind == "regression":
            numbers[task.name] = _number_scores(task, outputs[task.output][:, 0], truth_N)
            continue
        truth_N = truth_N.astype(np.int64)
        probability_NK = np.asarray(outputs[task.output], np.float64)
        answer_N = probability_NK.argmax(1)
        confusion_KK = np.zeros((task.width, task.width), np.int64)
        known_N = truth_N >= 0
        if not known_N.any():       # none of the images has this label
            continue
        errors = None
        if task.positive:
            score_N = probability_NK[:, task.positive_index]
            answer_N = np.where(score_N >= task.threshold, task.positive_index,
                                1 - task.positive_index)
            errors = shape_score(task.name, score_N[known_N],
                                 truth_N[known_N] == task.positive_index, task.threshold)
        np.add.at(confusion_KK, (truth_N[known_N], answer_N[known_N]), 1)
        right_N = answer_N == truth_N
        classes[task.name] = TaskScores(
            tuple(task.classes), float(right_N[known_N].mean()),
            calibration_error(probability_NK[known_N], truth_N[known_N]), confusion_KK, errors)
        right.append(right_N | ~known_N)
        likelihood_N = probability_NK[np.arange(len(truth_N)), np.maximum(truth_N, 0)]
        entropy.append(-np.log(np.clip(likelihood_N[known_N], 1e-7, 1)).mean()
                       if known_N.any() else np.nan)
        if label == "count":
            single = float(((answer_N == 0) == (truth_N == 0))[known_N].mean())
            brightness = brightness_alone(labels["total"][known_N], truth_N[known_N],
                                          labels["particle"][known_N])
    some = next(iter(outputs.values()))
    return SpiScores(len(some), float(np.mean(entropy)) if entropy else float("nan"),
                     float(np.all(right, axis=0).mean()) if right else float("nan"), single,
                     classes, numbers, brightness)


def _number_scores(task: Task, answer_N: np.ndarray, truth_N: np.ndarray) -> NumberScores:
    known_N = np.isfinite(truth_N)
    if not known_N.any():
        return NumberScores(float("nan"), float("nan"), float("nan"))
    answer_N, truth_N = (np.asarray(values, np.float64)[known_N] for values in (answer_N, truth_N))
    if task.transform == "reciprocal":
        answer_N, truth_N = 1 / np.where(answer_N > 0, answer_N, np.nan), 1 / truth_N
    varies = truth_N.std() > 0 and answer_N.std() > 0
    relative_N = np.abs(answer_N / np.where(truth_N == 0, np.nan, truth_N) - 1)
    return NumberScores(
        float(np.abs(answer_N - truth_N).mean()), float(np.median(relative_N)),
        float(np.corrcoef(answer_N, truth_N)[0, 1]) if varies else float("nan"),
        float((relative_N <= 0.05).mean()))


# --- a model on a split ---------------------------------------------------------------------------

@dataclass(frozen=True)
class UnknownScores:
    """Of the answer "unknown": area under its ROC curve between known and unseen particles."""

    auroc: float
    known: int
    unseen: int
    accepted: float             # share of the known that are called known
    rejected: float             # share of the unseen that are called unknown


@dataclass(frozen=True)
class SpiEvaluation:
    """Scores of a model on a split, one part for every preset."""

    model: str
    sha256: str
    backend: str
    structures: str
    parts: Mapping[str, SpiScores]
    unknown: Mapping[str, UnknownScores] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"structures: {self.structures}", "", *overview(self.parts)]
        for preset, scores in self.parts.items():
            lines += ["", f"{preset}:", *details(scores)]
        if self.unknown:
            lines += ["", "| unseen particles of | known | unseen | AUROC | known accepted | "
                          "unseen rejected |", "|---|---|---|---|---|---|"]
            lines += [f"| {preset} | {one.known} | {one.unseen} | {one.auroc:.4f} | "
                      f"{one.accepted:.4f} | {one.rejected:.4f} |"
                      for preset, one in self.unknown.items()]
        return "\n".join(lines)

    def as_metrics(self, command: str) -> dict[str, Any]:
        """What a card keeps of an evaluation."""
        kept: dict[str, Any] = {"date": datetime.date.today().isoformat(), "command": command,
                                "backend": self.backend, "structures": self.structures}
        for preset, scores in self.parts.items():
            row = {"images": scores.images, **scores.summary()}
            row |= {f"{name}_calibration_error": one.calibration_error
                    for name, one in scores.tasks.items()}
            if scores.brightness:
                row |= {"single": scores.single, "brightness_count": scores.brightness.count,
                        "brightness_single": scores.brightness.single}
            kept[preset] = {name: value if isinstance(value, int) else round(float(value), 4)
                            for name, value in row.items() if np.isfinite(value)}
        for preset, one in self.unknown.items():
            kept[preset] = {"auroc": round(one.auroc, 4), "accepted": round(one.accepted, 4),
                            "rejected": round(one.rejected, 4)}
        return kept


def overview(parts: Mapping[str, SpiScores]) -> list[str]:
    """Markdown table, one line per set of images; brightness beside every count."""
    lines = ["| images of | images | total | count | by brightness alone (particle told / not) | "
             "single or multiple | by brightness alone | particle |",
             "|---|---|---|---|---|---|---|---|"]
    for preset, scores in parts.items():
        alone = scores.brightness
        lines.append(
            f"| {preset} | {scores.images} | {_percent(scores.total)} | "
            f"{_percent(_accuracy(scores, 'count'))} | "
            + (f"{_percent(alone.count)} / {_percent(alone.count_blind)}" if alone else "-")
            + f" | {_percent(scores.single)} | "
            + (f"{_percent(alone.single)} / {_percent(alone.single_blind)}" if alone else "-")
            + f" | {_percent(_accuracy(scores, 'particle'))} |")
    return lines


def details(scores: SpiScores) -> list[str]:
    """Calibration, recall per class with the hard pair apart, confusion matrices, numbers."""
    lines = []
    for name, one in scores.tasks.items():
        lines.append(f"expected calibration error of {name}: {one.calibration_error:.4f}")
    for name, one in scores.tasks.items():
        recalls = {label: one.recall(label) for label in one.classes}
        pair = [label for label in HARD_PAIR if label in recalls]
        others = [value for label, value in recalls.items()
                  if label not in pair and np.isfinite(value)]
        lines += ["", f"| {name}, true \\ called | " + " | ".join(one.classes) + " | recall |",
                  "|---" * (len(one.classes) + 2) + "|"]
        lines += [f"| {label} | " + " | ".join(map(str, row)) + f" | {recalls[label]:.3f} |"
                  for label, row in zip(one.classes, one.confusion_KK, strict=True)]
        if pair and others:
            lines.append(f"\nhard pair {' and '.join(pair)}: recall "
                         + " and ".join(f"{recalls[label]:.3f}" for label in pair)
                         + f"; worst of the others {min(others):.3f}")
    for name, number in scores.numbers.items():
        lines.append(f"{name}: mean error {number.mean_error:.4g}, median relative error "
                     f"{number.median_relative_error:.4f}, {number.within:.3f} within 5 %, "
                     f"correlation {number.pearson:.4f}")
    for name, one in scores.tasks.items():
        if one.errors:
            lines.append(f"{name} at threshold {one.errors.threshold:.4g}: " + ", ".join(
                f"{key.replace('_', ' ')} {value:.4f}"
                for key, value in yes_no(one.errors).items()))
    return lines


def _accuracy(scores: SpiScores, task: str) -> float:
    return scores.tasks[task].accuracy if task in scores.tasks else float("nan")


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if np.isfinite(share) else "-"


def evaluate_spi(model: Model | str | Path, split: str = "test",
                 recipe: Recipe | str | Path | None = None, backend: str = "auto",
                 processes: int = 1) -> SpiEvaluation:
    """Evaluate a model of single particles on a recipe's split, preset by preset.

    Presets of unseen particles (``..._unseen``) judge the answer "unknown": with "test" those of
    the split "shifted" are taken as well.
    """
    model = find_model(model)
    recipe = model_recipe(model, recipe)
    shards = shards_of(recipe, split)
    if not shards:
        raise ConfigurationError(f"recipe of model {model.name} has no images in [[data.{split}]];"
                                 " valid splits are training, validation, test, shifted")
    if split == "test":
        shards += [one for one in shards_of(recipe, "shifted") if _is_unseen(one.preset)]
    parts: dict[str, SpiScores] = {}
    strange: dict[str, np.ndarray] = {}
    with open_engine(model, backend) as engine:
        for preset in dict.fromkeys(shard.preset for shard in shards):
            images = open_spi([one for one in shards if one.preset == preset], processes)
            outputs = _outputs(engine, images, bool(model.card.geometry))
            images.close()
            if "unknown" in outputs and (_is_unseen(preset) or (
                    images.labels["particle"] >= 0).all()):
                strange[preset] = outputs["unknown"][:, 1]
            if not _is_unseen(preset):
                parts[preset] = score_spi(recipe, outputs, images.labels)
                log.info("%s: %s", preset, parts[preset].summary())
    known = [scores for preset, scores in strange.items() if not _is_unseen(preset)]
    unknown = {preset: _unknown_scores(known[0], scores) for preset, scores in strange.items()
               if _is_unseen(preset) and known}
    return SpiEvaluation(model.name, model.sha256, engine.name, shards[0].structures, parts,
                         unknown)


def _is_unseen(preset: str) -> bool:
    return preset.partition(":")[0].endswith("_unseen")


def _outputs(engine: Any, images: SpiSet, geometry: bool = False) -> dict[str, np.ndarray]:
    geometry_N4 = geometry_rows(images.labels) if geometry else None
    found: list[Mapping[str, np.ndarray]] = [
        engine.infer(images.images(chosen), None if geometry_N4 is None else geometry_N4[chosen])
        for chosen in images.batches(32)]
    return {name: np.concatenate([part[name] for part in found]) for name in found[0]}


def _unknown_scores(known_N: Sequence[float] | np.ndarray, unseen_N: np.ndarray) -> UnknownScores:
    both = np.concatenate([known_N, unseen_N])
    truth = np.repeat([0, 1], [len(known_N), len(unseen_N)])
    curve = curves(both, truth)
    return UnknownScores(float("nan") if curve is None else curve.auc, len(known_N),
                         len(unseen_N), float((np.asarray(known_N) < 0.5).mean()),
                         float((unseen_N >= 0.5).mean()))
