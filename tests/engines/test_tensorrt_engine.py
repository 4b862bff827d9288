"""The TensorRT engine over FAKES of the driver, pycuda and TensorRT: order of calls and answers.

No GPU is involved and none of this says anything about speed; ``tests/gpu`` asks a real one.
"""
import gc
import logging
import sys
import threading

import numpy as np
import pytest
from mockdata.fake_gpu import install_fakes

from xfel_classify import engines
from xfel_classify.core import ConfigurationError, EngineError
from xfel_classify.engines import SupportsSubmit, find_model, gpu_driver, open_engine
from xfel_classify.engines.gpu_driver import DeviceLost
from xfel_classify.engines.plans import PlanCache

TOLERANT = "\n[tolerance]\nfloat32 = 1e-5\ntf32 = 1e-3\nfloat16 = 5e-3\n"


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    return install_fakes(monkeypatch, tmp_path / "cache")


@pytest.fixture
def model(write_model):
    directory = write_model()
    card = directory / "card.toml"
    card.write_text(card.read_text().split("[tolerance]")[0] + TOLERANT)
    (directory / "gpu.toml").write_text("[any]\nbatch = 4\nlatency_batch = 1\n")
    return find_model(directory)


def recipe(model, text):
    (model.directory / "gpu.toml").write_text(f"[any]\nbatch = 4\n{text}")
    return model


@pytest.mark.parametrize("version", ["8.6", "10", "11", "rtx"])
@pytest.mark.parametrize("precision", ["float32", "tf32", "float16"])
def test_one_code_path_for_every_version(gpu, model, tiny_images, forward, version, precision):
    module = gpu.install(version)
    with open_engine(model, "tensorrt", precision=precision) as engine:
        found = engine.infer(tiny_images)["hit"]
    tolerance = model.card.tolerance_of(precision)
    assert (engine.name, engine.precision) == ("tensorrt", precision)
    np.testing.assert_allclose(found, forward(tiny_images), atol=tolerance)
    # float32 must not silently be tf32, which is every version's default
    assert ("TF32" in module.flags) == (precision == "tf32")
    weak = version == "8.6" and precision == "float16"
    assert ("FP16" in module.flags, "OBEY_PRECISION_CONSTRAINTS" in module.flags) == (weak, weak)
    # no libraries beside TensorRT's own
    assert (module.tactics == 0b1000) == (version in ("8.6", "10"))
    assert module.network_flags == {"8.6": 1, "10": 3, "11": 1, "rtx": 1}[version]


def test_any_batch_is_padded_and_one_by_one_equals_batched(gpu, model, tiny_images, forward):
    images_BHW = np.concatenate([tiny_images, tiny_images[::-1], 2 * tiny_images])
    with open_engine(model, "tensorrt") as engine:
        assert engine.chunk == 4
        assert engine.infer(images_BHW[:0])["hit"].shape == (0, 2)
        batched = engine.infer(images_BHW)["hit"]
        singly = np.concatenate([engine.infer(image[None])["hit"] for image in images_BHW])
        kept = batched.copy()
        engine.infer(np.zeros_like(images_BHW))
        np.testing.assert_array_equal(batched, kept)            # fresh arrays
    np.testing.assert_array_equal(batched, singly)
    np.testing.assert_allclose(batched, forward(images_BHW), atol=1e-5)


@pytest.mark.parametrize(("max_batch", "lanes", "launch"), [(1, 1, 1), (3, 3, 3), (64, 3, 4)])
def test_single_images_take_the_quick_way(gpu, model, max_batch, lanes, launch, tiny_images,
                                          forward):
    with open_engine(model, "tensorrt", max_batch=max_batch) as engine:
        assert engine.chunk == launch
        np.testing.assert_allclose(engine.infer(tiny_images)["hit"], forward(tiny_images),
                                   atol=1e-5)
    assert gpu.cuda.journal.count("cuStreamCreate") == lanes


