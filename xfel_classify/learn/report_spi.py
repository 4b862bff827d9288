"""A page about the evaluation of a single-particle model: accuracies beside what brightness alone
gives, calibration, recall with the hard pair apart, confusion matrices, the answer "unknown"."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .markup import Markup, table, tag
from .report_page import notice, page, section
from .reports import footer, fresh, store
from .spi_scores import HARD_PAIR, SpiEvaluation, SpiScores, TaskScores

__all__ = ["write_spi_evaluation"]


def write_spi_evaluation(evaluation: SpiEvaluation, output: str | Path, *, command: str = "",
                         overwrite: bool = False) -> Path:
    """Write a page about a model's evaluation on simulated images; returns its path."""
    output = fresh(output, overwrite)
    contents = [("overview", "Overview"),
                *((f"part{i}", f"Images of {name}") for i, name in enumerate(evaluation.parts))]
    sections = [section("Overview", _overview(evaluation), id="overview"),
                *(section(f"Images of {name}", *_part(scores), id=f"part{i}")
                  for i, (name, scores) in enumerate(evaluation.parts.items()))]
    if evaluation.unknown:
        contents.append(("unknown", "Unknown particles"))
        sections.append(section("Unknown particles", _unknown(evaluation), id="unknown"))
    lead = (f"{evaluation.backend}, weights {evaluation.sha256[:12]}. Every image is simulated; "
            f"structures: {evaluation.structures}.")
    warned = notice("Particles are stand-ins for the published entries: figures are of these.") \
        if evaluation.structures == "standins" else None
    return store(page(f"Evaluation of {evaluation.model}", lead, contents, warned, *sections,
                      footer=footer(command)), output)


def percent(share: float) -> str:
    return f"{100 * share:.1f}" if np.isfinite(share) else "-"


def _overview(evaluation: SpiEvaluation) -> Markup:
    rows = []
    for preset, scores in evaluation.parts.items():
        alone = scores.brightness
        count, particle = (scores.tasks[name].accuracy if name in scores.tasks else float("nan")
                           for name in ("count", "particle"))
        rows.append([preset, scores.images, percent(scores.total), percent(count),
                     f"{percent(alone.count)} / {percent(alone.count_blind)}" if alone else "-",
                     percent(scores.single),
                     f"{percent(alone.single)} / {percent(alone.single_blind)}" if alone else "-",
                     percent(particle)])
    return table(["images of", "images", "total", "count", "by brightness alone",
                  "single or multiple", "by brightness alone", "particle"], rows, class_="numbers",
                 caption="Percent right; total: all answers. What the sum of an image alone gives: "
                         "with the particle told / not told.")


def _part(scores: SpiScores) -> Iterator[Markup]:
    for name, one in scores.tasks.items():
        yield tag("h3", name)
        yield tag("p", f"Expected calibration error {one.calibration_error:.4f}. {_pair(one)}")
        recalls = {label: one.recall(label) for label in one.classes}
        yield tag("div", table(
            ["true \\ called", *one.classes, "recall"],
            [[label, *map(int, row), f"{recalls[label]:.3f}"]
             for label, row in zip(one.classes, one.confusion_KK, strict=True)],
            class_="numbers"), class_="wide")
    if scores.numbers:
        yield table(["number", "mean error", "median relative error", "correlation"],
                    [[name, f"{one.mean_error:.4g}", f"{one.median_relative_error:.4f}",
                      f"{one.pearson:.4f}"] for name, one in scores.numbers.items()],
                    class_="numbers")


def _pair(one: TaskScores) -> str:
    pair = [label for label in HARD_PAIR if label in one.classes]
    if not pair:
        return ""
    others = [one.recall(label) for label in one.classes if label not in pair]
    return (f"Hard pair {' and '.join(pair)}: recall "
            f"{' and '.join(f'{one.recall(label):.3f}' for label in pair)}; worst of the others "
            f"{np.nanmin(others):.3f}.")


def _unknown(evaluation: SpiEvaluation) -> Markup:
    return table(["unseen particles of", "known images", "unseen images", "area under ROC",
                  "known accepted", "unseen rejected"],
                 [[preset, one.known, one.unseen, f"{one.auroc:.4f}", f"{one.accepted:.4f}",
                   f"{one.rejected:.4f}"] for preset, one in evaluation.unknown.items()],
                 class_="numbers")
