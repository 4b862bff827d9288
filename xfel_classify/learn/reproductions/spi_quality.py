"""Good or bad images by ResNet(n, m) and by VGG-16 features [LI-HAN17].

The study's experiment is replaced by a pseudo-experiment (preset ``quality_experiment``), with as
many good images as it had (58 %): a network that calls everything good is right for 58 % of them,
so that the balanced share stands beside.
"""
from __future__ import annotations

import logging
import statistics
import tomllib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from ...core import ConfigurationError
from ...engines.cards import shipped_directory
from ..lessons.spi_quality import Lesson
from ..quality_reports import activation_page, robustness_table, shape_score
from ..quality_scores import score_quality
from ..recipes import Recipe, recipe_of
from ..spi_bodies import BodySet, open_bodies, shards_of
from ..training import Trained
from ..vgg_features import FEATURES, VGGFeatures, fit_features
from . import Outcome, Procedure, Row, Table, Work, changed, file_name, train_row

log = logging.getLogger(__name__)

SIMULATION, EXPERIMENT = "quality", "quality_experiment:positive=0.58"
NAMES = {SIMULATION: "simulation", EXPERIMENT: "experiment", "quality_experiment": "few good",
         "quality_soccer": "truncated_icosahedron", "quality_torus": "torus"}
"""What the presets of the recipe's splits "test" and "shifted" are called in the tables."""

SHAPES = {"simulation": "icosahedron", "truncated_icosahedron": "truncated_icosahedron",
          "torus": "torus"}
FIGURES = ("simulation", "experiment", "experiment balanced")
FEATURE_IMAGES = {"training": 1600, "validation": 400, "test": 1000}
"""With the small recipe; VGG-16 takes a third of a second of a core for an image."""


def parts_of(recipe: Recipe, processes: int = 1) -> dict[str, Callable[[], BodySet]]:
    """{name: opens the images} of the presets in the splits "test" and "shifted"."""
    shards = [*shards_of(recipe, "test"), *shards_of(recipe, "shifted")]
    found: dict[str, Callable[[], BodySet]] = {}
    for preset in dict.fromkeys(shard.preset for shard in shards):
        own = [shard for shard in shards if shard.preset == preset]
        found[NAMES.get(preset, preset)] = partial(open_bodies, own, recipe.window, processes)
    return found


def measure(trained: Trained, processes: int) -> dict[str, float]:
    """Accuracies and errors on every preset of the recipe's test and shifted images."""
    lesson = Lesson(trained.recipe)
    figures: dict[str, float] = {}
    for name, opens in parts_of(trained.recipe, processes).items():
        images = opens()
        score_N = lesson.scores(trained.network, images)
        scores = score_quality(name, score_N, images.good_N, images.kind_N,
                               trained.recipe.task.threshold)
        images.close()
        errors = scores.errors
        figures |= {name: scores.accuracy, f"{name} balanced": scores.balanced,
                    f"{name} good": errors.good, f"{name} bad": errors.bad,
                    f"{name} fnr": errors.fnr, f"{name} fpr": errors.fpr,
                    f"{name} fnr_allowed": errors.fnr_allowed, f"{name} f1": scores.best_f1}
    return figures


def robustness(outcome: Outcome) -> str:
    """Shapes below each other, means over the seeds."""
    lines = [f"{outcome.table.title}; {outcome.size} recipe, seeds "
             f"{', '.join(map(str, outcome.seeds))} (mean)", ""]
    for row, figures in outcome.found.items():
        def mean(name: str, figures: Mapping[str, list[float]] = figures) -> float:
            return statistics.fmean(figures[name])

        scores = []
        for name, shape in SHAPES.items():
            one = shape_score(shape, np.zeros(0), np.zeros(0, bool))
            scores.append(type(one)(
                shape, int(mean(f"{name} good")), int(mean(f"{name} bad")), one.threshold,
                mean(f"{name} fnr"), mean(f"{name} fpr"), mean(f"{name} fnr_allowed")))
        lines += [row, "", robustness_table(scores), ""]
    return "\n".join(lines).rstrip()


def _experiment(training: int, validation: int) -> dict[str, list[dict[str, object]]]:
    return {"training": [{"preset": EXPERIMENT, "seed": 6111, "runs": training, "events": 50}],
            "validation": [{"preset": EXPERIMENT, "seed": 6112, "runs": validation, "events": 50}]}


RESNET = "ResNet(2,2)"
ON_SIMULATION = Row(RESNET, published={"simulation": 99.8, "experiment": 62.0})
ON_EXPERIMENT = Row("(2,2) trained on the experiment", {"data": _experiment(240, 20)},
                    published={"experiment": 94.6})
