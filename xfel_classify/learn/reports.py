"""Reports: one self-contained HTML page about runs, or about an evaluation of a model.

Axes: N events.
"""
from __future__ import annotations

import datetime
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

import h5py
import numpy as np

from ..core import ConfigurationError, OutputError, OutputExists, OutputFull
from ..sinks.staging import staged_bytes
from . import report_figures as figures
from . import report_images as images
from . import report_tables as tables
from .evaluation import Evaluation, RunScore
from .labels import DROPPED, HIT, Agreement, Labels, agreement, labels_from_counts
from .markup import Markup, join, tag
from .report_page import figure, notice, page, section
from .report_runs import Answer, Judged, ReportRun, find_summaries, open_runs, pooled

__all__ = ["Options", "elog_page", "footer", "fresh", "store", "write_evaluation", "write_report"]

POWDER_LONGEST, FRAME_LONGEST = 560, 420
"""Picture elements on the longer side; larger detectors are shown by the maximum of neighbours."""


@dataclass(frozen=True)
class Options:
    """What a report shows."""

    column: str = ""                    # answers to judge first; "" = those that chose the hits
    geometry: Path | None = None        # instead of the .geom beside each summary
    gallery: int = 4                    # frames of each kind
    read_run: bool = True               # read frames that the CXI lacks from the run itself
    title: str = ""
    command: str = ""


def write_report(paths: Sequence[str | Path], output: str | Path, *,
                 labels: Sequence[Labels] = (), options: Options | None = None,
                 overwrite: bool = False) -> Path:
    """Write a page about summaries (files or directories of runs); returns its path.

    Raises :class:`OutputError` and its kin for files that are missing, damaged or there already,
    :class:`ConfigurationError` for labels or columns that fit none of the runs,
    :class:`MissingDependency` without matplotlib.
    """
    options = options or Options()
    output = fresh(output, overwrite)
    figures.require_matplotlib()
    runs = open_runs(find_summaries(paths), labels, options.column)
    return store(_page(runs, options), output)


def write_evaluation(evaluation: Evaluation, output: str | Path, *, command: str = "",
                     overwrite: bool = False) -> Path:
    """Write a page about a model's evaluation on simulated runs; returns its path."""
    output = fresh(output, overwrite)
    figures.require_matplotlib()
    # the paper's runs are named by their numbers, so that its figures come to stand beside ours
    judged = [Judged(run.name, int(run.name) if run.name.isdigit() else -1, "hit/label",
                     "simulated truth", run, np.arange(run.events),
                     np.asarray(scores_N, np.float64), np.asarray(truth_N, np.int8))
              for run, scores_N, truth_N in zip(evaluation.runs, evaluation.scores,
                                                evaluation.labels, strict=True)]
    contents = [("judged", "Against the truth"), ("scores", "Scores")]
    title = f"Evaluation of {evaluation.model}"
    lead = (f"Threshold {evaluation.threshold:g}, {evaluation.backend}, weights "
            f"{evaluation.sha256[:12]}. Every frame is simulated.")
    every = _joined(judged)
    score = figure(figures.score_histogram(every.score_N, every.truth_N, "hit/score",
                                           evaluation.threshold, "Histogram of scores"),
                   "Scores of hits and misses of all runs.", "half")
    text = page(title, lead, contents,
                section("Against the truth", *_judgement({"hit/label": judged}), id="judged"),
                section("Scores", score, id="scores"), footer=footer(command))
    return store(text, output)


def elog_page(directory: str | Path, name: str, paths: Sequence[str | Path]) -> Path:
    """``directory/NAME/report.html``; NAME defaults to xfel_classify_r0095 or _r0090-r0100.

    The eLog shows ``<experiment>/stats/summary/NAME/report.html``; NAME may have slashes.
    Makes the folder.  Raises :class:`OutputError`.
    """
    if not name:
        runs = open_runs(find_summaries(paths))
        numbers = sorted({run.number for run in runs})
        name = "xfel_classify_" + "-".join(f"r{n:04d}" for n in dict.fromkeys(
            (numbers[0], numbers[-1])))
    parts = PurePosixPath(name).parts
    if not parts or not all(re.fullmatch(r"[\w.+-]+", part) and part.strip(".") for part in parts):
        raise ConfigurationError(f"{name!r} was to name a folder in the eLog; use letters, digits, "
                                 "'_', '-', '.' and '/'")
    folder = Path(directory).joinpath(*parts)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder} cannot be made: {error.strerror or error}; choose another "
                          "place with --elog") from error
    return folder / "report.html"


