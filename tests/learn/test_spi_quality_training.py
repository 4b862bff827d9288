"""The published selectors from a recipe to columns of a run, and their tables."""
import json
import tomllib

import h5py
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")
pytestmark = pytest.mark.torch

from mockdata.body_images import fake_image, fake_labels  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from xfel_classify import cli  # noqa: E402
from xfel_classify.core import ConfigurationError  # noqa: E402
from xfel_classify.engines import check_model, find_model, open_engine  # noqa: E402
from xfel_classify.engines.cards import shipped_directory  # noqa: E402
from xfel_classify.learn.export import export_model  # noqa: E402
from xfel_classify.learn.lessons import lesson_of  # noqa: E402
from xfel_classify.learn.recipes import read_recipe  # noqa: E402
from xfel_classify.learn.reproductions import spi_yolo, tables_of  # noqa: E402
from xfel_classify.learn.spi_bodies import open_bodies, shards_of  # noqa: E402
from xfel_classify.learn.training import train  # noqa: E402
from xfel_classify.simulate import spi_images  # noqa: E402


def shortened(model, changes, path, patch, cache):
    """A shipped recipe with few images of the made-up simulator and a small network."""
    patch.setenv("XFEL_CLASSIFY_CACHE", str(cache))
    patch.setattr(spi_images, "simulate_spi", fake_image)
    patch.setattr(spi_images, "spi_labels", fake_labels)
    text = (shipped_directory() / model / "recipe.toml").read_text()
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    path.write_text(text)
    return path


QUALITY = (("runs = 720", "runs = 3"), ("runs = 100", "runs = 1"), ("runs = 40", "runs = 1"),
           ("runs = 20", "runs = 1"), ("batch = 128", "batch = 32"), ("epochs = 12", "epochs = 3"),
           ("warmup = 100", "warmup = 2"), ("n = 2 ", "n = 1 "), ("m = 2 ", "m = 1 "),
           ('norm = "pixel"', 'width = 4\nnorm = "pixel"'), ("learning_rate = 0.1",
                                                             "learning_rate = 0.02"))
YOLO = (("runs = 5\nevents = 111\npositives = 33", "runs = 1\nevents = 40\npositives = 20"),
        ("runs = 4\nevents = 66\npositives = 10", "runs = 1\nevents = 20\npositives = 8"),
        ("runs = 1\nevents = 72\npositives = 13", "runs = 1\nevents = 10\npositives = 3"),
        ("runs = 8\nevents = 500\npositives = 28", "runs = 2\nevents = 30\npositives = 10"),
        ("size = 160", "size = 32"), ("width = 0.125", "width = 0.02"),
        ("epochs = 30", "epochs = 4"), ("steps = 10", "steps = 3"),
        ("batch = 32", "batch = 8"), ("stages = 5", "stages = 2"), ("warmup = 20", "warmup = 2"))


@pytest.fixture(autouse=True)
def same_thread_count():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("bodies")


@pytest.fixture
def quality_recipe(tmp_path, monkeypatch, cache):
    return shortened("spi-quality", QUALITY, tmp_path / "recipe.toml", monkeypatch, cache)


@pytest.fixture
def yolo_recipe(tmp_path, monkeypatch, cache):
    return shortened("spi-yolo", YOLO, tmp_path / "recipe.toml", monkeypatch, cache)


# --- good or bad ----------------------------------------------------------------------------------

def test_each_pixel_is_standardised_over_the_training_images(quality_recipe, tmp_path):
    made = train(quality_recipe, tmp_path / "training", device="cpu")
    images = open_bodies(shards_of(made.recipe, "training"), made.recipe.window)
    shown = images.images(range(len(images)))
    images.close()
    tensors = load_file(tmp_path / "training" / "best.safetensors")
    np.testing.assert_allclose(tensors["standardisation.mean_HW"], shown.mean(0), atol=1e-4)
    np.testing.assert_allclose(tensors["standardisation.std_HW"], shown.std(0), atol=1e-4)
    assert {"accuracy", "best_f1", "precision", "recall"} <= set(made.history[0])


