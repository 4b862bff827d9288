"""YOLOv2 and YOLOv3 to the parameter, what they are shown, and that they learn."""
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from xfel_classify.core import ConfigurationError  # noqa: E402
from xfel_classify.learn.networks import _yolo_boxes, build_network  # noqa: E402
from xfel_classify.learn.networks._darknet import Darknet19, Darknet53  # noqa: E402
from xfel_classify.learn.spi_representations import (  # noqa: E402
    REPRESENTATIONS,
    Representation,
    jet,
    represent,
)


class Answers(torch.nn.Module):
    """The network with its softmax, as models are exported."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        return tuple(logits.softmax(1) for logits in self.network(images).values())


def count(network):
    return sum(parameter.numel() for parameter in network.parameters())


def convolutions(network):
    return sum(isinstance(module, torch.nn.Conv2d) for module in network.modules())


@pytest.mark.parametrize(("make", "parameters", "layers"), [
    (Darknet19, 19_817_376, 18), (Darknet53, 40_584_928, 52),
    (lambda: build_network("yolo", head="slides"), 29_287_358, 20),
    (lambda: build_network("yolo", head="full"), 50_558_014, 23),
    (lambda: build_network("yolo_v3"), 61_523_734, 75)])
def test_the_published_counts(make, parameters, layers):
    with torch.device("meta"):          # no memory for weights that nobody looks at
        network = make()
    assert count(network) == parameters
    assert convolutions(network) == layers


@pytest.mark.parametrize(("architecture", "size", "grids"), [
    ("yolo", 416, [(5, 13)]), ("yolo_v3", 608, [(3, 19), (3, 38), (3, 76)])])
def test_grids_and_anchors(architecture, size, grids):
    network = build_network(architecture, width=0.02, size=size).eval()
    with torch.no_grad():
        maps = network.detections(torch.rand(1, 1, 123, 240))
    assert [tuple(one.shape) for one in maps] == [(1, a, 6, g, g) for a, g in grids]


def small(architecture, **options):
    torch.manual_seed(0)
    return build_network(architecture, width=0.05, size=64, **options)


def patterns(events, seed=0):
    """Rings (positive) and stripes in photons, (B, 1, 31, 60)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:31, -30:30] + 0.5
    positive = np.arange(events) % 2 == 0
    step = rng.uniform(0.5, 0.8, (events, 1, 1))
    rings, stripes = (10 * np.cos(r[None] * step) ** 2 for r in (np.hypot(y, x), x + 0.5 * y))
    images = rng.poisson(np.where(positive[:, None, None], rings, stripes))
    return (torch.from_numpy(images.astype(np.float32))[:, None],
            torch.from_numpy(positive.astype(np.float32)))


def test_the_score_is_that_of_the_best_box():
    network = small("yolo_v3").eval()
    images, _ = patterns(3)
    with torch.no_grad():
        maps = network.detections(images)
        found = network(images)["single"].softmax(1)
    best = [max(float((one[b, :, 4].sigmoid() * one[b, :, 5].sigmoid()).max()) for one in maps)
            for b in range(3)]
    np.testing.assert_allclose(found[:, 1], best, rtol=1e-4)
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-6)


def test_boxes_decode_to_where_they_were_put():
    anchors = torch.tensor([[0.2, 0.4], [0.5, 0.5]])
    one = torch.zeros(1, 2, 6, 4, 4)
    one[0, 1, 2, 3, 2] = np.log(2.0)
    found = _yolo_boxes.boxes(one, anchors)
    np.testing.assert_allclose(found[0, 1, :, 3, 2], [2.5 / 4, 3.5 / 4, 1.0, 0.5], rtol=1e-6)
    np.testing.assert_allclose(found[0, 0, :, 0, 0], [0.125, 0.125, 0.2, 0.4], rtol=1e-6)
    share = _yolo_boxes.overlap(found, (0.125, 0.125, 0.1, 0.4))
    assert float(share[0, 0, 0, 0]) == pytest.approx(0.5)
    assert float(share[0, 0, 3, 3]) == 0.0


