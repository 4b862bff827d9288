"""Write a simulated run, with its constants and its truth, for psana2 or as HDF5 files.

"sfx" is a run of a detector, or with --format set a labelled set of crops; "stills" is a set of
labelled quadrants as the lattice and resolution networks see them, or with --format hdf5, cxi or
xtc2 a run of a detector.  "spi" is a set of labelled images of single particles, or with --format a
run of a pnCCD (of a Jungfrau 1M for xtc2).  A set is one HDF5 file.

The same seed and run number give the same events in all formats.  Everything is made up: the
crystal, the beam and the faults of the detector are drawn from the preset's ranges.
"""
from __future__ import annotations

import argparse
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..core import ConfigurationError, Geometry
from ..detectors import detector, read_geometry
from ..simulate.conditions import PAPER_RUNS, PRESETS, Conditions, PaperRun, draw_conditions
from ..simulate.hdf5_runs import write_cxi_run, write_hdf5_run
from ..simulate.raw_epix10ka import Epix10kaRun
from ..simulate.raw_runs import DetectorRun, JungfrauRun, PhotonSource, RunFiles
from ..simulate.sfx import SimulatedRun
from ..simulate.spi_conditions import SPI_PRESETS, spi_preset
from ..simulate.spi_particles import STRUCTURES_VARIABLE
from ..simulate.stills_conditions import STILL_PRESETS
from ..simulate.stills_frames import StillFrames, StillRunConditions
from ..simulate.xtc2_runs import write_xtc2_run

log = logging.getLogger(__name__)

FORMATS = ("set", "hdf5", "cxi", "xtc2")
DETECTORS: dict[str, type[DetectorRun]] = {"jungfrau": JungfrauRun, "epix10ka": Epix10kaRun}
_NAMES = {"jungfrau": "Jungfrau", "epix10ka": "ePix10ka"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", choices=("sfx", "stills", "spi"),
                        help="sfx: a run with protein crystals in a jet; stills: labelled "
                             "quadrants (lattices, resolution); spi: single particles")
    parser.add_argument("--out", required=True, metavar="DIR", help="directory for the run")
    parser.add_argument("--format", choices=FORMATS,
                        help="of a run; xtc2 needs psana2 (default: hdf5 for sfx, for stills and "
                             "spi a labelled set instead of a run)")
    parser.add_argument("--events", type=int, metavar="N",
                        help="default: 100, with the preset paper as many as the run had")
    parser.add_argument("--detector", choices=tuple(DETECTORS), default="jungfrau",
                        help="of sfx and stills runs; both switch gain pixel by pixel (default: "
                             "jungfrau)")
    parser.add_argument("--segments", type=int, metavar="N",
                        help="panels of the detector; Jungfrau 1, 2, 8 (the full 4M), 32; ePix10ka "
                             "1, 4 (quad), 16 (2M) (default: 2; ePix10ka 4)")
    parser.add_argument("--seed", type=int, default=0, metavar="S",
                        help="of the data set; a run is drawn from seed and run number")
    parser.add_argument("--run", type=int, default=95, metavar="R", help="default: 95")
    parser.add_argument("--exp", default="mfxsim", metavar="E",
                        help="experiment name, letters and digits (default: mfxsim)")
    parser.add_argument("--preset", metavar="NAME",
                        help="range of conditions that is drawn from (default: training for sfx, "
                             "resolution for stills, paper for spi). sfx: "
                             f"{', '.join(PRESETS)}, each also with changes, as in "
                             "training:ice_chance=1, and paper: of the run of the hit finder's "
                             "study that --run names, 90 to 100, with its share of hits (also "
                             f"paper_stray, paper_full); stills: {', '.join(STILL_PRESETS)}; spi: "
                             f"{', '.join(SPI_PRESETS)}, each also with switches, as in "
                             "paper:fluence_sigma=0.3,gap_px=16")
    parser.add_argument("--hit-fraction", type=float, metavar="F",
                        help="share of hits, 0 to 1 (default: drawn; spi runs: 0.5; stills "
                             "runs: 1)")
    parser.add_argument("--geometry", metavar="FILE", type=Path,
                        help="runs: psana .data or CrystFEL .geom file of the detector instead of "
                             "the package's (--segments is then the file's); sets of stills: of "
                             "any detector, whose panels lie under the quadrants, tilted by up to "
                             "3 degrees")
    parser.add_argument("--crystal", metavar="FILE", type=Path,
                        help="sfx: PDB or mmCIF file of the crystal, structure factors by gemmi "
                             "(default: a made-up form with Wilson statistics, another in each "
                             "run)")
    parser.add_argument("--structures", metavar="DIR",
                        help="spi: PDB or mmCIF files of the particles; the package's stand-ins "
                             f"take the place of missing ones (default: ${STRUCTURES_VARIABLE})")
    parser.add_argument("--device", metavar="D", default="",
                        help="simulate with torch on cuda, cuda:N or cpu-torch (default: the "
                             "compiled code on the processor); not for runs of stills")
    parser.add_argument("--processes", type=int, default=1, metavar="N",
                        help="sets of sfx and spi: worker processes; the file does not depend on "
                             "it")


