"""Calibration constants: from an HDF5 file or psana's dictionary to :class:`core.Constants`.

Names, shapes and units are psana's: ``pedestals`` (ADU), ``pixel_gain`` (ADU per keV),
``pixel_rms`` (ADU), ``pixel_status`` (0 = good), ``pixel_offset`` (ADU), each (G, P, S, F) with
one plane per gain stage, or (P, S, F) for detectors with one; ``pixel_mask`` (1 = good, (P, S, F));
``geometry`` is text.  A file holds them as ``/<detector>/<name>``.

G gain stage, P panel, S slow axis, F fast axis.
"""
from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..core import Constants, ConstantsError, Geometry
from .detector import Detector, as_panels
from .epix10ka import PLANES, select_stages

__all__ = ["TYPES", "load_constants", "make_constants", "save_constants",
           "uncalibrated_constants"]

TYPES = ("pedestals", "pixel_gain", "pixel_rms", "pixel_status", "pixel_offset", "pixel_mask")
"""Array types that are read; anything else in a file is left alone, but for ``geometry``."""


# --- files ----------------------------------------------------------------------------------------

def load_constants(path: str | Path, detector_name: str, kind: str = "",
                   panel_shape: tuple[int, int, int] | None = None
                   ) -> dict[str, np.ndarray | str]:
    """Constants of one detector from an HDF5 file: psana's names -> arrays, ``geometry`` -> str.

    A file with a single group serves whatever the detector is called.  ``panel_shape`` (P, S, F)
    is checked when given.

    Raises :class:`ConstantsError` (no such file or detector, nothing usable, wrong shape).
    """
    import h5py
    path = Path(path)
    if not path.is_file():
        raise ConstantsError(f"constants of {detector_name!r} were to be read from {path}; there "
                             "is no such file; check --constants")
    try:
        with h5py.File(path, "r") as file:
            groups = [name for name, one in file.items() if isinstance(one, h5py.Group)]
            if detector_name not in groups and len(groups) != 1:
                raise ConstantsError(
                    f"constants of {detector_name!r} were asked for; {path} has those of "
                    f"{', '.join(groups) or 'no detector'}; set --detector or --constants")
            group = file[detector_name if detector_name in groups else groups[0]]
            found: dict[str, np.ndarray | str] = {}
            for name, one in group.items():
                if name == "geometry":
                    text = one[()]
                    found[name] = text.decode() if isinstance(text, bytes) else str(text)
                elif name in TYPES:
                    found[name] = one[()]
    except OSError as error:
        raise ConstantsError(f"constants of {detector_name!r} were to be read from {path}; "
                             f"{error}; copy the file again") from error
    if not found:
        raise ConstantsError(
            f"constants of {detector_name!r} were asked for; its group in {path} has none of "
            f"{', '.join(TYPES)}, geometry; write it with 'xfel-classify constants'")
    if panel_shape is not None:
        for name, values in found.items():
            if isinstance(values, np.ndarray):
                found[name] = _planes(name, values, panel_shape, kind)
    return found


def save_constants(path: str | Path, detector_name: str,
                   mapping: Mapping[str, np.ndarray | str]) -> None:
    """Write ``/<detector_name>/<type>`` to an HDF5 file, all or nothing.

    Other detectors of an existing file are kept; those of ``detector_name`` are replaced.
    Raises :class:`ConstantsError` when there is nothing to write or the file cannot be written.
    """
    import h5py
    path = Path(path)
    kept = {name: values for name, values in mapping.items()
            if name in TYPES or name == "geometry"}
    if not kept:
        raise ConstantsError(
            f"constants of {detector_name!r} were to be written to {path}; none of "
            f"{', '.join(TYPES)}, geometry was given; check what psana has for the run")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with h5py.File(temporary, "w") as file:
            if path.exists():
                with h5py.File(path, "r") as old:
                    for name in old:
                        if name != detector_name:
                            old.copy(name, file)
            for name, values in kept.items():
                full = f"{detector_name}/{name}"
                if isinstance(values, str):
                    file.create_dataset(full, data=values, dtype=h5py.string_dtype())
                else:
                    file.create_dataset(full, data=np.asarray(values))
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ConstantsError(f"constants were to be written to {path}; {error}; check the "
                             "directory and the space left") from error


