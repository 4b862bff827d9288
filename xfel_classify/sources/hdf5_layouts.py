"""Where the parts of a run are in an HDF5, CXI or NeXus file.

Nothing here reads a pixel.  The image dataset is found by its known path, else by being the only
one that can be a stack of images; event times, scalars and masks are found under the names that
LUTE, Cheetah, OM, EXtra-data, lclstreamer, NeXus writers and this package use.  Groups called
``truth`` (what a simulation planted) are never looked at.
"""
from __future__ import annotations

import re
from collections.abc import Mapping

import h5py
import numpy as np

from .. import detectors
from ..core import ConstantsError, DetectorNotFound, RunDamaged
from .hdf5_files import Walk
from .run_constants import HC_EV_A, plausible

__all__ = ["SCALARS", "damage_and_presence", "event_codes", "experiment_of", "fixed_mask",
           "frame_mask", "image_datasets", "panel_shape", "read_scalars", "read_timestamps"]

IMAGE_PATHS = (
    "entry_1/data_1/data",                      # LUTE, Cheetah, OM, EXtra-data
    "entry_1/instrument_1/detector_1/data",     # the same, where data_1 is a link
    "entry_1/image_1/data",
    "entry/data/data",                          # NeXus
    "entry/instrument/detector/data",
    "data/data",                                # lclstreamer
)
_NEXUS_PARTS = re.compile(r"^(entry\w*/data)/data_\d{6}$")
_NOT_IMAGES = re.compile(
    r"(^|/)(truth|totals?|constants|sums|powder\w*|pedestals?|pixel_\w+|mask\w*|\w+_mask|gain\w*"
    r"|rms|status\w*|offset\w*|geometry|flatfield|coords?\w*|peaks?|result_\d+)(/|$)", re.I)
_MIN_PIXELS = 64

_TIMES = ("timestamp", "timestamps", "LCLS/timestamp", "entry_1/timestamp", "data/timestamp",
          "event_timestamp", "LCLS/eventTimestamp", "entry_1/trainId")
_TIME_PAIRS = (("LCLS/machineTime", "LCLS/machineTimeNanoSeconds"), ("seconds", "nanoseconds"))

# quantity -> unit, lowest and highest believable value
SCALARS: Mapping[str, tuple[str, float, float]] = {
    "photon_energy_eV": ("eV", 10.0, 1e6),
    "distance_m": ("m", 1e-4, 1e3),
    "pulse_energy_mJ": ("mJ", 1e-9, 1e4),
    "step_value": ("", -1e300, 1e300),
}
# (quantity, path, unit of the numbers where the dataset has no attribute "units")
_SCALAR_PATHS = (
    ("photon_energy_eV", "LCLS/photon_energy_eV", "eV"),
    ("photon_energy_eV", "photon_energy_eV", "eV"),
    ("photon_energy_eV", "scalars/photon_energy_eV", "eV"),
    ("photon_energy_eV", "entry_1/instrument_1/source_1/energy", "J"),
    ("photon_energy_eV", "entry_1/instrument_1/source_1/photon_energy", "eV"),
    ("photon_energy_eV", "data/photon_energy", "eV"),
    ("photon_energy_eV", "LCLS/photon_wavelength_A", "A"),
    ("photon_energy_eV", "wavelength_A", "A"),
    ("photon_energy_eV", "data/wavelength", "A"),
    ("photon_energy_eV", "entry/instrument/beam/incident_wavelength", "A"),
    ("photon_energy_eV", "entry/sample/beam/incident_wavelength", "A"),
    ("distance_m", "distance_m", "m"),
    ("distance_m", "scalars/distance_m", "m"),
    ("distance_m", "entry_1/instrument_1/detector_1/distance", "m"),
    ("distance_m", "entry/instrument/detector/detector_distance", "m"),
    ("distance_m", "entry/instrument/detector/distance", "m"),
    ("distance_m", "LCLS/detector_1/EncoderValue", "mm"),
    ("pulse_energy_mJ", "pulse_energy_mJ", "mJ"),
    ("pulse_energy_mJ", "scalars/pulse_energy_mJ", "mJ"),
    ("pulse_energy_mJ", "LCLS/pulse_energy_mJ", "mJ"),
    ("pulse_energy_mJ", "LCLS/f_11_ENRC", "mJ"),
    ("pulse_energy_mJ", "data/pulse_energy", "mJ"),
    ("pulse_energy_mJ", "entry_1/instrument_1/source_1/pulse_energy", "J"),
    ("step_value", "step_value", ""),
    ("step_value", "scalars/step_value", ""),
)
_FACTORS = {"ev": 1.0, "kev": 1e3, "m": 1.0, "mm": 1e-3, "um": 1e-6, "cm": 1e-2, "mj": 1.0,
            "uj": 1e-3, "": 1.0}
