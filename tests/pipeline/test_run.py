"""Whole runs in one process: outputs, resuming, overwriting, incomplete runs."""
import shutil

import h5py
import numpy as np
import pytest
from mockdata.tiny_run import MeanAnalysis, RaggedAnalysis, TinySource

from xfel_classify.config import LoopConfig, RunConfig
from xfel_classify.core import OutputError, OutputExists
from xfel_classify.pipeline.run import classify_run, hit_column
from xfel_classify.sinks.summary import Sink as Summary


class PixelSink:
    """Writes the kept frames, as a CXI would."""

    name = "pixels"
    wants_pixels = True

    def write(self, result, directory):
        with (directory / "pixels.npy.tmp").open("wb") as file:
            frames = [result.pixels(row) for row in result.kept] if result.pixels else []
            np.save(file, np.array(frames))
        return ["pixels.npy"]


def classify(out, source=None, mode="new", sinks=None, **loop):
    return classify_run(source or TinySource(20), [MeanAnalysis(), RaggedAnalysis()],
                        sinks or [Summary(Summary.Config()), PixelSink()], out=out, mode=mode,
                        config=RunConfig(loop=LoopConfig(**{"batch": 3, **loop})))


def content(out):
    found = {}
    with h5py.File(out / "tiny_r0007.h5") as file:
        file.visititems(lambda name, node: found.__setitem__(name, node[()]) if isinstance(
            node, h5py.Dataset) and not name.startswith("timing") else None)
    return found


def assert_same(a, b):
    assert a.keys() == b.keys() and len(a) > 8
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_a_complete_run(tmp_path):
    summary = classify(tmp_path / "out")
    assert (summary.exit_code, summary.events, summary.hits, summary.complete) == (0, 20, 10, True)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["pixels.npy", "tiny_r0007.h5"]
    with h5py.File(tmp_path / "out" / "tiny_r0007.h5") as file:
        assert file.attrs["complete"] and file.attrs["events"] == 20
        assert file.attrs["mean_limit"] == 10.0
        assert file["hit/label"][:].tolist() == [0] * 10 + [1] * 10
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "pixels.npy")[:, 1, 7, 15],
                                  np.arange(10, 20))


def test_an_incomplete_run_says_so_and_can_be_completed(tmp_path):
    summary = classify(tmp_path / "out", TinySource(20, seen=[*range(6), *range(9, 20)]))
    assert (summary.exit_code, summary.events, summary.events_expected) == (3, 17, 20)
    with h5py.File(tmp_path / "out" / "tiny_r0007.h5") as file:
        assert not file.attrs["complete"] and file.attrs["events_expected"] == 20
    again = TinySource(20)
    summary = classify(tmp_path / "out", again, "resume")
    assert summary.exit_code == 0
    assert again.read == [6, 7, 8]
    classify(tmp_path / "whole")
    assert_same(content(tmp_path / "out"), content(tmp_path / "whole"))
    assert not (tmp_path / "out" / "tiny_r0007.parts").exists()


@pytest.mark.parametrize("fail_at", [0, 1, 7, 19])
def test_resuming_after_a_crash_gives_the_uninterrupted_content(tmp_path, fail_at):
    with pytest.raises(RuntimeError, match="planted"):
        classify(tmp_path / "out", TinySource(20, fail_at=fail_at), checkpoint_s=0.0)
    assert not (tmp_path / "out" / "tiny_r0007.h5").exists()
    assert not list((tmp_path / "out").glob("*.npy"))
    again = TinySource(20)
    assert classify(tmp_path / "out", again, "resume").exit_code == 0
    assert fail_at in again.read and len(again.read) <= 20 - 3 * (fail_at >= 3)
    classify(tmp_path / "whole")
    assert_same(content(tmp_path / "out"), content(tmp_path / "whole"))
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "pixels.npy"),
                                  np.load(tmp_path / "whole" / "pixels.npy"))


def test_resuming_a_damaged_part_does_its_events_again(tmp_path):
    classify(tmp_path / "out", keep_parts=True)
    parts = tmp_path / "out" / "tiny_r0007.parts"
    journal = next(parts.glob("*.journal"))
    damaged = bytearray(journal.read_bytes())
    damaged[100] ^= 255
    journal.write_bytes(damaged)
    before = content(tmp_path / "out")
    shutil.rmtree(tmp_path / "elsewhere", ignore_errors=True)
    again = TinySource(20)
    assert classify(tmp_path / "out", again, "resume").exit_code == 0
    assert len(again.read) == 20
    assert_same(content(tmp_path / "out"), before)


def test_an_existing_output_is_never_replaced_unasked(tmp_path):
    classify(tmp_path / "out")
    with pytest.raises(OutputExists, match="--overwrite"):
        classify(tmp_path / "out")
    nothing = TinySource(20)
    assert classify(tmp_path / "out", nothing, "resume").exit_code == 0
    assert nothing.read == []
    classify(tmp_path / "out", TinySource(5), "overwrite")
    with h5py.File(tmp_path / "out" / "tiny_r0007.h5") as file:
        assert file.attrs["events"] == 5


def test_resuming_with_another_configuration_is_refused(tmp_path):
    with pytest.raises(RuntimeError):
        classify(tmp_path / "out", TinySource(20, fail_at=12), checkpoint_s=0.0)
    with pytest.raises(OutputExists, match="analyses|columns"):
        classify_run(TinySource(20), [MeanAnalysis()], [Summary(Summary.Config())],
                     out=tmp_path / "out", mode="resume")


@pytest.mark.parametrize("n", [0, 1])
def test_empty_and_one_event_runs(tmp_path, n):
    summary = classify(tmp_path / "out", TinySource(n))
    assert (summary.exit_code, summary.events) == (0, n)
    with h5py.File(tmp_path / "out" / "tiny_r0007.h5") as file:
        assert file["timestamp"].shape == (n,)


def test_max_events_is_a_complete_run_of_that_many(tmp_path):
    summary = classify(tmp_path / "out", max_events=7)
    assert (summary.exit_code, summary.events, summary.events_expected) == (0, 7, 7)


def test_a_failing_sink_leaves_no_file_and_keeps_the_parts(tmp_path):
    class Full:
        name = "full"

        def write(self, result, directory):
            (directory / "tiny_r0007.full.tmp").write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match="--resume"):
        classify(tmp_path / "out", sinks=[Summary(Summary.Config()), Full()])
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["tiny_r0007.parts"]
    again = TinySource(20)
    assert classify(tmp_path / "out", again, "resume").exit_code == 0
    assert again.read == []


def test_a_directory_that_cannot_be_written_is_an_error_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    source = TinySource(20)
    with pytest.raises(OutputError, match="-o"):
        classify(tmp_path / "file" / "out", source)
    assert source.read == []


def test_hits_come_from_the_model_else_from_the_peaks():
    assert hit_column([MeanAnalysis()], RunConfig()) == "hit/label"
    assert hit_column([], RunConfig()) is None
    assert hit_column([], RunConfig(loop=LoopConfig(hits="spi/label"))) == "spi/label"
