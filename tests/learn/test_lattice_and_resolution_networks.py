"""The published networks to the parameter, and the geometry layer to the textbook."""
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from xfel_classify.core import ConfigurationError  # noqa: E402
from xfel_classify.learn.networks import build_network  # noqa: E402
from xfel_classify.learn.networks._geometry import inverse_d_A  # noqa: E402
from xfel_classify.learn.networks.resnet import Network  # noqa: E402


def count(network):
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(("depth", "parameters"), [
    (18, 11_783_441), (34, 21_891_601), (50, 25_650_961)])
@pytest.mark.parametrize("head", ["lattice", "resolution"])
def test_the_published_counts(depth, parameters, head):
    network = build_network("resnet", depth=depth, heads=[head])
    assert count(network) == parameters
    assert network.outputs == {head: 1}


@pytest.mark.parametrize("depth", [18, 34, 50])
def test_torchvision_names_and_shapes(depth):
    """The trunk takes over ImageNet weights: three channels become one by their sum."""
    network = Network(depth)
    tensors = {name: torch.randn_like(value) if value.is_floating_point() else value
               for name, value in network.state_dict().items() if not name.startswith("heads.")}
    colour = torch.randn(64, 3, 7, 7)
    missing = network.load_pretrained({**tensors, "conv1.weight": colour})
    assert missing and all(name.startswith("heads.") for name in missing)
    torch.testing.assert_close(network.conv1.weight.detach(), colour.sum(1, keepdim=True))
    assert {"layer1.0.conv1.weight", "layer4.1.bn2.running_var", "layer2.0.downsample.0.weight",
            "layer2.0.downsample.1.bias", "fc.weight"} <= set(tensors)
    assert ("layer1.0.downsample.0.weight" in tensors) == (depth == 50)
    with pytest.raises(ConfigurationError, match="lack .* tensors"):
        network.load_pretrained({"fc.weight": tensors["fc.weight"]})


def test_two_heads_share_one_trunk():
    network = Network(18, ["lattice", "resolution"])
    assert count(network) == 11_783_441 + 100_201
    geometry = torch.tensor([[150.0, 0.172, 1.0, 1.0]] * 2)
    found = network.eval()(torch.rand(2, 1, 96, 96), geometry)
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "lattice": (2, 1), "resolution": (2, 1)}


@pytest.mark.parametrize(("architecture", "options"), [
    ("resnet", {"depth": 10, "width": 8, "heads": ["resolution"]}), ("radial", {"size": 128})])
def test_the_answer_follows_the_geometry_it_is_given(architecture, options):
    torch.manual_seed(0)
    network = build_network(architecture, **options).eval()
    image = torch.rand(1, 1, 128, 128).expand(2, -1, -1, -1)
    geometry = torch.tensor([[150.0, 0.1, 1.0, 1.0], [150.0, 0.1, 2.0, 1.0]])
    with torch.no_grad():
        found = network(image, geometry)["resolution"]
        if architecture == "resnet":            # twice the wavelength: half the 1/d
            torch.testing.assert_close(found[0], 2 * found[1])
        assert not torch.allclose(found[0], found[1])
        with pytest.raises(ConfigurationError, match="distance_mm"):
            network(image)


def test_without_the_geometry_layer_the_number_is_inverse_d():
    network = Network(18, ["resolution"], geometry=False).eval()
    assert not network.uses_geometry
    with torch.no_grad():
        features = network(torch.zeros(1, 1, 64, 64))["resolution"]
    assert features.shape == (1, 1)


def test_the_geometry_layer_is_braggs_law():
    """d = lambda / (2 sin theta) at the angle under which the radius is seen."""
    rng = np.random.default_rng(0)
    distance, pixel = rng.uniform(60, 300, 50), rng.uniform(0.05, 0.2, 50)
    wavelength, pool = rng.uniform(0.9, 1.4, 50), rng.choice([1, 2, 3, 4], 50)
    radius = rng.uniform(5, 512, 50)
    theta = 0.5 * np.arctan(radius * pool * pixel / distance)
    d = wavelength / (2 * np.sin(theta))
    geometry = torch.tensor(np.stack([distance, pixel, wavelength, pool], 1))
    found = inverse_d_A(torch.tensor(radius)[:, None], geometry)[:, 0]
    np.testing.assert_allclose(1 / found.numpy(), d, rtol=1e-12)


def test_one_crystal_at_150_and_300_mm_has_one_d():
    """Its spots end at a larger radius further away; the layer gives both the same d."""
    d, wavelength, pixel = 2.4, 1.1, 0.172
    for pool in (1, 2):
        radii = [z * np.tan(2 * np.arcsin(wavelength / (2 * d))) / (pixel * pool)
                 for z in (150.0, 300.0)]
        assert radii[1] == pytest.approx(2 * radii[0])
        found = inverse_d_A(torch.tensor(radii)[:, None], torch.tensor(
            [[z, pixel, wavelength, float(pool)] for z in (150.0, 300.0)], dtype=torch.float64))
        np.testing.assert_allclose(1 / found[:, 0].numpy(), d, rtol=1e-9)


def test_gradients_pass_the_geometry_layer_whatever_the_radius():
    radius = torch.tensor([[-50.0], [0.0], [300.0]], requires_grad=True)
    inverse_d_A(radius, torch.tensor([[150.0, 0.1, 1.0, 2.0]] * 3)).sum().backward()
    assert (radius.grad > 0).all()


def test_frozen_normalisation_after_the_first_epoch():
    images = torch.rand(4, 1, 64, 64) + 3

    def moved(network):
        before = network.bn1.running_mean.clone()
        network(images)
        return not torch.equal(before, network.bn1.running_mean)

    frozen, usual = (Network(10, bn=bn, width=8).train() for bn in ("frozen_after_1", "batch"))
    for epoch, expected in ((0, True), (1, False), (2, False)):
        for network in (frozen, usual):
            network.eval()
            network.train()
            network.begin_epoch(epoch)
        assert moved(frozen) == expected and moved(usual)
        assert frozen.training and frozen.fc.training       # only the normalisation stands still


def test_wrong_options_are_named():
    for options, expected in (({"depth": 20}, "valid are 10, 18, 34, 50"),
                              ({"heads": ["hits"]}, "lattice, resolution"),
                              ({"heads": "lattice"}, "a list of"),
                              ({"bn": "frozen"}, "batch, frozen_after_1")):
        with pytest.raises(ConfigurationError, match=expected):
            build_network("resnet", **options)
    with pytest.raises(ConfigurationError, match="multiple of 8"):
        build_network("radial", size=100)
