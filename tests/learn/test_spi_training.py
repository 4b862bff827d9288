"""Single particles from a recipe to the event loop: several heads, calibrated, with "unknown"."""
import json
import tomllib

import h5py
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")
pytestmark = pytest.mark.torch

from safetensors.torch import load_file  # noqa: E402

from xfel_classify import cli  # noqa: E402
from xfel_classify.core import ConfigurationError  # noqa: E402
from xfel_classify.engines import check_model, find_model, open_engine  # noqa: E402
from xfel_classify.engines.cards import shipped_directory  # noqa: E402
from xfel_classify.learn import training  # noqa: E402
from xfel_classify.learn.export import export_model  # noqa: E402
from xfel_classify.learn.lessons import lesson_of  # noqa: E402
from xfel_classify.learn.lessons.spi import temperature  # noqa: E402
from xfel_classify.learn.recipes import Augment, read_recipe  # noqa: E402
from xfel_classify.learn.reproductions import Row, reproduce, tables_of  # noqa: E402
from xfel_classify.learn.spi import Changes, open_spi, shards_of, structures_word  # noqa: E402
from xfel_classify.learn.spi_scores import evaluate_spi  # noqa: E402
from xfel_classify.learn.spi_unknown import (  # noqa: E402
    Judge,
    fit_judge,
    mahalanobis_tables,
)
from xfel_classify.learn.training import open_trained, train  # noqa: E402
from xfel_classify.simulate import spi_conditions, spi_images  # noqa: E402

DETECTOR_HEAD = """
[[tasks]]
name = "detector"
output = "detector"
kind = "regression"
value = "distance_m"
unit = "m"
label = "distance_m"
weight = 0.5

[[tasks]]
name = "resolution"
output = "resolution"
kind = "regression"
value = "edge_A"
unit = "A"
label = "edge_resolution_A"
"""


def rows_and_columns():
    axis = np.arange(128) - 63.5
    return axis[:, None], axis[None, :]


def fake_image(c, structures=None):
    """A Gaussian whose width is the particle's, striped by copies, bright as their number."""
    rng = np.random.default_rng([c.seed, c.run, c.event])
    row, column = rows_and_columns()
    width = 12.0 + 4 * (c.particle_index if c.particle_index >= 0 else 20)
    wave = np.zeros((128, 128), complex)
    for _ in range(c.count):
        k = rng.uniform(-0.5, 0.5, 2)
        wave = wave + np.exp(1j * (k[0] * row + k[1] * column))
    mean = 3 * c.fluence * np.exp(-(row ** 2 + column ** 2) / (2 * width ** 2)) * abs(wave) ** 2
    return (rng.poisson(64 * mean) / 64).astype(np.float32)


def fake_labels(c, structures=None):
    return {"count": c.count - 1, "particle": c.particle_index, "diameter_A": c.diameter_A,
            "distance_m": c.distance_m, "photons": 1e5 * c.count, "quality": int(c.count == 1)}


@pytest.fixture(autouse=True)
def same_thread_count():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("spi")


def small_recipe(path, monkeypatch, cache):
    """The shipped recipe with few images of a made-up simulator and a small network."""
    monkeypatch.setenv("XFEL_CLASSIFY_CACHE", str(cache))
    monkeypatch.delenv("XFEL_CLASSIFY_STRUCTURES", raising=False)
    monkeypatch.setattr(spi_images, "simulate_spi", fake_image)
    monkeypatch.setattr(spi_images, "spi_labels", fake_labels)
    monkeypatch.setattr(spi_conditions, "_radius_A", lambda source: 80.0)
    text = (shipped_directory() / "spi-multi" / "recipe_small.toml").read_text()
    for old, new in (("layers = 10", "layers = 3"), ("runs = 70", "runs = 3"),
                     ("runs = 10", "runs = 1"), ("runs = 20", "runs = 2"),
                     ("runs = 12", "runs = 1"), ("batch = 128", "batch = 32"),
                     ("epochs = 20", "epochs = 2"), ("features = 64", "features = 8")):
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    return path


