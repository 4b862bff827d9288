"""Select the frames of single particles by classes of averaged patterns (EM, in-plane rotations).

Frames of the right size are sorted into classes by several independent runs of expectation
maximisation; classes are chosen by their symmetry, by a few labels, or by hand from the page that
is written; a frame is selected when enough runs agree.  The events are written as lists in the
form of the hits of a run.
"""
from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path

from ..core import ConfigurationError
from .cluster import add_frames, progress, require_free, some_labels, threads, unused


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_frames(parser)
    parser.add_argument("--method", choices=("em",), default="em", help="default: em")
    parser.add_argument("--size", default="none", metavar="LOW,HIGH",
                        help="diameters in nm that are kept, as 55,84, by the fit of a sphere "
                             "(default: none, all are)")
    parser.add_argument("--fine", type=float, default=0.0, metavar="SHARE",
                        help="leave out frames with more than this share of their structure finer "
                             "than a particle of the largest --size can make: several particles "
                             "at a distance; 0.2 is a good start (default: 0, none are)")
    parser.add_argument("--classes-per-run", type=int, default=20, metavar="K",
                        help="default: 20")
    parser.add_argument("--rotations", type=int, default=100, metavar="R", help="default: 100")
    parser.add_argument("--iterations", type=int, default=30, metavar="N",
                        help="of each start (default: 30)")
    parser.add_argument("--starts", type=int, default=1, metavar="N",
                        help="random starts of each run; the likeliest is kept (default: 1)")
    parser.add_argument("--no-friedel", action="store_true",
                        help="patterns are not symmetric about the beam: rotate a whole turn")
    parser.add_argument("--log", action="store_true", help="compare log(1 + photons)")
    parser.add_argument("--hard", action="store_true",
                        help="every frame belongs to its best class only")
    parser.add_argument("--inner", type=float, default=0.0, metavar="PX",
                        help="compare only pixels at least this far from the beam")
    parser.add_argument("--runs", type=int, default=5, metavar="T",
                        help="independent runs (default: 5)")
    parser.add_argument("--least", type=int, default=0, metavar="N",
                        help="runs that must agree (default: more than half; 3 of 5)")
    parser.add_argument("--orders", default="6,10", metavar="M,...",
                        help="symmetries of the particle's patterns (default: 6,10, icosahedral)")
    parser.add_argument("--share", type=float, default=0.5, metavar="S",
                        help="of the symmetry score that these orders must hold (default: 0.5)")
    parser.add_argument("--classes", default="", metavar="RUN.CLASS,...",
                        help="choose by hand, as numbered on the page: 0.3,0.7,1.12")
    parser.add_argument("--labels", metavar="FILE", type=Path,
                        help="choose the classes that together give the labelled frames the best "
                             "F1")
    parser.add_argument("--label-column", default="quality", metavar="NAME",
                        help="column of a labelled set, or of a summary (default: quality)")
    parser.add_argument("--use-labels", type=int, default=0, metavar="N",
                        help="use N of the labels, evenly spread (default: all)")
    parser.add_argument("--reuse", metavar="FILE", type=Path,
                        help="_selection.h5 of an earlier output for the same frames: choose "
                             "again without sorting again")
    parser.add_argument("--against", metavar="FILE", type=Path,
                        help="print the selection beside the published table, judged by these "
                             "labels, leaving out the events that --labels used")
    parser.add_argument("--seed", type=int, default=0, metavar="S")


def execute(args: argparse.Namespace) -> int:
    from ..config import build
    from ..learn.em_runs import (
        FORMAT,
        Choice,
        choose,
        parse_classes,
        read_classes,
        sort_frames,
        write_selection,
    )
    from ..learn.em_selection import EmSettings
    from ..learn.event_selections import labels_of
    from ..learn.selection_table import judged, markdown
    from ..learn.small_frames import read_small
    from ._source_arguments import source_of

    settings = EmSettings(
        classes=args.classes_per_run, rotations=args.rotations, iterations=args.iterations,
        starts=args.starts, friedel=not args.no_friedel, log=args.log, hard=args.hard,
        seed=args.seed)
    if args.classes and args.labels:
        raise ConfigurationError("both --classes and --labels choose classes; give one of them")
    choice = Choice(
        how="hand" if args.classes else "labels" if args.labels else "symmetry",
        orders=tuple(_numbers(args.orders, "--orders", int)), share=args.share,
        classes=tuple(parse_classes(args.classes)) if args.classes else (),
        least=args.least or args.runs // 2 + 1)
    size = None if args.size == "none" else tuple(_numbers(args.size, "--size", float))
    if size is not None and (len(size) != 2 or not 0 < size[0] < size[1]):
        raise ConfigurationError(f"--size {args.size}: give two diameters in nm, as 55,84, or none")
    require_free(args, FORMAT, (args.labels, args.against))
    start = time.perf_counter()
    with threads(args.threads), build("sources", source_of(args)) as source:
        frames = read_small(source, args.side, args.reach, lambda n: progress(f"{n} frames read"))
        if args.reuse:
            found = read_classes(args.reuse, frames)
        else:
            found = sort_frames(
                frames, settings, args.runs,
                size_range_nm=None if size is None else (size[0], size[1]),
                fine_most=args.fine, inner=args.inner / frames.pool, report=progress)
    progress("")
    label_N = None if args.labels is None else some_labels(
        frames.index_N, frames.timestamp_N, path=args.labels, column=args.label_column,
        count=args.use_labels)
    found = choose(found, choice, label_N)
    seconds = time.perf_counter() - start
    paths = write_selection(found, args.output or Path(f"{frames.stem}_selection"),
                            overwrite=args.overwrite,
                            command=shlex.join(["xfel-classify", *sys.argv[1:]]))
    print(f"{int(found.selected_N.sum())} of {len(frames)} frames selected "
          f"({int(found.candidate_N.sum())} of the right size, {frames.unusable} without a usable "
          f"image), {int(found.chosen_TK.sum())} of {found.chosen_TK.size} classes chosen by "
          f"{choice.how}, {seconds:.0f} s")
    for note in frames.notes[-1:]:
        if "taken as masked" in note:
            print(note)
    if not found.chosen_TK.any():
        print("no class was chosen: look at the page, and choose with --reuse and --classes")
    for path in paths:
        print(f"  {path}")
    if args.against is not None:
        truth_N = labels_of(args.against, frames.index_N, frames.timestamp_N,
                            column=args.label_column)
        if label_N is not None:
            truth_N = unused(truth_N, label_N)
        known = truth_N >= 0
        print("\n" + markdown([judged("this one (EM)", found.selected_N[known],
                                      truth_N[known] == 1)]))
    return 0


def _numbers(text: str, option: str, kind: type) -> list:
    try:
        return [kind(word) for word in text.split(",")]
    except ValueError as error:
        raise ConfigurationError(f"{option} {text}: give numbers, separated by commas") from error
