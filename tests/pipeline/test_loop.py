"""The event loop on a run in memory: one row for every event, whatever happens to it."""
import numpy as np
import pytest
from mockdata.tiny_run import MeanAnalysis, RaggedAnalysis, TinySource

from xfel_classify.core import Column, ConfigurationError, EventStatus, Shard
from xfel_classify.pipeline.loop import EventLoop, phases
from xfel_classify.pipeline.schedule import World


def run(source, analyses, batch=4, keep=None, stop_after=None):
    loop = EventLoop(source, analyses, batch=batch, keep=keep)
    loop.start(source.constants())
    batches, kept = [], {}

    def deliver(rows, pixels):
        batches.append(rows)
        kept.update({index: frame.copy() for index, frame in pixels})

    world, n = World(), source.expected_events()
    loop.run(Shard(lambda k: world.claim(k, n),
                   stopping=lambda: stop_after is not None and len(source.read) >= stop_after),
             deliver)
    joined = {}
    for name, column in loop.columns.items():
        parts = [rows[name] for rows in batches]
        joined[name] = sum(parts, []) if column.ragged else np.concatenate(parts)
    return joined, kept, loop


@pytest.mark.parametrize("batch", [1, 3, 4, 64])
def test_rows_do_not_depend_on_the_batch(batch):
    rows, _, _ = run(TinySource(21), [MeanAnalysis(), RaggedAnalysis()], batch)
    np.testing.assert_array_equal(rows["index"], np.arange(21))
    np.testing.assert_array_equal(rows["timestamp"], 1000 + 10 * np.arange(21))
    np.testing.assert_array_equal(rows["mean/value"], np.arange(21))
    np.testing.assert_array_equal(rows["hit/label"], np.arange(21) >= 10)
    assert [len(row) for row in rows["ragged/values"]] == \
        [i % 4 if i >= 10 else 0 for i in range(21)]
    np.testing.assert_array_equal(rows["ragged/n"],
                                  [i % 4 if i >= 10 else -1 for i in range(21)])
    np.testing.assert_array_equal(rows["pulse_energy_mJ"], np.arange(21) / 10)
    assert [row.tolist() for row in rows["event_codes"][:2]] == [[40, 100], [40, 101]]


def test_unusable_events_keep_their_rows_and_get_missing_values():
    source = TinySource(12, without={2}, damaged={5})
    rows, _, loop = run(source, [MeanAnalysis(refuse=7)], batch=5)
    assert rows["index"].tolist() == list(range(12))
    wanted = {2: EventStatus.NO_DETECTOR, 5: EventStatus.DAMAGED, 7: EventStatus.NOT_FINITE}
    for index in range(12):
        assert rows["status"][index] == wanted.get(index, EventStatus.OK)
        assert np.isnan(rows["mean/value"][index]) == (index in wanted)
        assert (rows["hit/label"][index] == -1) == (index in wanted)
    assert rows["damage"][5] == 4
    assert loop.status_counts.sum() == 12


def test_frames_of_the_wrong_shape_or_without_a_finite_pixel_are_rows_too():
    class Odd(TinySource):
        def frames(self, shard):
            for frame in super().frames(shard):
                raw = frame.raw_PSF
                if frame.index == 3:
                    raw = raw[:1]
                if frame.index == 4:
                    raw = np.full_like(raw, np.nan)
                yield type(frame)(raw, frame.timestamp, frame.index, scalars=frame.scalars)

    rows, _, _ = run(Odd(6), [MeanAnalysis()])
    assert rows["status"].tolist() == [0, 0, 0, EventStatus.WRONG_SHAPE,
                                       EventStatus.NOT_FINITE, 0]


def test_kept_pixels_are_those_of_the_event_though_the_buffer_is_reused():
    _, kept, _ = run(TinySource(14), [MeanAnalysis()], batch=5, keep="hit/label")
    assert sorted(kept) == [10, 11, 12, 13]
    assert all((pixels == index).all() for index, pixels in kept.items())


def test_a_missing_photon_energy_is_assumed_and_flagged():
    class Dark(TinySource):
        def frames(self, shard):
            for frame in super().frames(shard):
                energy = [np.nan, np.inf, 0.0, -5.0, 8000.0][frame.index]
                yield type(frame)(frame.raw_PSF, frame.timestamp, frame.index,
                                  scalars={"photon_energy_eV": energy})

    rows, _, _ = run(Dark(5), [MeanAnalysis()])
    assert rows["photon_energy_assumed"].tolist() == [1, 1, 1, 1, 0]
    assert rows["photon_energy_eV"].tolist() == [9500.0] * 4 + [8000.0]


def test_an_interruption_ends_between_events_and_keeps_what_is_done():
    source = TinySource(20)
    rows, _, _ = run(source, [MeanAnalysis()], batch=4, stop_after=6)
    assert rows["index"].tolist() == source.read
    assert 6 <= len(source.read) < 20


def test_a_bug_is_not_caught_and_names_stage_and_event():
    class Broken(MeanAnalysis):
        def take(self, frame, row):
            if frame.frame.index == 3:
                raise ZeroDivisionError
            super().take(frame, row)

    with pytest.raises(ZeroDivisionError) as caught:
        run(TinySource(6), [Broken()])
    assert caught.value.__notes__ == ["in stage 'mean', event 3, timestamp 1030"]


def test_full_frame_analyses_share_the_latest_phase():
    class Window(MeanAnalysis):
        full_frame = False

    class Free(RaggedAnalysis):
        only, uses = "", ()
        columns = {"free/n": Column("int32", missing=-1)}

    assert phases([Window(), Free(), RaggedAnalysis()]) == [[0], [1, 2]]
    assert phases([MeanAnalysis(), RaggedAnalysis()]) == [[0], [1]]
    assert phases([MeanAnalysis(), Free()]) == [[0, 1]]
    assert phases([]) == []


def test_wrong_orders_and_names_are_refused_by_name():
    with pytest.raises(ConfigurationError, match="hit/label"):
        phases([RaggedAnalysis(), MeanAnalysis()])
    with pytest.raises(ConfigurationError, match="already taken"):
        EventLoop(TinySource(), [MeanAnalysis(), MeanAnalysis()], batch=2)
    with pytest.raises(ConfigurationError, match="spot/label"):
        EventLoop(TinySource(), [MeanAnalysis()], batch=2, keep="spot/label")
