"""Score a model on the simulated images of its recipe, run by run where it finds hits."""
from __future__ import annotations

import argparse
import shlex
import sys

from .train import require_learn


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="model name or directory")
    parser.add_argument("--split", default="test", help="runs of the recipe (default: test)")
    parser.add_argument("--labelled", metavar="FILE.h5",
                        help="instead of a split: labelled images of a file, as simulate spi "
                             "writes them (single-particle models)")
    parser.add_argument("--recipe", metavar="FILE", help="instead of the model's own recipe")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--processes", type=int, default=1, help="that simulate (default: 1)")
    parser.add_argument("--keep", action="store_true",
                        help="write the result into the model's card, with date and command")
    parser.add_argument("--report", metavar="FILE.html",
                        help="also write a page with tables and figures")
    parser.add_argument("--paper", action="store_true",
                        help="instead of a split: ten runs like the 2018 paper's 90 to 100, three "
                             "of them shifted, with its figures beside (hit models)")
    parser.add_argument("--scale", type=float, default=1.0, metavar="X",
                        help="of the paper's event counts (default: 1, 110,891 events)")
    parser.add_argument("--seed", type=int, metavar="S", help="of the ten runs (default: 9298)")


def execute(args: argparse.Namespace) -> int:
    require_learn()
    if args.paper:
        return paper_runs(args)
    from ..engines import find_model
    from ..learn.evaluation import Evaluation
    from ..learn.export import write_metrics
    from ..learn.lessons import Evaluated, lesson_of
    from ..learn.quality_scores import QualityEvaluation
    from ..learn.recipes import model_recipe
    from ..learn.spi_scores import SpiEvaluation
    from ..learn.stills_scores import StillsEvaluation

    model = find_model(args.model)
    recipe = model_recipe(model, args.recipe)
    evaluation: Evaluated
    if args.labelled:
        from ..learn.spi_files import evaluate_file

        evaluation = evaluate_file(model, args.labelled, recipe, args.backend)
    else:
        evaluation = lesson_of(recipe).evaluate(model, args.split, args.backend, args.processes)
    command = shlex.join(["xfel-classify", *sys.argv[1:]])
    print(evaluation)
    if args.keep:
        write_metrics(model, "labelled" if args.labelled else args.split, evaluation, command)
    if args.report and isinstance(evaluation, Evaluation):
        from ..learn.reports import write_evaluation

        print(write_evaluation(evaluation, args.report, command=command))
    elif args.report and isinstance(evaluation, StillsEvaluation):
        from ..learn.report_stills import write_stills_evaluation

        print(write_stills_evaluation(evaluation, args.report, command=command,
                                      threshold=model.card.tasks[0].threshold))
    elif args.report and isinstance(evaluation, QualityEvaluation):
        from ..learn.report_quality import write_quality_evaluation

        print(write_quality_evaluation(evaluation, args.report, command=command))
    elif args.report and isinstance(evaluation, SpiEvaluation):
        from ..learn.report_spi import write_spi_evaluation

        print(write_spi_evaluation(evaluation, args.report, command=command))
    return 0


def paper_runs(args: argparse.Namespace) -> int:
    """The paper's ten runs: one table, its column beside ours."""
    from ..engines import find_model
    from ..learn.export import write_metrics
    from ..learn.paper_runs import PAPER_SEED, evaluate_paper_runs, paper_table
    from ..learn.reports import write_evaluation

    seed = PAPER_SEED if args.seed is None else args.seed
    evaluation = evaluate_paper_runs(args.model, scale=args.scale, seed=seed, backend=args.backend,
                                     processes=args.processes)
    command = shlex.join(["xfel-classify", *sys.argv[1:]])
    print(f"{evaluation.model} {evaluation.sha256[:12]}, threshold {evaluation.threshold:g}, seed "
          f"{seed}, scale {args.scale:g}\n\n{paper_table(evaluation)}")
    if args.keep:
        write_metrics(find_model(args.model), "paper_runs", evaluation, command)
    if args.report:
        print(write_evaluation(evaluation, args.report, command=command))
    return 0
