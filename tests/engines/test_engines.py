"""Every runtime gives the network's answer; batches, errors, and stepping down."""
import hashlib
import logging

import numpy as np
import pytest

from xfel_classify import engines
from xfel_classify.core import EngineError, MissingDependency, ModelInvalid, UnknownComponent
from xfel_classify.engines import check_model, find_model, open_engine
from xfel_classify.engines import onnxruntime as ort_engine

BACKENDS = ["onnxruntime", pytest.param("torch", marks=pytest.mark.torch)]


@pytest.fixture(params=BACKENDS)
def backend(request):
    pytest.importorskip(request.param)
    return request.param


def replace_network(directory, content: bytes) -> None:
    """Swap the network and make the card promise the new one."""
    old = hashlib.sha256((directory / "model.onnx").read_bytes()).hexdigest()
    (directory / "model.onnx").write_bytes(content)
    card = directory / "card.toml"
    card.write_text(card.read_text().replace(old, hashlib.sha256(content).hexdigest()))


def test_answers_are_those_of_the_network(write_model, tiny_images, forward, backend):
    with open_engine(write_model(), backend=backend) as engine:
        scores_BK = engine.infer(tiny_images)["hit"]
    assert (engine.name, engine.precision) == (backend, "float32")
    assert scores_BK.dtype == np.float32
    np.testing.assert_allclose(scores_BK, forward(tiny_images), atol=1e-6)


def test_one_by_one_equals_batched(write_model, tiny_images, backend):
    images_BHW = np.concatenate([tiny_images, tiny_images[::-1], tiny_images * 2])
    with open_engine(write_model(), backend=backend, max_batch=4) as engine:
        batched = engine.infer(images_BHW)["hit"]
        singly = np.concatenate([engine.infer(image[None])["hit"] for image in images_BHW])
    np.testing.assert_array_equal(batched, singly)


def test_any_batch_size_and_layout(write_model, tiny_images, backend):
    with open_engine(write_model(), backend=backend, max_batch=2) as engine:
        assert engine.infer(tiny_images[:0])["hit"].shape == (0, 2)
        expected = engine.infer(tiny_images)["hit"]
        strided = np.zeros((5, 24, 20), np.float64)
        strided[:, ::2, ::2] = tiny_images
        np.testing.assert_array_equal(engine.infer(strided[:, ::2, ::2])["hit"], expected)


def test_outputs_are_fresh_arrays(write_model, tiny_images, backend):
    with open_engine(write_model(), backend=backend) as engine:
        first = engine.infer(tiny_images)["hit"]
        kept = first.copy()
        engine.infer(np.zeros_like(tiny_images))
    np.testing.assert_array_equal(first, kept)


def test_wrong_shape_and_closed_engine(write_model, tiny_images, backend):
    engine = open_engine(write_model(), backend=backend)
    with pytest.raises(EngineError, match=r"shape \(B, 12, 10\), got \(5, 12, 9\)"):
        engine.infer(tiny_images[:, :, :9])
    with pytest.raises(EngineError, match=r"got \(12, 10\)"):
        engine.infer(tiny_images[0])
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="not open"):
        engine.infer(tiny_images)
    engine.open()
    assert engine.infer(tiny_images)["hit"].shape == (5, 2)


def test_damaged_network_is_an_invalid_model(write_model, backend):
    directory = write_model()
    whole = (directory / "model.onnx").read_bytes()
    replace_network(directory, whole[: len(whole) // 2])
    with pytest.raises(ModelInvalid, match="model.onnx"):
        open_engine(directory, backend=backend)


def test_card_and_network_must_fit(write_model, backend):
    directory = write_model()
    card = directory / "card.toml"
    text = card.read_text()
    card.write_text(text.replace('output = "hit"', 'output = "score"'))
    with pytest.raises(ModelInvalid, match=r"reads the output 'score', the network has \['hit'\]"):
        open_engine(directory, backend=backend)
    card.write_text(text.replace('["miss", "hit"]', '["miss", "maybe", "hit"]'))
    with pytest.raises(ModelInvalid, match="3 classes, the output 'hit' has 2 values"):
        open_engine(directory, backend=backend)
    card.write_text('input = "pixels"\n' + text)
    with pytest.raises(ModelInvalid, match="names the input 'pixels'"):
        open_engine(directory, backend=backend)


def test_unknown_backend_names_the_known(write_model):
    with pytest.raises(UnknownComponent, match="onnxruntime.*torch.*did you mean 'onnxruntime'"):
        open_engine(write_model(), backend="onnxruntme")


def test_auto_takes_the_first_runtime_that_is_there(write_model):
    assert open_engine(write_model()).name == "onnxruntime"


@pytest.mark.torch
def test_auto_steps_down_and_says_so_once(write_model, monkeypatch, caplog):
    pytest.importorskip("torch")

    def absent(self, onnx_path):
        raise MissingDependency("needs onnxruntime; pip install onnxruntime")

    monkeypatch.setattr(ort_engine.Engine, "_start", absent)
    with caplog.at_level(logging.WARNING):
        engine = open_engine(write_model())
    assert engine.name == "torch"
    assert [r.message for r in caplog.records if "runs on torch" in r.message]
    assert len(caplog.records) == 1
    with pytest.raises(MissingDependency):
        open_engine(engine.model, backend="onnxruntime")      # a named one never steps down


def test_auto_never_steps_down_from_a_damaged_model(write_model):
    directory = write_model()
    replace_network(directory, b"not a network")
    with pytest.raises(ModelInvalid):
        open_engine(directory)


def test_devices_that_are_not_there(write_model, backend):
    with pytest.raises(EngineError, match="leave the device out"):
        open_engine(write_model(), backend=backend, device="cuda:99")


def test_check_passes_on_every_runtime_present(write_model):
    report = check_model(write_model())
    assert report.passed, str(report)
    assert [c.backend for c in report.backends] == engines.available_backends(report.model)
    assert "onnxruntime" in str(report) and "ok" in str(report)


def test_check_notices_a_changed_weight(write_model):
    onnx = pytest.importorskip("onnx")
    directory = write_model()
    stored = onnx.load(directory / "model.onnx")
    weights = next(t for t in stored.graph.initializer if t.name == "fc.w")
    values = np.array(onnx.numpy_helper.to_array(weights))
    values[0, 0] += 0.5
    weights.CopyFrom(onnx.numpy_helper.from_array(values, "fc.w"))
    replace_network(directory, stored.SerializeToString())
    report = check_model(find_model(directory))
    assert not report.passed
    assert all(c.difference > 100 * c.tolerance for c in report.backends)
    assert "FAILED" in str(report)


def test_check_of_a_network_no_runtime_can_load(write_model):
    directory = write_model()
    replace_network(directory, b"\x08\x01garbage")
    report = check_model(directory)
    assert not report.passed
    assert all(c.message for c in report.backends)


@pytest.mark.torch
def test_torch_names_the_operator_it_lacks(write_model):
    pytest.importorskip("torch")
    onnx = pytest.importorskip("onnx")
    directory = write_model()
    stored = onnx.load(directory / "model.onnx")
    stored.graph.node[1].op_type = "Softplus"
    replace_network(directory, stored.SerializeToString())
    with pytest.raises(EngineError, match="no operator Softplus"):
        open_engine(directory, backend="torch")
    assert open_engine(directory, backend="onnxruntime").name == "onnxruntime"


@pytest.mark.torch
def test_torch_keeps_the_callers_thread_count(write_model, tiny_images):
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    with open_engine(write_model(), backend="torch") as engine:
        engine.infer(tiny_images)
    assert torch.get_num_threads() == before
