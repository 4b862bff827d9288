"""Networks rewritten for other precisions: still the same network, as ONNX Runtime sees it."""
import numpy as np
import pytest

from xfel_classify.core import ConfigurationError, EngineError, ModelInvalid
from xfel_classify.engines import find_model, recipes
from xfel_classify.engines.lowering import digest, for_old_parser, lower
from xfel_classify.engines.recipes import Recipe, recipe_for, usable_precisions

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

RNG = np.random.default_rng(11)


def node(kind, inputs, output, **attributes):
    return onnx.helper.make_node(kind, inputs, [output], name=output, **attributes)


def network(nodes, weights, shape=("B", 1, 16, 16), width=3):
    float32 = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        nodes, "test", [onnx.helper.make_tensor_value_info("images", float32, shape)],
        [onnx.helper.make_tensor_value_info("y", float32, ["B", width])],
        [onnx.numpy_helper.from_array(np.asarray(v), k) for k, v in weights.items()])
    made = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)],
                                  ir_version=9)
    onnx.checker.check_model(made)
    return made.SerializeToString()


def weights():
    rng = np.random.default_rng(3)
    return {"a.w": (rng.normal(size=(4, 1, 3, 3)) / 3).astype(np.float32),
            "a.b": rng.normal(size=4).astype(np.float32),
            "b.w": (rng.normal(size=(4, 4, 3, 3)) / 6).astype(np.float32),
            "f.w": (rng.normal(size=(3, 4)) / 2).astype(np.float32),
            "f.b": rng.normal(size=3).astype(np.float32),
            "flat": np.array([0, 4], np.int64)}


def residual():
    """Conv, ReLU, Conv, Add (a residual block), mean, Reshape, Gemm, softmax."""
    return network([
        node("Conv", ["images", "a.w", "a.b"], "c1", kernel_shape=[3, 3], pads=[1] * 4),
        node("Relu", ["c1"], "r1"),
        node("Conv", ["r1", "b.w"], "c2", kernel_shape=[3, 3], pads=[1] * 4),
        node("Add", ["c2", "r1"], "s"),
        node("MaxPool", ["s"], "p", kernel_shape=[2, 2], strides=[2, 2]),
        node("GlobalAveragePool", ["p"], "g"),
        node("Reshape", ["g", "flat"], "f"),
        node("Gemm", ["f", "f.w", "f.b"], "l", transB=1),
        node("Softmax", ["l"], "y", axis=1)], weights())


def run(content, images_B1HW):
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return session.run(None, {"images": images_B1HW})[0]


def exactly(content, images_B1HW):
    """By ONNX's own evaluator, which does compute in float16 (the CPU runtime widens it)."""
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(onnx.load_model_from_string(content))
    return evaluator.run(None, {"images": images_B1HW})[0]


def kinds(content, kind):
    """{output of a node of ``kind``: its element type} after ONNX's own type inference."""
    stored = onnx.shape_inference.infer_shapes(onnx.load_model_from_string(content))
    types = {v.name: v.type.tensor_type.elem_type for v in stored.graph.value_info}
    return [types.get(n.output[0], 1) for n in stored.graph.node if n.op_type == kind]


IMAGES = RNG.poisson(3.0, (6, 1, 16, 16)).astype(np.float32)
HALF, BFLOAT, FLOAT = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16,
                       onnx.TensorProto.FLOAT)


def test_float32_and_tf32_are_the_file_itself():
    content = residual()
    assert lower(content, "float32", Recipe()) is content
    assert lower(content, "tf32", Recipe()) is content


def test_float16_computes_between_casts_and_gives_the_same_answer():
    low = lower(residual(), "float16", Recipe())
    assert kinds(low, "Conv") == [HALF, HALF] and kinds(low, "Add") == [HALF]
    assert kinds(low, "MaxPool") == [HALF] and kinds(low, "Gemm") == [HALF]
    assert kinds(low, "Softmax") == [FLOAT]
    assert len(kinds(low, "Cast")) == 2             # one in, one out
    assert low == lower(residual(), "float16", Recipe())
    np.testing.assert_allclose(run(low, IMAGES), run(residual(), IMAGES), atol=2e-3)


def test_bfloat16_is_typed_so():
    low = lower(residual(), "bfloat16", Recipe())
    assert kinds(low, "Conv") == [BFLOAT, BFLOAT] and kinds(low, "Softmax") == [FLOAT]


