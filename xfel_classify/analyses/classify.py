"""Classification of every frame by a model: window, engine, scores and labels.

A model answers one or more tasks.  A yes/no task ``hit`` gives the columns ``hit/score``
(probability of the positive class) and ``hit/label`` (1 when the score reaches the threshold); a
task with more classes gives ``<task>/label`` (most probable class) and ``<task>/probability``.
"""
from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np

from ..core import (
    Batch,
    CalibratedFrame,
    Column,
    ConfigurationError,
    Constants,
    RunInfo,
    Window,
)
from ..engines import Model, find_model, open_engine
from ..preprocess import plan_render, render

log = logging.getLogger(__name__)


def columns_of(model: Model, thresholds: Mapping[str, float]) -> dict[str, Column]:
    """The columns that ``model`` gives; ``thresholds`` overrides the card's by task name."""
    columns: dict[str, Column] = {}
    for task in model.card.tasks:
        by = f"{model.name} {model.version}"
        if task.positive:
            others = [c for c in task.classes if c != task.positive]
            negative = others[0] if len(others) == 1 else f"not {task.positive}"
            threshold = thresholds.get(task.name, task.threshold)
            columns[f"{task.name}/score"] = Column(
                "float32", unit="probability", doc=f"probability of {task.positive} by {by}")
            columns[f"{task.name}/label"] = Column(
                "int8", missing=-1, names=(negative, task.positive),
                doc=f"1 where the score is at least {threshold:.6g}, by {by}")
        else:
            columns[f"{task.name}/label"] = Column(
                "int16", missing=-1, names=tuple(task.classes), doc=f"most probable class, by {by}")
            columns[f"{task.name}/probability"] = Column(
                "float32", (len(task.classes),), unit="probability", names=tuple(task.classes),
                doc=f"probability of each class, by {by}")
    return columns


def answers_of(model: Model, outputs: Mapping[str, np.ndarray],
               thresholds: Mapping[str, float]) -> dict[str, np.ndarray]:
    """Columns from an engine's outputs (B, K); see :func:`columns_of`."""
    answers: dict[str, np.ndarray] = {}
    for task in model.card.tasks:
        probabilities_BK = outputs[task.output]
        if task.positive:
            score = probabilities_BK[:, task.positive_index].astype(np.float32)
            answers[f"{task.name}/score"] = score
            answers[f"{task.name}/label"] = (
                score >= np.float32(thresholds.get(task.name, task.threshold))).astype(np.int8)
        else:
            answers[f"{task.name}/label"] = probabilities_BK.argmax(axis=1).astype(np.int16)
            answers[f"{task.name}/probability"] = probabilities_BK.astype(np.float32)
    return answers


def photons_scale(window: Window, unit: str, photon_energy_eV: float) -> float:
    """Factor from calibrated values in ``unit`` to the unit the window wants."""
    if window.unit == "photon" and unit == "keV":
        return 1000.0 / photon_energy_eV
    if window.unit == "keV" and unit == "photon":
        return photon_energy_eV / 1000.0
    return 1.0


class Analysis:
    """One model asked about every event."""

    full_frame = False
    uses: tuple[str, ...] = ()

    class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
        """Which model, on what, and with which thresholds."""

        model: str = "sfx-hit"
        backend: str = "auto"                   # onnxruntime, torch, ... or auto
        device: str | None = None               # the runtime's word for a device
        threshold: dict[str, float] = {}        # task name -> threshold instead of the card's
        only: str = ""                          # column that gates this model

    def __init__(self, config: Config | None = None) -> None:
        self._config = config or self.Config()
        self.only = self._config.only
        self.model = find_model(self._config.model)
        self.name = f"classify {self.model.name}"
        known = [task.name for task in self.model.card.tasks]
        for task in self._config.threshold:
            if task not in known:
                raise ConfigurationError(f"model {self.model.name} has no task {task!r} to set a "
                                         f"threshold for; its tasks: {', '.join(known)}")
        self.model_sha256 = self.model.sha256
        self.columns = columns_of(self.model, self._config.threshold)
        self.panels: tuple[int, ...] | None = None
        self._engine: Any = None
        self._opened = ""

    def start(self, run: RunInfo, constants: Constants, batch: int) -> None:
        window = self.model.window
        self._plan = plan_render(constants, window)
        self.panels = tuple(int(p) for p in self._plan.panels)
        self._unit = constants.unit
        self._images_BHW = np.zeros((batch, *window.shape), np.float32)
        trained = self.model.card.detectors
        if trained and run.detector_kind not in trained:
            log.warning("model %s was trained for %s, this run has %s: check its answers against "
                        "the peak finder's", self.model.name, ", ".join(trained),
                        run.detector_kind)
        if self._unit == "ADU" and window.unit == "photon":
            log.warning("frames are in ADU and no gain is known: model %s sees ADU instead of "
                        "photons; give --constants or calibrated input", self.model.name)
        self._engine = open_engine(self.model, self._config.backend, self._config.device, batch)
        self._opened = f"{self._engine.name} {self._engine.precision}"

    def take(self, frame: CalibratedFrame, row: int) -> None:
        render(frame.raw_PSF, self._plan, self._images_BHW[row],
               scale=photons_scale(self.model.window, self._unit, frame.photon_energy_eV))

    def process(self, batch: Batch) -> Mapping[str, Any]:
        selected = np.flatnonzero(batch.selected_B)
        whole = len(selected) == len(batch)
        images_BHW = self._images_BHW[:len(batch)] if whole else self._images_BHW[selected]
        found = answers_of(self.model, self._engine.infer(images_BHW), self._config.threshold)
        if whole:
            return found
        answers = {}
        for name, column in self.columns.items():
            answers[name] = np.full((len(batch), *column.shape), column.missing, column.dtype)
            answers[name][selected] = found[name]
        return answers

    def totals(self) -> Mapping[str, Any]:
        return {}

    def attributes(self) -> Mapping[str, Any]:
        prefix = f"model_{self.model.name}"
        return {f"{prefix}_version": self.model.version, f"{prefix}_sha256": self.model.sha256,
                f"{prefix}_engine": self._opened}

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None


