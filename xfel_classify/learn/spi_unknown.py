"""Is it any of the known particles?  An answer beside the heads, fitted after the training.

Three judges, all from what the network computes anyway: the largest probability, the energy of the
logits (W. Liu et al., arXiv:2010.03759), and the Mahalanobis distance of the trunk's features to
the nearest kind of training image (K. Lee et al., arXiv:1807.03888), here within the leading
principal components, with the distance from their plane as one more coordinate.

Axes: B image, N training image, F feature, C component, M kind (particle and count), K class.
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core import ConfigurationError
from ..engines import Task
from .recipes import Recipe
from .spi import SpiSet, label_of

__all__ = ["METHODS", "Judge", "fit_judge"]

METHODS = ("mahalanobis", "energy", "softmax")
MOST_IMAGES = 20_000        # of the training, for the distances
NAME = "unknown"
BATCH = 64


class Judge(nn.Module):
    """(B, 2) [known, unknown], one half at the score that a share of known images exceeds.

    ``output`` is the head whose classes are the known ones.
    """

    def __init__(self, output: str, method: str, tables: Mapping[str, Tensor] | None = None,
                 limit: float = 0.0, slope: float = 1.0) -> None:
        super().__init__()
        self.output, self.method = output, method
        self.register_buffer("limit", torch.tensor(limit))
        self.register_buffer("slope", torch.tensor(slope))
        for name, values in (tables or {}).items():
            self.register_buffer(name, values)

    def score(self, features_BF: Tensor, logits_BK: Tensor) -> Tensor:
        """(B, 1), larger is stranger."""
        if self.method == "softmax":
            return 1 - largest(logits_BK.softmax(1))
        if self.method == "energy":     # - log of the sum of exp
            return torch.log(largest(logits_BK.softmax(1))) - largest(logits_BK)
        centred_BF = features_BF - self.get_buffer("mean_F")
        along_BC = centred_BF @ self.get_buffer("plane_FC")
        away_B1 = torch.sqrt(torch.relu(squares(centred_BF) - squares(along_BC)) + 1e-6)
        place_BC = torch.cat([along_BC, away_B1], 1) @ self.get_buffer("whiten_CC")
        kinds_MC = self.get_buffer("kinds_MC")
        nearness_BM = 2 * (place_BC @ kinds_MC.T) - squares(kinds_MC)[:, 0] - squares(place_BC)
        return torch.sqrt(torch.relu(1e-6 - largest(nearness_BM)))

    def forward(self, features_BF: Tensor, logits_BK: Tensor) -> Tensor:
        score_B1 = self.score(features_BF, logits_BK)
        strange_B1 = ((score_B1 - self.get_buffer("limit")) * self.get_buffer("slope")).sigmoid()
        return torch.cat([1 - strange_B1, strange_B1], 1)


def largest(values_BK: Tensor) -> Tensor:
    """(B, 1): the maximum of each row, as a pooling that every runtime has."""
    return nn.functional.max_pool2d(values_BK[:, None, None], (1, values_BK.shape[1])).flatten(1)


def squares(values_BK: Tensor) -> Tensor:
    """(B, 1): the sum of squares of each row."""
    return (values_BK * values_BK).mean(1, keepdim=True) * values_BK.shape[1]


def fit_judge(recipe: Recipe, network: Any, training: SpiSet, validation: SpiSet
              ) -> tuple[Judge, Task]:
    """The judge of a recipe's ``[unknown]`` and its task in the card; ``network`` is trained.

    No unknown particle is looked at: the limit is where ``accept`` of the known validation images
    are called known.
    """
    how = recipe.unknown
    assert how is not None
    if how.method not in METHODS or not 0 < how.accept < 1 or how.features < 1:
        raise ConfigurationError(
            f"recipe {recipe.name}: [unknown] asks for method {how.method!r}, accept {how.accept} "
            f"and features {how.features}; valid are {', '.join(METHODS)}, a share between 0 and "
            "1, and at least one feature")
    asked = next(task for task in recipe.tasks if task.name == how.task)
    output, label = asked.output, recipe.goal(asked).label
    network.eval()
    tables = {}
    if how.method == "mahalanobis":
        chosen_N = _labelled(training, label)
        chosen_N = chosen_N[::-(-len(chosen_N) // MOST_IMAGES)]
        features_NF, _ = _features(network, output, training, chosen_N)
        kinds_N = np.zeros(len(chosen_N), np.int64)
        for task in recipe.tasks:
            if task.kind == "classes":
                labels_N = label_of(training.labels, recipe.goal(task).label)[chosen_N]
                kinds_N = kinds_N * task.width + labels_N.astype(np.int64)
        tables = mahalanobis_tables(features_NF, kinds_N, how.features)
    judge = Judge(output, how.method, tables)
    scores_N = _scores(judge, network, output, validation, _labelled(validation, label))
    limit, middle = np.quantile(scores_N, [how.accept, 0.5])
    slope = np.log(how.accept / (1 - how.accept)) / max(limit - middle, 1e-6)
    judge = Judge(output, how.method, tables, float(limit), float(slope))
    return judge, Task(
        name=NAME, output=NAME, classes=["known", "unknown"], positive="unknown", threshold=0.5,
        threshold_chosen=f"{how.accept:.0%} of the known validation images are called known "
                         f"({how.method}); no unknown particle was looked at")


def _labelled(images: SpiSet, label: str) -> np.ndarray:
    """The images that show a class of the task."""
    return np.flatnonzero(label_of(images.labels, label) >= 0)


def _features(network: Any, output: str, images: SpiSet, chosen_N: np.ndarray
              ) -> tuple[Tensor, Tensor]:
    """(features (N, F), logits (N, K)) of some images, float32 on the CPU."""
    where = next(network.parameters()).device
    features, logits = [], []
    with torch.inference_mode():
        for start in range(0, len(chosen_N), BATCH):
            batch = torch.from_numpy(images.images(chosen_N[start:start + BATCH]))[:, None]
            found = network.features(batch.to(where))
            logits.append(network.heads(found)[output].float().cpu())
            features.append(found[output].float().cpu())
    return torch.cat(features), torch.cat(logits)


def _scores(judge: Judge, network: Any, output: str, images: SpiSet, chosen_N: np.ndarray
            ) -> np.ndarray:
    features, logits = _features(network, output, images, chosen_N)
    with torch.inference_mode():
        return judge.score(features, logits)[:, 0].numpy()


def mahalanobis_tables(features_NF: Tensor, kinds_N: np.ndarray, components: int
                       ) -> dict[str, Tensor]:
    """Buffers of :class:`Judge`: the plane, the whitening within kinds and the kinds' means."""
    features_NF = features_NF.double()
    mean_F = features_NF.mean(0)
    centred = features_NF - mean_F
    most = min(components, *centred.shape)
    values, vectors = torch.linalg.eigh(centred.T @ centred) if centred.shape[1] <= 4096 else (
        None, torch.pca_lowrank(centred, q=most, center=False)[2].flip(1))
    plane_FC = vectors[:, -most:].flip(1)
    along = centred @ plane_FC
    away = torch.sqrt(((centred * centred).sum(1) - (along * along).sum(1)).clamp(min=0) + 1e-6)
    place_NC = torch.cat([along, away[:, None]], 1)
    numbers, inverse_N = np.unique(kinds_N, return_inverse=True)
    kind_N = torch.from_numpy(inverse_N)
    means_MC = torch.stack([place_NC[kind_N == m].mean(0) for m in range(len(numbers))])
    within = place_NC - means_MC[kind_N]
    covariance = within.T @ within / max(1, len(within) - len(numbers))
    ridge = 1e-4 * covariance.diagonal().mean()
    lower = torch.linalg.cholesky(covariance + ridge * torch.eye(len(covariance)))
    whiten_CC = torch.linalg.inv(lower).T
    return {"mean_F": mean_F.float(), "plane_FC": plane_FC.float(),
            "whiten_CC": whiten_CC.float(), "kinds_MC": (means_MC @ whiten_CC).float()}
