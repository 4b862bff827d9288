"""Models: a trained network (ONNX) with the card that says what it means.

A model is a directory::

    card.toml    meaning: tasks and classes, window, thresholds, provenance, metrics, hash
    model.onnx   the network, probabilities inside the graph
    check.npz    input images (and geometry) and the outputs they must give

A task is a choice between classes (probabilities) or, with ``kind = "regression"``, a number.  A
model whose card names a ``geometry`` input sees, besides each image, (distance in mm, detector
pixel in mm, wavelength in angstrom, pooling factor f).

:func:`find_model` looks, in this order, at an explicit path, ``$XFEL_CLASSIFY_MODELS``
(directories separated like ``$PATH``), entry points of the group ``xfel_classify.models`` (each
loads to a directory, or to a function that returns one), and the models shipped with the package.
Two different models of one name are an error, whichever comes first.

Axes: B batch, H row, W column, K class.
"""
from __future__ import annotations

import difflib
import hashlib
import logging
import os
import tomllib
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from ..config import struct
from ..core import ConfigurationError, ModelError, ModelInvalid, ModelNotFound, Window

log = logging.getLogger(__name__)

CARD, ONNX, CHECK = "card.toml", "model.onnx", "check.npz"
MODELS_VARIABLE = "XFEL_CLASSIFY_MODELS"
MODELS_GROUP = "xfel_classify.models"
FLOAT32_TOLERANCE = 1e-5
"""Largest difference of an output that a float32 runtime may show when a card names none."""


