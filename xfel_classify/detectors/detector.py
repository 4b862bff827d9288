"""What is fixed about a kind of detector, and the lookup of kinds by file name.

P panel, S slow axis, F fast axis.  A new kind is one new file in this folder that defines
``DETECTOR``; nothing else needs to change.
"""
from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from dataclasses import dataclass, field
from functools import cache

import numpy as np

from ..core import ConstantsError, UnknownComponent

__all__ = ["Detector", "as_panels", "detector", "guess_kind", "kinds"]

GAIN_BITS = ("none", "top2", "bit14")


@dataclass(frozen=True)
class Detector:
    """A kind of detector.

    ``panel_shape_SF`` is None where it differs from camera to camera (rayonix, generic,
    assembled); ``panel_counts`` are those in use.  ``gain_bits`` and ``stages`` say how a raw
    word encodes its gain stage (see :class:`xfel_classify.core.Constants`).  ``data_bits`` are
    the value bits of a raw word.  ``asic_shape_SF`` is the regular piece that common mode and
    CrystFEL panels follow, ``bank_shape_SF`` the piece read out by one amplifier.
    ``saturation_adu`` is the raw value (after removal of gain bits, in the least sensitive
    stage) from which a pixel is full, or None.  ``geometry`` maps a panel count to a file name
    in ``detectors/geometry``; ``psana_dettype`` is psana's name of the kind.
    """

    kind: str
    panel_shape_SF: tuple[int, int] | None
    panel_counts: tuple[int, ...]
    gain_bits: str
    stages: int
    pixel_size_m: float
    saturation_adu: float | None = None
    geometry: dict[int, str] = field(default_factory=dict)
    psana_dettype: str | None = None
    data_bits: int = 16
    asic_shape_SF: tuple[int, int] | None = None
    bank_shape_SF: tuple[int, int] | None = None
    edge_width: int = 0


@cache
def kinds() -> tuple[str, ...]:
    """Names of all kinds, that is of all modules here which define ``DETECTOR``."""
    found = []
    for module in pkgutil.iter_modules(importlib.import_module(__package__).__path__):
        if hasattr(importlib.import_module(f"{__package__}.{module.name}"), "DETECTOR"):
            found.append(module.name)
    return tuple(sorted(found))


def detector(kind: str) -> Detector:
    """The :class:`Detector` of that kind.

    Raises :class:`UnknownComponent` when there is no such file.
    """
    if kind.isidentifier() and importlib.util.find_spec(f"{__package__}.{kind}") is not None:
        found = getattr(importlib.import_module(f"{__package__}.{kind}"), "DETECTOR", None)
        if isinstance(found, Detector):
            return found
    raise UnknownComponent(
        f"detector kind {kind!r} was asked for; the known kinds are {', '.join(kinds())}; "
        "use one of them, or 'generic' for a single-gain array of any shape")


def guess_kind(panel_shape: tuple[int, ...]) -> str:
    """The kind whose panels have this shape: (P, S, F), (S, F) or a Cheetah slab.

    "generic" when several panels match nothing known, "assembled" for one unknown image.
    """
    shape = tuple(int(n) for n in panel_shape)
    for kind in kinds():
        known = detector(kind)
        if known.panel_shape_SF is None:
            continue
        s, f = known.panel_shape_SF
        slabs = {(p * s, f) for p in known.panel_counts}
        if shape[-2:] == known.panel_shape_SF or (len(shape) == 2 and shape in slabs):
            return kind
    from .cspad import SLAB_SHAPE
    if shape[-2:] == SLAB_SHAPE:
        return "cspad"
    from .rayonix import SIZES
    if shape[-1] == shape[-2] and shape[-1] in SIZES and int(np.prod(shape[:-2], dtype=int)) == 1:
        return "rayonix"
    panels = int(np.prod(shape[:-2], dtype=int)) if len(shape) > 2 else 1
    return "generic" if panels > 1 else "assembled"


def as_panels(frame: np.ndarray, kind: str = "") -> np.ndarray:
    """One frame of any usual layout as (P, S, F).

    (S, F) becomes one panel, (Q, N, S, F) becomes (Q*N, S, F), a slab (P*S, F) of a known kind
    becomes its panels, all of them views; only the Cheetah slab of the CSPAD (1480, 1552) is
    copied, because its quadrants lie side by side.

    Raises :class:`ConstantsError` for a 1-D array or one that the kind cannot have.
    """
    if frame.ndim < 2:
        raise ConstantsError(
            f"a frame of detector kind {kind or 'generic'!r} was expected; its shape is "
            f"{frame.shape}; give an array (panels, slow, fast) or (slow, fast)")
    from .cspad import SLAB_SHAPE, panels_from_slab
    if frame.shape[-2:] == SLAB_SHAPE and kind in ("", "cspad"):
        return panels_from_slab(frame.reshape(SLAB_SHAPE))
    known = detector(kind).panel_shape_SF if kind else None
    if known is not None and frame.shape[-2:] != known:
        s, f = known
        if frame.shape[-1] != f or frame.size % (s * f):
            raise ConstantsError(
                f"a frame of detector kind {kind!r} with panels {known} was expected; its shape "
                f"is {frame.shape}; name the right kind, or 'generic'")
        return frame.reshape(-1, s, f)
    return frame.reshape(-1, *frame.shape[-2:])
