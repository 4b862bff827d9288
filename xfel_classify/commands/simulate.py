"""Write a simulated run, with its constants and its truth, for psana2 or as HDF5 files.

"sfx" is a run of a detector; "stills" is a set of labelled quadrants as the lattice and resolution
networks see them, in one HDF5 file.  "spi" is a set of labelled images of single particles in one
HDF5 file, or with --format hdf5, cxi or xtc2 a run of a pnCCD (of a Jungfrau 1M for xtc2).

The same seed and run number give the same events in all formats.  Everything is made up: the
crystal, the beam and the faults of the detector are drawn from the preset's ranges.
"""
from __future__ import annotations

import argparse
import logging
import time
from dataclasses import replace
from pathlib import Path

from ..core import ConfigurationError
from ..detectors import detector, read_geometry
from ..simulate.conditions import PRESETS, Conditions, draw_conditions
from ..simulate.hdf5_runs import write_cxi_run, write_hdf5_run
from ..simulate.raw_runs import JungfrauRun, RunFiles
from ..simulate.sfx import SimulatedRun
from ..simulate.spi_conditions import SPI_PRESETS, spi_preset
from ..simulate.spi_particles import STRUCTURES_VARIABLE
from ..simulate.stills_conditions import STILL_PRESETS
from ..simulate.xtc2_runs import write_xtc2_run

log = logging.getLogger(__name__)

FORMATS = ("set", "hdf5", "cxi", "xtc2")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", choices=("sfx", "stills", "spi"),
                        help="sfx: a run with protein crystals in a jet; stills: labelled "
                             "quadrants (lattices, resolution); spi: single particles")
    parser.add_argument("--out", required=True, metavar="DIR", help="directory for the run")
    parser.add_argument("--format", choices=FORMATS,
                        help="of a run; xtc2 needs psana2 (default: hdf5 for sfx, for spi a "
                             "labelled set instead of a run)")
    parser.add_argument("--events", type=int, default=100, metavar="N", help="default: 100")
    parser.add_argument("--segments", type=int, choices=(1, 2, 8), default=2,
                        help="panels of the Jungfrau; 8 = the full 4M detector (default: 2)")
    parser.add_argument("--seed", type=int, default=0, metavar="S",
                        help="of the data set; a run is drawn from seed and run number")
    parser.add_argument("--run", type=int, default=95, metavar="R", help="default: 95")
    parser.add_argument("--exp", default="mfxsim", metavar="E",
                        help="experiment name, letters and digits (default: mfxsim)")
    parser.add_argument("--preset", metavar="NAME",
                        help="range of conditions that is drawn from (default: training for sfx, "
                             "resolution for stills, paper for spi). sfx: "
                             f"{', '.join(PRESETS)}; stills: {', '.join(STILL_PRESETS)}; spi: "
                             f"{', '.join(SPI_PRESETS)}, each also with switches, as in "
                             "paper:fluence_sigma=0.3,gap_px=16")
    parser.add_argument("--hit-fraction", type=float, metavar="F",
                        help="share of hits, 0 to 1 (default: drawn; spi runs: 0.5)")
    parser.add_argument("--geometry", metavar="FILE", type=Path,
                        help="sfx: psana .data or CrystFEL .geom file of a Jungfrau instead of the "
                             "package's (--segments is then the file's); stills: of any detector, "
                             "whose panels lie under the quadrants, tilted by up to 3 degrees")
    parser.add_argument("--structures", metavar="DIR",
                        help="spi: PDB or mmCIF files of the particles; the package's stand-ins "
                             f"take the place of missing ones (default: ${STRUCTURES_VARIABLE})")
    parser.add_argument("--processes", type=int, default=1, metavar="N",
                        help="spi sets: worker processes; the file does not depend on it")


def execute(args: argparse.Namespace) -> int:
    if args.kind == "stills":
        from ..learn.labelled_sets import write_labelled_set

        preset = args.preset or "resolution"
        layout = str(args.geometry or "")
        on = f"_{args.geometry.stem}" if args.geometry else ""
        path = Path(args.out) / f"stills_{preset}{on}_s{args.seed}.h5"
        print(write_labelled_set(path, preset, args.seed, args.events, layout=layout,
                                 progress=_Lines(args.events)))
        return 0
    if args.kind == "spi":
        return _execute_spi(args)
    files = write_run(Path(args.out), form=args.format or "hdf5", events=args.events,
                      segments=args.segments, seed=args.seed, number=args.run, exp=args.exp,
                      preset=args.preset or "training", hit_fraction=args.hit_fraction,
                      geometry=args.geometry)
    for path in (*files.files, files.constants, files.truth):
        print(path)
    return 0


