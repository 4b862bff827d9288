"""Clusters of a run's frames by a diffusion map, named by a few labels, written for people and
programs.

At most ``most`` frames, evenly spread over the run, make the map; the others are placed in it by
Nystrom extension.  A map can be kept and used for another run of the same detector.

Axes: N frames of the run, F frames of the map, L eigenpair, C cluster, H row, W column.
"""
from __future__ import annotations

import datetime
import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ..core import ConfigurationError, EventSource, OutputDamaged
from ..sinks.staging import set_attributes, staged_hdf5, write_array
from .diffusion_map import (
    DiffusionMap,
    cluster_centres,
    diffusion_map,
    eigengap,
    names_of,
    nearest_centre,
    vectors,
)
from .event_selections import event_lists, new_directory
from .gallery_page import Group, gallery_page, tile
from .small_frames import SmallFrames, small_frames

__all__ = ["FORMAT", "ClusterSettings", "Clustering", "cluster_run", "left_out_agreement",
           "read_map", "write_clustering"]

log = logging.getLogger(__name__)

FORMAT = "xfel_classify clusters"
CANDIDATES = (10, 20, 40, 80)
EXAMPLES = 7
NAMELESS = "unnamed"


@dataclass(frozen=True)
class ClusterSettings:
    """``clusters`` = 0 lets labels choose the number, else the widest gap of the eigenvalues.

    ``scale`` is that of :func:`.diffusion_map.vectors`, ``side`` and ``reach_px`` of the small
    pictures, ``time`` the exponent of the eigenvalues.  ``names`` of labels 0 and 1.
    """

    side: int = 64
    reach_px: float = 0.0
    scale: str = "rings"
    neighbours: int = 30
    alpha: float = 1.0
    eigenpairs: int = 20
    time: float = 1.0
    clusters: int = 0
    most: int = 10_000
    seed: int = 0
    names: tuple[str, str] = ("bad", "good")


@dataclass(frozen=True)
class Clustering:
    """Every usable frame with its cluster; ``frames`` are pictures of the rows ``shown_F``,
    evenly spread: those that made the map, unless it is an earlier one.

    ``name_C`` is 0, 1 or -1 (nobody said) of each cluster; ``agreement`` that of the labels with
    clusters named by the other labels, NaN without labels.
    """

    settings: ClusterSettings
    map: DiffusionMap
    centres_CL: np.ndarray
    name_C: np.ndarray
    cluster_N: np.ndarray
    coordinates_NL: np.ndarray
    frames: SmallFrames = field(repr=False)
    shown_F: np.ndarray
    index_N: np.ndarray
    timestamp_N: np.ndarray
    unusable: int
    labelled: int = 0
    agreement: float = float("nan")
    map_of: str = ""

    @property
    def name_N(self) -> np.ndarray:
        """(N,) 0, 1 or -1 by the name of each frame's cluster."""
        return self.name_C[self.cluster_N]