def test_layers_can_be_kept_in_float32():
    recipe = Recipe(keep={"float16": ["b.w", "Gemm"]})
    low = lower(residual(), "float16", recipe)
    assert kinds(low, "Conv") == [HALF, FLOAT] and kinds(low, "Gemm") == [FLOAT]
    np.testing.assert_allclose(run(low, IMAGES), run(residual(), IMAGES), atol=2e-3)


def test_counts_beyond_float16_need_the_scale():
    bright = IMAGES.copy()
    bright[:3] *= 2e4                               # up to 2e5, float16 ends at 65504
    expected = exactly(residual(), bright)
    with np.errstate(all="ignore"):
        plain = exactly(lower(residual(), "float16", Recipe()), bright)
    assert not np.isfinite(plain[:3]).all()
    recipe = Recipe(scale={"a.w": 2.0**-8}, keep={"float16": ["b.w", "Relu", "Gemm"]})
    scaled = exactly(lower(residual(), "float16", recipe), bright)
    np.testing.assert_allclose(scaled, expected, atol=5e-3)


@pytest.mark.parametrize("factor", [2.0**-8, 2.0**-4, 4.0])
def test_a_power_of_two_changes_no_mantissa(factor):
    recipe = Recipe(keep={"float16": ["b.w", "Gemm"]})
    scaled = Recipe(keep=recipe.keep, scale={"a.w": factor})
    np.testing.assert_allclose(run(lower(residual(), "float16", scaled), IMAGES),
                               run(lower(residual(), "float16", recipe), IMAGES), atol=1e-3)


def test_weights_that_do_not_fit_into_float16_are_refused():
    big = weights()
    big["a.w"] = big["a.w"] * np.float32(1e6)
    content = network([
        node("Conv", ["images", "a.w", "a.b"], "c1", kernel_shape=[3, 3]),
        node("GlobalAveragePool", ["c1"], "g"), node("Reshape", ["g", "flat"], "f"),
        node("Gemm", ["f", "f.w", "f.b"], "y", transB=1)], big)
    with pytest.raises(EngineError, match="weights a.w do not fit into float16"):
        lower(content, "float16", Recipe())


def test_a_recipe_for_another_network_is_noticed(caplog):
    lower(residual(), "float16", Recipe(scale={"a.w": 0.5}, keep={"float16": ["Gemm"]}))
    assert not caplog.records
    lower(residual(), "float16", Recipe(scale={"stem.w": 0.5}))
    assert "names stem.w, which the network does not have; its layers are a.w, b.w" in caplog.text


def test_int8_wraps_inputs_and_weights():
    low = lower(residual(), "int8", Recipe(), {"images": IMAGES})
    stored = onnx.load_model_from_string(low)
    assert [n.op_type for n in stored.graph.node].count("DequantizeLinear") == 6
    np.testing.assert_allclose(run(low, IMAGES), run(residual(), IMAGES), atol=0.03)
    kept = Recipe(keep={"int8": ["a.w"]})
    low = lower(residual(), "int8", kept, {"images": IMAGES})
    ops = [n.op_type for n in onnx.load_model_from_string(low).graph.node]
    assert ops.count("DequantizeLinear") == 4
    np.testing.assert_allclose(run(low, IMAGES), run(residual(), IMAGES), atol=0.03)


def test_ranges_come_from_the_recipe_or_from_examples():
    stated = Recipe(largest={"a.w": 12.0, "b.w": 12.0, "f.w": 6.0})
    low = lower(residual(), "int8", stated)
    np.testing.assert_allclose(run(low, IMAGES), run(residual(), IMAGES), atol=0.05)
    with pytest.raises(EngineError, match="needs example images for its ranges"):
        lower(residual(), "int8", Recipe())


def test_float8_is_a_valid_network_of_a_newer_opset():
    low = onnx.load_model_from_string(
        lower(residual(), "float8", Recipe(), {"images": IMAGES}))
    assert low.opset_import[0].version >= 19
    zeros = [t for t in low.graph.initializer if t.name.endswith("_zero")]
    assert zeros and all(t.data_type == onnx.TensorProto.FLOAT8E4M3FN for t in zeros)


