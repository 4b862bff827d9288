"""List the sources, analyses, sinks and engines that a configuration can use."""
from __future__ import annotations

import argparse
from importlib.metadata import entry_points

from ..config import KINDS, builtin_names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", nargs="?", choices=sorted(KINDS), help="only this kind")


def execute(args: argparse.Namespace) -> int:
    for kind in [args.kind] if args.kind else KINDS:
        print(f"{kind}:")
        for name in builtin_names(kind):
            print(f"  {name}")
        for entry in entry_points(group=f"xfel_classify.{kind}"):
            print(f"  {entry.name}  ({entry.value})")
        print(f'  or a class of your own: use = "my_file:{KINDS[kind]}"')
    return 0
