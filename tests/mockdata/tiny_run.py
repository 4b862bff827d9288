"""A run of a tiny detector (2 panels of 8 x 16) held in memory, and analyses to ask of it."""
from __future__ import annotations

import numpy as np

from xfel_classify.core import (
    Column,
    Constants,
    EventError,
    EventStatus,
    Frame,
    Geometry,
    RunInfo,
    Total,
)

SHAPE = (2, 8, 16)


def tiny_geometry() -> Geometry:
    ss, fs = np.mgrid[0:8, 0:16]
    x = np.stack([(fs - 7.5) * 1e-4] * 2)
    y = np.stack([(ss - 8.5 + 9 * panel) * 1e-4 for panel in range(2)])
    return Geometry(x.astype(np.float32), y.astype(np.float32), np.zeros(SHAPE, np.float32), 1e-4,
                    distance_m=0.1, name="tiny")


def tiny_constants(**changes) -> Constants:
    fields = {"good_PSF": np.ones(SHAPE, bool), "geometry": tiny_geometry(), "unit": "photon",
              "identity": "tiny"}
    return Constants(**{**fields, **changes})


class TinySource:
    """``n`` events; event i has the value i in every pixel.  Indices in ``without`` lack pixels.

    The frame buffer is reused, as psana's is.  ``fail_at`` raises RuntimeError at that event.
    """

    distributes = False
    keeps_raw = False

    def __init__(self, n=20, *, without=(), damaged=(), seen=None, fail_at=None, exp="tiny", run=7):
        self._n, self._without, self._damaged = n, set(without), set(damaged)
        self._seen = range(n) if seen is None else seen
        self._fail_at = fail_at
        self._buffer = np.zeros(SHAPE, np.float32)
        self.run = RunInfo(exp, run, "tiny", "generic", SHAPE, "float32", "memory")
        self.read = []

    def constants(self):
        return tiny_constants()

    def expected_events(self):
        return self._n

    def scalar_columns(self):
        return {"pulse_energy_mJ": Column("float64", unit="mJ", doc="pulse energy")}

    def works(self):
        return True

    def frames(self, shard):
        for index in shard.indices(2):
            if index not in self._seen:
                continue
            if index == self._fail_at:
                raise RuntimeError("planted failure")
            self.read.append(index)
            self._buffer[:] = index
            status = EventStatus.DAMAGED if index in self._damaged else EventStatus.OK
            raw = None if index in self._without else self._buffer
            yield Frame(raw, timestamp=1000 + 10 * index, index=index,
                        damage=4 * (index in self._damaged),
                        scalars={"pulse_energy_mJ": index / 10, "photon_energy_eV": 9000.0},
                        event_codes=(40, 100 + index % 2), status=status)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        pass


class MeanAnalysis:
    """The mean of a frame, and 1 where it is at least ``limit``; refuses event ``refuse``."""

    name = "mean"
    only = ""
    uses = ()
    full_frame = True
    panels = None
    columns = {
        "mean/value": Column("float32", unit="photon", doc="mean"),
        "hit/label": Column("int8", missing=-1, doc="mean at least the limit"),
    }

    def __init__(self, limit=10.0, refuse=None):
        self._limit, self._refuse = limit, refuse
        self._sum = None

    def start(self, run, constants, batch):
        self._means = np.zeros(batch, np.float32)
        self._sum = np.zeros(constants.shape, np.int64)
        self._events = 0

    def take(self, frame, row):
        if frame.frame.index == self._refuse:
            raise EventError(EventStatus.NOT_FINITE, "refused")
        self._means[row] = frame.calibrated_PSF.mean()
        self._sum += frame.calibrated_PSF.astype(np.int64)
        self._events += 1

    def process(self, batch):
        means = self._means[:len(batch)].copy()
        return {"mean/value": means, "hit/label": (means >= self._limit).astype(np.int8)}

    def totals(self):
        return {} if self._sum is None else {"sum": Total(self._sum, "sum", self._events)}

    def attributes(self):
        return {"mean_limit": self._limit}

    def close(self):
        pass


class RaggedAnalysis:
    """As many values as the event's index modulo 4, on hits only; uses the column of another."""

    name = "ragged"
    only = "hit/label"
    uses = ("mean/value",)
    full_frame = True
    panels = None
    columns = {"ragged/n": Column("int32", missing=-1), "ragged/values": Column("float32", (-1,))}

    def start(self, run, constants, batch):
        self._rows = {}

    def take(self, frame, row):
        assert frame.earlier("mean/value") == frame.raw_PSF[0, 0, 0]
        self._rows[row] = np.full(frame.frame.index % 4, frame.raw_PSF[0, 0, 0], np.float32)

    def process(self, batch):
        rows = [self._rows.get(row, np.zeros(0)) for row in range(len(batch))]
        self._rows = {}
        return {"ragged/n": np.array([len(row) for row in rows]), "ragged/values": rows}

    def totals(self):
        return {}

    def attributes(self):
        return {}

    def close(self):
        pass
