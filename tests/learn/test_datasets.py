"""Recipes are checked; cached images are the simulator's, whichever way they are read."""
import h5py
import numpy as np
import pytest

pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from xfel_classify.core import ConfigurationError, Window  # noqa: E402
from xfel_classify.learn import datasets  # noqa: E402
from xfel_classify.learn.datasets import ImageSet, augment, open_runs, simulate  # noqa: E402
from xfel_classify.learn.recipes import Augment, RunKey, read_recipe, runs_of  # noqa: E402


def test_a_recipe_lists_its_runs(toy_recipe):
    recipe = read_recipe(toy_recipe)
    assert [run.stem for run in runs_of(recipe, "training")] == [
        "toy_easy_s1_r0000_n16", "toy_easy_s1_r0001_n16"]
    assert len(recipe.sha256) == 64
    assert recipe.window == Window() and recipe.task.positive_index == 1


@pytest.mark.parametrize(("old", "new", "expected"), [
    ("epochs = 2", "epoch = 2", "unknown key 'epoch'.*did you mean 'epochs'"),
    ("runs = 2", "run = 2", "unknown key 'run'.*did you mean 'runs'"),
    ('kind = "adam"', 'kind = "adamw"', "valid are sgd, adam"),
    ('schedule = "cosine"', 'schedule = "step"', "valid are decay, cosine"),
    ("seed = 3", "seed = 1", "seed 1 is used by both training and test"),
    ('positive = "hit"', 'positiv = "hit"', "unknown key 'positiv'"),
    ("[[data.validation]]", "[[data.shifted]]", "are both needed"),
])
def test_wrong_recipes_are_explained(toy_recipe, old, new, expected):
    toy_recipe.write_text(toy_recipe.read_text().replace(old, new))
    with pytest.raises(ConfigurationError, match=expected):
        read_recipe(toy_recipe)


def test_cached_and_live_images_are_the_same(toy_recipe):
    key = runs_of(read_recipe(toy_recipe), "training")[1]
    images_NHW, labels_N = simulate(key)
    cached = open_runs([key])[0]
    np.testing.assert_array_equal(cached.labels_N, labels_N)
    blocks = np.concatenate(list(cached.blocks(Window(), size=5)))
    np.testing.assert_array_equal(blocks, images_NHW.astype(np.float32))
    assert images_NHW.dtype == np.float16


def test_large_values_survive_the_rounding_and_are_clipped_by_the_window():
    stored = datasets.quantise(np.array([[[1e9, -1e9, 0.1, 40000.0]]]))
    seen = datasets.normalised(stored, Window())
    np.testing.assert_allclose(seen, [[[5e4, -5e4, 0.1, 40000.0]]], rtol=1e-3)


def test_training_sees_what_the_event_loop_renders(toy_recipe):
    from xfel_classify.preprocess import image_window

    images_NHW, _ = simulate(runs_of(read_recipe(toy_recipe), "test")[0])
    images_NHW[0, 7, 7] = 6e4
    rendered = np.stack([image_window(image_HW.astype(np.float32), Window())
                         for image_HW in images_NHW])
    np.testing.assert_array_equal(datasets.normalised(images_NHW, Window()), rendered)


def test_an_index_over_several_runs(toy_recipe):
    runs = open_runs(runs_of(read_recipe(toy_recipe), "training"))
    images = ImageSet(runs, Window())
    assert len(images) == 32
    expected = np.concatenate([next(run.blocks(Window(), 16)) for run in runs])
    np.testing.assert_array_equal(images.images([31, 0, 16, 15]), expected[[31, 0, 16, 15]])
    images.close()


def test_two_processes_write_the_same_run(toy_recipe, tmp_path):
    # the pool's processes do not know the toy generator, so the real one is used
    sfx = pytest.importorskip("xfel_classify.simulate.sfx")
    assert sfx
    keys = [RunKey("sfx", "training", 5, run, 2) for run in range(2)]
    together = open_runs(keys, processes=2, directory=tmp_path / "together")
    alone = open_runs(keys, processes=1, directory=tmp_path / "alone")
    for one, two in zip(together, alone, strict=True):
        with h5py.File(one.path) as first, h5py.File(two.path) as second:
            np.testing.assert_array_equal(first["images"], second["images"])
            np.testing.assert_array_equal(first["labels"], second["labels"])


def test_a_changed_simulator_renews_the_cache(toy_recipe, monkeypatch):
    key = runs_of(read_recipe(toy_recipe), "test")[0]
    before = next(open_runs([key])[0].blocks(Window()))
    written = open_runs([key])[0].path.stat().st_mtime_ns
    assert open_runs([key])[0].path.stat().st_mtime_ns == written     # nothing changed
    original = datasets.GENERATORS["toy"]

    def brighter(run, events):
        images_NHW, labels_N = original(run, events)
        return images_NHW + 1, labels_N

    monkeypatch.setitem(datasets.GENERATORS, "toy", brighter)
    after = next(open_runs([key])[0].blocks(Window()))
    np.testing.assert_array_equal(after, before + 1)


def test_a_damaged_cache_is_made_again(toy_recipe):
    key = runs_of(read_recipe(toy_recipe), "test")[0]
    cached = open_runs([key])[0]
    cached.path.write_bytes(cached.path.read_bytes()[:1000])
    assert len(next(open_runs([key])[0].blocks(Window()))) == 6
    assert not list(cached.path.parent.glob("*.tmp"))


def test_an_unknown_generator_names_the_known():
    with pytest.raises(ConfigurationError, match="no generator is called 'spi'; known:.*sfx"):
        simulate(RunKey("spi", "x", 0, 0, 1))


def test_augmented_images_keep_their_pixels():
    images_BHW = np.arange(3 * 4 * 4, dtype=np.float32).reshape(3, 4, 4)
    turned = augment(images_BHW, Augment(), np.random.default_rng(3))
    np.testing.assert_array_equal(np.sort(turned.reshape(3, -1)), images_BHW.reshape(3, -1))
    assert not np.array_equal(turned, images_BHW)
    again = augment(images_BHW, Augment(), np.random.default_rng(3))
    np.testing.assert_array_equal(turned, again)
    still = augment(images_BHW, Augment(flips=False, rotations=False), np.random.default_rng(3))
    np.testing.assert_array_equal(still, images_BHW)
    bright = augment(images_BHW, Augment(flips=False, rotations=False, intensity=0.3),
                     np.random.default_rng(3))
    ratio = bright[:, 1, 1] / images_BHW[:, 1, 1]
    assert len(set(ratio.round(4))) == 3 and (ratio > 0).all()
