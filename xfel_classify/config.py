"""Run configuration (TOML) and the lookup of components by name.

A configuration is a table per part of the run::

    [source]            # use = "psana2" | "hdf5" | "images" | "simulated" | "my_file:MyClass"
    use = "psana2"
    exp = "mfxl1033223"
    run = 95

    [[analyses]]
    use = "classify"
    model = "sfx-hit"

    [[analyses]]
    use = "peakfinder8"
    only = "hit/label"

    [[sinks]]
    use = "cxi"

    [loop]
    batch = 8

Each component declares its own ``Config`` struct beside its class; keys it does not know are
errors that name the valid ones.  A component is found, in this order: registered in this process,
entry point ``xfel_classify.<kind>``, built-in file of that name, ``my_file:MyClass``.
"""
from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
import tomllib
from collections.abc import Iterable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal

import msgspec
import tomli_w

from .core import ConfigurationError, UnknownComponent

# kind -> class name that a built-in file of that kind defines
KINDS = {"sources": "Source", "analyses": "Analysis", "sinks": "Sink", "engines": "Engine"}

_registered: dict[tuple[str, str], type] = {}


class LoopConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How events are batched and how often finished work is made durable."""

    batch: int = 8                  # events per engine call
    max_events: int | None = None   # stop after this many events of the run
    checkpoint_s: float = 20.0      # seconds between durable checkpoints of a rank
    keep_parts: bool = False        # keep the per-rank parts after the join
    # corrections of the full frames that peak finders and statistics see; a network's window has
    # the calibration it was trained with
    common_mode: list[Literal["rows", "columns", "banks"]] = []
    mask_saturated: bool = False    # saturated pixels count as masked
    hits: str = "auto"              # column that selects hits; auto = a model's, else the peaks'


class RunConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole configuration of a run, as stored in its summary."""

    source: dict[str, Any] = {}
    analyses: list[dict[str, Any]] = []
    sinks: list[dict[str, Any]] = []
    loop: LoopConfig = LoopConfig()


def register(kind: str, name: str, cls: type) -> None:
    """Make ``cls`` available as ``use = name`` in this process."""
    if kind not in KINDS:
        raise ConfigurationError(f"cannot register a {kind!r}; kinds are {', '.join(KINDS)}")
    _registered[kind, name] = cls


def builtin_names(kind: str) -> list[str]:
    """Names of the components of ``kind`` that come with the package."""
    folder = Path(__file__).parent / kind
    marker = f"class {KINDS[kind]}"
    return sorted(
        path.stem.replace("_", "-") if kind == "analyses" and path.stem.startswith("psana")
        else path.stem
        for path in folder.glob("*.py")
        if not path.stem.startswith("_") and marker in path.read_text(encoding="utf-8")
    )


def component(kind: str, name: str) -> Any:
    """The class that ``use = name`` means for ``kind``.

    Raises :class:`UnknownComponent` naming the known ones and the nearest.
    """
    if (kind, name) in _registered:
        return _registered[kind, name]
    for entry in entry_points(group=f"xfel_classify.{kind}"):
        if entry.name == name:
            return entry.load()
    if ":" in name:
        return _from_file(kind, name)
    module = name.replace("-", "_")
    if module.isidentifier() and (Path(__file__).parent / kind / f"{module}.py").exists():
        loaded = importlib.import_module(f"xfel_classify.{kind}.{module}")
        if hasattr(loaded, KINDS[kind]):
            return getattr(loaded, KINDS[kind])
    known = builtin_names(kind) + [n for k, n in _registered if k == kind]
    known += [e.name for e in entry_points(group=f"xfel_classify.{kind}")]
    raise UnknownComponent(
        f"no {kind.removesuffix('s')} is called {name!r}; known: {', '.join(sorted(known))}"
        f"{_nearest(name, known)}. A class of your own: use = \"my_file:MyClass\"."
    )