_WAVELENGTHS = {"a": 1.0, "angstrom": 1.0, "å": 1.0, "nm": 10.0, "pm": 0.01}
_JOULE_EV = 1 / 1.602176634e-19
_MASKS = ("mask", "pixel_mask")
_MASK_PATHS = ("entry_1/data_1/mask", "entry_1/instrument_1/detector_1/mask",
               "entry/instrument/detector/pixel_mask",
               "entry/instrument/detector/detectorSpecific/pixel_mask")
_CODES = ("event_codes", "LCLS/eventCodes", "scalars/event_codes")
_NAMES = ("entry_1/experiment_identifier", "entry_1/experimental_identifier", "experiment", "exp")
_EXPERIMENT = re.compile(r"\b([a-z]{3}[a-z]?[a-z0-9]{3,12})[-_]r(?:un)?_?0*(\d{1,6})(?!\d)", re.I)
_EXPERIMENT_ONLY = re.compile(r"^[a-z]{3}[a-z0-9_]{2,15}$", re.I)


def image_datasets(found: Walk, filename: str, stated: str | None) -> list[str]:
    """Paths of the dataset (or consecutive datasets) whose first axis is the event.

    Raises :class:`DetectorNotFound` when none or several could be it, naming the candidates, and
    :class:`RunDamaged` when the one that is meant is a dead link.
    """
    if stated:
        stated = stated.strip("/")
        _refuse_dead(found, filename, [stated])
        if stated not in found.datasets:
            raise DetectorNotFound(
                f"{filename} has no dataset {stated!r}; it has "
                f"{', '.join(_describe(found, list(found.datasets)[:20])) or 'none'}. "
                "State another with --set source.dataset=PATH")
        return [stated]
    _refuse_dead(found, filename, IMAGE_PATHS)
    for path in IMAGE_PATHS:
        if path in found.datasets and _stack(found.datasets[path]):
            return [path]
    parts = [p for p in (*found.datasets, *(d.path for d in found.dead)) if _NEXUS_PARTS.match(p)]
    if parts:
        _refuse_dead(found, filename, parts)
        return sorted(parts)
    candidates = _distinct({
        p: d for p, d in found.datasets.items() if _stack(d) and not _NOT_IMAGES.search(p)})
    if not candidates:
        candidates = _distinct({
            p: d for p, d in found.datasets.items()
            if _numeric(d) and d.ndim == 2 and min(d.shape) >= 32 and not _NOT_IMAGES.search(p)})
    if len(candidates) == 1:
        return candidates
    if candidates:
        raise DetectorNotFound(
            f"{filename} has {len(candidates)} datasets that could be the images: "
            f"{', '.join(_describe(found, candidates))}. "
            f"State one, for example --set source.dataset={candidates[0]}")
    if found.dead:
        _refuse_dead(found, filename, [link.path for link in found.dead])
    raise DetectorNotFound(
        f"{filename} has no stack of images (a numeric array of 3 or more dimensions); it has "
        f"{', '.join(_describe(found, list(found.datasets)[:20])) or 'no dataset at all'}")


def _numeric(dataset: h5py.Dataset) -> bool:
    return dataset.dtype.kind in "iuf" and dataset.shape is not None


def _stack(dataset: h5py.Dataset) -> bool:
    return (_numeric(dataset) and dataset.ndim >= 3 and min(dataset.shape[-2:]) >= 4
            and int(np.prod(dataset.shape[1:])) >= _MIN_PIXELS)


