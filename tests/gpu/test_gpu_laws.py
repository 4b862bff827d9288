"""The laws on a real GPU, for every shipped model.  One command: ``python -m pytest tests/gpu``.

Not yet run on a GPU, so how long it takes is not known; nothing here measures speed
(``benchmarks/gpu`` does).
"""
import json

import numpy as np
import pytest

from xfel_classify.core import EngineError
from xfel_classify.engines import list_models, open_engine
from xfel_classify.engines.cards import read_check
from xfel_classify.engines.gpu_driver import open_driver
from xfel_classify.engines.plans import PlanCache
from xfel_classify.engines.recipes import PRECISIONS, tolerance
from xfel_classify.engines.tensorrt import Engine
from xfel_classify.engines.tensorrt_memory import open_context

MODELS = list_models()
FRAMES, CHUNK = 4000, 500
MAY_CHANGE = 1e-3
"""Part of the frames whose class may differ between float16 and float32."""


@pytest.fixture(params=MODELS, ids=lambda model: model.name)
def model(request):
    return request.param


def frames(model, count, seed=2026):
    """Counting noise from dark to bright with sharp spots: (images_BHW, geometry_B4 or None)."""
    rng = np.random.default_rng(seed)
    height, width = model.window.shape
    mean_B = np.exp(rng.uniform(-4, 3, count))
    images_BHW = np.empty((count, height, width), np.float32)
    for image_HW, mean in zip(images_BHW, mean_B, strict=True):
        image_HW[:] = rng.poisson(mean, (height, width))
        spots = int(rng.integers(0, 60))
        image_HW[rng.integers(0, height, spots), rng.integers(0, width, spots)] += (
            rng.exponential(100 * mean + 20, spots).astype(np.float32))
    _, geometry_B4, _ = read_check(model)
    if geometry_B4 is None:
        return images_BHW, None
    return images_BHW, geometry_B4[np.arange(count) % len(geometry_B4)]


def decisions(task, values_BK):
    if task.positive:
        return values_BK[:, task.positive_index] >= task.threshold
    return values_BK.argmax(axis=1)


def allowed(model):
    return [p for p in PRECISIONS if tolerance(model.card, p) is not None]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_check_values_in_every_precision(model, precision, record_property):
    """Those that the card allows must pass; for the others the difference is only reported."""
    try:
        with Engine(model, None, 64, precision, measuring=True) as engine:
            difference = engine.difference
    except EngineError as error:
        if precision in allowed(model):
            raise
        pytest.skip(f"{precision} does not run here: {error}")
    record_property("difference", difference)
    print(f"\n{model.name} {precision}: largest difference {difference:.2e}")
    if precision in allowed(model):
        assert difference <= tolerance(model.card, precision)


def test_tensorrt_is_onnxruntime_is_torch(model, opened):
    images_BHW, geometry_B4 = frames(model, 48)
    tight = tolerance(model.card, "float32")
    found = opened(model).infer(images_BHW, geometry_B4)
    for backend in ("onnxruntime", "torch"):
        pytest.importorskip(backend)
        with open_engine(model, backend) as other:
            expected = other.infer(images_BHW, geometry_B4)
        for name in expected:
            np.testing.assert_allclose(found[name], expected[name], atol=tight, rtol=0)