@pytest.fixture
def recipe(tmp_path, monkeypatch, cache):
    return small_recipe(tmp_path / "recipe.toml", monkeypatch, cache)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, cache):
    """A finished training of the small recipe."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        return train(small_recipe(folder / "recipe.toml", patch, cache), folder / "training",
                     device="cpu")


# --- images ---------------------------------------------------------------------------------------

def test_a_split_has_every_particle_with_its_share_of_counts(recipe):
    images = open_spi(shards_of(read_recipe(recipe), "training"))
    cells = np.zeros((11, 4), int)
    np.add.at(cells, (images.labels["particle"].astype(int), images.labels["count"].astype(int)),
              1)
    np.testing.assert_array_equal(cells, np.tile([12, 3, 3, 3], (11, 1)))
    shown = images.images([0, 200])
    np.testing.assert_array_equal(
        shown[0], fake_image(spi_conditions.draw_spi(4101, 0, 0, "paper")))
    assert images.labels["total"][200] == pytest.approx(shown[1].sum(), rel=1e-6)
    images.close()


def test_the_name_of_a_set_says_what_particles_were_made_of(recipe, tmp_path, monkeypatch):
    assert structures_word() == "standins"
    (tmp_path / "pdb").mkdir()
    (tmp_path / "pdb" / "1fpv.pdb").write_text("")
    monkeypatch.setenv("XFEL_CLASSIFY_STRUCTURES", str(tmp_path / "pdb"))
    assert structures_word().startswith("entries1_")
    stem = shards_of(read_recipe(recipe), "test")[0].stem
    assert stem.startswith("spi_paper_s4103_") and "entries1" in stem


def test_windows_that_are_not_the_simulators_are_refused(recipe):
    path = recipe
    for old, new in (('pool_by = "mean"', 'pool_by = "max"'), ('normalize = "none"',
                     'normalize = "clip"'), ("height = 128", "height = 64")):
        path.write_text(recipe.read_text().replace(old, new))
        with pytest.raises(ConfigurationError, match="mean of 8 x 8"):
            shards_of(read_recipe(path), "training")


def test_changes_are_flips_turns_and_a_factor():
    images = np.random.default_rng(0).random((40, 5, 5)).astype(np.float32)
    how = Augment(flips=True, rotations=True, intensity=0.3)
    changes = Changes.draw(how, 40, np.random.default_rng(1))
    changed = changes.apply(images)
    for image, other in zip(images, changed, strict=True):
        candidates = [np.rot90(image[::up, ::left], k) for up in (1, -1) for left in (1, -1)
                      for k in range(4)]
        ratio = other.sum() / image.sum()
        assert any(np.allclose(other, ratio * one, rtol=1e-4) for one in candidates)
    assert len(np.unique(changes.factor_B)) == 40
    none = Changes.draw(Augment(flips=False, rotations=False), 40, np.random.default_rng(1))
    np.testing.assert_array_equal(none.apply(images), images)


def test_load_once_shows_the_same_change_in_every_epoch(recipe):
    def shown(path):
        lesson = lesson_of(read_recipe(path))
        lesson.open()
        epochs = [lesson.inputs(np.arange(20), np.random.default_rng(epoch))[0]
                  for epoch in (0, 1)]
        lesson.close()
        return epochs

    first, second = shown(recipe)
    assert torch.equal(first, second)
    recipe.write_text(recipe.read_text().replace("load_once = true", "load_once = false"))
    third, fourth = shown(recipe)
    assert not torch.equal(third, fourth)


# --- training -------------------------------------------------------------------------------------

class Killed(BaseException):
    """Stands for a kill: nothing in the library catches it."""


def test_resumed_equals_uninterrupted_and_the_last_epoch_is_kept(recipe, tmp_path, monkeypatch):
    whole = train(recipe, tmp_path / "whole", device="cpu")
    save = training._save_state
    monkeypatch.setattr(training, "SAVE_EVERY_S", 0.0)

    def killed(path, network, optimiser, progress):
        save(path, network, optimiser, progress)
        if (progress.epoch, progress.step) == (1, 3):
            raise Killed

    monkeypatch.setattr(training, "_save_state", killed)
    with pytest.raises(Killed):
        train(recipe, tmp_path / "killed", device="cpu")
    monkeypatch.setattr(training, "_save_state", save)
    resumed = train(recipe, tmp_path / "killed", device="cpu")
    one, two = (load_file(tmp_path / name / "best.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert resumed.history == whole.history
    last = load_file(tmp_path / "whole" / "state.safetensors")
    assert all(torch.equal(one[name], last[f"network.{name}"]) for name in one)
    assert set(whole.history[0]) == {"epoch", "loss", "validation_loss", "total", "count",
                                     "particle"}


def test_the_loss_weighs_the_count(recipe):
    lesson = lesson_of(read_recipe(recipe))
    lesson.open()
    chosen = np.arange(7)
    outputs = {"count": torch.randn(7, 4), "particle": torch.randn(7, 11)}
    truth = {name: torch.from_numpy(lesson._pupils.labels[name][:7].astype(np.int64))
             for name in outputs}
    parts = {name: torch.nn.functional.cross_entropy(outputs[name], truth[name])
             for name in outputs}
    assert float(lesson.loss(outputs, chosen)) == pytest.approx(
        float(4 * parts["count"] + parts["particle"]))
    lesson.close()


def test_labels_and_classes_must_agree(recipe):
    recipe.write_text(recipe.read_text().replace('"single", "double"', '"double", "single"'))
    with pytest.raises(ConfigurationError, match="single, double, triple, quadruple, in this"):
        lesson_of(read_recipe(recipe))


def test_a_further_head_is_a_table_in_the_recipe(recipe, tmp_path):
    text = recipe.read_text().replace('preset = "paper"', 'preset = "distance"')
    recipe.write_text(text.replace("[unknown]", DETECTOR_HEAD + "\n[unknown]"))
    made = train(recipe, tmp_path / "training", device="cpu")
    assert {"detector_error", "resolution_error"} <= set(made.history[0])
    values = made.examined["value_detector"]
    assert values.min() > 0.2 and values.max() < 0.45       # metres, not something else
    model = export_model(made, tmp_path / "model")
    assert [task.name for task in model.card.tasks] == ["count", "particle", "detector",
                                                        "resolution", "unknown"]
    with open_engine(model, "onnxruntime") as engine:
        found = engine.infer(np.ones((3, 128, 128), np.float32))
    assert found["detector"].shape == (3, 1) and found["unknown"].shape == (3, 2)
    scores = evaluate_spi(model, "validation", backend="onnxruntime").parts["distance"]
    assert set(scores.numbers) == {"detector", "resolution"}


# --- export, evaluation, the event loop -----------------------------------------------------------

def test_by_commands_from_recipe_to_columns_of_a_run(recipe, tmp_path, capsys):
    """train, export, evaluate, and a pnCCD run in which one model fills several groups."""
    out, target = tmp_path / "training", tmp_path / "model"
    assert cli.main(["train", str(recipe), "-o", str(out), "--device", "cpu"]) == 0
    assert cli.main(["export", str(out), str(target)]) == 0
    page = tmp_path / "page.html"
    assert cli.main(["evaluate", str(target), "--keep", "--report", str(page)]) == 0
    said = capsys.readouterr().out
    shown = page.read_text()
    assert "stand-ins for the published" in shown and "Unknown particles" in shown
    assert "Hard pair 7dx8 and 7dx9" in shown and "by brightness alone" in shown
    assert "by brightness alone" in said and "hard pair 7dx8 and 7dx9" in said
    assert "AUROC" in said and "expected calibration error of count" in said
    card = tomllib.loads((target / "card.toml").read_text())
    assert card["metrics"]["test"]["paper"]["images"] == 154
    assert {"total", "brightness_count"} <= set(card["metrics"]["test"]["paper"])
    assert card["provenance"]["structures"] == "standins"
    assert set(card["provenance"]["temperature"]) == {"count", "particle"}
    assert card["window"]["pool_by"] == "mean"
    model = find_model(target)
    assert check_model(model).passed

    images = open_spi(shards_of(read_recipe(recipe), "test"))
    shown = images.images(range(6))
    # frames whose 8 x 8 blocks average to the images, four segments as psana cuts the camera
    frames = np.repeat(np.repeat(shown, 8, 1), 8, 2)
    with h5py.File(tmp_path / "frames.h5", "w") as file:
        file["entry_1/data_1/data"] = frames
        file["photon_energy_eV"] = np.full(6, 4600.0)
    assert cli.main(["run", str(tmp_path / "frames.h5"), "--detector", "assembled", "--model",
                     str(target), "--peaks", "none", "-o", str(tmp_path / "run"), "--set",
                     "source.pixel_size_m=75e-6", "--set", 'source.unit="photon"', "--set",
                     "source.beam_center_px=[512, 512]"]) == 0
    with open_engine(model, "onnxruntime") as engine:
        expected = engine.infer(shown)
    with h5py.File(next((tmp_path / "run").glob("*_r0000.h5"))) as file:
        np.testing.assert_allclose(file["count/probability"][:], expected["count"], atol=1e-4)
        np.testing.assert_array_equal(file["particle/label"][:], expected["particle"].argmax(1))
        np.testing.assert_allclose(file["unknown/score"][:], expected["unknown"][:, 1], atol=1e-4)
        assert set(file) >= {"count", "particle", "unknown"}


def test_probabilities_are_calibrated_on_the_validation_images(recipe, trained):
    lesson = lesson_of(trained.recipe)
    shown = lesson.exhibit(trained)
    lesson.close()
    kept = shown.provenance["temperature"]
    images = open_spi(shards_of(trained.recipe, "validation"))
    with torch.inference_mode():
        count, particle, _ = shown.answers.eval()(
            torch.from_numpy(images.images(range(20)))[:, None])
    for found, name in ((count, "count"), (particle, "particle")):
        logits = torch.from_numpy(trained.examined[f"logits_{name}"][:20]) / kept[name]
        torch.testing.assert_close(found, logits.softmax(1), atol=1e-3, rtol=0)
    assert [task.name for task in shown.tasks] == ["count", "particle", "unknown"]
    images.close()


def test_a_temperature_undoes_overconfidence():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (20_000, 4))
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = (rng.random((len(chances), 1)) > chances.cumsum(1)).sum(1)
    assert temperature(logits, labels) == pytest.approx(1.0, abs=0.05)
    assert temperature(5 * logits, labels) == pytest.approx(5.0, abs=0.25)


def test_features_far_from_all_kinds_are_unknown():
    rng = np.random.default_rng(0)
    means = rng.normal(0, 4, (6, 30))
    kinds = np.repeat(np.arange(6), 200)
    known = torch.from_numpy((means[kinds] + rng.normal(0, 1, (1200, 30))).astype(np.float32))
    judge = Judge("particle", "mahalanobis", mahalanobis_tables(known, kinds, 10), limit=8.0)
    between = torch.from_numpy((means.mean(0) + rng.normal(0, 1, (200, 30))).astype(np.float32))
    logits = torch.zeros(1200, 6)
    near, far = judge.score(known, logits), judge.score(between, logits[:200])
    assert near.quantile(0.95) < far.quantile(0.05)
    # away from the plane of the components, too
    beside = known[:200] + torch.linalg.svd(known, full_matrices=True)[2][-1] * 20
    assert near.quantile(0.95) < judge.score(beside, logits[:200]).quantile(0.05)
    both = judge(known, logits)
    torch.testing.assert_close(both.sum(1), torch.ones(1200))
    energy = Judge("particle", "energy").score(known, torch.tensor([[9.0, 0.0], [0.1, 0.0]]))
    assert energy[0] < energy[1]


@pytest.mark.parametrize("method", ["mahalanobis", "energy", "softmax"])
def test_known_images_are_known_by_construction(method, recipe, trained):
    recipe.write_text(recipe.read_text().replace('"mahalanobis"', f'"{method}"'))
    made = read_recipe(recipe)
    pupils, examiners = (open_spi(shards_of(made, split)) for split in ("training", "validation"))
    judge, task = fit_judge(made, trained.network, pupils, examiners)
    with torch.inference_mode():
        images = torch.from_numpy(examiners.images(range(len(examiners))))[:, None]
        features = trained.network.features(images)
        answers = judge(features["particle"], trained.network.heads(features)["particle"])
    assert (answers[:, 1] < 0.5).float().mean() == pytest.approx(0.95, abs=0.02)
    assert task.positive == "unknown" and method in task.threshold_chosen
    for images in (pupils, examiners):
        images.close()


# --- published tables -----------------------------------------------------------------------------

def test_tables_print_the_published_column_beside_ours(recipe, tmp_path, capsys):
    arguments = ["reproduce", "spi-multi", "--table", "2", "--recipe", str(recipe), "--seeds",
                 "2", "--rows", "3 layers", "5 layers", "-o", str(tmp_path / "tables")]
    assert cli.main(arguments) == 0
    said = capsys.readouterr().out
    row = next(line for line in said.splitlines() if line.startswith("| 3 layers"))
    assert "85.2" in row and "100,567" in row and " to " in row
    assert "| 10 layers" not in said
    recipes = list((tmp_path / "tables").rglob("seed*/changed.toml"))
    assert len(recipes) == 4
    for path in recipes:        # the depth study is unweighted, and every row has its depth
        made = read_recipe(path)
        assert made.goals["count"].weight == 1.0
        assert f"{made.network['layers']}_layers" in str(path)
    figures = json.loads((recipes[0].parent / "figures.json").read_text())
    assert {"total", "count", "particle", "brightness", "recall_7dx8"} <= set(figures)
    stamp = max(path.stat().st_mtime_ns for path in (tmp_path / "tables").rglob("*.safetensors"))
    assert cli.main(arguments) == 0         # finished: nothing is trained again
    assert stamp == max(path.stat().st_mtime_ns
                        for path in (tmp_path / "tables").rglob("*.safetensors"))


def test_the_grid_is_drawn_as_a_heat_map(recipe, tmp_path):
    pytest.importorskip("matplotlib")
    outcome = reproduce("spi-multi", "grid", tmp_path, recipe=recipe, seeds=1,
                        rows=["rate 0.002, decay 0.01", "rate 0.001, decay 0.001"])
    assert len(outcome.found) == 2
    assert (tmp_path / "grid.png").read_bytes()[1:4] == b"PNG"


def test_rows_of_the_published_tables_build_their_networks(recipe):
    from xfel_classify.learn.reproductions import changed

    expected = {"ResNet-18": 11_177_999, "VGG-16": 15_089_871, "10 layers, branch early": 298_631,
                "10 layers, late and weighted": 164_967, "18 layers": 204_167}
    tables = tomllib.loads((shipped_directory() / "spi-multi" / "recipe_small.toml").read_text())
    seen = set()
    for table in ("1", "2"):
        for row in tables_of("spi-multi")[table].rows:
            made = changed(tables, row, 5)
            network = made.pop("network")
            heads = {task["output"]: len(task["classes"]) for task in made["tasks"]}
            from xfel_classify.learn.networks import build_network
            built = build_network(made["architecture"], heads=heads, **network)
            if row.name in expected:
                seen.add(row.name)
                assert sum(p.numel() for p in built.parameters()) == expected[row.name]
    assert seen == set(expected)
    assert len(tables_of("spi-multi")["grid"].rows) == 16


def test_what_cannot_be_reproduced_is_said(tmp_path):
    from xfel_classify.core import UnknownComponent

    with pytest.raises(UnknownComponent, match="spi-multi"):
        tables_of("nothing")
    for arguments, words in (({"table": "9"}, "1, 2, grid"), ({"table": "1", "size": "huge"},
                             "small, full"), ({"table": "1", "rows": ["none"]}, "VGG-16")):
        with pytest.raises(ConfigurationError, match=words):
            reproduce("spi-multi", out=tmp_path, **arguments)


@pytest.mark.parametrize(("name", "images"), [("recipe_small.toml", (5390, 770, 1540)),
                                              ("recipe.toml", (53_900, 7700, 15_400))])
def test_recipes_in_the_tree_are_the_studys(name, images):
    recipe = read_recipe(shipped_directory() / "spi-multi" / name)
    assert tuple(sum(map(len, shards_of(recipe, split)))
                 for split in ("training", "validation", "test")) == images
    assert [recipe.goal(task).weight for task in recipe.tasks] == [4.0, 1.0]
    how = recipe.optimiser
    assert (how.kind, how.learning_rate, how.weight_decay, how.batch, how.epochs, how.keep) == (
        "adam", 0.001, 0.001, 128, 20, "last")
    assert recipe.augment.load_once and not how.reshuffle
    assert isinstance(Row("x").changes, dict)
    network = lesson_of(recipe).network()
    assert sum(p.numel() for p in network.parameters()) == 164_967


def test_the_recipe_for_varying_fluence_never_sees_brightness():
    recipe = read_recipe(shipped_directory() / "spi-multi-robust" / "recipe.toml")
    assert {part.preset for part in recipe.data.training} >= {"jitter", "realistic"}
    assert min(sum(map(len, shards_of(recipe, split)))
               for split in ("training", "validation", "test", "shifted")) >= 1500
    network = lesson_of(recipe).network().eval()
    image = 20 * torch.rand(1, 1, 128, 128)
    with torch.inference_mode():
        one, two = (network(factor * image)["count"].softmax(1) for factor in (1.0, 1.5))
    torch.testing.assert_close(one, two, atol=1e-4, rtol=0)


def test_a_finished_training_is_opened_with_its_heads(recipe, trained):
    again = open_trained(trained.directory)
    assert again.network.outputs == {"count": 4, "particle": 11}
    assert again.examined["logits_particle"].shape == (77, 11)
