"""Masks of good pixels (True = use the pixel): user files, edges, and their combination."""
from __future__ import annotations

from pathlib import Path

import numpy as np

from ..core import ConstantsError
from .detector import Detector, as_panels

__all__ = ["combine", "edges", "load_mask", "saturated"]


def load_mask(where: str | Path, panel_shape: tuple[int, int, int], kind: str = "",
              good_is: int | None = None) -> np.ndarray:
    """Good pixels, bool (P, S, F), from a ``.npy``, ``.npz`` or HDF5 file.

    ``where`` is a path, for HDF5 ``file.h5:/dataset``.  ``good_is`` is the value of a good pixel;
    None means 1 (psana, NumPy files), but 0 for a data set ``entry_1/.../mask`` or
    ``.../pixel_mask``, where CXI and NeXus count reasons to reject a pixel.  The array may be
    (P, S, F), a slab (P*S, F), (S, F), or one leading axis of length 1 more.

    Raises :class:`ConstantsError` (missing, no such data set, wrong shape, not finite).
    """
    text = str(where)
    file, _, dataset = text.partition(":/") if ":/" in text else (text, "", "")
    path = Path(file)
    if not path.is_file():
        raise ConstantsError(f"mask {file} was to be read; there is no such file; "
                             "give a .npy, .npz or HDF5 file (file.h5:/dataset)")
    try:
        if path.suffix == ".npy":
            stored = np.load(path, allow_pickle=False)
        elif path.suffix == ".npz":
            stored = _from_npz(path)
        else:
            stored = _from_hdf5(path, dataset)
    except (OSError, ValueError) as error:
        if isinstance(error, ConstantsError):
            raise
        raise ConstantsError(f"mask {text} was to be read; {error}; "
                             "write it again as a plain array") from error
    if good_is is None:
        good_is = 0 if dataset.split("/")[-1] in ("mask", "pixel_mask") and (
            "entry" in dataset) else 1
    return _shaped(stored == 0 if good_is == 0 else stored != 0, panel_shape, kind, text)


def _from_npz(path: Path) -> np.ndarray:
    with np.load(path, allow_pickle=False) as arrays:
        names = arrays.files
        name = "mask" if "mask" in names else names[0] if len(names) == 1 else ""
        if not name:
            raise ConstantsError(
                f"mask {path} should hold one array, or one called 'mask'; it holds "
                f"{', '.join(names) or 'none'}; rename the mask")
        return arrays[name]


def _from_hdf5(path: Path, dataset: str) -> np.ndarray:
    import h5py
    with h5py.File(path, "r") as file:
        if not dataset:
            raise ConstantsError(
                f"mask {path} is an HDF5 file, which needs a data set; the file has "
                f"{', '.join(file) or 'nothing'} at its root; write {path.name}:/path/to/mask")
        found = file.get(dataset)
        if not isinstance(found, h5py.Dataset):
            raise ConstantsError(f"mask {path}:/{dataset} was to be read; the file has no such "
                                 "data set; list it with 'xfel-classify inspect'")
        return found[()]


def _shaped(good: np.ndarray, panel_shape: tuple[int, int, int], kind: str, text: str
            ) -> np.ndarray:
    while good.ndim > 2 and good.shape[0] == 1:
        good = good[0]
    if good.ndim >= 2 and good.size == int(np.prod(panel_shape)):
        if good.shape[-1] == panel_shape[-1]:
            return np.ascontiguousarray(good).reshape(panel_shape)
        arranged = as_panels(good, kind)
        if arranged.shape == tuple(panel_shape):
            return np.ascontiguousarray(arranged)
    raise ConstantsError(f"mask {text} was to fit frames of {tuple(panel_shape)}; its shape is "
                         f"{good.shape}; give the mask made for this detector")


def edges(detector: Detector, panel_shape: tuple[int, int, int], width: int | None = None
          ) -> np.ndarray:
    """Good pixels that are at least ``width`` pixels inside their ASIC, bool (P, S, F).

    None takes the kind's ``edge_width`` (the wide pixels at ASIC borders); 0 masks nothing.
    """
    good = np.ones(panel_shape, bool)
    width = detector.edge_width if width is None else width
    if width <= 0:
        return good
    for axis, asic in zip((1, 2), detector.asic_shape_SF or panel_shape[1:], strict=True):
        place = np.arange(panel_shape[axis]) % asic
        last = np.minimum(asic, panel_shape[axis]) - 1
        bad = (place < width) | (place > last - width)
        good[(slice(None),) * axis + (bad,)] = False
    return good


def saturated(raw_PSF: np.ndarray, detector: Detector) -> np.ndarray:
    """Pixels whose raw word is full in its least sensitive stage, bool like ``raw_PSF``."""
    if detector.saturation_adu is None:
        return np.zeros(raw_PSF.shape, bool)
    if detector.gain_bits == "top2":
        return (raw_PSF >> 14 == 3) & ((raw_PSF & 0x3FFF) == 0)     # stage 2 falls with energy
    if detector.gain_bits == "bit14":
        return (raw_PSF & 0x3FFF) >= detector.saturation_adu
    return raw_PSF >= detector.saturation_adu


def combine(*masks: np.ndarray | None) -> np.ndarray | None:
    """Pixels good in every mask that is not None; None when there is none at all."""
    given = [mask for mask in masks if mask is not None]
    if not given:
        return None
    good = given[0].astype(bool)
    for mask in given[1:]:
        good &= mask.astype(bool)
    return good