# --- arrays ---------------------------------------------------------------------------------------

def _planes(name: str, values: np.ndarray, panel_shape: tuple[int, ...], kind: str
            ) -> np.ndarray:
    """``values`` as (G, P, S, F), or (P, S, F) for a mask."""
    shape = tuple(int(n) for n in panel_shape)
    size = int(np.prod(shape))
    one = name == "pixel_mask"
    if values.ndim >= 2 and size and values.size % size == 0 and (not one or values.size == size):
        n = values.size // size
        if values.shape[-2:] == shape[-2:] or (values.shape[-1] == shape[-1] and n == 1):
            return values.reshape(shape if one else (n, *shape))
        if n == 1 and kind:
            arranged = as_panels(values, kind)
            if arranged.shape == shape:
                return arranged if one else arranged[None]
    raise ConstantsError(
        f"constant {name!r} was to fit frames of {shape}; its shape is {values.shape}; use the "
        "constants of this detector, with all of its panels")


def _stages(name: str, values_GPSF: np.ndarray, detector: Detector, gain_mode: Any) -> np.ndarray:
    if len(values_GPSF) == detector.stages:
        return values_GPSF
    if detector.gain_bits == "bit14" and len(values_GPSF) == PLANES:
        if gain_mode is None:
            raise ConstantsError(
                f"constants of {detector.kind} were to be used; {name!r} has {PLANES} planes, and "
                "bit 14 of a word chooses between two of them; say which gain mode the run was "
                "taken with (FH, FM, FL, AHL or AML), or pass the camera's control bits")
        return select_stages(values_GPSF, gain_mode)
    if len(values_GPSF) == 1 and name not in ("pedestals", "pixel_gain"):
        return np.broadcast_to(values_GPSF, (detector.stages, *values_GPSF.shape[1:]))
    raise ConstantsError(
        f"constants of {detector.kind} were to be used; {name!r} has {len(values_GPSF)} planes "
        f"where the detector has {detector.stages} gain stages; use its own constants")


def make_constants(detector: Detector, panel_shape: tuple[int, int, int],
                   mapping: Mapping[str, Any], geometry: Geometry, *,
                   extra_good_PSF: np.ndarray | None = None, unit: str = "keV",
                   gain_mode: str | np.ndarray | None = None) -> Constants:
    """:class:`Constants` from psana's arrays, checked against the frames they are for.

    A pixel is bad when any stage has a non-zero ``pixel_status``, a pedestal, gain or offset that
    is not finite, or a gain of zero (Jungfrau's stages 1 and 2 have negative gains), when
    ``pixel_mask`` is 0, where the geometry says so, and where ``extra_good_PSF`` is False.
    Constants of bad pixels are replaced by pedestal 0 and gain 1, so that nothing of them remains.
    Without ``pixel_gain`` values stay in ADU and ``unit`` becomes "ADU".  ``gain_mode`` is for
    ePix10ka only (see :func:`xfel_classify.detectors.epix10ka.select_stages`).

    Raises :class:`ConstantsError` (no pedestals, wrong shape, no good pixel left).
    """
    shape = tuple(int(n) for n in panel_shape)
    if mapping.get("pedestals") is None:
        given = ", ".join(name for name in mapping if name in TYPES) or "nothing"
        raise ConstantsError(
            f"raw frames of {detector.kind} need pedestals; the constants given have {given}; give "
            "a file with --constants, or calibrated frames")
    planes = {name: _planes(name, np.asarray(mapping[name]), shape, detector.kind)
              for name in TYPES if mapping.get(name) is not None}
    planes = {name: values if name == "pixel_mask" else
              _stages(name, values, detector, gain_mode) for name, values in planes.items()}
    pedestals = np.array(planes["pedestals"], np.float32, order="C")
    if "pixel_gain" in planes:
        gain = np.array(planes["pixel_gain"], np.float32, order="C")
    else:
        gain, unit = np.ones_like(pedestals), "ADU"
    offset = np.array(planes["pixel_offset"], np.float32, order="C") \
        if "pixel_offset" in planes else None

    finite = (np.isfinite(pedestals) & np.isfinite(gain) & (gain != 0)).all(axis=0)
    if offset is not None:
        finite &= np.isfinite(offset).all(axis=0)
    if not finite.any():
        raise ConstantsError(
            f"constants of {detector.kind} were to be used; no pixel has a finite pedestal and a "
            "finite gain other than 0 in every stage; write the constants again")
    good = finite
    if "pixel_status" in planes:
        good &= (planes["pixel_status"] == 0).all(axis=0)
    if "pixel_mask" in planes:
        good &= planes["pixel_mask"] != 0
    good = _masked(good, geometry, extra_good_PSF, detector.kind)
    pedestals[:, ~good], gain[:, ~good] = 0.0, 1.0
    if offset is not None:
        offset[:, ~good] = 0.0
    noise = None
    if "pixel_rms" in planes:
        noise = np.array(planes["pixel_rms"][0], np.float32)
        noise[~(good & np.isfinite(noise))] = 0.0
    return _identified(good_PSF=good, geometry=geometry, pedestals_GPSF=pedestals,
                       gain_GPSF=gain, offset_GPSF=offset, noise_PSF=noise,
                       gain_bits=detector.gain_bits, unit=unit)


