"""Published tables made again: one file per study, found by name, defining ``TABLES``.

A table is a list of trainings, each a change of a recipe, with the published figures beside it.
Every training has a directory of its own below the output directory, so that a table can be
interrupted, goes on where it stopped, and takes in rows and seeds that are added later.  What is
no list of trainings with figures is a :class:`Procedure`, which one function makes.
"""
from __future__ import annotations

import importlib
import json
import logging
import statistics
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from ...core import ConfigurationError, UnknownComponent
from ..training import Trained, train

__all__ = ["Outcome", "Procedure", "Row", "Table", "Work", "reproduce", "studies", "tables_of",
           "train_row"]

log = logging.getLogger(__name__)

FIGURES, CHANGED = "figures.json", "changed.toml"


@dataclass(frozen=True)
class Row:
    """One training: what is laid over the recipe, and what the study reports of it.

    ``changes`` is a table of tables, as in the recipe; ``tasks`` maps the name of a task to changes
    of its own.  ``published`` maps figures to numbers; {} for a row the study does not have.
    """

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    tasks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    published: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """Rows whose ``figures`` are printed in percent, ours beside the published.

    ``recipes`` are the small and the full recipe; ``measure`` gives the figures of a finished
    training.  ``draw`` makes a picture of the outcome, or is None; ``shown`` words for it, instead
    of the table.  Tables with the same ``group`` share the trainings of rows of the same name.
    """

    title: str
    recipes: Mapping[str, Path]
    rows: Sequence[Row]
    figures: Sequence[str]
    measure: Callable[[Trained, int], dict[str, float]]
    draw: Callable[[Outcome, Path], None] | None = None
    shown: Callable[[Outcome], str] | None = None
    group: str = ""


@dataclass(frozen=True)
class Work:
    """What a :class:`Procedure` is asked to do: trainings of ``seeds`` from ``recipe`` below
    ``out``, ``rows`` are parts of names ([] = all), ``weights`` a file of the user's or None."""

    recipe: Path
    out: Path
    seeds: int
    rows: Sequence[str]
    threads: int
    processes: int
    device: str | None
    report: Callable[[str], None]
    weights: Path | None = None


@dataclass(frozen=True)
class Procedure:
    """A table that ``run`` makes and puts into words; ``recipes`` as in :class:`Table`."""

    title: str
    recipes: Mapping[str, Path]
    run: Callable[[Work], str]


@dataclass(frozen=True)
class Outcome:
    """Figures of each row and seed: ``found[row][figure]`` lists one number per seed."""

    table: Table
    size: str
    seeds: Sequence[int]
    found: Mapping[str, Mapping[str, list[float]]]

    def __str__(self) -> str:
        if self.table.shown:
            return self.table.shown(self)
        header = ["row"] + [f"{name}, {who}" for name in self.table.figures
                            for who in ("published", "ours")] + ["parameters"]
        lines = [f"{self.table.title}; {self.size} recipe, seeds "
                 f"{', '.join(map(str, self.seeds))} (mean, lowest to highest), %", "",
                 "| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
        for row in self.table.rows:
            if row.name not in self.found:
                continue
            cells = [row.name]
            for name in self.table.figures:
                cells += [f"{row.published[name]:.1f}" if name in row.published else "-",
                          spread(self.found[row.name][name])]
            parameters = self.found[row.name].get("parameters", [])
            cells.append(f"{int(parameters[0]):,}" if parameters else "-")
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines)


def spread(shares: Sequence[float]) -> str:
    """Mean of shares in percent, with lowest and highest where there are several."""
    mean = f"{100 * statistics.fmean(shares):.1f}"
    if len(shares) < 2:
        return mean
    return f"{mean} ({100 * min(shares):.1f} to {100 * max(shares):.1f})"


def studies() -> list[str]:
    """Names of the studies that can be made again."""
    return sorted(path.stem.replace("_", "-") for path in Path(__file__).parent.glob("*.py")
                  if not path.stem.startswith("_"))


def tables_of(study: str) -> dict[str, Table | Procedure]:
    """{name: table} of a study; ``UnknownComponent`` names those that exist."""
    if study not in studies():
        raise UnknownComponent(f"no study is called {study!r}; known: {', '.join(studies())}")
    return importlib.import_module(f"{__name__}.{study.replace('-', '_')}").TABLES


