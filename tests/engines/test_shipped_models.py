"""The models that come with the package do what their cards say."""
import numpy as np
import pytest

from xfel_classify.engines import available_backends, check_model, find_model, open_engine
from xfel_classify.engines.cards import shipped_directory

NAMES = sorted(path.parent.name for path in shipped_directory().glob("*/card.toml"))


@pytest.fixture(autouse=True)
def only_shipped_models(monkeypatch):
    monkeypatch.delenv("XFEL_CLASSIFY_MODELS", raising=False)


def test_the_hit_finder_is_shipped():
    assert "sfx-hit" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_runtime_reproduces_the_check_values(name):
    report = check_model(name)
    assert report.passed, str(report)
    assert {check.backend for check in report.backends} == set(
        available_backends(find_model(name)))


@pytest.mark.parametrize("name", NAMES)
def test_every_runtime_says_the_same_one_by_one_and_batched(name):
    model = find_model(name)
    rng = np.random.default_rng(4)
    images_BHW = rng.poisson(rng.uniform(0.05, 20, (7, 1, 1)),
                             (7, *model.window.shape)).astype(np.float32)
    geometry_B4 = np.tile(np.float32([150.0, 0.1, 1.1, 2.0]), (7, 1))
    probabilities = [task.output for task in model.card.tasks if task.kind == "classes"]
    reference = None
    for backend in available_backends(model):
        with open_engine(model, backend, max_batch=3) as engine:
            batched = engine.infer(images_BHW, geometry_B4)
            singly = [engine.infer(image[None], geometry_B4[:1]) for image in images_BHW]
        for key, values_BK in batched.items():
            np.testing.assert_array_equal(
                values_BK, np.concatenate([one[key] for one in singly]), err_msg=backend)
            if key in probabilities:
                np.testing.assert_allclose(values_BK.sum(1), 1, atol=1e-5)
        reference = reference or batched
        for key, values_BK in batched.items():
            np.testing.assert_allclose(values_BK, reference[key], err_msg=backend,
                                       atol=model.card.tolerance_of("float32"))


@pytest.mark.parametrize("name", NAMES)
def test_the_card_tells_where_the_model_comes_from(name):
    card = find_model(name).card
    assert card.licence and card.summary and card.provenance["recipe_sha256"]
    for task in card.tasks:         # of several classes the likeliest is the answer
        assert task.threshold_chosen or task.kind == "regression" or not task.positive


def test_the_card_of_the_hit_finder_keeps_its_promises():
    model = find_model("sfx-hit")
    assert model.card.provenance["parameters"] == 11_098
    metrics = model.card.metrics["test"]
    assert len(metrics["runs"]) == 10 and metrics["date"] and metrics["command"]
    runs = metrics["runs"]
    assert all(run["events"] >= 300 for run in runs)
    for name in ("sensitivity", "specificity"):
        assert metrics[f"worst_{name}"] == min(run[name] for run in runs)
    assert metrics["worst_sensitivity"] >= 0.98 and metrics["worst_specificity"] >= 0.97
    recipe = model.directory / "recipe.toml"
    from xfel_classify.engines.cards import sha256_of
    assert sha256_of(recipe) == model.card.provenance["recipe_sha256"]


def test_the_hit_finder_judges_crops_nobody_has_seen():
    from xfel_classify.simulate.sfx import crops, draw_conditions

    model = find_model("sfx-hit")
    task = model.card.task("hit")
    scores, labels = [], []
    with open_engine(model) as engine:
        for run in range(4):
            conditions = draw_conditions(777_000, run, "training", hit_fraction=0.5)
            images_BHW, truths = crops(conditions, range(20))
            scores.append(engine.infer(np.clip(images_BHW, -model.window.clip, model.window.clip)
                                       )["hit"][:, task.positive_index])
            labels.append([truth.is_hit for truth in truths])
    called, truth = np.concatenate(scores) >= task.threshold, np.concatenate(labels)
    sensitivity, specificity = called[truth].mean(), 1 - called[~truth].mean()
    assert (sensitivity + specificity) / 2 >= 0.95
