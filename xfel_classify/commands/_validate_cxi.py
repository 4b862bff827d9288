"""The CXI and geometry half of ``xfel-classify validate``; not a verb."""
from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np

PER_PEAK = ("peakXPosRaw", "peakYPosRaw", "peakTotalIntensity", "peakMaxIntensity",
            "peakMaximumValue", "peakSNR", "peakNPixels", "peakRadius")
NEEDED_BY_CRYSTFEL = ("nPeaks", "peakXPosRaw", "peakYPosRaw", "peakTotalIntensity")


def cxi_problems(file: h5py.File, path: Path) -> list[str]:
    """What a reader of the CXI file alone would stumble over."""
    frames = file.get("entry_1/data_1/data")
    if not isinstance(frames, h5py.Dataset):
        return ["/entry_1/data_1/data is missing"]
    return [*_version(file), *_frames(file, frames), *_mask(file, frames),
            *_peaks(file, frames), *_per_hit(file, len(frames)), *link_problems(file, path)]


def _version(file: h5py.File) -> Iterator[str]:
    if "cxi_version" not in file:
        yield "/cxi_version is missing"
    if "complete" in file.attrs and not file.attrs["complete"]:
        yield "it belongs to an incomplete run"


def _frames(file: h5py.File, frames: h5py.Dataset) -> Iterator[str]:
    if frames.ndim != 3:
        yield f"/entry_1/data_1/data has shape {frames.shape}, not (hits, slow, fast)"
        return
    hits = file.attrs.get("hits")
    if hits is not None and int(hits) != len(frames):
        yield f"root attribute hits is {int(hits)}, but there are {len(frames)} frames"
    if not frames.is_virtual and frames.chunks and frames.id.get_num_chunks() != len(frames):
        yield f"only {frames.id.get_num_chunks()} of {len(frames)} frames were written"
    for position in sorted({0, len(frames) // 2, len(frames) - 1} if len(frames) else ()):
        try:
            image = frames[position]
        except OSError as error:
            yield f"frame {position} cannot be read: {error}"
            continue
        if np.isnan(image).all():
            yield f"frame {position} is NaN everywhere: its source is missing"
        elif not frames.is_virtual and not np.isfinite(image).all():
            yield f"frame {position} holds values that are not finite"


def _mask(file: h5py.File, frames: h5py.Dataset) -> Iterator[str]:
    mask = file.get("entry_1/data_1/mask")
    if not isinstance(mask, h5py.Dataset):
        yield "/entry_1/data_1/mask is missing"
        return
    if mask.shape not in (frames.shape, frames.shape[1:]):
        yield f"/entry_1/data_1/mask has shape {mask.shape}, the frames {frames.shape}"
        return
    if mask.dtype.kind not in "iu":
        yield f"/entry_1/data_1/mask is {mask.dtype}, not an integer"
    if len(frames):
        plane = mask[0] if mask.ndim == 3 else mask[()]
        if plane.size and plane.all():
            yield "/entry_1/data_1/mask calls every pixel bad (it must be 0 = good)"


def _peaks(file: h5py.File, frames: h5py.Dataset) -> Iterator[str]:
    group = file.get("entry_1/result_1")
    missing = [name for name in NEEDED_BY_CRYSTFEL
               if not isinstance(group, h5py.Group) or name not in group]
    if missing:
        yield f"/entry_1/result_1 lacks {', '.join(missing)}, which CrystFEL needs"
        return
    counts = group["nPeaks"][()]
    if len(counts) != len(frames):
        yield f"nPeaks has {len(counts)} rows for {len(frames)} frames"
        return
    slots = group["peakXPosRaw"].shape[1]
    if np.any(counts < 0) or np.any(counts > slots):
        yield f"nPeaks is outside of 0 to {slots}, the slots of peakXPosRaw"
        return
    used = np.arange(slots) < counts[:, None]
    for name in PER_PEAK:
        if name not in group:
            continue
        if group[name].shape != (len(frames), slots):
            yield f"{name} has shape {group[name].shape}, not {(len(frames), slots)}"
            continue
        values = group[name][()]
        if np.any(values[~used] != 0):
            yield f"{name} is not 0 in the slots that nPeaks leaves unused"
        if name in ("peakXPosRaw", "peakYPosRaw") and frames.ndim == 3:
            limit = frames.shape[2 if name == "peakXPosRaw" else 1]
            inside = (values[used] >= -0.5) & (values[used] <= limit - 0.5)
            if not inside.all():
                yield (f"{name}: {int(np.count_nonzero(~inside))} peaks are outside of the frame "
                       f"of {limit} pixels")


def _per_hit(file: h5py.File, hits: int) -> Iterator[str]:
    needed = ("entry_1/experiment_identifier", "LCLS/eventNumber", "LCLS/machineTime",
              "LCLS/machineTimeNanoSeconds", "LCLS/timestamp", "LCLS/photon_energy_eV",
              "LCLS/detector_1/EncoderValue")
    for name in needed:
        if name not in file:
            yield f"/{name} is missing"
        elif file[name].shape[:1] != (hits,):
            yield f"/{name} has shape {file[name].shape} for {hits} frames"
    if all(name in file for name in needed):
        stamps = file["LCLS/timestamp"][()].astype(np.uint64)
        seconds = file["LCLS/machineTime"][()].astype(np.uint64)
        nanoseconds = file["LCLS/machineTimeNanoSeconds"][()].astype(np.uint64)
        if len(stamps) == len(seconds) == len(nanoseconds) and np.any(
            (seconds << np.uint64(32) | nanoseconds) != stamps
        ):
            yield "/LCLS/machineTime and machineTimeNanoSeconds do not make up /LCLS/timestamp"


def link_problems(file: h5py.File, path: Path) -> list[str]:
    """External links, soft links and virtual datasets whose target is not there."""
    return list(_dead_links(file, path, ""))


def _dead_links(group: h5py.Group, path: Path, prefix: str) -> Iterator[str]:
    for name in group:
        where = f"{prefix}/{name}"
        link = group.get(name, getlink=True)
        if isinstance(link, (h5py.SoftLink, h5py.ExternalLink)):
            if group.get(name) is None:
                target = f"{link.filename}:{link.path}" if isinstance(
                    link, h5py.ExternalLink) else link.path
                yield f"{where} links to {target}, which is not there"
            continue
        thing = group[name]
        if isinstance(thing, h5py.Group):
            yield from _dead_links(thing, path, where)
        elif thing.is_virtual:
            yield from _dead_sources(thing, path, where)


def _dead_sources(dataset: h5py.Dataset, path: Path, where: str) -> Iterator[str]:
    """HDF5 fills what it cannot find without a word, so every source is opened here."""
    last_needed: dict[tuple[str, str], tuple[int, ...]] = {}
    for source in dataset.virtual_sources():
        key = source.file_name.replace("%%", "%"), source.dset_name.replace("%%", "%")
        last = source.src_space.get_select_bounds()[1]
        last_needed[key] = tuple(map(max, last_needed.get(key, last), last))
    for (name, inner), last in last_needed.items():
        problem = _source_problem(path if name == "." else path.parent / name, inner, last)
        if problem:
            yield f"{where} shows {name}:{inner}, {problem}"


def _source_problem(target: Path, inner: str, needed: tuple[int, ...]) -> str:
    if not target.exists():
        return "which is not there"
    try:
        with h5py.File(target) as source:
            found = source.get(inner)
            if not isinstance(found, h5py.Dataset):
                return "which has no such dataset"
            if len(found.shape) != len(needed) or any(
                last >= length for last, length in zip(needed, found.shape, strict=True)
            ):
                return f"which now has shape {found.shape} and lacks position {needed}"
    except OSError as error:
        return f"which cannot be read ({error})"
    return ""


def geometry_problems(path: Path, cxi: h5py.File) -> list[str]:
    """Does a CrystFEL geometry describe the arrays of this CXI file?"""
    try:
        common, panels = _read_geometry(path)
    except (OSError, UnicodeDecodeError) as error:
        return [f"cannot be read: {error}"]
    return [*_geometry_paths(common, panels, cxi), *_geometry_panels(common, panels, cxi)]


def _read_geometry(path: Path) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """(values without a panel, values of each panel); a panel inherits what stood before it."""
    common: dict[str, str] = {}
    panels: dict[str, dict[str, str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        key, equals, value = line.partition(";")[0].partition("=")
        key, value = key.strip(), value.strip()
        if not equals or key.startswith(("bad", "group", "rigid_group")):
            continue
        panel, slash, name = key.partition("/")
        if slash:
            panels.setdefault(panel, dict(common))[name] = value
        else:
            common[key] = value
    return common, panels


def _geometry_paths(
    common: dict[str, str], panels: dict[str, dict[str, str]], cxi: h5py.File
) -> Iterator[str]:
    values = set(common.items()).union(*(panel.items() for panel in panels.values()))
    named = {"data", "mask", "mask0_data", "clen", "photon_energy", "wavelength", "peak_list"}
    for key, value in sorted(values):
        place = value.split()[0] if value.split() else ""
        if key not in named or not place.startswith("/"):
            continue
        if place not in cxi:
            yield f"{key} = {place}, which the CXI file does not have"
        elif key in ("clen", "photon_energy", "wavelength"):
            unknown = int(np.count_nonzero(~np.isfinite(cxi[place][()])))
            if unknown:
                yield (f"{key} = {place}, which is unknown for {unknown} hits; write a number "
                       "into the geometry instead")
    if not panels:
        yield "it describes no panel"
    for key, axis in (("dim0", "%"), ("dim1", "ss"), ("dim2", "fs")):
        wrong = {panel.get(key) for panel in panels.values()} - {axis}
        if wrong:
            yield f"{key} is not {axis}, which the stack of frames needs"


def _geometry_panels(
    common: dict[str, str], panels: dict[str, dict[str, str]], cxi: h5py.File
) -> Iterator[str]:
    frames = cxi.get("entry_1/data_1/data")
    if frames is None or frames.ndim != 3:
        return
    covered = np.zeros(frames.shape[1:], np.int32)
    for name, panel in panels.items():
        try:
            ss, fs = ((int(float(panel[f"min_{axis}"])), int(float(panel[f"max_{axis}"])))
                      for axis in ("ss", "fs"))
            numbers = [float(panel["corner_x"]), float(panel["corner_y"]), float(panel["res"])]
        except (KeyError, ValueError) as error:
            yield f"panel {name} lacks or misstates {error}"
            continue
        if not all(map(math.isfinite, numbers)):
            yield f"panel {name} has a position that is not a number"
        if min(ss[0], fs[0]) < 0 or ss[1] >= covered.shape[0] or fs[1] >= covered.shape[1]:
            yield f"panel {name} reaches outside of the frames of {covered.shape} pixels"
            continue
        covered[ss[0]:ss[1] + 1, fs[0]:fs[1] + 1] += 1
    if panels and np.any(covered > 1):
        yield f"panels overlap in {int(np.count_nonzero(covered > 1))} pixels"
    if panels and not covered.any():
        yield "its panels cover no pixel"
    if covered.any() and not covered.all():
        mask = cxi.get("entry_1/data_1/mask")
        good = covered == 0
        if isinstance(mask, h5py.Dataset) and len(mask):
            plane = mask[0] if mask.ndim == 3 else mask[()]
            good &= plane == 0
        if good.any():
            yield f"its panels leave {int(np.count_nonzero(good))} good pixels out"
