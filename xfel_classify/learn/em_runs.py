"""Selection of single hits by several EM runs: size, classes, choice, vote, output.

Frames outside the range of diameters are left out, and those with structure finer than one
particle can make (ours; the study has no such filter); each run of EM sorts the rest into classes;
classes are chosen by symmetry, by a few labels, or by hand; a frame is selected when enough runs
put it into a chosen class [ASS20; methods specification, section 3].

Axes: N frames of the run, C candidates (frames of the right size), T run of EM, K class.
"""
from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypedDict

import h5py
import numpy as np

from ..core import ConfigurationError, OutputDamaged
from ..simulate.bragg import HC_EV_A
from ..sinks.staging import set_attributes, staged_hdf5, write_array
from .em_selection import EmSettings, em_classes, prepared
from .event_selections import event_lists, new_directory
from .gallery_page import Group, gallery_page, tile
from .selection_table import votes
from .size_filter import (
    SphereFit,
    fine_share,
    fit_spheres,
    hot_elements,
    minima_px,
    ring_photons,
    speckle_elements,
)
from .small_frames import SmallFrames
from .symmetry_score import chosen_by_symmetry

__all__ = ["FORMAT", "Choice", "EmSelection", "best_by_labels", "choose", "fine_of",
           "read_classes", "sizes_of", "sort_frames", "write_selection"]

FORMAT = "xfel_classify EM selection"
CHOICES = ("symmetry", "labels", "hand")
EXAMPLES = 5


@dataclass(frozen=True)
class Choice:
    """How classes are chosen: ``how`` is "symmetry", "labels" or "hand".

    By symmetry, ``orders`` hold more than ``share`` of a class's score; by labels, the classes
    with the largest shares of singles, as many as give the labelled frames the best F1; by hand,
    ``classes`` are (run, class).  A frame is selected by ``least`` runs.
    """

    how: str = "symmetry"
    orders: tuple[int, ...] = (6, 10)
    share: float = 0.5
    classes: tuple[tuple[int, int], ...] = ()
    least: int = 3


@dataclass(frozen=True)
class EmSelection:
    """All runs of EM over one run of frames.

    ``candidate_N`` has the right size, and less than ``fine_most`` of its structure is finer than
    that of one particle (``fine_N``, None where nobody asked); ``class_TN`` is -1 elsewhere;
    ``averages_TKGG`` are the class averages; ``chosen_TK``, ``score_TKM`` and ``selected_N`` come
    with :func:`choose`.
    """

    frames: SmallFrames = field(repr=False)
    settings: EmSettings
    sizes: SphereFit | None
    size_range_nm: tuple[float, float] | None
    radii: tuple[float, float]
    candidate_N: np.ndarray
    class_TN: np.ndarray
    averages_TKGG: np.ndarray
    likelihood_T: np.ndarray
    choice: Choice = field(default=Choice())
    chosen_TK: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), bool))
    score_TKM: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 0)))
    selected_N: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    fine_N: np.ndarray | None = None
    fine_most: float = 0.0

    @property
    def runs(self) -> int:
        return len(self.class_TN)


def sizes_of(frames: SmallFrames) -> SphereFit:
    """Diameters of all frames.  Raises :class:`ConfigurationError` without distance or energy."""
    rings = ring_photons(frames.images_NHW, frames.good_HW, frames.beam_RC, frames.pool)
    return fit_spheres(*rings, **geometry_of(frames))


def fine_of(frames: SmallFrames, largest_nm: float) -> np.ndarray:
    """(N,) share of structure finer than that of a particle of ``largest_nm``: see
    :func:`.size_filter.fine_share`.  Hot pixels are left out."""
    hot_HW = hot_elements(frames.images_NHW, frames.good_HW, frames.pool)
    return fine_share(frames.images_NHW, frames.good_HW & ~hot_HW, frames.beam_RC, frames.pool,
                      speckle_elements(largest_nm, **geometry_of(frames)))


class Optics(TypedDict):
    """Where elements are and what hits them, as the size filter wants it."""

    element_m: float
    distance_m: float
    wavelength_A: float


def geometry_of(frames: SmallFrames) -> Optics:
    """Geometry and wavelength of frames.

    Raises :class:`ConfigurationError` without distance or energy.
    """
    energy = 0.0 if frames.assumed_energy else frames.photon_energy_eV or 0.0
    if not energy or not frames.distance_m:
        raise ConfigurationError(
            f"frames of {frames.exp} run {frames.run} were to be filtered by size; the run states "
            f"{'the' if energy else 'no'} photon energy and "
            f"{'the' if frames.distance_m else 'no'} detector distance; give both with --set "
            "source.photon_energy_eV=... and --set source.distance_m=..., or keep all sizes with "
            "--size none")
    return {"element_m": frames.element_m, "distance_m": frames.distance_m,
            "wavelength_A": HC_EV_A / energy}