def reproduce(study: str, table: str, out: str | Path, *, size: str = "small",
              seeds: int = 3, rows: Sequence[str] = (), recipe: str | Path | None = None,
              threads: int = 1, processes: int = 1, device: str | None = None,
              weights: str | Path | None = None, report: Callable[[str], None] = log.info
              ) -> Outcome | str:
    """Train every row of a table ``seeds`` times and collect its figures.

    ``table`` "" is the first of the study.  ``size`` names one of the table's recipes, ``recipe``
    another file instead; ``rows`` are parts of the names of the rows to do (default: all).
    ``weights`` is a file that a table may ask for.  Everything is kept below ``out``.
    """
    known = tables_of(study)
    table = table or next(iter(known))
    if table not in known:
        raise ConfigurationError(f"{study} has no table {table!r}; it has {', '.join(known)}")
    chosen = known[table]
    if recipe is None and size not in chosen.recipes:
        raise ConfigurationError(f"table {table} of {study} has no size {size!r}; it has "
                                 f"{', '.join(chosen.recipes)}")
    source = Path(recipe) if recipe else chosen.recipes[size]
    word = size if recipe is None else source.stem
    if isinstance(chosen, Procedure):
        return chosen.run(Work(source, Path(out) / study / f"{table}_{word}", seeds, rows, threads,
                               processes, device, report, Path(weights) if weights else None))
    wanted = [row for row in chosen.rows
              if not rows or any(part in row.name for part in rows)]
    if not wanted or seeds < 1:
        raise ConfigurationError(f"table {table} of {study} was asked for the rows "
                                 f"{', '.join(rows)} and {seeds} seeds; rows are "
                                 f"{', '.join(row.name for row in chosen.rows)}; give at least "
                                 "one seed")
    first = tomllib.loads(source.read_text(encoding="utf-8")).get("seed", 0)
    numbers = [first + number for number in range(seeds)]
    found: dict[str, dict[str, list[float]]] = {}
    for row in wanted:
        for number in numbers:
            place = Path(out) / study / f"{chosen.group or table}_{word}" / \
                file_name(row.name) / f"seed{number}"
            figures = _one(source, row, number, place, chosen, threads, processes, device, report)
            for name, value in figures.items():
                found.setdefault(row.name, {}).setdefault(name, []).append(value)
            report(f"{row.name}, seed {number}: " + ", ".join(
                f"{name} {100 * figures[name]:.1f} %" for name in chosen.figures))
    outcome = Outcome(chosen, size if recipe is None else str(source), numbers, found)
    if chosen.draw:
        chosen.draw(outcome, Path(out))
    return outcome


def _one(source: Path, row: Row, seed: int, place: Path, table: Table, threads: int,
         processes: int, device: str | None, report: Callable[[str], None]) -> dict[str, float]:
    """Figures of one training; trained first where that is not finished."""
    kept = place / FIGURES
    _prepare(source, row, seed, place)
    if not kept.exists():
        trained = train_row(source, row, seed, place, threads=threads, processes=processes,
                            device=device, report=report)
        figures = {**table.measure(trained, processes),
                   "parameters": float(sum(p.numel() for p in trained.network.parameters()))}
        unfinished = kept.with_suffix(".tmp")
        unfinished.write_text(json.dumps(figures, indent=1), encoding="utf-8")
        unfinished.replace(kept)
    return json.loads(kept.read_text(encoding="utf-8"))


def train_row(source: Path, row: Row, seed: int, place: Path, *, threads: int = 1,
              processes: int = 1, device: str | None = None,
              report: Callable[[str], None] = log.info) -> Trained:
    """The training of a row in ``place``, finished.

    A row that changes nothing is trained from a copy of the recipe, comments and all, so that its
    training can be exported as that recipe's.
    """
    _prepare(source, row, seed, place)
    report(f"training {row.name}, seed {seed}")
    return train(place / CHANGED, place / "training", threads=threads, processes=processes,
                 device=device, report=report)


def _prepare(source: Path, row: Row, seed: int, place: Path) -> None:
    """Write the row's recipe; figures of another one are removed."""
    place.mkdir(parents=True, exist_ok=True)
    text = source.read_text(encoding="utf-8")
    tables = tomllib.loads(text)
    wanted = changed(tables, row, seed)
    kept = place / CHANGED
    if not kept.exists() or tomllib.loads(kept.read_text(encoding="utf-8")) != wanted:
        kept.write_text(text if wanted == tables else tomli_w.dumps(wanted), encoding="utf-8")
        (place / FIGURES).unlink(missing_ok=True)


def changed(tables: dict[str, Any], row: Row, seed: int) -> dict[str, Any]:
    """A recipe's tables with those of a row laid over, and another seed."""
    made = _laid_over(tables, {**row.changes, "seed": seed})
    if "tasks" in made:
        made["tasks"] = [{**task, **row.tasks.get(task["name"], {})} for task in made["tasks"]]
    return made


def _laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """``above`` wins; None takes a key away.  An architecture's options go with it."""
    made = dict(below)
    if above.get("architecture", made.get("architecture")) != made.get("architecture"):
        made["network"] = {}
    for key, value in above.items():
        if value is None:
            made.pop(key, None)
        elif isinstance(value, Mapping) and isinstance(made.get(key), Mapping):
            made[key] = _laid_over(made[key], value)
        else:
            made[key] = value
    return made


def file_name(words: str) -> str:
    """A row's name as the name of a directory."""
    return "_".join("".join(c if c.isalnum() or c in ".+-" else " " for c in words).split())