def test_an_old_parser_gets_the_same_network_in_opset_17():
    nodes = [node("ReduceMean", ["images", "axes"], "m", keepdims=1, noop_with_empty_axes=0),
             node("Sub", ["images", "m"], "c"),
             node("Conv", ["c", "a.w", "a.b"], "c1", kernel_shape=[3, 3]),
             node("GlobalAveragePool", ["c1"], "g"), node("Reshape", ["g", "flat"], "f"),
             node("Gemm", ["f", "f.w", "f.b"], "y", transB=1)]
    content = network(nodes, weights() | {"axes": np.array([2, 3], np.int64)})
    for precision in ("float32", "float16"):
        low = lower(content, precision, Recipe())
        old = for_old_parser(low)
        assert onnx.load_model_from_string(old).opset_import[0].version == 17
        np.testing.assert_array_equal(run(old, IMAGES), run(low, IMAGES))
    newer = onnx.load_model_from_string(residual())
    newer.opset_import[0].version = 19
    assert for_old_parser(newer.SerializeToString()) == newer.SerializeToString()


def test_a_damaged_network_is_an_invalid_model():
    with pytest.raises(ModelInvalid, match="not a valid ONNX file"):
        lower(b"\x08\x01garbage", "float16", Recipe())


def test_everything_that_decides_is_in_the_digest():
    base = Recipe()
    others = [digest("bfloat16", base), digest("float16", Recipe(scale={"a.w": 0.5})),
              digest("float16", Recipe(keep={"float16": ["Gemm"]})),
              digest("float16", Recipe(largest={"a.w": 1.0}))]
    assert digest("float16", base) == digest("float16", Recipe(batch=3, keep={"int8": ["x"]}))
    assert len({digest("float16", base), *others}) == 5


# --- recipes --------------------------------------------------------------------------------------

@pytest.fixture
def model(write_model, tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "shipped_directory", lambda: tmp_path / "shipped")
    (tmp_path / "shipped" / "recipes").mkdir(parents=True)
    return find_model(write_model())


def write(model, text, where="default"):
    place = model.directory / "gpu.toml" if where == "model" else (
        recipes.shipped_directory() / "recipes" / f"{where}.toml")
    place.write_text(text)


def test_recipes_are_searched_from_the_models_own_to_the_default(model):
    assert recipe_for(model, (9, 0)) == Recipe()
    write(model, "[any]\nbatch = 16\n")
    assert recipe_for(model, (9, 0)).batch == 16
    write(model, "[any]\nbatch = 32\n", "tiny")
    assert recipe_for(model, (9, 0)).batch == 32
    write(model, "[any]\nbatch = 64\nworkspace_MiB = 7\n[sm_90]\nbatch = 128\n", "model")
    assert recipe_for(model, (9, 0)).batch == 128 and recipe_for(model, (8, 0)).batch == 64
    assert recipe_for(model, (9, 0)).workspace_MiB == 7


@pytest.mark.parametrize(("text", "message"), [
    ("[any]\nbatches = 3", "unknown key 'batches'.*did you mean 'batch'"),
    ("[h100]\nbatch = 3", r"unknown table \[h100\]"),
    ("[any]\nprecision = ['fp12']", "unknown precision 'fp12'"),
    ("[any]\nscale = {'a.w' = 0.01}", "no power of two"),
    ("[any]\nbatch = 0", "at least 1"),
    ("[any", "cannot be read"),
])
def test_a_wrong_recipe_names_the_key(model, text, message):
    write(model, text, "model")
    with pytest.raises(ConfigurationError, match=message):
        recipe_for(model, (9, 0))


def test_precisions_need_the_cards_word(model):
    recipe = Recipe(precision=["float16", "tf32"])
    assert usable_precisions(model.card, recipe, None) == ["float32"]
    assert usable_precisions(model.card, recipe, "fp32") == ["float32"]
    with pytest.raises(ConfigurationError, match="states no tolerance"):
        usable_precisions(model.card, recipe, "tf32")
    with pytest.raises(ConfigurationError, match="unknown precision 'half-ish'"):
        usable_precisions(model.card, recipe, "half-ish")


def test_shipped_recipes_are_valid(write_model):
    model = find_model(write_model())
    folder = recipes.shipped_directory() / "recipes"
    names = {path.stem for path in folder.glob("*.toml")}
    assert "default" in names
    for path in folder.glob("*.toml"):
        (model.directory / "gpu.toml").write_text(path.read_text())
        assert recipe_for(model, (9, 0)).batch >= 1
