"""Stills for networks whose first part has nothing to learn: each image is described once.

All else is as in :mod:`.stills`.  Such a network describes an image and its mirror image alike, so
that no image is turned.

Axes: N images, B images of a batch, F number of a description.
"""
from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from ..descriptions import descriptions
from ..shards import cached
from ..stills import shards_of
from . import stills


class Lesson(stills.Lesson):
    """A recipe whose network has ``describe`` (see :mod:`..descriptions`)."""

    def open(self, processes: int = 1) -> tuple[int, int]:
        counts = super().open(processes)
        recipe = self.recipe
        self._pupils_NF, self._examiners_NF = (
            torch.from_numpy(descriptions(recipe.architecture, recipe.network,
                                          cached(shards_of(recipe, split)), processes))
            for split in ("training", "validation"))
        return counts

    def inputs(self, chosen_B: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, ...]:
        return (self._pupils_NF[torch.from_numpy(chosen_B)],)

    def examine(self, network: nn.Module) -> dict[str, np.ndarray]:
        task = self.recipe.task
        where = next(network.parameters()).device
        values_N = network(self._examiners_NF.to(where))[task.output].float()[:, 0]
        if task.kind == "classes":
            values_N = values_N.sigmoid()
        return {"answers": values_N.cpu().numpy(), "geometry": self._examiners.geometry_N4,
                **self._examiners.labels}
