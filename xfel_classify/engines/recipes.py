"""Recipes: how a model is compiled for a kind of GPU (``engines/recipes/*.toml``).

Looked up as ``gpu.toml`` in the model's own directory, then by the model's name, its
architecture, and ``default`` among the shipped recipes.
"""
from __future__ import annotations

import math
import tomllib
from typing import Any

import msgspec

from ..config import struct
from ..core import ConfigurationError
from .cards import FLOAT32_TOLERANCE, Card, Model, shipped_directory

PRECISIONS = ("float32", "tf32", "float16", "bfloat16", "int8", "float8")
SHORT = {"fp32": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16",
         "fp8": "float8"}


class Recipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one model is compiled for one kind of GPU."""

    # in the order of preference
    precision: list[str] = msgspec.field(default_factory=lambda: ["float32"])
    batch: int = 64                         # images per launch when throughput counts
    latency_batch: int = 1                  # images per launch when the answer must be quick
    workspace_MiB: int = 1024
    optimisation: int = 3                   # 0 ... 5
    # layer (by the name of its weights) -> factor on its input before the cast to float16,
    # undone after the layer; a power of two, so that no mantissa changes
    scale: dict[str, float] = {}
    # precision -> operators ("Gemm") and layers (by the name of their weights) left in float32
    keep: dict[str, list[str]] = {}
    # layer -> largest absolute input, instead of the one found on check.npz (int8, float8)
    largest: dict[str, float] = {}


def recipe_for(model: Model, capability: tuple[int, int]) -> Recipe:
    """The recipe of ``model`` on a GPU of ``capability``; errors name the file and the key."""
    folder = shipped_directory() / "recipes"
    places = [model.directory / "gpu.toml",
              *(folder / f"{name}.toml"
                for name in (model.name, model.card.architecture, "default") if name)]
    path = next((path for path in places if path.is_file()), None)
    if path is None:
        return Recipe()
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigurationError(f"GPU recipe {path} cannot be read: {error}") from error
    mine = f"sm_{capability[0]}{capability[1]}"
    values: dict[str, Any] = dict(tables.get("any", {}))
    for key, table in tables.items():
        if key != "any" and not key.startswith("sm_"):
            raise ConfigurationError(f"GPU recipe {path}: unknown table [{key}]; tables are [any] "
                                     "and compute capabilities such as [sm_90]")
        if key == mine:
            values.update(table)
    recipe = struct(Recipe, values, f"GPU recipe {path}")
    _check(recipe, str(path))
    return recipe


def _check(recipe: Recipe, where: str) -> None:
    for name in recipe.precision:
        if name not in PRECISIONS:
            raise ConfigurationError(f"GPU recipe {where}: unknown precision {name!r}; known: "
                                     f"{', '.join(PRECISIONS)}")
    for layer, factor in recipe.scale.items():
        if factor <= 0 or math.frexp(factor)[0] != 0.5:
            raise ConfigurationError(f"GPU recipe {where}: the scale {factor} of {layer} is no "
                                     "power of two; 0.00390625 is 2^-8")
    if min(recipe.batch, recipe.latency_batch) < 1 or not 0 <= recipe.optimisation <= 5:
        raise ConfigurationError(f"GPU recipe {where}: batches are at least 1, optimisation is "
                                 "0 to 5")


def full_name(precision: str) -> str:
    """``fp16`` -> ``float16``; raises ``ConfigurationError`` for an unknown one."""
    name = SHORT.get(precision, precision)
    if name not in PRECISIONS:
        raise ConfigurationError(f"unknown precision {precision!r}; known: "
                                 f"{', '.join(PRECISIONS)}")
    return name


def tolerance(card: Card, precision: str) -> float | None:
    """Largest allowed difference of a probability; None when the card allows no such precision."""
    return card.tolerance.get(precision, FLOAT32_TOLERANCE if precision == "float32" else None)


def usable_precisions(card: Card, recipe: Recipe, asked: str | None) -> list[str]:
    """Precisions to try, best first: the one that was asked for, else those of the recipe.

    A precision without a tolerance on the card is an error when asked for, else passed over.
    """
    if asked is not None:
        name = full_name(asked)
        if tolerance(card, name) is None:
            raise ConfigurationError(
                f"precision {name} was asked for, but the card of model {card.name} states no "
                f"tolerance for it (it has {', '.join(card.tolerance) or 'float32'}); measure the "
                f"difference with xfel-classify engines bench and add {name} to [tolerance]")
        return [name]
    found = [name for name in recipe.precision if tolerance(card, name) is not None]
    return found or ["float32"]