def sort_frames(frames: SmallFrames, settings: EmSettings, runs: int = 5, *,
                size_range_nm: tuple[float, float] | None = None,
                fine_most: float = 0.0, inner: float = 0.0, outer: float = np.inf,
                report: Callable[[str], Any] = lambda line: None) -> EmSelection:
    """``runs`` independent EM runs over the frames of the right size.

    With ``fine_most`` above 0 frames are left out of whose structure a larger share is finer than
    a particle of the largest size can make, and dark ones; a size range is needed for it.
    ``inner`` and ``outer`` bound the radii that are compared, in elements of the small pictures.
    """
    if runs < 1:
        raise ConfigurationError(f"{runs} runs of EM were asked for; give at least 1")
    sizes = sizes_of(frames) if size_range_nm is not None else None
    usable_N = frames.images_NHW.sum((1, 2)) > 0
    candidate_N = usable_N & (sizes.within(*size_range_nm) if sizes and size_range_nm else True)
    fine_N = None
    if fine_most > 0:
        if size_range_nm is None:
            raise ConfigurationError("frames with fine structure were to be left out; what is fine "
                                     "follows from the largest size: give --size LOW,HIGH")
        fine_N = fine_of(frames, size_range_nm[1])
        candidate_N = candidate_N & (fine_N < fine_most)    # False for NaN: dark
    if candidate_N.sum() < settings.classes:
        told = "" if size_range_nm is None else \
            f" with a diameter of {size_range_nm[0]:g} to {size_range_nm[1]:g} nm"
        raise ConfigurationError(
            f"{settings.classes} classes were asked for; only {int(candidate_N.sum())} of "
            f"{len(frames)} frames hold photons{told}; give fewer --classes-per-run, another "
            "--size, or more frames")
    photons, x, y = prepared(frames.images_NHW[candidate_N], frames.good_HW, frames.beam_RC,
                             frames.pool, inner, outer)
    class_TN = np.full((runs, len(frames)), -1, np.int64)
    averages, likelihood = [], []
    for number in range(runs):
        def told_of(line: str, number: int = number) -> None:
            report(f"run {number + 1}/{runs}: {line}")

        own = replace(settings, seed=settings.seed * 1000 + number)
        found = em_classes(photons, x, y, own, told_of)
        class_TN[number, candidate_N] = found.class_N
        averages.append(found.averages_KGG)
        likelihood.append(found.likelihood[-1])
    radii = (max(inner, 1.0), float(min(outer, np.hypot(x, y).max())))
    return EmSelection(frames, settings, sizes, size_range_nm, radii, candidate_N, class_TN,
                       np.array(averages), np.array(likelihood), fine_N=fine_N,
                       fine_most=fine_most)


def choose(found: EmSelection, choice: Choice, label_N: np.ndarray | None = None) -> EmSelection:
    """The same classes with others chosen.  ``label_N`` is 1, 0 or -1 where there is none.

    Raises :class:`ConfigurationError` for classes or runs that are not there.
    """
    runs, classes = found.averages_TKGG.shape[:2]
    least = min(choice.least, runs)
    inner, outer = _scored_radii(found)
    chosen_TK = np.zeros((runs, classes), bool)
    scores = []
    for number in range(runs):
        good_K, score_KM = chosen_by_symmetry(found.averages_TKGG[number], inner, outer,
                                              choice.orders, choice.share)
        scores.append(score_KM)
        if choice.how == "symmetry":
            chosen_TK[number] = good_K
        elif choice.how == "labels":
            if label_N is None:
                raise ConfigurationError("classes were to be chosen by labels; give them with "
                                         "--labels")
            chosen_TK[number] = best_by_labels(found.class_TN[number], label_N, classes)
    if choice.how == "hand":
        for run, number in choice.classes:
            if not (0 <= run < runs and 0 <= number < classes):
                raise ConfigurationError(
                    f"class {run}.{number} was chosen; there are runs 0 to {runs - 1} with classes "
                    f"0 to {classes - 1} each; the page shows them as run.class")
            chosen_TK[run, number] = True
        # a run in which nobody chose a class has no vote
        least = min(least, max(1, int(chosen_TK.any(1).sum())))
    elif choice.how not in CHOICES:
        raise ConfigurationError(f"classes were to be chosen by {choice.how!r}; valid are "
                                 f"{', '.join(CHOICES)}")
    cast = [(found.class_TN[t] >= 0) & chosen_TK[t][found.class_TN[t]] for t in range(runs)]
    return replace(found, choice=replace(choice, least=least), chosen_TK=chosen_TK,
                   score_TKM=np.array(scores), selected_N=votes(cast, least))


