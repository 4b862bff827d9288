"""The network for fluence that varies: blind to brightness, options, gradients."""
import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from xfel_classify.core import ConfigurationError  # noqa: E402
from xfel_classify.learn.networks import build_network  # noqa: E402
from xfel_classify.learn.networks.spi_fringes import VIEWS, WRAP, Polar, Views  # noqa: E402

SMALL = {"width": 4, "views": list(VIEWS), "polar_width": 4, "polar": [64, 64]}
TRUNKS = [{}, {"views": []}, {"polar_views": []}]


@pytest.mark.parametrize("trunks", TRUNKS)
def test_answers_do_not_change_with_brightness(trunks):
    torch.manual_seed(0)
    network = build_network("spi_fringes", **{**SMALL, **trunks}).eval()
    images = torch.rand(2, 1, 128, 128) * torch.tensor([0.05, 20.0])[:, None, None, None]
    with torch.inference_mode():
        one, two = network(images), network(7.0 * images)
    for name in ("count", "particle"):
        torch.testing.assert_close(one[name], two[name], atol=1e-3, rtol=1e-3)
    assert one["count"].shape == (2, 4) and one["particle"].shape == (2, 11)


@pytest.mark.parametrize("trunks", TRUNKS)
def test_empty_images_have_an_answer_and_every_weight_a_gradient(trunks):
    network = build_network("spi_fringes", heads={"count": 4, "size": 1}, **{**SMALL, **trunks})
    found = network(torch.cat([torch.zeros(1, 1, 128, 128), torch.rand(2, 1, 128, 128)]))
    assert all(torch.isfinite(values).all() for values in found.values())
    sum(values.square().sum() for values in found.values()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all()
               for p in network.parameters())


def test_fringes_make_a_peak_at_the_distance_between_copies():
    column = torch.arange(128) - 63.5
    fringes = 1 + torch.cos(2 * torch.pi * 20 / 128 * column).expand(128, 128)
    view = Views(["root_distances"], 128)(fringes[None, None])[0, 0]
    middle = view[60:68].mean(0)
    middle[52:76] = -9                              # the particle with itself
    assert abs(abs(float(middle.argmax()) - 63.5) - 20) <= 1.5


def test_a_turned_image_is_a_moved_polar_view():
    torch.manual_seed(1)
    polar = Polar(128, 64, 64)
    image = torch.nn.functional.avg_pool2d(torch.rand(1, 1, 132, 132), 5, 1)
    moved = polar(torch.rot90(image, 1, (2, 3)))[0, 0]
    still = polar(image)[0, 0]
    assert still.shape == (64, 64 + 2 * WRAP)
    torch.testing.assert_close(moved[:, :64], still[:, 16:80], atol=1e-4, rtol=0)
    torch.testing.assert_close(still[:, :2 * WRAP], still[:, 64:], atol=1e-5, rtol=0)


def test_training_samples_as_the_exported_network_gathers():
    torch.manual_seed(2)
    polar, views = Polar(128, 48, 96), torch.rand(2, 3, 128, 128)
    torch.testing.assert_close(polar.sampled(views), polar.gathered(views), atol=2e-4, rtol=0)
    assert torch.equal(polar.train()(views), polar.sampled(views))
    assert torch.equal(polar.eval()(views), polar.gathered(views))


@pytest.mark.parametrize("options", [{"views": [], "polar_views": []}, {"views": ["sound"]},
                                     {"polar_views": ["sound"]}, {"polar": [64]},
                                     {"polar": [8, 64]}])
def test_other_options_are_refused(options):
    with pytest.raises(ConfigurationError, match="spi_fringes"):
        build_network("spi_fringes", **{**SMALL, **options})


@pytest.mark.parametrize("views", [[name] for name in VIEWS])
def test_an_empty_image_shows_nothing_whatever_the_rounding(views):
    """The rounding of a mean, where nothing is, must not become a picture."""
    shown = Views(views, 128)(torch.zeros(1, 1, 128, 128))
    assert float(shown.abs().max()) < 1e-4