def execute(args: argparse.Namespace) -> int:
    if args.events is None:
        args.events = 100
        if args.kind == "sfx" and _is_paper(args.preset or ""):
            args.events = _paper_run(args.run).events
    if args.kind == "stills" and args.format in (None, "set"):
        from ..learn.labelled_sets import write_labelled_set

        preset = args.preset or "resolution"
        layout = str(args.geometry or "")
        on = f"_{args.geometry.stem}" if args.geometry else ""
        path = Path(args.out) / f"stills_{preset}{on}_s{args.seed}.h5"
        print(write_labelled_set(path, preset, args.seed, args.events, layout=layout,
                                 device=args.device, progress=_Lines(args.events)))
        return 0
    if args.kind == "spi":
        return _execute_spi(args)
    if args.format == "set":
        return _execute_crops(args)
    if args.device and args.kind == "stills":
        raise ConfigurationError(
            f"a run of stills on the device {args.device!r} was asked for; sets of stills, and "
            "all of sfx and spi, can be simulated with torch; leave --device out")
    usual = {"sfx": "training", "stills": "resolution"}[args.kind]
    files = write_run(Path(args.out), form=args.format or "hdf5", events=args.events,
                      segments=args.segments, seed=args.seed, number=args.run, exp=args.exp,
                      preset=args.preset or usual, hit_fraction=args.hit_fraction,
                      kind=args.kind, geometry=args.geometry, detector=args.detector,
                      device=args.device, crystal=args.crystal)
    for path in (*files.files, files.constants, files.truth):
        print(path)
    return 0


def _execute_crops(args: argparse.Namespace) -> int:
    """Crops of sfx: runs 0, 1, ... of the seed."""
    from ..learn.crop_sets import write_crop_set

    preset = args.preset or "training"
    share = args.hit_fraction
    _check_share(share)

    def draw(run: int) -> Conditions:
        return _of_crystal(draw_conditions(args.seed, run, preset, hit_fraction=share),
                           args.crystal)

    draw(0)             # a wrong preset is named before anything is written
    name = preset.replace(":", "_").replace(",", "_").replace("=", "")
    if args.crystal:
        name = f"{name}_{args.crystal.name.partition('.')[0]}"
    print(write_crop_set(
        Path(args.out) / f"sfx_{name}_s{args.seed}.h5", draw, args.events,
        processes=args.processes, device=args.device, progress=_Lines(args.events)))
    return 0


def _execute_spi(args: argparse.Namespace) -> int:
    preset = args.preset or "paper"
    spi_preset(preset)
    if args.format in (None, "set"):
        from ..simulate.spi_sets import write_spi_set

        name = preset.replace(":", "_").replace(",", "_").replace("=", "").replace("+", "_")
        print(write_spi_set(Path(args.out) / f"spi_{name}_s{args.seed}.h5", preset, args.seed,
                            args.events, structures=args.structures, processes=args.processes,
                            device=args.device, progress=_Lines(args.events)))
        return 0
    files = write_run(Path(args.out), form=args.format, events=args.events, segments=2,
                      seed=args.seed, number=args.run, exp=args.exp, preset=preset,
                      hit_fraction=args.hit_fraction, kind="spi", structures=args.structures,
                      device=args.device)
    for path in (*files.files, files.constants, files.truth):
        print(path)
    return 0


