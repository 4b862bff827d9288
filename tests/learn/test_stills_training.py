"""Lattice and resolution models: images, training, scores, export, and a run of the result."""
import dataclasses
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")
pytestmark = pytest.mark.torch

from safetensors.torch import load_file  # noqa: E402

from xfel_classify import cli  # noqa: E402
from xfel_classify.core import ConfigurationError, OutputDamaged, Window  # noqa: E402
from xfel_classify.engines import Task, find_model  # noqa: E402
from xfel_classify.engines.cards import shipped_directory  # noqa: E402
from xfel_classify.learn import stills, training  # noqa: E402
from xfel_classify.learn.networks import build_network  # noqa: E402
from xfel_classify.learn.recipes import read_recipe  # noqa: E402
from xfel_classify.learn.stills import open_stills, shards_of, still_window  # noqa: E402
from xfel_classify.learn.stills_scores import evaluate_stills, score_answers  # noqa: E402
from xfel_classify.learn.training import open_trained, train  # noqa: E402
from xfel_classify.preprocess import image_window  # noqa: E402
from xfel_classify.simulate.stills_512 import draw_still, simulate_quadrant  # noqa: E402

RECIPE = """
name = "{name}"
version = "0.1"
architecture = "{architecture}"
summary = "a test"
seed = 3

[network]
{network}

[task]
{task}

[window]
kind = "quadrant"
height = 128
width = 128
normalize = "sqrt_floor"
clip = 65025.0

[data]
generator = "stills"

[[data.training]]
preset = "{preset}_f1"
seed = 1
runs = 8
events = 4

[[data.validation]]
preset = "{preset}_f1"
seed = 2
runs = 3
events = 4

[[data.test]]
preset = "{preset}_f1"
seed = 3
runs = 2
events = 4

[optimiser]
kind = "adam"
learning_rate = 0.003
schedule = "cosine"
batch = 8
epochs = 2

[tolerance]
float32 = 1e-4
"""
TASKS = {
    "resolution": dict(
        name="toy-resolution", architecture="radial", preset="resolution",
        network="size = 128\nrings = 16\nchannels = 8",
        task='name = "resolution"\noutput = "resolution"\nkind = "regression"\nvalue = "d_A"\n'
             'unit = "A"\ntransform = "reciprocal"'),
    "lattice": dict(
        name="toy-lattice", architecture="resnet", preset="uniform",
        network='depth = 10\nwidth = 8\nheads = ["lattice"]\nbn = "frozen_after_1"',
        task='name = "lattice"\noutput = "lattice"\nclasses = ["single", "multiple"]\n'
             'positive = "multiple"'),
}


@pytest.fixture(autouse=True)
def same_thread_count():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("stills")


@pytest.fixture
def recipe_of(tmp_path, monkeypatch, cache):
    """Writes a recipe of a kind; all tests share the images."""
    monkeypatch.setenv("XFEL_CLASSIFY_CACHE", str(cache))
    monkeypatch.setattr(stills, "RUNS_PER_SHARD", 5)

    def write(kind):
        path = tmp_path / f"{kind}.toml"
        path.write_text(RECIPE.format(**TASKS[kind]))
        return path

    return write


# --- images -------------------------------------------------------------------------------------

def test_networks_are_trained_on_what_a_run_shows_them():
    c = dataclasses.replace(draw_still(3, 1, 0, "uniform"), pool=2)
    still = simulate_quadrant(c)
    image, geometry = still_window(still, 512)
    window = Window(kind="quadrant", height=512, width=512, pool=2, quadrant=c.quadrant,
                    normalize="sqrt_floor", clip=65025.0)
    np.testing.assert_array_equal(
        image, image_window(still.photons_SF, window, still.beam_center_px, still.good_SF))
    np.testing.assert_allclose(geometry, [1e3 * c.distance_m, 1e3 * c.pixel_size_m,
                                          c.wavelength_A, 2], rtol=1e-6)
    small, coarse = still_window(still, 256)        # half the side: pooled twice as much
    assert small.shape == (256, 256) and coarse[3] == 4
    np.testing.assert_array_equal(small, image.reshape(256, 2, 256, 2).max(axis=(1, 3)))