def test_launches_are_graphs_and_without_capture_the_answers_are_the_same(gpu, model, tiny_images):
    with open_engine(model, "tensorrt") as engine:
        begun = len(gpu.cuda.journal)
        captured = engine.infer(tiny_images)["hit"]
        since = gpu.cuda.journal[begun:]
        assert since.count("cuGraphLaunch") == 2 and "execute" not in since
    gpu.cuda.fails["cuStreamBeginCapture_v2"] = 900
    with open_engine(model, "tensorrt") as engine:
        begun = len(gpu.cuda.journal)
        plain = engine.infer(tiny_images)["hit"]
        since = gpu.cuda.journal[begun:]
        assert since.count("execute") == 2 and "cuGraphLaunch" not in since
    np.testing.assert_array_equal(captured, plain)


def test_submit_returns_before_the_work_is_done(gpu, model, tiny_images, forward):
    batches = [tiny_images, 2 * tiny_images, -tiny_images, tiny_images[:3]]
    with open_engine(model, "tensorrt") as engine:
        assert isinstance(engine, SupportsSubmit)
        begun = len(gpu.cuda.journal)
        first = engine.submit(batches[0][:4])
        second = engine.submit(batches[0][4:])
        assert "cuEventSynchronize" not in gpu.cuda.journal[begun:]
        answers = [engine.submit(batch) for batch in batches]       # the oldest are waited for
        for batch, pending in reversed(list(zip(batches, answers, strict=True))):
            np.testing.assert_allclose(pending.result()["hit"], forward(batch), atol=1e-5)
        for part, pending in ((batches[0][4:], second), (batches[0][:4], first)):
            np.testing.assert_allclose(pending.result()["hit"], forward(part), atol=1e-5)
            np.testing.assert_array_equal(pending.result()["hit"], pending.result()["hit"])


def test_everything_is_given_back_in_order(gpu, model, tiny_images):
    engine = open_engine(model, "tensorrt")
    engine.infer(tiny_images)
    engine.submit(tiny_images)                      # still on its way
    begun = len(gpu.cuda.journal)
    engine.close()
    gc.collect()
    order = list(dict.fromkeys(gpu.cuda.journal[begun:]))
    wanted = ["cuStreamSynchronize", "cuGraphDestroy", "execution freed", "engine freed",
              "cuMemFree_v2", "cuStreamDestroy_v2", "cuDevicePrimaryCtxRelease_v2"]
    assert [call for call in order if call in wanted] == wanted
    assert gpu.cuda.nothing_left()
    engine.open()                                   # may be opened again
    assert engine.infer(tiny_images)["hit"].shape == (5, 2)
    engine.close()
    assert gpu.cuda.nothing_left()


