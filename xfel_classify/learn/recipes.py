"""Recipes: everything that decides a trained model, in one TOML file.

A recipe and the package give the same weights again (same torch, one thread).  Splits draw their
runs from seeds of their own, so that no run, crystal or event is in two of them.
"""
from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from ..config import struct
from ..core import ConfigurationError, ModelInvalid, Window
from ..engines.cards import Model, Task, card_from_table

__all__ = ["Augment", "Data", "Goal", "Optimiser", "Recipe", "RunKey", "Split", "Unknown",
           "model_recipe", "optimiser_words", "read_recipe", "recipe_of", "runs_of"]

SPLITS = ("training", "validation", "test", "shifted")


class Split(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Simulated runs of one condition: ``runs`` runs of ``events`` events each."""

    preset: str
    seed: int
    runs: int
    events: int
    positives: int = 0      # of the events of each run, exactly (bodies); 0: as the preset draws


class Data(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where images come from."""

    generator: str = "sfx"          # a file of learn/lessons, or of datasets.GENERATORS
    training: list[Split]
    validation: list[Split]         # chooses the epoch and the threshold
    test: list[Split] = []          # never looked at while training
    shifted: list[Split] = []       # conditions outside of the training; reported only


class Augment(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Random changes of training images; each image has its own."""

    flips: bool = True              # left-right and up-down, each with probability 1/2
    rotations: bool = True          # by 0, 90, 180 or 270 degrees
    intensity: float = 0.0          # sigma of the logarithm of a common factor
    load_once: bool = False         # the same change in every epoch, as drawn when loading
    # what surrounds a single particle (spi_surroundings): chances of an image, largest values
    fields: float = 0.0             # chance of a random field that multiplies the image ...
    field_sigma: float = 0.4        # ... its largest deviation
    contrast: float = 1.0           # the rings' deviations keep a share of at least this
    background: float = 0.0         # chance of light that is added
    dead_half: float = 0.0          # chance
    gap: float = 0.0                # chance of a gap through the beam
    strip: float = 0.0              # chance that only a rectangle beside the beam was kept
    stop: float = 0.0               # chance of a beam stop


class Optimiser(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How weights move.  The defaults are the paper's."""

    kind: str = "sgd"               # sgd or adam
    learning_rate: float = 0.002
    schedule: str = "decay"         # decay: lr / (1 + decay t); cosine: warm-up, then to zero
    decay: float = 1e-4             # per minibatch
    warmup: int = 0                 # minibatches
    momentum: float = 0.9
    weight_decay: float = 0.0
    batch: int = 100
    epochs: int = 30
    cycles: list[int] = []          # cosine: epochs of each cycle, in all ``epochs``; [] = one
    restart: float = 0.4            # cosine: learning rate at which later cycles start, relative
    reshuffle: bool = True          # another order of the images in every epoch
    keep: str = "best"              # weights of the best epoch on validation, or of the last
    precision: str = "auto"         # float32 on a CPU, bfloat16 on a GPU; or one of them on both
    steps: int = 0                  # minibatches of an epoch; 0: as many as show every image once
    stages: int = 0                 # weights of so many epochs in a row are kept beside, the best


class Target(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the threshold is chosen for, on the worst validation run."""

    sensitivity: float = 0.98
    specificity: float = 0.97
    f1: bool = False                # bodies: the best F1 on all validation images instead


class Goal(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a task is learnt; stands in the recipe's task beside what the card says of it."""

    weight: float = 1.0             # of its loss
    label: str = ""                 # name of the label in the data set; "" = the task's name
    relative: bool = False          # a number: its error relative to the label


class Unknown(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A further answer: does the image show none of the classes of a task?"""

    task: str = "particle"          # whose classes are the known ones
    method: str = "mahalanobis"     # how it is judged: mahalanobis, energy, softmax
    features: int = 64              # mahalanobis: leading components of the trunk's features
    accept: float = 0.95            # share of known validation images that are called known


class Recipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One trained model: network, images, optimiser and the words of its card."""

    name: str
    version: str
    architecture: str
    summary: str = ""
    licence: str = "BSD-3-Clause"
    seed: int = 0                   # initial weights, order, augmentation, dropout
    network: dict[str, Any] = {}    # options of the architecture
    pretrained: str = ""            # safetensors file to start from, relative to the recipe
    tasks: list[Task]               # [task] with one head, [[tasks]] with several
    goals: dict[str, Goal] = {}     # task name -> how it is learnt
    unknown: Unknown | None = None
    window: Window = Window()
    pools: list[int] = []           # pooling factors of its images; [] = the window's
    detectors: list[str] = []
    photon_energy_eV: list[float] = []
    data: Data
    augment: Augment = Augment()
    optimiser: Optimiser = Optimiser()
    target: Target = Target()
    tolerance: dict[str, float] = {}
    sha256: str = ""                # of the file, filled in by read_recipe

    @property
    def task(self) -> Task:
        """The first task; the only one of most recipes."""
        return self.tasks[0]

    def goal(self, task: Task) -> Goal:
        """How ``task`` is learnt, its label named."""
        goal = self.goals.get(task.name, Goal())
        return goal if goal.label else msgspec.structs.replace(goal, label=task.name)


@dataclass(frozen=True)
class RunKey:
    """One simulated run: with the package's simulator it is fully determined by this."""

    generator: str
    preset: str
    seed: int
    run: int
    events: int

    @property
    def stem(self) -> str:
        """File name of its cached images."""
        return f"{self.generator}_{self.preset}_s{self.seed}_r{self.run:04d}_n{self.events}"


def runs_of(recipe: Recipe, split: str) -> list[RunKey]:
    """Runs of "training", "validation", "test" or "shifted", numbered from 0 in each seed."""
    return [RunKey(recipe.data.generator, part.preset, part.seed, run, part.events)
            for part in getattr(recipe.data, split) for run in range(part.runs)]


def read_recipe(path: str | Path) -> Recipe:
    """A checked recipe; ``ConfigurationError`` names a wrong key and the valid ones."""
    path = Path(path)
    try:
        content = path.read_bytes()
        table = tomllib.loads(content.decode("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigurationError(f"recipe {path} cannot be read: {error}; give a TOML file such "
                                 "as engines/sfx-hit/recipe.toml") from error
    recipe = _recipe(table, f"recipe {path}")
    return msgspec.structs.replace(recipe, sha256=hashlib.sha256(content).hexdigest())


def recipe_of(tables: Mapping[str, Any], where: str) -> Recipe:
    """A checked recipe from the tables of a TOML file; ``where`` names it in errors."""
    return _recipe(tables, where)


def model_recipe(model: Model, recipe: Recipe | str | Path | None = None) -> Recipe:
    """The recipe of a model, or another that is given or read instead."""
    if isinstance(recipe, Recipe):
        return recipe
    return read_recipe(recipe or model.directory / "recipe.toml")


def optimiser_words(how: Optimiser) -> str:
    """The optimiser in the words of a card."""
    return (f"{how.kind}, learning rate {how.learning_rate}, {how.schedule}, batch {how.batch}, "
            f"{how.epochs} epochs")


def _recipe(table: Mapping[str, Any], where: str) -> Recipe:
    parts = dict(table)
    sections: dict[str, Any] = {"augment": Augment, "optimiser": Optimiser, "target": Target,
                                "unknown": Unknown}
    for name, cls in sections.items():
        if name in parts:
            parts[name] = struct(cls, parts[name], f"{where}: [{name}]")
    if "data" in parts:
        data = dict(parts["data"])
        for name in SPLITS:
            data[name] = [struct(Split, split, f"{where}: [[data.{name}]]")
                          for split in data.get(name, [])]
        parts["data"] = struct(Data, data, f"{where}: [data]")
    if "task" in parts and "tasks" in parts:
        raise ConfigurationError(f"{where} has a [task] and [[tasks]]; write all heads as "
                                 "[[tasks]]")
    tasks = [dict(task) for task in parts.pop("tasks", [parts.pop("task", {})])]
    goals = [struct(Goal, {key: task.pop(key) for key in Goal.__struct_fields__ if key in task},
                    f"{where}: [[tasks]]") for task in tasks]
    # tasks and window are the card's own sections: checked by the card's reader
    try:
        card = card_from_table({"name": "", "version": "", "onnx_sha256": "", "tasks": tasks,
                                "window": table.get("window", {})}, where)
    except ModelInvalid as error:
        raise ConfigurationError(str(error)) from error
    parts["tasks"], parts["window"] = card.tasks, card.window
    parts["goals"] = {task.name: goal for task, goal in zip(card.tasks, goals, strict=True)}
    recipe = struct(Recipe, parts, where)
    _check(recipe, where)
    return recipe


def _check(recipe: Recipe, where: str) -> None:
    if recipe.optimiser.kind not in ("sgd", "adam"):
        raise ConfigurationError(f"{where}: optimiser kind {recipe.optimiser.kind!r}; valid are "
                                 "sgd, adam")
    if recipe.optimiser.schedule not in ("decay", "cosine"):
        raise ConfigurationError(f"{where}: schedule {recipe.optimiser.schedule!r}; valid are "
                                 "decay, cosine")
    if recipe.optimiser.keep not in ("best", "last"):
        raise ConfigurationError(f"{where}: optimiser keep {recipe.optimiser.keep!r}; valid are "
                                 "best, last")
    if recipe.optimiser.precision not in ("auto", "float32", "bfloat16"):
        raise ConfigurationError(f"{where}: optimiser precision {recipe.optimiser.precision!r}; "
                                 "valid are auto, float32, bfloat16")
    if min(recipe.optimiser.steps, recipe.optimiser.stages) < 0:
        raise ConfigurationError(f"{where}: optimiser steps {recipe.optimiser.steps} and stages "
                                 f"{recipe.optimiser.stages}; give 0 or more of each")
    if not recipe.data.training or not recipe.data.validation:
        raise ConfigurationError(f"{where}: [[data.training]] and [[data.validation]] are both "
                                 "needed; add the one that is missing")
    owners: dict[int, str] = {}
    for name in SPLITS:
        for split in getattr(recipe.data, name):
            if owners.setdefault(split.seed, name) != name:
                raise ConfigurationError(f"{where}: seed {split.seed} is used by both "
                                         f"{owners[split.seed]} and {name}; splits never share "
                                         "a seed, choose another")
    if recipe.unknown and recipe.unknown.task not in [task.name for task in recipe.tasks]:
        raise ConfigurationError(f"{where}: [unknown] is about the task {recipe.unknown.task!r}; "
                                 f"the recipe has {', '.join(t.name for t in recipe.tasks)}")
    keys = [key for name in SPLITS for key in runs_of(recipe, name)]
    if len({(key.preset, key.seed, key.run) for key in keys}) != len(keys):
        raise ConfigurationError(f"{where}: two parts of one split have the same preset and seed; "
                                 "choose different seeds")
