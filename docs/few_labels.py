"""Prototypes from few labels: the figures of docs/spi.md that `evaluate` does not print.

Executed by hand, five minutes of a core once the images are there::

    python docs/few_labels.py

The embedding is that of the shipped `spi`; prototypes are those of `finetune --prototypes`.  Labels
are drawn five times from the images of a set and the rest judged; means are printed.  PR772: the
study's numbers of labels (37 x 15 = 555), 3,000 other images.

Axes: N images, F feature.
"""
from __future__ import annotations

import tempfile
from collections.abc import Callable

import numpy as np

from xfel_classify.engines import find_model, open_engine
from xfel_classify.learn.finetuning import Graph
from xfel_classify.learn.prototypes import PrototypeLayer, prototype_layer, single_question
from xfel_classify.learn.quality_reports import shape_score
from xfel_classify.learn.quality_scores import best_f1
from xfel_classify.learn.spi import Shard, SpiSet, geometry_rows, open_spi, structures_word
from xfel_classify.simulate.spi_conditions import SPI_UNSEEN, draw_spi

DRAWS = 5
SHARE = "quality_experiment:positive=0.58"


def images_of(preset: str, seed: int, runs: int, events: int) -> SpiSet:
    at_once = max(1, 1100 // events)
    return open_spi([Shard(preset, seed, first, min(at_once, runs - first), events,
                           structures_word()) for first in range(0, runs, at_once)])


def whole(image_NHW: np.ndarray) -> np.ndarray:
    return image_NHW


def pr772_window(image_NHW: np.ndarray) -> np.ndarray:
    """123 x 240 pixels above the gap as the window of a run shows them: means of 2 x 2 pixels."""
    out_NHW = np.zeros((len(image_NHW), 128, 128), np.float32)
    out_NHW[:, :59, 4:124] = image_NHW[:, 5:123].reshape(-1, 59, 2, 120, 2).mean((2, 4))
    return out_NHW


def embedded(graph: Graph, images: SpiSet,
             window: Callable[[np.ndarray], np.ndarray] = whole) -> np.ndarray:
    return np.concatenate([graph.embedding(window(images.images(chosen)))
                           for chosen in images.batches(128)])


def margin(layer: PrototypeLayer, embedding_NF: np.ndarray) -> np.ndarray:
    logits_N2 = layer.logits(embedding_NF)
    return logits_N2[:, 1] - logits_N2[:, 0]


def new_particles(graph: Graph, rng: np.random.Generator) -> None:
    runs, events = 36, 70
    unseen = images_of("jitter_unseen", 5541, runs, events)
    known = images_of("jitter", 4321, 20, 77)
    features_NF, known_NF = embedded(graph, unseen), embedded(graph, known)
    single_N = (unseen.labels["count"] == 0).astype(int)
    particle_N = np.array([SPI_UNSEEN.index(draw_spi(5541, run, event, "jitter_unseen").particle)
                           for run in range(runs) for event in range(events)])
    for labels in (100, 200):
        which = []
        for _ in range(DRAWS):
            order = rng.permutation(len(features_NF))
            own, rest = order[:labels], order[labels:]
            layer = prototype_layer(features_NF[own], particle_N[own], len(SPI_UNSEEN))
            which.append((layer.logits(features_NF[rest]).argmax(1) == particle_N[rest]).mean())
        one_or_several, new_or_known = [], []
        for particle in range(len(SPI_UNSEEN)):
            ones, news = [], []
            for _ in range(DRAWS):
                order = rng.permutation(np.flatnonzero(particle_N == particle))
                own, rest = order[:labels], order[labels:]
                layer = prototype_layer(features_NF[own], single_N[own], 2)
                ones.append(((margin(layer, features_NF[rest]) > 0) == single_N[rest]).mean())
                half, others = labels // 2, rng.permutation(len(known_NF))
                layer = prototype_layer(
                    np.concatenate([features_NF[order[:half]], known_NF[others[:half]]]),
                    np.repeat([1, 0], half), 2)
                news.append(((margin(layer, features_NF[order[half:]]) > 0).mean()
                             + (margin(layer, known_NF[others[half:]]) <= 0).mean()) / 2)
            one_or_several.append(np.mean(ones))
            new_or_known.append(np.mean(news))
        print(f"{labels} labels of a new particle: one or several {100 * min(one_or_several):.1f} "
              f"to {100 * max(one_or_several):.1f} %, it or the eleven "
              f"{100 * min(new_or_known):.1f} to {100 * max(new_or_known):.1f} % (balanced); "
              f"{labels} in all: which of five {100 * np.mean(which):.1f} %", flush=True)


def shapes(graph: Graph, rng: np.random.Generator) -> None:
    for preset, seed in (("quality_soccer", 5523), ("quality_torus", 5524)):
        images = images_of(preset, seed, 200, 11)
        features_NF, good_N = embedded(graph, images), images.labels["quality"] > 0
        for labels in (50, 100, 200):
            found = []
            for _ in range(DRAWS):
                order = rng.permutation(len(features_NF))
                own, rest = order[:labels], order[labels:]
                layer = prototype_layer(features_NF[own], good_N[own].astype(int), 2)
                score = shape_score(preset, margin(layer, features_NF[rest]), good_N[rest], 0.0)
                found.append((score.fnr, score.fpr))
            fnr, fpr = np.mean(found, 0)
            print(f"{preset}, {labels} labels: good called bad {100 * fnr:.1f} %, bad called good "
                  f"{100 * fpr:.1f} %", flush=True)


def pr772(graph: Graph) -> None:
    labelled, test = images_of("pr772", 5551, 37, 15), images_of("pr772", 5553, 200, 15)
    good_N, truth_N = labelled.labels["quality"] > 0, test.labels["quality"] > 0
    layer = prototype_layer(embedded(graph, labelled, pr772_window), good_N.astype(int), 2)
    threshold, _ = best_f1(layer.left_out_NK[:, 1] - layer.left_out_NK[:, 0], good_N)
    called_N = margin(layer, embedded(graph, test, pr772_window)) >= threshold
    right = int((called_N & truth_N).sum())
    precision, recall = right / max(1, called_N.sum()), right / truth_N.sum()
    print(f"pr772, {len(good_N)} labels, {good_N.sum()} of them good; {len(truth_N)} test images: "
          f"F1 {2 * right / (called_N.sum() + truth_N.sum()):.2f}, precision {precision:.2f}, "
          f"recall {recall:.2f}", flush=True)


def experiment() -> None:
    """Without labels, with the study's share of good images."""
    images = images_of(SHARE, 5526, 100, 11)
    geometry, model = geometry_rows(images.labels), find_model("spi")
    with open_engine(model) as engine:
        score_N = np.concatenate([engine.infer(images.images(chosen), geometry[chosen])["quality"]
                                  [:, 1] for chosen in images.batches(64)])
    good_N = images.labels["quality"] > 0
    called_N = score_N >= model.card.task("quality").threshold
    print(f"{SHARE}, no labels: accuracy {100 * (called_N == good_N).mean():.1f} %", flush=True)


def main() -> None:
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        graph = Graph(single_question(find_model("spi"), "quality", folder))
        experiment()
        shapes(graph, rng)
        new_particles(graph, rng)
        pr772(graph)


if __name__ == "__main__":
    main()
