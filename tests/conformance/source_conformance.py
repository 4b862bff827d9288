"""What every event source promises.

A subclass defines the fixture ``again``: a callable that makes an unopened source of always the
same run, of at least four readable events.
"""
from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from xfel_classify.core import (
    Constants,
    EventSource,
    EventStatus,
    Frame,
    MissingDependency,
    RunInfo,
    Shard,
)


class Counter:
    """Deals positions 0 .. n-1 in order, as the loop's shared counter does."""

    def __init__(self, events: int) -> None:
        self.next, self.events = 0, events

    def __call__(self, count: int) -> range:
        first = min(self.next, self.events)
        self.next = min(first + count, self.events)
        return range(first, self.next)


def whole(source: EventSource) -> Shard:
    """All events of the run on one rank."""
    return Shard(claim=Counter(source.expected_events() or 0))


def part(todo: list[int]) -> Shard:
    """Only the events ``todo``."""
    return Shard(claim=Counter(len(todo)), todo=np.array(todo, np.int64))


def digest(frame: Frame) -> int | None:
    """Checksum of the pixels, taken while they are valid."""
    if frame.raw_PSF is None:
        return None
    return zlib.crc32(np.ascontiguousarray(frame.raw_PSF).tobytes())


def summary(frames: Iterator[Frame]) -> dict[int, tuple]:
    """{index: (timestamp, status, damage, checksum, scalars)}; an index twice is an error."""
    found: dict[int, tuple] = {}
    for frame in frames:
        assert frame.index not in found
        found[frame.index] = (frame.timestamp, frame.status, frame.damage, digest(frame),
                              dict(frame.scalars))
    return found


class SourceConformance:
    """Tests that hold for every source."""

    @pytest.fixture
    def again(self) -> Callable[[], EventSource]:
        raise NotImplementedError("a subclass gives a factory of equal sources")

    @pytest.fixture
    def source(self, again: Callable[[], EventSource]) -> Iterator[EventSource]:
        try:
            opened = again()
        except MissingDependency as error:
            pytest.skip(str(error))
        with opened as source:
            yield source

    def test_is_an_event_source(self, source: EventSource) -> None:
        assert isinstance(source, EventSource)
        assert isinstance(source.run, RunInfo)
        assert source.works() is True

    def test_every_expected_event_comes_once(self, source: EventSource) -> None:
        found = summary(source.frames(whole(source)))
        assert sorted(found) == list(range(source.expected_events()))

    def test_index_is_time_order(self, source: EventSource) -> None:
        found = summary(source.frames(whole(source)))
        times = [found[i][0] for i in sorted(found)]
        assert times == sorted(times)
        assert all(type(t) is int for t in times)

    def test_frames_have_the_shape_of_run_and_constants(self, source: EventSource) -> None:
        constants = source.constants()
        assert isinstance(constants, Constants)
        assert constants.shape == tuple(source.run.panel_shape)
        assert constants.identity
        for frame in source.frames(whole(source)):
            assert frame.status is EventStatus.OK or frame.raw_PSF is None
            if frame.raw_PSF is not None:
                assert frame.raw_PSF.shape == tuple(source.run.panel_shape)
                assert str(frame.raw_PSF.dtype) == source.run.raw_dtype

    def test_scalars_are_announced(self, source: EventSource) -> None:
        names = set(source.scalar_columns())
        for frame in source.frames(whole(source)):
            assert set(frame.scalars) <= names
            assert all(np.isfinite(v) for v in frame.scalars.values())
            assert frame.scalars.get("photon_energy_eV", 1.0) > 0

    def test_only_what_is_still_to_do(self, again: Callable[[], EventSource]) -> None:
        with again() as source:
            everything = summary(source.frames(whole(source)))
        todo = sorted(everything)[1::2]
        with again() as source:
            assert summary(source.frames(part(todo))) == {i: everything[i] for i in todo}

    def test_nothing_to_do(self, source: EventSource) -> None:
        assert summary(source.frames(part([]))) == {}

    def test_stops_when_asked(self, source: EventSource) -> None:
        seen: list[int] = []
        shard = Shard(claim=Counter(source.expected_events()), stopping=lambda: len(seen) >= 2)
        for frame in source.frames(shard):
            seen.append(frame.index)
        assert 2 <= len(seen) < source.expected_events()

    def test_leaving_early_does_not_hang(self, source: EventSource) -> None:
        for _ in source.frames(whole(source)):
            break

    def test_wanted_panels_are_right(self, again: Callable[[], EventSource]) -> None:
        with again() as source:
            panels = source.run.panel_shape[0]
            full = {f.index: f.raw_PSF[-1].copy() for f in source.frames(whole(source))
                    if f.raw_PSF is not None}
        with again() as source:
            shard = Shard(claim=Counter(source.expected_events()), panels=(panels - 1,))
            for frame in source.frames(shard):
                if frame.raw_PSF is not None:
                    assert np.array_equal(frame.raw_PSF[-1], full[frame.index])

    def test_two_ranks_share_without_overlap(self, again: Callable[[], EventSource]) -> None:
        with again() as one, again() as two:
            if one.distributes:
                pytest.skip("this source deals events itself")
            counter = Counter(one.expected_events())
            streams = [one.frames(Shard(claim=counter)), two.frames(Shard(claim=counter))]
            seen: list[int] = []
            while streams:
                for stream in list(streams):
                    frame = next(stream, None)
                    if frame is None:
                        streams.remove(stream)
                    else:
                        seen.append(frame.index)
            assert sorted(seen) == list(range(one.expected_events()))
