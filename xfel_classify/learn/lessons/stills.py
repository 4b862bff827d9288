"""Lattices and resolution from quadrants of simulated stills.

L1 on 1/d for a regression, binary cross entropy on "more than one lattice" for classes [CICH23].

Axes: N validation images, B images of a batch, 4 = geometry.
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from ...core import ConfigurationError
from ...engines import Model
from ..networks import build_network
from ..recipes import Recipe
from ..stills import StillSet, open_stills, shards_of
from ..stills_scores import StillsEvaluation, evaluate_stills, score_answers
from ..training import Trained
from . import Answers, Exhibit


class Lesson:
    """A recipe with one task, "more than one lattice" or the resolution."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._open: list[StillSet] = []

    def open(self, processes: int = 1) -> tuple[int, int]:
        self._pupils = self._keep(open_stills(shards_of(self.recipe, "training"), processes))
        self._examiners = self._keep(open_stills(shards_of(self.recipe, "validation"), processes))
        labels = self._pupils.labels
        self._truth_N = torch.from_numpy(
            labels["inverse_d_A"].astype(np.float32) if self.recipe.task.kind == "regression"
            else (labels["n_lattices"] > 1).astype(np.float32))
        return len(self._pupils), len(self._examiners)

    def _keep(self, stills: StillSet) -> StillSet:
        self._open.append(stills)
        return stills

    def close(self) -> None:
        while self._open:
            self._open.pop().close()

    def network(self) -> Any:
        recipe = self.recipe
        network = build_network(recipe.architecture, **recipe.network)
        if list(network.outputs) != [recipe.task.output]:
            raise ConfigurationError(f"recipe {recipe.name} has the task output "
                                     f"{recipe.task.output!r}, the network gives "
                                     f"{', '.join(network.outputs)}; training on stills needs one "
                                     "head, the task's")
        self._uses_geometry = network.uses_geometry
        return network

    def _inputs(self, stills: StillSet, chosen_B: np.ndarray, images_BHW: np.ndarray
                ) -> tuple[Tensor, ...]:
        images = torch.from_numpy(images_BHW)[:, None]
        if not self._uses_geometry:
            return (images,)
        return images, torch.from_numpy(stills.geometry_N4[chosen_B])

    def inputs(self, chosen_B: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, ...]:
        # the beam stays at (0, 0): the diagonal is the only mirror of a quadrant
        turned_B = rng.random(len(chosen_B)) < (0.5 if self.recipe.augment.flips else 0.0)
        images_BHW = self._pupils.images(chosen_B)
        images_BHW[turned_B] = images_BHW[turned_B].transpose(0, 2, 1)
        return self._inputs(self._pupils, chosen_B, images_BHW)

    def loss(self, outputs: Mapping[str, Tensor], chosen_B: np.ndarray) -> Tensor:
        values_B = outputs[self.recipe.task.output][:, 0]
        truth_B = self._truth_N[torch.from_numpy(chosen_B)].to(values_B.device)
        if self.recipe.task.kind == "regression":
            return nn.functional.l1_loss(values_B, truth_B)
        return nn.functional.binary_cross_entropy_with_logits(values_B, truth_B)

    def examine(self, network: nn.Module) -> dict[str, np.ndarray]:
        """``answers``, the probability of several lattices or 1/d, with geometry and labels."""
        task, stills = self.recipe.task, self._examiners
        where = next(network.parameters()).device
        found = []
        for chosen in stills.batches(64 if where.type == "cuda" else 8):
            inputs = self._inputs(stills, chosen, stills.images(chosen))
            values_B = network(*(one.to(where) for one in inputs))[task.output].float()[:, 0]
            if task.kind == "classes":
                values_B = values_B.sigmoid()
            found.append(values_B.cpu().numpy())
        return {"answers": np.concatenate(found), "geometry": stills.geometry_N4, **stills.labels}

    def mark(self, examined: Mapping[str, np.ndarray]) -> tuple[float, dict[str, float]]:
        scores = score_answers(self.recipe.task, examined["answers"], examined)
        return scores.figure_of_merit, scores.summary()

    def exhibit(self, trained: Trained) -> Exhibit:
        recipe, found = self.recipe, trained.examined
        task = recipe.task
        if task.kind == "classes" and not task.threshold_chosen:
            task = msgspec.structs.replace(task, threshold_chosen="stated in the recipe")
        images_BHW, geometry_B4 = check_images(
            found, self._keep(open_stills(shards_of(recipe, "validation"))))
        counts = {name: sum(len(shard) for shard in shards_of(recipe, name))
                  for name in ("training", "validation", "test")}
        _, summary = self.mark(found)
        return Exhibit(
            Answers(trained.network, [task]), [task], images_BHW,
            geometry_B4 if trained.network.uses_geometry else None,
            pools=sorted({int(pool) for pool in np.unique(found["geometry"][:, 3])}),
            provenance={"images": counts},
            metrics={"validation": {name: round(float(value), 4)
                                    for name, value in summary.items()}})

    def evaluate(self, model: Model, split: str, backend: str = "auto",
                 processes: int = 1) -> StillsEvaluation:
        return evaluate_stills(model, split, self.recipe, backend, processes)


def check_images(examined: Mapping[str, np.ndarray], stills: StillSet
                 ) -> tuple[np.ndarray, np.ndarray]:
    """Six quadrants over the range of answers, one with a gap, an empty and a saturated one."""
    order = np.argsort(examined["answers"])
    chosen = order[np.linspace(0, len(order) - 1, 6).astype(int)]
    images = stills.images(chosen)
    hurt = images[2].copy()
    hurt[len(hurt) // 3:len(hurt) // 2] = 0
    more = [hurt, np.zeros_like(hurt), np.full_like(hurt, 255)]
    geometry = stills.geometry_N4[chosen]
    return (np.stack([*images, *more]).astype(np.float32),
            np.concatenate([geometry, geometry[[2, 0, 0]]]))
