"""Constants of a run from what its source and its configuration state.

Shared by every source: which geometry, which calibration constants, which mask, in which order of
precedence, and the refusals when something that cannot be guessed is missing.
"""
from __future__ import annotations

import dataclasses
import glob
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .. import detectors
from ..core import (
    Column,
    ConfigurationError,
    Constants,
    ConstantsError,
    Geometry,
    GeometryError,
    RunNotFound,
)

__all__ = ["HC_EV_A", "FrameKind", "Stated", "expand", "frame_kind", "geometry_of",
           "plausible", "run_constants", "scalar_columns", "word"]

_BESIDE = re.compile(r"(^|[-_.])(truth|constants)$")

HC_EV_A = 12398.419843320026
"""Photon energy times wavelength, eV x Angstrom (CODATA 2018, exact)."""


@dataclasses.dataclass(frozen=True)
class Stated:
    """What the user stated about a run, in the words of the configuration.

    ``beam_center_px`` is (fast, slow) from the outer corner of the first pixel.
    """

    geometry: str | None = None
    constants: str | None = None
    mask: str | None = None
    distance_m: float | None = None
    pixel_size_m: float | None = None
    beam_center_px: tuple[float, float] | None = None
    edge_width: int = 0
    gain_mode: str | None = None


@dataclasses.dataclass(frozen=True)
class FrameKind:
    """What the pixels of a run are: detector kind, calibrated or raw, and in which unit."""

    kind: str
    calibrated: bool
    unit: str


def plausible(value: Any, low: float, high: float) -> bool:
    """True for a finite number in [low, high]; NaN, infinity, zero and None are "missing"."""
    if value is None:
        return False
    try:
        number = float(value)
    except (TypeError, ValueError):
        return False
    return math.isfinite(number) and low <= number <= high


def frame_kind(kind: str, dtype: np.dtype, *, constants: bool, calibrated: bool | None,
               unit: str | None) -> FrameKind:
    """Decide whether frames of ``dtype`` are raw words or calibrated values.

    Stated (``calibrated``) beats everything; floating point is calibrated; integers are raw when
    there are constants for them.  Signed integers without constants were pedestal-subtracted
    already (raw words are never negative).  Unsigned integers without constants are used as they
    are, in ADU, except where a word also holds gain bits: those are refused by
    :func:`run_constants`.
    """
    found = detectors.detector(kind)
    if calibrated is None:
        if np.issubdtype(dtype, np.floating):
            calibrated = True
        elif constants:
            calibrated = False
        else:
            calibrated = np.issubdtype(dtype, np.signedinteger) or found.gain_bits == "none"
    if unit is None:
        floating = np.issubdtype(dtype, np.floating)
        unit = "keV" if not calibrated or (floating and found.gain_bits != "none") else "ADU"
    return FrameKind(kind, calibrated, unit)


def geometry_of(kind: str, panel_shape: tuple[int, int, int], stated: Stated,
                text: str | None = None) -> Geometry:
    """The geometry: stated file, else the run's own ``text``, else assembled, else shipped.

    Raises :class:`GeometryError` saying what to state when none applies.
    """
    panels, slow, fast = panel_shape
    if stated.geometry:
        path = Path(stated.geometry).expanduser()
        if not path.is_file():
            raise GeometryError(f"geometry {stated.geometry!r} is not a file; give the path of a "
                                "psana .data or CrystFEL .geom file")
        geometry = detectors.read_geometry(path, panel_shape, kind)
    elif kind == "assembled":
        if stated.pixel_size_m is None:
            raise GeometryError(
                "already assembled images need their pixel size; state source.pixel_size_m "
                "(and source.beam_center_px = [fast, slow], source.distance_m)")
        geometry = detectors.assembled_geometry((slow, fast), stated.pixel_size_m,
                                                beam_center_px=stated.beam_center_px)
    elif text:
        geometry = detectors.read_geometry(text, panel_shape, kind)
    else:
        shipped = detectors.detector(kind).geometry
        if shipped.get(panels) is None:
            known = ", ".join(str(n) for n in sorted(shipped)) or "no number of"
            raise GeometryError(
                f"no geometry is shipped for {panels} panels of {slow} x {fast} pixels of kind "
                f"{kind!r} (there is one for {known} panels); give --geometry FILE, or "
                "--detector assembled with source.pixel_size_m and source.beam_center_px")
        geometry = detectors.default_geometry(detectors.detector(kind), panels)
    if stated.distance_m is not None:
        geometry = dataclasses.replace(geometry, distance_m=stated.distance_m)
    return geometry


