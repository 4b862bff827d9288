"""Hit count and particle type of single particles [CAI21]: backbones, depth and the grid search.

Published figures are of 15,400 test images of 77,000; ours of the recipe's test images, whose
structures may be stand-ins.  The published depth study equals the unweighted row in everything but
a digit, so it was made with beta = 1 (methods specification, section 1d).

Axes: L learning rate, D weight decay.
"""
from __future__ import annotations

import logging
import statistics
from pathlib import Path

import numpy as np

from ...engines.cards import shipped_directory
from ..lessons.spi import Lesson
from ..training import Trained
from . import Outcome, Row, Table

log = logging.getLogger(__name__)

FIGURES = ("total", "count", "particle")
UNWEIGHTED = {"count": {"weight": 1.0}}
RATES, DECAYS = (0.002, 0.001, 0.0005, 0.0001), (0.01, 0.005, 0.0025, 0.001)
PUBLISHED_GRID = {
    "total": ((83.2, 87.0, 89.0, 89.6), (85.1, 86.9, 90.7, 88.9), (84.3, 89.1, 89.2, 90.1),
              (74.8, 83.1, 83.7, 80.7)),
    "count": ((94.6, 96.9, 97.8, 97.0), (96.5, 96.8, 97.6, 96.6), (94.4, 96.5, 96.3, 96.7),
              (90.1, 91.9, 92.6, 91.6)),
    "particle": ((86.5, 88.6, 90.0, 90.9), (86.9, 88.5, 92.0, 90.1), (87.5, 91.1, 91.4, 91.7),
                 (80.7, 87.7, 87.9, 85.2)),
}
MENDED = {"network": {"scaling": "log1p_standardised"},
          "optimiser": {"reshuffle": True}, "augment": {"load_once": False}}


def published(total: float, count: float, particle: float) -> dict[str, float]:
    return {"total": total, "count": count, "particle": particle}


def measure(trained: Trained, processes: int) -> dict[str, float]:
    """Shares of the recipe's test images: total, count, particle, and what brightness gives."""
    lesson = Lesson(trained.recipe)
    try:
        scores = lesson.examine_split(trained.network, "test", processes)
    finally:
        lesson.close()
    return {"total": scores.total, "single": scores.single, "images": scores.images,
            "brightness": scores.brightness.count if scores.brightness else float("nan"),
            **{name: one.accuracy for name, one in scores.tasks.items()},
            **{f"recall_{label}": one.recall(label) for one in scores.tasks.values()
               for label in one.classes}}


def rate_name(rate: float, decay: float) -> str:
    return f"rate {rate:g}, decay {decay:g}"


BACKBONES = (
    Row("ResNet-18", {"architecture": "spi_resnet"}, published=published(13.3, 56.1, 23.5)),
    Row("ResNet-18, mended", {"architecture": "spi_resnet", **MENDED}),
    Row("VGG-16", {"architecture": "spi_vgg"}, published=published(92.0, 98.2, 92.7)),
    Row("10 layers, branch early", {"network": {"branch": "early"}},
        published=published(88.5, 95.0, 91.9)),
    Row("10 layers, unweighted", tasks=UNWEIGHTED, published=published(91.1, 97.1, 92.5)),
    Row("10 layers, late and weighted", published=published(92.7, 98.7, 93.5)),
    Row("10 layers, mended", MENDED),
)
DEPTHS = tuple(
    Row(f"{layers} layers", {"network": {"layers": layers}}, UNWEIGHTED, published(*figures))
    for layers, figures in ((3, (85.2, 91.5, 92.4)), (5, (88.6, 94.5, 93.0)),
                            (10, (91.2, 97.1, 92.5)), (18, (83.4, 95.0, 85.6))))
GRID = tuple(
    Row(rate_name(rate, decay),
        {"optimiser": {"learning_rate": rate, "weight_decay": decay}},
        published={name: PUBLISHED_GRID[name][i][j] for name in FIGURES})
    for i, rate in enumerate(RATES) for j, decay in enumerate(DECAYS))


def draw_grid(outcome: Outcome, out: Path) -> None:
    """``grid.png`` in ``out``: heat maps of the published figures and of ours."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        log.info("no heat map: matplotlib is not installed")
        return
    figure = Figure(figsize=(10.5, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 3)
    for column, name in enumerate(FIGURES):
        for row, (who, values_LD) in enumerate((("published", np.array(PUBLISHED_GRID[name])),
                                                ("ours", _ours(outcome, name)))):
            axes = panels[row][column]
            shown = axes.imshow(values_LD, cmap="viridis", vmin=min(75, np.nanmin(values_LD)),
                                vmax=100)
            for i, j in np.ndindex(values_LD.shape):
                if np.isfinite(values_LD[i, j]):
                    axes.text(j, i, f"{values_LD[i, j]:.1f}", ha="center", va="center",
                              color="white" if values_LD[i, j] < 92 else "black")
            axes.set(title=f"{name}, {who} (%)", xticks=range(len(DECAYS)),
                     yticks=range(len(RATES)), xticklabels=[f"{v:g}" for v in DECAYS],
                     yticklabels=[f"{v:g}" for v in RATES])
            if row:
                axes.set_xlabel("weight decay")
            if not column:
                axes.set_ylabel("learning rate")
        figure.colorbar(shown, ax=[panels[0][column], panels[1][column]], shrink=0.7)
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "grid.png", dpi=120)
    log.info("heat map: %s", out / "grid.png")


def _ours(outcome: Outcome, name: str) -> np.ndarray:
    """(L, D) percent; NaN where a place was not trained."""
    return np.array([[100 * statistics.fmean(outcome.found[rate_name(rate, decay)][name])
                      if rate_name(rate, decay) in outcome.found else np.nan
                      for decay in DECAYS] for rate in RATES])


def _recipes() -> dict[str, Path]:
    folder = shipped_directory() / "spi-multi"
    return {"small": folder / "recipe_small.toml", "full": folder / "recipe.toml"}


TABLES = {
    "1": Table("Backbones, branching and weights (published Table 1)", _recipes(), BACKBONES,
               FIGURES, measure),
    "2": Table("Depth (published Table 2)", _recipes(), DEPTHS, FIGURES, measure),
    "grid": Table("Learning rate and weight decay (published grid search)", _recipes(), GRID,
                  FIGURES, measure, draw_grid),
}
