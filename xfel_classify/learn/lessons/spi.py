"""Several answers about a single-particle image in one pass: count, particle, and what the recipe
adds [CAI21].

The loss is the sum over the tasks of weight times cross entropy, or times the mean absolute error
in units of the label's spread.  The published training keeps the last epoch and changes images
once, at load time (``keep = "last"``, ``load_once``).  At export the probabilities of every task
are calibrated by one temperature, and the answer "unknown" is added.

Axes: N validation images, B images of a batch, F feature, K class.
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...core import ConfigurationError
from ...engines import Model, Task
from ..networks import build_network, network_class
from ..recipes import Recipe
from ..spi import (
    COUNTS,
    LOAD,
    SPI_PARTICLES,
    Changes,
    SpiSet,
    geometry_rows,
    label_of,
    open_spi,
    shards_of,
)
from ..spi_scores import SpiEvaluation, SpiScores, evaluate_spi, score_spi
from ..spi_surroundings import surround
from ..spi_unknown import Judge, fit_judge
from ..training import Trained
from . import Exhibit, probabilities

BATCH = 32          # images judged at a time
CLASSES = {"count": list(COUNTS), "particle": list(SPI_PARTICLES), "quality": ["bad", "good"]}


class Lesson:
    """A recipe with one or more tasks on single-particle images."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._open: list[SpiSet] = []
        self._pupils: SpiSet | None = None
        for task in recipe.tasks:
            wanted = CLASSES.get(recipe.goal(task).label)
            if wanted and task.classes != wanted:
                raise ConfigurationError(
                    f"recipe {recipe.name}: task {task.name} has the classes "
                    f"{', '.join(task.classes)}; its label {recipe.goal(task).label} has "
                    f"{', '.join(wanted)}, in this order")

    def open(self, processes: int = 1) -> tuple[int, int]:
        self._pupils = self._keep(open_spi(shards_of(self.recipe, "training"), processes))
        self._examiners = self._keep(open_spi(shards_of(self.recipe, "validation"), processes))
        self._truth = {task.output: torch.from_numpy(self._labels(self._pupils, task))
                       for task in self.recipe.tasks}
        how = self.recipe.augment
        self._once = Changes.draw(how, len(self._pupils), np.random.default_rng(
            [self.recipe.seed, LOAD])) if how.load_once else None
        return len(self._pupils), len(self._examiners)

    def _keep(self, images: SpiSet) -> SpiSet:
        self._open.append(images)
        return images

    def close(self) -> None:
        while self._open:
            self._open.pop().close()

    def _labels(self, images: SpiSet, task: Task) -> np.ndarray:
        values_N = label_of(images.labels, self.recipe.goal(task).label)
        return values_N.astype(np.float32 if task.kind == "regression" else np.int64)

    def network(self) -> Any:
        """With one head per task; numbers answer about the mean of their training labels."""
        recipe = self.recipe
        heads = {task.output: task.width for task in recipe.tasks}
        network = build_network(recipe.architecture, heads=heads, **recipe.network)
        if self._pupils is not None:
            for task in recipe.tasks:
                if task.kind == "regression" and not network.uses_geometry:
                    values_N = self._truth[task.output].numpy()
                    network.heads.set_range(task.output, float(values_N.mean()),
                                            float(values_N.std()) or 1.0)
        return network

    def inputs(self, chosen_B: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, ...]:
        assert self._pupils is not None
        changes = self._once.of(chosen_B) if self._once else Changes.draw(
            self.recipe.augment, len(chosen_B), rng)
        images_BHW = surround(changes.apply(self._pupils.images(chosen_B)), self.recipe.augment,
                              rng)
        images = torch.from_numpy(images_BHW)[:, None]
        return (images, *self._geometry(self._pupils, chosen_B))

    def _geometry(self, images: SpiSet, chosen_B: np.ndarray) -> tuple[Tensor, ...]:
        """The second input of a network that has one."""
        if not uses_geometry(self.recipe):
            return ()
        labels = {name: values[chosen_B] for name, values in images.labels.items()}
        return (torch.from_numpy(geometry_rows(labels)),)

    def loss(self, outputs: Mapping[str, Tensor], chosen_B: np.ndarray) -> Tensor:
        parts = []
        for task in self.recipe.tasks:
            values_BK = outputs[task.output]
            truth_B = self._truth[task.output][torch.from_numpy(chosen_B)].to(values_BK.device)
            if task.kind == "regression":
                one = self._number_loss(task, values_BK[:, 0], truth_B)
            else:       # the sum: a batch without any label has no loss, not NaN
                known = (truth_B >= 0).sum().clamp(min=1)
                one = nn.functional.cross_entropy(values_BK, truth_B, ignore_index=-1,
                                                  reduction="sum") / known
            parts.append(self.recipe.goal(task).weight * one)
        return torch.stack(parts).sum()

    def _number_loss(self, task: Task, values_B: Tensor, truth_B: Tensor) -> Tensor:
        """Mean absolute error of the images that have the label (not NaN), in units of the
        labels' spread or, where the goal says so, of the label itself."""
        known_B = torch.isfinite(truth_B)
        if self.recipe.goal(task).relative:
            unit_B = truth_B[known_B]
        else:
            all_N = self._truth[task.output]
            unit_B = torch.tensor(float(all_N[torch.isfinite(all_N)].std()) or 1.0)
            unit_B = unit_B.to(truth_B.device)
        off_B = (values_B[known_B] - truth_B[known_B]).abs() / unit_B
        return off_B.sum() / known_B.sum().clamp(min=1)

    def answers(self, network: nn.Module, images: SpiSet) -> dict[str, np.ndarray]:
        """``logits_<output>`` (N, K) or ``value_<output>`` (N,) for all ``images``."""
        where = next(network.parameters()).device
        found: dict[str, list[np.ndarray]] = {}
        for chosen in images.batches(BATCH):
            outputs = network(torch.from_numpy(images.images(chosen))[:, None].to(where),
                              *(values.to(where) for values in self._geometry(images, chosen)))
            for task in self.recipe.tasks:
                values = outputs[task.output].float().cpu().numpy()
                number = task.kind == "regression"
                found.setdefault(f"{'value' if number else 'logits'}_{task.output}", []).append(
                    values[:, 0] if number else values)
        return {name: np.concatenate(parts) for name, parts in found.items()}

    def examine(self, network: nn.Module) -> dict[str, np.ndarray]:
        """Answers before the softmax, and the labels."""
        return {**self.answers(network, self._examiners), **self._examiners.labels}

    def mark(self, examined: Mapping[str, np.ndarray]) -> tuple[float, dict[str, float]]:
        scores = score_spi(self.recipe, answers_of_logits(self.recipe, examined), examined)
        return scores.figure_of_merit, scores.summary()

    def examine_split(self, network: nn.Module, split: str, processes: int = 1
                      ) -> SpiScores:
        """Figures of a network on all images of a split, without exporting it."""
        images = self._keep(open_spi(shards_of(self.recipe, split), processes))
        network.eval()
        with torch.inference_mode():
            found = self.answers(network, images)
        return score_spi(self.recipe, answers_of_logits(self.recipe, found), images.labels)

    def exhibit(self, trained: Trained) -> Exhibit:
        recipe, found = self.recipe, trained.examined
        temperatures = {task.output: temperature(found[f"logits_{task.output}"], label_of(
            found, recipe.goal(task).label)) for task in recipe.tasks if task.kind == "classes"}
        validation = self._keep(open_spi(shards_of(recipe, "validation")))
        tasks, judge = list(recipe.tasks), None
        if recipe.unknown:
            training = self._keep(open_spi(shards_of(recipe, "training")))
            judge, about = fit_judge(recipe, trained.network, training, validation)
            tasks.append(about)
        answers = CalibratedAnswers(trained.network, recipe.tasks, temperatures, judge)
        counts = {name: sum(len(shard) for shard in shards_of(recipe, name))
                  for name in ("training", "validation", "test")}
        calibrated = answers_of_logits(recipe, found, temperatures)
        shown_N = check_rows(found)
        scores = score_spi(recipe, calibrated, found)
        return Exhibit(
            answers, tasks, check_images(shown_N, validation),
            geometry_B4=geometry_rows({name: values[[*shown_N, shown_N[4], shown_N[0]]]
                                       for name, values in found.items()})
            if uses_geometry(recipe) else None, pools=recipe.pools,
            provenance={"images": counts, "structures": shards_of(recipe, "test")[0].structures
                        if recipe.data.test else "",
                        "temperature": {name: round(t, 4) for name, t in temperatures.items()}},
            metrics={"validation": {name: round(float(value), 4)
                                    for name, value in scores.summary().items()}})

    def evaluate(self, model: Model, split: str, backend: str = "auto",
                 processes: int = 1) -> SpiEvaluation:
        return evaluate_spi(model, split, self.recipe, backend, processes)


