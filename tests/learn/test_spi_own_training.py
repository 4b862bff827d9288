"""The recipe of ``spi`` from training to a run: missing labels, card, selection, prototypes."""
import re

import h5py
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")
pytest.importorskip("onnx")
pytestmark = pytest.mark.torch

from xfel_classify import cli  # noqa: E402
from xfel_classify.core import ConfigurationError  # noqa: E402
from xfel_classify.engines import check_model, find_model  # noqa: E402
from xfel_classify.engines.cards import shipped_directory  # noqa: E402
from xfel_classify.learn.export import export_model  # noqa: E402
from xfel_classify.learn.lessons import lesson_of  # noqa: E402
from xfel_classify.learn.prototypes import single_question  # noqa: E402
from xfel_classify.learn.recipes import read_recipe  # noqa: E402
from xfel_classify.learn.spi_scores import evaluate_spi  # noqa: E402
from xfel_classify.learn.training import train  # noqa: E402
from xfel_classify.simulate import spi_conditions, spi_images  # noqa: E402


def fake_image(c, structures=None):
    """A disc's rings, striped by copies; nothing for a blank."""
    rng = np.random.default_rng([c.seed, c.run, c.event])
    axis = np.arange(128) - 63.5
    row, column = axis[:, None], axis[None]
    radius = np.hypot(row, column)
    wave = np.zeros((128, 128), complex)
    for _ in range(c.count):
        k = rng.uniform(-0.5, 0.5, 2)
        wave = wave + np.exp(1j * (k[0] * row + k[1] * column))
    period = 7e5 * c.distance_m / 0.3 / c.diameter_A * 4 / c.block
    mean = (1 + np.cos(2 * np.pi * radius / max(period, 3.0))) * 300 / (1 + radius) ** 2
    return (rng.poisson(16 * mean * abs(wave) ** 2) / 16).astype(np.float32)


def fake_labels(c, structures=None):
    several = c.kind in ("particles", "good", "bad")
    return {"count": c.count - 1 if several else -1, "particle": c.particle_index,
            "diameter_A": c.diameter_A, "distance_m": c.distance_m, "photons": 1e5 * c.count}


@pytest.fixture(autouse=True)
def same_thread_count():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory):
    """The shipped recipe with one or two runs of each set, of a made-up simulator."""
    folder = tmp_path_factory.mktemp("own")
    text = (shipped_directory() / "spi" / "recipe.toml").read_text()
    for events, runs in ((77, 1), (70, 1), (11, 3)):
        text = re.sub(rf"runs = \d+\nevents = {events}\n", f"runs = {runs}\nevents = {events}\n",
                      text)
    for pattern, new in ((r"epochs = \d+", "epochs = 1"), (r"batch = \d+", "batch = 32"),
                         (r"features = \d+", "features = 8"), (r"warmup = \d+", "warmup = 0")):
        text, found = re.subn(pattern, new, text)
        assert found == 1, pattern
    (folder / "recipe.toml").write_text(text)
    return folder / "recipe.toml"


