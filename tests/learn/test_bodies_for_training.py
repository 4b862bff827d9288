"""Images of bodies for training, their scores, and stages that are kept."""
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from mockdata.body_images import fake_image, fake_labels  # noqa: E402

from xfel_classify.core import ConfigurationError, OutputDamaged, Window  # noqa: E402
from xfel_classify.engines.cards import shipped_directory  # noqa: E402
from xfel_classify.learn.quality_scores import best_f1, quality_table, score_quality  # noqa: E402
from xfel_classify.learn.recipes import read_recipe  # noqa: E402
from xfel_classify.learn.spi_bodies import (  # noqa: E402
    Shard,
    open_bodies,
    place_in_window,
    shards_of,
    shows_one,
)
from xfel_classify.learn.stages import (  # noqa: E402
    best_window,
    forget_stages,
    keep_stage,
    stage_files,
)
from xfel_classify.simulate import spi_images  # noqa: E402
from xfel_classify.simulate.spi_conditions import draw_spi  # noqa: E402

ABOVE = Window(kind="crop", height=266, width=240, unit="photon", normalize="none")


@pytest.fixture
def simulator(monkeypatch, tmp_path):
    monkeypatch.setenv("XFEL_CLASSIFY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(spi_images, "simulate_spi", fake_image)
    monkeypatch.setattr(spi_images, "spi_labels", fake_labels)


def test_a_run_has_exactly_the_positives_that_are_asked_for(simulator):
    shard = Shard("pr772", 5, 0, 2, 40, "standins", 12)
    images = open_bodies([shard], ABOVE)
    assert images.good_N.reshape(2, 40).sum(1).tolist() == [12, 12]
    # row by row the events that the shard names, in their order
    for row in (0, 39, 40, 79):
        run, event = shard.event(row)
        c = draw_spi(5, run, event, "pr772")
        assert images.good_N[row] == (c.kind == "good")
        np.testing.assert_array_equal(images.images([row])[0, :123], fake_image(c))
    assert shard.stem == Shard("pr772", 5, 0, 2, 40, "standins").stem + "_p12"
    images.close()
    with pytest.raises(ConfigurationError, match="are missing"):
        Shard("pr772:positive=0", 5, 0, 1, 2, "standins", 1).event(0)


def test_images_lie_in_the_window_where_the_beam_has_them():
    image = np.arange(2 * 123 * 240, dtype=np.float32).reshape(2, 123, 240)
    placed = place_in_window(image, "pr772", ABOVE)
    np.testing.assert_array_equal(placed[:, :123], image)
    assert placed.shape == (2, 266, 240) and not placed[:, 123:].any()
    for window in (Window(kind="crop", height=200, width=240, unit="photon", normalize="none"),
                   Window(kind="crop", height=266, width=240, unit="photon")):
        with pytest.raises(ConfigurationError, match="write a window about the beam"):
            place_in_window(image, "pr772", window)


def test_a_contaminant_of_a_good_size_shows_one_body():
    """Preset quality draws other sizes that good ones have too; what is called one has one shape,
    one place and a size of good ones."""
    drawn = [draw_spi(3, 0, event, "quality") for event in range(900)]
    assert all(shows_one(c) == (c.kind == "good") for c in drawn if c.kind != "contaminant")
    contaminants = [c for c in drawn if c.kind == "contaminant"]
    called = [c for c in contaminants if shows_one(c)]
    assert 0 < len(called) < 0.1 * len(contaminants)
    # 30 to 60 % of its diameter, and 400 angstrom at least
    assert all(c.diameter_A > 660 for c in called)
    assert not any(shows_one(c) for c in (draw_spi(3, 0, e, "pr772") for e in range(300))
                   if c.kind == "contaminant")


@pytest.mark.parametrize(("model", "recipe", "images"), [
    ("spi-quality", "recipe.toml", (36_000, 2000, 5000)),
    ("spi-quality", "recipe_full.toml", (40_000, 5000, 5000)),
    ("spi-yolo", "recipe.toml", (555, 336, 4000)),
    ("spi-yolo", "recipe_full.toml", (555, 336, 17_932))])
def test_recipes_in_the_tree_have_the_studies_numbers(model, recipe, images):
    made = read_recipe(shipped_directory() / model / recipe)
    splits = ("training", "validation", "test")
    assert tuple(sum(map(len, shards_of(made, split))) for split in splits) == images
    if model == "spi-yolo":
        good = [sum(part.positives * part.runs for part in getattr(made.data, split))
                for split in splits]
        assert good[:2] == [165, 53] and (good[2] == 995 or images[2] != 17_932)


def test_particles_are_no_bodies(tmp_path):
    text = (shipped_directory() / "spi-quality" / "recipe.toml").read_text()
    path = tmp_path / "recipe.toml"
    path.write_text(text.replace('preset = "quality"', 'preset = "paper"'))
    with pytest.raises(ConfigurationError, match="is of particles"):
        shards_of(read_recipe(path), "training")


# --- scores ---------------------------------------------------------------------------------------

def test_the_best_f1_by_trying_every_threshold():
    rng = np.random.default_rng(0)
    for _ in range(20):
        good = rng.random(60) < 0.2
        scores = np.round(rng.random(60) + 0.4 * good, 1)         # many are equal
        threshold, f1 = best_f1(scores, good)
        tried = [2 * (good & (scores >= t)).sum() / ((scores >= t).sum() + good.sum())
                 for t in np.append(np.unique(scores), 2.0)]
        assert f1 == pytest.approx(max(tried))
        chosen = scores >= threshold
        assert 2 * (good & chosen).sum() / (chosen.sum() + good.sum()) == pytest.approx(f1)


def test_scores_by_kind_and_in_words():
    scores = np.array([0.9, 0.2, 0.1, 0.8, 0.3, 0.0])
    good = np.array([True, True, False, False, False, False])
    found = score_quality("quality", scores, good, np.array([0, 0, 1, 1, 2, 2]), 0.5)
    assert found.right == {"one": 0.5, "several": 0.5, "neither": 1.0}
    assert (found.errors.fnr, found.errors.fpr) == (0.5, 0.25)
    assert found.accuracy == pytest.approx(4 / 6) and found.balanced == pytest.approx(0.625)
    assert "| quality | 6 | 2 | 66.67 | 62.50 | 50.00 | 25.00 | 50.00 | 50.00 | 50.00 |" \
        in quality_table([found])


# --- stages ---------------------------------------------------------------------------------------

def test_the_best_window_and_what_is_kept_on_the_way(tmp_path):
    figures = [0.1, 0.5, 0.6, 0.7, 0.2, 0.3, 0.1, 0.65, 0.1]
    assert best_window(figures, 3) == range(2, 5)
    assert best_window(figures[:2], 3) == range(1, 3)
    assert best_window([0.5, 0.5, 0.5, 0.5], 2) == range(3, 5)      # the later of equals
    for epoch in range(1, len(figures) + 1):
        keep_stage(tmp_path, figures[:epoch], 3, lambda path: path.write_text(path.stem))
    assert sorted(path.stem for path in tmp_path.iterdir()) == [
        f"stage_{epoch:04d}" for epoch in (2, 3, 4, 7, 8, 9)]
    assert [path.read_text() for path in stage_files(tmp_path, figures, 3).values()] == [
        "stage_0002", "stage_0003", "stage_0004"]
    (tmp_path / "stage_0003.safetensors").unlink()
    with pytest.raises(OutputDamaged, match="stage_0003"):
        stage_files(tmp_path, figures, 3)
    with pytest.raises(ConfigurationError, match="stages = 5"):
        stage_files(tmp_path, figures, 0)
    forget_stages(tmp_path)
    assert not list(tmp_path.iterdir())