def fresh(output: str | Path, overwrite: bool) -> Path:
    """``output`` where a page may be written; :class:`OutputError` and its kin say why not."""
    output = Path(output)
    if output.is_dir():
        raise OutputExists(f"{output} was to be a page, but is a directory; give a file name "
                           "with -o")
    if not output.parent.is_dir():
        raise OutputError(f"{output} cannot be written: its directory does not exist; make it, or "
                          "give another with -o")
    if output.exists() and not overwrite:
        raise OutputExists(f"{output} already exists; choose another name with -o, or replace it "
                           "with --overwrite")
    return output


def store(text: str, output: Path) -> Path:
    """Write a page, whole or not at all; returns its path."""
    try:
        staged_bytes(output.parent, output.name, text.encode())
        os.replace(output.with_name(f"{output.name}.tmp"), output)
    except OutputFull as error:
        raise OutputFull(f"{output} cannot be written: the disk or the quota is full; free some "
                         "space and run the same command again") from error
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"{output} cannot be written: {error}; choose another name with -o"
                          ) from error
    return output


def footer(command: str) -> Markup:
    """Who wrote the page, when, by which command."""
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return join(f"Written by xfel_classify {version('xfel-classify')} on {now}.",
                join(" Command: ", tag("code", command)) if command else None)


# --- the page --------------------------------------------------------------------------------

def _page(runs: Sequence[ReportRun], options: Options) -> str:
    names = list(dict.fromkeys(run.exp for run in runs))
    numbers = ", ".join(str(run.number) for run in runs)
    title = options.title or f"{', '.join(names)}: run{'s' * (len(runs) > 1)} {numbers}"
    labelled = [run for run in runs if run.labels and run.answers]
    contents, sections = [("overview", "Overview")], [
        section("Overview", *_notices(runs),
                tag("div", tables.overview(runs), class_="wide"), id="overview")]
    if labelled:
        contents.append(("judged", "Against the labels"))
        sections.append(section("Against the labels", *_against_labels(labelled), id="judged"))
    compared = [(run.stem, one) for run in runs for one in _agreements(run)]
    if compared:
        contents.append(("agreements", "Agreement of label sets"))
        sections.append(section(
            "Agreement of label sets", tag("div", tables.agreements(compared), class_="wide"),
            tag("p", "κ is the agreement beyond chance: 0 as by chance, 1 complete, "
                "– when both sets know one class only.", class_="muted"), id="agreements"))
    for number, run in enumerate(runs):
        contents.append((f"run-{number}", f"Run {run.number} of {run.exp}"))
        sections.append(section(f"Run {run.number} of {run.exp}", *_run(run, options),
                                id=f"run-{number}"))
    contents.append(("provenance", "Where the numbers come from"))
    sections.append(section("Where the numbers come from", *_provenance(runs), id="provenance"))
    events = sum(run.events for run in runs)
    lead = f"{events} events of {len(runs)} run{'s' * (len(runs) != 1)}."
    return page(title, lead, contents, *sections, footer=footer(options.command))


