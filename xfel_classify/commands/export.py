"""Write the model directory (ONNX, card, check values) of a finished training."""
from __future__ import annotations

import argparse

from .train import require_learn


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("training", metavar="DIR", help="output directory of xfel-classify train")
    parser.add_argument("model", metavar="MODEL_DIR", help="model directory to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing model")


def execute(args: argparse.Namespace) -> int:
    require_learn()
    from ..engines import check_model
    from ..learn.export import export_model

    print(check_model(export_model(args.training, args.model, overwrite=args.overwrite)))
    return 0
