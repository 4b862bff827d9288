"""The single-particle networks have exactly the published sizes and take any heads."""
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from xfel_classify.core import ConfigurationError  # noqa: E402
from xfel_classify.learn.networks import build_network  # noqa: E402
from xfel_classify.learn.networks._heads import Views  # noqa: E402
from xfel_classify.learn.networks.spi_vgg import averaging  # noqa: E402


@pytest.mark.parametrize(("architecture", "options", "parameters"), [
    ("spi_multi", {"layers": 3}, 100_567), ("spi_multi", {"layers": 5}, 74_535),
    ("spi_multi", {"layers": 10}, 164_967), ("spi_multi", {"layers": 18}, 204_167),
    ("spi_multi", {"layers": 10, "branch": "early"}, 298_631),
    ("spi_resnet", {}, 11_177_999), ("spi_vgg", {}, 15_089_871)])
def test_published_parameter_counts(architecture, options, parameters):
    network = build_network(architecture, **options)
    assert sum(p.numel() for p in network.parameters()) == parameters
    with torch.inference_mode():
        found = network.eval()(torch.rand(2, 1, 128, 128))
    assert {name: tuple(values.shape) for name, values in found.items()} == {
        "count": (2, 4), "particle": (2, 11)}


def test_sizes_along_the_ten_layers():
    network, values, sides = build_network("spi_multi").eval(), torch.rand(1, 1, 128, 128), []
    for step in network.trunk:
        values = step(values)
        if isinstance(step, torch.nn.Conv2d):
            sides.append(values.shape[-1])
    assert sides == [64, 32, 16, 8, 7, 6, 5, 5, 4] and values.shape[1] == 128
    assert (values >= 0).all()          # a ReLU after the last, too


@pytest.mark.parametrize("architecture", ["spi_multi", "spi_resnet", "spi_vgg"])
@pytest.mark.parametrize("scaling", ["log1p", "log1p_standardised", "relative"])
def test_scalings_add_no_parameter_and_are_finite_everywhere(architecture, scaling):
    heads = {"count": 4}
    raw, scaled = (build_network(architecture, heads=heads, scaling=one)
                   for one in ("raw", scaling))
    assert sum(p.numel() for p in raw.parameters()) == sum(p.numel() for p in scaled.parameters())
    images = torch.stack([torch.zeros(128, 128), torch.full((128, 128), 1e4),
                          -torch.rand(128, 128), torch.rand(128, 128)])[:, None]
    with torch.inference_mode():
        assert torch.isfinite(scaled.eval()(images)["count"]).all()


def test_a_brighter_image_is_the_same_to_a_relative_network():
    network = build_network("spi_multi", scaling="relative").eval()
    image = torch.rand(1, 1, 128, 128) * 20
    with torch.inference_mode():
        one, two = network(image)["particle"], network(3 * image)["particle"]
        other = build_network("spi_multi", scaling="raw").eval()
        assert not torch.allclose(other(image)["particle"], other(3 * image)["particle"])
    torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)


def test_the_autocorrelation_shows_the_distance_between_two_copies():
    """Fringes of two copies of a Gaussian particle give a pair of peaks where the distance is."""
    axis = np.arange(32) - 15.5
    row, column = axis[:, None], axis[None, :]
    fringes = 1 + np.cos(2 * np.pi * (6 * row + 5 * column) / 32)
    image = 50 * np.exp(-(row ** 2 + column ** 2) / 128) * fringes
    views = Views("log1p_standardised", True, 32)
    with torch.inference_mode():
        first, second = views(torch.from_numpy(image[None, None]).float())[0].double().numpy()
    scaled = np.log1p(image)
    scaled = (scaled - scaled.mean()) / scaled.std()
    np.testing.assert_allclose(first, scaled, atol=1e-4)
    taper = np.outer(np.cos(np.pi * axis / 32), np.cos(np.pi * axis / 32))
    wave = np.exp(2j * np.pi / 32 * np.outer(axis, axis))
    amplitude = np.log(np.abs(wave @ (scaled * taper) @ wave) + 1)
    amplitude = (amplitude - amplitude.mean()) / np.sqrt(amplitude.var() + 1e-3)
    np.testing.assert_allclose(second, amplitude, atol=1e-3)
    outside = np.hypot(row, column) > 4         # apart from the particle itself
    at = np.unravel_index(np.argmax(np.where(outside, second, -9)), second.shape)
    assert np.abs(np.abs(axis[list(at)]) - [6, 5]).max() < 1
    network = build_network("spi_multi", autocorrelation=True)
    assert sum(p.numel() for p in network.parameters()) == 164_967 + 32


def test_numbers_answer_in_the_range_they_are_told():
    network = build_network("spi_multi", layers=3, heads={"distance": 1, "count": 4}).eval()
    network.heads.set_range("distance", 0.3, 0.01)
    with torch.inference_mode():
        found = network(torch.rand(3, 1, 128, 128))
    assert found["distance"].shape == (3, 1)
    assert (found["distance"] - 0.3).abs().max() < 0.1
    kept = network.state_dict()
    assert kept["heads.centre_distance"] == pytest.approx(0.3)


def test_early_branches_share_only_the_first_convolutions():
    network = build_network("spi_multi", branch="early").eval()
    with torch.inference_mode():
        features = network.features(torch.rand(1, 1, 128, 128))
    assert features["count"].shape == features["particle"].shape == (1, 2048)
    assert not torch.equal(features["count"], features["particle"])


@pytest.mark.parametrize(("size", "bins"), [(4, 7), (8, 7), (7, 7), (3, 7)])
def test_adaptive_averaging_is_torchs(size, bins):
    values = torch.rand(2, 3, size, size)
    matrix = averaging(size, bins)
    expected = torch.nn.AdaptiveAvgPool2d(bins)(values)
    torch.testing.assert_close(matrix @ values @ matrix.T, expected)
    np.testing.assert_allclose(matrix.sum(1), 1, rtol=1e-6)


@pytest.mark.parametrize(("architecture", "options", "words"), [
    ("spi_multi", {"layers": 4}, "layers = 4"), ("spi_multi", {"branch": "middle"}, "middle"),
    ("spi_multi", {"scaling": "sqrt"}, "log1p_standardised"), ("spi_multi", {"size": 20}, "128"),
    ("spi_multi", {"heads": {"count": 0}}, "at least one"), ("spi_resnet", {"depth": 50}, "18"),
    ("spi_vgg", {"size": 8}, "32"), ("spi_vgg", {"layers": 16}, "valid options")])
def test_options_that_do_not_exist_are_named(architecture, options, words):
    with pytest.raises(ConfigurationError, match=words):
        build_network(architecture, **options)
