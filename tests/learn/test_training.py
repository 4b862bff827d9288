"""Training learns, goes on after an interruption to the same weights, and is exported whole."""
import json
import tomllib

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")
pytestmark = pytest.mark.torch

from safetensors.torch import load_file  # noqa: E402

from xfel_classify.core import (  # noqa: E402
    ConfigurationError,
    ModelInvalid,
    OutputDamaged,
    OutputExists,
)
from xfel_classify.engines import check_model, open_engine  # noqa: E402
from xfel_classify.learn import training  # noqa: E402
from xfel_classify.learn.evaluation import evaluate, evaluate_recipe  # noqa: E402
from xfel_classify.learn.export import export_model, write_metrics  # noqa: E402
from xfel_classify.learn.recipes import Optimiser  # noqa: E402
from xfel_classify.learn.training import learning_rate, open_trained, train  # noqa: E402


@pytest.fixture(autouse=True)
def same_thread_count():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Killed(BaseException):
    """Stands for a kill: nothing in the library catches it."""


def weights(directory):
    return load_file(directory / "best.safetensors")


def same(one, two):
    assert one.keys() == two.keys()
    return all(torch.equal(one[name], two[name]) for name in one)


def test_resumed_equals_uninterrupted(toy_recipe, tmp_path, monkeypatch):
    whole = train(toy_recipe, tmp_path / "whole")
    lines = []
    monkeypatch.setattr(training, "SAVE_EVERY_S", 0.0)       # saved after every minibatch

    def killed_in(epoch, step):
        """A save that is followed by a kill when it holds this progress."""
        save = training._save_state

        def saving(path, network, optimiser, progress):
            save(path, network, optimiser, progress)
            if (progress.epoch, progress.step) == (epoch, step):
                raise Killed
        return saving

    out = tmp_path / "killed"
    for epoch, step in ((0, 3), (1, 0), (1, 2)):
        with monkeypatch.context() as patch:
            patch.setattr(training, "_save_state", killed_in(epoch, step))
            with pytest.raises(Killed):
                train(toy_recipe, out)
        with pytest.raises(OutputDamaged, match="is not finished"):
            open_trained(out)
    resumed = train(toy_recipe, out, report=lines.append)
    assert same(weights(out), weights(tmp_path / "whole"))
    assert resumed.history == whole.history and len(whole.history) == 2
    np.testing.assert_array_equal(resumed.examined["scores"], whole.examined["scores"])
    assert any("epoch 2/2: loss" in line for line in lines)
    assert (out / "learning_curve.png").read_bytes()[:4] == b"\x89PNG"
    state = (out / "state.safetensors").stat().st_mtime_ns
    train(toy_recipe, out)                                   # finished: nothing is done again
    assert (out / "state.safetensors").stat().st_mtime_ns == state


def test_a_directory_belongs_to_one_recipe(toy_recipe, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "recipe.toml").write_text(toy_recipe.read_text() + "\n# another\n")
    with pytest.raises(ConfigurationError, match="training of another recipe"):
        train(toy_recipe, out)
    (out / "state.safetensors").write_bytes(b"of the other recipe")
    started_again = train(toy_recipe, out, resume=False)
    assert started_again.recipe.name == "toy"


def test_a_damaged_state_says_what_to_do(toy_recipe, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "state.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(OutputDamaged, match="remove it to train again"):
        train(toy_recipe, out)


def test_learning_rates():
    paper = Optimiser()
    assert learning_rate(paper, 0, 100) == 0.002
    assert learning_rate(paper, 10_000, 20_000) == pytest.approx(0.001)
    cosine = Optimiser(schedule="cosine", learning_rate=1.0, warmup=10)
    assert [learning_rate(cosine, t, 110) for t in (0, 9, 10, 60, 110)] == pytest.approx(
        [0.1, 1.0, 1.0, 0.5, 0.0])


def test_sgd_follows_the_papers_formula(toy_recipe, tmp_path):
    toy_recipe.write_text(toy_recipe.read_text().replace('kind = "adam"', 'kind = "sgd"').replace(
        "epochs = 2", "epochs = 1"))
    trained = train(toy_recipe, tmp_path / "out")
    assert len(trained.history) == 1 and np.isfinite(trained.history[0]["loss"])


def test_export_evaluate_and_card(toy_recipe, tmp_path):
    toy_recipe.write_text(toy_recipe.read_text().replace("epochs = 2", "epochs = 4"))
    trained = train(toy_recipe, tmp_path / "training")
    model = export_model(trained, tmp_path / "models" / "toy")
    report = check_model(model)
    assert report.passed and {c.backend for c in report.backends} >= {"onnxruntime", "torch"}
    network = model.onnx_path.read_bytes()
    assert str(tmp_path).encode() not in network and b".py" not in network
    with np.load(model.check_path) as stored:
        images_BHW = stored["images"]
    assert images_BHW.shape == (8, 350, 350)
    assert (images_BHW[6] == 0).all() and (images_BHW[7] == 5e4).all()
    with open_engine(model) as engine:
        scores_BK = engine.infer(images_BHW)["hit"]
    with torch.inference_mode():
        logits = trained.network(torch.from_numpy(images_BHW)[:, None])["hit"]
    np.testing.assert_allclose(scores_BK, logits.softmax(1).numpy(), atol=1e-5)

    card = tomllib.loads((model.directory / "card.toml").read_text())
    assert card["provenance"]["recipe_sha256"] == trained.recipe.sha256
    assert card["provenance"]["parameters"] == 11_098
    assert card["provenance"]["seeds"]["test"] == [3]
    assert 0 < card["tasks"][0]["threshold"] < 1

    found = evaluate_recipe(model)
    assert found.pooled.events == 12
    assert len(str(found).splitlines()) == 2 + 2 + 1
    model = write_metrics(model, "test", found, "xfel-classify evaluate toy")
    assert model.card.metrics["test"]["runs"][0]["run"] == "easy 3/0"
    assert check_model(model).passed
    with pytest.raises(OutputExists):
        export_model(trained, model.directory)
    again = export_model(trained, model.directory, overwrite=True)
    assert again.sha256 == model.sha256                       # the same bytes
    with pytest.raises(ConfigurationError, match="no runs in .*shifted"):
        evaluate_recipe(model, "shifted")
    with pytest.raises(ModelInvalid, match="evaluate it again"):
        write_metrics(model, "test", evaluate_with_hash(found, "0" * 64), "x")


def evaluate_with_hash(found, sha256):
    from dataclasses import replace
    return replace(found, sha256=sha256)


def test_evaluate_counts_what_the_threshold_says(toy_recipe, tmp_path, monkeypatch):
    trained = train(toy_recipe, tmp_path / "training")
    model = export_model(trained, tmp_path / "toy")
    from xfel_classify.learn.datasets import open_runs
    from xfel_classify.learn.recipes import runs_of
    runs = open_runs(runs_of(trained.recipe, "test"))
    everything = evaluate(model, runs, threshold=0.0)
    assert everything.worst_sensitivity == 1.0 and everything.worst_specificity == 0.0
    nothing = evaluate(model, runs, threshold=1.01)
    assert nothing.worst_sensitivity == 0.0 and nothing.worst_specificity == 1.0
    assert json.dumps(nothing.as_metrics("x"))
