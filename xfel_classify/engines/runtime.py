"""What all engines share: checking images, splitting batches, checking outputs."""
from __future__ import annotations

from pathlib import Path

import numpy as np

from ..core import EngineError, ModelInvalid
from .cards import Model


class Runtime:
    """Base of the engines.  A runtime defines ``_start``, ``_run`` and ``_stop``.

    Usable as a context manager.  Construction stores; :meth:`open` loads the network.
    ``chunk`` is how many images go to the runtime at once (never more than ``max_batch``).
    """

    name = ""
    package = ""            # the Python package that must be installed
    precision = "float32"

    @classmethod
    def executes(cls, model: Model) -> bool:
        """False when this runtime is made for other networks than ``model``."""
        return True

    def __init__(self, model: Model, device: str | None = None, max_batch: int = 64) -> None:
        if max_batch < 1:
            raise EngineError(f"{self.name} engine was asked for batches of {max_batch}; "
                              "max_batch is at least 1")
        self.model = model
        self.device = device
        self.max_batch = max_batch
        self.chunk = max_batch
        self._opened = False

    # --- for the runtimes ------------------------------------------------------------------

    def _start(self, onnx_path: Path) -> None:
        """Load the network; ``ModelInvalid`` for a bad file, ``EngineError`` for a bad device."""
        raise NotImplementedError

    def _run(self, images_B1HW: np.ndarray) -> dict[str, np.ndarray]:
        """Outputs of 1 to ``chunk`` images."""
        raise NotImplementedError

    def _stop(self) -> None:
        """Give back what ``_start`` took."""

    # --- for the users ---------------------------------------------------------------------

    def open(self) -> None:
        """Load the network and take the device; does nothing when open already."""
        if not self._opened:
            self._start(self.model.onnx_path)
            self._opened = True

    def close(self) -> None:
        """Release network and device; ``open`` may be called again."""
        if self._opened:
            self._stop()
            self._opened = False

    def __enter__(self) -> Runtime:
        self.open()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def infer(self, images_BHW: np.ndarray) -> dict[str, np.ndarray]:
        """{output name: (B, K) float32 probabilities}, fresh arrays, any B >= 0.

        ``images_BHW`` are normalized as the card's window says; H and W are the card's.
        """
        if not self._opened:
            raise EngineError(f"{self.name} engine of model {self.model.name} is not open; "
                              "call open() first, or use it in a with block")
        images_BHW = np.asarray(images_BHW)
        if images_BHW.ndim != 3 or images_BHW.shape[1:] != self.model.window.shape:
            height, width = self.model.window.shape
            raise EngineError(
                f"model {self.model.name} takes images of shape (B, {height}, {width}), got "
                f"{images_BHW.shape}; render frames through the card's window"
            )
        outputs = {task.output: np.empty((len(images_BHW), len(task.classes)), np.float32)
                   for task in self.model.card.tasks}
        for start in range(0, len(images_BHW), self.chunk):
            part_BHW = images_BHW[start:start + self.chunk]
            part_B1HW = np.ascontiguousarray(part_BHW, np.float32)[:, None]
            for name, values_BK in self._run(part_B1HW).items():
                if name in outputs:
                    outputs[name][start:start + len(part_BHW)] = values_BK
        return outputs

    def _check_signature(self, inputs: list[str], outputs: dict[str, int | None]) -> None:
        """Compare the graph's input names and {output: K or None} with the card."""
        card = self.model.card
        if inputs != [card.input]:
            raise ModelInvalid(f"model {card.name}: the card names the input {card.input!r}, "
                               f"the network has {inputs}; correct the card or export again")
        for task in card.tasks:
            if task.output not in outputs:
                raise ModelInvalid(
                    f"model {card.name}: task {task.name} reads the output {task.output!r}, the "
                    f"network has {sorted(outputs)}; correct the card or export again")
            width = outputs[task.output]
            if width is not None and width != len(task.classes):
                raise ModelInvalid(
                    f"model {card.name}: task {task.name} has {len(task.classes)} classes, the "
                    f"output {task.output!r} has {width} values; correct the card")
