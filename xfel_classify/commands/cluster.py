"""Cluster the frames of a run without training (diffusion map); a few labels name the clusters.

For single-particle images: every frame is compared with all others, similar ones form clusters,
and a page shows each cluster for a person to judge.  With --labels the clusters get names and
the events of each name a list; with --map the frames are placed in the map of an earlier run.
"""
from __future__ import annotations

import argparse
import contextlib
import functools
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from ..core import ConfigurationError
from ._source_arguments import add_source_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_frames(parser)
    parser.add_argument("--labels", metavar="FILE", type=Path,
                        help="of some events: an expert's list, a label file, a labelled set, a "
                             "summary or a *-truth.h5; they choose the number of clusters and name "
                             "them")
    parser.add_argument("--label-column", default="quality", metavar="NAME",
                        help="column of a labelled set, or of a summary (default: quality)")
    parser.add_argument("--use-labels", type=int, default=0, metavar="N",
                        help="use N of the labels, evenly spread (default: all)")
    parser.add_argument("--against", metavar="FILE", type=Path,
                        help="print how far the names agree with these labels, leaving out the "
                             "events that --labels used")
    parser.add_argument("--names", default="bad,good", metavar="MISS,HIT",
                        help="what labels 0 and 1 are called (default: bad,good)")
    parser.add_argument("--map", metavar="FILE", type=Path,
                        help="_clusters.h5 of an earlier output; no new map is made")
    parser.add_argument("--scale", choices=("rings", "linear", "log1p", "sqrt"), default="rings",
                        help="how patterns are compared (default: rings, which a turn about the "
                             "beam does not change)")
    parser.add_argument("--clusters", type=int, default=0, metavar="N",
                        help="default: chosen by the labels, else by the eigenvalues")
    parser.add_argument("--neighbours", type=int, default=30, metavar="N", help="default: 30")
    parser.add_argument("--alpha", type=float, default=1.0, metavar="A",
                        help="1 takes out how densely frames lie, 0 leaves it (default: 1)")
    parser.add_argument("--eigenpairs", type=int, default=20, metavar="N", help="default: 20")
    parser.add_argument("--most", type=int, default=10_000, metavar="N",
                        help="frames that make the map; the others are placed in it "
                             "(default: 10000)")
    parser.add_argument("--seed", type=int, default=0, metavar="S")


def add_frames(parser: argparse.ArgumentParser) -> None:
    """Where frames come from, as small pictures, and where results go."""
    parser.add_argument("frames", nargs="+", metavar="FRAMES",
                        help="run number, HDF5/CXI/NeXus/image files or globs, or the summary of "
                             "the run")
    parser.add_argument("-o", "--output", metavar="DIR", type=Path,
                        help="directory to write")
    parser.add_argument("--side", type=int, default=64, metavar="N",
                        help="elements along the longer side of a small picture (default: 64)")
    parser.add_argument("--reach", type=float, default=0.0, metavar="PX",
                        help="leave out pixels further from the beam (default: none)")
    add_source_arguments(parser)
    parser.add_argument("--threads", type=int, default=1, metavar="N",
                        help="of matrix products (default: 1)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier output")


