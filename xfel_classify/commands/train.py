"""Train a model from a recipe; continues where an interrupted training was last saved."""
from __future__ import annotations

import argparse

from ..core import MissingDependency


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE.toml")
    parser.add_argument("-o", "--output", required=True, metavar="DIR",
                        help="directory for state, learning curve and the best network")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument("--processes", type=int, default=1,
                        help="that simulate images (default: 1)")
    parser.add_argument("--device", help="of torch (default: cuda where there is one)")
    parser.add_argument("--restart", action="store_true", help="do not continue, start again")


def execute(args: argparse.Namespace) -> int:
    require_learn()
    from ..learn.training import train

    train(args.recipe, args.output, resume=not args.restart, threads=args.threads,
          processes=args.processes, device=args.device,
          report=lambda line: print(line, flush=True))
    print(f"next: xfel-classify export {args.output} MODEL_DIR")
    return 0


def require_learn() -> None:
    """Raise :class:`MissingDependency` when the packages for training are not here."""
    try:
        import safetensors  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:
        raise MissingDependency(f"training needs torch and safetensors ({error}); "
                                "pip install 'xfel-classify[learn]'") from error
