"""Make a published table again: train its rows with several seeds, print both columns."""
from __future__ import annotations

import argparse

from .train import require_learn


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("study", metavar="STUDY", help="spi-multi, spi-quality or spi-yolo")
    parser.add_argument("--table", default="", metavar="NAME",
                        help="of spi-multi: 1 (backbones), 2 (depth), grid (heat map); of "
                             "spi-quality: accuracy, robustness, depth, activations, features; of "
                             "spi-yolo: selection (default: the first)")
    parser.add_argument("-o", "--output", required=True, metavar="DIR",
                        help="directory for all trainings; an interrupted table goes on there")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--size", default="small", help="small (default) or full: which recipe")
    size.add_argument("--recipe", metavar="FILE", help="another recipe to start from")
    parser.add_argument("--seeds", type=int, default=3, metavar="N",
                        help="trainings per row (default: 3)")
    parser.add_argument("--rows", nargs="+", default=[], metavar="PART",
                        help="only rows whose name contains one of these")
    parser.add_argument("--weights", metavar="FILE",
                        help="for table features of spi-quality: safetensors of torchvision's "
                             "VGG-16")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument("--processes", type=int, default=1,
                        help="that simulate images (default: 1)")
    parser.add_argument("--device", help="of torch (default: cuda where there is one)")


def execute(args: argparse.Namespace) -> int:
    require_learn()
    from ..learn.reproductions import reproduce

    print(reproduce(args.study, args.table, args.output, size=args.size, seeds=args.seeds,
                    rows=args.rows, recipe=args.recipe, threads=args.threads,
                    processes=args.processes, device=args.device, weights=args.weights,
                    report=lambda line: print(line, flush=True)))
    return 0
