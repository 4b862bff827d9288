"""The driver gate: no driver, no device, whose device; ctypes against a FAKE libcuda in C."""
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from xfel_classify.core import ConfigurationError, EngineError, MissingDependency
from xfel_classify.engines import available_backends, gpu_driver, open_engine, tensorrt_build
from xfel_classify.engines import tensorrt as engine_module
from xfel_classify.engines.gpu_driver import (
    Device,
    Place,
    check_budget,
    choose_device,
    no_gpu,
    open_driver,
    place,
    ranks_per_gpu,
)
from xfel_classify.engines.tensorrt_memory import DriverContext

TWO = [Device(0, "A", (9, 0), 80 << 30), Device(1, "B", (8, 0), 40 << 30)]
LAUNCHERS = [name for pair in gpu_driver._LAUNCHERS for name in pair]


@pytest.fixture(scope="module")
def fake_library(tmp_path_factory):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler for the fake libcuda")
    library = tmp_path_factory.mktemp("cuda") / "libfakecuda.so"
    source = Path(__file__).parents[1] / "mockdata" / "fake_cuda.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-w", "-o", library, source], check=True)
    return str(library)


@pytest.fixture
def library(fake_library, monkeypatch):
    monkeypatch.setattr(gpu_driver, "LIBRARY", fake_library)
    gpu_driver._open.cache_clear()
    yield fake_library
    gpu_driver._open.cache_clear()


@pytest.fixture(autouse=True)
def nobody_placed(monkeypatch):
    monkeypatch.setattr(gpu_driver, "_place", None)
    for name in [*LAUNCHERS, "SLURM_GPUS_ON_NODE"]:
        monkeypatch.delenv(name, raising=False)


def test_no_driver_is_one_sentence(monkeypatch, write_model):
    monkeypatch.setattr(gpu_driver, "LIBRARY", "libcuda_is_not_here.so.1")
    assert "no CUDA driver here (libcuda_is_not_here" in no_gpu()
    with pytest.raises(EngineError, match="GPU was asked for, but there is no CUDA driver here"
                                          ".*--backend onnxruntime"):
        open_engine(write_model(), "tensorrt")


def test_without_a_gpu_auto_is_silent_and_nothing_is_imported(monkeypatch, write_model, caplog):
    monkeypatch.setattr(gpu_driver, "LIBRARY", "libcuda_is_not_here.so.1")
    directory = write_model()
    before = set(sys.modules)
    with caplog.at_level("WARNING"):
        assert open_engine(directory).name == "onnxruntime"
    assert not caplog.records and "tensorrt" not in available_backends()
    with caplog.at_level("DEBUG"):
        open_engine(directory)
    assert ("model tiny runs on onnxruntime and not on a GPU: there is no CUDA driver here"
            in caplog.text)
    assert not {"tensorrt", "tensorrt_rtx", "pycuda"} & (set(sys.modules) - before)


@pytest.mark.parametrize(("fault", "sentence"), [
    ("init:100", r"does not start: cuInit gives CUDA_ERROR_NO_DEVICE \(100\): words of the fake"),
    ("init:999", r"cuInit gives error \(999\)"),
    ("count:2", "cannot list its devices: CUDA_ERROR_OUT_OF_MEMORY"),
    ("devices:0", r"no device \(CUDA_VISIBLE_DEVICES=''\)"),
])
def test_the_first_cause_is_named(library, monkeypatch, fault, sentence):
    monkeypatch.setenv("FAKE_CUDA", fault)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(EngineError, match=sentence):
        open_driver()


def test_devices_are_described(library):
    driver = open_driver()
    assert driver.version == 12040
    assert driver.devices() == [Device(0, "FAKE GPU 10", (9, 0), 80 << 30, 10),
                                Device(1, "FAKE GPU 11", (9, 0), 80 << 30, 11)]
    assert str(driver.devices()[1]) == "GPU 1 (FAKE GPU 11, 80 GiB)"