def test_cached_images_are_the_simulators_for_any_number_of_processes(recipe_of, tmp_path):
    recipe = read_recipe(recipe_of("resolution"))
    shards = shards_of(recipe, "training")
    assert [len(shard) for shard in shards] == [20, 12]
    together = open_stills(shards, processes=2, directory=tmp_path / "two")
    alone = open_stills(shards, directory=tmp_path / "one")
    order = [31, 0, 20, 19]
    np.testing.assert_array_equal(together.images(order), alone.images(order))
    for run, event, row in ((0, 0, 0), (4, 3, 19), (5, 0, 20)):
        c = draw_still(1, run, event, "resolution_f1")
        image, geometry = still_window(simulate_quadrant(c), 128)
        np.testing.assert_array_equal(alone.images([row])[0], image)
        np.testing.assert_array_equal(alone.geometry_N4[row], geometry)
        assert alone.labels["inverse_d_A"][row] == pytest.approx(1 / c.d_A)
        assert alone.labels["n_lattices"][row] == c.n_lattices
    together.close()
    alone.close()


def test_a_damaged_or_outdated_shard_is_made_again(recipe_of, tmp_path, monkeypatch):
    shard = shards_of(read_recipe(recipe_of("resolution")), "test")[:1]
    first = open_stills(shard, directory=tmp_path)
    before = first.images([0])
    first.close()
    path = next(tmp_path.glob("*.h5"))
    path.write_bytes(path.read_bytes()[:500])
    np.testing.assert_array_equal(open_stills(shard, directory=tmp_path).images([0]), before)
    original = stills.simulate_quadrant
    monkeypatch.setattr(stills, "simulate_quadrant", lambda c: dataclasses.replace(
        original(c), photons_SF=original(c).photons_SF + 30))
    assert (open_stills(shard, directory=tmp_path).images([0]) > before).any()


def test_splits_share_no_crystal(recipe_of):
    recipe = read_recipe(recipe_of("lattice"))
    crystals = {}
    for split in ("training", "validation", "test"):
        for shard in shards_of(recipe, split):
            for run in range(shard.first, shard.first + shard.runs):
                crystal = draw_still(shard.seed, run, 0, shard.preset).crystal
                assert crystals.setdefault((crystal.cell, crystal.structure_seed), split) == split
    assert len(crystals) == 13


def test_windows_that_bytes_cannot_hold_are_refused(recipe_of):
    path = recipe_of("lattice")
    for old, new in (("sqrt_floor", "none"), ("height = 128", "height = 100"),
                     ('kind = "quadrant"', 'kind = "crop"'), ("65025.0", "90000.0")):
        path.write_text(RECIPE.format(**TASKS["lattice"]).replace(old, new))
        with pytest.raises(ConfigurationError, match="square quadrant"):
            shards_of(read_recipe(path), "training")


# --- training -----------------------------------------------------------------------------------

class Killed(BaseException):
    """Stands for a kill: nothing in the library catches it."""