def _notices(runs: Sequence[ReportRun]) -> Iterator[Markup]:
    for run in runs:
        if not run.complete:
            yield notice(f"{run.stem} is INCOMPLETE: {run.events} events of "
                         f"{run.attributes.get('events_expected', 'an unknown number of')} are in "
                         "its summary; run its command again with --resume.")
        if not run.events:
            yield notice(f"{run.stem} has no events.")
        elif not run.usable_N.any():
            yield notice(f"{run.stem} has no event with a usable image.")
        if not run.answers:
            yield notice(f"{run.stem} was asked neither a model nor a peak finder: there are no "
                         "hits and misses to show.")
        remarks = run.attributes.get("notes") or ()
        for remark in [remarks] if isinstance(remarks, str) else remarks:
            yield notice(f"{run.stem}: {remark}")
    if not any(run.labels for run in runs):
        yield tag("p", "No labels were given, so nothing here says how many answers are right. "
                  "Give some with --labels.", class_="muted")


def _against_labels(runs: Sequence[ReportRun]) -> Iterator[Markup]:
    references = [run.labels[0] for run in runs]
    kinds = sorted({one.kind for one in references})
    said = {"truth": "what was simulated: the figures hold for simulated frames of that kind",
            "expert": "an expert's answers",
            "peak counts": "counts of a peak finder: agreement with the finder, not truth",
            "answers": "answers of another method: agreement with it, not truth"}
    yield tag("p", "Labels are ", "; ".join(said.get(kind, kind) for kind in kinds), ".")
    for run in runs:
        one = run.judge(run.answers[0], run.labels[0])
        if one.unanswered or one.unlabelled:
            yield tag("p", f"{run.stem}: {one.unanswered} labelled events have no answer (no "
                      f"usable image, or not asked), {one.unlabelled} answered events have no "
                      "label; neither are counted.", class_="muted")
    columns = list(dict.fromkeys(answer.column for run in runs for answer in run.answers))
    yield from _judgement({
        column: [run.judge(answer, run.labels[0]) for run in runs for answer in run.answers
                 if answer.column == column] for column in columns})


def _judgement(judged: dict[str, list[Judged]]) -> Iterator[Markup]:
    """Tables, matrices and curves of each answer."""
    for column, ones in judged.items():
        yield tag("h3", f"{column}: sensitivity, specificity, accuracy")
        yield tag("div", tables.scores(ones, column), class_="wide")
    yield tag("p", "Sen = TP / (TP + FN), Spe = TN / (TN + FP), Acc = right / events; below them "
              "the 95 % interval (Wilson).", class_="muted")
    if any(one.number in tables.PAPER for ones in judged.values() for one in ones):
        yield tag("p", "Paper: P.-N. Li, Stanford CS229 report (2018), streptavidin at LCLS, "
                  "labelled by a peak finder. The run numbers are the same; sample, detector and "
                  "labels are not.", class_="muted")
    yield tag("h3", "Confusion matrices")
    for ones in judged.values():
        yield tables.confusions(ones)
    yield tag("p", "Count, and share of all events. Dashed frames: wrong answers.",
              class_="muted")
    yield tag("h3", "Threshold curves")
    yield from _curves(judged)


def _joined(ones: Sequence[Judged]) -> Judged:
    """All runs as one."""
    return replace(ones[0], run="all runs", counts=pooled(ones),
                   score_N=np.concatenate([one.score_N for one in ones]),
                   truth_N=np.concatenate([one.truth_N for one in ones]))


def _curves(judged: dict[str, list[Judged]]) -> Iterator[Markup]:
    together = [_joined(ones) for ones in judged.values()]
    lines = [line for one in together if (line := _line(one, one.column))]
    if lines:
        yield figure(figures.threshold_curves(lines, "ROC and precision-recall curves"),
                     "Curves run over all thresholds of the score (of peaks/hit: the number of "
                     "peaks); the marker is the threshold in use. AUC: area under the ROC curve; "
                     "AP: average precision.")
    else:
        yield tag("p", "No curves: they need a score, and labels of both classes.",
                  class_="muted")
    first = next(iter(judged.values()))
    if len(first) > 1:
        each = [line for one in first if (line := _line(one, one.run))]
        if each:
            yield figure(figures.threshold_curves(each, "Curves of each run"),
                         f"{first[0].column}, run by run.")
    yield tables.areas([(one.run, one.column, tables.curves_of(one))
                        for ones in [*judged.values(), *([together] if len(first) > 1 else [])]
                        for one in ones])


