"""ResNet(n, m) to the parameter, its standardisation, and VGG-16 features with a regression."""
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from xfel_classify.core import ConfigurationError  # noqa: E402
from xfel_classify.learn.networks import build_network  # noqa: E402


class Answers(torch.nn.Module):
    """The network with its softmax, as models are exported."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        return tuple(logits.softmax(1) for logits in self.network(images).values())


def count(network):
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(("n", "parameters"), [
    (1, 77_874), (2, 170_418), (3, 262_962), (4, 355_506), (5, 448_050)])
def test_the_derived_counts(n, parameters):
    assert count(build_network("spi_quality", n=n, m=n)) == parameters


def test_the_other_readings():
    assert count(build_network("spi_quality", shortcut="projection")) == 173_170
    assert count(build_network("spi_quality", stem=7)) == 171_058
    assert count(build_network("spi_quality", width=4, size=64)) < 15_000


def test_the_published_sizes():
    """64 x 64 x 16, 32 x 32 x 32, 16 x 16 x 64, then 4096 features."""
    network = build_network("spi_quality").eval()
    found = network.activations(torch.rand(2, 1, 128, 128))
    assert {name: tuple(values.shape[1:]) for name, values in found.items()} == {
        "input": (1, 128, 128), "stem": (16, 64, 64), "stage1": (32, 32, 32),
        "stage2": (64, 16, 16)}
    assert network.fc.in_features == 4096
    assert network(torch.rand(2, 1, 128, 128))["quality"].shape == (2, 2)


def test_every_pixel_is_standardised_over_the_training_set():
    rng = np.random.default_rng(1)
    images = rng.normal(1e4, 1.0, (60, 32, 32)) * np.linspace(1, 5, 32)
    images[:, 3, 4] = 7.0                               # never varies: a masked pixel
    network = build_network("spi_quality", size=32)
    assert network.learn_input(images[i:i + 16] for i in range(0, 60, 16)) == 60
    seen = network.standardisation(torch.from_numpy(images.astype(np.float32))[:, None])[:, 0]
    free = np.ones((32, 32), bool)
    free[3, 4] = False
    np.testing.assert_allclose(seen.mean(0)[free], 0, atol=0.02)
    np.testing.assert_allclose(seen.std(0, correction=0)[free], 1, atol=0.02)
    assert (seen[:, 3, 4] == 0).all()
    again = build_network("spi_quality", size=32)
    again.load_state_dict(network.state_dict())         # mean and deviation go with the weights
    torch.testing.assert_close(again.standardisation.mean_HW, network.standardisation.mean_HW)


def test_standardisation_per_image_forgets_brightness_and_offset():
    network = build_network("spi_quality", size=32, norm="image").eval()
    image = torch.rand(1, 1, 32, 32)
    with torch.no_grad():
        one, other = network(image)["quality"], network(7 * image + 3)["quality"]
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    assert "standardisation.mean_HW" not in network.state_dict()


def test_wrong_options_and_images_are_named():
    for options, said in (({"n": 0}, "at least 1"), ({"shortcut": "none"}, "zero, projection"),
                          ({"norm": "row"}, "pixel, image"), ({"size": 100}, "multiple of 16")):
        with pytest.raises(ConfigurationError, match=said):
            build_network("spi_quality", **options)
    network = build_network("spi_quality", size=32)
    with pytest.raises(ConfigurationError, match="set size"):
        network.learn_input([np.zeros((2, 16, 16))])
    with pytest.raises(ConfigurationError, match="there were none"):
        network.learn_input([])


def test_exported_as_trained(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from xfel_classify.learn.export import export_answers

    torch.manual_seed(0)
    network = build_network("spi_quality", size=32)
    rng = np.random.default_rng(0)
    images = rng.poisson(3.0, (20, 32, 32)).astype(np.float32)
    network.learn_input([images])
    path = tmp_path / "model.onnx"
    export_answers(Answers(network), ["quality"], (32, 32), path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found, = session.run(None, {"images": images[:5, None]})
    with torch.no_grad():
        expected = network.eval()(torch.from_numpy(images[:5, None]))["quality"].softmax(1)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


# --- VGG-16 ---------------------------------------------------------------------------------------

STAGES = (2, 2, 3, 3, 3)


def vgg_weights(width=64, hidden=4096, device="cpu"):
    from xfel_classify.learn.vgg_features import CONVOLUTIONS, LINEAR

    generator = torch.Generator().manual_seed(5)

    def tensor(*shape):
        if device == "meta":
            return torch.empty(*shape, device="meta")
        scale = (2 / np.prod(shape[1:])) ** 0.5 if len(shape) > 1 else 0.01
        return torch.randn(*shape, generator=generator) * scale

    widths = [min(2 ** stage, 8) * width for stage, n in enumerate(STAGES) for _ in range(n)]
    found, channels = {}, 3
    for number, own in zip(CONVOLUTIONS, widths, strict=True):
        found[f"features.{number}.weight"] = tensor(own, channels, 3, 3)
        found[f"features.{number}.bias"] = tensor(own)
        channels = own
    channels *= 49
    for number in LINEAR:
        found[f"classifier.{number}.weight"] = tensor(hidden, channels)
        found[f"classifier.{number}.bias"] = tensor(hidden)
        channels = hidden
    return found


@pytest.mark.parametrize("features", ["fc6_fc7", "pool5"])
def test_both_readings_have_8192_features(features):
    from xfel_classify.learn.vgg_features import VGGFeatures

    weights = vgg_weights(device="meta")
    assert VGGFeatures(weights, features).count == 8192
    assert sum(w.numel() for w in weights.values()) == 138_357_544 - 4_097_000    # without fc8


@pytest.mark.parametrize("features", ["fc6_fc7", "pool5"])
def test_features_tell_rings_from_noise(features, tmp_path):
    """A file of weights in, a regression that judges images it has not seen out."""
    from safetensors.torch import save_file

    from xfel_classify.learn.vgg_features import FeatureModel, VGGFeatures, fit_features

    pytest.importorskip("sklearn")
    path = tmp_path / "vgg16.safetensors"
    save_file(vgg_weights(2, 32), path)
    rng = np.random.default_rng(3)
    y, x = np.mgrid[-20:20, -20:20] + 0.5
    good = np.arange(48) % 2 == 0
    rings = 40 * np.cos(np.hypot(y, x)[None] * rng.uniform(0.3, 0.4, (48, 1, 1))) ** 2
    stripes = 40 * np.cos(x[None] * rng.uniform(0.3, 0.4, (48, 1, 1))) ** 2
    images = rng.poisson(np.where(good[:, None, None], rings, stripes)).astype(np.float32)
    extract = VGGFeatures(path, features)
    values = extract(images, batch=7)
    np.testing.assert_allclose(values[11], extract(images[11:12])[0], rtol=1e-3, atol=1e-4)
    model = fit_features(values[:24], good[:24], values[24:32], good[24:32])
    assert ((model.scores(values[32:]) >= 0.5) == good[32:]).mean() > 0.8
    model.save(tmp_path / "regression.npz")
    again = FeatureModel.load(tmp_path / "regression.npz")
    np.testing.assert_array_equal(again.scores(values), model.scores(values))
    assert again.strength in again.accuracy_S


def test_vgg_errors_say_what_is_missing(tmp_path):
    from xfel_classify.core import OutputDamaged
    from xfel_classify.learn.vgg_features import VGGFeatures, fit_features

    weights = vgg_weights(4, 8)
    with pytest.raises(ConfigurationError, match="fc6_fc7, pool5"):
        VGGFeatures(weights, "fc8")
    with pytest.raises(ConfigurationError, match="lack 1 of 30 tensors"):
        VGGFeatures({n: w for n, w in weights.items() if n != "classifier.3.bias"})
    with pytest.raises(ConfigurationError, match=r"\(n, 3, 3, 3\) was expected"):
        VGGFeatures(weights | {"features.0.weight": torch.zeros(4, 1, 3, 3)})
    (tmp_path / "w.safetensors").write_bytes(b"no weights")
    with pytest.raises(OutputDamaged, match="not a safetensors file"):
        VGGFeatures(tmp_path / "w.safetensors")
    with pytest.raises(ConfigurationError, match="which is no file"):
        VGGFeatures(tmp_path / "absent.safetensors")
    with pytest.raises(ConfigurationError, match="both kinds"):
        fit_features(np.ones((3, 2)), np.ones(3), np.ones((3, 2)), np.ones(3))
