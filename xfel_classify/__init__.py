"""Per-event classification of X-ray free-electron laser detector frames.

``Classifier`` judges arrays and events inside a program of yours; ``classify_run`` does a whole
run; ``xfel-classify run 95`` is the same from a shell.  Importing this package starts no MPI and
imports no deep-learning runtime.
"""
from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "Classifier": "embed", "open_run": "embed",
    "classify_run": "pipeline.run", "RunSummary": "pipeline.run",
    "find_model": "engines", "list_models": "engines", "open_engine": "engines",
    "XfelClassifyError": "core",
}

__all__ = ["Classifier", "RunSummary", "XfelClassifyError", "classify_run", "find_model",
           "list_models", "open_engine", "open_run"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
