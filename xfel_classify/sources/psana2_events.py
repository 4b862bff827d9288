"""Events of a psana2 script of the user's own, as frames: for ``Classifier.stream``.

The script owns the ``DataSource`` and its loop; nothing here opens, ends or distributes a run.
"""
from __future__ import annotations

from typing import Any

import numpy as np

from ..core import Constants, ConstantsError, EventStatus, Frame
from .psana2 import DAMAGE_BITS, calibration_of, kind_of
from .run_constants import Stated, frame_kind, run_constants

__all__ = ["constants_of", "frame_of"]


def constants_of(detector: Any) -> Constants:
    """Constants that psana2 holds for ``detector`` (``run.Detector(name)``).

    Raises :class:`ConstantsError` when there are no pedestals.
    """
    raw = detector.raw
    found = calibration_of(detector)
    if "pedestals" not in found:
        raise ConstantsError(
            f"psana2 has no pedestals of {detector._det_name!r}; give them to the classifier: "
            "Classifier(..., constants=...)")
    kind = kind_of(detector._dettype, None)
    shape = np.shape(found["pedestals"])[-3:]
    panels = (len(raw._segment_numbers), *shape[1:])
    return run_constants(frame_kind(kind, np.dtype(np.uint16), constants=True, calibrated=None,
                                    unit=None),
                         detector._det_name, panels, Stated(), own=lambda: found)


def frame_of(detector: Any, event: Any, index: int, shape_PSF: tuple[int, int, int]) -> Frame:
    """The frame of a psana event; the pixels are a copy.

    ``shape_PSF`` is what a whole image has: an event with fewer segments is ``WRONG_SHAPE``.
    """
    raw = detector.raw.raw(event)
    segments = event._det_segments.get((detector._det_name, "raw"), {})
    damage = 0
    for dgram in event._dgrams:
        if dgram is not None and detector._det_name in dgram.__dict__:
            damage |= int(dgram._xtc.damage)
    if raw is None:
        status = EventStatus.WRONG_SHAPE if segments else EventStatus.NO_DETECTOR
    elif damage & DAMAGE_BITS:
        status = EventStatus.DAMAGED
    else:
        raw = np.asarray(raw)
        raw = raw.reshape(shape_PSF) if raw.size == np.prod(shape_PSF) else raw
        status = EventStatus.OK if raw.shape == shape_PSF else EventStatus.WRONG_SHAPE
    return Frame(raw if status is EventStatus.OK else None, int(event.timestamp), index,
                 damage=damage, status=status)
