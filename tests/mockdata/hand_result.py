"""A result written by hand: 2 panels of 8 x 16, tilted and apart, six events, three hits."""
from __future__ import annotations

import numpy as np

from xfel_classify.core import Column, Constants, Geometry, Panel, RunInfo, RunResult, Total

SHAPE = (2, 8, 16)
PIXEL_M = 1e-4
EPOCH_STAMPS = [(1_100_000_000 + i << 32) | (500 + i) for i in range(6)]


def hand_panels() -> tuple[Panel, ...]:
    """Two panels: one upright, one turned by 30 degrees and lifted by 1 mm along the beam."""
    c, s = np.cos(np.pi / 6) * PIXEL_M, np.sin(np.pi / 6) * PIXEL_M
    return (
        Panel("p0", 0, 0, 7, 0, 15, (-8e-4, -9e-4, 0.0), (PIXEL_M, 0.0, 0.0), (0.0, PIXEL_M, 0.0)),
        Panel("p1", 1, 0, 7, 0, 15, (5e-4, 3e-4, 1e-3), (c, s, 0.0), (-s, c, 0.0)),
    )


def hand_geometry(**changes) -> Geometry:
    ss, fs = np.mgrid[0:8, 0:16] + 0.5
    axes = [np.stack([np.float32(p.corner_m[a] + fs * p.fs_m[a] + ss * p.ss_m[a])
                      for p in hand_panels()]) for a in range(3)]
    fields = {"pixel_size_m": PIXEL_M, "panels": hand_panels(), "distance_m": 0.1,
              "photon_energy_eV": 9500.0, "name": "by hand"}
    return Geometry(*axes, **{**fields, **changes})


def hand_constants(**changes) -> Constants:
    good = np.ones(SHAPE, bool)
    good[1, 3, 4:6] = False
    fields = {"good_PSF": good, "geometry": hand_geometry(), "unit": "photon",
              "identity": "0123abcd"}
    return Constants(**{**fields, **changes})


def hand_pixels(row: int) -> np.ndarray:
    pixels = np.arange(256, dtype=np.float32).reshape(SHAPE) + 1000 * row
    pixels[~hand_constants().good_PSF] = 0
    return pixels


COLUMNS = {
    "timestamp": Column("int64", missing=-1, doc="time stamp"),
    "index": Column("int64", missing=-1, doc="position in the run"),
    "status": Column("uint8", missing=0, doc="what became of it"),
    "damage": Column("int64", missing=0, doc="damage bits"),
    "photon_energy_eV": Column("float64", unit="eV", doc="photon energy"),
    "event_codes": Column("int32", (-1,), doc="event codes"),
    "hit/score": Column("float32", unit="", doc="probability of a hit"),
    "hit/label": Column("int8", missing=-1, doc="hit or miss", names=("miss", "hit")),
    "hit/both": Column("float32", (2,), doc="probabilities of miss and hit"),
    "peaks/n": Column("int32", missing=-1, doc="number of peaks"),
    "peaks/panel": Column("int16", (-1,), missing=-1, doc="panel"),
    "peaks/fs": Column("float32", (-1,), unit="pixel", doc="along the fast axis"),
    "peaks/ss": Column("float32", (-1,), unit="pixel", doc="along the slow axis"),
    "peaks/total": Column("float32", (-1,), unit="photon", doc="intensity"),
    "peaks/max": Column("float32", (-1,), unit="photon", doc="largest pixel"),
    "peaks/snr": Column("float32", (-1,), doc="signal to noise"),
    "peaks/npix": Column("int16", (-1,), missing=-1, unit="pixel", doc="pixels"),
    "peaks/radius_px": Column("float32", (-1,), unit="pixel", doc="distance from the beam"),
}


def ragged(*rows):
    return [np.asarray(row) for row in rows]


def hand_result(exp="mfxl1033223", run=95, **changes) -> RunResult:
    """Rows 1, 3 and 4 are hits with 3, 0 and 1 peaks; row 5 was damaged."""
    rows = {
        "timestamp": np.array(EPOCH_STAMPS), "index": np.arange(6),
        "status": np.array([0, 0, 0, 0, 0, 2], np.uint8),
        "damage": np.array([0, 0, 0, 0, 0, 4]),
        "photon_energy_eV": np.array([9500, 9501, 9502, np.nan, 9504, np.nan]),
        "event_codes": ragged([40], [40, 140], [], [40], [40], [40]),
        "hit/score": np.array([.1, .9, .2, .8, .7, np.nan], np.float32),
        "hit/label": np.array([0, 1, 0, 1, 1, -1], np.int8),
        "hit/both": np.array([[.9, .1], [.1, .9], [.8, .2], [.2, .8], [.3, .7], [np.nan] * 2]),
        "peaks/n": np.array([0, 3, 0, 0, 1, -1], np.int32),
        "peaks/panel": ragged([], [0, 1, 1], [], [], [0], []),
        "peaks/fs": ragged([], [0.0, 3.25, 15.0], [], [], [7.5], []),
        "peaks/ss": ragged([], [0.0, 2.5, 7.0], [], [], [6.75], []),
        "peaks/total": ragged([], [10., 20., 30.], [], [], [40.], []),
        "peaks/max": ragged([], [5., 6., 7.], [], [], [8.], []),
        "peaks/snr": ragged([], [9., 9.5, 10.], [], [], [11.], []),
        "peaks/npix": ragged([], [2, 3, 4], [], [], [5], []),
        "peaks/radius_px": ragged([], [1., 2., 3.], [], [], [4.], []),
    }
    sums = np.arange(256, dtype=np.int64).reshape(SHAPE) * 256
    fields = {
        "run": RunInfo(exp, run, "jungfrau", "generic", SHAPE, "float32", "hdf5",
                       notes=("photon energy assumed",), provenance={"files": "a.h5"}),
        "columns": COLUMNS,
        "rows": rows,
        "totals": {
            "sum": Total(sums, "sum", 5, 1 / 256, "photon", "sum of all frames"),
            "powder_max_hits": Total(np.full(SHAPE, 7, np.float32), "max", 3, unit="photon",
                                     doc="maximum over hits"),
            "powder_max_misses": Total(np.full(SHAPE, 2, np.float32), "max", 2, unit="photon",
                                       doc="maximum over misses"),
        },
        "attributes": {"complete": True, "events_expected": 6, "configuration": "[source]\n",
                       "model_name": "sfx-hit", "versions": {"numpy": "2"}},
        "constants": hand_constants(),
        "timing": {"stage": ["read", "infer"], "seconds": np.array([[1.0, 2.0]])},
        "kept": np.array([1, 3, 4]),
        "pixels": hand_pixels,
    }
    return RunResult(**{**fields, **changes})


def empty_result(events: int = 0, **changes) -> RunResult:
    """The same run with only the first ``events`` events, none of them a hit."""
    full = hand_result()
    rows = {path: values[:events] for path, values in full.rows.items()}
    totals = {name: Total(total.values * 0, total.how, 0, total.scale, total.unit, total.doc)
              for name, total in full.totals.items()}
    fields = {"rows": rows, "totals": totals, "kept": np.zeros(0, np.int64), "pixels": None,
              "attributes": {"complete": True, "events_expected": events}}
    return hand_result(**{**fields, **changes})
