"""The shipped ``spi``: what it says of simulated images that nobody trained on."""
import numpy as np
import pytest

from xfel_classify.engines import check_model, find_model, open_engine
from xfel_classify.simulate.spi_conditions import draw_spi
from xfel_classify.simulate.spi_images import simulate_spi

SEED = 5571


@pytest.fixture(scope="module")
def engine():
    with open_engine("spi", "onnxruntime") as opened:
        yield opened


def images_of(preset, kind, count):
    """(images, conditions) of the first events of a kind."""
    found = []
    for event in range(10_000):
        c = draw_spi(SEED, 0, event, preset)
        if c.kind == kind:
            found.append((simulate_spi(c), c))
        if len(found) == count:
            break
    return np.stack([image for image, _ in found]), [c for _, c in found]


def geometry(conditions):
    return np.array([(1e3 * c.distance_m, 1e3 * c.pixel_size_m, c.wavelength_A, c.block)
                     for c in conditions], np.float32)


def test_it_is_small_and_every_runtime_gives_its_check_values():
    model = find_model("spi")
    assert model.onnx_path.stat().st_size < 10e6
    report = check_model(model)
    assert report.passed, report


def test_single_icosahedra_are_good_and_measured(engine):
    images, drawn = images_of("quality", "good", 40)
    found = engine.infer(images, geometry(drawn))
    size = np.array([c.diameter_A for c in drawn]) / 10
    assert (np.abs(found["size_nm"][:, 0] / size - 1) <= 0.05).mean() >= 0.9
    assert (found["quality"][:, 1] >= 0.5).mean() >= 0.9


def test_blanks_and_several_bodies_are_bad(engine):
    for kind in ("blank", "bad"):
        images, drawn = images_of("quality", kind, 30)
        threshold = find_model("spi").card.task("quality").threshold
        found = engine.infer(images, geometry(drawn))
        assert (found["quality"][:, 1] < threshold).mean() >= 0.85, kind


def test_brightness_says_nothing(engine):
    images, drawn = images_of("quality", "good", 8)
    once, again = (engine.infer(images * np.float32(factor), geometry(drawn))
                   for factor in (1, 20))
    for name in once:
        np.testing.assert_allclose(once[name], again[name], atol=0.02 if name != "size_nm" else 0.5)
