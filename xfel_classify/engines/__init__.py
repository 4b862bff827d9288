"""Runtimes that execute a model: one file each, opened by :func:`open_engine`."""
from __future__ import annotations

import logging
from pathlib import Path

from ..config import builtin_names, component
from ..core import EngineError, MissingDependency
from .cards import Card, Model, Task, check_model, find_model, list_models, search_path, survey
from .enduring import Enduring
from .runtime import Runtime
from .submit import Pending, SupportsSubmit
from .tensorrt_build import installed

__all__ = [
    "Card", "Model", "Pending", "Runtime", "SupportsSubmit", "Task", "available_backends",
    "check_model", "find_model", "list_models", "open_engine", "search_path", "survey",
]

log = logging.getLogger(__name__)

PREFERRED = ("tensorrt", "direct", "onnxruntime", "torch")
"""Order of ``backend="auto"``; runtimes without a file in this folder are passed over."""

ON_GPU = "tensorrt"
"""The runtime that "auto" passes over without a warning where there is no GPU."""


def available_backends(model: Model | None = None) -> list[str]:
    """Runtimes that can be used here (and that execute ``model``), best first."""
    known = [name for name in PREFERRED if name in builtin_names("engines")]
    return [name for name in known
            if not component("engines", name).absence()
            and (model is None or component("engines", name).executes(model))]


def open_engine(model: Model | str | Path, backend: str = "auto", device: str | None = None,
                max_batch: int = 64, precision: str | None = None) -> Runtime:
    """An opened engine for ``model`` (a :class:`Model`, a name, or a path).

    ``backend`` is "auto" or the name of a runtime.  A named runtime is used or raises
    (``UnknownComponent``, ``MissingDependency``, ``EngineError``); "auto" steps down in the order
    of :data:`PREFERRED`, logs that once, and the engine's ``name`` and ``precision`` say what was
    opened.  ``device`` is the runtime's own word for one ("cuda:0"); None means the rank's GPU
    for ``tensorrt`` and the CPU for the others.  ``max_batch`` is the largest batch handed to the
    runtime at once; larger ones are split.  ``precision`` other than "float32" is for
    ``tensorrt``.  A damaged model raises ``ModelInvalid`` and never steps down.

    With "auto", a GPU that fails later is replaced by the next runtime; a named one raises.
    """
    model = find_model(model)
    if backend != "auto":
        engine = _made(backend, model, device, max_batch, precision)
        engine.open()
        return engine
    names = [name for name in PREFERRED if name in builtin_names("engines")
             and component("engines", name).executes(model)]
    if device == "cpu":
        names = [name for name in names if name != ON_GPU]
    reason = component("engines", ON_GPU).absence() if ON_GPU in names else ""
    if reason:
        names.remove(ON_GPU)
    engine = _first(names, model, device, max_batch, precision)
    if reason:      # of interest to those who installed TensorRT for it
        log.log(logging.INFO if installed() else logging.DEBUG, "model %s runs on %s and not on a "
                "GPU: %s", model.name, engine.name, reason)
    if engine.name != ON_GPU:
        return engine
    return Enduring(engine, lambda: _first(names[1:], model, None, max_batch, None))


def _made(name: str, model: Model, device: str | None, max_batch: int,
          precision: str | None) -> Runtime:
    made = component("engines", name)
    known = getattr(made, "precisions", ("float32",))
    if precision is None or (precision,) == known:
        return made(model, device=device, max_batch=max_batch)
    if len(known) == 1:
        raise EngineError(f"the {name} engine computes in {known[0]}, {precision} was "
                          "asked for; leave the precision out, or use --backend tensorrt on a GPU")
    return made(model, device=device, max_batch=max_batch, precision=precision)


def _first(names: list[str], model: Model, device: str | None, max_batch: int,
           precision: str | None) -> Runtime:
    """The first runtime that opens; one warning names those that refused."""
    refusals: list[str] = []
    for name in names:
        try:
            engine = _made(name, model, device, max_batch, precision)
            engine.open()
        except (MissingDependency, EngineError) as error:
            refusals.append(f"{name}: {error}")
            continue
        if refusals:
            log.warning("model %s runs on %s (%s)", model.name, name, "; ".join(refusals))
        return engine
    raise EngineError(f"no runtime can execute model {model.name}: {'; '.join(refusals)}. "
                      "Install one: pip install onnxruntime")
