"""Runtimes that execute a model: one file each, opened by :func:`open_engine`."""
from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

from ..config import builtin_names, component
from ..core import EngineError, MissingDependency
from .cards import Card, Model, Task, check_model, find_model, list_models, search_path, survey
from .runtime import Runtime

__all__ = [
    "Card", "Model", "Runtime", "Task", "available_backends", "check_model", "find_model",
    "list_models", "open_engine", "search_path", "survey",
]

log = logging.getLogger(__name__)

PREFERRED = ("tensorrt", "direct", "onnxruntime", "torch")
"""Order of ``backend="auto"``; runtimes without a file in this folder are passed over."""


def available_backends(model: Model | None = None) -> list[str]:
    """Runtimes whose Python package is installed (and that execute ``model``), best first."""
    known = [name for name in PREFERRED if name in builtin_names("engines")]
    return [name for name in known
            if importlib.util.find_spec(component("engines", name).package) is not None
            and (model is None or component("engines", name).executes(model))]


def open_engine(model: Model | str | Path, backend: str = "auto", device: str | None = None,
                max_batch: int = 64) -> Runtime:
    """An opened engine for ``model`` (a :class:`Model`, a name, or a path).

    ``backend`` is "auto" or the name of a runtime.  A named runtime is used or raises
    (``UnknownComponent``, ``MissingDependency``, ``EngineError``); "auto" steps down in the order
    of :data:`PREFERRED`, logs that once, and the engine's ``name`` and ``precision`` say what was
    opened.  ``device`` is the runtime's own word for one ("cuda:0"); None means CPU for
    ``onnxruntime`` and ``torch``.  ``max_batch`` is the largest batch handed to the runtime at
    once; larger ones are split.  A damaged model raises ``ModelInvalid`` and never steps down.
    """
    model = find_model(model)
    if backend != "auto":
        engine = component("engines", backend)(model, device=device, max_batch=max_batch)
        engine.open()
        return engine
    known = builtin_names("engines")
    refusals: list[str] = []
    for name in PREFERRED:
        if name not in known or not component("engines", name).executes(model):
            continue
        engine = component("engines", name)(model, device=device, max_batch=max_batch)
        try:
            engine.open()
        except (MissingDependency, EngineError) as error:
            refusals.append(f"{name}: {error}")
            continue
        if refusals:
            log.warning("model %s runs on %s (%s)", model.name, name, "; ".join(refusals))
        return engine
    raise EngineError(f"no runtime can execute model {model.name}: {'; '.join(refusals)}. "
                      "Install one: pip install onnxruntime")
