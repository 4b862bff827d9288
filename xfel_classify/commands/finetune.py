"""Adapt a model to labelled frames of a run of yours; says what that gained on frames held back.

Frames are given as to run: files, a run number, or a summary (then its run is read again).  They
are divided in blocks of neighbouring events: 60 % to learn from, 15 % to choose the epoch, 25 %
held back.  A model with several answers is adapted in one of them (``--task``), which is then its
only one and decides what is a hit.  ``--prototypes`` needs few labels: an image is what the nearest
mean of the labelled images is.
"""
from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..core import ConfigurationError
from ._source_arguments import add_source_arguments, source_of
from .train import require_learn

if TYPE_CHECKING:
    from ..engines import Model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="model name or directory to start from")
    parser.add_argument("frames", nargs="+", metavar="FRAMES",
                        help="run number, HDF5/CXI/NeXus/image files or globs, or the summary of "
                             "the run")
    parser.add_argument("--labels", required=True, metavar="FILE", type=Path,
                        help="which events are hits: a file of label, an expert's list, a summary "
                             "(by its peak counts), or a *-truth.h5")
    parser.add_argument("-o", "--output", required=True, metavar="DIR", type=Path,
                        help="model directory to write; give it to run with --model")
    parser.add_argument("--name", default="", help="of the new model (default: MODEL-EXP-rRUN)")
    parser.add_argument("--column", default="peaks/n",
                        help="column of a summary to label by (default: peaks/n)")
    parser.add_argument("--file", default="", metavar="NAME",
                        help="image file of an expert's list that labels several")
    add_source_arguments(parser)
    parser.add_argument("--max-frames", type=int, default=3000, metavar="N",
                        help="labelled frames to use, evenly spread (default: 3000)")
    parser.add_argument("--epochs", type=int, default=16, help="at most (default: 16)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, metavar="R",
                        help="default: 0.001")
    parser.add_argument("--task", default="", metavar="NAME",
                        help="which yes/no answer of a model with several (spi: quality)")
    parser.add_argument("--prototypes", action="store_true",
                        help="only the nearest class mean, from 36 labels on; no epochs")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of parts and order")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing model")


def execute(args: argparse.Namespace) -> int:
    import tempfile

    with tempfile.TemporaryDirectory(prefix="xfel_classify_finetune") as place:
        return _execute(args, Path(place))


def _execute(args: argparse.Namespace, place: Path) -> int:
    require_learn()
    from ..config import build
    from ..engines import find_model
    from ..learn.finetuning import Settings, finetune, require_free, require_hit_model
    from ..learn.labelled_frames import read_labelled
    from ..learn.labels import read_labels
    from ..learn.prototypes import single_question

    if args.max_frames < 1:
        raise ConfigurationError(f"--max-frames {args.max_frames}: give at least 1")
    settings = Settings(epochs=args.epochs, learning_rate=args.learning_rate, seed=args.seed,
                        threads=args.threads, prototypes=args.prototypes)
    base = find_model(args.model)
    if args.task or len(base.card.tasks) > 1:
        base = single_question(base, args.task or _only_yes_no(base), place)
    require_hit_model(base)
    require_free(args.output, args.overwrite)
    labels = read_labels(args.labels, column=args.column, file=args.file)
    print(labels.describe())
    with build("sources", source_of(args)) as source:
        frames = read_labelled(source, labels, base, args.max_frames, few=args.prototypes)
    print(frames.describe(), flush=True)
    done = finetune(base, frames, labels, args.output, name=args.name, settings=settings,
                    overwrite=args.overwrite, command=shlex.join(["xfel-classify", *sys.argv[1:]]),
                    report=lambda line: print(line, flush=True))
    print(f"\n{done}")
    if labels.kind in ("peak counts", "answers"):
        print("The labels are another method's answers: this is agreement with it, not truth.")
    print(f"wrote {done.model.name} {done.model.sha256[:12]}: xfel-classify run RUN --model "
          f"{done.model.directory}")
    return 0


def _only_yes_no(model: Model) -> str:
    """The yes/no task of a model with several tasks; "" when there is not exactly one, which is
    refused as an unknown task is.  "Unknown particle" is no question to adapt."""
    found = [task.name for task in model.card.tasks if task.positive and task.name != "unknown"]
    return found[0] if len(found) == 1 else ""
