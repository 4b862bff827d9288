"""The hit finder's network is the paper's, row by row."""
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from xfel_classify.core import ConfigurationError, UnknownComponent  # noqa: E402
from xfel_classify.learn.networks import build_network, network_names  # noqa: E402
from xfel_classify.learn.networks.sfx_hit import (  # noqa: E402
    Network,
    RowNorm,
    parameter_count,
    row_table,
)

PAPER = [
    ((1, 350, 350), 0), ((4, 344, 344), 200), ((4, 344, 344), 0), ((4, 344, 344), 688),
    ((4, 344, 344), 0), ((4, 68, 68), 0), ((4, 62, 62), 788), ((4, 62, 62), 124),
    ((4, 62, 62), 0), ((4, 12, 12), 0), ((4, 12, 12), 0), ((576,), 0), ((16,), 9232), ((16,), 32),
    ((16,), 0), ((16,), 0), ((2,), 34), ((2,), 0),
]


def test_eighteen_rows_with_the_papers_shapes_and_counts():
    network = Network()
    assert [(shape, count) for _, shape, count in row_table(network)] == PAPER
    assert parameter_count(network) == 11_098
    assert network.training


@pytest.mark.parametrize(("norm", "row_3", "row_7"), [
    ("row", 688, 124), ("batch_axis", 688, 124), ("channel", 8, 8)])
def test_normalisation_variants(norm, row_3, row_7):
    table = row_table(Network(norm=norm))
    assert (table[3][2], table[7][2]) == (row_3, row_7)
    assert [shape for _, shape, _ in table] == [shape for shape, _ in PAPER]
    logits = Network(norm=norm)(torch.rand(3, 1, 350, 350))["hit"]
    assert logits.shape == (3, 2) and torch.isfinite(logits).all()


def test_row_norm_is_the_formula_of_the_specification():
    rng = np.random.default_rng(1)
    values = rng.normal(3.0, 20.0, (2, 4, 5, 62)).astype(np.float32)
    layer = RowNorm(62)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(rng.normal(size=62)))
        layer.bias.copy_(torch.from_numpy(rng.normal(size=62)))
        found = layer(torch.from_numpy(values)).numpy()
    mean, std = values.mean(-1, keepdims=True), values.std(-1, keepdims=True)
    expected = (layer.weight.detach().numpy() * (values - mean) / (std + 1e-3)
                + layer.bias.detach().numpy())
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_row_norm_works_on_each_row_of_each_image_alone():
    layer = RowNorm(344)
    values = torch.randn(3, 4, 6, 344)
    changed = values.clone()
    changed[1, 2, 3] *= 100.0
    difference = (layer(changed) - layer(values)).abs().amax(-1) > 0.02
    assert difference.sum() == 0          # the scale of a row is normalised away
    changed[1, 2, 3, 0] += 1e4
    assert (layer(changed) - layer(values)).abs().amax(-1).nonzero().tolist() == [[1, 2, 3]]


@pytest.mark.parametrize("value", [0.0, 1e-3, 0.1, 37.7, 5e4, -5e4, 1e7])
def test_constant_rows_give_beta_and_finite_gradients(value):
    layer = RowNorm(344)
    values = torch.full((1, 1, 2, 344), value, requires_grad=True)
    found = layer(values)
    assert found.detach().abs().max() < 5e-3
    found.square().sum().backward()
    assert torch.isfinite(values.grad).all()


def test_all_zero_and_saturated_images_score():
    network = Network().eval()
    images = torch.stack([torch.zeros(1, 350, 350), torch.full((1, 350, 350), 5e4)])
    with torch.no_grad():
        assert torch.isfinite(network(images)["hit"]).all()


def test_a_constant_added_to_an_image_changes_nothing():
    network = Network().eval().double()
    images = torch.rand(2, 1, 350, 350, dtype=torch.float64)
    with torch.no_grad():
        plain = network.rows(images)                # without taking off the mean
        torch.testing.assert_close(network(images)["hit"], plain, atol=1e-6, rtol=0)
        torch.testing.assert_close(network(images + 30.0)["hit"], plain, atol=1e-4, rtol=0)


def test_networks_are_found_by_name_and_wrong_options_named():
    assert "sfx_hit" in network_names()
    assert isinstance(build_network("sfx_hit", norm="channel"), Network)
    with pytest.raises(UnknownComponent, match="did you mean 'sfx_hit'"):
        build_network("sfx_hits")
    with pytest.raises(ConfigurationError, match="no option normal; valid options are norm"):
        build_network("sfx_hit", normal="row")
    with pytest.raises(ConfigurationError, match="valid are row, batch_axis, channel"):
        build_network("sfx_hit", norm="layer")
    with pytest.raises(ConfigurationError, match="three rates"):
        build_network("sfx_hit", dropout=[0.1])
