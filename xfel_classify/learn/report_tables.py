"""Tables of a report: the paper's form, confusion matrices, agreement, overview, provenance."""
from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from .curves import Curves, curves, wilson
from .evaluation import RunScore
from .labels import Agreement, Labels
from .markup import Markup, join, table, tag
from .published import PAPER, PAPER_CONFUSION
from .report_runs import Judged, ReportRun, pooled

__all__ = ["agreements", "areas", "confusions", "curves_of", "key_values", "overview", "scores",
           "share", "statuses"]

DASH = "–"


def share(value: float, digits: int = 4) -> str:
    """A fraction for the reader; a dash where there is none."""
    return DASH if math.isnan(value) else f"{value:.{digits}f}"


def _with_interval(part: int, whole: int) -> Markup:
    """Share and its 95 % interval."""
    low, high = wilson(part, whole)
    value = tag("span", share(part / whole if whole else math.nan), class_="value")
    if not whole:
        return value
    return join(value, " ", tag("small", f"{low:.3f}{DASH}{high:.3f}"))


def overview(runs: Sequence[ReportRun]) -> Markup:
    """One line per run: what it is, how many events, how many hits."""
    rows = []
    for run in runs:
        expected = int(run.attributes.get("events_expected", -1))
        models = [f"{key.removeprefix('model_').removesuffix('_version')} {value}"
                  for key, value in run.attributes.items()
                  if key.startswith("model_") and key.endswith("_version")]
        finder = run.attributes.get("peaks_finder")
        asked = ", ".join([*models, *([str(finder)] if finder else [])])
        usable = int(run.usable_N.sum())
        state = "complete" if run.complete else tag("strong", "INCOMPLETE")
        rows.append([
            run.stem, run.exp, run.number,
            f"{run.attributes.get('detector', '')} ({run.attributes.get('detector_kind', '')})",
            f"{run.events}" + (f" of {expected}" if expected not in (-1, run.events) else ""),
            state, usable, run.hits, _with_interval(run.hits, usable), asked or DASH])
    return table(["summary", "experiment", "run", "detector", "events", "state", "usable", "hits",
                  "hit rate (95 %)", "asked"], rows, id="runs", class_="numbers")


def scores(judged: Sequence[Judged], column: str) -> Markup:
    """The paper's table, its own figures beside ours where the run numbers match."""
    paper = any(one.number in PAPER for one in judged)
    head = ["run", "events", "hit share", "Sen", "Spe", "Acc"]
    spans = [tag("th", "", scope="col")] + [tag("th", text, colspan=5, scope="colgroup")
                                            for text in (column, "paper (2018)")]
    rows = [_score_row(one.counts, one.run, one.number, paper) for one in judged]
    if len(judged) > 1:
        rows.append(_score_row(pooled(judged), "all", -1, paper))
    head_rows = [tag("tr", *spans)] if paper else []
    head_rows.append(tag("tr", *[tag("th", text, scope="col")
                                 for text in head + (head[1:] if paper else [])]))
    return tag("table", tag("thead", *head_rows), tag("tbody", *rows),
               id=f"scores-{column.replace('/', '-')}", class_="numbers")


def _score_row(counts: RunScore, name: str, number: int, paper: bool) -> Markup:
    hits = counts.true_positive + counts.false_negative
    misses = counts.true_negative + counts.false_positive
    cells: list[Any] = [
        counts.events, share(counts.hit_fraction),
        _with_interval(counts.true_positive, hits), _with_interval(counts.true_negative, misses),
        _with_interval(counts.true_positive + counts.true_negative, counts.events)]
    theirs: list[Any] = []
    if paper:
        known = PAPER.get(number)
        theirs = [DASH] * 5 if known is None else [
            known.events, *(f"{value:.4f}" for value in (
                known.hit_fraction, known.sensitivity, known.specificity, known.accuracy))]
    return tag("tr", tag("th", name, scope="row"), *[tag("td", cell) for cell in cells],
               *[tag("td", cell, class_="paper") for cell in theirs])