def _distinct(datasets: Mapping[str, h5py.Dataset]) -> list[str]:
    """One path per dataset: links and soft links to the same object are one candidate."""
    kept: dict[tuple[str, int], str] = {}
    for path, dataset in datasets.items():
        kept.setdefault((dataset.file.filename, h5py.h5o.get_info(dataset.id).addr), path)
    return sorted(kept.values())


def _describe(found: Walk, paths: list[str]) -> list[str]:
    return [f"{p} {found.datasets[p].shape} {found.datasets[p].dtype}" for p in paths]


def _refuse_dead(found: Walk, filename: str, paths: list[str] | tuple[str, ...]) -> None:
    for link in found.dead:
        if any(path == link.path or path.startswith(link.path + "/") for path in paths):
            raise RunDamaged(
                f"{filename}: the images at {link.path} are a link to {link.target}, which is not "
                "there; put that file back beside this one, or give the files that hold the data")


# --- frames ---

def panel_shape(frame_shape: tuple[int, ...], kind: str,
                stated: tuple[int, int, int] | None) -> tuple[int, int, int]:
    """(P, S, F) of a frame of ``frame_shape``; panels stacked along rows are told apart.

    Raises :class:`DetectorNotFound` when a stated shape or the kind does not fit.
    """
    slow, fast = frame_shape[-2:]
    if stated is not None:
        if int(np.prod(stated)) != int(np.prod(frame_shape)) or stated[2] != fast:
            raise DetectorNotFound(f"source.panel_shape = {list(stated)} does not fit frames of "
                                   f"{frame_shape}; state [panels, rows, columns] of one frame")
        return stated
    if kind == "assembled" and int(np.prod(frame_shape)) != slow * fast:
        raise DetectorNotFound(f"frames of {frame_shape} are not assembled 2-D images; leave "
                               "--detector assembled away, or state source.dataset")
    try:
        shape = detectors.as_panels(np.broadcast_to(np.uint8(0), frame_shape), kind).shape
    except ConstantsError as error:
        raise DetectorNotFound(f"images of {frame_shape}: {error}") from error
    return shape[0], shape[1], shape[2]


def fixed_mask(found: Walk, image_path: str, shape: tuple[int, ...]) -> np.ndarray | None:
    """bool, True = use, of ``shape`` (one frame) from a mask beside the data (0 = good)."""
    for path in _mask_paths(found, image_path):
        mask = found.datasets[path]
        if mask.shape == shape:
            return np.asarray(mask[()]) == 0
    return None


def frame_mask(found: Walk, image_path: str, shape: tuple[int, ...]) -> str | None:
    """Path of a mask that has one plane per event (``shape`` = that of the image dataset)."""
    for path in _mask_paths(found, image_path):
        if found.datasets[path].shape == shape:
            return path
    return None


def _mask_paths(found: Walk, image_path: str) -> list[str]:
    group = image_path.rpartition("/")[0]
    beside = [f"{group}/{name}" if group else name for name in _MASKS]
    return [p for p in dict.fromkeys((*beside, *_MASK_PATHS))
            if p in found.datasets and found.datasets[p].dtype.kind in "iub"]


# --- per event ---

def read_timestamps(found: Walk, events: int) -> tuple[np.ndarray, str] | None:
    """(N,) uint64 and the path they are from; None when the file states no times of its events.

    Seconds and nanoseconds are joined as psana2 does (seconds << 32 | nanoseconds).
    """
    for path in _TIMES:
        times = _per_event(found, path, events)
        if times is None:
            continue
        if times.dtype.kind == "f":
            whole = np.floor(times)
            stamps = (whole.astype(np.uint64) << np.uint64(32)) | np.round(
                (times - whole) * 1e9).astype(np.uint64)
        else:
            stamps = times.astype(np.uint64)
        if events == 0 or stamps.any():
            return stamps, path
    for first, second in _TIME_PAIRS:
        seconds, nanos = (_per_event(found, p, events) for p in (first, second))
        if seconds is not None and nanos is not None and (events == 0 or seconds.any()):
            stamps = (seconds.astype(np.uint64) << np.uint64(32)) | nanos.astype(np.uint64)
            return stamps, f"{first}, {second}"
    return None


