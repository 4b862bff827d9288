"""What is learnt from a recipe: one file per kind of training set, defining ``Lesson``.

The loop of :mod:`..training` and the export know nothing about images, labels and figures; a
lesson does.  It is found by the recipe's ``data.generator``: the file of that name, else
:mod:`.crops`, which serves every generator of :data:`..datasets.GENERATORS`.

Axes: N validation images, B images of a batch, H row, W column, K value.
"""
from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ...engines import Model, Task
from ..recipes import Recipe

if TYPE_CHECKING:
    from numpy.random import Generator

    from ..training import Trained

__all__ = ["Answers", "Evaluated", "Exhibit", "Lesson", "lesson_of", "probabilities"]

OTHERWISE = "crops"


class Evaluated(Protocol):
    """Figures of a model on a split; prints as the table that a user reads."""

    @property
    def sha256(self) -> str:
        """Of the network that was judged."""

    def as_metrics(self, command: str) -> dict[str, Any]:
        """What a card keeps of it."""


@dataclass(frozen=True)
class Exhibit:
    """What a lesson contributes to the model directory of a finished training.

    ``answers`` is the module to export (images, then geometry where there is one -> one tensor
    per task, in order); ``images_BHW`` and ``geometry_B4`` are for ``check.npz``.
    """

    answers: nn.Module
    tasks: list[Task]
    images_BHW: np.ndarray
    geometry_B4: np.ndarray | None = None
    pools: list[int] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)


class Lesson(Protocol):
    """Images, loss and figures of one kind of training; made from a recipe, opened when needed."""

    def __init__(self, recipe: Recipe) -> None: ...

    def open(self, processes: int = 1) -> tuple[int, int]:
        """Make the training and validation images available, simulated where they are missing.

        Returns how many there are of each.
        """

    def network(self) -> Any:
        """Freshly initialised; a ``ConfigurationError`` when it does not answer the tasks."""

    def inputs(self, chosen_B: np.ndarray, rng: Generator) -> tuple[Tensor, ...]:
        """What the network is given for these training images, changed at random by ``rng``."""

    def loss(self, outputs: Mapping[str, Tensor], chosen_B: np.ndarray) -> Tensor:
        """Of float32 ``outputs`` for these training images; on the device of the outputs."""

    def examine(self, network: nn.Module) -> dict[str, np.ndarray]:
        """Answers of the network to the validation images with their labels: ``validation.npz``."""

    def mark(self, examined: Mapping[str, np.ndarray]) -> tuple[float, dict[str, float]]:
        """(figure of merit, larger is better; what the history keeps)."""

    def exhibit(self, trained: Trained) -> Exhibit:
        """For the export of a finished training; opens what it needs itself."""

    def evaluate(self, model: Model, split: str, backend: str = "auto",
                 processes: int = 1) -> Evaluated:
        """Figures of an exported model on "test", "shifted" or another split of the recipe."""

    def close(self) -> None: ...


def lesson_of(recipe: Recipe) -> Lesson:
    """The lesson of a recipe's ``data.generator``."""
    name = recipe.data.generator
    if name.startswith("_") or not (Path(__file__).parent / f"{name}.py").is_file():
        name = OTHERWISE
    return importlib.import_module(f"{__name__}.{name}").Lesson(recipe)


class Answers(nn.Module):
    """A network with what its tasks mean.

    A task with classes gives probabilities: a softmax, or of a single logit of the second class
    both probabilities.  A regression is passed on.
    """

    def __init__(self, network: Any, tasks: list[Task]) -> None:
        super().__init__()
        self.network = network
        self.tasks = [(task.output, task.kind) for task in tasks]

    def forward(self, images: Tensor, geometry: Tensor | None = None) -> tuple[Tensor, ...]:
        found = self.network(images) if geometry is None else self.network(images, geometry)
        return tuple(probabilities(found[output], kind) for output, kind in self.tasks)


def probabilities(values_BK: Tensor, kind: str) -> Tensor:
    """From what a head gives to what a card promises."""
    if kind == "regression":
        return values_BK
    if values_BK.shape[1] > 1:
        return values_BK.softmax(1)
    second = values_BK.sigmoid()
    return torch.cat([1 - second, second], dim=1)