def _from_file(kind: str, name: str) -> type:
    """``my_file:MyClass`` or ``path/to/my_file.py:MyClass``; the working directory is searched."""
    where, _, attribute = name.rpartition(":")
    path = Path(where if where.endswith(".py") else where.replace(".", "/") + ".py")
    if path.exists():
        key = f"xfel_classify_user_{path.stem}"
        spec = importlib.util.spec_from_file_location(key, path)
        if spec is None or spec.loader is None:
            raise UnknownComponent(f"{path} cannot be imported as Python")
        module = sys.modules.get(key)
        if module is None or getattr(module, "__file__", None) != str(path):
            module = importlib.util.module_from_spec(spec)
            sys.modules[key] = module
            spec.loader.exec_module(module)
    else:
        try:
            module = importlib.import_module(where)
        except ModuleNotFoundError as error:
            raise UnknownComponent(
                f"{kind.removesuffix('s')} {name!r}: neither the file {path} nor a module "
                f"{where} was found; give a path relative to where the job starts"
            ) from error
    if not hasattr(module, attribute):
        raise UnknownComponent(f"{module.__name__} has no class {attribute!r} (asked as {name!r})")
    return getattr(module, attribute)


def build(kind: str, table: Mapping[str, Any], **given: Any) -> Any:
    """Construct the component that ``table["use"]`` names from the rest of ``table``."""
    if "use" not in table:
        raise ConfigurationError(f"a table of [{kind}] has no 'use'; say which component, e.g. "
                                 f"use = {builtin_names(kind)[0]!r}")
    cls = component(kind, str(table["use"]))
    return cls(struct(cls.Config, {k: v for k, v in table.items() if k != "use"},
                      f"{kind.removesuffix('s')} {table['use']}"), **given)


def struct(cls: Any, values: Mapping[str, Any], where: str) -> Any:
    """``values`` checked and converted to the struct ``cls``; unknown keys name the nearest."""
    names = [field.name for field in msgspec.structs.fields(cls)]
    for key in values:
        if key not in names:
            raise ConfigurationError(
                f"{where}: unknown key {key!r}; valid keys are {', '.join(names)}"
                f"{_nearest(key, names)}"
            )
    try:
        return msgspec.convert(dict(values), cls, strict=True)
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"{where}: {error}") from error


def _nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def load(path: str | Path | None, settings: Iterable[str] = ()) -> dict[str, Any]:
    """The tables of a TOML file (or none) with ``section.key=value`` settings laid over.

    A summary (``.h5``) is read as well: the configuration it was made with is used again.
    """
    tables: dict[str, Any] = {}
    if path is not None:
        tables = loads(_text(Path(path)), str(path))
    for setting in settings:
        apply_setting(tables, setting)
    return tables


def loads(text: str, where: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"{where} is not valid TOML: {error}") from error


def _text(path: Path) -> str:
    if not path.exists():
        raise ConfigurationError(f"configuration file {path} does not exist")
    if path.suffix in (".h5", ".hdf5"):
        import h5py

        with h5py.File(path) as file:
            if "configuration" not in file.attrs:
                raise ConfigurationError(f"{path} holds no configuration; give a TOML file or a "
                                         "summary written by xfel-classify run")
            return str(file.attrs["configuration"])
    try:
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise ConfigurationError(f"configuration file {path} cannot be read: {error}") from error


def apply_setting(tables: dict[str, Any], setting: str) -> None:
    """Lay ``SECTION.KEY=VALUE`` over the tables, in place.

    ``source.run=96``, ``peakfinder8.minimum_snr=7`` (a component's name is a section).
    """
    key, equals, text = setting.partition("=")
    path = [part.strip() for part in key.split(".")]
    if not equals or len(path) < 2 or not all(path):
        raise ConfigurationError(f"--set {setting!r}: expected SECTION.KEY=VALUE, for example "
                                 "--set source.run=96 or --set peakfinder8.minimum_snr=7")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text            # an unquoted word is a string
    section = path[0]
    if section in ("source", "loop"):
        table = tables.setdefault(section, {})
    else:
        lists = [t for kind in ("analyses", "sinks") for t in tables.setdefault(kind, [])
                 if section in (t.get("use"), t.get("model"), t.get("name"))]
        if not lists:
            used = [t["use"] for kind in ("analyses", "sinks") for t in tables.get(kind, [])
                    if "use" in t]
            raise ConfigurationError(f"--set {setting!r}: no section {section!r}; sections are "
                                     f"source, loop, {', '.join(used)}")
        table = lists[0]
    for part in path[1:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ConfigurationError(f"--set {setting!r}: {part!r} is not a table")
    table[path[-1]] = value


def resolve(tables: Mapping[str, Any]) -> RunConfig:
    """Checked configuration of a run."""
    return struct(RunConfig, tables, "configuration")


def dumps(config: RunConfig) -> str:
    """TOML text of a resolved configuration; None means "not set" and is left out."""
    return tomli_w.dumps(_without_none(msgspec.to_builtins(config)))


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_none(v) for v in value]
    return value