def uses_geometry(recipe: Recipe) -> bool:
    """Whether the network of a recipe is told the geometry."""
    return bool(network_class(recipe.architecture).uses_geometry)


def answers_of_logits(recipe: Recipe, found: Mapping[str, np.ndarray],
                      temperatures: Mapping[str, float] | None = None) -> dict[str, np.ndarray]:
    """{output: probabilities (N, K) or numbers (N, 1)} as an exported model gives them."""
    outputs = {}
    for task in recipe.tasks:
        if task.kind == "regression":
            outputs[task.output] = found[f"value_{task.output}"][:, None]
        else:
            logits = torch.from_numpy(np.asarray(found[f"logits_{task.output}"], np.float64))
            logits = logits / (temperatures or {}).get(task.output, 1.0)
            outputs[task.output] = probabilities(logits, task.kind).numpy()
    return outputs


def temperature(logits_NK: np.ndarray, labels_N: np.ndarray) -> float:
    """The factor by which logits are divided so that the labels are likeliest (C. Guo et al.,
    arXiv:1706.04599); found by golden section between 1/20 and 20."""
    logits = torch.from_numpy(np.asarray(logits_NK, np.float64))
    truth = torch.from_numpy(np.asarray(labels_N, np.int64))

    def loss(log_t: float) -> float:
        return float(nn.functional.cross_entropy(logits / np.exp(log_t), truth, ignore_index=-1))

    low, high = -np.log(20.0), np.log(20.0)
    ratio = (np.sqrt(5) - 1) / 2
    for _ in range(60):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if loss(left) < loss(right):
            high = right
        else:
            low = left
    return float(np.exp((low + high) / 2))


