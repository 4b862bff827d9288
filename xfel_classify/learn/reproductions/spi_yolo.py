"""Single particles by detection networks, by EM classes, and by what several agree on [IGN21].

One table: every network at its best stage and as the intersection of five stages, selections by
EM on the same patterns, and the published rows.  A stage's threshold is the one with the best F1
on the validation patterns; the patterns that told EM its classes, every eighth, stand for the
person who looks at class averages and are left out of all rows.

Axes: N pattern, T stage.
"""
from __future__ import annotations

import json
import logging
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...core import ConfigurationError
from ...engines.cards import shipped_directory
from ...simulate.spi_conditions import draw_spi
from ...simulate.spi_detector import good_pixels
from ..diffusion_map import cluster_centres, diffusion_map, nearest_centre, vectors
from ..em_runs import (
    Choice,
    EmSelection,
    best_by_labels,
    choose,
    fine_of,
    sizes_of,
    sort_frames,
)
from ..em_selection import EmSettings
from ..lessons.spi_quality import Lesson
from ..quality_scores import best_f1
from ..recipes import Recipe, read_recipe
from ..selection_table import PUBLISHED, Selection, intersection, judged, markdown, votes
from ..size_filter import hot_elements
from ..small_frames import SmallFrames
from ..spi_bodies import BodySet, open_bodies, shards_of
from ..training import Trained
from . import Procedure, Row, Work, file_name, train_row

log = logging.getLogger(__name__)

NETWORKS = (
    Row("YOLOv2 colour linear"),
    Row("YOLOv2 colour log", {"network": {"representation": "colour_log"}}),
    Row("YOLOv2 gray linear", {"network": {"representation": "gray_linear"}}),
    Row("YOLOv2 gray log", {"network": {"representation": "gray_log"}}),
    Row("YOLOv3 colour linear", {"architecture": "yolo_v3"}),
    Row("YOLOv3 gray linear", {"architecture": "yolo_v3",
                               "network": {"representation": "gray_linear"}}),
    Row("YOLOv2 float (ours)", {"network": {"representation": "float"}}),
)
SHARED_OPTIONS = ("size", "width", "region", "box")
V3: Mapping[str, Mapping[str, Any]] = {"full": {"size": 608}}
V3_BATCH = 24           # of the study

SIZE_NM, FINE_MOST = (50.0, 68.0), 0.2
"""Diameters of the sphere of equal volume: 0.85 of the 60 to 75 nm of the particles, and what the
fit may be off; [ASS20] keep 55 to 84 nm."""

EM = EmSettings(classes=20, rotations=60, iterations=12, log=True, seed=1)
EM_RUNS, INNER, OUTER = 5, 14.0, 60.0
CLUSTERS, MAP_NEIGHBOURS, EIGENPAIRS = 16, 20, 12
TOLD = 8                # every so manyth pattern's label helps to choose classes


@dataclass(frozen=True)
class Votes:
    """What the stages of one network say of the test patterns, and how good they were before.

    ``thresholds_T`` and ``f1_T`` are of the validation patterns.
    """

    epochs: Sequence[int]
    thresholds_T: np.ndarray
    f1_T: np.ndarray
    scores_TN: np.ndarray

    @property
    def best(self) -> int:
        """Place of the stage with the best F1 on the validation patterns."""
        return int(self.f1_T.argmax())

    def selected(self, place: int) -> np.ndarray:
        return self.scores_TN[place] >= self.thresholds_T[place]

    def common(self) -> np.ndarray:
        chosen = {epoch: self.selected(place) for place, epoch in enumerate(self.epochs)}
        return intersection(chosen, list(self.epochs))


def votes_of(trained: Trained, validation: BodySet, test: BodySet) -> Votes:
    """Thresholds and answers of the kept stages of a training."""
    lesson = Lesson(trained.recipe)
    networks = lesson.stages(trained)
    thresholds, f1, scores = [], [], []
    for network in networks.values():
        threshold, figure = best_f1(lesson.scores(network, validation), validation.good_N)
        thresholds.append(threshold)
        f1.append(figure)
        scores.append(lesson.scores(network, test))
    return Votes(list(networks), np.array(thresholds), np.array(f1), np.array(scores))


def row_of(row: Row, recipe: Mapping[str, Any], size: str) -> Row:
    """A row of YOLOv3 keeps region and width of the recipe; the full one has a size of its own."""
    if "architecture" not in row.changes:
        return row
    options = recipe["network"]
    kept: dict[str, Any] = {name: options[name] for name in SHARED_OPTIONS if name in options}
    network = {**kept, **V3.get(size, {}), **row.changes.get("network", {})}
    changes: dict[str, Any] = {**row.changes, "network": network}
    if size == "full":
        changes["optimiser"] = {"batch": V3_BATCH}
    return Row(row.name, changes)