@pytest.mark.parametrize("precision", ["tf32", "float16", "bfloat16"])
def test_few_decisions_change_with_the_precision(model, precision, opened):
    if precision not in allowed(model):
        pytest.skip(f"the card of {model.name} states no tolerance for {precision}")
    tasks = [task for task in model.card.tasks if task.kind == "classes"]
    changed = dict.fromkeys((task.name for task in tasks), 0)
    reference, engine = opened(model), opened(model, precision)
    for seed in range(FRAMES // CHUNK):
        given = frames(model, CHUNK, seed)
        before, after = reference.infer(*given), engine.infer(*given)
        for task in tasks:
            old_B, new_B = (decisions(task, found[task.output]) for found in (before, after))
            changed[task.name] += int(np.count_nonzero(old_B != new_B))
    print(f"\n{model.name} {precision}: decisions that changed in {FRAMES} frames: {changed}")
    assert all(count <= MAY_CHANGE * FRAMES for count in changed.values()), changed


def test_batched_equals_one_by_one(model, opened):
    images_BHW, geometry_B4 = frames(model, 150)
    precision = allowed(model)[-1]
    engine = opened(model, precision)
    batched = engine.infer(images_BHW, geometry_B4)
    for i in (0, 1, 63, 64, 65, 149):
        part = None if geometry_B4 is None else geometry_B4[i:i + 1]
        single = engine.infer(images_BHW[i:i + 1], part)
        for name, values_BK in single.items():
            np.testing.assert_array_equal(values_BK[0], batched[name][i])
    order = np.random.default_rng(1).permutation(150)
    shuffled = engine.infer(images_BHW[order],
                            None if geometry_B4 is None else geometry_B4[order])
    for name, values_BK in shuffled.items():
        np.testing.assert_array_equal(values_BK, batched[name][order])


def test_the_same_bits_after_a_reload_of_the_plan(model, opened):
    images_BHW, geometry_B4 = frames(model, 70)
    first = opened(model).infer(images_BHW, geometry_B4)
    again = opened(model).infer(images_BHW, geometry_B4)
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])


def test_a_damaged_plan_is_built_again(model, opened):
    opened(model).close()
    path = next(path for path, head in PlanCache().entries()
                if isinstance(head, dict) and head["key"]["model"] == model.name)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    assert opened(model).difference <= tolerance(model.card, "float32")


def test_submitted_work_gives_the_same_bits(model, opened):
    images_BHW, geometry_B4 = frames(model, 200)
    engine = opened(model)
    expected = engine.infer(images_BHW, geometry_B4)
    parts = [slice(first, first + 40) for first in range(0, 200, 40)]
    pending = [engine.submit(images_BHW[part],
                             None if geometry_B4 is None else geometry_B4[part]) for part in parts]
    for part, answer in zip(parts, pending, strict=True):
        for name, values_BK in answer.result().items():
            np.testing.assert_array_equal(values_BK, expected[name][part])


def test_quick_single_answers(model, opened):
    images_BHW, geometry_B4 = frames(model, 5)
    found = opened(model, max_batch=1).infer(images_BHW, geometry_B4)
    expected = opened(model).infer(images_BHW, geometry_B4)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name],
                                   atol=tolerance(model.card, "float32"), rtol=0)


def test_launches_are_captured_as_graphs(model, opened):
    assert opened(model).session.graphs and opened(model, max_batch=1).session.graphs


def test_memory_is_given_back(model, opened):
    driver = open_driver()
    context = open_context(driver, driver.devices()[0])
    opened(model).close()                               # what libraries keep for good is kept now
    with context.current():
        before, _ = driver.free_memory()
    for _ in range(5):
        opened(model).close()
    with context.current():
        after, _ = driver.free_memory()
    context.close()
    assert before - after < 32 << 20


def test_torch_and_the_engine_share_the_device(model, opened):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch is a CPU build")
    images_BHW, geometry_B4 = frames(model, 10)
    square = torch.ones(64, 64, device="cuda")
    engine = opened(model)
    expected = engine.infer(images_BHW, geometry_B4)
    assert float((square @ square).sum()) == 64.0**3
    again = engine.infer(images_BHW, geometry_B4)
    engine.close()
    assert float((square @ square).sum()) == 64.0**3
    for name in expected:
        np.testing.assert_array_equal(expected[name], again[name])


@pytest.mark.parametrize("owner", ["pycuda", "driver"])
def test_both_owners_of_memory(model, owner, monkeypatch):
    from xfel_classify.engines import tensorrt

    if owner == "pycuda":
        pytest.importorskip("pycuda.driver")
    monkeypatch.setattr(tensorrt, "open_context",
                        lambda driver, device: open_context(driver, device, owner))
    with Engine(model, None, 8, "float32") as engine:
        assert engine.difference <= tolerance(model.card, "float32")


def test_the_notes_of_a_plan_tell_what_it_was_checked_with(model, opened):
    opened(model)
    heads = [head for _, head in PlanCache().entries() if isinstance(head, dict)]
    assert any(head["key"]["model"] == model.name and head["notes"]["difference"] < 1
               for head in heads)
    json.dumps(heads)