def confusions(judged: Sequence[Judged]) -> Markup:
    """One small matrix per run, and one of all runs together."""
    boxes = [_confusion(one.counts, f"{one.run}, {one.column}", PAPER_CONFUSION.get(one.number))
             for one in judged]
    if len(judged) > 1:
        boxes.append(_confusion(pooled(judged), f"all runs, {judged[0].column}", None))
    return tag("div", *boxes, class_="grid")


def _confusion(counts: RunScore, name: str, paper: tuple[float, ...] | None) -> Markup:
    def cell(count: int, position: int, right: bool) -> Markup:
        part = count / counts.events if counts.events else math.nan
        theirs = tag("small", f"paper {paper[position]:.4f}") \
            if paper else None
        return tag("td", tag("span", count, class_="value"), tag("small", share(part)), theirs,
                   class_="right" if right else "wrong")

    return table(
        ["", "called hit", "called miss"],
        [["is hit", cell(counts.true_positive, 0, True), cell(counts.false_negative, 1, False)],
         ["is miss", cell(counts.false_positive, 2, False), cell(counts.true_negative, 3, True)]],
        caption=name, class_="confusion")


def curves_of(one: Judged) -> Curves | None:
    """Curves of the events that have a score; None for one class only, or without scores."""
    known_N = one.score_N == one.score_N
    return curves(one.score_N[known_N], one.truth_N[known_N])


def areas(rows: Sequence[tuple[str, str, Curves | None]]) -> Markup:
    """(run, score, curves): areas under both curves."""
    return table(["run", "answer", "hits", "misses", "ROC AUC", "average precision"],
                 [[run, score, *([c.hits, c.misses, f"{c.auc:.4f}", f"{c.average_precision:.4f}"]
                                 if c else [DASH, DASH, "one class only", DASH])]
                  for run, score, c in rows], id="areas", class_="numbers")


def agreements(found: Sequence[tuple[str, Agreement]]) -> Markup:
    """(run, agreement): one line each."""
    return table(
        ["run", "first", "second", "events", "hit / hit", "hit / miss", "miss / hit",
         "miss / miss", "agreement", "Cohen's κ"],
        [[run, tag("td", one.first, class_="text"), tag("td", one.second, class_="text"),
          one.events, one.both_hit, one.first_hit, one.second_hit, one.both_miss,
          share(one.agreement), share(one.kappa)] for run, one in found],
        id="agreement", class_="numbers")


def statuses(run: ReportRun) -> Markup:
    """How the events of a run ended."""
    return table(["status", "events", "meaning"],
                 [[status.name, count, tag("td", status.reason, class_="text")]
                  for status, count in run.status_counts.items()]
                 or [[DASH, 0, "the run has no events"]], class_="numbers status")


SHOWN = ("xfel_classify_version", "source", "source_files", "calibrated_unit",
         "constants_identity", "geometry", "hit_column", "peaks_finder", "numpy_version",
         "python_version")


def key_values(run: ReportRun) -> Markup:
    """Where the numbers of a run come from."""
    return table(["attribute", "value"], [[name, tag("td", value, class_="text")]
                                          for name, value in _provenance(run)],
                 class_="provenance")


def _provenance(run: ReportRun) -> Iterator[tuple[str, str]]:
    yield "file", str(run.path)
    names = [*SHOWN, *sorted(n for n in run.attributes if n.startswith(("model_", "peaks_")))]
    for name in dict.fromkeys(names):
        value = run.attributes.get(name)
        if value not in (None, "", []):
            yield name, ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    for one in run.labels:
        yield f"labels {one.name}", label_line(one)


def label_line(one: Labels) -> str:
    """Kind, rule and counts of a label set."""
    return (f"{one.kind}; {one.rule}; {one.hits} hits, {len(one) - one.hits} misses, "
            f"{one.dropped} dropped")
