"""One body in the beam, or anything else: the published selectors [LI-HAN17, IGN21].

A network that learns from its input before the first step (mean and deviation of each pixel) is
shown the training images; one that has a loss of its own (boxes of a detector) is judged by that,
any other by cross entropy.  With stages in the recipe the exported model selects what the models
of all stages select: its score is their lowest.  Images are mirrored both ways, those that fill
only a part of the window (above the gap) left to right.

Axes: N validation images, B images of a batch, H row, W column, K class.
"""
from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from ...core import ConfigurationError
from ...engines import Model, Task
from ...simulate.spi_conditions import spi_preset
from ..networks import build_network
from ..pretrained import start_from
from ..quality_scores import QualityEvaluation, best_f1, evaluate_quality, score_quality
from ..recipes import Recipe
from ..spi import Changes
from ..spi_bodies import BodySet, open_bodies, shards_of
from ..stages import stage_files
from ..training import Trained
from . import Answers, Exhibit, probabilities

BATCH = 64          # images judged at a time
LEARNT_FROM = 512   # images of a batch from which the input is learnt


class Lesson:
    """A recipe with one yes/no task on images of bodies."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._open: list[BodySet] = []
        self._pupils: BodySet | None = None
        self._network: Any = None
        self._one_half = any(spi_preset(part.preset).shape != recipe.window.shape
                             for part in recipe.data.training)
        task = recipe.task
        if len(recipe.tasks) != 1 or task.width != 2 or task.positive != task.classes[1]:
            raise ConfigurationError(
                f"recipe {recipe.name} is about one body or not: it needs one task with two "
                f"classes, the second of them positive; it has {len(recipe.tasks)}, the first with "
                f"the classes {', '.join(task.classes)}, positive {task.positive!r}")

    def open(self, processes: int = 1) -> tuple[int, int]:
        self._pupils, self._examiners = (self._set(split, processes)
                                         for split in ("training", "validation"))
        self._good_N = torch.from_numpy(self._pupils.good_N)
        return len(self._pupils), len(self._examiners)

    def _set(self, split: str, processes: int = 1) -> BodySet:
        images = open_bodies(shards_of(self.recipe, split), self.recipe.window, processes)
        self._open.append(images)
        return images

    def close(self) -> None:
        while self._open:
            self._open.pop().close()

    def network(self) -> Any:
        recipe = self.recipe
        network = build_network(recipe.architecture, **recipe.network)
        if list(network.outputs) != [recipe.task.output]:
            raise ConfigurationError(f"recipe {recipe.name} has the task output "
                                     f"{recipe.task.output!r}, the network gives "
                                     f"{', '.join(network.outputs)}; name it in the task")
        if self._pupils is not None and hasattr(network, "learn_input"):
            pupils = self._pupils
            network.learn_input(pupils.images(chosen) for chosen in pupils.batches(LEARNT_FROM))
        self._network = network
        return network

    def inputs(self, chosen_B: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, ...]:
        assert self._pupils is not None
        changes = Changes.draw(self.recipe.augment, len(chosen_B), rng)
        if self._one_half:      # the other way it would move to where nothing is
            changes = replace(changes, flip_rows_B=np.zeros_like(changes.flip_rows_B))
        return (torch.from_numpy(changes.apply(self._pupils.images(chosen_B)))[:, None],)

    def loss(self, outputs: Mapping[str, Tensor], chosen_B: np.ndarray) -> Tensor:
        where = next(iter(outputs.values())).device
        good_B = self._good_N[torch.from_numpy(chosen_B)].to(where)
        if hasattr(self._network, "loss_of"):
            return self._network.loss_of(outputs, good_B.float())
        return nn.functional.cross_entropy(outputs[self.recipe.task.output], good_B.long())

    def scores(self, network: nn.Module, images: BodySet) -> np.ndarray:
        """(N,) probability of one body."""
        task, where = self.recipe.task, next(network.parameters()).device
        network.eval()
        found = np.empty(len(images), np.float32)
        with torch.inference_mode():
            for chosen in images.batches(BATCH):
                logits_BK = network(torch.from_numpy(images.images(chosen))[:, None].to(where)
                                    )[task.output].float()
                found[chosen] = probabilities(logits_BK, task.kind)[:, 1].cpu().numpy()
        return found

    def examine(self, network: nn.Module) -> dict[str, np.ndarray]:
        """``scores`` of being one body, ``good`` (truth) and ``kind``."""
        images = self._examiners
        return {"scores": self.scores(network, images), "good": images.good_N,
                "kind": images.kind_N}

    def mark(self, examined: Mapping[str, np.ndarray]) -> tuple[float, dict[str, float]]:
        scores = score_quality("validation", examined["scores"], examined["good"],
                               examined["kind"], self.recipe.task.threshold)
        return (scores.best_f1 if self.recipe.target.f1 else scores.accuracy), scores.summary()

    def stages(self, trained: Trained) -> dict[int, Any]:
        """{epoch: network} of the kept stages of a training; the one network without stages."""
        count = self.recipe.optimiser.stages
        if not count:
            return {len(trained.history): trained.network}
        figure = "best_f1" if self.recipe.target.f1 else "accuracy"
        files = stage_files(trained.directory, [row[figure] for row in trained.history], count)
        found = {}
        for epoch, path in files.items():
            found[epoch] = copy.deepcopy(trained.network)
            start_from(found[epoch], path)
            found[epoch].eval()
        return found

    def exhibit(self, trained: Trained) -> Exhibit:
        recipe, task = self.recipe, self.recipe.task
        images = self._set("validation")
        networks = self.stages(trained)
        together = len(networks) > 1
        answers = (Together if together else Answers)(
            list(networks.values()) if together else trained.network, [task])
        scores_N = np.min([self.scores(one, images) for one in networks.values()], axis=0) \
            if together else trained.examined["scores"]
        if recipe.target.f1:
            threshold, f1 = best_f1(scores_N, images.good_N)
            task = msgspec.structs.replace(
                task, threshold=round(threshold, 4),
                threshold_chosen=f"largest F1 on the validation images ({f1:.3f})")
        elif not task.threshold_chosen:
            task = msgspec.structs.replace(task, threshold_chosen="stated in the recipe")
        counts = {name: sum(len(shard) for shard in shards_of(recipe, name))
                  for name in ("training", "validation", "test")}
        how: dict[str, Any] = {"images": counts}
        if together:
            how["stages"] = [int(epoch) for epoch in networks]
        scores = score_quality("validation", scores_N, images.good_N, images.kind_N,
                               task.threshold)
        return Exhibit(answers, [task], check_images(scores_N, images), provenance=how,
                       metrics={"validation": {name: round(float(value), 4)
                                               for name, value in scores.summary().items()}})

    def evaluate(self, model: Model, split: str, backend: str = "auto",
                 processes: int = 1) -> QualityEvaluation:
        return evaluate_quality(model, split, self.recipe, backend, processes)


class Together(nn.Module):
    """Several networks with one task: the lowest of their scores, as an intersection asks."""

    def __init__(self, networks: Sequence[nn.Module], tasks: Sequence[Task]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.output, self.kind = tasks[0].output, tasks[0].kind

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        score_B1 = torch.stack([probabilities(network(images)[self.output], self.kind)[:, 1:]
                                for network in self.networks]).amin(0)
        return (torch.cat([1 - score_B1, score_B1], 1),)


def check_images(scores_N: np.ndarray, images: BodySet) -> np.ndarray:
    """Six images over the range of scores, one with a gap, an empty and a bright one."""
    order = np.argsort(scores_N, kind="stable")
    shown = images.images(np.sort(order[np.linspace(0, len(order) - 1, 6).astype(int)]))
    hurt_HW = shown[2].copy()
    hurt_HW[len(hurt_HW) // 3:len(hurt_HW) // 2] = 0
    return np.stack([*shown, hurt_HW, np.zeros_like(hurt_HW), shown[3] * 10]).astype(np.float32)
