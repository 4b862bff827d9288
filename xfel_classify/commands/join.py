"""Join the parts of an interrupted or incomplete run into its files, without the run itself."""
from __future__ import annotations

import argparse
from pathlib import Path

from ..config import build, loads, resolve
from ..core import OutputError
from ..pipeline.manifest import read_manifest
from ..pipeline.run import join_run
from .run import describe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("output", metavar="OUT", type=Path, help="output directory of the run")


def execute(args: argparse.Namespace) -> int:
    found = sorted(args.output.glob("*.parts"))
    if len(found) != 1:
        raise OutputError(f"{args.output} holds {len(found)} parts directories, one is needed; "
                          "a finished run keeps none: there is nothing to join")
    manifest = read_manifest(found[0])
    config = resolve(loads(str(manifest.attributes["configuration"]), str(found[0])))
    sinks = [build("sinks", table) for table in config.sinks]
    summary = join_run(args.output, found[0], manifest, sinks, keep_parts=True)
    print(describe(summary))
    return summary.exit_code
