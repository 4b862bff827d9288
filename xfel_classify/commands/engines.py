"""List the models that can be found, or check that every runtime reproduces their answers."""
from __future__ import annotations

import argparse

from ..core import ModelError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("list", "check"))
    parser.add_argument("model", nargs="*", help="names or directories (default: all found)")
    parser.add_argument("--backend", default="all", help="check only this runtime")


def execute(args: argparse.Namespace) -> int:
    from ..engines import available_backends, check_model, find_model, list_models

    models = [find_model(name) for name in args.model] or list_models()
    if not models:
        raise ModelError("no model found; add a directory of models with $XFEL_CLASSIFY_MODELS")
    if args.action == "list":
        print(f"runtimes here: {', '.join(available_backends()) or 'none'}")
        for model in models:
            window = model.window
            tasks = ", ".join(f"{task.name} ({'/'.join(task.classes) or task.value})"
                              for task in model.card.tasks)
            print(f"{model.name} {model.version}  sha256 {model.sha256[:12]}...  {tasks}; "
                  f"{window.kind} {window.height} x {window.width}\n  {model.directory}")
        return 0
    passed = True
    for model in models:
        report = check_model(model, args.backend)
        print(report)
        passed &= report.passed
    return 0 if passed else 1
