"""Classify every event of a run; works the same under mpirun."""
from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Mapping
from typing import Any

from ..config import apply_setting, build, dumps, load, resolve
from ..core import ConfigurationError
from ..pipeline import schedule
from ..pipeline.run import HIT_COLUMNS, RunSummary, classify_run

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".cbf", ".bz2", ".gz", ".tif", ".tiff", ".edf", ".img", ".mccd")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", nargs="+", metavar="RUN",
                        help="run number (psana), or HDF5/CXI/NeXus/image files or globs")
    parser.add_argument("--config", metavar="FILE",
                        help="TOML configuration, or a summary whose configuration to use again")
    parser.add_argument("--exp", help="experiment name (default: $EXPERIMENT)")
    parser.add_argument("--dir", help="directory of the run's xtc2 files")
    parser.add_argument("--detector", metavar="NAME",
                        help="detector name in the run, its kind for files, or 'assembled'")
    parser.add_argument("--constants", metavar="FILE", help="HDF5 file with calibration constants")
    parser.add_argument("--geometry", metavar="FILE", help="psana .data or CrystFEL .geom file")
    parser.add_argument("--mask", metavar="FILE",
                        help="mask, 1 = good: .npy, .npz or file.h5:/dataset")
    parser.add_argument("--model", action="append", metavar="NAME",
                        help="model name or directory; repeat for more, 'none' for no model")
    parser.add_argument("--peaks", metavar="NAME",
                        help="peak finder, or none (default: peakfinder8)")
    parser.add_argument("--peaks-on", choices=("all", "hits"),
                        help="find peaks in all events or only in the model's hits")
    parser.add_argument("--backend", metavar="NAME", help="runtime for models (default: auto)")
    parser.add_argument("--batch", type=int, metavar="N", help="events per engine call")
    parser.add_argument("--max-events", type=int, metavar="N", help="stop after N events")
    parser.add_argument("-o", "--output", metavar="OUT", help="default: {exp}_r{run:04d}/")
    parser.add_argument("--cxi-link", action="store_true",
                        help="link the CXI's pixels to the source files instead of copying")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="do only what is missing")
    existing.add_argument("--overwrite", action="store_true", help="replace an earlier output")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                        help="override the configuration, e.g. source.distance_m=0.15")
    parser.add_argument("--dry-run", action="store_true",
                        help="open the run, print the resolved configuration, and stop")


def tables_of(args: argparse.Namespace) -> dict[str, Any]:
    """The configuration tables that the arguments mean."""
    tables = load(args.config)
    source = tables.setdefault("source", {})
    number = args.run[0] if len(args.run) == 1 and args.run[0].isdigit() else None
    if number is not None:
        source.setdefault("use", "psana2")
        source["run"] = int(number)
        experiment = args.exp or source.get("exp") or os.environ.get("EXPERIMENT")
        if experiment:
            source["exp"] = experiment
        elif source["use"] == "psana2":
            raise ConfigurationError(f"run {number}: no experiment given; add --exp EXP, or set "
                                     "$EXPERIMENT")
    else:
        images = args.run[0].endswith(IMAGE_SUFFIXES)
        source.setdefault("use", "images" if images else "hdf5")
        source["files"] = list(args.run)
        if args.exp:
            source["exp"] = args.exp
    for key in ("dir", "detector", "constants", "geometry", "mask"):
        if (value := getattr(args, key)) is not None:
            source[key] = value
    _add_analyses(tables, args)
    tables.setdefault("sinks", [{"use": "summary"}, {"use": "cxi"}, {"use": "event_lists"},
                                {"use": "geometry"}])
    if args.cxi_link:
        for sink in tables["sinks"]:
            if sink.get("use") == "cxi":
                sink["link"] = True
    loop = tables.setdefault("loop", {})
    for key in ("batch", "max_events"):
        if (value := getattr(args, key)) is not None:
            if value < 1:
                raise ConfigurationError(f"--{key.replace('_', '-')} {value}: give at least 1")
            loop[key] = value
    for setting in args.set:
        apply_setting(tables, setting)
    return tables


