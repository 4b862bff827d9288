"""Networks with a fixed first part: what they describe, and training on kept descriptions."""
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")
pytestmark = pytest.mark.torch

from xfel_classify.core import ConfigurationError  # noqa: E402
from xfel_classify.learn import descriptions  # noqa: E402
from xfel_classify.learn.networks import build_network  # noqa: E402
from xfel_classify.learn.training import train  # noqa: E402

SMALL = {"lattice": {"size": 128, "spots": 32, "reach": 40.0}, "falloff": {"size": 128,
                                                                         "spots": 32}}
GEOMETRY = [100.0, 0.3, 1.0, 1.0]
RECIPE = """
name = "toy"
version = "0.1"
architecture = "{architecture}"
seed = 3
[network]
size = 128
spots = 32
{more}
[task]
{task}
[window]
kind = "quadrant"
height = 128
width = 128
normalize = "sqrt_floor"
clip = 65025.0
[data]
generator = "described_stills"
[[data.training]]
preset = "uniform_f1"
seed = 1
runs = 4
events = 4
[[data.validation]]
preset = "uniform_f1"
seed = 2
runs = 2
events = 4
[optimiser]
kind = "adam"
learning_rate = 0.003
batch = 8
epochs = 2
"""
TASKS = {
    "lattice": 'name = "lattice"\noutput = "lattice"\nclasses = ["single", "multiple"]\n'
               'positive = "multiple"',
    "falloff": 'name = "resolution"\noutput = "resolution"\nkind = "regression"\nvalue = "d_A"\n'
               'unit = "A"\ntransform = "reciprocal"'}


def spotted(*nets, size=128):
    """A quadrant with Gaussian spots at the points of plane nets (origin, step, step)."""
    row, column = np.mgrid[:size, :size] + 0.5
    photons = np.full((size, size), 0.3)
    for origin, one, two in nets:
        for i in range(-9, 10):
            for j in range(-9, 10):
                y, x = np.add(origin, np.multiply(i, one) + np.multiply(j, two))
                if 8 < x < size - 4 and 8 < y < size - 4:
                    photons += 300 * np.exp(-((row - y) ** 2 + (column - x) ** 2) / 1.6)
    counts = np.random.default_rng(0).poisson(photons)
    return torch.from_numpy(np.floor(np.sqrt(counts)).astype(np.float32))[None, None]


ONE = ((20, 24), (17, 3), (-3, 19))
OTHER = ((29, 13), (13, -11), (12, 14))


@pytest.mark.parametrize("name", SMALL)
def test_descriptions_stand_for_images(name):
    torch.manual_seed(1)
    network = build_network(name, **SMALL[name]).eval()
    images = torch.cat([spotted(ONE), spotted(ONE, OTHER)])
    geometry = torch.tensor([GEOMETRY] * 2)
    with torch.no_grad():
        described = network.describe(images, geometry)
        whole, short = network(images, geometry), network(described)
        alone = network.describe(images[:1], geometry[:1])
    assert described.shape[0] == 2 and torch.isfinite(described).all()
    for key in network.outputs:
        torch.testing.assert_close(whole[key], short[key])
    torch.testing.assert_close(alone, described[:1], rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigurationError, match="got none"):
        network(images)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("value", [0.0, 255.0])
def test_an_empty_and_a_saturated_image_have_a_finite_answer(name, value):
    network = build_network(name, **SMALL[name]).eval()
    with torch.no_grad():
        described = network.describe(torch.full((1, 1, 128, 128), value),
                                     torch.tensor([GEOMETRY]))
    assert torch.isfinite(described).all()


def test_spots_are_found_where_they_are():
    from xfel_classify.learn.networks._spots import SpotFinder
    finder = SpotFinder(128, 16)
    images = torch.ones(1, 1, 128, 128)
    for row, column in ((40, 60), (90, 17)):
        images[0, 0, row - 1:row + 2, column - 1:column + 2] = 5.0
        images[0, 0, row, column] = 9.0
    images[:, :, :, 100:] = 0.0                 # a gap: its edge is no spot
    found = finder(images)
    bright = found.bright_BK[0] > 5
    assert bright.sum() == 2
    places = set(zip(found.row_BK[0, bright].tolist(), found.column_BK[0, bright].tolist(),
                     strict=True))
    assert places == {(40.0, 60.0), (90.0, 17.0)}


def test_one_net_reaches_the_sum_of_its_spots_and_two_do_not():
    """The largest norm in the shells of the direct lattice: near 1 for one net."""
    network = build_network("lattice", size=128, spots=64, reach=126.0).eval()
    geometry = torch.tensor([[300.0, 0.35, 1.0, 1.0]])
    with torch.no_grad():
        one, two = (network.describe(image, geometry)[0]
                    for image in (spotted(ONE), spotted(ONE, OTHER)))
    # of |S| <= 1, p = 32, logarithms: 24 numbers before the norms of the longest p end
    start = 11 + 7 + 7 + 21 + 15 + 11 + 13 + 4 * 6
    best_one, best_two = one[start:start + 6].max(), two[start:start + 6].max()
    assert best_one > best_two + 0.1


@pytest.mark.parametrize("name", TASKS)
def test_training_describes_each_image_once(name, tmp_path, monkeypatch):
    monkeypatch.setenv("XFEL_CLASSIFY_CACHE", str(tmp_path / "cache"))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.format(architecture=name, task=TASKS[name],
                                    more="reach = 40.0" if name == "lattice" else ""))
    written = []
    original = descriptions._write
    monkeypatch.setattr(descriptions, "_write", lambda *job: written.append(job) or original(*job))
    first = train(recipe, tmp_path / "one", device="cpu")
    assert len(written) == 2 and len(first.examined["answers"]) == 8
    second = train(recipe, tmp_path / "two", device="cpu")
    assert len(written) == 2
    np.testing.assert_array_equal(first.examined["answers"], second.examined["answers"])
    kept = next((tmp_path / "cache").glob("*.npz"))
    kept.write_bytes(kept.read_bytes()[:100])       # damaged: made again
    third = train(recipe, tmp_path / "three", device="cpu")
    assert len(written) == 3
    np.testing.assert_array_equal(first.examined["answers"], third.examined["answers"])
