"""``Classifier``: the judgement of a model inside a program of yours.

On plain arrays, in a psana2 script, or over a run that any event source can read::

    classify = Classifier("sfx-hit")
    answers = classify(images_BHW)                      # {"hit/score": ..., "hit/label": ...}

    for event, answer in classify.stream(run.events(), detector=run.Detector("jungfrau")):
        smd.event(event, hit_score=answer["hit/score"])

    with open_run("run0095/*.h5") as source:
        for frame, answer in classify.stream(source):
            print(frame.index, answer["hit/label"])

Nothing here starts MPI, prints or exits.  The engine is opened at the first image, so a rank that
sees no event takes no device.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .analyses.classify import (
    answers_of,
    columns_of,
    detector_reach_px,
    geometry_row,
    photons_scale,
    suited_window,
)
from .config import build
from .core import ConfigurationError, Constants, ConstantsError, EventSource, EventStatus, Shard
from .engines import Model, find_model, open_engine
from .pipeline.loop import DEFAULT_PHOTON_ENERGY_EV
from .preprocess import RenderPlan, image_window, plan_render, render


def open_run(run: int | str | Path | Sequence[str | Path], **options: Any) -> EventSource:
    """An event source over a psana2 run (a number) or over files; use it in a ``with``.

    ``options`` are the keys of the source's configuration (``exp``, ``dir``, ``detector``,
    ``constants``, ``geometry``, ...); ``use`` names another source.
    """
    if isinstance(run, int):
        return build("sources", {"use": "psana2", "run": run, **options})
    files = [run] if isinstance(run, str | Path) else list(run)
    return build("sources", {"use": "hdf5", "files": [str(f) for f in files], **options})


class Classifier:
    """Judges images and events with one model.

    Parameters
    ----------
    model : name on the model search path, directory, or :class:`~xfel_classify.engines.Model`.
    backend : runtime; "auto" takes the best that is here.
    device : the runtime's word for a device; None lets it choose.
    threshold : {task: threshold} instead of those in the model's card.
    photon_energy_eV : used where neither call nor event tells one (9500 eV when None).
    constants : calibration of raw or panel-shaped arrays given to :meth:`__call__`.
    """

    def __init__(self, model: str | Path | Model = "sfx-hit", *, backend: str = "auto",
                 device: str | None = None, threshold: Mapping[str, float] | None = None,
                 photon_energy_eV: float | None = None,
                 constants: Constants | None = None) -> None:
        self.model = find_model(model)
        self._backend, self._device = backend, device
        self._threshold = dict(threshold or {})
        self._energy_eV = photon_energy_eV or DEFAULT_PHOTON_ENERGY_EV
        self._constants = constants
        self._engine: Any = None
        self._plans: dict[int, tuple[Constants, RenderPlan]] = {}
        self.columns = columns_of(self.model, self._threshold)

    def __call__(self, images: np.ndarray, *, photon_energy_eV: float | None = None,
                 beam_center_px: tuple[float, float] | None = None,
                 good: np.ndarray | None = None, distance_m: float | None = None,
                 pixel_size_m: float | None = None) -> dict[str, np.ndarray]:
        """Columns for one or several images.

        ``images`` is (H, W) or (B, H, W): assembled, calibrated, in the unit of the model's
        window (photons for the shipped models), with the beam at ``beam_center_px`` (fast, slow;
        the middle when None); ``good`` (H, W) is False where a pixel must not be used.  With
        ``constants`` given, (P, S, F) or (B, P, S, F) arrays as the detector delivers them.
        ``distance_m`` and ``pixel_size_m`` are for models with a geometry input, where
        ``constants`` do not tell them.
        Returns {column: (B,) array}; a single image gives arrays of one row.
        """
        images = np.asarray(images)
        panels = self._constants is not None and images.shape[-3:] == self._constants.shape
        frames = images if images.ndim == (4 if panels else 3) else images[np.newaxis]
        expected = "(P, S, F) or (B, P, S, F)" if panels else "(H, W) or (B, H, W)"
        if frames.ndim != (4 if panels else 3):
            raise ValueError(f"images of shape {images.shape} were given; expected {expected}"
                             + ("" if panels else ", or panels together with constants="))
        windows_BHW = np.zeros((len(frames), *self.model.window.shape), np.float32)
        reach_px = max(_reach_px(frames.shape[1:], beam_center_px), 1) if not panels else 1
        window = suited_window(self.model, reach_px)
        for frame, window_HW in zip(frames, windows_BHW, strict=True):
            if panels:
                assert self._constants is not None
                self._render(frame, self._constants, photon_energy_eV, window_HW)
            else:
                window_HW[:] = image_window(frame, window, beam_center_px, good)
        if not self.model.card.geometry:
            return self._infer(windows_BHW)
        if panels:
            assert self._constants is not None
            geometry = self._constants.geometry
            distance_m = distance_m or geometry.distance_m
            pixel_size_m = pixel_size_m or geometry.pixel_size_m
            window = self._plan(self._constants).window
        if not distance_m or not pixel_size_m:
            raise ConfigurationError(
                f"model {self.model.name} judges by the geometry; distance_m is {distance_m}, "
                f"pixel_size_m is {pixel_size_m}; give both with the images")
        row_4 = geometry_row(distance_m, pixel_size_m, photon_energy_eV or self._energy_eV,
                             window.pool)
        return self._infer(windows_BHW, np.tile(row_4, (len(frames), 1)))

    def stream(self, events: Iterable[Any] | EventSource, detector: Any = None, *,
               photon_energy_eV: float | Callable[[Any], float | None] | None = None,
               ) -> Iterator[tuple[Any, dict[str, Any]]]:
        """Every event with its answer, in order: (event, {column: value}).

        ``events`` is an opened event source (see :func:`open_run`), or psana2's
        ``run.events()`` together with ``detector`` (psana2's ``run.Detector(...)``).  Every
        event is yielded; one without a usable image has the columns' missing values and a
        ``status`` that is not 0 (:class:`~xfel_classify.core.EventStatus`).
        ``photon_energy_eV`` is a number or, for psana2 events, a function of the event such as
        ``ebeam.raw.ebeamPhotonEnergy``.  A rank without events prepares nothing.
        """
        if detector is not None:
            yield from self._psana_events(events, detector, photon_energy_eV)
            return
        if not isinstance(events, EventSource):
            if next(iter(events), None) is None:
                return      # psana2's server ranks have neither a detector nor events
            raise TypeError("stream() takes an event source from open_run(), or psana2 events "
                            "together with detector=run.Detector(...)")
        constants = events.constants()
        expected = events.expected_events()
        position = [0]

        def claim(n: int) -> range:
            first = position[0]
            position[0] += n
            last = first + n if expected is None else min(first + n, expected)
            return range(first, max(first, last))

        stated = None if callable(photon_energy_eV) else photon_energy_eV
        for frame in events.frames(Shard(claim)):
            yield frame, self._answer(frame, constants,
                                      frame.scalars.get("photon_energy_eV", stated))

    def _psana_events(self, events: Any, detector: Any,
                      photon_energy_eV: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
        from .sources.psana2_events import constants_of, frame_of

        constants = self._constants
        for index, event in enumerate(events):
            constants = constants or constants_of(detector)
            energy_eV = photon_energy_eV(event) if callable(photon_energy_eV) \
                else photon_energy_eV
            yield event, self._answer(frame_of(detector, event, index, constants.shape),
                                      constants, energy_eV)

    def close(self) -> None:
        """Release the engine; the next image opens it again."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def __enter__(self) -> Classifier:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _answer(self, frame: Any, constants: Constants,
                photon_energy_eV: float | None) -> dict[str, Any]:
        status = frame.status
        if status is EventStatus.OK and frame.raw_PSF is None:
            status = EventStatus.NO_DETECTOR
        if status is EventStatus.OK and frame.raw_PSF.shape != constants.shape:
            status = EventStatus.WRONG_SHAPE
        missing = {name: np.full(c.shape, c.missing, c.dtype)[()]
                   for name, c in self.columns.items()}
        if status is not EventStatus.OK:
            return {"status": int(status), **missing}
        window_HW = np.zeros(self.model.window.shape, np.float32)
        self._render(frame.raw_PSF, constants, photon_energy_eV, window_HW)
        geometry_14 = None
        if self.model.card.geometry:
            geometry = constants.geometry
            geometry_14 = geometry_row(
                frame.scalars.get("distance_m", geometry.distance_m), geometry.pixel_size_m,
                self._energy(photon_energy_eV), self._plan(constants).window.pool)[np.newaxis]
            if not np.isfinite(geometry_14).all():
                return {"status": int(status), **missing}
        answers = self._infer(window_HW[np.newaxis], geometry_14)
        return {"status": int(status), **{name: values[0] for name, values in answers.items()}}

    def _render(self, frame_PSF: np.ndarray, constants: Constants,
                photon_energy_eV: float | None, out_HW: np.ndarray) -> None:
        if frame_PSF.dtype.kind == "f" and not constants.calibrated:
            raise ConstantsError("floating-point frames were given together with pedestals and "
                                 "gain; give raw frames, or constants of calibrated frames")
        render(frame_PSF, self._plan(constants), out_HW, scale=photons_scale(
            self.model.window, constants.unit, self._energy(photon_energy_eV)))

    def _plan(self, constants: Constants) -> RenderPlan:
        known = self._plans.get(id(constants))
        if known is None or known[0] is not constants:
            window = suited_window(self.model, detector_reach_px(constants))
            known = constants, plan_render(constants, window)
            self._plans[id(constants)] = known
        return known[1]

    def _energy(self, photon_energy_eV: float | None) -> float:
        return photon_energy_eV if photon_energy_eV and photon_energy_eV > 0 else self._energy_eV

    def _infer(self, windows_BHW: np.ndarray,
               geometry_B4: np.ndarray | None = None) -> dict[str, np.ndarray]:
        if self._engine is None:
            self._engine = open_engine(self.model, self._backend, self._device,
                                       max(1, min(64, len(windows_BHW))))
        return answers_of(self.model, self._engine.infer(windows_BHW, geometry_B4),
                          self._threshold)


def _reach_px(shape_HW: tuple[int, ...], beam_center_px: tuple[float, float] | None) -> float:
    """How far an assembled image extends from the beam, in pixels."""
    height, width = shape_HW
    fast, slow = (width / 2, height / 2) if beam_center_px is None else beam_center_px
    return max(fast, width - fast, slow, height - slow)