@pytest.mark.parametrize("kind", ["v2", "v3"])
def test_the_loss_is_least_for_the_right_answer(kind):
    """Sure and right costs nothing; empty images do not care where their boxes are."""
    anchors = torch.tensor([[0.2, 0.2], [0.8, 0.9]])
    box = (0.5, 0.5, 0.8, 0.9)
    right = torch.zeros(2, 2, 6, 3, 3)
    right[:, :, 4] = -20.0
    right[0, 1, 4, 1, 1] = right[0, 1, 5, 1, 1] = 20.0      # the middle cell, the fitting anchor
    positive = torch.tensor([1.0, 0.0])

    def loss(maps, labels=positive):
        return float(_yolo_boxes.detection_loss([maps], [anchors], labels, box, kind))

    assert loss(right) < 1e-5
    moved = right.clone()
    moved[1, :, :4] = 3.0
    assert loss(moved) == pytest.approx(loss(right), abs=1e-6)
    shifted = right.clone()
    shifted[0, 1, 0, 1, 1] = 3.0
    missed, seen = right.clone(), right.clone()
    missed[0, 1, 4, 1, 1] = -20.0
    seen[1, 0, 4, 2, 2] = 20.0
    for wrong in (shifted, missed, seen):
        assert loss(wrong) > loss(right) + 0.05
    # a box that covers the object well is not called empty, though it is not its owner
    beside = right.clone()
    beside[0, 1, 4, 1, 0], beside[0, 1, 0, 1, 0] = 20.0, 8.0
    assert loss(beside) < 1e-4


@pytest.mark.parametrize(("architecture", "options"), [
    ("yolo", {"head": "slides"}), ("yolo", {"head": "full"}), ("yolo_v3", {})])
def test_narrow_variants_learn_rings(architecture, options):
    network = small(architecture, representation="gray_linear", **options).train()
    optimiser = torch.optim.Adam(network.parameters(), lr=2e-3)
    for step in range(30):
        optimiser.zero_grad()
        loss = network.loss(*patterns(16, seed=10 + step))
        loss.backward()
        optimiser.step()
    fresh, truth = patterns(20, seed=1)
    with torch.no_grad():
        # batch statistics, as while training, when the network answers with maps
        logits = _yolo_boxes.image_logits(network.detections(fresh))
    score = logits.softmax(1)[:, 1].numpy()
    assert score[truth.numpy() == 1].mean() > score[truth.numpy() == 0].mean() + 0.3


@pytest.mark.parametrize("architecture", ["yolo", "yolo_v3"])
def test_photons_go_into_the_exported_model(architecture, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from xfel_classify.learn.export import export_answers

    network = small(architecture).eval()
    path = tmp_path / "model.onnx"
    export_answers(Answers(network), ["single"], (31, 60), path)
    images, _ = patterns(3)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found, = session.run(None, {"images": images.numpy()})
    with torch.no_grad():
        expected = network(images)["single"].softmax(1)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


def test_wrong_options_are_named():
    for options, said in (({"head": "small"}, "slides, full"), ({"width": 2.0}, "up to 1"),
                          ({"size": 100}, "multiple of 32"), ({"box": [0.5, 0.5]}, "centre x"),
                          ({"representation": "hot"}, "colour_linear")):
        with pytest.raises(ConfigurationError, match=said):
            build_network("yolo", **options)


# --- representations -----------------------------------------------------------------------------

@pytest.mark.parametrize("kind", REPRESENTATIONS)
def test_rendered_inside_the_network_as_outside(kind):
    rng = np.random.default_rng(2)
    images = rng.poisson(rng.exponential(20.0, (3, 31, 60))).astype(np.float32)
    images[2] = 0
    found = Representation(kind, 64)(torch.from_numpy(images)[:, None]).numpy()
    for image, own in zip(images, found, strict=True):
        np.testing.assert_allclose(own, represent(image, kind, 64), atol=2e-4)
    assert found.shape == (3, 3, 64, 64)
    assert found.min() >= -1e-6 and found.max() <= 1 + 1e-6
    if kind.startswith("gray"):
        assert (found[:, :1] == found).all()


def test_jet_is_that_of_matplotlib():
    colormaps = pytest.importorskip("matplotlib").colormaps
    values = np.linspace(0, 1, 256)
    np.testing.assert_allclose(jet(values).T, colormaps["jet"](values)[:, :3], atol=0.01)


def test_one_bright_pixel_does_not_hide_the_pattern():
    rng = np.random.default_rng(4)
    image = rng.poisson(20.0, (123, 240)).astype(float)
    hot = image.copy()
    hot[5, 5] = 1e6
    with_hot, without = (represent(one, "gray_linear", 416) for one in (hot, image))
    assert (np.abs(with_hot - without) > 0.1).mean() < 1e-3
    assert np.median(with_hot) > 0.4


def test_float_ignores_brightness():
    rng = np.random.default_rng(5)
    image = rng.exponential(200.0, (40, 40))
    np.testing.assert_allclose(represent(image, "float", 32), represent(9 * image, "float", 32),
                               atol=1e-5)
    with pytest.raises(ConfigurationError, match="gray_log"):
        represent(image, "grey_log", 32)