DEPTHS = tuple(ON_SIMULATION if n == 2 else Row(f"ResNet({n},{n})", {"network": {"n": n, "m": n}})
               for n in range(1, 6)) + (
    Row("(2,2) with projections", {"network": {"shortcut": "projection"}}),
    Row("(2,2), stem of 7", {"network": {"stem": 7}}),
    Row("(2,2), standardised by image", {"network": {"norm": "image"}}))


# --- activations, and features of a network trained on photographs --------------------------------

def activations(work: Work) -> str:
    """A page of what each stage of ResNet(2,2) answers to four images."""
    # the training of the other tables
    seed = tomllib.loads(work.recipe.read_text(encoding="utf-8")).get("seed", 0)
    place = work.out.parent / f"{GROUP}_{work.out.name.partition('_')[2]}" / file_name(
        RESNET) / f"seed{seed}"
    trained = train_row(work.recipe, ON_SIMULATION, seed, place, threads=work.threads,
                        processes=work.processes, device=work.device, report=work.report)
    images = open_bodies(shards_of(trained.recipe, "test")[:1], trained.recipe.window,
                         work.processes)
    chosen = [int(np.flatnonzero(images.kind_N == kind)[0]) for kind in np.unique(images.kind_N)]
    chosen.append(int(np.flatnonzero(images.kind_N == 0)[1]))
    names = [f"image {row} ({'good' if images.good_N[row] else 'bad'})" for row in chosen]
    page = activation_page(trained.network.cpu(), images.images(chosen), names,
                           parameters={"recipe": trained.recipe.name, "seed": seed})
    images.close()
    work.out.mkdir(parents=True, exist_ok=True)
    path = work.out / "activations.html"
    path.write_text(page, encoding="utf-8")
    return f"what the stages answer to {', '.join(names)}: {path}"


def features(work: Work) -> str:
    """Logistic regression on both readings of the features, trained as the rows of "accuracy"."""
    if work.weights is None:
        raise ConfigurationError("table features of spi-quality was asked for without weights; "
                                 "give --weights FILE, a safetensors file of torchvision's vgg16")
    tables = tomllib.loads(work.recipe.read_text(encoding="utf-8"))
    lines = ["VGG-16 features and logistic regression, percent right; published, trained and "
             "tested on the experiment: 98.6", "",
             "| features | trained on | C | validation | simulation | experiment | "
             "experiment balanced |", "|---" * 7 + "|"]
    for row, name in ((ON_SIMULATION, "simulation"), (ON_EXPERIMENT, "experiment")):
        recipe = recipe_of(changed(tables, row, tables.get("seed", 0)), f"row {row.name}")
        for reading in FEATURES:
            network = VGGFeatures(work.weights, reading)
            sets = [_features(network, open_bodies(shards_of(recipe, split), recipe.window,
                                                   work.processes), FEATURE_IMAGES[split])
                    for split in ("training", "validation")]
            model = fit_features(*sets[0], *sets[1])
            cells = [f"{100 * max(model.accuracy_S.values()):.1f}"]
            opened = parts_of(recipe, work.processes)
            for part in ("simulation", "experiment"):
                values_NF, good_N = _features(network, opened[part](), FEATURE_IMAGES["test"])
                scores = score_quality(part, model.scores(values_NF), good_N,
                                       np.where(good_N, 0, 1), 0.5)
                cells.append(f"{100 * scores.accuracy:.1f}")
            cells.append(f"{100 * scores.balanced:.1f}")
            lines.append(f"| {reading} | {name} | {model.strength:g} | " + " | ".join(cells) + " |")
            work.report(lines[-1])
    return "\n".join(lines)


def _features(network: VGGFeatures, images: BodySet, most: int) -> tuple[np.ndarray, np.ndarray]:
    chosen = np.unique(np.linspace(0, len(images) - 1, most).round().astype(int))
    values_NF = np.concatenate([network(images.images(part))
                                for part in np.array_split(chosen, max(1, len(chosen) // 64))])
    images.close()
    return values_NF, images.good_N[chosen]


def _recipes() -> dict[str, Path]:
    folder = shipped_directory() / "spi-quality"
    return {"small": folder / "recipe.toml", "full": folder / "recipe_full.toml"}


GROUP = "resnet"
TABLES: dict[str, Table | Procedure] = {
    "accuracy": Table("Good or bad: trained on / tested on", _recipes(),
                      (ON_SIMULATION, ON_EXPERIMENT), FIGURES, measure, group=GROUP),
    "robustness": Table("Trained on icosahedra, tested on other shapes", _recipes(),
                        (ON_SIMULATION,), ("simulation",), measure, shown=robustness, group=GROUP),
    "depth": Table("Depth (the study: deeper ones overfit)", _recipes(), DEPTHS, FIGURES, measure,
                   group=GROUP),
    "activations": Procedure("What the layers answer", _recipes(), activations),
    "features": Procedure("Features of VGG-16", _recipes(), features),
}
