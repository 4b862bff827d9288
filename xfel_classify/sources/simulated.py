"""A simulated run as a source: nothing on disk, every event made when it is asked for.

The events are those that the writers of simulated runs write for the same seed and run (raw
Jungfrau words with their own constants), so a run can be looked at without writing it first.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping

import msgspec

from ..core import Column, ConfigurationError, Constants, EventStatus, Frame, RunInfo, Shard
from ..simulate.conditions import draw_conditions
from ..simulate.raw_runs import JungfrauRun, RawEvent
from .run_constants import FrameKind, Stated, run_constants, scalar_columns

__all__ = ["Source"]


class Source:
    """Events of a simulated Jungfrau run.  Implements :class:`xfel_classify.core.EventSource`."""

    class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
        """One seed and run number are one run, on any number of ranks."""

        events: int = 100
        seed: int = 1
        run: int = 95
        exp: str = "simulated"
        detector: str = "jungfrau"
        segments: int = 1                   # modules: 1, 2, 8 or 32
        preset: str = "demo"                # conditions, as of simulate sfx; changes after a colon
        hit_fraction: float | None = None
        rate_Hz: float = 120.0              # of the timestamps
        damaged: list[int] = []             # events flagged damaged
        missing: list[int] = []             # events without an image
        geometry: str | None = None         # beside the detector's own
        mask: str | None = None
        edge_width: int = 0
        max_events: int | None = None

    distributes = False
    keeps_raw = True

    def __init__(self, config: Config) -> None:
        self.config = config
        if config.events < 0:
            raise ConfigurationError(f"source.events = {config.events} is negative")
        try:
            draw_conditions(config.seed, config.run, config.preset)
        except ConfigurationError as error:
            raise ConfigurationError(f"source.preset = {config.preset!r}: {error}") from error
        if config.hit_fraction is not None and not 0 <= config.hit_fraction <= 1:
            raise ConfigurationError(f"source.hit_fraction = {config.hit_fraction} is not between "
                                     "0 and 1")
        self._made: JungfrauRun | None = None
        self._constants: Constants | None = None

    def __enter__(self) -> Source:
        config = self.config
        conditions = draw_conditions(config.seed, config.run, config.preset,
                                     hit_fraction=config.hit_fraction)
        self._made = JungfrauRun(conditions, config.segments, rate_Hz=config.rate_Hz,
                                 damaged=config.damaged, missing=config.missing)
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    @property
    def _simulation(self) -> JungfrauRun:
        if self._made is None:
            raise RuntimeError("the source is not open; use it in a with statement")
        return self._made

    @property
    def run(self) -> RunInfo:
        config = self.config
        return RunInfo(
            exp=config.exp, run=config.run, detector=config.detector, detector_kind="jungfrau",
            panel_shape=self._simulation.shape, raw_dtype="uint16", source="simulated",
            notes=("the run is simulated",),
            provenance={"simulation_seed": str(config.seed), "simulation_preset": config.preset})

    def works(self) -> bool:
        return True

    def expected_events(self) -> int:
        config = self.config
        return config.events if config.max_events is None else min(config.events,
                                                                   config.max_events)

    def scalar_columns(self) -> Mapping[str, Column]:
        return scalar_columns()

    def constants(self) -> Constants:
        if self._constants is None:
            simulation, config = self._simulation, self.config
            stated = Stated(geometry=config.geometry, mask=config.mask,
                            distance_m=simulation.conditions.distance_m,
                            edge_width=config.edge_width)
            self._constants = run_constants(
                FrameKind("jungfrau", False, "keV"), config.detector, simulation.shape, stated,
                own=simulation.constants)
        return self._constants

    def frames(self, shard: Shard) -> Iterator[Frame]:
        for index in shard.indices():
            if index >= self.expected_events():
                break
            event = next(iter(self._simulation.events(range(index, index + 1))))
            yield self._frame(event)

    def _frame(self, event: RawEvent) -> Frame:
        status = EventStatus.OK
        if event.raw_PSF is None:
            status = EventStatus.NO_DETECTOR
        elif event.damaged:
            status = EventStatus.DAMAGED
        return Frame(
            raw_PSF=event.raw_PSF if status is EventStatus.OK else None,
            timestamp=event.timestamp, index=event.index, damage=4 if event.damaged else 0,
            scalars={"photon_energy_eV": event.truth.photon_energy_eV,
                     "pulse_energy_mJ": event.truth.pulse_energy_mJ,
                     "distance_m": self._simulation.conditions.distance_m},
            status=status)