def test_by_commands_from_recipe_to_columns_of_a_run(quality_recipe, tmp_path, capsys):
    """train, export, evaluate, and a run of a pnCCD: /quality is filled."""
    out, target = tmp_path / "training", tmp_path / "model"
    assert cli.main(["train", str(quality_recipe), "-o", str(out), "--device", "cpu"]) == 0
    assert cli.main(["export", str(out), str(target)]) == 0
    for split in ("test", "shifted"):
        assert cli.main(["evaluate", str(target), "--split", split, "--keep", "--report",
                         str(tmp_path / f"{split}.html")]) == 0
    page = (tmp_path / "shifted.html").read_text()
    assert "quality_torus" in page and "best F1" in page
    assert "| quality_torus | 50 |" in capsys.readouterr().out
    card = tomllib.loads((target / "card.toml").read_text())
    assert card["metrics"]["test"]["quality"]["images"] == 50
    assert card["metrics"]["shifted"]["quality_experiment:positive=0.58"]["images"] == 50
    model = find_model(target)
    assert check_model(model).passed
    recipe = read_recipe(quality_recipe)
    images = open_bodies(shards_of(recipe, "test"), recipe.window)
    shown = images.images(range(6))
    images.close()
    with h5py.File(tmp_path / "frames.h5", "w") as file:
        file["entry_1/data_1/data"] = np.repeat(np.repeat(shown, 4, 1), 4, 2)
        file["photon_energy_eV"] = np.full(6, 1700.0)
    assert cli.main(["run", str(tmp_path / "frames.h5"), "--detector", "assembled", "--model",
                     str(target), "--peaks", "none", "-o", str(tmp_path / "run"), "--set",
                     "source.pixel_size_m=75e-6", "--set", 'source.unit="photon"', "--set",
                     "source.beam_center_px=[256, 256]"]) == 0
    with open_engine(model, "onnxruntime") as engine:
        expected = engine.infer(shown)["quality"][:, 1]
    with h5py.File(next((tmp_path / "run").glob("*_r0000.h5"))) as file:
        np.testing.assert_allclose(file["quality/score"][:], expected, atol=1e-4)
        np.testing.assert_array_equal(file["quality/label"][:], expected >= 0.5)


def test_the_task_must_be_one_question(quality_recipe):
    quality_recipe.write_text(quality_recipe.read_text().replace('positive = "good"',
                                                                 'positive = "bad"'))
    with pytest.raises(ConfigurationError, match="the second of them positive"):
        lesson_of(read_recipe(quality_recipe))


# --- detection networks ---------------------------------------------------------------------------

def test_five_stages_of_a_detection_network_select_together(yolo_recipe, tmp_path):
    made = train(yolo_recipe, tmp_path / "training", device="cpu")
    assert len(made.history) == 4
    lesson = lesson_of(made.recipe)
    networks = lesson.stages(made)
    epochs = list(networks)
    assert len(epochs) == 2 and epochs[1] == epochs[0] + 1
    model = export_model(made, tmp_path / "model")
    assert model.card.provenance["stages"] == epochs
    assert "largest F1" in model.card.tasks[0].threshold_chosen
    images = open_bodies(shards_of(made.recipe, "test"), made.recipe.window)
    one_by_one = [lesson.scores(network, images) for network in networks.values()]
    with open_engine(model, "onnxruntime") as engine:
        found = engine.infer(images.images(range(len(images))))["single"][:, 1]
    np.testing.assert_allclose(found, np.min(one_by_one, axis=0), atol=1e-4)
    assert not np.allclose(one_by_one[0], one_by_one[1], atol=1e-4)
    # the window has the lower half too; the network looks above the gap only
    shown = images.images([0])
    images.close()
    shown[0, 123:] = 7.0
    with open_engine(model, "onnxruntime") as engine:
        np.testing.assert_allclose(engine.infer(shown)["single"][0, 1], found[0], atol=1e-6)


def test_patterns_above_the_gap_stay_above_it(yolo_recipe):
    lesson = lesson_of(read_recipe(yolo_recipe))
    lesson.open()
    chosen = np.arange(16)
    shown = lesson.inputs(chosen, np.random.default_rng(0))[0][:, 0].numpy()
    plain = lesson._pupils.images(chosen)
    lesson.close()
    mirrored = [not np.array_equal(one, other) for one, other in zip(shown, plain, strict=True)]
    assert 0 < sum(mirrored) < 16
    for one, other, turned in zip(shown, plain, mirrored, strict=True):
        np.testing.assert_array_equal(one, other[:, ::-1] if turned else other)


def test_an_epoch_may_have_more_steps_than_images(yolo_recipe, tmp_path):
    """Stages are counted in minibatches: 40 images in batches of 8, 12 steps an epoch."""
    yolo_recipe.write_text(yolo_recipe.read_text().replace("steps = 3", "steps = 12"))
    lesson = lesson_of(read_recipe(yolo_recipe))
    seen = []
    inputs = type(lesson).inputs

    def counted(self, chosen, rng):
        seen.append(chosen)
        return inputs(self, chosen, rng)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(lesson), "inputs", counted)
        train(yolo_recipe, tmp_path / "training", device="cpu")
    assert len(seen) == 4 * 12
    times = np.bincount(np.concatenate(seen[:10]), minlength=40)
    np.testing.assert_array_equal(times, 2)         # twice round, then some


# --- tables ---------------------------------------------------------------------------------------

def test_tables_of_the_good_bad_study(quality_recipe, tmp_path, capsys):
    """Accuracy and robustness share one training; activations and features need no other."""
    common = ["reproduce", "spi-quality", "--recipe", str(quality_recipe), "--seeds", "1", "-o",
              str(tmp_path / "tables")]
    assert cli.main([*common, "--table", "robustness"]) == 0
    said = capsys.readouterr().out
    assert "| truncated_icosahedron |" in said and "| 58.7 | 0.0 |" in said and "84.8" in said
    assert said.count("ready after") == 1
    assert cli.main([*common, "--table", "depth", "--rows", "ResNet(2,2)", "stem of 7"]) == 0
    said = capsys.readouterr().out
    assert "| (2,2), stem of 7 |" in said and "| ResNet(3,3) |" not in said
    assert "training ResNet(2,2), seed" not in said     # that one is there
    figures = json.loads(next((tmp_path / "tables").rglob("ResNet_2_2/seed231/figures.json")
                              ).read_text())
    assert {"simulation", "experiment balanced", "torus fnr", "few good f1"} <= set(figures)
    assert cli.main([*common, "--table", "activations"]) == 0
    page = next((tmp_path / "tables").rglob("activations.html")).read_text()
    assert 'id="stage2"' in page and "(good)" in page and "(bad)" in page
    # trained once, from the recipe as it is: it can be exported as that recipe's
    kept = next((tmp_path / "tables").rglob("ResNet_2_2/seed231/training/recipe.toml"))
    assert kept.read_text() == quality_recipe.read_text()


