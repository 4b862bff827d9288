"""Write a self-contained HTML page about one or several runs, with labels if there are any."""
from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from ..core import ConfigurationError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("summary", nargs="+", metavar="SUMMARY", type=Path,
                        help="summary of a run, or the directory that holds it")
    parser.add_argument("--labels", action="append", default=[], metavar="FILE", type=Path,
                        help="what is true: a label file, a *-truth.h5 of simulate, or an "
                             "expert's list; repeatable, the first one of a run is its reference")
    parser.add_argument("--column", default="", metavar="COLUMN",
                        help="answers to judge first (default: those that chose the hits)")
    parser.add_argument("--geometry", metavar="FILE", type=Path,
                        help="instead of the .geom file beside each summary")
    parser.add_argument("--gallery", type=int, default=4, metavar="N",
                        help="frames to show of each kind, 0 = none (default: 4)")
    parser.add_argument("--pixels", choices=("run", "cxi"), default="run",
                        help="where frames come from that are not in the CXI file: the run is "
                             "read again (default), or they are left out (cxi)")
    parser.add_argument("--title", default="", help="heading of the page")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("-o", "--output", metavar="FILE", type=Path,
                       help="page to write (default: report.html)")
    where.add_argument("--elog", metavar="DIR", type=Path,
                       help="write DIR/NAME/report.html, as the eLog's summaries want it "
                            "(DIR is <experiment>/stats/summary)")
    parser.add_argument("--name", default="", metavar="NAME",
                        help="folder in the eLog (default: xfel_classify_r0095, ...)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier page")


def execute(args: argparse.Namespace) -> int:
    from ..learn.labels import read_labels
    from ..learn.reports import Options, elog_page, write_report

    if args.gallery < 0:
        raise ConfigurationError(f"--gallery {args.gallery}: give 0 or more frames")
    if args.name and args.elog is None:
        raise ConfigurationError("--name names a folder in the eLog; give its place with --elog")
    options = Options(column=args.column, geometry=args.geometry, gallery=args.gallery,
                      read_run=args.pixels == "run", title=args.title,
                      command=shlex.join(["xfel-classify", *sys.argv[1:]]))
    labels = [read_labels(path) for path in args.labels]
    output = args.output or Path("report.html")
    if args.elog is not None:
        output = elog_page(args.elog, args.name, args.summary)
    print(write_report(args.summary, output, labels=labels, options=options,
                       overwrite=args.overwrite))
    return 0
