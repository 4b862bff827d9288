"""Good or bad image by features of a network trained on photographs, and logistic regression.

[LI-HAN17] took 8192 features "in the last two layers" of VGG-16.  Two readings give that number:
"fc6_fc7", the 4096 + 4096 of the two hidden linear layers on 224 x 224 pixels (the primary one),
and "pool5", the 4 x 4 x 512 of the last pooling on 128 x 128 pixels (methods specification, 2b).

The weights come from a file of the user's: safetensors with torchvision's names for VGG-16
(``features.0.weight`` ... ``classifier.3.bias``); nothing is downloaded.

Axes: N image, H row, W column, C channel, F feature, S value of C.
"""
from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..core import ConfigurationError, MissingDependency, OutputDamaged
from .spi_representations import Representation

__all__ = ["FEATURES", "FeatureModel", "VGGFeatures", "fit_features"]

log = logging.getLogger(__name__)

FEATURES = {"fc6_fc7": 224, "pool5": 128}
"""{reading: side in pixels of what VGG-16 sees}."""

CONVOLUTIONS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)     # torchvision's numbers
POOL_AFTER = (2, 7, 14, 21, 28)
LINEAR = (0, 3)
MEAN_RGB, STD_RGB = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)    # of ImageNet
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)


class VGGFeatures:
    """VGG-16 up to the layers whose answers are the features.

    ``weights`` is a safetensors file, or the tensors themselves; narrower layers than the
    published ones are taken as they are.  ``representation`` makes the picture.
    Raises :class:`ConfigurationError` where tensors are missing or do not fit together.
    """

    def __init__(self, weights: str | Path | Mapping[str, Tensor], features: str = "fc6_fc7",
                 representation: str = "gray_log") -> None:
        if features not in FEATURES:
            raise ConfigurationError(f"features {features!r} of VGG-16 were asked for; valid are "
                                     f"{', '.join(FEATURES)}")
        self.features = features
        self.represent = Representation(representation, FEATURES[features])
        tensors = _read(weights) if isinstance(weights, str | Path) else dict(weights)
        names = [f"features.{i}" for i in CONVOLUTIONS]
        if features == "fc6_fc7":
            names += [f"classifier.{i}" for i in LINEAR]
        needed = [f"{name}.{part}" for name in names for part in ("weight", "bias")]
        missing = [name for name in needed if name not in tensors]
        if missing:
            raise ConfigurationError(
                f"VGG-16 weights for {features} lack {len(missing)} of {len(needed)} tensors "
                f"({', '.join(missing[:3])}, ...); give a safetensors file with torchvision's "
                "names for vgg16")
        self._tensors = {name: tensors[name].float() for name in needed}
        self._check()

    def _check(self) -> None:
        channels = 3
        for i in CONVOLUTIONS:
            shape = tuple(self._tensors[f"features.{i}.weight"].shape)
            if shape[1:] != (channels, 3, 3):
                raise ConfigurationError(f"features.{i}.weight of the VGG-16 weights has shape "
                                         f"{shape}; (n, {channels}, 3, 3) was expected; give the "
                                         "weights of torchvision's vgg16")
            channels = shape[0]
        if self.features == "pool5":
            self.count = channels * 16
            return
        width = channels * 49
        for i in LINEAR:
            shape = tuple(self._tensors[f"classifier.{i}.weight"].shape)
            if shape[1:] != (width,):
                raise ConfigurationError(f"classifier.{i}.weight of the VGG-16 weights has shape "
                                         f"{shape}; (n, {width}) was expected; give the weights "
                                         "of torchvision's vgg16")
            width = shape[0]
        self.count = sum(len(self._tensors[f"classifier.{i}.bias"]) for i in LINEAR)

    def __call__(self, images_NHW: np.ndarray, batch: int = 16) -> np.ndarray:
        """(N, F) float32 features of photons (N, H, W)."""
        found = np.empty((len(images_NHW), self.count), np.float32)
        with torch.no_grad():
            for first in range(0, len(images_NHW), batch):
                part = np.asarray(images_NHW[first:first + batch], np.float32)
                found[first:first + len(part)] = self._of(torch.from_numpy(part)[:, None]).numpy()
        return found

    def _of(self, images_B1HW: Tensor) -> Tensor:
        values = self.represent(images_B1HW)
        values = (values - values.new_tensor(MEAN_RGB)[:, None, None]) \
            / values.new_tensor(STD_RGB)[:, None, None]
        layer = torch.nn.functional
        for i in CONVOLUTIONS:
            weight, bias = (self._tensors[f"features.{i}.{part}"] for part in ("weight", "bias"))
            values = torch.relu(layer.conv2d(values, weight, bias, padding=1))
            if i in POOL_AFTER:
                values = layer.max_pool2d(values, 2)
        values = torch.flatten(values, 1)
        if self.features == "pool5":
            return values
        answers = []
        for i in LINEAR:
            weight, bias = (self._tensors[f"classifier.{i}.{part}"]
                            for part in ("weight", "bias"))
            values = torch.relu(layer.linear(values, weight, bias))
            answers.append(values)
        return torch.cat(answers, 1)