def best_by_labels(class_N: np.ndarray, label_N: np.ndarray, classes: int) -> np.ndarray:
    """bool (K,): the classes, purest first, whose union has the best F1 on the labelled frames."""
    asked = (label_N >= 0) & (class_N >= 0)
    singles_K = np.bincount(class_N[asked & (label_N == 1)], minlength=classes)
    all_K = np.bincount(class_N[asked], minlength=classes)
    order = np.argsort(-singles_K / np.maximum(all_K, 1), kind="stable")
    singles = int((label_N == 1).sum())
    f1_K = 2 * np.cumsum(singles_K[order]) / np.maximum(np.cumsum(all_K[order]) + singles, 1)
    chosen_K = np.zeros(classes, bool)
    if f1_K.max() > 0:
        chosen_K[order[:int(f1_K.argmax()) + 1]] = True
    return chosen_K


def _scored_radii(found: EmSelection) -> tuple[float, float]:
    """From the first minimum of the median particle's sphere to the fourth, where it is known."""
    frames, sizes = found.frames, found.sizes
    inner, outer = found.radii
    if sizes is None or not frames.distance_m or not frames.photon_energy_eV:
        return max(inner, 0.25 * outer), outer
    diameters = sizes.diameter_nm_N[found.candidate_N]
    minima = minima_px(float(np.nanmedian(diameters)), element_m=frames.element_m,
                       distance_m=frames.distance_m,
                       wavelength_A=HC_EV_A / frames.photon_energy_eV)
    if len(minima) < 2 or minima[0] > outer - 2:
        return max(inner, 0.25 * outer), outer
    return max(inner, float(minima[0])), min(outer, float(minima[min(3, len(minima) - 1)]))


# --- output --------------------------------------------------------------------------------------

def write_selection(found: EmSelection, directory: str | Path, *, command: str = "",
                    overwrite: bool = False) -> list[Path]:
    """Write event lists, page, picture and HDF5 file; returns their paths, the HDF5 file first."""
    frames = found.frames
    stem = frames.stem
    parameters = _parameters(found)
    with new_directory(directory, overwrite, FORMAT) as written:
        written.add(event_lists(f"{stem}_selected", frames.run, frames.index_N[found.selected_N],
                                frames.timestamp_N[found.selected_N]))
        groups = _groups(found)
        lead = (f"{int(found.selected_N.sum())} of {len(frames)} frames are selected by at least "
                f"{found.choice.least} of {found.runs} runs of EM; "
                f"{int(found.candidate_N.sum())} have the right size. Chosen classes: "
                f"{int(found.chosen_TK.sum())} of {found.chosen_TK.size}.")
        side = found.averages_TKGG.shape[-1]
        shown = np.ones((side, side), bool)
        page = gallery_page(f"EM selection of {stem}", lead, groups, shown, parameters,
                            footer=f"xfel_classify {version('xfel-classify')}"
                            + (f": {command}" if command else ""))
        written.add({f"{stem}_selection.html": page.encode(),
                     f"{stem}_selection.png": tile(groups, shown, found.settings.classes)})
        with staged_hdf5(written.directory, f"{stem}_selection.h5") as (file, _):
            _write_file(file, found, parameters, command, list(written.names))
        written.staged(f"{stem}_selection.h5")
    return [Path(directory) / name for name in reversed(written.names)]


def _parameters(found: EmSelection) -> dict[str, Any]:
    """Settings of EM and choice under names of their own, and what they were applied to."""
    em = {f"em_{key}": value for key, value in asdict(found.settings).items()}
    choice = {f"choice_{key}": value for key, value in asdict(found.choice).items()}
    choice["choice_classes"] = [f"{run}.{number}" for run, number in found.choice.classes]
    low, high = found.size_range_nm or (0.0, 0.0)
    return em | choice | {
        "runs": found.runs, "frames": len(found.frames), "pool": found.frames.pool,
        "detector": found.frames.detector, "candidates": int(found.candidate_N.sum()),
        "selected": int(found.selected_N.sum()), "size_low_nm": low, "size_high_nm": high,
        "fine_most": found.fine_most,
        "inner": found.radii[0], "outer": found.radii[1],
        "xfel_classify_version": version("xfel-classify")}


def _groups(found: EmSelection) -> list[Group]:
    groups = []
    for t in range(found.runs):
        pictures = []
        for k in range(found.settings.classes):
            count = int((found.class_TN[t] == k).sum())
            score_M = found.score_TKM[t, k]
            total = score_M.sum()
            top = np.argsort(-score_M, kind="stable")[:3] + 1
            strongest = ", ".join(f"{order} ({score_M[order - 1] / total:.0%})" for order in top) \
                if total > 0 else "none"
            mark = ", CHOSEN" if found.chosen_TK[t, k] else ""
            pictures.append((f"class {t}.{k}{mark}: {count} frames, orders {strongest}",
                             found.averages_TKGG[t, k][::-1]))
        groups.append(Group(f"run{t}", f"Run {t}", {
            "classes chosen": int(found.chosen_TK[t].sum()),
            "frames in them": int(np.isin(found.class_TN[t],
                                          np.flatnonzero(found.chosen_TK[t])).sum()),
            "log-likelihood": f"{found.likelihood_T[t]:.6g}"}, pictures))
    return groups