def _line(one: Judged, name: str) -> figures.Curve | None:
    found = tables.curves_of(one)
    if found is None:
        return None
    counts: RunScore = one.counts
    called = counts.true_positive + counts.false_positive
    return figures.Curve(name, found, counts.sensitivity, 1 - counts.specificity,
                         counts.true_positive / called if called else 1.0)


def _agreements(run: ReportRun) -> Iterator[Agreement]:
    """Every pair of label sets, and the first with labels by peak counts."""
    sets = list(run.labels)
    if sets and run.peaks_N is not None and not any(s.kind == "peak counts" for s in sets):
        with h5py.File(run.path) as file:
            counted = labels_from_counts(file, run.path)
        sets.append(replace(counted, name="peak counts (< 2 miss, > 10 hit)"))
    for position, second in enumerate(sets[1:], 1):
        for first in sets[:position]:
            if len(first) and len(second):
                yield agreement(first, second)


def _run(run: ReportRun, options: Options) -> Iterator[Any]:
    truth_N = run.truth_N(run.labels[0]) if run.labels else np.full(run.events, DROPPED, np.int8)
    if run.answers and run.events:
        shown = {answer.column: answer.label_N for answer in run.answers}
        if run.labels:
            shown[f"labels: {run.labels[0].name}"] = truth_N
        yield figure(figures.hit_rate(shown, run.timestamp_N, f"Hit rate of run {run.number}"),
                     "Hit rate over the run; the band is the 95 % interval (Wilson) of the first "
                     "answer.")
        yield tag("div", *_scores(run, truth_N), class_="grid")
    yield tag("div", tag("div", tag("h3", "How events ended"), tables.statuses(run)),
              _timing(run), class_="grid")
    yield from _powders(run, options)
    yield from _gallery(run, truth_N, options)


def _scores(run: ReportRun, truth_N: np.ndarray) -> Iterator[Markup]:
    for answer in run.answers:
        if not answer.score or not np.isfinite(answer.score_N).any():
            continue
        cut = _cut(answer)
        yield figure(figures.score_histogram(answer.score_N, truth_N, answer.score, cut,
                                             f"Histogram of {answer.score}"),
                     f"Events by {answer.score}.", "half")
        if run.peaks_N is not None and answer.score != "peaks/n":
            yield figure(figures.score_against_peaks(
                answer.score_N, run.peaks_N, truth_N, answer.score, cut,
                f"{answer.score} against number of peaks"),
                f"{answer.score} against the number of peaks, one mark per event.", "half")


def _cut(answer: Answer) -> float | None:
    """The smallest score that is called a hit."""
    called_N = answer.score_N[answer.label_N == HIT]
    return float(np.nanmin(called_N)) if np.isfinite(called_N).any() else None


def _timing(run: ReportRun) -> Markup | None:
    if not run.stages:
        return None
    speed = ""
    if run.wall_s == run.wall_s and run.wall_s > 0:
        speed = (f" {run.events / run.wall_s:.1f} events/s on {run.ranks} working "
                 f"rank{'s' * (run.ranks != 1)}.")
    return figure(figures.timing(run.stages, "Seconds of each stage"),
                  f"Where the time went.{speed}", "half")


def _powders(run: ReportRun, options: Options) -> Iterator[Markup]:
    wanted = (("powder_max_hits", "maximum over hits"),
              ("powder_max_misses", "maximum over misses"))
    found, unit = {}, ""
    for name, text in wanted:
        total = run.total(name)
        if total is not None and np.ndim(total[0]) == 3 and total[1].get("events", 0):
            found[f"{text} ({total[1]['events']} events)"] = total[0]
            unit = str(total[1].get("units", ""))
    if not found:
        return
    geometry, remark = images.geometry_of(run, options.geometry)
    place = images.assembly(geometry, POWDER_LONGEST)
    drawn = figures.powders({name: place.image(values) for name, values in found.items()},
                            place.extent_mm, unit, "Powder patterns of hits and misses")
    yield tag("h3", "Powder patterns")
    if remark:
        yield notice(remark)
    pooling = f" Each point is the maximum of {place.pool} x {place.pool} pixels." \
        if place.pool > 1 else ""
    yield figure(drawn, "Seen from behind the detector, towards the source; beam at (0, 0). "
                 f"Dark is bright, on a logarithmic scale; blue-grey: no pixels.{pooling}")


