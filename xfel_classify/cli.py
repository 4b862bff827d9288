"""The command ``xfel-classify``: parse, call one function, print.

Every verb is a file in ``xfel_classify/commands`` with ``add_arguments(parser)`` and
``execute(args) -> exit code``; its help is the first line of the module's docstring.  Exit codes:
0 complete, 1 wrong input or configuration, 2 usage, 3 incomplete, 130 interrupted.
"""
from __future__ import annotations

import argparse
import ast
import importlib
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from .core import OutputFull, XfelClassifyError
from .pipeline import schedule

COMMANDS = Path(__file__).parent / "commands"


def verbs() -> dict[str, str]:
    """{verb: one line of help}, read from the command files without importing them."""
    found = {}
    for path in sorted(COMMANDS.glob("*.py")):
        if not path.stem.startswith("_"):
            text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            found[path.stem.replace("_", "-")] = text.splitlines()[0]
    return found


def parser(verb: str | None = None) -> argparse.ArgumentParser:
    """The argument parser; only the module of ``verb`` is imported (all when None)."""
    top = argparse.ArgumentParser(
        prog="xfel-classify", description="Classify every event of an XFEL run.",
        epilog="exit codes: 0 complete, 1 wrong input, 2 usage, 3 incomplete, 130 interrupted")
    top.add_argument("--version", action="version", version=_version())
    top.add_argument("-v", "--verbose", action="store_true", help="log more")
    subparsers = top.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, line in verbs().items():
        sub = subparsers.add_parser(name, help=line, description=line)
        if verb in (None, name):
            importlib.import_module(
                f".commands.{name.replace('-', '_')}", __package__).add_arguments(sub)
    return top


def _version() -> str:
    from importlib.metadata import version

    return f"xfel-classify {version('xfel-classify')}"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # one thread per rank unless the user says otherwise: ranks share the node's cores
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(variable, "1")
    schedule.end_all_on_uncaught_errors()
    named = next((word for word in arguments if not word.startswith("-")), None)
    chosen = parser(named if named in verbs() else None)
    args = chosen.parse_args(arguments)
    try:
        here = schedule.world()
        _log_to_stderr(here, args.verbose)
        command = importlib.import_module(f".commands.{args.verb.replace('-', '_')}", __package__)
        return command.execute(args)
    except schedule.FailedElsewhere as error:
        return _exit_code(error.cause)
    except XfelClassifyError as error:
        return _fail(error)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _exit_code(error: BaseException) -> int:
    return 3 if isinstance(error, OutputFull) else 1


def _fail(error: XfelClassifyError) -> int:
    """Say what is wrong, once per job, and end all ranks with the same code."""
    code = _exit_code(error)
    here = schedule.current()
    if here.size > 1 and not error.everywhere:
        # the other ranks know nothing of this: end them.  When all ranks meet the same error,
        # rank 0 is the one that says it.
        if here.rank:
            time.sleep(2.0)
        sys.stderr.write(f"xfel-classify: error on rank {here.rank}: {error}\n")
        here.abort(code)
    sys.stderr.write(f"xfel-classify: error: {error}\n")
    return code


def _log_to_stderr(here: schedule.World, verbose: bool) -> None:
    """Rank 0 logs from INFO, the others from WARNING."""
    level = logging.DEBUG if verbose else logging.INFO if here.rank == 0 else logging.WARNING
    prefix = f"[{here.rank}] " if here.size > 1 else ""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"{prefix}%(message)s"))
    package = logging.getLogger("xfel_classify")
    package.handlers[:] = [handler]
    package.setLevel(level)
    package.propagate = False


if __name__ == "__main__":
    sys.exit(main())
