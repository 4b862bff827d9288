"""Figures of a report as inline SVG, drawn by matplotlib.

Colours are those of Okabe and Ito, which colour-blind readers tell apart; every difference is
also one of line style, marker or hatching, so that a grey print says the same.
Axes: N events.
"""
from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np

from ..core import MissingDependency
from .curves import Curves, wilson
from .labels import DROPPED, HIT
from .markup import Markup

__all__ = ["Curve", "called_by_angle", "hit_rate", "powders", "require_matplotlib",
           "resolution_scatter", "score_against_peaks", "score_histogram", "threshold_curves",
           "timing"]

BLUE, ORANGE, GREEN, RED, PURPLE, SKY, BLACK = (
    "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#000000")
COLOURS = (BLUE, RED, GREEN, PURPLE, BLACK, ORANGE, SKY)
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
GAP = "#dbe4ee"
MARKERS = ("o", "s", "^", "D", "v")
HITS, MISSES, UNKNOWN = (BLUE, "o"), (RED, "x"), ("#555555", ".")

STYLE: dict[Any, Any] = {
    "font.size": 9.5, "font.family": "sans-serif", "svg.fonttype": "none",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "Helvetica"],
    "svg.hashsalt": "xfel_classify", "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#dddddd", "grid.linewidth": 0.6, "axes.axisbelow": True,
    "legend.frameon": False, "hatch.linewidth": 0.8, "figure.constrained_layout.use": True,
}

_number = iter(range(1 << 30))


@dataclass(frozen=True)
class Curve:
    """One line of the ROC and precision-recall figures, and where its answers work."""

    name: str
    curves: Curves
    recall: float                   # at the threshold in use
    false_positive_rate: float
    precision: float


def require_matplotlib() -> None:
    """Raise :class:`MissingDependency` when figures cannot be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingDependency(f"a report draws its figures with matplotlib ({error}); "
                                "pip install 'xfel-classify[learn]'") from error


@contextmanager
def _figure(width_in: float, height_in: float, label: str, drawn: list[Markup]) -> Iterator[Any]:
    """A figure of its own, without pyplot's global state; its SVG is appended to ``drawn``."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width_in, height_in))
        yield figure
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True,
                       metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    drawn.append(_inline(stream.getvalue(), label))


def _inline(text: str, label: str) -> Markup:
    """matplotlib's SVG file as an element of a page: no prolog, names of its own, a label."""
    from html import escape

    number = next(_number)
    body = text[text.index("<svg"):]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'\bid="', f'id="f{number}-', body)
    body = body.replace("url(#", f"url(#f{number}-")
    body = re.sub(r'(xlink:href|href)="#', rf'\1="#f{number}-', body)
    body = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", body, count=1)
    body = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", body, count=1)
    body = re.sub(r"<svg", f'<svg role="img" aria-label="{escape(label, quote=True)}"', body,
                  count=1)
    body = re.sub(r' xmlns(:\w+)?="[^"]*"', "", body)
    return Markup(body.replace("xlink:href", "href").strip())


def _plain(text: str) -> str:
    """``text`` as it is: no formulas between $, not hidden from legends by a leading _."""
    return ("\u200b" if text.startswith("_") else "") + text.replace("$", r"\$")


def threshold_curves(lines: Sequence[Curve], label: str) -> Markup:
    """ROC left, precision against sensitivity right; a marker where the answers work."""
    drawn: list[Markup] = []
    below = 0.19 * max(0, len(lines) - 2)       # of the legends, so that the axes keep their height
    with _figure(8.0, 3.7 + below, label, drawn) as figure:
        roc, precision = figure.subplots(1, 2)
        roc.plot([0, 1], [0, 1], color="#999999", lw=0.8, ls=":")
        styles = zip(lines, cycle(COLOURS), cycle(LINES), cycle(MARKERS), strict=False)
        for line, colour, style, marker in styles:
            c = line.curves
            roc.step(c.false_positive_rate_T, c.recall_T, where="post", color=colour, ls=style,
                     lw=1.6, label=f"{_plain(line.name)}: AUC {c.auc:.4f}")
            precision.step(c.recall_T[1:], c.precision_T[1:], where="pre", color=colour, ls=style,
                           lw=1.6, label=f"{_plain(line.name)}: AP {c.average_precision:.4f}")
            at = {"color": colour, "marker": marker, "ms": 7, "mfc": "white", "mew": 1.6,
                  "ls": "none", "clip_on": False, "zorder": 5}
            roc.plot([line.false_positive_rate], [line.recall], **at)
            precision.plot([line.recall], [line.precision], **at)
        roc.set(xlabel="1 - specificity", ylabel="sensitivity", title="ROC", xlim=(-0.01, 1.01),
                ylim=(-0.01, 1.02))
        precision.set(xlabel="sensitivity (recall)", ylabel="precision",
                      title="precision and recall", xlim=(-0.01, 1.01), ylim=(-0.01, 1.02))
        for axes in (roc, precision):
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), fontsize=8.5)
    return drawn[0]