def _read(path: str | Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not Path(path).is_file():
        raise ConfigurationError(f"VGG-16 weights were to be read from {path}, which is no file; "
                                 "give a safetensors file with torchvision's names for vgg16")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise OutputDamaged(f"VGG-16 weights were to be read from {path}, which is not a "
                            f"safetensors file ({error}); convert the weights first") from error


@dataclass(frozen=True)
class FeatureModel:
    """Logistic regression on standardised features; ``strength`` is scikit-learn's C."""

    mean_F: np.ndarray
    std_F: np.ndarray
    weight_F: np.ndarray
    bias: float
    strength: float
    accuracy_S: Mapping[float, float]

    def scores(self, features_NF: np.ndarray) -> np.ndarray:
        """(N,) probability of a good image."""
        standard = (np.asarray(features_NF, np.float64) - self.mean_F) / self.std_F
        return 1.0 / (1.0 + np.exp(-np.clip(standard @ self.weight_F + self.bias, -60, 60)))

    def save(self, path: str | Path) -> None:
        """As .npz without pickles."""
        np.savez(path, mean=self.mean_F, std=self.std_F, weight=self.weight_F, bias=self.bias,
                 strength=self.strength, strengths=list(self.accuracy_S),
                 accuracy=list(self.accuracy_S.values()))

    @classmethod
    def load(cls, path: str | Path) -> FeatureModel:
        with np.load(path, allow_pickle=False) as file:
            tried = dict(zip(file["strengths"].tolist(), file["accuracy"].tolist(), strict=True))
            return cls(file["mean"], file["std"], file["weight"], float(file["bias"]),
                       float(file["strength"]), tried)


def fit_features(features_NF: np.ndarray, good_N: np.ndarray, validation_NF: np.ndarray,
                 validation_good_N: np.ndarray, strengths: Sequence[float] = STRENGTHS
                 ) -> FeatureModel:
    """L2 logistic regression whose C is the one of ``strengths`` with the best validation accuracy.

    Ties go to the smaller C.  Raises :class:`ConfigurationError` for labels of one class.
    """
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise MissingDependency(f"logistic regression needs scikit-learn ({error}); "
                                "pip install 'xfel-classify[learn]'") from error
    good_N = np.asarray(good_N).astype(bool)
    if good_N.all() or not good_N.any():
        raise ConfigurationError(f"a regression was to be fitted to {len(good_N)} images, of which "
                                 f"{int(good_N.sum())} are good; give images of both kinds")
    mean_F = np.asarray(features_NF, np.float64).mean(0)
    std_F = np.maximum(np.asarray(features_NF, np.float64).std(0), 1e-6)
    standard_NF = (features_NF - mean_F) / std_F
    tried: dict[float, FeatureModel] = {}
    accuracy: dict[float, float] = {}
    for strength in sorted(strengths):
        fitted = LogisticRegression(C=strength, max_iter=2000).fit(standard_NF, good_N)
        tried[strength] = FeatureModel(mean_F, std_F, fitted.coef_[0], float(fitted.intercept_[0]),
                                       strength, accuracy)
        found = tried[strength].scores(validation_NF) >= 0.5
        accuracy[strength] = float((found == np.asarray(validation_good_N).astype(bool)).mean())
    best = max(accuracy, key=lambda strength: (accuracy[strength], -strength))
    log.info("C = %g with %.4f of the validation images right", best, accuracy[best])
    return tried[best]
