"""Every sink behind the real event loop: the files agree, and equal runs give equal files."""
import pytest
from mockdata.tiny_run import MeanAnalysis, RaggedAnalysis, TinySource

from xfel_classify.commands.compare import compare
from xfel_classify.commands.validate import validate
from xfel_classify.pipeline.run import classify_run
from xfel_classify.sinks import cxi, event_lists, geometry, summary


def classified(directory, source, limit=10.0):
    sinks = [summary.Sink(), cxi.Sink(), event_lists.Sink(), geometry.Sink()]
    return classify_run(source, [MeanAnalysis(limit), RaggedAnalysis()], sinks, out=directory)


@pytest.mark.parametrize("events", [0, 1, 21])
def test_outputs_are_valid(tmp_path, events):
    done = classified(tmp_path / "out", TinySource(events, damaged={5}, without={2}))
    assert done.exit_code == 0 and len(done.files) == 6
    assert validate(tmp_path / "out") == []


def test_equal_runs_are_equal_and_others_are_not(tmp_path):
    for name, limit in (("a", 10.0), ("b", 10.0), ("c", 11.0)):
        classified(tmp_path / name, TinySource(21, damaged={5}), limit)
    assert compare(tmp_path / "a", tmp_path / "b") == []
    assert any("hit/label" in d for d in compare(tmp_path / "a", tmp_path / "c"))


def test_incomplete_run_is_said_to_be(tmp_path):
    done = classified(tmp_path / "out", TinySource(21, seen=range(20)))
    assert done.exit_code == 3
    assert any("incomplete: 20 of 21 events" in problem for problem in validate(tmp_path / "out"))
