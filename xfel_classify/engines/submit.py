"""Engines that compute while their caller does something else.

A loop that finds ``isinstance(engine, SupportsSubmit)`` hands over the images it has and goes on
reading; it asks for the answers when it needs them.  Other engines are used through ``infer``.
"""
from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np


class Pending(Protocol):
    """Answers on their way."""

    def result(self) -> dict[str, np.ndarray]:
        """{output name: (B, K) float32}, as ``infer`` gives them; waits until they are there.

        Raises ``EngineError`` when the device failed.  May be called again.
        """


@runtime_checkable
class SupportsSubmit(Protocol):
    """An engine that can be given images before the answers of earlier ones are there.

    ``submit`` takes what ``infer`` takes and returns before the images are judged.  The images
    may be needed again (a GPU that fails is replaced): leave them as they are until ``result()``
    has returned.
    Answers are those of ``infer``, bit for bit, whatever is on its way beside them.
    """

    def submit(self, images_BHW: np.ndarray,
               geometry_B4: np.ndarray | None = None) -> Pending: ...
