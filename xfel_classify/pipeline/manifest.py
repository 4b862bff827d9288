"""What the parts of a run belong to, kept beside them so that they can be joined without the run.

``run.json`` holds names, columns, attributes and the fingerprint that a resumed run must match;
``detector.npz`` the mask and the pixel positions that outputs need.
"""
from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from ..core import (
    Column,
    Constants,
    Geometry,
    OutputDamaged,
    OutputExists,
    Panel,
    RunInfo,
)

MANIFEST, DETECTOR = "run.json", "detector.npz"


@dataclass(frozen=True)
class Manifest:
    """Everything about a run that its parts do not say themselves."""

    run: RunInfo
    columns: Mapping[str, Column]
    attributes: Mapping[str, Any]
    fingerprint: Mapping[str, str]
    hits: str | None
    events_expected: int | None
    constants: Constants

    def write(self, parts: Path) -> None:
        """Store in ``parts``, the manifest last and under its name only when whole."""
        geometry = self.constants.geometry
        arrays = {"good": self.constants.good_PSF, "x_m": geometry.x_m_PSF,
                  "y_m": geometry.y_m_PSF, "z_m": geometry.z_m_PSF}
        if geometry.bad_PSF is not None:
            arrays["bad"] = geometry.bad_PSF
        fresh = parts / f"{DETECTOR}.tmp"
        with fresh.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        os.replace(fresh, parts / DETECTOR)
        fresh = parts / f"{MANIFEST}.tmp"
        fresh.write_text(json.dumps({
            "run": msgspec.to_builtins(self.run),
            "columns": {name: _column(column) for name, column in self.columns.items()},
            "attributes": self.attributes, "fingerprint": self.fingerprint, "hits": self.hits,
            "events_expected": self.events_expected,
            "constants": {"unit": self.constants.unit, "identity": self.constants.identity},
            "geometry": {
                "pixel_size_m": geometry.pixel_size_m, "distance_m": geometry.distance_m,
                "photon_energy_eV": geometry.photon_energy_eV, "name": geometry.name,
                "panels": [msgspec.to_builtins(panel) for panel in geometry.panels]},
        }, indent=1, default=_plain), encoding="utf-8")
        os.replace(fresh, parts / MANIFEST)

    def must_match(self, other: Manifest, parts: Path) -> None:
        """Raise :class:`OutputExists` unless ``other`` (wanted now) continues this one."""
        different = [key for key, value in other.fingerprint.items()
                     if self.fingerprint.get(key) != value]
        if different:
            raise OutputExists(
                f"the unfinished run in {parts} was made with other {', '.join(different)}; "
                "resume it with the configuration it was started with, or start again with "
                "--overwrite"
            )


def read_manifest(parts: Path) -> Manifest:
    """The manifest in ``parts``.  Raises :class:`OutputDamaged`."""
    try:
        stored = json.loads((parts / MANIFEST).read_text(encoding="utf-8"))
        with np.load(parts / DETECTOR, allow_pickle=False) as arrays:
            pixels = dict(arrays)
        geometry = Geometry(
            pixels["x_m"], pixels["y_m"], pixels["z_m"],
            panels=tuple(msgspec.convert(panel, Panel)
                         for panel in stored["geometry"].pop("panels")),
            bad_PSF=pixels.get("bad"), **stored["geometry"])
        return Manifest(
            run=msgspec.convert(stored["run"], RunInfo),
            columns={name: msgspec.convert(column, Column)
                     for name, column in stored["columns"].items()},
            attributes=stored["attributes"], fingerprint=stored["fingerprint"],
            hits=stored["hits"], events_expected=stored["events_expected"],
            constants=Constants(pixels["good"], geometry, **stored["constants"]))
    except (OSError, ValueError, KeyError, TypeError, msgspec.ValidationError) as error:
        raise OutputDamaged(f"{parts} is not the parts directory of a run: {error}; start the run "
                            "again with --overwrite") from error


def _column(column: Column) -> dict[str, Any]:
    plain = msgspec.to_builtins(column)
    missing = column.missing
    plain["missing"] = missing.item() if isinstance(missing, np.generic) else missing
    return plain


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else str(value)
