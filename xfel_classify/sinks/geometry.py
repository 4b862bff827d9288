"""The detector geometry of a run as ``{stem}.geom``, which describes ``{stem}.cxi`` to CrystFEL.

    indexamajig -i {stem}.lst -g {stem}.geom --peaks=cxi -o {stem}.stream
"""
from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from ..core import RunResult
from ..detectors.crystfel import write_crystfel_geom
from .staging import staged_bytes

log = logging.getLogger(__name__)


class Sink:
    """Writes ``{stem}.geom``."""

    name = "geometry"

    class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
        """Numbers that override what the run states."""

        clen_m: float | None = None             # sample to detector distance
        photon_energy_eV: float | None = None
        adu_per_eV: float | None = None         # of values in ADU

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or self.Config()

    def write(self, result: RunResult, directory: Path) -> list[str]:
        """Write ``{stem}.geom.tmp``; returns the final name, nothing without a geometry.

        Raises :class:`OutputError`, and :class:`GeometryError` when the pixels do not lie on flat
        panels, which is all that a CrystFEL geometry can express.
        """
        if result.constants is None:
            log.warning("no %s.geom is written: the run has no geometry; give one with --geometry",
                        result.stem)
            return []
        geometry = result.constants.geometry
        comments = [
            f"xfel_classify: {result.run.detector} of {result.run.exp} run {result.run.run}",
            f"geometry: {geometry.name or 'unnamed'}",
            f"indexamajig -i {result.stem}.lst -g {result.stem}.geom --peaks=cxi "
            f"-o {result.stem}.stream",
        ]
        given: dict[str, Any] = {}
        if self.config.clen_m is not None:
            given["clen"] = self.config.clen_m
        elif geometry.distance_m is None and not _stated(
            result, ("distance_m", "detector_distance_m")
        ):
            comments.append("the run does not state the detector distance: replace clen by a "
                            "number in metres")
        if self.config.photon_energy_eV is not None:
            given["photon_energy"] = self.config.photon_energy_eV
        elif not geometry.photon_energy_eV and not _stated(result, ("photon_energy_eV",)):
            comments.append("the run does not state the photon energy: replace photon_energy by "
                            "a number in eV")
        text = write_crystfel_geom(
            geometry, unit=result.constants.unit, adu_per_eV=self.config.adu_per_eV,
            comments=tuple(comment.replace("\n", " ") for comment in comments), **given)
        name = f"{result.stem}.geom"
        staged_bytes(Path(directory), name, text.encode())
        return [name]


def _stated(result: RunResult, names: tuple[str, ...]) -> bool:
    """Whether any event has a finite value in a scalar column of one of these names."""
    return any(
        path.rpartition("/")[2] in names
        and bool(np.isfinite(np.asarray(values, np.float64)).any())
        for path, values in result.rows.items()
        if path in result.columns and result.columns[path].shape == ()
    )