def _gallery(run: ReportRun, truth_N: np.ndarray, options: Options) -> Iterator[Markup]:
    kinds = list(_kinds(run, truth_N, options.gallery))
    chosen = [row for _, _, rows in kinds for row in rows]
    if not chosen:
        return
    answer = run.answers[0]
    geometry, remark = images.geometry_of(run, options.geometry)
    place = images.assembly(geometry, FRAME_LONGEST)
    frames, lost = images.frames_of(run, chosen, options.read_run)
    shown = images.pictures(frames, place)
    value_range = images.common_range(shown)
    peaks = dict(zip(chosen, run.peaks(chosen), strict=True))
    yield tag("h3", "Frames")
    for text in (remark, lost):
        if text:
            yield notice(text)
    unit = run.attributes.get("calibrated_unit", "")
    yield tag("p", f"Circles are peaks that the finder found. Grey from {value_range[0]:.3g} "
              f"(white) to {value_range[1]:.3g} {unit} (black), the same for all frames of the "
              "run, by the square root; neighbouring pixels shown by their maximum.",
              class_="muted")
    for name, count, rows in kinds:
        yield tag("h3", f"{name} ({count}" + (f", {len(rows)} shown)" if rows else ")"))
        cards = []
        for row in rows:
            said = [f"event {run.index_N[row]}"]
            if answer.score and np.isfinite(answer.score_N[row]) and answer.score != "peaks/n":
                said.append(f"score {answer.score_N[row]:.3f}")
            if run.peaks_N is not None and run.peaks_N[row] >= 0:
                said.append(f"{run.peaks_N[row]} peak{'' if run.peaks_N[row] == 1 else 's'}")
            text = ", ".join(said)
            cards.append(figure(images.drawing(
                shown.get(row), place.positions(peaks[row]), place.shape_HW, value_range,
                f"{name}: {text}"), text))
        if cards:
            yield tag("div", *cards, class_="gallery")


def _kinds(run: ReportRun, truth_N: np.ndarray, count: int
           ) -> Iterator[tuple[str, int, list[int]]]:
    """(kind of frame, how many there are, rows to show): wrong ones worst first."""
    if not run.answers or not count or not run.events:
        return
    answer = run.answers[0]
    order_N = np.where(np.isfinite(answer.score_N), answer.score_N, 0.0)
    called_N = answer.label_N == HIT
    answered_N = answer.label_N != DROPPED
    kinds: list[tuple[str, np.ndarray, bool]] = []
    if run.labels:
        is_hit_N, is_miss_N = truth_N == HIT, truth_N == 0
        kinds = [("Hits, called hits", called_N & is_hit_N, True),
                 ("False positives: misses called hits", called_N & is_miss_N, False),
                 ("False negatives: hits called misses", answered_N & ~called_N & is_hit_N, False),
                 ("Misses, called misses", answered_N & ~called_N & is_miss_N, True)]
    else:
        kinds = [("Called hits", called_N, True), ("Called misses", answered_N & ~called_N, True)]
    for name, chosen_N, even in kinds:
        rows = np.nonzero(chosen_N)[0]
        rows = rows[np.argsort(order_N[rows], kind="stable")]
        if not even and name.startswith("False positives"):
            rows = rows[::-1]
        shown = list(images.spread(rows, count)) if even else [int(r) for r in rows[:count]]
        yield name, len(rows), shown


def _provenance(runs: Sequence[ReportRun]) -> Iterator[Markup]:
    for run in runs:
        yield tag("h3", run.stem)
        yield tables.key_values(run)
        text = str(run.attributes.get("configuration", ""))
        if text:
            yield tag("p", "Configuration of the run:", class_="muted")
            yield tag("pre", text)
