"""``xfel-classify engines``: what it prints and how it ends, with and without a (FAKE) GPU."""
import sys
from types import ModuleType

import pytest
from mockdata.fake_gpu import FakeCuda, FakeDriver, FakeTensorRT, fake_pycuda

from xfel_classify.cli import main
from xfel_classify.engines import gpu_driver
from xfel_classify.engines import tensorrt as engine_module


@pytest.fixture
def model(tmp_path, monkeypatch):
    """The three-layer model of the engine tests, in a directory of its own."""
    import importlib.util
    from pathlib import Path

    where = Path(__file__).parents[1] / "engines" / "conftest.py"
    spec = importlib.util.spec_from_file_location("engine_fixtures", where)
    fixtures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fixtures)
    import hashlib

    import numpy as np

    directory = tmp_path / "tiny"
    directory.mkdir()
    network = fixtures.tiny_onnx()
    images = np.random.default_rng(5).normal(2.0, 3.0, (5, 12, 10)).astype(np.float32)
    (directory / "model.onnx").write_bytes(network)
    card = fixtures.CARD_TOML.format(name="tiny", sha256=hashlib.sha256(network).hexdigest())
    (directory / "card.toml").write_text(card + "float16 = 5e-3\n")
    (directory / "gpu.toml").write_text("[any]\nprecision = ['float16']\nbatch = 4\n")
    np.savez(directory / "check.npz", images=images, hit=fixtures.tiny_forward(images))
    monkeypatch.setenv("XFEL_CLASSIFY_CACHE", str(tmp_path / "cache"))
    return str(directory)


@pytest.fixture
def gpu(monkeypatch):
    cuda = FakeCuda(devices=2)
    pycuda = ModuleType("pycuda")
    pycuda.driver = fake_pycuda(cuda)
    monkeypatch.setitem(sys.modules, "pycuda", pycuda)
    monkeypatch.setitem(sys.modules, "pycuda.driver", pycuda.driver)
    driver, module = FakeDriver(cuda), FakeTensorRT(cuda)
    monkeypatch.setattr(gpu_driver, "open_driver", lambda: driver)
    monkeypatch.setattr(engine_module, "open_driver", lambda: driver)
    monkeypatch.setattr(engine_module, "find_tensorrt", lambda: module)
    monkeypatch.setattr(engine_module, "no_gpu", lambda: "")
    monkeypatch.setattr(engine_module, "installed", lambda: ["tensorrt"])
    return module


def test_build_before_the_beamtime_then_list(model, gpu, capsys):
    assert main(["engines", "build", model]) == 0
    shown = capsys.readouterr().out
    assert shown.count("ready, check.npz met within") == 2      # throughput and single answers
    assert "tiny float16, batch 1, on GPU 0 (FAKE GPU" in shown and "plans are in" in shown
    assert gpu.builds == 2                                      # two GPUs of one kind: once
    assert main(["engines", "build", model, "--for", "cuda:1"]) == 0
    assert gpu.builds == 2 and "on GPU 1 (FAKE GPU" in capsys.readouterr().out
    assert main(["engines", "list", model]) == 0
    shown = capsys.readouterr().out
    assert shown.count("plan tiny float16 for FAKE GPU (sm_90)") == 2
    assert "tensorrt" in shown.splitlines()[0]


def test_a_build_that_fails_says_so_and_ends_with_1(model, gpu, capsys):
    gpu.refuses = True
    assert main(["engines", "build", model, "--precision", "fp32"]) == 1
    assert "FAILED: tensorrt 11 cannot build the network" in capsys.readouterr().out


def test_build_without_a_gpu_is_one_message(model, monkeypatch, capsys):
    monkeypatch.setattr(gpu_driver, "LIBRARY", "libcuda_is_not_here.so.1")
    assert main(["engines", "build", model]) != 0
    shown = capsys.readouterr().err
    assert "no CUDA driver here" in shown and "Traceback" not in shown


def test_bench_measures_every_precision_even_without_a_tolerance(model, gpu, capsys):
    assert main(["engines", "bench", model, "--backend", "tensorrt", "--precision", "tf32",
                 "--batch", "2"]) == 0
    assert "tiny, tensorrt, tf32, 2:" in capsys.readouterr().out


def test_bench_and_list_on_the_cpu(model, monkeypatch, capsys):
    monkeypatch.setattr(gpu_driver, "LIBRARY", "libcuda_is_not_here.so.1")
    assert main(["engines", "bench", model, "--backend", "onnxruntime", "--batch", "1"]) == 0
    assert "tiny, onnxruntime, float32, 1:" in capsys.readouterr().out
    assert main(["engines", "list", model]) == 0
    assert "tiny 0.1" in capsys.readouterr().out