class Task(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One question that a model answers for an image."""

    name: str                       # column group in the summary, e.g. "hit"
    output: str                     # name of the ONNX output, (B, K) probabilities or (B, 1)
    kind: str = "classes"           # or "regression": one number
    classes: list[str] = []         # meaning of the K values, in order
    positive: str = ""              # class whose probability is the score of a yes/no question
    threshold: float = 0.5          # yes when score >= threshold
    threshold_chosen: str = ""      # how the threshold was chosen, in words
    value: str = "value"            # of a regression: its column is <name>/<value>
    unit: str = ""                  # ... of that column
    transform: str = "none"         # ... from the output to the column: none, reciprocal

    @property
    def width(self) -> int:
        """K of the output."""
        return 1 if self.kind == "regression" else len(self.classes)

    @property
    def positive_index(self) -> int:
        """Position of the positive class; -1 when the task is not a yes/no question."""
        return self.classes.index(self.positive) if self.positive else -1


class Card(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a model means; read from ``card.toml``."""

    name: str
    version: str
    onnx_sha256: str
    tasks: list[Task]
    window: Window = Window()       # what the network sees of a frame, and its scaling
    summary: str = ""               # one sentence for a list of models
    input: str = "images"           # name of the ONNX input, (B, 1, H, W) float32
    geometry: str = ""              # name of a second input, (B, 4) float32; "" = has none
    pools: list[int] = []           # pooling factors it was trained for; empty = the window's
    architecture: str = ""          # file in xfel_classify/learn/networks
    detectors: list[str] = []       # kinds it was trained for; empty = any
    photon_energy_eV: list[float] = []     # lowest and highest of the training; empty = any
    licence: str = ""
    tolerance: dict[str, float] = {}       # precision -> largest difference from check.npz
    provenance: dict[str, Any] = {}
    metrics: dict[str, Any] = {}

    def task(self, name: str) -> Task:
        """The task of that name."""
        for task in self.tasks:
            if task.name == name:
                return task
        raise ModelInvalid(f"model {self.name} has no task {name!r}; it has "
                           f"{', '.join(t.name for t in self.tasks)}")

    def tolerance_of(self, precision: str) -> float:
        """Largest allowed difference of a probability at ``precision`` ("float32", ...)."""
        return self.tolerance.get(precision, FLOAT32_TOLERANCE)


@dataclass(frozen=True)
class Model:
    """A verified model: its card and the directory with its files."""

    card: Card
    directory: Path

    @property
    def name(self) -> str:
        return self.card.name

    @property
    def version(self) -> str:
        return self.card.version

    @property
    def sha256(self) -> str:
        """Of the ONNX file, hexadecimal."""
        return self.card.onnx_sha256

    @property
    def window(self) -> Window:
        return self.card.window

    @property
    def onnx_path(self) -> Path:
        return self.directory / ONNX

    @property
    def check_path(self) -> Path:
        return self.directory / CHECK


# --- reading ------------------------------------------------------------------------------------

def read_card(path: Path) -> Card:
    """The card in a TOML file; :class:`ModelInvalid` names a wrong key and the valid ones."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelNotFound(f"no {CARD} in {path.parent}: a model is a directory with {CARD}, "
                            f"{ONNX} and {CHECK}; give its path or its name") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ModelInvalid(f"card {path} cannot be read: {error}; fetch the model again or "
                           "correct the card") from error
    return card_from_table(table, str(path))


def card_from_table(table: Mapping[str, Any], where: str) -> Card:
    """A checked :class:`Card` from the tables of a TOML file."""
    parts = dict(table)
    try:
        parts["tasks"] = [struct(Task, task, f"card {where}: [[tasks]]")
                          for task in table.get("tasks", [])]
        parts["window"] = _window(table.get("window", {}), f"card {where}: [window]")
        card = struct(Card, parts, f"card {where}")
    except ConfigurationError as error:
        raise ModelInvalid(str(error)) from error
    if not card.tasks:
        raise ModelInvalid(f"card {where} has no [[tasks]]; state at least one with name, output "
                           "and classes")
    for task in card.tasks:
        if wrong := _wrong_kind(task):
            raise ModelInvalid(f"card {where}: task {task.name} {wrong}")
        if task.positive and task.positive not in task.classes:
            raise ModelInvalid(f"card {where}: task {task.name} calls {task.positive!r} positive, "
                               f"its classes are {', '.join(task.classes)}")
        if not 0.0 <= task.threshold <= 1.0:
            raise ModelInvalid(f"card {where}: task {task.name} has the threshold "
                               f"{task.threshold}; a probability lies between 0 and 1")
    if any(pool < 1 for pool in card.pools):
        raise ModelInvalid(f"card {where}: pools are {card.pools}; a pooling factor is at least 1")
    return card


def _wrong_kind(task: Task) -> str:
    """What is wrong about the kind of a task, or ""."""
    if task.kind not in ("classes", "regression"):
        return f"is of kind {task.kind!r}; valid are classes, regression"
    if task.transform not in ("none", "reciprocal"):
        return f"has the transform {task.transform!r}; valid are none, reciprocal"
    if task.kind == "classes" and not task.classes:
        return "has no classes; name them, or state kind = \"regression\""
    if task.kind == "regression" and (task.classes or task.positive):
        return "is a regression and has classes; leave them out"
    return ""


def _window(table: Mapping[str, Any], where: str) -> Window:
    names = [field.name for field in fields(Window)]
    for key in table:
        if key not in names:
            close = difflib.get_close_matches(key, names, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ConfigurationError(f"{where}: unknown key {key!r}; valid keys are "
                                     f"{', '.join(names)}{hint}")
    try:
        return msgspec.convert(dict(table), Window)
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"{where}: {error}") from error


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def load_model(directory: str | Path) -> Model:
    """The model in ``directory`` (or beside an ``.onnx`` or card file), its hash verified.

    Raises :class:`ModelNotFound` when there is none and :class:`ModelInvalid` when card and
    network do not belong together.
    """
    directory = Path(directory).expanduser()
    if directory.suffix in (".onnx", ".toml"):
        directory = directory.parent
    card = read_card(directory / CARD)
    model = Model(card, directory)
    try:
        found = sha256_of(model.onnx_path)
    except OSError as error:
        raise ModelInvalid(f"model {card.name} in {directory} has no readable {ONNX}: "
                           f"{error}; fetch the model again") from error
    if found != card.onnx_sha256.lower():
        raise ModelInvalid(
            f"model {card.name} in {directory}: the card promises sha256 "
            f"{card.onnx_sha256[:12]}..., {ONNX} has {found[:12]}...; the file is damaged or "
            "belongs to another card: fetch the model again"
        )
    return model


# --- search --------------------------------------------------------------------------------------

def shipped_directory() -> Path:
    """Where the models of the package are: inside a wheel, else in the source tree."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "shipped_engines"
    return installed if installed.is_dir() else package.parent / "engines"


def search_path() -> list[Path]:
    """Directories that hold models (or are one), in the order in which they are searched."""
    places = [Path(part).expanduser()
              for part in os.environ.get(MODELS_VARIABLE, "").split(os.pathsep) if part]
    for entry in sorted(entry_points(group=MODELS_GROUP), key=lambda e: e.name):
        place = entry.load()
        places.append(Path(place() if callable(place) else place))
    places.append(shipped_directory())
    return places


def _candidates() -> list[Path]:
    found: list[Path] = []
    for place in search_path():
        if (place / CARD).is_file():
            inside = [place]
        elif place.is_dir():
            inside = sorted(child for child in place.iterdir() if (child / CARD).is_file())
        else:
            inside = []
            log.warning("model directory %s does not exist", place)
        found += [path for path in inside if path not in found]
    return found


def survey() -> list[tuple[Path, Model | ModelError]]:
    """Every model directory on the search path with its model, or the reason it is unusable."""
    result: list[tuple[Path, Model | ModelError]] = []
    for directory in _candidates():
        try:
            result.append((directory, load_model(directory)))
        except ModelError as error:
            result.append((directory, error))
    return result


def list_models() -> list[Model]:
    """Usable models on the search path, first one of each name; unusable ones are logged.

    Raises :class:`ModelInvalid` when two models of one name differ.
    """
    chosen: dict[str, Model] = {}
    for directory, found in survey():
        if isinstance(found, Model):
            _same(chosen.setdefault(found.name, found), found)
        else:
            log.warning("model in %s is unusable: %s", directory, found)
    return list(chosen.values())


def _same(first: Model, second: Model) -> None:
    if first.sha256 != second.sha256:
        raise ModelInvalid(
            f"model {first.name} exists twice and differs: {first.directory} "
            f"({first.sha256[:12]}...) and {second.directory} ({second.sha256[:12]}...); remove "
            "one, rename one in its card, or give the path of the one you mean"
        )


def find_model(name_or_path: str | Path | Model) -> Model:
    """The model of that name on the search path, or in that directory.

    A string with a path separator, an ``.onnx`` file, or a ``Path`` is taken as a path; anything
    else is a name.  Raises :class:`ModelNotFound` (naming what exists) or :class:`ModelInvalid`.
    """
    if isinstance(name_or_path, Model):
        return name_or_path
    if (isinstance(name_or_path, Path) or os.sep in name_or_path
            or name_or_path.endswith(".onnx") or name_or_path in (".", "..")):
        return load_model(name_or_path)
    matches: list[Model] = []
    others: list[str] = []
    for directory, found in survey():
        if isinstance(found, ModelError):
            if directory.name == name_or_path:
                raise found
            log.debug("model in %s is unusable: %s", directory, found)
        elif found.name == name_or_path:
            matches.append(found)
        else:
            others.append(found.name)
    if not matches:
        close = difflib.get_close_matches(name_or_path, others, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ModelNotFound(
            f"no model is called {name_or_path!r}{hint}; found: {', '.join(others) or 'none'}. "
            f"Searched {', '.join(map(str, search_path()))}: add a directory with "
            f"${MODELS_VARIABLE}, or give a path such as ./{name_or_path}"
        )
    for other in matches[1:]:
        _same(matches[0], other)
    return matches[0]


# --- check ---------------------------------------------------------------------------------------

@dataclass(frozen=True)
class BackendCheck:
    """How one runtime reproduced ``check.npz``."""

    backend: str
    precision: str
    images: int
    difference: float       # largest over images and outputs; NaN when it did not run
    tolerance: float
    message: str = ""       # why it did not run

    @property
    def passed(self) -> bool:
        return not self.message and self.difference <= self.tolerance


@dataclass(frozen=True)
class CheckReport:
    """The result of :func:`check_model`: one line per runtime."""

    model: Model
    backends: tuple[BackendCheck, ...]

    @property
    def passed(self) -> bool:
        return bool(self.backends) and all(check.passed for check in self.backends)

    def __str__(self) -> str:
        lines = [f"{self.model.name} {self.model.version} sha256 {self.model.sha256[:12]}..."]
        for check in self.backends:
            verdict = "ok" if check.passed else "FAILED"
            detail = check.message or (f"largest difference {check.difference:.2e} "
                                       f"(allowed {check.tolerance:.0e}) on {check.images} images")
            lines.append(f"  {check.backend:<12} {check.precision:<8} {verdict}: {detail}")
        return "\n".join(lines)


def read_check(model: Model) -> tuple[np.ndarray, np.ndarray | None, dict[str, np.ndarray]]:
    """(images_BHW, geometry_B4 or None, {output name: expected_BK}) of a model's ``check.npz``."""
    try:
        with np.load(model.check_path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except FileNotFoundError as error:
        raise ModelInvalid(f"model {model.name} has no {CHECK} in {model.directory}; export the "
                           "model again, it writes one") from error
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ModelInvalid(f"{model.check_path} cannot be read: {error}; fetch the model "
                           "again") from error
    wanted = [task.output for task in model.card.tasks]
    inputs = ["images", "geometry"] if model.card.geometry else ["images"]
    missing = [name for name in [*inputs, *wanted] if name not in arrays]
    if missing:
        raise ModelInvalid(f"{model.check_path} lacks {', '.join(missing)}; it holds "
                           f"{', '.join(arrays)}: export the model again")
    images_BHW = arrays["images"].astype(np.float32)
    geometry_B4 = arrays["geometry"].astype(np.float32) if model.card.geometry else None
    return images_BHW, geometry_B4, {name: arrays[name] for name in wanted}


def check_model(model: Model | str | Path, backend: str = "all") -> CheckReport:
    """Run ``check.npz`` through one runtime, or through every one that is installed ("all").

    A runtime that is present but fails is a failed line of the report, not an exception; a named
    backend that is absent raises.  The model itself being unusable raises ``ModelInvalid``.
    """
    from . import available_backends, open_engine

    model = load_model(find_model(model).directory)
    images_BHW, geometry_B4, expected = read_check(model)
    checks = []
    for name in available_backends(model) if backend == "all" else [backend]:
        try:
            with open_engine(model, backend=name) as engine:
                outputs = engine.infer(images_BHW, geometry_B4)
        except ModelInvalid as error:
            checks.append(BackendCheck(name, "", len(images_BHW), float("nan"), 0.0, str(error)))
            continue
        difference = max(_difference(outputs[key], expected[key]) for key in expected)
        checks.append(BackendCheck(engine.name, engine.precision, len(images_BHW), difference,
                                   model.card.tolerance_of(engine.precision)))
    return CheckReport(model, tuple(checks))


def _difference(found_BK: np.ndarray, expected_BK: np.ndarray) -> float:
    """Largest absolute difference; infinite when shapes differ or a value is not finite."""
    if found_BK.shape != expected_BK.shape:
        return float("inf")
    difference = np.abs(found_BK.astype(np.float64) - expected_BK)
    return float(difference.max(initial=0.0)) if np.isfinite(difference).all() else float("inf")