def test_features_need_weights_and_give_a_line_for_each_reading(quality_recipe, tmp_path, capsys):
    pytest.importorskip("sklearn")
    common = ["reproduce", "spi-quality", "--table", "features", "--recipe", str(quality_recipe),
              "-o", str(tmp_path)]
    assert cli.main(common) == 1
    assert "--weights FILE" in capsys.readouterr().err
    from xfel_classify.learn.reproductions import spi_quality
    from xfel_classify.learn.vgg_features import CONVOLUTIONS, LINEAR

    rng = torch.Generator().manual_seed(0)
    tensors, channels = {}, 3
    for i in CONVOLUTIONS:
        tensors[f"features.{i}.weight"] = torch.randn(2, channels, 3, 3, generator=rng)
        tensors[f"features.{i}.bias"], channels = torch.zeros(2), 2
    for i, width in zip(LINEAR, (98, 5), strict=True):
        tensors[f"classifier.{i}.weight"] = torch.randn(5, width, generator=rng)
        tensors[f"classifier.{i}.bias"] = torch.zeros(5)
    save_file(tensors, tmp_path / "vgg.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spi_quality, "FEATURE_IMAGES", {"training": 30, "validation": 15, "test": 15})
        small = spi_quality.Row("on the experiment", {"data": spi_quality._experiment(1, 1)})
        patch.setattr(spi_quality, "ON_EXPERIMENT", small)
        assert cli.main([*common, "--weights", str(tmp_path / "vgg.safetensors")]) == 0
    said = capsys.readouterr().out
    assert said.count("| fc6_fc7 | simulation |") >= 1
    assert said.count("| pool5 | experiment |") >= 1


def test_the_selection_table_has_networks_em_and_what_they_agree_on(yolo_recipe, tmp_path, capsys,
                                                                    monkeypatch):
    from xfel_classify.learn.em_selection import EmSettings

    monkeypatch.setattr(spi_yolo, "EM", EmSettings(classes=2, rotations=6, iterations=2, log=True))
    monkeypatch.setattr(spi_yolo, "EM_RUNS", 2)
    monkeypatch.setattr(spi_yolo, "SIZE_NM", (20.0, 150.0))
    monkeypatch.setattr(spi_yolo, "FINE_MOST", 5.0)
    monkeypatch.setattr(spi_yolo, "CLUSTERS", 3)
    monkeypatch.setattr(spi_yolo, "fine_of", lambda frames, largest: np.zeros(len(frames)))
    monkeypatch.setattr("xfel_classify.learn.em_runs.fine_of",
                        lambda frames, largest: np.zeros(len(frames)))
    arguments = ["reproduce", "spi-yolo", "--recipe", str(yolo_recipe), "--seeds", "1", "--rows",
                 "YOLOv2 colour linear", "YOLOv3 gray", "-o", str(tmp_path / "tables")]
    assert cli.main(arguments) == 0
    said = capsys.readouterr().out
    for row in ("YOLOv2 colour linear, stage ", "YOLOv3 gray linear, stages ",
                "size and fine structure", "EM, classes by labels",
                "diffusion map after fine structure", "YOLOv2 colour linear and EM",
                "YOLOv2 colour linear [IGN21]"):
        assert f"| {row}" in said, row
    assert "of their intersection" in said
    assert said.splitlines()[-1] in next((tmp_path / "tables").rglob("selection.md")).read_text()
    assert cli.main(arguments) == 0             # nothing is trained or sorted again
    assert "runs done" not in capsys.readouterr().out


def test_rows_of_the_selection_table_are_the_studys_networks():
    expected = {"YOLOv2 colour linear": 50_558_014, "YOLOv3 colour linear": 61_523_734}
    path = tables_of("spi-yolo")["selection"].recipes["full"]
    from xfel_classify.learn.networks import build_network
    from xfel_classify.learn.reproductions import changed

    tables = tomllib.loads(path.read_text())
    for row in spi_yolo.NETWORKS:
        made = changed(tables, spi_yolo.row_of(row, tables, "full"), 1)
        with torch.device("meta"):
            network = build_network(made["architecture"], **made["network"])
        assert network.representation.region == (0, 0, 123, 240)
        assert made["optimiser"]["batch"] == (24 if "YOLOv3" in row.name else 64)
        if row.name in expected:
            assert sum(p.numel() for p in network.parameters()) == expected[row.name]