def write_run(directory: Path, *, form: str, events: int, segments: int | None, seed: int,
              number: int, exp: str, preset: str, hit_fraction: float | None = None,
              kind: str = "sfx", structures: str | None = None, geometry: Path | None = None,
              detector: str = "jungfrau", device: str = "",
              crystal: Path | None = None) -> RunFiles:
    """Draw the conditions of run ``number`` and write its events; logs how far it is.

    ``geometry`` is a file of the detector ("jungfrau" or "epix10ka") that the events of sfx and
    stills are seen through; ``segments`` None: the kind's usual number.
    ``crystal`` is a PDB or mmCIF file (sfx).
    ``kind`` "spi" writes single particles on a pnCCD (xtc2: on a Jungfrau 1M).  ``device``
    computes photons of sfx and the diffraction of spi with torch.
    Raises :class:`ConfigurationError` for values that no run can have.
    """
    if events < 0:
        raise ConfigurationError(f"{events} events were asked for; give 0 or more")
    _check_share(hit_fraction)
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
                            structures=structures, device=device)
        return writers[form](directory, particles, events, exp=exp, progress=progress)
    run = _crystals(kind, seed, number, preset, hit_fraction, DETECTORS[detector], segments,
                    geometry, device, crystal)
    return writers[form](directory, run, events, exp=exp, progress=progress)


def _crystals(kind: str, seed: int, number: int, preset: str, hit_fraction: float | None,
              on: type[DetectorRun], segments: int | None, path: Path | None,
              device: str, crystal: Path | None) -> DetectorRun:
    """A run of crystals on a detector, of the package's geometry or a file's."""
    conditions: Any
    if kind == "stills":
        conditions = StillRunConditions.draw(seed, number, preset)
        share = 1.0 if hit_fraction is None else hit_fraction

        def photons(geometry: Geometry) -> PhotonSource:
            return StillFrames(conditions, geometry, hit_fraction=share)
    else:
        if _is_paper(preset):
            of_paper = _paper_run(number)
            preset = of_paper.preset + preset.removeprefix("paper")
            hit_fraction = of_paper.hit_fraction if hit_fraction is None else hit_fraction
        conditions = _of_crystal(draw_conditions(seed, number, preset), crystal)
        if hit_fraction is not None:
            conditions = replace(conditions, hit_fraction=hit_fraction)

        def photons(geometry: Geometry) -> PhotonSource:
            run = SimulatedRun(conditions, geometry, calm=True)
            if not device:
                return run
            from ..simulate.sfx_torch import RunOnDevice

            return RunOnDevice(run, device)
    if path is None:
        return on(conditions, segments, photons=photons)
    panel = detector(on.kind).panel_shape_SF or (512, 1024)
    found = read_geometry(path)
    count, rest = divmod(found.x_m_PSF.size, panel[0] * panel[1])
    if rest or found.shape[2] != panel[1]:
        raise ConfigurationError(
            f"geometry {path} was to be of a {_NAMES[on.kind]}, panels of {panel[0]} x {panel[1]} "
            f"pixels; it describes {found.shape}; name its --detector, give a geometry of a "
            f"{_NAMES[on.kind]}, or simulate a set of stills")
    geometry = read_geometry(path, (count, *panel), on.kind)
    run = on(conditions, count, photons=lambda _: photons(geometry))
    run.geometry, run.geometry_text = geometry, path.read_text(encoding="utf-8")
    return run


def _check_share(hit_fraction: float | None) -> None:
    if hit_fraction is not None and not 0 <= hit_fraction <= 1:
        raise ConfigurationError(f"a share of hits of {hit_fraction} was asked for; give a number "
                                 "from 0 to 1")


def _of_crystal(conditions: Conditions, model: Path | None) -> Conditions:
    """The conditions with the crystal of a file, mosaic as the drawn one was."""
    if model is None:
        return conditions
    from ..simulate.crystal_models import crystal_of_model

    drawn = conditions.crystal
    return replace(conditions, crystal=crystal_of_model(
        model, domain_A=drawn.domain_A, mosaicity_deg=drawn.mosaicity_deg))


def _is_paper(preset: str) -> bool:
    return preset.partition(":")[0] in ("paper", "paper_stray", "paper_full")


def _paper_run(number: int) -> PaperRun:
    """The run of the hit finder's study; raises :class:`ConfigurationError` where it had none."""
    for one in PAPER_RUNS:
        if one.run == number:
            return one
    raise ConfigurationError(
        f"run {number} of the hit finder's study was asked for; it has runs "
        f"{', '.join(str(one.run) for one in PAPER_RUNS)}; give one of them with --run")


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
