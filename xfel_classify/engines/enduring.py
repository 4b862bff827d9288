"""An engine that outlives its GPU: what ``backend="auto"`` opens on one."""
from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np

from .gpu_driver import DeviceLost
from .runtime import Runtime
from .submit import Pending, SupportsSubmit

log = logging.getLogger(__name__)


class Enduring(Runtime):
    """Runs ``engine``, and what ``replacement()`` opens once the GPU has failed.

    ``name``, ``precision`` and ``chunk`` are those of the engine in use; ``changed`` is True
    after the change.
    """

    def __init__(self, engine: Runtime, replacement: Callable[[], Runtime]) -> None:
        super().__init__(engine.model, engine.device, engine.max_batch)
        self._replacement = replacement
        self.changed = False
        self._use(engine)

    def _use(self, engine: Runtime) -> None:
        self._engine = engine
        self.name, self.precision, self.chunk = engine.name, engine.precision, engine.chunk

    def open(self) -> None:
        self._engine.open()

    def close(self) -> None:
        self._engine.close()

    def infer(self, images_BHW: np.ndarray,
              geometry_B4: np.ndarray | None = None) -> dict[str, np.ndarray]:
        return self.submit(images_BHW, geometry_B4).result()

    def submit(self, images_BHW: np.ndarray, geometry_B4: np.ndarray | None = None) -> Pending:
        """See :class:`~xfel_classify.engines.submit.SupportsSubmit`."""
        return _Kept(self, images_BHW, geometry_B4)

    def on_its_way(self, *images: Any) -> Pending | None:
        """The answers of an engine that can be ahead, else None."""
        if not isinstance(self._engine, SupportsSubmit):
            return None
        try:
            return self._engine.submit(*images)
        except DeviceLost as error:
            self.replace(error)
            return None

    def infer_now(self, *images: Any) -> dict[str, np.ndarray]:
        """Answers of the engine in use, replacing it when it fails."""
        try:
            return self._engine.infer(*images)
        except DeviceLost as error:
            self.replace(error)
            return self._engine.infer(*images)

    def replace(self, error: DeviceLost) -> None:
        """Give up the GPU; nothing happens when somebody else's answer did already."""
        if self.changed:
            return
        self.changed = True
        failed = self._engine
        self._use(self._replacement())
        log.warning("this rank goes on with %s in %s: %s", self.name, self.precision, error)
        failed.close()


class _Kept:
    """Images with their answers on the way; asked again elsewhere when those never come."""

    def __init__(self, engine: Enduring, *images: Any) -> None:
        self._engine, self._images = engine, images
        self._outputs: dict[str, np.ndarray] | None = None
        self._pending = engine.on_its_way(*images)

    def result(self) -> dict[str, np.ndarray]:
        if self._outputs is None and self._pending is not None:
            try:
                self._outputs = self._pending.result()
            except DeviceLost as error:
                self._engine.replace(error)
        if self._outputs is None:
            self._outputs = self._engine.infer_now(*self._images)
        return self._outputs