def _per_event(found: Walk, path: str, events: int) -> np.ndarray | None:
    dataset = found.datasets.get(path)
    if dataset is None or dataset.dtype.kind not in "iuf" or dataset.ndim == 0:
        return None
    if dataset.shape[0] != events or dataset.size != events:
        return None
    return np.asarray(dataset[()]).reshape(events)


def read_scalars(found: Walk, events: int) -> dict[str, np.ndarray]:
    """{quantity: (N,) float64} in the units of :data:`SCALARS`; NaN where not believable."""
    scalars: dict[str, np.ndarray] = {}
    for quantity, path, unit in _SCALAR_PATHS:
        dataset = found.datasets.get(path)
        if quantity in scalars or dataset is None or dataset.dtype.kind not in "iuf":
            continue
        if dataset.size == 1:
            values = np.full(events, float(np.asarray(dataset[()]).reshape(-1)[0]))
        else:
            read = _per_event(found, path, events)
            if read is None:
                continue
            values = read.astype(np.float64)
        values = _in_unit(values, dataset, quantity, unit)
        _, low, high = SCALARS[quantity]
        values[[not plausible(v, low, high) for v in values]] = np.nan
        if np.isfinite(values).any():
            scalars[quantity] = values
    return scalars


def _in_unit(values: np.ndarray, dataset: h5py.Dataset, quantity: str, unit: str) -> np.ndarray:
    stated = dataset.attrs.get("units", dataset.attrs.get("unit", unit))
    text = stated.decode() if isinstance(stated, bytes) else str(stated)
    text = text.strip().lower()
    with np.errstate(divide="ignore", invalid="ignore"):
        if quantity == "photon_energy_eV" and text in _WAVELENGTHS:
            return HC_EV_A / (values * _WAVELENGTHS[text])
        if quantity == "photon_energy_eV" and text == "m":
            return HC_EV_A / (values * 1e10)
        if text == "j":
            return values * (_JOULE_EV if quantity == "photon_energy_eV" else 1e3)
        return values * _FACTORS.get(text, _FACTORS.get(unit.lower(), 1.0))


def event_codes(found: Walk, events: int) -> list[tuple[int, ...]] | None:
    """Event codes of every event: from a 0/1 table (N, codes) or from ragged lists."""
    for path in _CODES:
        dataset = found.datasets.get(path)
        if dataset is None or dataset.ndim == 0 or dataset.shape[0] != events:
            continue
        if dataset.ndim == 2 and dataset.dtype.kind in "iub":
            return [tuple(int(c) for c in np.flatnonzero(row)) for row in dataset[()]]
        if dataset.ndim == 1 and h5py.check_vlen_dtype(dataset.dtype) is not None:
            return [tuple(int(c) for c in row) for row in dataset[()]]
    return None


def damage_and_presence(found: Walk, image_path: str,
                        events: int) -> tuple[np.ndarray | None, np.ndarray | None]:
    """(N,) damage bits and (N,) bool "has an image" stated beside the images, or None."""
    group = image_path.rpartition("/")[0]
    damage, present = (
        _per_event(found, f"{group}/{name}" if group else name, events)
        for name in ("damage", "present"))
    return (None if damage is None else damage.astype(np.int64),
            None if present is None else present != 0)


def experiment_of(file: h5py.File, found: Walk, stem: str) -> tuple[str | None, int | None]:
    """(experiment, run) as attributes, datasets or the file's name state them."""
    exp = file.attrs.get("exp", file.attrs.get("experiment"))
    run = file.attrs.get("run")
    if exp is None:
        for path in _NAMES:
            dataset = found.datasets.get(path)
            if dataset is not None and dataset.size and h5py.check_string_dtype(dataset.dtype):
                exp = dataset.asstr()[(0,) * dataset.ndim]
                break
    text = None if exp is None else (exp.decode() if isinstance(exp, bytes) else str(exp))
    named = _EXPERIMENT.search(stem)
    if text is not None and (inner := _EXPERIMENT.search(text)):
        named, text = inner, inner[1]
    if text is not None and not _EXPERIMENT_ONLY.match(text):
        text = None
    return (text or (named[1] if named else None),
            int(run) if run is not None and np.size(run) == 1 else
            (int(named[2]) if named else None))
