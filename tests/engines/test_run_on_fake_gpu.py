"""Whole runs over FAKES of a GPU: batches judged while they are read, a GPU that is lost.

No GPU is involved and none of this says anything about speed; ``tests/gpu`` asks a real one.
"""
import h5py
import numpy as np
import pytest
from mockdata.fake_gpu import install_fakes
from mockdata.tiny_run import TinySource

from xfel_classify.analyses import classify
from xfel_classify.config import LoopConfig, RunConfig
from xfel_classify.engines import find_model
from xfel_classify.engines.gpu_driver import DeviceLost
from xfel_classify.pipeline.run import classify_run
from xfel_classify.sinks.summary import Sink as Summary

EVENTS, WITHOUT = 21, (0, 5, 11, 12)


class WatchedSource(TinySource):
    """Noise of its own in every event; tells ``told(index)`` before each is handed out."""

    def __init__(self, told=lambda index: None, **how):
        super().__init__(EVENTS, without=WITHOUT, **how)
        self._told = told

    def frames(self, shard):
        for frame in super().frames(shard):
            self._told(frame.index)
            if frame.raw_PSF is not None:
                frame.raw_PSF[:] = np.random.default_rng(frame.index).normal(
                    frame.index % 4 - 1, 2, frame.raw_PSF.shape)
            yield frame


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    return install_fakes(monkeypatch, tmp_path / "cache")


@pytest.fixture
def model(write_model):
    directory = write_model(seed=4)
    (directory / "gpu.toml").write_text("[any]\nbatch = 4\nlatency_batch = 1\n")
    return find_model(directory)


def run(model, out, backend, batch=8, told=lambda index: None, mode="new", **loop):
    analysis = classify.Analysis(classify.Analysis.Config(model=str(model.directory),
                                                          backend=backend))
    summary = classify_run(WatchedSource(told), [analysis], [Summary(Summary.Config())], out=out,
                           mode=mode, config=RunConfig(loop=LoopConfig(batch=batch, **loop)))
    return summary, *written(out)


def written(out):
    with h5py.File(out / "tiny_r0007.h5") as file:
        return ({name: file[name][:] for name in ("timestamp", "status", "hit/score",
                                                  "hit/label")}, dict(file.attrs))


def assert_same_answers(found, wanted):
    for name in ("timestamp", "status", "hit/label"):
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)
    np.testing.assert_allclose(found["hit/score"], wanted["hit/score"], atol=1e-5)
    assert np.isnan(found["hit/score"]).sum() == len(WITHOUT)
    assert np.nanstd(found["hit/score"]) > 0.01             # events do differ


@pytest.mark.parametrize("batch", [1, 3, 8, 16, 64])
def test_a_run_that_submits_ahead_has_every_row_and_the_answers_of_the_cpu(gpu, model, tmp_path,
                                                                          batch):
    _, wanted, _ = run(model, tmp_path / "cpu", "onnxruntime")
    summary, found, attributes = run(model, tmp_path / "gpu", "tensorrt", batch)
    assert (summary.exit_code, summary.events) == (0, EVENTS)
    assert_same_answers(found, wanted)
    assert attributes["model_tiny_engine"] == "tensorrt float32"
    assert gpu.cuda.nothing_left()


def test_launches_are_on_their_way_while_the_batch_is_still_being_read(gpu, model, tmp_path):
    launches = {}
    run(model, tmp_path / "gpu", "tensorrt", batch=16,
        told=lambda index: launches.setdefault(index, gpu.cuda.journal.count("cuGraphLaunch")))
    since_opened = [launches[index] - launches[0] for index in (4, 8, 15)]
    assert since_opened == [1, 2, 3]        # parts of four, the last event not yet read


@pytest.mark.parametrize("fails", ["cuGraphLaunch", "cuEventSynchronize",
                                   "cuMemcpyHtoDAsync_v2"])
@pytest.mark.parametrize("at", [3, 9, 20])
def test_a_gpu_lost_in_the_middle_costs_no_row_with_auto(gpu, model, tmp_path, fails, at, caplog):
    _, wanted, _ = run(model, tmp_path / "cpu", "onnxruntime")

    def lose(index):
        if index == at:
            gpu.cuda.fails[fails] = 719

    summary, found, attributes = run(model, tmp_path / "out", "auto", told=lose)
    assert (summary.exit_code, summary.events) == (0, EVENTS)
    assert_same_answers(found, wanted)
    assert attributes["model_tiny_engine"] == "tensorrt float32, then onnxruntime float32"
    assert caplog.text.count("this rank goes on with onnxruntime") == 1


def test_a_gpu_lost_in_the_middle_ends_a_run_that_named_it_and_resuming_completes_it(
        gpu, model, tmp_path):
    def lose(index):
        if index == 13:
            gpu.cuda.fails["cuGraphLaunch"] = 719

    _, wanted, _ = run(model, tmp_path / "cpu", "onnxruntime")
    with pytest.raises(DeviceLost, match="--resume"):
        run(model, tmp_path / "out", "tensorrt", batch=4, told=lose, checkpoint_s=0.0)
    assert not (tmp_path / "out" / "tiny_r0007.h5").exists()
    gpu.cuda.fails.clear()
    read = []
    summary, found, _ = run(model, tmp_path / "out", "tensorrt", batch=4, told=read.append,
                            mode="resume")
    assert summary.exit_code == 0
    assert_same_answers(found, wanted)
    assert len(read) < EVENTS               # what was finished is not read again