def cluster_run(source: EventSource, settings: ClusterSettings | None = None, *,
                labels: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
                earlier: Clustering | None = None,
                report: Callable[[str], Any] = lambda line: None) -> Clustering:
    """Clusters of an opened source.

    ``labels(index_N, timestamp_N)`` tells 1, 0 or -1 of each event; ``earlier`` (see
    :func:`read_map`) is a clustering whose map and names are used.
    Raises :class:`ConfigurationError` for too few usable frames, or another detector's map.
    """
    settings = settings or (earlier.settings if earlier else ClusterSettings())
    if settings.most < 3 or settings.neighbours < 1 or settings.clusters < 0:
        raise ConfigurationError(
            f"a map of at most {settings.most} frames with {settings.neighbours} neighbours and "
            f"{settings.clusters} clusters was asked for; give at least 3, 1 and 0")
    expected = source.expected_events()
    stride = max(1, -(-(expected or 0) // settings.most))
    kept: list[SmallFrames] = []
    ids: list[tuple[np.ndarray, np.ndarray]] = []
    shown: list[np.ndarray] = []
    done = unusable = 0
    with tempfile.TemporaryFile() as spill:
        for piece in small_frames(source, settings.side, settings.reach_px):
            _check_same(piece, earlier)
            unusable += piece.unusable
            points = vectors(piece.images_NHW, piece.good_HW, settings.scale, piece.beam_RC)
            spill.write(points.tobytes())
            chosen = np.flatnonzero((done + np.arange(len(piece))) % stride == 0)
            shown.append(done + chosen)
            kept.append(replace(piece, images_NHW=piece.images_NHW[chosen]))
            ids.append((piece.index_N, piece.timestamp_N))
            done += len(piece)
            report(f"{done} frames read")
        width = points.shape[1]
        index_N, timestamp_N = (np.concatenate([one[i] for one in ids]) for i in (0, 1))
        rows_F = np.concatenate(shown)
        frames = replace(kept[-1], images_NHW=np.concatenate([one.images_NHW for one in kept]),
                         index_N=index_N[rows_F], timestamp_N=timestamp_N[rows_F])
        if earlier:
            psi_NL = _placed(spill, done, width, earlier.map)
            found = earlier.map
        else:
            if done < 3:
                raise ConfigurationError(f"a diffusion map was asked for of {done} usable frames "
                                         f"({unusable} had no usable image); give at least three, "
                                         "better thousands")
            found = diffusion_map(_rows(spill, rows_F, width), settings.neighbours, settings.alpha,
                                  settings.eigenpairs)
            report(f"map of {len(rows_F)} frames; eigenvalues "
                   f"{', '.join(f'{v:.3f}' for v in found.eigenvalues_L[:6])}, ...")
            psi_NL = found.psi_NL if len(rows_F) == done else _placed(spill, done, width, found)
            psi_NL[rows_F] = found.psi_NL
    coordinates_NL = found.coordinates(psi_NL, settings.time)
    label_N = np.full(done, -1, np.int64) if labels is None else labels(index_N, timestamp_N)
    if earlier:
        centres, name_C = earlier.centres_CL, earlier.name_C
        cluster_N = nearest_centre(coordinates_NL, centres)
        asked = label_N >= 0
        agreement = float((name_C[cluster_N[asked]] == label_N[asked]).mean()) if asked.any() \
            else float("nan")
    else:
        centres = _centres(coordinates_NL[rows_F], label_N[rows_F], found, settings)
        cluster_N = nearest_centre(coordinates_NL, centres)
        name_C = names_of(cluster_N, label_N, len(centres))
        agreement = left_out_agreement(cluster_N, label_N, len(centres))
    return Clustering(settings, found, centres, name_C, cluster_N, coordinates_NL, frames, rows_F,
                      index_N, timestamp_N, unusable, int((label_N >= 0).sum()), agreement,
                      earlier.map_of if earlier else "")


def _rows(spill: Any, rows: np.ndarray, width: int) -> np.ndarray:
    found = np.empty((len(rows), width), np.float32)
    for place, row in enumerate(rows):
        spill.seek(4 * width * int(row))
        found[place] = np.frombuffer(spill.read(4 * width), np.float32)
    return found


def _placed(spill: Any, count: int, width: int, found: DiffusionMap, block: int = 1024
            ) -> np.ndarray:
    if width != found.points_ND.shape[1]:
        raise ConfigurationError(f"the frames have {width} values to compare, those of the map "
                                 f"{found.points_ND.shape[1]}; use the map with the detector, mask "
                                 "and settings that it was made with")
    psi_NL = np.empty((count, len(found.eigenvalues_L)))
    spill.seek(0)
    for first in range(0, count, block):
        rows = min(block, count - first)
        points = np.frombuffer(spill.read(4 * width * rows), np.float32).reshape(rows, width)
        psi_NL[first:first + rows] = found.extend(points)
    return psi_NL


def _check_same(piece: SmallFrames, earlier: Clustering | None) -> None:
    if earlier is None:
        return
    theirs = earlier.frames
    if piece.pool != theirs.pool or piece.beam_RC != theirs.beam_RC \
            or not np.array_equal(piece.good_HW, theirs.good_HW):
        raise ConfigurationError(
            f"frames of {piece.detector} were to be placed in the map {earlier.map_of}, which was "
            "made with another detector, mask or beam centre; make a map of these frames")


def _centres(points_FL: np.ndarray, label_F: np.ndarray, found: DiffusionMap,
             settings: ClusterSettings) -> np.ndarray:
    gap = min(eigengap(found.eigenvalues_L), len(points_FL))
    if settings.clusters:
        counts = [settings.clusters]
    elif (label_F >= 0).sum() >= 20:
        counts = sorted({gap, *(c for c in CANDIDATES if c <= len(points_FL) // 10)})
    else:
        counts = [gap]
    tried = []
    for count in counts:
        centres = cluster_centres(points_FL, count, settings.seed)
        share = left_out_agreement(nearest_centre(points_FL, centres), label_F, count)
        tried.append((share if share == share else 0.0, centres))
        if len(counts) > 1:
            log.info("%d clusters agree with %.3f of the labels", count, share)
    return max(tried, key=lambda one: one[0])[1]


def left_out_agreement(cluster_N: np.ndarray, label_N: np.ndarray, count: int) -> float:
    """Share of the labelled frames whose cluster the *other* labels name like their own.

    A cluster that the others do not name counts as wrong.  NaN without labels.
    """
    asked = np.flatnonzero(label_N >= 0)
    votes_C2 = np.zeros((count, 2), np.int64)
    np.add.at(votes_C2, (cluster_N[asked], label_N[asked]), 1)
    right = 0
    for row in asked:
        others = votes_C2[cluster_N[row]].copy()
        others[label_N[row]] -= 1
        right += bool(others.any()) and int(others.argmax()) == label_N[row]
    return right / len(asked) if len(asked) else float("nan")


# --- output --------------------------------------------------------------------------------------

def write_clustering(found: Clustering, directory: str | Path, *, command: str = "",
                     overwrite: bool = False) -> list[Path]:
    """Write file, page, picture and event lists; returns their paths, the HDF5 file first."""
    stem = found.frames.stem
    names = (*found.settings.names, NAMELESS)
    groups = _groups(found)
    with new_directory(directory, overwrite, FORMAT) as written:
        for number in range(len(found.centres_CL)):
            rows = found.cluster_N == number
            written.add(event_lists(f"{stem}_cluster{number:02d}", found.frames.run,
                                    found.index_N[rows], found.timestamp_N[rows]))
        for value, name in enumerate(found.settings.names):
            if (found.name_C == value).any():
                rows = found.name_N == value
                written.add(event_lists(f"{stem}_{name}", found.frames.run, found.index_N[rows],
                                        found.timestamp_N[rows]))
        counts = f"{len(found.index_N)} frames in {len(found.centres_CL)} clusters"
        lead = (f"{counts} by a diffusion map of {len(found.frames) if not found.map_of else 0} "
                f"frames. {_words(found)}") if not found.map_of else (
                    f"{counts} of the map {found.map_of}. {_words(found)}")
        page = gallery_page(f"Clusters of {stem}", lead, groups, found.frames.good_HW,
                            _parameters(found), footer=f"xfel_classify {version('xfel-classify')}"
                            + (f": {command}" if command else ""))
        written.add({f"{stem}_clusters.html": page.encode(),
                     f"{stem}_clusters.png": tile(groups, found.frames.good_HW)})
        with staged_hdf5(written.directory, f"{stem}_clusters.h5") as (file, _):
            _write_file(file, found, names, command, list(written.names))
        written.staged(f"{stem}_clusters.h5")
    return [Path(directory) / name for name in reversed(written.names)]


def _words(found: Clustering) -> str:
    if found.agreement != found.agreement:
        return "No labels were given; look at the clusters and name them."
    return (f"{found.labelled} labels name the clusters; {found.agreement:.1%} of them agree with "
            "the name that " + ("the map has for their cluster." if found.map_of else
                                "the others give their cluster."))


def _parameters(found: Clustering) -> dict[str, Any]:
    return asdict(found.settings) | {
        "clusters_found": len(found.centres_CL), "frames": len(found.index_N),
        "unusable": found.unusable, "pool": found.frames.pool, "detector": found.frames.detector,
        "labelled": found.labelled, "agreement": found.agreement, "map_of": found.map_of,
        "xfel_classify_version": version("xfel-classify")}


def _groups(found: Clustering) -> list[Group]:
    names = (*found.settings.names, NAMELESS)
    rows_F, groups = found.shown_F, []
    order = np.argsort(-np.bincount(found.cluster_N, minlength=len(found.centres_CL)),
                       kind="stable")
    for number in order:
        members = np.flatnonzero(found.cluster_N[rows_F] == number)
        pictures: list[tuple[str, np.ndarray]] = []
        if len(members):
            images = found.frames.images_NHW[members]
            total = np.maximum(images.sum((1, 2)), 1e-6)
            pictures.append(("average", (images / total[:, None, None]).mean(0)))
            to_centre = np.square(found.coordinates_NL[rows_F[members]]
                                  - found.centres_CL[number]).sum(1)
            by_distance = np.argsort(to_centre, kind="stable")
            for place in np.unique(np.linspace(0, len(members) - 1, EXAMPLES).astype(int)):
                member = by_distance[place]
                pictures.append((f"event {found.frames.index_N[members[member]]}", images[member]))
        count = int((found.cluster_N == number).sum())
        name = names[found.name_C[number]]
        groups.append(Group(f"cluster{number:02d}", f"Cluster {number:02d}: {name}",
                            {"frames": count, "share": f"{count / len(found.index_N):.1%}",
                             "name": name}, pictures, bool(found.name_C[number] == 1)))
    return groups


def _write_file(file: h5py.File, found: Clustering, names: Sequence[str], command: str,
                files: list[str]) -> None:
    frames, own = found.frames, found.map
    set_attributes(file, {
        "format": FORMAT, "format_version": 1, "exp": frames.exp, "run": frames.run,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command, "files": files} | _parameters(found))
    write_array(file, "timestamp", found.timestamp_N, doc="64-bit time stamp of the event")
    write_array(file, "index", found.index_N, doc="position of the event in the run, from 0")
    write_array(file, "cluster", found.cluster_N.astype(np.int16), doc="number of the cluster")
    write_array(file, "name", found.name_N.astype(np.int8), names=list(names[:2]), missing=-1,
                doc="name of the event's cluster; -1 = nobody named it")
    write_array(file, "coordinates", found.coordinates_NL.astype(np.float32),
                doc="diffusion coordinates lambda^t psi")
    for name, values, doc in (
            ("cluster_name", found.name_C.astype(np.int8), "name of each cluster, -1 = none"),
            ("centres", found.centres_CL, "of the clusters, diffusion coordinates"),
            ("points", own.points_ND, "frames of the map as they were compared"),
            ("psi", own.psi_NL, "eigenvectors of P on the frames of the map"),
            ("eigenvalues", own.eigenvalues_L, "of P, without the first, which is 1"),
            ("scale", own.scale_N, "distance to the tuning neighbour"),
            ("density", own.density_N, "sum of the kernel"),
            ("good", frames.good_HW.astype(np.uint8), "picture elements with working pixels"),
            ("rows", found.shown_F, "rows of this file that are shown, and make the map")):
        write_array(file, f"map/{name}", values, doc=doc)
    set_attributes(file["map"], {"neighbours": own.neighbours, "alpha": own.alpha,
                                 "beam_row": frames.beam_RC[0], "beam_column": frames.beam_RC[1],
                                 "pool": frames.pool})


def read_map(path: str | Path) -> Clustering:
    """The map, clusters and names of an earlier output, for :func:`cluster_run`.

    Raises :class:`OutputDamaged` for a file that is none.
    """
    path = Path(path)
    try:
        with h5py.File(path) as file:
            if file.attrs.get("format") != FORMAT:
                raise OutputDamaged(f"a map was to be read from {path}, whose format is "
                                    f"{file.attrs.get('format', 'not stated')!r}; give the "
                                    "_clusters.h5 of an earlier cluster command")
            part = file["map"]
            arrays = {name: part[name][()] for name in part}
            stated = {key: file.attrs[key] for key in asdict(ClusterSettings())}
            attributes = dict(part.attrs)
            detector = str(file.attrs["detector"])
    except (OSError, KeyError) as error:
        raise OutputDamaged(f"a map was to be read from {path}: {error}; give the _clusters.h5 of "
                            "an earlier cluster command") from error
    usual: dict[str, Any] = asdict(ClusterSettings())
    told: dict[str, Any] = {key: type(usual[key])(value) for key, value in stated.items()}
    told["names"] = tuple(str(name) for name in stated["names"])
    settings = ClusterSettings(**told)
    own = DiffusionMap(arrays["points"], arrays["eigenvalues"], arrays["psi"], arrays["scale"],
                       arrays["density"], int(attributes["neighbours"]),
                       float(attributes["alpha"]))
    good_HW = arrays["good"].astype(bool)
    frames = SmallFrames(
        np.zeros((0, *good_HW.shape), np.float32), good_HW,
        (float(attributes["beam_row"]), float(attributes["beam_column"])),
        int(attributes["pool"]), np.zeros(0, np.int64), np.zeros(0, np.int64), detector=detector)
    nothing = np.zeros(0, np.int64)
    return Clustering(settings, own, arrays["centres"], arrays["cluster_name"].astype(np.int64),
                      nothing, np.zeros((0, own.psi_NL.shape[1])), frames, nothing, nothing,
                      nothing, 0, map_of=path.name)
