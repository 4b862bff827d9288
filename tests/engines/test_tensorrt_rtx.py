"""The real TensorRT-RTX parses and builds every shipped model, in every precision, without a GPU.

Building needs no driver as long as no GPU is named; running does, and is tested in ``tests/gpu``.
"""
import numpy as np
import pytest

from xfel_classify.core import EngineError
from xfel_classify.engines import find_model, list_models, lowering
from xfel_classify.engines.cards import read_check
from xfel_classify.engines.recipes import PRECISIONS, recipe_for
from xfel_classify.engines.tensorrt_build import Shape, build_plan, logger

tensorrt = pytest.importorskip("tensorrt_rtx", reason="pip install tensorrt_rtx to build plans "
                               "without a GPU")

NAMES = sorted(model.name for model in list_models())


def build(model, precision):
    """The plan of the batch that the model's recipe states."""
    card, recipe = model.card, recipe_for(model, (9, 0))
    images_BHW, geometry_B4, _ = read_check(model)
    inputs = [(card.input, (1, *card.window.shape))]
    examples = {card.input: images_BHW[:2, None]}
    if card.geometry:
        inputs.append((card.geometry, (4,)))
        examples[card.geometry] = geometry_B4[:2]
    seen = []
    network = lowering.lower(model.onnx_path.read_bytes(), precision, recipe, examples)
    plan = build_plan(tensorrt, network, precision, Shape(tuple(inputs), recipe.batch), recipe,
                      lambda *signature: seen.append(signature))
    [(names, outputs)] = seen
    assert names == [name for name, _ in inputs]
    assert {task.output: task.width for task in card.tasks}.items() <= outputs.items()
    return plan


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", NAMES or [None])
def test_shipped_models_build(name, precision):
    if name is None:
        pytest.skip("no model is shipped yet")
    assert len(build(find_model(name), precision)) > 1000


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_small_network_builds(write_model, precision):
    plan = build(find_model(write_model()), precision)
    assert isinstance(plan, bytes) and len(plan) > 1000


def test_an_operator_it_does_not_know_is_named(write_model):
    onnx = pytest.importorskip("onnx")
    directory = write_model()
    stored = onnx.load(directory / "model.onnx")
    stored.graph.node[1].op_type, stored.graph.node[1].domain = "Frobnicate", "example"
    stored.opset_import.append(onnx.helper.make_opsetid("example", 1))
    model = find_model(directory)
    shape = Shape(((model.card.input, (1, *model.window.shape)),), 4)
    with pytest.raises(EngineError, match="cannot read the network in float32.*Frobnicate"):
        build_plan(tensorrt, stored.SerializeToString(), "float32", shape,
                   recipe_for(model, (9, 0)), lambda *signature: None)


def test_a_fixed_batch_in_the_file_is_refused(write_model):
    onnx = pytest.importorskip("onnx")
    directory = write_model()
    stored = onnx.load(directory / "model.onnx")
    stored.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 3
    model = find_model(directory)
    shape = Shape(((model.card.input, (1, *model.window.shape)),), 4)
    with pytest.raises(EngineError, match="free B|cannot build"):
        build_plan(tensorrt, stored.SerializeToString(), "float32", shape,
                   recipe_for(model, (9, 0)), lambda *signature: None)


def test_messages_reach_the_log(caplog):
    with caplog.at_level("INFO", logger="xfel_classify.engines.tensorrt_build"):
        logger(tensorrt).log(tensorrt.ILogger.Severity.ERROR, "something")
    assert "TensorRT: something" in caplog.text


def test_loading_a_plan_without_a_driver_is_refused_not_fatal(write_model):
    from xfel_classify.engines.gpu_driver import no_gpu

    if not no_gpu():
        pytest.skip("there is a GPU here; tests/gpu runs plans on it")
    plan = build(find_model(write_model()), "float32")
    assert tensorrt.Runtime(logger(tensorrt)).deserialize_cuda_engine(plan) is None
    assert np.frombuffer(plan, np.uint8).any()
