"""The shipped published network for single particles keeps what its card promises."""
import numpy as np
import pytest

from xfel_classify.engines import find_model, open_engine
from xfel_classify.engines.cards import sha256_of
from xfel_classify.simulate.spi_images import draw_spi, simulate_spi, spi_labels

NAME = "spi-multi"
UNSEEN = 77_006         # a seed of no recipe


@pytest.fixture(autouse=True)
def only_shipped_models(monkeypatch):
    monkeypatch.delenv("XFEL_CLASSIFY_MODELS", raising=False)
    monkeypatch.delenv("XFEL_CLASSIFY_STRUCTURES", raising=False)


def test_the_card_holds_the_studys_figures():
    model = find_model(NAME)
    card = model.card
    assert card.provenance["parameters"] == 164_967
    assert card.provenance["images"] == {"training": 53_900, "validation": 7700, "test": 15_400}
    assert sha256_of(model.directory / "recipe.toml") == card.provenance["recipe_sha256"]
    assert card.provenance["structures"] == "standins"
    paper = card.metrics["test"]["paper"]
    assert paper["count"] >= 0.987 and paper["brightness_count"] < paper["count"]
    assert paper["count_calibration_error"] <= 0.02 and paper["particle_calibration_error"] <= 0.02
    assert card.metrics["test"]["paper_unseen"]["auroc"] >= 0.90


def test_images_of_the_studys_setting_nobody_has_seen():
    drawn = [draw_spi(UNSEEN, 0, event, "paper:particles=1ijg+6ody+6sp2+1ss8,counts=3+1+1+1")
             for event in range(48)]
    images = np.stack([simulate_spi(c) for c in drawn]).astype(np.float32)
    labels = [spi_labels(c) for c in drawn]
    with open_engine(find_model(NAME), "onnxruntime") as engine:
        found = engine.infer(images)
    for name in ("count", "particle"):
        right = found[name].argmax(1) == [one[name] for one in labels]
        assert right.mean() >= 0.95, name
