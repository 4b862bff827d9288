"""What all engines share: checking images, splitting batches, checking outputs."""
from __future__ import annotations

import importlib.util
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
    precisions: tuple[str, ...] = ("float32",)      # that can be asked for
    takes_geometry = False  # True: defines ``_run_with_geometry`` as well

    @classmethod
    def absence(cls) -> str:
        """Why this runtime cannot be used on this machine at all; "" when it may be."""
        there = importlib.util.find_spec(cls.package) is not None
        return "" if there else f"the package {cls.package} is not installed"

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

    def _run_with_geometry(self, images_B1HW: np.ndarray,
                           geometry_B4: np.ndarray) -> dict[str, np.ndarray]:
        """The same for models with a geometry input, where ``takes_geometry``."""
        raise NotImplementedError

    def _stop(self) -> None:
        """Give back what ``_start`` took."""

    # --- for the users ---------------------------------------------------------------------

    def open(self) -> None:
        """Load the network and take the device; does nothing when open already."""
        if not self._opened:
            if self.model.card.geometry and not self.takes_geometry:
                raise EngineError(f"the {self.name} engine runs models without a geometry input "
                                  f"only, model {self.model.name} has one; use --backend "
                                  "onnxruntime")
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

    def infer(self, images_BHW: np.ndarray,
              geometry_B4: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """{output name: (B, K) float32 probabilities or values}, fresh arrays, any B >= 0.

        ``images_BHW`` are normalized as the card's window says; H and W are the card's.
        ``geometry_B4`` (distance mm, pixel mm, wavelength A, pool) is needed by models whose card
        names a geometry input, and ignored by others.
        """
        images_BHW, geometry_B4, outputs = self._accept(images_BHW, geometry_B4)
        for start in range(0, len(images_BHW), self.chunk):
            part_BHW = images_BHW[start:start + self.chunk]
            part_B1HW = np.ascontiguousarray(part_BHW, np.float32)[:, None]
            found = self._run(part_B1HW) if geometry_B4 is None else self._run_with_geometry(
                part_B1HW, geometry_B4[start:start + self.chunk])
            for name, values_BK in found.items():
                if name in outputs:
                    outputs[name][start:start + len(part_BHW)] = values_BK
        return outputs

    def _geometry(self, geometry_B4: np.ndarray | None, count: int) -> np.ndarray | None:
        if not self.model.card.geometry:
            return None
        if geometry_B4 is None or np.shape(geometry_B4) != (count, 4):
            found = "none" if geometry_B4 is None else f"shape {np.shape(geometry_B4)}"
            raise EngineError(
                f"model {self.model.name} needs the geometry of its {count} images, got {found}; "
                "give (B, 4): distance in mm, pixel in mm, wavelength in angstrom, pool")
        return np.ascontiguousarray(geometry_B4, np.float32)

    def _accept(self, images_BHW: np.ndarray, geometry_B4: np.ndarray | None,
                ) -> tuple[np.ndarray, np.ndarray | None, dict[str, np.ndarray]]:
        """The images and their geometry, checked, and arrays for their outputs."""
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
        return images_BHW, self._geometry(geometry_B4, len(images_BHW)), {
            task.output: np.empty((len(images_BHW), task.width), np.float32)
            for task in self.model.card.tasks}

    def _check_signature(self, inputs: list[str], outputs: dict[str, int | None]) -> None:
        """Compare the graph's input names and {output: K or None} with the card."""
        card = self.model.card
        wanted = [card.input, card.geometry] if card.geometry else [card.input]
        if inputs != wanted:
            named = " and ".join(repr(name) for name in wanted)
            raise ModelInvalid(f"model {card.name}: the card names the input {named}, "
                               f"the network has {inputs}; correct the card or export again")
        for task in card.tasks:
            if task.output not in outputs:
                raise ModelInvalid(
                    f"model {card.name}: task {task.name} reads the output {task.output!r}, the "
                    f"network has {sorted(outputs)}; correct the card or export again")
            width = outputs[task.output]
            if width is not None and width != task.width:
                what = "is a number" if task.kind == "regression" else f"has {task.width} classes"
                raise ModelInvalid(
                    f"model {card.name}: task {task.name} {what}, the "
                    f"output {task.output!r} has {width} values; correct the card")