def execute(args: argparse.Namespace) -> int:
    from ..config import build
    from ..learn.clusters import FORMAT, ClusterSettings, cluster_run, read_map, write_clustering
    from ..learn.event_selections import labels_of
    from ._source_arguments import source_of

    names = tuple(args.names.split(","))
    if len(names) != 2 or not all(name.isidentifier() for name in names) or names[0] == names[1]:
        raise ConfigurationError(f"--names {args.names}: give two different words, as bad,good")
    settings = ClusterSettings(
        side=args.side, reach_px=args.reach, scale=args.scale, neighbours=args.neighbours,
        alpha=args.alpha, eigenpairs=args.eigenpairs, clusters=args.clusters, most=args.most,
        seed=args.seed, names=(names[0], names[1]))
    require_free(args, FORMAT, (args.labels, args.against))
    earlier = read_map(args.map) if args.map else None
    labels = None if args.labels is None else functools.partial(
        some_labels, path=args.labels, column=args.label_column, count=args.use_labels)
    start = time.perf_counter()
    with threads(args.threads), build("sources", source_of(args)) as source:
        found = cluster_run(source, None if earlier else settings, labels=labels, earlier=earlier,
                            report=progress)
    seconds = time.perf_counter() - start
    progress("")
    output = args.output or Path(f"{found.frames.stem}_clusters")
    if args.against is not None:
        truth_N = labels_of(args.against, found.index_N, found.timestamp_N,
                            column=args.label_column)
        if labels is not None:
            truth_N = unused(truth_N, labels(found.index_N, found.timestamp_N))
        print(_against(found.name_N, truth_N, found.settings.names))
    paths = write_clustering(found, output, overwrite=args.overwrite,
                             command=shlex.join(["xfel-classify", *sys.argv[1:]]))
    print(f"{len(found.index_N)} frames ({found.unusable} without a usable image) in "
          f"{len(found.centres_CL)} clusters, {len(found.index_N) / seconds:.0f} frames/s")
    if found.labelled:
        print(f"{found.labelled} labels; {found.agreement:.1%} agree with the name of their "
              "cluster" + ("" if found.map_of else " by the others"))
    for path in paths[:3]:
        print(f"  {path}")
    print(f"  and {len(paths) - 3} event lists")
    return 0


def some_labels(index_N: np.ndarray, timestamp_N: np.ndarray, *, path: Path, column: str,
                count: int) -> np.ndarray:
    """(N,) 1, 0 or -1 of these events; ``count`` of the labels, evenly spread, 0 = all."""
    from ..learn.event_selections import labels_of

    label_N = labels_of(path, index_N, timestamp_N, column=column)
    labelled = np.flatnonzero(label_N >= 0)
    if 0 < count < len(labelled):
        kept = labelled[np.linspace(0, len(labelled) - 1, count).round().astype(int)]
        others = np.ones(len(label_N), bool)
        others[kept] = False
        label_N[others] = -1
    return label_N


def unused(truth_N: np.ndarray, label_N: np.ndarray) -> np.ndarray:
    """The truth of events that were not labelled; of all, where all were."""
    fresh_N = np.where(label_N >= 0, -1, truth_N)
    return fresh_N if (fresh_N >= 0).any() else truth_N


def _against(name_N: np.ndarray, truth_N: np.ndarray, names: tuple[str, str]) -> str:
    asked = truth_N >= 0
    right = (name_N == truth_N) & asked
    lines = [f"agreement with {int(asked.sum())} labels: "
             f"{right.sum() / max(asked.sum(), 1):.1%}"]
    for value, name in enumerate(names):
        own = truth_N == value
        lines.append(f"  of {int(own.sum())} {name}: "
                     + ", ".join(f"{int((own & (name_N == other)).sum())} in {told} clusters"
                                 for other, told in ((0, names[0]), (1, names[1]),
                                                     (-1, "unnamed"))))
    return "\n".join(lines)


def require_free(args: argparse.Namespace, form: str, inputs: Sequence[Path | None]) -> None:
    """Say before the work, not after it, that an output is in the way or an input is missing."""
    from ..learn.event_selections import check_free

    for path in inputs:
        if path is not None and not path.is_file():
            raise ConfigurationError(f"labels were to be read from {path}, which is no file; check "
                                     "the path")
    if args.output is not None:
        check_free(args.output, args.overwrite, form)


def progress(line: str) -> None:
    """One line that is written over on a terminal; nothing elsewhere."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{line}")
        sys.stderr.flush()


def threads(count: int) -> AbstractContextManager[Any]:
    """A context in which BLAS uses ``count`` threads, where threadpoolctl is installed."""
    if count < 1:
        raise ConfigurationError(f"--threads {count}: give at least 1")
    try:
        import threadpoolctl
    except ImportError:
        return contextlib.nullcontext()
    return threadpoolctl.threadpool_limits(count, "blas")
