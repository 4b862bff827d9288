"""Save psana's calibration constants of a run into an HDF5 file for --constants."""
from __future__ import annotations

import argparse
import os
from pathlib import Path

from ..core import ConfigurationError, OutputExists


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=int, metavar="RUN", help="run number")
    parser.add_argument("--exp", help="experiment name (default: $EXPERIMENT)")
    parser.add_argument("--dir", help="directory of the run's xtc2 files")
    parser.add_argument("--detector", default="", metavar="NAME", help="detector name in the run")
    parser.add_argument("-o", "--output", default="constants.h5", metavar="FILE", type=Path)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")


def execute(args: argparse.Namespace) -> int:
    from ..detectors import save_constants
    from ..sources.psana2 import fetch_constants

    experiment = args.exp or os.environ.get("EXPERIMENT")
    if not experiment:
        raise ConfigurationError(f"constants of run {args.run}: no experiment given; add --exp "
                                 "EXP, or set $EXPERIMENT")
    if args.output.exists() and not args.overwrite:
        raise OutputExists(f"{args.output} exists; replace it with --overwrite, or name another "
                           "file with -o")
    detector, constants = fetch_constants(experiment, args.run, args.detector, args.dir)
    save_constants(args.output, detector, constants)
    print(f"{args.output}: {', '.join(sorted(constants))} of {detector}")
    return 0