def _write_file(file: h5py.File, found: EmSelection, parameters: dict[str, Any], command: str,
                files: list[str]) -> None:
    frames = found.frames
    set_attributes(file, {
        "format": FORMAT, "format_version": 1, "exp": frames.exp, "run": frames.run,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command, "files": files} | parameters)
    rows: list[tuple[str, np.ndarray, str]] = [
        ("timestamp", frames.timestamp_N, "64-bit time stamp of the event"),
        ("index", frames.index_N, "position of the event in the run, from 0"),
        ("selected", found.selected_N.astype(np.uint8), "1 = selected"),
        ("votes", _votes(found),
         "runs of EM that put the event into a chosen class"),
        ("class", found.class_TN.T.astype(np.int16), "class in each run of EM, -1 = wrong size"),
        ("em/averages", found.averages_TKGG, "class averages (run, class, y, x), y upwards"),
        ("em/chosen", found.chosen_TK.astype(np.uint8), "1 = class chosen"),
        ("em/symmetry", found.score_TKM.astype(np.float32), "score of orders 1 to 50"),
        ("em/likelihood", found.likelihood_T, "logarithm, of each run")]
    if found.sizes is not None:
        rows += [("diameter_nm", found.sizes.diameter_nm_N.astype(np.float32),
                  "of the sphere that fits best"),
                 ("size_misfit", found.sizes.misfit_N.astype(np.float32), "chi squared per ring")]
    if found.fine_N is not None:
        rows += [("fine_share", found.fine_N.astype(np.float32),
                  "of the structure, finer than one particle makes")]
    for name, values, doc in rows:
        write_array(file, name, values, doc=doc)


def _votes(found: EmSelection) -> np.ndarray:
    return np.sum([(found.class_TN[t] >= 0) & found.chosen_TK[t][found.class_TN[t]]
                   for t in range(found.runs)], axis=0).astype(np.uint8)


def read_classes(path: str | Path, frames: SmallFrames) -> EmSelection:
    """The classes of an earlier output for the same frames, to choose others by :func:`choose`.

    Raises :class:`OutputDamaged` for a file that is none, :class:`ConfigurationError` for other
    frames.
    """
    try:
        with h5py.File(path) as file:
            if file.attrs.get("format") != FORMAT:
                raise OutputDamaged(f"EM classes were to be read from {path}, whose format is "
                                    f"{file.attrs.get('format', 'not stated')!r}; give the "
                                    "_selection.h5 of an earlier select command")
            told = file.attrs
            settings = EmSettings(**{key: type(value)(told[f"em_{key}"])
                                     for key, value in asdict(EmSettings()).items()})
            low, high = float(told["size_low_nm"]), float(told["size_high_nm"])
            sizes = SphereFit(file["diameter_nm"][()], file["size_misfit"][()]) \
                if "diameter_nm" in file else None
            fine_N = file["fine_share"][()] if "fine_share" in file else None
            fine_most = float(told.get("fine_most", 0.0))
            index_N, class_NT = file["index"][()], file["class"][()]
            averages, likelihood = file["em/averages"][()], file["em/likelihood"][()]
            radii = (float(told["inner"]), float(told["outer"]))
    except (OSError, KeyError) as error:
        raise OutputDamaged(f"EM classes were to be read from {path}: {error}; give the "
                            "_selection.h5 of an earlier select command") from error
    if not np.array_equal(index_N, frames.index_N):
        raise ConfigurationError(f"the classes of {path} are of {len(index_N)} other frames; give "
                                 "the frames that they were made from")
    return EmSelection(frames, settings, sizes, (low, high) if high else None, radii,
                       class_NT.max(1) >= 0, class_NT.T.astype(np.int64), averages, likelihood,
                       fine_N=fine_N, fine_most=fine_most)


def parse_classes(text: str) -> Sequence[tuple[int, int]]:
    """((run, class), ...) from "0.3,1.12"; a number without a point is of run 0."""
    found = []
    for word in text.split(","):
        run, point, number = word.strip().rpartition(".")
        if not number.isdigit() or not (run.isdigit() or not point):
            raise ConfigurationError(f"classes {text!r} were chosen; give run.class as on the "
                                     "page, separated by commas: 0.3,0.7,1.12")
        found.append((int(run or 0), int(number)))
    return found
