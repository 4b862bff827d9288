"""Selections of single hits side by side: the published table, and intersections of selections.

The study [IGN21] tells for each selector how many patterns it selects, how many of them the manual
selection has too, and shares that follow from these two numbers, 995 manual singles and 16,937
other patterns.  Three printed values do not follow (methods specification, section 3c); the table
shows what was printed beside what follows.

Axes: N pattern.
"""
from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..core import ConfigurationError

__all__ = ["COLUMNS", "INTERSECTED_ITERATIONS", "PUBLISHED", "PublishedRow", "Selection",
           "intersection", "judged", "markdown", "published_selection", "votes"]

COLUMNS = ("selected", "in manual", "IoU %", "accuracy %", "precision %", "recall %", "F1 %")

MANUAL, OTHERS = 995, 16_937
"""Positive and negative patterns of the study's test set."""

INTERSECTED_ITERATIONS = (4000, 4100, 4200, 4300, 4400)
"""A pattern is selected only if the models of all of these select it."""


@dataclass(frozen=True)
class Selection:
    """One selection against a manual one: ``common`` of ``selected`` are among ``manual``;
    ``patterns`` were there to choose from."""

    name: str
    selected: int
    common: int
    manual: int
    patterns: int

    def __post_init__(self) -> None:
        most = min(self.selected, self.manual)
        union = self.selected + self.manual - self.common
        if not 0 <= self.common <= most or union > self.patterns:
            raise ConfigurationError(
                f"selection {self.name!r} was told to hold {self.selected} patterns, {self.common} "
                f"of them among {self.manual} manual ones, out of {self.patterns}; these numbers "
                "contradict each other; count again")

    @property
    def iou(self) -> float:
        """Of the two selections; NaN when both are empty."""
        return _share(self.common, self.selected + self.manual - self.common)

    @property
    def accuracy(self) -> float:
        wrong = self.selected + self.manual - 2 * self.common
        return _share(self.patterns - wrong, self.patterns)

    @property
    def precision(self) -> float:
        return _share(self.common, self.selected)

    @property
    def recall(self) -> float:
        return _share(self.common, self.manual)

    @property
    def f1(self) -> float:
        return _share(2 * self.common, self.selected + self.manual)

    def numbers(self) -> dict[str, float]:
        """{column: number}; shares in percent, NaN where nothing can be said."""
        shares = (self.iou, self.accuracy, self.precision, self.recall, self.f1)
        return dict(zip(COLUMNS, (self.selected, self.common, *(100 * s for s in shares)),
                        strict=True))


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


@dataclass(frozen=True)
class PublishedRow:
    """A row as printed: shares in whole percent, IoU to recall."""

    name: str
    selected: int
    common: int
    printed: tuple[int, int, int, int]


PUBLISHED: tuple[PublishedRow, ...] = (
    PublishedRow("YOLOv2 colour linear", 1185, 597, (38, 95, 50, 60)),
    PublishedRow("YOLOv2 colour log", 1368, 614, (35, 94, 45, 62)),
    PublishedRow("YOLOv2 gray linear", 1756, 622, (29, 92, 35, 63)),
    PublishedRow("YOLOv2 gray log", 904, 487, (34, 95, 54, 50)),
    PublishedRow("YOLOv3 colour linear", 1041, 505, (33, 94, 49, 51)),
    PublishedRow("YOLOv3 gray linear", 2316, 465, (16, 87, 20, 47)),
    PublishedRow("EM based (reference)", 1085, 574, (34, 94, 53, 48)),
)


def published_selection(row: PublishedRow, manual: int = MANUAL,
                        patterns: int = MANUAL + OTHERS) -> Selection:
    """What follows from a printed row's counts; the printed EM row fits about 1196 manual ones."""
    return Selection(row.name, row.selected, row.common, manual, patterns)


def judged(name: str, selected_N: np.ndarray, manual_N: np.ndarray) -> Selection:
    """A selection against the truth, both bool (N,)."""
    selected_N, manual_N = np.asarray(selected_N, bool), np.asarray(manual_N, bool)
    if selected_N.shape != manual_N.shape or selected_N.ndim != 1:
        raise ConfigurationError(f"selection {name!r} is of {selected_N.shape} patterns and the "
                                 f"manual one of {manual_N.shape}; give both for the same patterns")
    return Selection(name, int(selected_N.sum()), int((selected_N & manual_N).sum()),
                     int(manual_N.sum()), len(manual_N))


def intersection(selections: Mapping[int, np.ndarray],
                 iterations: Sequence[int] = INTERSECTED_ITERATIONS) -> np.ndarray:
    """bool (N,): patterns that the models of all ``iterations`` select.

    ``selections`` is {iteration: bool (N,)}.  Raises :class:`ConfigurationError` for one that is
    missing: an intersection of fewer is another selection.
    """
    missing = [number for number in iterations if number not in selections]
    if missing or not iterations:
        raise ConfigurationError(
            f"selections of iterations {', '.join(map(str, iterations)) or '(none)'} were to be "
            f"intersected; there are {', '.join(map(str, sorted(selections))) or 'none'}; save "
            "these stages in training, or name others")
    return votes([selections[number] for number in iterations], len(iterations))


def votes(selections: Iterable[np.ndarray], least: int) -> np.ndarray:
    """bool (N,): patterns in at least ``least`` of the selections, each bool (N,)."""
    cast = [np.asarray(one, bool) for one in selections]
    if not cast or not 1 <= least <= len(cast) or len({one.shape for one in cast}) > 1:
        raise ConfigurationError(
            f"{least} of {len(cast)} selections of {sorted({one.shape for one in cast})} patterns "
            "were to agree; give selections of the same patterns and a number of them")
    return np.asarray(np.sum(cast, axis=0, dtype=np.int64) >= least)


def markdown(own: Sequence[Selection], published: Sequence[PublishedRow] = PUBLISHED) -> str:
    """The table with every column; the published rows below ours, as printed / as it follows."""
    lines = ["| selection | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for one in own:
        values = one.numbers()
        lines.append(f"| {one.name} | " + " | ".join(
            _written(values[column], 0 if number < 2 else 1)
            for number, column in enumerate(COLUMNS)) + " |")
    for row in published:
        values = published_selection(row).numbers()
        cells = [str(row.selected), str(row.common)]
        cells += [f"{printed} / {values[column]:.1f}"
                  for printed, column in zip(row.printed, COLUMNS[2:6], strict=True)]
        lines.append(f"| {row.name} [IGN21] | " + " | ".join(cells)
                     + f" | - / {values['F1 %']:.1f} |")
    if published:
        lines += ["", f"[IGN21]: as printed / from {MANUAL} manual of {MANUAL + OTHERS} patterns; "
                  "the reference was printed against about 1196 manual ones."]
    return "\n".join(lines)


def _written(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"