def score_histogram(score_N: np.ndarray, truth_N: np.ndarray, name: str, cut: float | None,
                    label: str) -> Markup:
    """Scores of hits, misses and unlabelled events; the cut is the smallest score called a hit."""
    drawn: list[Markup] = []
    with _figure(4.2, 3.2, label, drawn) as figure:
        axes = figure.subplots()
        known_N = np.isfinite(score_N)
        counts = name.rpartition("/")[2] == "n"
        values_N = np.log10(1 + score_N[known_N]) if counts else score_N[known_N]
        top = max(1.0, float(values_N.max(initial=0)))
        low = min(0.0, float(values_N.min(initial=0)))
        edges = np.linspace(low, top, 41)
        for which, text, colour, hatch in ((HIT, "hits", BLUE, None), (0, "misses", RED, "////"),
                                           (DROPPED, "without label", "#555555", "....")):
            chosen_N = values_N[truth_N[known_N] == which]
            if len(chosen_N):
                axes.hist(chosen_N, edges, histtype="stepfilled", alpha=0.55, facecolor=colour
                          if hatch is None else "none", edgecolor=colour, hatch=hatch, lw=1.3,
                          label=f"{text} ({len(chosen_N)})")
        if cut is not None:
            axes.axvline(np.log10(1 + cut) if counts else cut, color=BLACK, ls="--", lw=1.2,
                         label=f"smallest called a hit: {cut:.4g}")
        if counts:
            _count_ticks(axes, top)
        axes.set(yscale="log", xlabel=_plain(name) + (" + 1" if counts else ""), ylabel="events",
                 ylim=(0.7, None))
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), fontsize=8.5, ncols=2)
    return drawn[0]


def resolution_scatter(truth_N: np.ndarray, answer_N: np.ndarray, within: float,
                       label: str) -> Markup:
    """True against answered 1/d (1/angstrom) with the band of ``within``; errors beside."""
    drawn: list[Markup] = []
    with _figure(8.0, 3.8, label, drawn) as figure:
        scatter, errors = figure.subplots(1, 2, width_ratios=(1.15, 1))
        inside_N = np.abs(answer_N - truth_N) < within
        low = float(min(truth_N.min(), answer_N.min())) - 0.02
        high = float(max(truth_N.max(), answer_N.max())) + 0.02
        line = np.array([low, high])
        scatter.fill_between(line, line - within, line + within, color=SKY, alpha=0.25, lw=0)
        scatter.plot(line, line, color=BLACK, lw=0.9, ls="--")
        few = len(truth_N) <= 3000
        for chosen_N, (colour, marker), text in ((inside_N, HITS, "within"),
                                                 (~inside_N, MISSES, "outside")):
            scatter.plot(truth_N[chosen_N], answer_N[chosen_N], ls="none", marker=marker, ms=3.2,
                         color=colour, mfc="none", mew=0.7, alpha=0.7, rasterized=not few,
                         label=f"{text} {within:g} 1/Å ({int(chosen_N.sum())})")
        scatter.set(xlabel="true 1/d (1/Å)", ylabel="answered 1/d (1/Å)",
                    xlim=(low, high), ylim=(low, high), aspect="equal")
        _angstrom_axis(scatter, low, high)
        error_N = answer_N - truth_N
        reach = max(2 * within, float(np.quantile(np.abs(error_N), 0.995)))
        errors.hist(np.clip(error_N, -reach, reach), np.linspace(-reach, reach, 61),
                    color=SKY, edgecolor=BLUE, lw=0.5)
        for edge in (-within, within):
            errors.axvline(edge, color=BLACK, ls="--", lw=1.0)
        errors.set(xlabel="answered - true 1/d (1/Å)", ylabel="images")
        scatter.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), fontsize=8.5, ncols=2)
    return drawn[0]