def run_constants(
    frames: FrameKind, detector_name: str, panel_shape: tuple[int, int, int], stated: Stated, *,
    own: Callable[[], Mapping[str, Any]] | None = None, good_PSF: np.ndarray | None = None,
    control_PSF: np.ndarray | None = None,
) -> Constants:
    """Constants for frames of ``panel_shape``.

    ``own`` returns the constants that come with the run (psana's names and shapes), asked only
    where the configuration states no constants file.  ``good_PSF`` is the mask stored with the
    run (True = use).  ``control_PSF`` are the gain control bits of an ePix10ka as the run states
    them, used where the configuration names no gain mode.

    Raises :class:`ConstantsError` when raw frames have no pedestals, :class:`GeometryError`,
    :class:`ConfigurationError` for an unreadable mask.
    """
    mapping: Mapping[str, Any] = {}
    if stated.constants:
        path = Path(stated.constants).expanduser()
        if not path.is_file():
            raise ConstantsError(f"constants {stated.constants!r} is not a file; give an HDF5 file "
                                 f"with a group {detector_name!r} holding pedestals, pixel_gain, "
                                 "pixel_rms, pixel_status")
        mapping = detectors.load_constants(path, detector_name, frames.kind, panel_shape)
    elif own is not None:
        mapping = own()
    text = mapping.get("geometry")
    geometry = geometry_of(frames.kind, panel_shape, stated, str(text) if text else None)
    good = _user_mask(frames, stated, panel_shape, good_PSF)
    if frames.calibrated:
        good = _with_status(good, mapping, panel_shape)
        return detectors.uncalibrated_constants(panel_shape, geometry, good_PSF=good,
                                                unit=frames.unit)
    if mapping.get("pedestals") is None:
        raise ConstantsError(
            f"detector {detector_name!r} delivers raw words and no pedestals were found "
            f"(found: {', '.join(sorted(mapping)) or 'no constants at all'}); give --constants "
            "FILE, an HDF5 file as `xfel-classify constants` saves it, or state "
            "source.calibrated = true if the values are calibrated already")
    return detectors.make_constants(
        detectors.detector(frames.kind), panel_shape, mapping, geometry, extra_good_PSF=good,
        unit=frames.unit, gain_mode=stated.gain_mode or control_PSF)


def _user_mask(frames: FrameKind, stated: Stated, panel_shape: tuple[int, int, int],
               good_PSF: np.ndarray | None) -> np.ndarray | None:
    own = None if good_PSF is None else np.asarray(good_PSF, bool).reshape(panel_shape)
    if stated.edge_width < 0:
        raise ConfigurationError(f"source.edge_width = {stated.edge_width} is negative; give the "
                                 "number of pixels to mask along every ASIC edge")
    user = detectors.load_mask(stated.mask, panel_shape, frames.kind) if stated.mask else None
    edges = detectors.edges(detectors.detector(frames.kind), panel_shape,
                            stated.edge_width) if stated.edge_width else None
    return detectors.combine(own, user, edges)


def _with_status(good: np.ndarray | None, mapping: Mapping[str, Any],
                 panel_shape: tuple[int, int, int]) -> np.ndarray | None:
    """Calibrated frames use no pedestals, but a pixel with a bad status stays bad."""
    status = mapping.get("pixel_status")
    if status is None:
        return good
    status_GPSF = np.asarray(status)
    if status_GPSF.size % math.prod(panel_shape):
        raise ConstantsError(f"pixel_status has shape {status_GPSF.shape}, frames have "
                             f"{panel_shape}; give constants of this detector")
    fine = ~np.any(status_GPSF.reshape(-1, *panel_shape) != 0, axis=0)
    return fine if good is None else good & fine


def scalar_columns() -> dict[str, Column]:
    """Names that may occur in ``Frame.scalars`` of any source, with unit and meaning.

    An event without a believable photon energy has none: the loop then assumes one and flags it.
    """
    return {
        "photon_energy_eV": Column("float64", unit="eV", doc="photon energy of the event"),
        "pulse_energy_mJ": Column("float64", unit="mJ",
                                  doc="pulse energy (mean of the gas detectors f_11 and f_12, or "
                                      "gmd, or what the file states)"),
        "distance_m": Column("float64", unit="m", doc="sample to detector distance"),
        "step_value": Column("float64", doc="value of the scan variable"),
    }


def expand(patterns: list[str]) -> list[Path]:
    """The files that names and globs mean, each once, those of a glob in order of their names.

    A glob leaves out files of constants and of the truth of a simulation (``*truth.*``,
    ``*constants.*``), which lie beside the run and are no part of it.

    Raises :class:`RunNotFound` for a name or glob that matches nothing.
    """
    files: dict[Path, None] = {}
    for pattern in patterns:
        text = str(Path(pattern).expanduser())
        if Path(text).is_file():
            matches = [text]
        else:
            matches = sorted(m for m in glob.glob(text, recursive=True)
                             if Path(m).is_file() and not _BESIDE.search(Path(m).stem))
        if not matches:
            kind = "matches no file" if glob.has_magic(text) else "does not exist"
            raise RunNotFound(f"{pattern!r} {kind} (looked from {Path.cwd()}); give HDF5 files or "
                              "a glob, or a run number for psana")
        files.update(dict.fromkeys(Path(m) for m in matches))
    return list(files)


def word(text: str) -> str:
    """``text`` with everything that is no letter, digit, dash or underscore replaced."""
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in text) or "run"
