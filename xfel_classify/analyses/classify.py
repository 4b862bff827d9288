"""Classification of every frame by a model: window, engine, scores and labels.

A model answers one or more tasks.  A yes/no task ``hit`` gives the columns ``hit/score``
(probability of the positive class) and ``hit/label`` (1 when the score reaches the threshold); a
task with more classes gives ``<task>/label`` (most probable class) and ``<task>/probability``; a
number gives ``<task>/<value>``, for example ``resolution/d_A``.

Models with a geometry input are told distance, pixel size, wavelength and pooling factor of every
event.  An event whose distance is not known has no answer from them.
"""
from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
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
from ..engines import Model, Pending, SupportsSubmit, find_model, open_engine
from ..preprocess import plan_render, render

log = logging.getLogger(__name__)

HC_EV_A = 12398.419843
COVERED = 0.8
"""Share of a detector's reach that a pooled window covers at least."""


def columns_of(model: Model, thresholds: Mapping[str, float]) -> dict[str, Column]:
    """The columns that ``model`` gives; ``thresholds`` overrides the card's by task name."""
    columns: dict[str, Column] = {}
    for task in model.card.tasks:
        by = f"{model.name} {model.version}"
        if task.kind == "regression":
            columns[f"{task.name}/{task.value}"] = Column(
                "float32", unit=task.unit, doc=f"{task.value} by {by}")
        elif task.positive:
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
        if task.kind == "regression":
            value = probabilities_BK[:, 0].astype(np.float32)
            if task.transform == "reciprocal":      # 0 and below mean nothing
                positive = value > 0
                value = np.where(positive, 1 / np.where(positive, value, np.float32(1)),
                                 np.float32(np.nan))
            answers[f"{task.name}/{task.value}"] = value
        elif task.positive:
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


def suited_window(model: Model, reach_px: float) -> Window:
    """The card's window, pooled so that it covers most of ``reach_px`` detector pixels.

    ``reach_px`` is how far the detector extends from the beam.  Without ``pools`` in the card
    it is the card's window; with them, the smallest factor that covers the detector, else the
    largest.
    """
    window, pools = model.window, sorted(model.card.pools)
    if not pools:
        return window
    side = max(window.shape) / (1 if window.kind == "quadrant" else 2)
    covering = [pool for pool in pools if pool * side >= COVERED * reach_px]
    return dataclasses.replace(window, pool=covering[0] if covering else pools[-1])


def detector_reach_px(constants: Constants) -> float:
    """Largest |x| or |y| of a pixel of the detector, in pixels."""
    geometry = constants.geometry
    reach = max(np.abs(geometry.x_m_PSF).max(initial=0), np.abs(geometry.y_m_PSF).max(initial=0))
    return float(reach) / geometry.pixel_size_m


def geometry_row(distance_m: float | None, pixel_size_m: float, photon_energy_eV: float,
                 pool: int) -> np.ndarray:
    """float32 (4,): distance in mm, pixel in mm, wavelength in angstrom, pool; NaN = not known."""
    return np.array([np.nan if distance_m is None else 1e3 * distance_m, 1e3 * pixel_size_m,
                     HC_EV_A / photon_energy_eV, pool], np.float32)


def combined(model: Model, answers: Sequence[Mapping[str, np.ndarray]]) -> Mapping[str, np.ndarray]:
    """One answer from those of several quadrants: mean probability, smallest d, mean number."""
    if len(answers) == 1:
        return answers[0]
    return {task.output: (np.max if task.transform == "reciprocal" else np.mean)(
        [one[task.output] for one in answers], axis=0) for task in model.card.tasks}


PARTS = 4
"""Into how many launches a batch is divided on an engine that computes while events are read."""