def test_every_thread_pushes_the_context_for_itself_and_leaves_none(gpu, model, tiny_images):
    answers = []
    with open_engine(model, "tensorrt") as engine:
        assert gpu.cuda.stack == []
        thread = threading.Thread(target=lambda: answers.append(engine.infer(tiny_images)))
        thread.start()
        thread.join()
        assert gpu.cuda.stack == [] and len(answers) == 1
    pushes = [c for c in gpu.cuda.journal if "Ctx" in c and "Current" in c]
    assert pushes == ["cuCtxPushCurrent_v2", "cuCtxPopCurrent_v2"] * (len(pushes) // 2)


def test_an_engine_may_be_closed_by_another_thread(gpu, model):
    engine = open_engine(model, "tensorrt")
    thread = threading.Thread(target=engine.close)
    thread.start()
    thread.join()
    del thread
    gc.collect()
    assert gpu.cuda.nothing_left()


def test_without_pycuda_the_driver_is_called_directly(gpu, model, tiny_images, forward,
                                                      monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "pycuda.driver", None)
    with caplog.at_level(logging.INFO), open_engine(model, "tensorrt") as engine:
        np.testing.assert_allclose(engine.infer(tiny_images)["hit"], forward(tiny_images),
                                   atol=1e-5)
    assert "pip install pycuda" in caplog.text
    assert gpu.cuda.nothing_left()


# --- the plan --------------------------------------------------------------------------------

def test_a_plan_is_built_once_and_read_after_that(gpu, model, tiny_images):
    with open_engine(model, "tensorrt") as engine:
        first = engine.infer(tiny_images)["hit"]
    with open_engine(model, "tensorrt", max_batch=3) as engine:         # the same plan
        assert engine.chunk == 3
    with open_engine(model, "tensorrt") as engine:
        np.testing.assert_array_equal(engine.infer(tiny_images)["hit"], first)
    assert gpu.tensorrt.builds == 1
    with open_engine(model, "tensorrt", precision="fp16"):
        assert gpu.tensorrt.builds == 2
    with open_engine(model, "tensorrt", max_batch=1):
        assert gpu.tensorrt.builds == 3             # quick single answers have their own


@pytest.mark.parametrize("damage", ["truncated", "changed", "foreign", "other version", "empty"])
def test_a_bad_plan_is_built_again(gpu, model, tiny_images, forward, damage, caplog):
    with open_engine(model, "tensorrt"):
        pass
    [(path, head)] = PlanCache().entries()
    whole = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(whole[:-100])
    elif damage == "changed":
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    elif damage == "foreign":
        path.write_bytes(whole.replace(head["key"]["gpu"].encode() or b"sm_90", b"sm_80"))
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        gpu.tensorrt.version = "11.1"               # refuses to load the old one
        gpu.tensorrt.builds = 0
    with caplog.at_level(logging.WARNING), open_engine(model, "tensorrt") as engine:
        np.testing.assert_allclose(engine.infer(tiny_images)["hit"], forward(tiny_images),
                                   atol=1e-5)
    assert "is not used" in caplog.text and "built again" in caplog.text
    assert gpu.tensorrt.builds == (1 if damage == "other version" else 2)


@pytest.mark.parametrize("what", ["leaves_unwritten", "gives_zeros", "noise"])
def test_a_plan_with_wrong_answers_is_never_used(gpu, model, what, monkeypatch):
    monkeypatch.setattr(gpu.tensorrt, what, 1e-4 if what == "noise" else True)
    reason = {"leaves_unwritten": "uncomputed", "gives_zeros": "nothing but zeros",
              "noise": "check.npz is missed"}[what]
    with pytest.raises(EngineError, match=f"no precision .*float32: .*{reason}.*onnxruntime"):
        open_engine(model, "tensorrt")
    assert PlanCache().entries() == [] and gpu.cuda.nothing_left()
    assert open_engine(model).name == "onnxruntime"             # auto steps down


def test_the_next_precision_is_taken_when_one_misses_the_tolerance(gpu, model, caplog,
                                                                   monkeypatch):
    model = recipe(model, 'precision = ["bfloat16", "float16", "tf32", "float32"]')
    card = model.directory / "card.toml"
    card.write_text(card.read_text().replace("float16 = 5e-3", "float16 = 1e-12"))
    model = find_model(model.directory)
    with caplog.at_level(logging.WARNING), open_engine(model, "tensorrt") as engine:
        assert engine.precision == "tf32"           # bfloat16: the card states no tolerance
    assert "float16: check.npz is missed" in caplog.text and "bfloat16" not in caplog.text
    with pytest.raises(EngineError, match="no precision"):
        open_engine(model, "tensorrt", precision="float16")     # a named one never steps down
    with pytest.raises(ConfigurationError, match="states no tolerance.*float16"):
        open_engine(model, "tensorrt", precision="bf16")


def test_tensorrt_that_cannot_build_is_an_engine_error(gpu, model):
    gpu.tensorrt.refuses = True
    with pytest.raises(EngineError, match="cannot build the network in float32.*onnxruntime"):
        open_engine(model, "tensorrt")
    assert gpu.cuda.nothing_left()


# --- trouble on the way ------------------------------------------------------------------------

def test_a_named_engine_ends_the_job_when_the_gpu_is_lost(gpu, model, tiny_images):
    engine = open_engine(model, "tensorrt")
    gpu.cuda.fails["cuGraphLaunch"] = 719
    with pytest.raises(DeviceLost, match=r"GPU 0.*CUDA_ERROR_FAKE \(719\).*--resume"):
        engine.infer(tiny_images)
    engine.close()


def test_answers_asked_for_too_late_are_an_error_and_not_garbage(gpu, model, tiny_images):
    engine = open_engine(model, "tensorrt")
    pending = engine.submit(tiny_images)
    engine.close()
    with pytest.raises(DeviceLost, match="on their way.*before close"):
        pending.result()


@pytest.mark.parametrize("when", ["cuGraphLaunch", "cuEventSynchronize", "unwritten"])
def test_auto_goes_on_without_the_gpu_and_loses_no_answer(gpu, model, tiny_images, forward, when,
                                                          caplog):
    engine = open_engine(model)
    assert (engine.name, isinstance(engine, SupportsSubmit)) == ("tensorrt", True)
    before = engine.submit(tiny_images)
    if when == "unwritten":
        gpu.tensorrt.leaves_unwritten = True
    else:
        gpu.cuda.fails[when] = 719
    after = engine.submit(2 * tiny_images)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_allclose(before.result()["hit"], forward(tiny_images), atol=1e-5)
        np.testing.assert_allclose(after.result()["hit"], forward(2 * tiny_images), atol=1e-5)
        np.testing.assert_allclose(engine.infer(tiny_images)["hit"], forward(tiny_images),
                                   atol=1e-5)
    assert (engine.name, engine.precision) == ("onnxruntime", "float32")
    assert caplog.text.count("this rank goes on with onnxruntime") == 1
    engine.close()


def test_a_wrong_shape_is_the_callers_error_and_not_the_gpus(gpu, model, tiny_images):
    engine = open_engine(model)
    with pytest.raises(EngineError, match=r"shape \(B, 12, 10\)") as caught:
        engine.infer(tiny_images[:, :5])
    assert not isinstance(caught.value, DeviceLost) and engine.name == "tensorrt"
    engine.close()


def test_nan_in_an_image_stays_that_images_own(gpu, model, tiny_images, forward):
    tiny_images[2, 3, 3] = np.nan
    with open_engine(model, "tensorrt") as engine:
        found = engine.infer(tiny_images)["hit"]
    assert np.isnan(found[2]).all()
    np.testing.assert_allclose(found[[0, 1, 3, 4]], forward(tiny_images[[0, 1, 3, 4]]), atol=1e-5)


# --- who gets which GPU --------------------------------------------------------------------------

def test_ranks_that_do_not_fit_are_told_how_many_do(gpu, model):
    gpu.cuda.memory = gpu.cuda.free = 4 << 30
    gpu_driver.take_place(2, 8)
    with pytest.raises(EngineError, match=r"8 ranks share GPU 0 .*at most 6 fit; start fewer"):
        open_engine(model, "tensorrt")
    gpu_driver.take_place(2, 6)
    open_engine(model, "tensorrt").close()
    gpu.cuda.free = 1000
    with pytest.raises(EngineError, match="0 MiB free.*other processes use the rest"):
        open_engine(model, "tensorrt")


def test_sharing_and_mps_are_named(gpu, model, caplog, monkeypatch, tmp_path):
    import os

    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    gpu_driver.take_place(0, 3)
    with caplog.at_level(logging.INFO), open_engine(model, "tensorrt"):
        assert "3 ranks share GPU 0" in caplog.text and "no MPS daemon" in caplog.text
    os.mkfifo(tmp_path / "control")
    with caplog.at_level(logging.INFO), open_engine(model, "tensorrt"):
        assert f"through MPS ({tmp_path})" in caplog.text


def test_cpu_and_other_precisions_elsewhere(gpu, model):
    with open_engine(model, device="cpu") as engine:
        assert engine.name == "onnxruntime"
    with pytest.raises(EngineError, match="device 'cpu'"):
        open_engine(model, "tensorrt", device="cpu")
    with pytest.raises(EngineError, match="onnxruntime engine computes in float32"):
        open_engine(model, "onnxruntime", precision="float16")
    with pytest.raises(ConfigurationError, match="'cuda0' is no GPU"):
        open_engine(model, "tensorrt", device="cuda0")
    with pytest.raises(EngineError, match="'cuda:1' was asked for, this process sees 1"):
        open_engine(model, "tensorrt", device="cuda:1")


def test_the_gpu_is_preferred_where_there_is_one(gpu, model):
    assert engines.available_backends(model)[0] == "tensorrt"
    report = engines.check_model(model)
    assert report.passed and report.backends[0].backend == "tensorrt"


# --- models with a second input and a number as the answer -------------------------------------

@pytest.fixture
def ruler(model, tmp_path):
    """A model whose answer is the mean of the image times the first number of the geometry."""
    import hashlib
    import shutil

    onnx = pytest.importorskip("onnx")
    make, float32 = onnx.helper.make_node, onnx.TensorProto.FLOAT
    tensor = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [make("GlobalAveragePool", ["images"], ["mean"]), make("Flatten", ["mean"], ["flat"]),
         make("Slice", ["geometry", "zero", "one", "one"], ["distance"]),
         make("Mul", ["flat", "distance"], ["length"])], "ruler",
        [tensor("images", float32, ["B", 1, 12, 10]), tensor("geometry", float32, ["B", 4])],
        [tensor("length", float32, ["B", 1])],
        [onnx.numpy_helper.from_array(np.array([0], np.int64), "zero"),
         onnx.numpy_helper.from_array(np.array([1], np.int64), "one")])
    content = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)],
                                     ir_version=8).SerializeToString()
    directory = tmp_path / "ruler"
    shutil.copytree(model.directory, directory)
    (directory / "model.onnx").write_bytes(content)
    card = (directory / "card.toml").read_text().replace('"tiny"', '"ruler"').replace(
        model.sha256, hashlib.sha256(content).hexdigest())
    start, end = card.index("[[tasks]]"), card.index("[window]")
    (directory / "card.toml").write_text(
        'geometry = "geometry"\n' + card[:start] + '[[tasks]]\nname = "length"\n'
        'output = "length"\nkind = "regression"\n\n' + card[end:])
    images_BHW = np.random.default_rng(1).normal(2, 3, (3, 12, 10)).astype(np.float32)
    geometry_B4 = np.arange(12, dtype=np.float32).reshape(3, 4)
    np.savez(directory / "check.npz", images=images_BHW, geometry=geometry_B4,
             length=images_BHW.mean((1, 2))[:, None] * geometry_B4[:, :1])
    return find_model(directory)


def test_geometry_goes_with_its_image(gpu, ruler, tiny_images):
    geometry_B4 = 10 * np.arange(20, dtype=np.float32).reshape(5, 4)
    expected = tiny_images.mean((1, 2)) * geometry_B4[:, 0]
    for backend in ("tensorrt", "auto"):
        with open_engine(ruler, backend) as engine:
            found = engine.infer(tiny_images, geometry_B4)["length"]
            assert (engine.name, found.shape) == ("tensorrt", (5, 1))
            # far above 1: a number is no probability and is not held to its range
            np.testing.assert_allclose(found[:, 0], expected, rtol=1e-5)
            with pytest.raises(EngineError, match="needs the geometry of its 5 images"):
                engine.infer(tiny_images)
    engine = open_engine(ruler)
    pending = engine.submit(tiny_images, geometry_B4)
    gpu.cuda.fails["cuEventSynchronize"] = 719
    np.testing.assert_allclose(pending.result()["length"][:, 0], expected, rtol=1e-5)
    assert engine.name == "onnxruntime"
