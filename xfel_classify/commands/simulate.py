"""Write a simulated run, with its constants and its truth, for psana2 or as HDF5 files.

"sfx" is a run of a detector; "stills" is a set of labelled quadrants as the lattice and resolution
networks see them, in one HDF5 file.

The same seed and run number give the same events in both formats.  Everything is made up: the
crystal, the beam and the faults of the detector are drawn from the preset's ranges.
"""
from __future__ import annotations

import argparse
import logging
import time
from dataclasses import replace
from pathlib import Path

from ..core import ConfigurationError
from ..simulate.conditions import PRESETS, draw_conditions
from ..simulate.hdf5_runs import write_hdf5_run
from ..simulate.raw_runs import JungfrauRun, RunFiles
from ..simulate.stills_conditions import STILL_PRESETS
from ..simulate.xtc2_runs import write_xtc2_run

log = logging.getLogger(__name__)

FORMATS = ("hdf5", "xtc2")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", choices=("sfx", "stills"),
                        help="sfx: a run with protein crystals in a jet; stills: labelled "
                             "quadrants (lattices, resolution)")
    parser.add_argument("--out", required=True, metavar="DIR", help="directory for the run")
    parser.add_argument("--format", choices=FORMATS, default="hdf5",
                        help="xtc2 needs psana2 (default: hdf5)")
    parser.add_argument("--events", type=int, default=100, metavar="N", help="default: 100")
    parser.add_argument("--segments", type=int, choices=(1, 2, 8), default=2,
                        help="panels of the Jungfrau; 8 = the full 4M detector (default: 2)")
    parser.add_argument("--seed", type=int, default=0, metavar="S",
                        help="of the data set; a run is drawn from seed and run number")
    parser.add_argument("--run", type=int, default=95, metavar="R", help="default: 95")
    parser.add_argument("--exp", default="mfxsim", metavar="E",
                        help="experiment name, letters and digits (default: mfxsim)")
    parser.add_argument("--preset", choices=(*PRESETS, *STILL_PRESETS),
                        help="range of conditions that is drawn from (default: training for sfx, "
                             "resolution for stills)")
    parser.add_argument("--hit-fraction", type=float, metavar="F",
                        help="share of hits, 0 to 1 (default: drawn)")


def execute(args: argparse.Namespace) -> int:
    if args.kind == "stills":
        from ..learn.labelled_sets import write_labelled_set

        preset = args.preset or "resolution"
        path = Path(args.out) / f"stills_{preset}_s{args.seed}.h5"
        print(write_labelled_set(path, preset, args.seed, args.events,
                                 progress=_Lines(args.events)))
        return 0
    files = write_run(Path(args.out), form=args.format, events=args.events,
                      segments=args.segments, seed=args.seed, number=args.run, exp=args.exp,
                      preset=args.preset or "training", hit_fraction=args.hit_fraction)
    for path in (*files.files, files.constants, files.truth):
        print(path)
    return 0


def write_run(directory: Path, *, form: str, events: int, segments: int, seed: int, number: int,
              exp: str, preset: str, hit_fraction: float | None = None) -> RunFiles:
    """Draw the conditions of run ``number`` and write its events; logs how far it is.

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
    conditions = draw_conditions(seed, number, preset)
    if hit_fraction is not None:
        conditions = replace(conditions, hit_fraction=hit_fraction)
    run = JungfrauRun(conditions, segments)
    write = write_xtc2_run if form == "xtc2" else write_hdf5_run
    progress = _Lines(events)
    return write(directory, run, events, exp=exp, progress=progress)


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
