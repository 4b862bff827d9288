"""Label events as hits or misses: by peak counts, an expert's list, or a simulation's truth.

A summary gives labels as the 2018 paper does: fewer than 2 peaks miss, more than 10 hit, what is
between is dropped.
"""
from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from ..learn.labels import agreement, read_labels, with_identity, write_labels


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", type=Path,
                        help="a summary (labels by its peak counts), a *-truth.h5 of simulate, a "
                             "label file, or an expert's list of lines 'FILE [N] HIT|MISS|MAYBE'")
    parser.add_argument("-o", "--output", metavar="FILE", type=Path,
                        help="label file to write (HDF5)")
    parser.add_argument("--against", metavar="OTHER", type=Path,
                        help="print how far the labels agree with these (same kinds of file)")
    parser.add_argument("--miss-below", type=int, default=2, metavar="N",
                        help="fewer peaks are a miss (default: 2)")
    parser.add_argument("--hit-above", type=int, default=10, metavar="N",
                        help="more peaks are a hit (default: 10)")
    parser.add_argument("--column", default="peaks/n",
                        help="column of a summary to go by: counts, or the yes/no answers of "
                             "hit/label or peaks/hit (default: peaks/n)")
    parser.add_argument("--against-column", metavar="COLUMN", default=None,
                        help="the same for --against (default: as --column)")
    parser.add_argument("--file", default="", metavar="NAME",
                        help="image file of an expert's list that labels several")
    parser.add_argument("--run-of", metavar="SUMMARY", type=Path,
                        help="the labels are of this summary's run: take its experiment, run "
                             "number and time stamps")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier label file")


def execute(args: argparse.Namespace) -> int:
    rule = {"miss_below": args.miss_below, "hit_above": args.hit_above, "file": args.file}
    labels = read_labels(args.source, column=args.column, **rule)
    if args.run_of is not None:
        labels = with_identity(labels, args.run_of)
    print(labels.describe())
    if args.against is not None:
        other = read_labels(args.against, column=args.against_column or args.column, **rule)
        print(f"{other.describe()}\n\n{agreement(labels, other)}")
    if args.output is not None:
        print(write_labels(labels, args.output, overwrite=args.overwrite,
                           command=shlex.join(["xfel-classify", *sys.argv[1:]])))
    elif args.against is None:
        print("nothing was written; name a label file with -o")
    return 0
