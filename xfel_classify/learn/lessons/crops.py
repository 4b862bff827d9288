"""Yes or no from crops about the beam: the hit finder, and every generator of ``datasets``.

Cross entropy; the epoch with the best balanced accuracy at 0.5 is kept; the decision threshold is
chosen on the validation runs at export.

Axes: N validation images, B images of a batch, H row, W column.
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from ...engines import Model
from ..datasets import ImageSet, augment, open_runs
from ..evaluation import AS_GOOD, Evaluation, choose_threshold, evaluate_recipe
from ..networks import build_network
from ..recipes import Recipe, optimiser_words, runs_of
from ..training import Trained
from . import Answers, Exhibit

BATCH = 16          # images judged at a time


class Lesson:
    """A recipe whose generator is in :data:`..datasets.GENERATORS`."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._open: list[ImageSet] = []

    def open(self, processes: int = 1) -> tuple[int, int]:
        training = open_runs(runs_of(self.recipe, "training"), processes)
        validation = open_runs(runs_of(self.recipe, "validation"), processes)
        self._runs_N = np.repeat(np.arange(len(validation)), [len(run) for run in validation])
        self._pupils, self._examiners = (self._keep(ImageSet(runs, self.recipe.window))
                                         for runs in (training, validation))
        return len(self._pupils), len(self._examiners)

    def _keep(self, images: ImageSet) -> ImageSet:
        self._open.append(images)
        return images

    def close(self) -> None:
        while self._open:
            self._open.pop().close()

    def network(self) -> Any:
        return build_network(self.recipe.architecture, **self.recipe.network)

    def inputs(self, chosen_B: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, ...]:
        images_BHW = augment(self._pupils.images(chosen_B), self.recipe.augment, rng)
        return (torch.from_numpy(images_BHW)[:, None],)

    def loss(self, outputs: Mapping[str, Tensor], chosen_B: np.ndarray) -> Tensor:
        logits_BK = outputs[self.recipe.task.output]
        truth_B = torch.from_numpy(self._pupils.labels_N[chosen_B]).to(logits_BK.device)
        return nn.functional.cross_entropy(logits_BK, truth_B)

    def examine(self, network: nn.Module) -> dict[str, np.ndarray]:
        """``scores`` (probability of the positive class), ``labels`` and the ``runs`` they are of,
        numbered as in the recipe."""
        task, images = self.recipe.task, self._examiners
        where = next(network.parameters()).device
        scores_N = np.empty(len(images), np.float32)
        for start in range(0, len(images), BATCH):
            chosen = np.arange(start, min(start + BATCH, len(images)))
            images_B1HW = torch.from_numpy(images.images(chosen))[:, None].to(where)
            logits_BK = network(images_B1HW)[task.output].float()
            scores_N[chosen] = logits_BK.softmax(1)[:, task.positive_index].cpu().numpy()
        return {"scores": scores_N, "labels": images.labels_N, "runs": self._runs_N}

    def mark(self, examined: Mapping[str, np.ndarray]) -> tuple[float, dict[str, float]]:
        scores_N, positive_N = examined["scores"], examined["labels"] == 1
        truth_N = np.clip(np.where(positive_N, scores_N, 1 - scores_N).astype(np.float64), 1e-7, 1)
        sensitivity = float((scores_N[positive_N] >= 0.5).mean()) if positive_N.any() else 0.0
        specificity = float((scores_N[~positive_N] < 0.5).mean()) if (~positive_N).any() else 0.0
        balanced = (sensitivity + specificity) / 2
        return balanced, {"validation_loss": float(-np.log(truth_N).mean()),
                          "sensitivity": sensitivity, "specificity": specificity,
                          "balanced_accuracy": balanced}

    def exhibit(self, trained: Trained) -> Exhibit:
        recipe, found = self.recipe, trained.examined
        target = recipe.target
        threshold, margin = choose_threshold(found["scores"], found["labels"], found["runs"],
                                             target.sensitivity, target.specificity)
        task = msgspec.structs.replace(
            recipe.task, threshold=threshold,
            threshold_chosen="on the validation runs: the middle of those whose worst-run margin "
                             f"over sensitivity {target.sensitivity} and specificity "
                             f"{target.specificity} is within {AS_GOOD} of the largest "
                             f"({margin:.2f} of the allowed error)")
        best = max(trained.history, key=lambda row: row["balanced_accuracy"])
        images = self._keep(ImageSet(open_runs(runs_of(recipe, "validation"), verify=False),
                                     recipe.window))
        runs = runs_of(recipe, "training")
        return Exhibit(
            Answers(trained.network, [task]), [task], check_images(found, images, threshold),
            provenance={"training_images": sum(run.events for run in runs),
                        "training_runs": len(runs),
                        "optimiser": f"{optimiser_words(recipe.optimiser)}; best epoch "
                                     f"{best['epoch']}"},
            metrics={"validation": {"balanced_accuracy": round(best["balanced_accuracy"], 4),
                                    "threshold_of_that": 0.5,
                                    "worst_run_margin": round(margin, 3)}})

    def evaluate(self, model: Model, split: str, backend: str = "auto",
                 processes: int = 1) -> Evaluation:
        return evaluate_recipe(model, split, self.recipe, backend, processes)


def check_images(examined: Mapping[str, np.ndarray], images: ImageSet,
                 threshold: float) -> np.ndarray:
    """Eight images as the network sees them, float32 (8, H, W): easy, hard and degenerate ones.

    Hits and misses (typical and nearest to the threshold), a hit with a gap, hot and saturated
    pixels, an empty image and a saturated one.
    """
    order_N = np.argsort(np.abs(examined["scores"] - threshold), kind="stable")
    hits = [int(n) for n in order_N if examined["labels"][n] == 1]
    misses = [int(n) for n in order_N if examined["labels"][n] != 1]
    chosen = [hits[0], hits[len(hits) // 2], hits[-1], misses[0], misses[-1]]
    images_BHW = images.images(chosen)
    clip = images.window.clip if images.window.normalize == "clip" else 1e4
    hurt_HW = images_BHW[1].copy()
    tenth = hurt_HW.shape[0] // 10
    hurt_HW[3 * tenth:3 * tenth + 8, 3 * tenth:3 * tenth + 8] = clip     # a saturated reflection
    hurt_HW[5 * tenth:6 * tenth] = 0.0                                   # a gap
    hurt_HW[-tenth:, -tenth:] -= 1.0
    hurt_HW[::67, ::59] = clip                                           # hot pixels
    constant = [np.zeros_like(hurt_HW), np.full_like(hurt_HW, clip)]
    return np.stack([*images_BHW, hurt_HW, *constant]).astype(np.float32)
