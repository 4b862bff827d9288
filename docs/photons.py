"""Accuracy against photons: the table and the figure of docs/single_particles.md.

Executed by hand, some seconds per model and 20 s to simulate::

    python docs/photons.py docs/photons.png spi-multi spi-multi-robust

Images of the presets paper, faint, faint_100 and faint_1000 (the fluence of the study, constant,
over 1, 10, 100 and 1000), seeds below, which no recipe has.
"""
from __future__ import annotations

import sys

import msgspec
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from xfel_classify.engines import find_model
from xfel_classify.learn.recipes import Data, Recipe, Split, model_recipe
from xfel_classify.learn.spi_scores import SpiScores, evaluate_spi

LEVELS = (("paper", 1), ("faint", 10), ("faint_100", 100), ("faint_1000", 1000))
SEED, RUNS, EVENTS = 4911, 10, 77
FIGURES = ("count", "single", "particle", "total")


def photon_recipe(recipe: Recipe) -> Recipe:
    """A model's recipe whose test images are those of :data:`LEVELS`."""
    test = [Split(preset=preset, seed=SEED + number, runs=RUNS, events=EVENTS)
            for number, (preset, _) in enumerate(LEVELS)]
    return msgspec.structs.replace(recipe, data=Data(
        generator="spi", training=recipe.data.training, validation=recipe.data.validation,
        test=test))


def figures(scores: SpiScores) -> dict[str, float]:
    return {"count": scores.tasks["count"].accuracy, "single": scores.single,
            "particle": scores.tasks["particle"].accuracy, "total": scores.total}


def main() -> None:
    target, names = sys.argv[1], sys.argv[2:]
    found, alone = {}, {}
    for name in names:
        model = find_model(name)
        parts = evaluate_spi(model, "test", photon_recipe(model_recipe(model))).parts
        found[name] = {preset: figures(parts[preset]) for preset, _ in LEVELS}
        alone = {preset: parts[preset].brightness for preset, _ in LEVELS}
    print(f"{RUNS * EVENTS} images per line, seeds {SEED} to {SEED + len(LEVELS) - 1}; % right\n")
    columns = ["model", "photons over", *FIGURES, "count by brightness alone"]
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for name in names:
        for preset, fainter in LEVELS:
            cells = [f"{100 * found[name][preset][one]:.1f}" for one in FIGURES]
            print(f"| {name} | {fainter} | " + " | ".join(cells)
                  + f" | {100 * alone[preset].count:.1f} |")
    figure = Figure(figsize=(7.0, 2.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3, sharey=True)
    for axes, one in zip(panels, ("count", "single", "particle"), strict=True):
        for name in names:
            axes.semilogx([1 / fainter for _, fainter in LEVELS],
                          [100 * found[name][preset][one] for preset, _ in LEVELS], "o-",
                          label=name)
        axes.set(title="one or several" if one == "single" else one,
                 xlabel="photons / the study's", ylim=(0, 101))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("right, %")
    panels[0].legend(fontsize=7, loc="lower right")
    figure.savefig(target, dpi=90)


if __name__ == "__main__":
    main()