def _add_analyses(tables: dict[str, Any], args: argparse.Namespace) -> None:
    """Models first, then the peak finder, then the powder patterns."""
    given = tables.get("analyses")
    analyses = list(given) if given is not None else []
    models = args.model if args.model is not None else (["sfx-hit"] if given is None else None)
    if models is not None:
        analyses = [a for a in analyses if a.get("use") != "classify"]
        chosen = [] if models == ["none"] else models
        analyses = [{"use": "classify", "model": model} for model in chosen] + analyses
    if args.backend is not None:
        for analysis in analyses:
            if analysis.get("use") == "classify":
                analysis["backend"] = args.backend
    told = [column for a in analyses if a.get("use") == "classify"
            for column in _hit_columns(str(a.get("model", "sfx-hit")))]
    model_column = min(told, key=HIT_COLUMNS.index, default="")
    if args.peaks is not None or given is None:
        analyses = [a for a in analyses if "peak" not in a.get("use", "") and
                    not a.get("use", "").startswith("psana")]
        if args.peaks != "none":
            analyses.append({"use": args.peaks or "peakfinder8"})
    for analysis in analyses:
        if args.peaks_on is not None and analysis["use"] not in ("classify", "statistics"):
            analysis.pop("only", None)
            if args.peaks_on == "hits":
                if not model_column:
                    raise ConfigurationError("--peaks-on hits needs a model that says what a hit "
                                             "is; name one with --model")
                analysis["only"] = model_column
    if given is None:
        hits = model_column or ("peaks/hit" if args.peaks != "none" else "")
        analyses = [a for a in analyses if a["use"] != "statistics"]
        analyses.append({"use": "statistics", "hits": hits})
    tables["analyses"] = analyses


def _hit_columns(model: str) -> list[str]:
    """Those of a model's columns that can say what a hit is."""
    from ..engines import find_model

    return [column for column in HIT_COLUMNS for task in find_model(model).card.tasks
            if column == f"{task.name}/label"]


def execute(args: argparse.Namespace) -> int:
    world = schedule.world()
    config = resolve(tables_of(args))
    source = build("sources", config.source)
    analyses = [build("analyses", table) for table in config.analyses]
    sinks = [build("sinks", table) for table in config.sinks]
    if args.dry_run:
        with source:
            if world.rank == 0:
                print(dumps(config))
                print(f"# {source.run.source}: {source.expected_events()} events of "
                      f"{source.run.detector} {source.run.panel_shape}")
        return 0
    mode = "resume" if args.resume else "overwrite" if args.overwrite else "new"
    summary = classify_run(source, analyses, sinks, out=args.output, config=config, mode=mode,
                           world=world, progress=True)
    if world.rank == 0:
        print(describe(summary))
    return summary.exit_code


def describe(summary: RunSummary) -> str:
    """What the user reads at the end of a run."""
    expected = "?" if summary.events_expected is None else summary.events_expected
    if summary.interrupted:
        return (f"interrupted: {summary.events} of {expected} events are done and kept in "
                f"{summary.directory}; run the same command with --resume to do the rest")
    lines = [f"{summary.events} of {expected} events in {summary.seconds:.1f} s, "
             f"{summary.hits} hits ({summary.hits / max(summary.events, 1):.1%})"]
    lines += [f"  {count:8d} {name}" for name, count in _by_status(summary.status_counts)]
    lines += [f"  {path}" for path in summary.files]
    if not summary.complete:
        lost = int(expected) - summary.events + summary.unreadable
        lines.append(f"INCOMPLETE: {lost} of the run's events have no result (files damaged or "
                     "missing, or not all ranks finished); the summary says so. Restore what is "
                     "missing, then run the same command with --resume")
    return "\n".join(lines)


def _by_status(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return [(name, count) for name, count in counts.items() if count]