def test_memory_goes_there_and_back(library):
    driver = open_driver()
    context = DriverContext(driver, driver.devices()[1])
    with pytest.raises(EngineError, match="cuMemGetInfo_v2"):
        driver.free_memory()                        # no context is current
    with context.current(), context.current():
        assert driver.free_memory() == (79 << 30, 80 << 30)
        memory = context.memory()
        there = memory.alloc(64)
        out = memory.pinned((4, 4), np.float32)
        back = memory.pinned((4, 4), np.float32)
        out[...] = np.arange(16).reshape(4, 4)
        memory.h2d(there, out[:3])
        driver.fill(there + 48, 0xFFF0DEAD, 16, memory.stream)
        memory.d2h(back, there)
        memory.sync()
        np.testing.assert_array_equal(back[:3], out[:3])
        assert (back[3].view(np.uint32) == 0xFFF0DEAD).all() and np.isnan(back[3]).all()
        event = driver.event()
        driver.record(event, memory.stream)
        driver.wait_on(memory.stream, event)
        driver.wait(event)
        assert driver.elapsed_ms(event, event) == 1.5
        driver.drop_event(event)
        with pytest.raises(EngineError, match=r"OUT_OF_MEMORY \(2\).*smaller batch, or fewer"):
            memory.alloc(1 << 33)
        del out, back
        memory.close()
    context.close()


def test_a_module_without_its_libraries_says_so(monkeypatch, tmp_path):
    tensorrt_build.find_tensorrt.cache_clear()
    (tmp_path / "tensorrt.py").write_text(
        "raise ImportError('libnvonnxparser.so.11: cannot open shared object file')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    monkeypatch.setattr(tensorrt_build, "MODULES", ("tensorrt",))
    with pytest.raises(MissingDependency, match="installed without what it needs .libnvonnxparser"
                                                ".*--backend onnxruntime"):
        tensorrt_build.find_tensorrt()
    (tmp_path / "tensorrt.py").write_text("")
    sys.modules.pop("tensorrt", None)
    with pytest.raises(MissingDependency, match="has no builder"):
        tensorrt_build.find_tensorrt()
    sys.modules.pop("tensorrt", None)
    monkeypatch.setattr(tensorrt_build, "MODULES", ("no_such_tensorrt",))
    with pytest.raises(MissingDependency, match="needs TensorRT; it is not installed"):
        tensorrt_build.find_tensorrt()


def test_auto_with_a_gpu_but_a_broken_tensorrt_warns(library, monkeypatch, write_model, caplog):
    def broken():
        raise MissingDependency("tensorrt is installed without what it needs")

    monkeypatch.setattr(engine_module, "find_tensorrt", broken)
    monkeypatch.setattr(engine_module, "installed", lambda: ["tensorrt"])
    with caplog.at_level("WARNING"):
        assert open_engine(write_model()).name == "onnxruntime"
    assert "runs on onnxruntime (tensorrt: tensorrt is installed without" in caplog.text
    assert len(caplog.records) == 1


# --- whose GPU -----------------------------------------------------------------------------------

def test_ranks_of_a_node_take_turns():
    assert [choose_device(TWO, None, Place(i, 5)).index for i in range(5)] == [0, 1, 0, 1, 0]
    assert choose_device(TWO, "cuda:1", Place(0, 5)).index == 1
    assert choose_device(TWO[:1], None, Place(3, 4)).index == 0     # one GPU per task: mine
    with pytest.raises(ConfigurationError, match="is no GPU"):
        choose_device(TWO, "onnxruntime", Place())


@pytest.mark.parametrize(("devices", "asked", "on_node", "ranks", "expected"), [
    (2, None, "", 5, 3), (2, "cuda:0", "", 5, 5), (1, None, "4", 4, 1), (1, None, "4", 9, 3),
    (4, None, "", 1, 1),
])
def test_how_many_share_one(monkeypatch, devices, asked, on_node, ranks, expected):
    if on_node:
        monkeypatch.setenv("SLURM_GPUS_ON_NODE", on_node)      # Slurm shows each task its own
    assert ranks_per_gpu(devices, asked, Place(0, ranks)) == expected


def test_place_comes_from_the_pipeline_else_from_the_launcher(monkeypatch):
    assert place() == Place(0, 1)
    monkeypatch.setenv("SLURM_LOCALID", "3")
    assert place() == Place(3, 4)
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "2")
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_SIZE", "6")
    assert place() == Place(2, 6)
    gpu_driver.take_place(1, 4)                     # working ranks only: smd0 and eb do not count
    assert place() == Place(1, 4)


def test_a_budget_says_how_many_fit():
    gib = 1 << 30
    check_budget(TWO[1], 4 * gib, 9, free_bytes=30 * gib, still_bytes=3 * gib)
    with pytest.raises(EngineError, match=r"10 ranks share GPU 1 \(B, 40 GiB\), each needs "
                                          "4096 MiB: at most 9 fit"):
        check_budget(TWO[1], 4 * gib, 10, free_bytes=30 * gib, still_bytes=3 * gib)
    with pytest.raises(EngineError, match="has 2048 MiB free, this rank needs another 3072 MiB"):
        check_budget(TWO[1], 4 * gib, 2, free_bytes=2 * gib, still_bytes=3 * gib)