def frames_of(recipe: Recipe, images: BodySet) -> SmallFrames:
    """The recipe's test patterns as the classical methods want them: pixels that work in all runs
    and are not hot in one, the median photon energy."""
    shards = shards_of(recipe, "test")
    runs = [(shard.preset, shard.seed, shard.first + run) for shard in shards
            for run in range(shard.runs)]
    drawn = [draw_spi(seed, run, 0, preset) for preset, seed, run in runs]
    first = drawn[0]
    if any((one.shape, one.first_px, one.block, one.distance_m) != (
            first.shape, first.first_px, first.block, first.distance_m) for one in drawn):
        raise ConfigurationError("patterns of several detectors were to be sorted into classes "
                                 "together; give test patterns of one preset")
    height, width = first.shape
    good_HW = np.ones((height, width), bool)
    for one in drawn:
        good_HW &= good_pixels(one).reshape(height, first.block, width, first.block).any((1, 3))
    row, column, rows, columns = recipe.network["region"]
    shown = np.concatenate([images.images(chosen)[:, row:row + rows, column:column + columns]
                            for chosen in images.batches(256)])
    start = 0       # a hot pixel of one run is one in a few thousand in the mean of all
    for length in [shard.events for shard in shards for _ in range(shard.runs)]:
        good_HW &= ~hot_elements(shown[start:start + length], good_HW, first.block)
        start += length
    count = np.arange(len(images))
    return SmallFrames(
        shown * good_HW, good_HW, (-first.first_px[0] / first.block,
                                   -first.first_px[1] / first.block),
        first.block, count, count, exp="pr772", run=1, detector="pnccd",
        element_m=first.pixel_size_m * first.block, distance_m=first.distance_m,
        photon_energy_eV=float(np.median([one.photon_energy_eV for one in drawn])))


def classical(frames: SmallFrames, label_N: np.ndarray, work: Work) -> dict[str, np.ndarray]:
    """{name: bool (N,)} of the selections without a network.  ``label_N`` is -1 where not told."""
    sizes, fine_N = sizes_of(frames), fine_of(frames, SIZE_NM[1])
    right_N = sizes.within(*SIZE_NM)
    work.report(f"{int(right_N.sum())} of {len(frames)} patterns have the right size, "
                f"{int((right_N & (fine_N < FINE_MOST)).sum())} of them no finer structure")
    found = {"size filter": right_N, "size and fine structure": right_N & (fine_N < FINE_MOST)}
    for name, most in (("EM", 0.0), ("EM after fine structure (ours)", FINE_MOST)):
        sorted_ = sort_frames(frames, EM, EM_RUNS, size_range_nm=SIZE_NM, fine_most=most,
                              inner=INNER, outer=OUTER, report=log.info)
        found[f"{name}, classes by symmetry"] = _chosen(sorted_, "symmetry", label_N)
        found[f"{name}, classes by labels"] = _chosen(sorted_, "labels", label_N)
        work.report(f"{name}: {EM_RUNS} runs done")
    found["diffusion map after fine structure, clusters by labels"] = _clustered(
        frames, np.flatnonzero(right_N & (fine_N < FINE_MOST)), label_N)
    return found


def _clustered(frames: SmallFrames, rows_C: np.ndarray, label_N: np.ndarray) -> np.ndarray:
    """bool (N,): frames of ``rows_C`` in the clusters that give the told ones the best F1."""
    points = vectors(frames.images_NHW[rows_C], frames.good_HW, "rings", frames.beam_RC)
    count = min(CLUSTERS, len(rows_C))
    coordinates = diffusion_map(points, MAP_NEIGHBOURS, 1.0, EIGENPAIRS).coordinates()
    cluster_N = np.full(len(frames), -1)
    cluster_N[rows_C] = nearest_centre(coordinates, cluster_centres(coordinates, count))
    return (cluster_N >= 0) & best_by_labels(cluster_N, label_N, count)[cluster_N]


