"""Frames on a command line: the arguments of ``run`` for verbs that read frames themselves."""
from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

__all__ = ["add_source_arguments", "source_of"]


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """What :func:`source_of` needs to find and read the frames of a run."""
    for key, text in (("exp", "experiment name"), ("dir", "directory of the run's xtc2 files"),
                      ("detector", "detector name in the run, its kind for files, or 'assembled'"),
                      ("constants", "HDF5 file with calibration constants"),
                      ("geometry", "psana .data or CrystFEL .geom file"),
                      ("mask", "mask, 1 = good: .npy, .npz or file.h5:/dataset"),
                      ("config", "TOML configuration, or a summary whose configuration to use")):
        parser.add_argument(f"--{key}", help=text)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                        help="override the configuration, e.g. source.distance_m=0.15")


def source_of(args: argparse.Namespace) -> dict[str, Any]:
    """The source table that ``run`` would make of the same arguments; a summary names its own."""
    import h5py

    from ..config import load, resolve
    from .run import tables_of

    first = Path(args.frames[0])
    frames, config = args.frames, args.config
    if len(args.frames) == 1 and first.is_file() and h5py.is_hdf5(first):
        with h5py.File(first) as file:
            if file.attrs.get("format") == "xfel_classify summary":
                config = config or str(first)
                source = load(config).get("source", {})
                frames = source.get("files") or [str(source.get("run", ""))]
    as_run = argparse.Namespace(**vars(args) | {
        "run": frames, "config": config, "model": ["none"], "peaks": "none", "peaks_on": None,
        "backend": None, "batch": None, "max_events": None, "cxi_link": False})
    return resolve(tables_of(as_run)).source
