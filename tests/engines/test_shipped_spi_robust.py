"""The shipped single-particle model for varying fluence keeps what its card promises."""
import h5py
import numpy as np
import pytest

from xfel_classify import cli
from xfel_classify.engines import find_model, open_engine
from xfel_classify.engines.cards import sha256_of
from xfel_classify.simulate.spi_images import draw_spi, simulate_spi, spi_labels

NAME = "spi-multi-robust"
UNSEEN = 77_005         # a seed of no recipe


@pytest.fixture(autouse=True)
def only_shipped_models(monkeypatch):
    monkeypatch.delenv("XFEL_CLASSIFY_MODELS", raising=False)
    monkeypatch.delenv("XFEL_CLASSIFY_STRUCTURES", raising=False)


@pytest.fixture(scope="module")
def shots():
    """(images, counts, particles) of a run whose fluence varies; four particles whose transforms
    are made in seconds."""
    preset = "jitter:particles=1ijg+6ody+6sp2+1ss8,counts=3+1+1+1"
    drawn = [draw_spi(UNSEEN, 0, event, preset) for event in range(48)]
    images = np.stack([simulate_spi(c) for c in drawn])
    labels = [spi_labels(c) for c in drawn]
    return (images, np.array([one["count"] for one in labels]),
            np.array([one["particle"] for one in labels]))


def answers(images):
    with open_engine(find_model(NAME), "onnxruntime") as engine:
        return engine.infer(images.astype(np.float32))


def test_the_card_holds_measured_figures_of_unseen_runs():
    model = find_model(NAME)
    card = model.card
    assert sha256_of(model.directory / "recipe.toml") == card.provenance["recipe_sha256"]
    seeds = [seed for split in card.provenance["seeds"].values() for seed in split]
    assert len(set(seeds)) == len(seeds) and UNSEEN not in seeds
    assert card.provenance["structures"] == "standins" and "stand-in" in card.summary
    assert (model.directory / "model.onnx").stat().st_size < 10_000_000
    test = card.metrics["test"]
    assert test["jitter"]["images"] >= 1500
    assert {"faint", "faint_100", "faint_1000"} <= set(card.metrics["shifted"])


def test_the_count_is_honest():
    """What brightness alone gives stands beside it, and is far below."""
    test = find_model(NAME).card.metrics["test"]
    assert test["jitter"]["brightness_count"] < 0.70
    assert test["jitter"]["count"] >= 0.93
    assert test["jitter"]["single"] >= 0.95
    assert test["realistic"]["single"] >= 0.95


def test_stated_probabilities_are_true():
    test = find_model(NAME).card.metrics["test"]
    for name in ("count", "particle"):
        assert test["jitter"][f"{name}_calibration_error"] <= 0.02


def test_images_nobody_has_seen_at_any_brightness(shots):
    images, count, particle = shots
    found = answers(images)
    assert (found["count"].argmax(1) == count).mean() >= 0.85
    assert ((found["count"].argmax(1) == 0) == (count == 0)).mean() >= 0.95
    assert (found["particle"].argmax(1) == particle).mean() >= 0.9
    brighter = answers(3.0 * images)
    for name in ("count", "particle"):
        np.testing.assert_allclose(brighter[name], found[name], atol=1e-3)


def test_a_run_of_raw_words_fills_count_and_particle(tmp_path):
    """pnCCD words in a CXI file, through calibration and the event loop, against their truth."""
    raw = tmp_path / "raw"
    assert cli.main(["simulate", "spi", "--format", "cxi", "--preset",
                     "jitter:particles=1ijg+6sp2,counts=1+1", "--events", "24", "--seed",
                     str(UNSEEN), "--exp", "amosim", "--out", str(raw)]) == 0
    assert cli.main(["run", str(raw / "amosim-r0095.cxi"), "--constants",
                     str(raw / "constants.h5"), "--model", NAME, "--peaks", "none", "-o",
                     str(tmp_path / "run")]) == 0
    with h5py.File(raw / "amosim-r0095-truth.h5") as truth, \
            h5py.File(tmp_path / "run" / "amosim_r0095.h5") as found:
        seen = truth["count"][:] > 0            # a run has empty shots too
        assert 5 <= seen.sum() <= 20
        count, particle = (found[f"{name}/label"][:][seen] for name in ("count", "particle"))
        assert (count + 1 == truth["count"][:][seen]).mean() >= 0.8
        assert (particle == truth["particle"][:][seen]).mean() >= 0.8
        assert found["unknown/score"].shape == seen.shape