class Analysis:
    """One model asked about every event."""

    full_frame = False
    uses: tuple[str, ...] = ()

    class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
        """Which model, on what, and with which thresholds."""

        model: str = "sfx-hit"
        backend: str = "auto"                   # onnxruntime, torch, ... or auto
        device: str | None = None               # the runtime's word for a device
        precision: str | None = None            # on a GPU; None = what the model's recipe prefers
        threshold: dict[str, float] = {}        # task name -> threshold instead of the card's
        only: str = ""                          # column that gates this model
        quadrants: list[str] = []               # several of A to D instead of the card's one

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
        quadrants = self._config.quadrants
        if quadrants and (self.model.window.kind != "quadrant" or set(quadrants) - set("ABCD")):
            raise ConfigurationError(
                f"model {self.model.name} was asked about the quadrants {', '.join(quadrants)}; "
                f"its window is a {self.model.window.kind}; quadrants A, B, C and D go with "
                "models that look at one")
        self.model_sha256 = self.model.sha256
        self.columns = columns_of(self.model, self._config.threshold)
        self.panels: tuple[int, ...] | None = None
        self._engine: Any = None
        self._opened = ""

    def start(self, run: RunInfo, constants: Constants, batch: int) -> None:
        window = suited_window(self.model, detector_reach_px(constants))
        self._plans = [plan_render(constants, dataclasses.replace(window, quadrant=quadrant))
                       for quadrant in self._config.quadrants or [window.quadrant]]
        self._pool = window.pool
        self.panels = tuple(sorted({int(p) for plan in self._plans for p in plan.panels}))
        self._unit = constants.unit
        self._images_QBHW = np.zeros((len(self._plans), batch, *window.shape), np.float32)
        self._geometry_B4 = np.zeros((batch, 4), np.float32)
        self._geometry, self._said = constants.geometry, False
        trained = self.model.card.detectors
        if trained and run.detector_kind not in trained:
            log.warning("model %s was trained for %s, this run has %s: check its answers against "
                        "the peak finder's", self.model.name, ", ".join(trained),
                        run.detector_kind)
        if self._unit == "ADU" and window.unit == "photon":
            log.warning("frames are in ADU and no gain is known: model %s sees ADU instead of "
                        "photons; give --constants or calibrated input", self.model.name)
        # a part of a batch is judged while the rest of it is read
        self._engine = open_engine(self.model, self._config.backend, self._config.device,
                                   max(1, batch // PARTS), self._config.precision)
        self._opened = f"{self._engine.name} {self._engine.precision}"
        # a gated model sees few rows: they are judged together at the end
        self._ahead = isinstance(self._engine, SupportsSubmit) and not self.only
        self._sent: list[list[Pending]] = []
        self._next = 0                          # first row that is not on its way

    def take(self, frame: CalibratedFrame, row: int) -> None:
        scale = photons_scale(self.model.window, self._unit, frame.photon_energy_eV)
        for images_BHW, plan in zip(self._images_QBHW, self._plans, strict=True):
            render(frame.raw_PSF, plan, images_BHW[row], scale=scale)
        if self.model.card.geometry:
            distance_m = frame.frame.scalars.get("distance_m", self._geometry.distance_m)
            self._geometry_B4[row] = geometry_row(distance_m, self._geometry.pixel_size_m,
                                                  frame.photon_energy_eV, self._pool)
        if self._ahead:     # whole launches; rows without an image may have been passed over
            waiting = row + 1 - self._next
            if waiting >= self._engine.chunk:
                self._submit(row + 1 - waiting % self._engine.chunk)

    def _submit(self, stop: int) -> None:
        """Put the rows up to ``stop`` on their way; rows without an image give an answer unused."""
        rows = slice(self._next, stop)
        geometry_B4 = self._geometry_B4[rows] if self.model.card.geometry else None
        self._sent.append([self._engine.submit(images_BHW[rows], geometry_B4)
                           for images_BHW in self._images_QBHW])
        self._next = stop

    def _outputs(self, count: int) -> list[dict[str, np.ndarray]]:
        """{output: (count, K)} of each quadrant, of what was submitted and of the rest."""
        if self._next < count:
            self._submit(count)
        parts = [[pending.result() for pending in quadrants] for quadrants in self._sent]
        self._sent, self._next = [], 0
        return [{name: np.concatenate([part[q][name] for part in parts])[:count]
                 for name in parts[0][q]} for q in range(len(self._images_QBHW))]

    def process(self, batch: Batch) -> Mapping[str, Any]:
        answered_B = batch.selected_B
        if self.model.card.geometry:
            answered_B = answered_B & self._known(len(batch), answered_B)
        chosen = np.flatnonzero(answered_B)
        whole = len(chosen) == len(batch)
        rows: Any = slice(len(batch)) if whole else chosen
        geometry_B4 = self._geometry_B4[rows] if self.model.card.geometry else None
        if self._ahead:
            outputs = [{name: values_BK[rows] for name, values_BK in one.items()}
                       for one in self._outputs(len(batch))]
        else:
            outputs = [self._engine.infer(images_BHW[rows], geometry_B4)
                       for images_BHW in self._images_QBHW]
        found = answers_of(self.model, combined(self.model, outputs), self._config.threshold)
        if whole:
            return found
        answers = {}
        for name, column in self.columns.items():
            answers[name] = np.full((len(batch), *column.shape), column.missing, column.dtype)
            answers[name][chosen] = found[name]
        return answers

    def _known(self, count: int, selected_B: np.ndarray) -> np.ndarray:
        known_B = np.isfinite(self._geometry_B4[:count]).all(axis=1) & (
            self._geometry_B4[:count, 0] > 0)
        if not self._said and not known_B[selected_B].all():
            self._said = True
            log.warning("model %s needs the distance of the detector, which neither the geometry "
                        "nor the event tells: such events have no answer; give "
                        "source.distance_m", self.model.name)
        return known_B

    def totals(self) -> Mapping[str, Any]:
        return {}

    def attributes(self) -> Mapping[str, Any]:
        prefix = f"model_{self.model.name}"
        if getattr(self._engine, "changed", False) and "then" not in self._opened:
            self._opened += f", then {self._engine.name} {self._engine.precision}"
        said: dict[str, Any] = {
            f"{prefix}_version": self.model.version, f"{prefix}_sha256": self.model.sha256,
            f"{prefix}_engine": self._opened}
        if self.model.card.pools and self._opened:
            said[f"{prefix}_pool"] = self._pool
        return said

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None


