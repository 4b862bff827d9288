"""The direct kernel of the hit network against a general runtime."""
import numpy as np
import pytest

from xfel_classify.core import EngineError
from xfel_classify.engines import available_backends, find_model, open_engine


@pytest.fixture(scope="module")
def images_BHW():
    rng = np.random.default_rng(3)
    images = rng.poisson(np.exp(rng.uniform(-4, 3, (12, 1, 1))), (12, 350, 350))
    images = images.astype(np.float32)
    images[0] = 0
    images[1] = 5e4
    images[2, :, 100:130] = 0
    images[3, 60:64, 60:64] = 5e4
    images[4] -= 1000
    return images


def test_same_answers_as_onnxruntime(images_BHW):
    model = find_model("sfx-hit")
    with open_engine(model, "direct") as direct, open_engine(model, "onnxruntime") as general:
        found, expected = direct.infer(images_BHW), general.infer(images_BHW)
    assert found["hit"].shape == (12, 2) and found["hit"].dtype == np.float32
    np.testing.assert_allclose(found["hit"], expected["hit"],
                               atol=model.card.tolerance_of("float32"))
    np.testing.assert_allclose(found["hit"].sum(axis=1), 1, atol=1e-6)


def test_batches_do_not_matter(images_BHW):
    with open_engine("sfx-hit", "direct") as engine:
        together = engine.infer(images_BHW)["hit"]
        for i in range(len(images_BHW)):
            np.testing.assert_array_equal(engine.infer(images_BHW[i:i + 1])["hit"],
                                          together[i:i + 1])
        assert engine.infer(images_BHW[:0])["hit"].shape == (0, 2)


def test_it_is_preferred_where_it_applies_and_passed_over_elsewhere(write_model):
    with open_engine("sfx-hit") as engine:
        assert engine.name == "direct"
    with open_engine(write_model()) as engine:
        assert engine.name == "onnxruntime"
    assert "direct" not in available_backends(find_model(write_model("other")))


def test_other_networks_and_devices_are_refused(write_model):
    with pytest.raises(EngineError, match="onnxruntime"):
        open_engine(write_model(), "direct")
    with pytest.raises(EngineError, match="CPU only"):
        open_engine("sfx-hit", "direct", device="cuda:0")
