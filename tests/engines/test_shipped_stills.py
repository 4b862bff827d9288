"""The shipped lattice and resolution models keep what their cards promise."""
import dataclasses
import tomllib

import numpy as np
import pytest

from xfel_classify.core import EngineError
from xfel_classify.engines import find_model, open_engine
from xfel_classify.engines.cards import sha256_of
from xfel_classify.preprocess import image_window
from xfel_classify.simulate.stills_512 import draw_still, simulate_quadrant

BOTH = ("sfx-lattice", "sfx-resolution")
UNSEEN = 77_001         # a seed of no recipe


@pytest.fixture(autouse=True)
def only_shipped_models(monkeypatch):
    monkeypatch.delenv("XFEL_CLASSIFY_MODELS", raising=False)


def seen(conditions, window):
    """(image, geometry) of a still as a run shows it to a model."""
    still = simulate_quadrant(conditions)
    image = image_window(still.photons_SF, dataclasses.replace(
        window, pool=conditions.pool, quadrant=conditions.quadrant), still.beam_center_px,
        still.good_SF)
    return image, np.float32(conditions.geometry_4)


def answers(model, conditions):
    pairs = [seen(c, model.window) for c in conditions]
    with open_engine(model, "onnxruntime") as engine:
        found = engine.infer(np.stack([image for image, _ in pairs]),
                             np.stack([geometry for _, geometry in pairs]))
    return found[model.card.tasks[0].output]


@pytest.mark.parametrize("name", BOTH)
def test_the_card_holds_measured_figures_of_unseen_runs(name):
    model = find_model(name)
    card = model.card
    assert sha256_of(model.directory / "recipe.toml") == card.provenance["recipe_sha256"]
    seeds = card.provenance["seeds"]
    drawn = [seed for split in seeds.values() for seed in split]
    assert len(set(drawn)) == len(drawn) and UNSEEN not in drawn
    assert card.metrics["test"]["images"] >= 1000
    assert card.geometry == "geometry" and set(card.pools) == {1, 2}
    assert (model.directory / "model.onnx").stat().st_size < 2_000_000
    assert (model.directory / "recipe_full.toml").exists()


def test_lattices_are_told_as_well_as_the_paper_tells_them():
    metrics = find_model("sfx-lattice").card.metrics
    assert metrics["test"]["accuracy"] >= 0.94
    assert metrics["shifted"]["images"] >= 1000 and metrics["shifted"]["accuracy"] >= 0.80


def test_resolution_is_judged_as_well_as_the_card_says():
    metrics = find_model("sfx-resolution").card.metrics["test"]
    assert metrics["pearson"] >= 0.96


def test_lattices_of_images_nobody_has_seen():
    model = find_model("sfx-lattice")
    task = model.card.task("lattice")
    shots = [draw_still(UNSEEN, run, 0, "uniform_f1") for run in range(60)]
    several = answers(model, shots)[:, task.positive_index] >= task.threshold
    truth = np.array([c.n_lattices > 1 for c in shots])
    assert 15 < truth.sum() < 45
    assert (several == truth).mean() >= 0.9


def crystal_at(distance_m, d_A, count=24):
    """Shots of one crystal form on one detector; enough of them that a median is good to 1 %."""
    first = draw_still(UNSEEN, 5, 0, "resolution_f1")
    shots = []
    for event in range(count):
        c = draw_still(UNSEEN, 5, event, "resolution_f1")
        shots.append(dataclasses.replace(
            c, crystal=first.crystal, detector="pilatus", pixel_size_m=172e-6, pool=2,
            photon_energy_eV=12_000.0, distance_m=distance_m, d_A=d_A, misset_deg=(),
            misset_sigma_deg=0.0, spot_photons=5000.0, background_photons=1.0, ice=0.0,
            salt_spots=0, shadow=1.0, reach=1.0, beam_stop_m=0.0))
    return shots


@pytest.mark.parametrize("d_A", [2.2, 3.0])
def test_a_crystal_has_the_same_resolution_at_any_distance(d_A):
    model = find_model("sfx-resolution")
    near, far = (1 / answers(model, crystal_at(distance, d_A))[:, 0] for distance in (0.15, 0.30))
    assert np.median(near) == pytest.approx(np.median(far), rel=0.05)
    assert np.median(near) == pytest.approx(d_A, rel=0.15)


def test_both_need_the_geometry():
    for name in BOTH:
        model = find_model(name)
        with open_engine(model, "onnxruntime") as engine, \
                pytest.raises(EngineError, match="geometry"):
            engine.infer(np.zeros((1, *model.window.shape), np.float32))


def test_the_recipes_name_what_was_trained():
    for name in BOTH:
        model = find_model(name)
        recipe = tomllib.loads((model.directory / "recipe.toml").read_text(encoding="utf-8"))
        assert recipe["name"] == name
        assert recipe["architecture"] == model.card.architecture
