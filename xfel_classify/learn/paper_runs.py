"""The paper's table on ten simulated runs that stand for its runs 90 to 100.

Each run has the paper's event count (times ``scale``) and share of hits; 98, 99 and 100 are drawn
outside of the training condition in flux, concentration and background, as the paper's were
(methods, sfx_hit, Training and results).  Crystals, beams and faults are our draws: the runs are
like the paper's in size, hit rate and what was shifted, not in what is on the images.

Images are simulated and judged block by block and never stored.  Axes: N events of a run.
"""
from __future__ import annotations

import functools
import logging
import math
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from ..core import ConfigurationError
from ..engines import Model, find_model, open_engine
from ..simulate.conditions import PAPER_RUNS, Conditions, PaperRun, draw_conditions
from ..simulate.sfx import LEAST_IN_WINDOW, SimulatedRun
from .datasets import BLOCK, SPARE, normalised, quantise
from .evaluation import Evaluation, RunScore, score_run
from .layouts import run_behind_panels
from .published import PAPER

__all__ = ["PAPER_SEED", "evaluate_paper_runs", "paper_conditions", "paper_table"]

log = logging.getLogger(__name__)

PAPER_SEED = 9298
"""Of the ten runs; no recipe's."""

GROUPS = (("90-93", range(90, 94)), ("94-96", range(94, 97)), ("98-100", range(98, 101)))
COLLAPSED = 0.9         # specificity below which a run's is said to have collapsed


def paper_conditions(run: PaperRun, seed: int = PAPER_SEED) -> Conditions:
    """Our draw of one of the ten runs."""
    return draw_conditions(seed, run.run, run.preset, hit_fraction=run.hit_fraction)


@functools.lru_cache(maxsize=1)
def _simulated(run: PaperRun, seed: int) -> SimulatedRun:
    return run_behind_panels(paper_conditions(run, seed), seed, run.run)


def _block(run: PaperRun, seed: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """(float16 crops (N, 350, 350), labels int8 (N,)) of some events.

    A crystal with hardly a spot on the window's pixels is neither hit nor miss, as in the paper
    (2 to 10 peaks are dropped): another hit takes its place, so that the run keeps its share.
    """
    simulated = _simulated(run, seed)
    images, labels = [], []
    for event in range(start, stop):
        wanted = None
        for number in range(event, event + 200 * SPARE, SPARE):
            photons_PSF, truth = simulated.event(number)
            wanted = truth.is_hit if wanted is None else wanted
            if truth.is_hit == wanted and (
                    not wanted or truth.n_visible_window >= LEAST_IN_WINDOW):
                break
        images.append(quantise(photons_PSF[0]))
        labels.append(truth.is_hit)
    return np.stack(images), np.array(labels, np.int8)


def _blocks(run: PaperRun, seed: int, events: int, pool: ProcessPoolExecutor | None
            ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    spans = [(start, min(start + BLOCK, events)) for start in range(0, events, BLOCK)]
    if pool is None:
        yield from (_block(run, seed, *span) for span in spans)
        return
    # a few at a time: each block is 8 MB
    for first in range(0, len(spans), 16):
        yield from pool.map(_block, *zip(*((run, seed, *span) for span in spans[first:first + 16]),
                                         strict=True))


def evaluate_paper_runs(model: Model | str | Path, *, scale: float = 1.0, seed: int = PAPER_SEED,
                        runs: Sequence[PaperRun] = PAPER_RUNS, backend: str = "auto",
                        processes: int = 1, report: Callable[[str], None] = log.info
                        ) -> Evaluation:
    """Score ``model`` on the ten runs, each with ``scale`` times the paper's events.

    The events of a smaller scale are the first of those of a larger one.  Raises
    :class:`ConfigurationError` for a scale of no events and models that do not look at a crop of
    350 pixels for hits.
    """
    model = find_model(model)
    task, window = model.card.tasks[0], model.window
    if not 0 < scale <= 1:
        raise ConfigurationError(f"the paper's event counts were to be scaled by {scale:g}; give "
                                 "a number above 0, at most 1")
    if not task.positive or window.kind != "crop" or window.shape != (350, 350):
        raise ConfigurationError(
            f"the paper's runs are crops of 350 x 350 pixels, hit or miss; model {model.name} "
            f"answers {task.name} from a {window.height} x {window.width} {window.kind}; evaluate "
            "it on the runs of its recipe")
    rows, scores, labels = [], [], []
    pool = ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) \
        if processes > 1 else None
    try:
        with open_engine(model, backend=backend) as engine:
            for run in runs:
                events = max(1, round(scale * run.events))
                scores_N, labels_N = (np.concatenate(parts) for parts in zip(*(
                    (engine.infer(normalised(images, window))[task.output][:, task.positive_index],
                     truth) for images, truth in _blocks(run, seed, events, pool)), strict=True))
                row = score_run(str(run.run), scores_N, labels_N, task.threshold)
                report(f"run {row.name} ({run.preset}): {row.events} events, Sen "
                       f"{row.sensitivity:.4f} Spe {row.specificity:.4f}")
                rows.append(row)
                scores.append(scores_N)
                labels.append(labels_N)
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)
    return Evaluation(model.name, model.sha256, engine.name, task.threshold, tuple(rows),
                      tuple(scores), tuple(labels))