class CalibratedAnswers(nn.Module):
    """Probabilities at the temperature of each task, numbers, and "unknown" from the features."""

    def __init__(self, network: Any, tasks: list[Task], temperatures: Mapping[str, float],
                 judge: Judge | None) -> None:
        super().__init__()
        self.network, self.judge = network, judge
        self.tasks = [(task.output, task.kind) for task in tasks]
        for name, value in temperatures.items():
            self.register_buffer(f"temperature_{name}", torch.tensor(value))

    def forward(self, images: Tensor, geometry: Tensor | None = None) -> tuple[Tensor, ...]:
        features = self.network.features(images)
        outputs = self.network.heads(features)
        if geometry is not None:
            outputs = self.network.in_units(outputs, geometry)
        found = [outputs[name] if kind == "regression"
                 else probabilities(outputs[name] / self.get_buffer(f"temperature_{name}"), kind)
                 for name, kind in self.tasks]
        if self.judge is not None:
            name = self.judge.output
            found.append(self.judge(features[name], outputs[name]))
        return tuple(found)


def check_rows(examined: Mapping[str, np.ndarray]) -> np.ndarray:
    """Eight validation images from faint to bright."""
    order = np.argsort(examined["total"], kind="stable")
    return order[np.linspace(0, len(order) - 1, 8).astype(int)]


def check_images(shown_N: np.ndarray, images: SpiSet) -> np.ndarray:
    """Ten images, float32 (10, H, W): eight that are shown, one with a dead half, an empty one."""
    shown = images.images(shown_N)
    half = shown[4].copy()
    half[:, half.shape[1] // 2:] = 0
    return np.stack([*shown, half, np.zeros_like(half)]).astype(np.float32)