def _angstrom_axis(axes: Any, low: float, high: float) -> None:
    """d itself above an axis of 1/d."""
    wanted = [d for d in (6, 4, 3, 2.5, 2, 1.7, 1.4) if low < 1 / d < high]
    above = axes.secondary_xaxis("top")
    above.set_xticks([1 / d for d in wanted], [f"{d:g}" for d in wanted])
    above.set_xlabel("d (Å)", fontsize=8.5)


def called_by_angle(groups: Mapping[str, Sequence[tuple[float, float, int, int]]],
                    single: tuple[int, int], label: str) -> Markup:
    """Share of shots called multiple against their smallest mis-setting, by law.

    ``groups`` maps a law to (from, to, called, images) of ranges in degrees; ``single`` is
    (called single, images) of the shots with one lattice.  Bars are 95 % intervals (Wilson).
    """
    drawn: list[Markup] = []
    with _figure(8.0, 3.4, label, drawn) as figure:
        axes = figure.subplots()
        styles = zip(groups.items(), cycle(COLOURS), cycle(LINES), cycle(MARKERS), strict=False)
        for (name, rows), colour, style, marker in styles:
            at = np.array([np.sqrt(max(low, 0.05) * high) for low, high, _, _ in rows])
            share = np.array([called / images for _, _, called, images in rows])
            bounds = np.array([wilson(called, images) for _, _, called, images in rows])
            # an interval ends at 1 but for rounding
            reach = np.maximum([share - bounds[:, 0], bounds[:, 1] - share], 0.0)
            axes.errorbar(at, share, reach, color=colour, ls=style, marker=marker, ms=5, lw=1.4,
                          capsize=2.5, label=_plain(name))
        if single[1]:
            low, high = wilson(*single)
            axes.axhspan(low, high, color="#999999", alpha=0.3, lw=0)
            axes.axhline(single[0] / single[1], color="#555555", ls=":", lw=1.3,
                         label="one lattice, called single")
        axes.set(xscale="log", xlabel="smallest mis-setting angle (degrees)",
                 ylabel="share called right", ylim=(0, 1.02))
        axes.set_xticks([0.1, 0.3, 1, 3, 10, 30, 100], ["0.1", "0.3", "1", "3", "10", "30", "100"])
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8.5)
    return drawn[0]


def _count_ticks(axes: Any, top: float) -> None:
    decades = range(int(top) + 1)
    axes.set_xticks(list(decades), [f"{10**d:d}" for d in decades])


def score_against_peaks(score_N: np.ndarray, peaks_N: np.ndarray, truth_N: np.ndarray, name: str,
                        cut: float | None, label: str) -> Markup:
    """One mark per event: score up, number of peaks (plus one) across."""
    drawn: list[Markup] = []
    with _figure(4.2, 3.2, label, drawn) as figure:
        axes = figure.subplots()
        known_N = np.isfinite(score_N) & (peaks_N >= 0)
        for which, text, (colour, marker) in ((0, "miss", MISSES), (DROPPED, "no label", UNKNOWN),
                                              (HIT, "hit", HITS)):
            chosen_N = known_N & (truth_N == which)
            if chosen_N.any():
                axes.plot(peaks_N[chosen_N] + 1, score_N[chosen_N], ls="none", marker=marker,
                          color=colour, mfc="none", ms=4.5, alpha=0.8, label=text,
                          rasterized=int(chosen_N.sum()) > 3000)
        if cut is not None:
            axes.axhline(cut, color=BLACK, ls="--", lw=1.0)
        axes.set(xscale="log", xlabel="peaks found + 1", ylabel=_plain(name))
        if known_N.any():
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), fontsize=8.5, ncols=3)
    return drawn[0]


