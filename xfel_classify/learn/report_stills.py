"""A page about an evaluation of the lattice or the resolution network.

Resolution: scatter of 1/d with Pearson, Spearman and the share within 0.07 per angstrom.  Lattice:
confusion matrix, curves, and the share called right against the mis-setting angle, by its law.
The published figures [CICH23; MEN24] stand beside ours.

Axes: N images.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import report_figures as figures
from . import report_tables as tables
from .curves import wilson
from .evaluation import score_run
from .markup import Markup, join, table, tag
from .report_page import figure, page, section
from .report_runs import Judged
from .reports import footer, fresh, store
from .stills_scores import (
    ANGLES_DEG,
    WITHIN,
    LatticeScores,
    ResolutionScores,
    StillsEvaluation,
)

__all__ = ["write_stills_evaluation"]

SOURCE = ("Published: Mendez et al., Acta Cryst. D80 (2024), and Cichosz et al., UCSB/SLAC poster "
          "(2023); their images are of another simulator, ours are not the same.")


def write_stills_evaluation(evaluation: StillsEvaluation, output: str | Path, *,
                            threshold: float = 0.5, command: str = "",
                            overwrite: bool = False) -> Path:
    """Write the page; returns its path.  ``threshold`` is that of the lattice question.

    Raises :class:`OutputError` and its kin, :class:`MissingDependency` without matplotlib.
    """
    output = fresh(output, overwrite)
    figures.require_matplotlib()
    answers_N = np.asarray(evaluation.answers_N, np.float64)
    if isinstance(evaluation.scores, ResolutionScores):
        parts = [("resolution", "Resolution", list(_resolution(
            evaluation.scores, answers_N, evaluation.labels["inverse_d_A"])))]
    else:
        parts = [("lattice", "One lattice or several", list(_lattice(
            evaluation.scores, answers_N, evaluation.labels, threshold)))]
    text = page(
        f"Evaluation of {evaluation.model}",
        f"{len(answers_N)} simulated images, {evaluation.backend}, weights "
        f"{evaluation.sha256[:12]}. Every image is simulated.",
        [(id, heading) for id, heading, _ in parts],
        *[section(heading, *content, id=id) for id, heading, content in parts],
        footer=footer(command))
    return store(text, output)


def _figures_of_merit(rows: Sequence[tuple[str, str, str]]) -> Markup:
    return join(table(["figure", "ours", "published"], [
        [name, ours, tag("td", theirs, class_="paper")] for name, ours, theirs in rows],
        class_="numbers", id="figures"), tag("p", SOURCE, class_="muted"))


def _resolution(scores: ResolutionScores, answers_N: np.ndarray,
                truth_N: np.ndarray) -> Iterator[Markup]:
    truth_N = np.asarray(truth_N, np.float64)
    inside = int((np.abs(answers_N - truth_N) < WITHIN).sum())
    yield _figures_of_merit([
        ("Pearson correlation of 1/d", f"{scores.pearson:.4f}", "0.96"),
        ("Spearman correlation of 1/d", f"{scores.spearman:.4f}", "–"),
        (f"share within {WITHIN:g} per Å", _share(inside, len(answers_N)), "–"),
        ("mean error of 1/d (1/Å)", f"{scores.mean_error:.4f}", "–"),
        ("median error of d, relative", f"{scores.median_d_error:.4f}", "–")])
    yield figure(figures.resolution_scatter(truth_N, answers_N, WITHIN,
                                            "Answered against true 1/d, and its errors"),
                 f"Left: one mark per image; dashed: right; band: within {WITHIN:g} per Å. Right: "
                 "errors, the outermost bars hold all beyond.")
    yield tag("h3", "By resolution")
    rows = []
    for low, high in ((0.0, 0.2), (0.2, 0.25), (0.25, 0.33), (0.33, 0.4), (0.4, 0.5), (0.5, 0.6),
                      (0.6, 9.0)):
        chosen_N = (truth_N >= low) & (truth_N < high)
        if not chosen_N.any():
            continue
        error_N = answers_N[chosen_N] - truth_N[chosen_N]
        name = f"above {1 / high:.2f} Å" if not low else f"below {1 / low:.2f} Å" if high > 1 \
            else f"{1 / low:.2f} to {1 / high:.2f} Å"
        rows.append([name, int(chosen_N.sum()),
                     _share(int((np.abs(error_N) < WITHIN).sum()), len(error_N)),
                     f"{np.abs(error_N).mean():.4f}", f"{error_N.mean():+.4f}"])
    yield table(["true d", "images", f"within {WITHIN:g} per Å", "mean error 1/d",
                 "bias of 1/d"], rows, class_="numbers", id="by-resolution")


def _lattice(scores: LatticeScores, answers_N: np.ndarray, labels: Any,
             threshold: float) -> Iterator[Markup]:
    several_N = np.asarray(labels["n_lattices"]) > 1
    angle_N = np.asarray(labels["misset_deg"], np.float64)
    sigma_N = np.asarray(labels["misset_sigma_deg"], np.float64)
    called_N = answers_N >= threshold
    right = int((called_N == several_N).sum())
    yield _figures_of_merit([
        ("accuracy", _share(right, len(answers_N)), "0.94 uniform; at least 0.80 Gaussian"),
        ("balanced accuracy", f"{scores.balanced_accuracy:.4f}", "–"),
        ("Jaccard index of \"several\"", f"{scores.jaccard:.4f}", "–"),
        ("area under the ROC curve", f"{scores.roc_area:.4f}", "–")])
    counts = score_run("several lattices", answers_N, several_N.astype(np.int8), threshold)
    one = Judged("all images", -1, "several lattices", "simulated truth", counts,
                 np.arange(len(answers_N)), answers_N, several_N.astype(np.int8))
    yield tag("h3", "Confusion matrix")
    yield table(
        ["", "called several", "called one"],
        [["several lattices", _cell(counts.true_positive, counts.events, True),
          _cell(counts.false_negative, counts.events, False)],
         ["one lattice", _cell(counts.false_positive, counts.events, False),
          _cell(counts.true_negative, counts.events, True)]],
        caption="Count, and share of all images. Dashed frames: wrong answers.",
        class_="confusion")
    yield tag("h3", "Against the mis-setting angle")
    groups = dict(_by_law(several_N, called_N, angle_N, sigma_N))
    single_N = ~several_N
    yield figure(figures.called_by_angle(
        groups, (int((~called_N & single_N).sum()), int(single_N.sum())),
        "Share called right against the smallest mis-setting angle"),
        "Shots with two or three lattices by the smallest angle between them, by the law that the "
        "angles were drawn from; bars and band: 95 % interval (Wilson).")
    yield table(["law, smallest angle", "images", "called several"], [
        [f"{law}, {low:g} to {high:g}°", images, _share(called, images)]
        for law, rows in groups.items() for low, high, called, images in rows],
        class_="numbers", id="by-angle")
    yield tag("h3", "Threshold curves")
    found = tables.curves_of(one)
    if found is None:
        yield tag("p", "No curves: they need images of both kinds.", class_="muted")
        return
    called = counts.true_positive + counts.false_positive
    yield figure(figures.threshold_curves([figures.Curve(
        "several lattices", found, counts.sensitivity, 1 - counts.specificity,
        counts.true_positive / called if called else 1.0)], "ROC and precision-recall curves"),
        f"The marker is the threshold in use, {threshold:g}.")


def _cell(count: int, events: int, right: bool) -> Markup:
    return tag("td", tag("span", count, class_="value"), tag("small", tables.share(
        count / events if events else float("nan"))), class_="right" if right else "wrong")


def _by_law(several_N: np.ndarray, called_N: np.ndarray, angle_N: np.ndarray, sigma_N: np.ndarray
            ) -> Iterator[tuple[str, list[tuple[float, float, int, int]]]]:
    """(law, [(from, to, called, images)]) of the shots with several lattices."""
    for sigma in np.unique(sigma_N[several_N]):
        rows = []
        for low, high in zip(ANGLES_DEG[:-1], ANGLES_DEG[1:], strict=True):
            chosen_N = several_N & (sigma_N == sigma) & (angle_N >= low) & (angle_N < high)
            if chosen_N.any():
                rows.append((low, high, int(called_N[chosen_N].sum()), int(chosen_N.sum())))
        if rows:
            yield (f"normal, σ = {sigma:g}°" if sigma else "uniform"), rows


def _share(part: int, whole: int) -> str:
    low, high = wilson(part, whole)
    return f"{part / whole:.4f} ({low:.3f}–{high:.3f})" if whole else "–"