# --- the table ------------------------------------------------------------------------------

def paper_table(evaluation: Evaluation) -> str:
    """Markdown: run by run and pooled, the paper's figures beside ours; what shifted runs did."""
    presets = {str(run.run): run.preset for run in PAPER_RUNS}
    lines = ["| run | condition | events | % hit | Sen | Spe | Acc | paper: events | % hit | Sen "
             "| Spe | Acc |", "|---" * 12 + "|"]
    for row in evaluation.runs:
        known = PAPER[int(row.name)]
        lines.append(_line(row, presets[row.name], [
            str(known.events), *(f"{value:.4f}" for value in (
                known.hit_fraction, known.sensitivity, known.specificity, known.accuracy))]))
    done = {int(row.name): row for row in evaluation.runs}
    groups = [*GROUPS, ("all", range(90, 101))]
    for name, numbers in groups:
        chosen = [done[n] for n in numbers if n in done]
        if len(chosen) > 1:
            lines.append(_line(_pooled(name, chosen), "pooled", _paper_pooled(
                [int(row.name) for row in chosen])))
    shifted = [row for row in evaluation.runs if presets[row.name] == "shifted"]
    return "\n".join([*lines, "", *(_verdict(row) for row in shifted)])


def _line(row: RunScore, condition: str, paper: Sequence[str]) -> str:
    ours = [row.name, condition, str(row.events), *(f"{value:.4f}" for value in (
        row.hit_fraction, row.sensitivity, row.specificity, row.accuracy))]
    return "| " + " | ".join([*ours, *paper]) + " |"


def _pooled(name: str, rows: Sequence[RunScore]) -> RunScore:
    return RunScore(name, *(sum(getattr(row, part) for row in rows) for part in (
        "true_positive", "false_negative", "false_positive", "true_negative")))


def _paper_pooled(numbers: Sequence[int]) -> list[str]:
    """The paper's runs together, weighted by their hits, misses and events."""
    runs = [PAPER[number] for number in numbers]
    events = sum(run.events for run in runs)
    hits = sum(run.events * run.hit_fraction for run in runs)
    right_hits = sum(run.events * run.hit_fraction * run.sensitivity for run in runs)
    right_misses = sum(run.events * (1 - run.hit_fraction) * run.specificity for run in runs)
    return [str(events), *(f"{value:.3f}" for value in (
        hits / events, right_hits / hits, right_misses / (events - hits),
        (right_hits + right_misses) / events))]


def _verdict(row: RunScore) -> str:
    theirs = PAPER[int(row.name)].specificity
    if math.isnan(row.specificity):
        return f"Run {row.name} has no misses: nothing is said about its specificity."
    what = "COLLAPSES" if row.specificity < COLLAPSED else "does not collapse"
    return (f"Run {row.name} {what}: specificity {row.specificity:.4f} (the paper's "
            f"{theirs:.4f}).")