def _execute_spi(args: argparse.Namespace) -> int:
    preset = args.preset or "paper"
    spi_preset(preset)
    if args.format in (None, "set"):
        from ..simulate.spi_sets import write_spi_set

        name = preset.replace(":", "_").replace(",", "_").replace("=", "").replace("+", "_")
        print(write_spi_set(Path(args.out) / f"spi_{name}_s{args.seed}.h5", preset, args.seed,
                            args.events, structures=args.structures, processes=args.processes,
                            progress=_Lines(args.events)))
        return 0
    files = write_run(Path(args.out), form=args.format, events=args.events, segments=2,
                      seed=args.seed, number=args.run, exp=args.exp, preset=preset,
                      hit_fraction=args.hit_fraction, kind="spi", structures=args.structures)
    for path in (*files.files, files.constants, files.truth):
        print(path)
    return 0


def write_run(directory: Path, *, form: str, events: int, segments: int, seed: int, number: int,
              exp: str, preset: str, hit_fraction: float | None = None, kind: str = "sfx",
              structures: str | None = None, geometry: Path | None = None) -> RunFiles:
    """Draw the conditions of run ``number`` and write its events; logs how far it is.

    ``geometry`` is a file of a Jungfrau that the events are seen through (sfx).
    ``kind`` "spi" writes single particles on a pnCCD (xtc2: on a Jungfrau 1M).
    Raises :class:`ConfigurationError` for values that no run can have.
    """
    if events < 0:
        raise ConfigurationError(f"{events} events were asked for; give 0 or more")
    if hit_fraction is not None and not 0 <= hit_fraction <= 1:
        raise ConfigurationError(f"a share of hits of {hit_fraction} was asked for; give a number "
                                 "from 0 to 1")
    if not exp.isalnum():
        raise ConfigurationError(f"experiment name {exp!r}: use letters and digits only, since "
                                 "it becomes part of file names")
    writers = {"xtc2": write_xtc2_run, "cxi": write_cxi_run, "hdf5": write_hdf5_run}
    if form not in writers:
        raise ConfigurationError(f"a {kind} run in the format {form!r} was asked for; known "
                                 f"formats of runs: {', '.join(writers)}")
    progress = _Lines(events)
    if kind == "spi":
        from ..simulate.spi_runs import spi_run

        particles = spi_run(seed, number, preset, "jungfrau" if form == "xtc2" else "pnccd",
                            hit_fraction=0.5 if hit_fraction is None else hit_fraction,
                            structures=structures)
        return writers[form](directory, particles, events, exp=exp, progress=progress)
    conditions = draw_conditions(seed, number, preset)
    if hit_fraction is not None:
        conditions = replace(conditions, hit_fraction=hit_fraction)
    run = JungfrauRun(conditions, segments) if geometry is None else _through(conditions, geometry)
    return writers[form](directory, run, events, exp=exp, progress=progress)


def _through(conditions: Conditions, path: Path) -> JungfrauRun:
    """A run on the Jungfrau that a geometry file describes."""
    module = detector("jungfrau").panel_shape_SF or (512, 1024)
    found = read_geometry(path)
    segments, rest = divmod(found.x_m_PSF.size, module[0] * module[1])
    if rest or found.shape[2] != module[1]:
        raise ConfigurationError(
            f"geometry {path} was to be of a Jungfrau, modules of {module[0]} x {module[1]} "
            f"pixels; it describes {found.shape}; give one of a Jungfrau, or simulate stills")
    geometry = read_geometry(path, (segments, *module), "jungfrau")
    run = JungfrauRun(conditions, segments,
                      photons=lambda _: SimulatedRun(conditions, geometry, calm=True))
    run.geometry, run.geometry_text = geometry, path.read_text(encoding="utf-8")
    return run


class _Lines:
    """Says every few seconds how many events are written."""

    def __init__(self, events: int) -> None:
        self._events = events
        self._start = self._last = time.monotonic()

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if now - self._last < 5 and done < self._events:
            return
        self._last = now
        log.info("%d of %d events simulated, %.0f s", done, self._events, now - self._start)