def uncalibrated_constants(panel_shape: tuple[int, int, int], geometry: Geometry,
                           good_PSF: np.ndarray | None = None, unit: str = "ADU") -> Constants:
    """:class:`Constants` of a run whose frames are calibrated already: a mask and a geometry.

    ``unit`` is that of the frames: "keV", "photon" or "ADU".
    Raises :class:`ConstantsError` when shapes differ or no pixel is good.
    """
    good = np.ones(tuple(panel_shape), bool)
    return _identified(good_PSF=_masked(good, geometry, good_PSF, "calibrated frames"),
                       geometry=geometry, unit=unit)


def _masked(good: np.ndarray, geometry: Geometry, extra: np.ndarray | None, what: str
            ) -> np.ndarray:
    if geometry.shape != good.shape:
        raise ConstantsError(
            f"constants of {what} are for frames of {good.shape}; the geometry "
            f"{geometry.name or ''} describes {geometry.shape}; read it for these frames")
    for name, mask in (("extra mask", extra),
                       ("geometry", None if geometry.bad_PSF is None else ~geometry.bad_PSF)):
        if mask is None:
            continue
        if mask.shape != good.shape:
            raise ConstantsError(f"the {name} was to fit frames of {good.shape}; its shape is "
                                 f"{mask.shape}; give the mask made for this detector")
        good = good & mask.astype(bool)
    if not good.any():
        raise ConstantsError(f"masks of {what} were combined; no good pixel is left; check "
                             "pixel_status and the mask file (1 = good)")
    return good


def _identified(**fields: Any) -> Constants:
    """Constants with ``identity``: sha256 over every array and word that decides an answer."""
    digest = hashlib.sha256()
    geometry: Geometry = fields["geometry"]
    arrays = [fields.get(name) for name in ("good_PSF", "pedestals_GPSF", "gain_GPSF",
                                            "offset_GPSF", "noise_PSF")]
    arrays += [geometry.x_m_PSF, geometry.y_m_PSF, geometry.z_m_PSF]
    for array in arrays:
        if array is None:
            digest.update(b"none")
            continue
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    words = (fields.get("gain_bits", "none"), fields["unit"], repr(float(geometry.pixel_size_m)),
             repr(geometry.distance_m), repr(geometry.photon_energy_eV))
    digest.update("|".join(words).encode())
    return Constants(identity=digest.hexdigest(), **fields)