@pytest.mark.parametrize("kind", TASKS)
def test_resumed_equals_uninterrupted(kind, recipe_of, tmp_path, monkeypatch):
    recipe = recipe_of(kind)
    whole = train(recipe, tmp_path / "whole", device="cpu")
    assert [row["epoch"] for row in whole.history] == [1, 2]
    save = training._save_state
    monkeypatch.setattr(training, "SAVE_EVERY_S", 0.0)

    def killed(path, network, optimiser, progress):
        save(path, network, optimiser, progress)
        if (progress.epoch, progress.step) == (1, 2):
            raise Killed

    monkeypatch.setattr(training, "_save_state", killed)
    with pytest.raises(Killed):
        train(recipe, tmp_path / "killed", device="cpu")
    with pytest.raises(OutputDamaged, match="not finished"):
        open_trained(tmp_path / "killed")
    monkeypatch.setattr(training, "_save_state", save)
    resumed = train(recipe, tmp_path / "killed", device="cpu")
    np.testing.assert_array_equal(resumed.examined["answers"], whole.examined["answers"])
    one, two = (load_file(tmp_path / name / "best.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert json.loads((tmp_path / "killed" / "history.json").read_text()) == whole.history


def test_recipe_and_network_must_have_the_same_head(recipe_of, tmp_path):
    path = recipe_of("lattice")
    path.write_text(path.read_text().replace('heads = ["lattice"]', 'heads = ["resolution"]'))
    with pytest.raises(ConfigurationError, match="task output 'lattice', the network gives"):
        train(path, tmp_path / "out", device="cpu")


@pytest.mark.parametrize("kind", TASKS)
def test_by_commands_from_recipe_to_model(kind, recipe_of, tmp_path, capsys):
    recipe, out, target = recipe_of(kind), tmp_path / "training", tmp_path / "model"
    assert cli.main(["train", str(recipe), "-o", str(out), "--device", "cpu"]) == 0
    assert cli.main(["export", str(out), str(target)]) == 0
    assert cli.main(["evaluate", str(target), "--keep"]) == 0
    assert ("Pearson" if kind == "resolution" else "Jaccard") in capsys.readouterr().out
    model = find_model(target)
    assert model.card.metrics["test"]["images"] == 8
    assert model.card.geometry == ("geometry" if kind == "resolution" else "")
    assert model.card.pools == [4]          # 128 pixels of a quadrant of 512
    assert model.card.provenance["images"] == {"training": 32, "validation": 12, "test": 8}
    if (out / "learning_curve.png").exists():       # where matplotlib is
        assert (target / "learning_curve.png").read_bytes()[1:4] == b"PNG"
    trained = open_trained(out)
    found = evaluate_stills(model, "validation", backend="onnxruntime")
    np.testing.assert_allclose(found.answers_N, trained.examined["answers"], atol=1e-4)


# --- scores -------------------------------------------------------------------------------------

def test_scores_of_resolution():
    task = Task(name="resolution", output="r", kind="regression")
    truth = np.array([0.2, 0.3, 0.4, 0.5])
    scores = score_answers(task, truth + [0.0, 0.1, 0.0, -0.05], {"inverse_d_A": truth})
    assert (scores.within, scores.mean_error) == (0.75, pytest.approx(0.0375))
    assert scores.pearson == pytest.approx(np.corrcoef(truth, truth + [0, 0.1, 0, -0.05])[0, 1])
    assert scores.spearman == pytest.approx(3 / np.sqrt(2 * 5))     # ranks 0, 1.5, 1.5, 3: tied
    perfect = score_answers(task, truth, {"inverse_d_A": truth})
    assert perfect.figure_of_merit > scores.figure_of_merit
    assert "| 4 | 1.0000 | 1.0000 | 1.0000 |" in str(perfect)


def test_scores_of_lattices():
    task = Task(name="lattice", output="l", classes=["single", "multiple"], positive="multiple")
    labels = {"n_lattices": np.array([1, 1, 2, 3, 2]),
              "misset_deg": np.array([0, 0, 0.5, 20, 2.0])}
    scores = score_answers(task, np.array([0.1, 0.7, 0.4, 0.9, 0.8]), labels)
    assert scores.accuracy == pytest.approx(3 / 5)
    assert scores.jaccard == pytest.approx(2 / 4)
    assert scores.balanced_accuracy == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert scores.roc_area == pytest.approx(5 / 6)
    assert scores.by_angle[0.3, 1.0] == (1, 0.0) and scores.by_angle[10.0, 30.0] == (1, 1.0)


@pytest.mark.parametrize("name", ["sfx-lattice", "sfx-resolution"])
@pytest.mark.parametrize("size", ["recipe.toml", "recipe_full.toml"])
def test_recipes_in_the_tree_are_whole(name, size):
    path = shipped_directory() / name / size
    recipe = read_recipe(path)
    network = build_network(recipe.architecture, **recipe.network)
    assert list(network.outputs) == [recipe.task.output]
    counts = {split: sum(map(len, shards_of(recipe, split)))
              for split in ("training", "validation", "test")}
    assert min(counts.values()) >= 600 and counts["training"] >= 5000
    if size == "recipe_full.toml":
        assert sum(p.numel() for p in network.parameters()) == (
            21_891_601 if name == "sfx-lattice" else 25_650_961)