def hit_rate(answers: Mapping[str, np.ndarray], timestamp_N: np.ndarray, label: str) -> Markup:
    """Share of hits in pieces of the run; the first answer with its 95 % interval (Wilson).

    ``answers`` maps a name to int8 labels (N,) in the order of the run; -1 counts for nothing.
    """
    drawn: list[Markup] = []
    x_N, unit = times(timestamp_N)
    pieces = np.array_split(np.arange(len(x_N)), int(np.clip(len(x_N) // 20, 1, 40)))
    with _figure(8.0, 2.6, label, drawn) as figure:
        axes = figure.subplots()
        styles = zip(answers.items(), cycle(COLOURS), cycle(LINES), cycle(MARKERS), strict=False)
        for position, ((name, label_N), colour, style, marker) in enumerate(styles):
            counted = [(x_N[p].mean(), int((label_N[p] == HIT).sum()),
                        int((label_N[p] != DROPPED).sum())) for p in pieces if len(p)]
            counted = [c for c in counted if c[2]]
            x = [c[0] for c in counted]
            bounds = np.array([wilson(c[1], c[2]) for c in counted]).reshape(-1, 2)
            axes.plot(x, [c[1] / c[2] for c in counted], color=colour, ls=style, marker=marker,
                      ms=3.5, lw=1.3, label=_plain(name))
            if position == 0:
                axes.fill_between(x, bounds[:, 0], bounds[:, 1], color=colour, alpha=0.15, lw=0)
        axes.set(xlabel=unit, ylabel="hit rate", ylim=(0, None))
        if answers:
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8.5)
    return drawn[0]


def times(timestamp_N: np.ndarray) -> tuple[np.ndarray, str]:
    """(seconds since the first event, axis name) of psana2's stamps, else event numbers."""
    seconds_N, nanoseconds_N = timestamp_N >> 32, timestamp_N & 0xFFFFFFFF
    if len(timestamp_N) and (seconds_N > 0).all() and (nanoseconds_N < 10**9).all():
        since_N = (seconds_N - seconds_N[0]) + 1e-9 * (nanoseconds_N - nanoseconds_N[0])
        return (since_N / 60, "minutes") if since_N[-1] > 300 else (since_N, "seconds")
    return np.arange(len(timestamp_N), dtype=np.float64), "event"


def timing(stages: Mapping[str, float], label: str) -> Markup:
    """Seconds of each stage, the longest on top."""
    drawn: list[Markup] = []
    shown = sorted(stages.items(), key=lambda pair: pair[1])[-12:]
    with _figure(4.2, 0.7 + 0.24 * len(shown), label, drawn) as figure:
        axes = figure.subplots()
        names, seconds = [name for name, _ in shown], [spent for _, spent in shown]
        bars = axes.barh(range(len(shown)), seconds, color=SKY, edgecolor=BLUE, height=0.7)
        axes.bar_label(bars, [f"{spent:.2f} s" for spent in seconds], padding=3, fontsize=8.5)
        axes.set_yticks(range(len(shown)), [_plain(name) for name in names])
        axes.grid(axis="y", visible=False)
        axes.set(xlabel="seconds, added up over ranks", xlim=(0, 1.25 * max(seconds, default=1)))
    return drawn[0]


def powders(images: Mapping[str, np.ndarray], extent_mm: tuple[float, float, float, float],
            unit: str, label: str) -> Markup:
    """Pictures side by side on one logarithmic grey scale, dark = bright, with millimetres."""
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    drawn: list[Markup] = []
    positive = [image[np.isfinite(image) & (image > 0)] for image in images.values()]
    joined = np.concatenate([np.zeros(0), *positive])
    low, high = np.percentile(joined, (5, 99.95)) if len(joined) else (1.0, 10.0)
    floor = max(float(low), 1e-6)
    height, width = next(iter(images.values())).shape
    tall = float(np.clip(6.6 / len(images) * height / width, 1.0, 6.0))
    with _figure(8.2, tall + 0.75, label, drawn) as figure:
        row = figure.subplots(1, len(images), squeeze=False)[0]
        shades = colormaps["gray_r"].with_extremes(bad=GAP)
        norm = LogNorm(floor, max(float(high), 2 * floor))
        shown = None
        for axes, (name, image) in zip(row, images.items(), strict=True):
            values = np.where(image <= 0, floor, image)
            shown = axes.imshow(values, cmap=shades, norm=norm, extent=extent_mm,
                                interpolation="none")
            axes.set(title=_plain(name), xlabel="x / mm", ylabel="y / mm" if axes is row[0] else "")
            axes.grid(visible=False)
        figure.colorbar(shown, ax=list(row), shrink=0.9, label=_plain(unit) or "value")
    return drawn[0]