def _chosen(found: EmSelection, how: str, label_N: np.ndarray) -> np.ndarray:
    return choose(found, Choice(how=how, least=EM_RUNS // 2 + 1), label_N).selected_N


def selection(work: Work) -> str:
    """Trainings, EM and intersections; every part is kept below ``work.out``."""
    recipe = read_recipe(work.recipe)
    size = "full" if work.out.name.endswith("_full") else "small"
    rows = [row for row in NETWORKS if not work.rows or any(part in row.name
                                                            for part in work.rows)]
    validation, test = (open_bodies(shards_of(recipe, split), recipe.window, work.processes)
                        for split in ("validation", "test"))
    judged_N = np.arange(len(test)) % TOLD != 0
    label_N = np.where(judged_N, -1, test.good_N.astype(int))
    truth_N = test.good_N[judged_N]
    own: list[Selection] = []
    kept: dict[str, np.ndarray] = {}
    notes = []
    tables = _tables(work.recipe)
    for row in rows:
        for number in range(work.seeds):
            seed = recipe.seed + number
            place = work.out / file_name(row.name) / f"seed{seed}"
            trained = train_row(work.recipe, row_of(row, tables, size), seed, place,
                                threads=work.threads, processes=work.processes,
                                device=work.device, report=work.report)
            found = _kept_votes(place / "votes.npz", trained, validation, test)
            best, together = found.selected(found.best), found.common()
            name = row.name + (f", seed {seed}" if work.seeds > 1 else "")
            one = judged(f"{name}, stage {found.epochs[found.best]}", best[judged_N], truth_N)
            five = judged(f"{name}, stages {found.epochs[0]} to {found.epochs[-1]} all",
                          together[judged_N], truth_N)
            own += [one, five]
            kept[name] = together
            single = [judged("", found.selected(t)[judged_N], truth_N).precision
                      for t in range(len(found.epochs))]
            notes.append(f"{name}: precision of the stages "
                         + ", ".join(f"{100 * p:.1f}" for p in single)
                         + f" %, of their intersection {100 * five.precision:.1f} %")
            work.report(notes[-1])
    frames = frames_of(recipe, test)
    without = _kept_classical(work.out / "classical.npz", frames, label_N, work)
    own += [judged(name, chosen[judged_N], truth_N) for name, chosen in without.items()]
    em = without["EM after fine structure (ours), classes by labels"]
    own += [judged(f"{name} and EM", votes([chosen, em], 2)[judged_N], truth_N)
            for name, chosen in kept.items()]
    validation.close()
    test.close()
    text = "\n".join([
        f"Selections of {int(judged_N.sum())} simulated patterns (preset pr772), "
        f"{int(truth_N.sum())} of single particles; {size} recipe; trained on "
        f"{_count(recipe, 'training')}", "",
        markdown(own, PUBLISHED), "", *notes])
    (work.out / "selection.md").write_text(text + "\n", encoding="utf-8")
    return text


def _tables(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text(encoding="utf-8"))


def _count(recipe: Recipe, split: str) -> str:
    parts = getattr(recipe.data, split)
    good = sum(part.positives * part.runs for part in parts)
    return f"{good} + {sum(part.events * part.runs for part in parts) - good}"


def _kept_votes(path: Path, trained: Trained, validation: BodySet, test: BodySet) -> Votes:
    """Answers of a training, computed once for each state of it."""
    mark = json.dumps([trained.recipe.sha256, len(trained.history), trained.history[-1]["loss"]])
    if path.exists():
        with np.load(path, allow_pickle=False) as stored:
            if str(stored["mark"]) == mark:
                return Votes(stored["epochs"].tolist(), stored["thresholds"], stored["f1"],
                             stored["scores"])
    found = votes_of(trained, validation, test)
    np.savez(path, mark=mark, epochs=found.epochs, thresholds=found.thresholds_T, f1=found.f1_T,
             scores=found.scores_TN)
    return found


def _kept_classical(path: Path, frames: SmallFrames, label_N: np.ndarray, work: Work
                    ) -> dict[str, np.ndarray]:
    mark = json.dumps([str(EM), EM_RUNS, CLUSTERS, INNER, OUTER, SIZE_NM, FINE_MOST, len(frames),
                       float(frames.images_NHW.sum(dtype=np.float64))])
    if path.exists():
        with np.load(path, allow_pickle=False) as stored:
            if str(stored["mark"]) == mark:
                return dict(zip(stored["names"].tolist(), stored["selected"], strict=True))
    found = classical(frames, label_N, work)
    np.savez(path, mark=mark, names=list(found), selected=np.array(list(found.values())))
    return found


def _recipes() -> dict[str, Path]:
    folder = shipped_directory() / "spi-yolo"
    return {"small": folder / "recipe.toml", "full": folder / "recipe_full.toml"}


TABLES = {"selection": Procedure("Selections of single hits", _recipes(), selection)}
