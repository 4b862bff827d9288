"""Score a model on the simulated runs of its recipe: sensitivity and specificity run by run."""
from __future__ import annotations

import argparse
import shlex
import sys

from .train import require_learn


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="model name or directory")
    parser.add_argument("--split", default="test", help="runs of the recipe (default: test)")
    parser.add_argument("--recipe", metavar="FILE", help="instead of the model's own recipe")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--processes", type=int, default=1, help="that simulate (default: 1)")
    parser.add_argument("--keep", action="store_true",
                        help="write the result into the model's card, with date and command")
    parser.add_argument("--report", metavar="FILE.html",
                        help="also write a page with tables and curves (yes/no models)")


def execute(args: argparse.Namespace) -> int:
    require_learn()
    from ..engines import find_model
    from ..learn.evaluation import evaluate_recipe
    from ..learn.export import write_metrics
    from ..learn.stills import trains_on_stills
    from ..learn.stills_export import write_stills_metrics
    from ..learn.stills_scores import evaluate_stills

    model = find_model(args.model)
    asked = model, args.split, args.recipe, args.backend, args.processes
    command = shlex.join(["xfel-classify", *sys.argv[1:]])
    if trains_on_stills(args.recipe or model.directory / "recipe.toml"):
        stills = evaluate_stills(*asked)
        print(stills)
        if args.keep:
            write_stills_metrics(model, args.split, stills, command)
        return 0
    evaluation = evaluate_recipe(*asked)
    print(evaluation)
    if args.keep:
        write_metrics(model, args.split, evaluation, command)
    if args.report:
        from ..learn.reports import write_evaluation

        print(write_evaluation(evaluation, args.report, command=command))
    return 0