@pytest.fixture(scope="module", autouse=True)
def made_up_simulator(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XFEL_CLASSIFY_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("XFEL_CLASSIFY_STRUCTURES", raising=False)
        patch.setattr(spi_images, "simulate_spi", fake_image)
        patch.setattr(spi_images, "spi_labels", fake_labels)
        patch.setattr(spi_conditions, "_radius_A", lambda source: 80.0)
        yield


@pytest.fixture(scope="module")
def trained(recipe_path):
    return train(recipe_path, recipe_path.parent / "training", device="cpu")


@pytest.fixture(scope="module")
def model(trained):
    return export_model(trained, trained.directory.parent / "models" / "spi")


def test_labels_that_an_image_does_not_have_are_not_in_the_loss(recipe_path):
    lesson = lesson_of(read_recipe(recipe_path))
    lesson.open()
    labels = lesson._pupils.labels
    bodies = np.flatnonzero((labels["body"] > 0) & (labels["quality"] == 0))[:6]
    outputs = {"count": torch.zeros(6, 4), "particle": torch.zeros(6, 11),
               "quality": torch.zeros(6, 2), "size_nm": torch.ones(6, 1)}
    for values in outputs.values():
        values.requires_grad_()
    lesson.loss(outputs, bodies).backward()
    assert (outputs["particle"].grad == 0).all() and (outputs["size_nm"].grad == 0).all()
    assert (outputs["quality"].grad != 0).all()
    good = np.flatnonzero((labels["body"] > 0) & (labels["quality"] > 0))[:6]
    for values in outputs.values():
        values.grad = None
    loss = lesson.loss(outputs, good)
    loss.backward()
    assert torch.isfinite(loss) and (outputs["size_nm"].grad != 0).all()
    lesson.close()


def test_the_model_says_what_it_needs_and_every_runtime_agrees(model):
    card = model.card
    assert [task.name for task in card.tasks] == ["count", "particle", "quality", "size_nm",
                                                 "unknown"]
    assert card.geometry == "geometry" and card.pools == [2, 4, 8]
    assert check_model(model).passed
    assert model.onnx_path.stat().st_size < 10e6
    assert card.metrics["validation"]["size_nm_error"] > 0


def test_figures_are_of_the_labels_that_there_are(model):
    found = evaluate_spi(model, "test")
    bodies = found.parts["quality_soccer"]
    assert "particle" not in bodies.tasks and bodies.tasks["quality"].errors.good > 0
    assert bodies.tasks["quality"].confusion_KK.sum() == bodies.images
    assert set(found.parts["jitter"].tasks) == {"count", "particle", "quality"}
    kept = found.as_metrics("test")
    assert {"quality_balanced", "quality_f1", "size_nm_within_5_percent"} <= set(
        kept["quality_experiment"])
    assert "jitter_unseen" in found.unknown and "good" in str(found)


def test_cut_down_to_one_question_it_needs_no_geometry(model, tmp_path):
    cut = single_question(model, "quality", tmp_path / "cut")
    assert cut.card.geometry == "" and [t.name for t in cut.card.tasks] == ["hit"]
    assert cut.card.task("hit").classes == ["miss", "hit"] and check_model(cut).passed
    with pytest.raises(ConfigurationError, match="yes/no tasks are quality, unknown"):
        single_question(model, "count", tmp_path / "other")


# --- runs -----------------------------------------------------------------------------------------

def write_run(directory, count=72):
    """An HDF5 run of assembled photons, 256 x 256: rings, or rings crossed by stripes."""
    rng = np.random.default_rng(4)
    single = rng.random(count) < 0.5
    axis = np.arange(256) - 127.5
    row, column = axis[:, None], axis[None]
    radius = np.hypot(row, column)
    images = np.empty((count, 256, 256), np.float32)
    for image, one in zip(images, single, strict=True):
        mean = 800 * (1 + np.cos(2 * np.pi * radius / rng.uniform(18, 24))) / (2 + radius) ** 2
        if not one:
            angle = rng.uniform(0, np.pi)
            mean = mean * (1 + np.cos(0.5 * (row * np.cos(angle) + column * np.sin(angle))))
        image[:] = rng.poisson(mean)
    with h5py.File(directory / "mine.h5", "w") as file:
        file["entry_1/data_1/data"] = images
        file["photon_energy_eV"] = np.full(count, 1700.0)
        file.attrs["exp"], file.attrs["run"] = "mine", 7
    (directory / "expert.txt").write_text("\n".join(
        f"mine.h5 [{n}] {'HIT' if one else 'MISS'}" for n, one in enumerate(single, 1)))
    return directory / "mine.h5", directory / "expert.txt", single


SOURCE = ["--detector", "assembled", "--set", "source.pixel_size_m=75e-6", "--set",
          "source.distance_m=0.3"]


def test_a_run_gets_all_answers_and_good_ones_are_selected(model, tmp_path):
    run, _, _ = write_run(tmp_path, 12)
    assert cli.main(["run", str(run), "--model", str(model.directory), "--peaks", "none",
                     "-o", str(tmp_path / "out"), *SOURCE]) == 0
    with h5py.File(tmp_path / "out" / "mine_r0007.h5") as file:
        assert {"count", "particle", "quality", "size_nm"} <= set(file)
        good = file["quality/label"][:] == 1
        assert np.isfinite(file["size_nm/diameter"][:]).all()
        assert file["count/probability"].shape == (12, 4)
        np.testing.assert_array_equal(
            good, file["quality/score"][:] >= model.card.task("quality").threshold)
    listed = (tmp_path / "out" / "mine_r0007_hits.txt").read_text().split("\n")[:-1]
    assert [int(line.split()[1]) for line in listed] == list(np.flatnonzero(good))
    if good.any():
        with h5py.File(tmp_path / "out" / "mine_r0007.cxi") as file:
            assert len(file["entry_1/data_1/data"]) == good.sum()


def test_prototypes_from_a_few_dozen_labels(tmp_path, capsys):
    run, expert, single = write_run(tmp_path)
    target = tmp_path / "mine"
    words = ["finetune", "spi", str(run), "--labels", str(expert), "-o", str(target),
             "--prototypes", *SOURCE]
    assert cli.main(words) == 0
    assert "prototypes of" in capsys.readouterr().out
    mine = find_model(target)
    assert [task.name for task in mine.card.tasks] == ["hit"]
    assert mine.card.provenance["optimiser"].startswith("prototypes")
    assert mine.card.metrics["held_back"]["after"]["accuracy"] > 0.8
    assert cli.main(["run", str(run), "--model", str(target), "--peaks", "none", "-o",
                     str(tmp_path / "out"), *SOURCE[:4]]) == 0      # no distance is needed
    with h5py.File(tmp_path / "out" / "mine_r0007.h5") as file:
        assert (file["hit/label"][:] == single).mean() > 0.85


def test_fewer_labels_than_prototypes_need_are_refused(model, tmp_path, capsys):
    run, expert, _ = write_run(tmp_path, 20)
    assert cli.main(["finetune", str(model.directory), str(run), "--labels", str(expert), "-o",
                     str(tmp_path / "mine"), "--prototypes", *SOURCE]) != 0
    assert "at least 36 labelled" in capsys.readouterr().err


def test_all_weights_can_learn_a_single_question(tmp_path, capsys):
    run, expert, _ = write_run(tmp_path, 110)
    assert cli.main(["finetune", "spi", str(run), "--labels", str(expert), "-o",
                     str(tmp_path / "mine"), "--task", "quality", "--epochs", "1", *SOURCE]) == 0
    said = capsys.readouterr().out
    assert "epoch 1/1" in said
    mine = find_model(tmp_path / "mine")
    assert check_model(mine).passed and [task.name for task in mine.card.tasks] == ["hit"]
    assert mine.card.geometry == "" and mine.card.provenance["base"] == "spi"
