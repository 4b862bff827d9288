"""A model judged on labelled images of a file, which need not come from our simulator.

Two layouts are read.  ``xfel-classify simulate spi`` writes ``images`` (N, H, W) and a table
``labels`` (N, L) with its column ``names``.  Files of the simulator skopi have ``images``
(N, X, Y), x along the polarisation and y upwards, and a group ``labels`` of one dataset per label:
``count`` from 1, ``particle`` as an index into its ``names``.  Images are mean photons per detector
pixel.  A particle may be named as a class or as its stand-in.

Axes: N image, H row (0 on top), W column, L label.
"""
from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

from ..core import ConfigurationError
from ..engines import Model, find_model, open_engine
from ..simulate.spi_particles import SPI_PARTICLES, STAND_INS
from .recipes import Recipe, model_recipe
from .spi_scores import SpiEvaluation, score_spi

__all__ = ["evaluate_file", "read_labelled"]

BATCH = 32
CLASS_OF = {stand_in: name for name, stand_in in STAND_INS.items()}


def evaluate_file(model: Model | str | Path, path: str | Path,
                  recipe: Recipe | str | Path | None = None,
                  backend: str = "auto") -> SpiEvaluation:
    """Scores of a single-particle model on all labelled images of a file, as one part.

    Raises :class:`ConfigurationError` where the file is not one, or its images are not as large as
    the model's window.
    """
    model, path = find_model(model), Path(path)
    recipe = model_recipe(model, recipe)
    images_NHW, labels, structures = read_labelled(path)
    if images_NHW.shape[1:] != model.window.shape:
        raise ConfigurationError(
            f"images of {path} have {images_NHW.shape[1]} x {images_NHW.shape[2]} pixels; the "
            f"model {model.name} looks at {model.window.height} x {model.window.width}; give "
            "images of that size")
    with open_engine(model, backend) as engine:
        parts = [engine.infer(images_NHW[start:start + BATCH])
                 for start in range(0, len(images_NHW), BATCH)]
        name = engine.name
    outputs = {output: np.concatenate([part[output] for part in parts]) for output in parts[0]}
    scores = score_spi(recipe, outputs, labels)
    return SpiEvaluation(model.name, model.sha256, name, structures, {path.name: scores})


def read_labelled(path: str | Path) -> tuple[np.ndarray, dict[str, np.ndarray], str]:
    """(images float32 (N, H, W), labels of (N,) float32 each, which structures were used).

    ``count`` is 0 for one copy; ``particle`` a class index, -1 for none of the classes; ``total``
    is the sum of each image.
    """
    path = Path(path)
    try:
        with h5py.File(path) as file:
            images_NHW = np.asarray(file["images"], np.float32)
            if isinstance(file["labels"], h5py.Group):
                images_NHW = np.ascontiguousarray(images_NHW.transpose(0, 2, 1)[:, ::-1])
                labels, structures = _grouped(file["labels"], len(images_NHW))
            else:
                labels = _table(file["labels"])
                structures = f"stand-ins: {file.attrs.get('stand_ins', 'not stated')}"
    except (OSError, KeyError, ValueError, IndexError) as error:
        raise ConfigurationError(
            f"{path} was to be read as labelled images, but {error}; give an HDF5 file with "
            "'images' and 'labels' as xfel-classify simulate spi writes it") from error
    labels["total"] = images_NHW.sum((1, 2), dtype=np.float64).astype(np.float32)
    return images_NHW, labels, structures


def _table(table: h5py.Dataset) -> dict[str, np.ndarray]:
    return {str(name): np.asarray(table[:, column], np.float32)
            for column, name in enumerate(table.attrs["names"])}


def _grouped(group: h5py.Group, count: int) -> tuple[dict[str, np.ndarray], str]:
    names = [str(name) for name in group["particle"].attrs["names"]]
    labels = {name: np.asarray(values, np.float32) for name, values in group.items()
              if isinstance(values, h5py.Dataset) and values.shape == (count,)}
    class_K = np.array([_class(name) for name in names], np.float32)
    labels["particle"] = class_K[labels["particle"].astype(int)]
    labels["count"] = labels["count"] - 1
    return labels, ", ".join(names)


def _class(name: str) -> int:
    wanted = CLASS_OF.get(name, name)
    return SPI_PARTICLES.index(wanted) if wanted in SPI_PARTICLES else -1
