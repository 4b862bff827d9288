"""A page about the evaluation of a model that tells single bodies from all else."""
from __future__ import annotations

from pathlib import Path

from .markup import table, tag
from .quality_scores import COLUMNS, QualityEvaluation, quality_row
from .report_page import page, section
from .reports import footer, fresh, store

__all__ = ["write_quality_evaluation"]


def write_quality_evaluation(evaluation: QualityEvaluation, output: str | Path, *,
                             command: str = "", overwrite: bool = False) -> Path:
    """Write a page about a model's evaluation on simulated images; returns its path."""
    output = fresh(output, overwrite)
    parts = list(evaluation.parts.values())
    rows = table(list(COLUMNS), [quality_row(one) for one in parts], class_="numbers",
                 caption="balanced: mean of the shares of good and of other images called right; "
                         "where few images are good, accuracy says little")
    allowed = table(["images of", "threshold", "good called bad %",
                     "good called bad % when at most 1 % of bad pass", "best F1 %",
                     "at threshold"],
                    [[one.name, f"{one.threshold:.3g}", f"{100 * one.errors.fnr:.2f}",
                      f"{100 * one.errors.fnr_allowed:.2f}", f"{100 * one.best_f1:.2f}",
                      f"{one.best_threshold:.3g}"] for one in parts], class_="numbers")
    return store(page(
        f"Evaluation of {evaluation.model}",
        f"{evaluation.backend}, weights {evaluation.sha256[:12]}. Every image is simulated.",
        [("overview", "Overview"), ("thresholds", "Thresholds")], None,
        section("Overview", tag("div", rows, class_="wide"), id="overview"),
        section("Thresholds", allowed, id="thresholds"), footer=footer(command)), output)
