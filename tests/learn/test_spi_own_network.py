"""Our single-particle network: what it looks at, what it ignores, and what training does to images.
"""
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from xfel_classify.core import ConfigurationError  # noqa: E402
from xfel_classify.learn.networks import build_network  # noqa: E402
from xfel_classify.learn.networks.spi import Pictures  # noqa: E402
from xfel_classify.learn.recipes import Augment  # noqa: E402
from xfel_classify.learn.spi import Shard as SpiShard  # noqa: E402
from xfel_classify.learn.spi import drawn_labels, geometry_rows, label_of  # noqa: E402
from xfel_classify.learn.spi_surroundings import surround  # noqa: E402
from xfel_classify.simulate.spi_conditions import draw_spi, spi_preset  # noqa: E402

GEOMETRY = [290.5, 0.075, 2.695, 8.0]


def rings(period=9.0, level=400.0):
    """(128, 128) photons that fall off outwards, with rings."""
    axis = np.arange(128) - 63.5
    radius = np.hypot(axis[:, None], axis[None])
    mean = level * (1 + 0.8 * np.cos(2 * np.pi * radius / period)) / (1 + radius) ** 2
    return mean.astype("f4")


def pictures(image):
    with torch.inference_mode():
        return [v.numpy()[0] for v in Pictures(128)(torch.from_numpy(image)[None, None])]


def test_rings_are_on_the_profile_and_nothing_varies_with_the_angle():
    (_, flat, angular, _, live), profile = pictures(rings())
    assert 5 * np.abs(angular[20:108, 20:108]).mean() < np.abs(flat[20:108, 20:108]).mean()
    assert live.min() == 1
    spectrum = np.abs(np.fft.rfft(profile[0, 0, :54]))
    assert spectrum[2:].argmax() + 2 == 54 / 9      # a ring every nine pixels


def test_a_brighter_image_gives_the_same_pictures():
    for one, other in zip(pictures(rings()), pictures(50 * rings()), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-3)


def test_a_dead_half_does_not_move_what_is_left():
    whole, half = rings(), rings()
    half[:64] = 0
    (_, flat, angular, _, live), profile = pictures(half)
    (_, flat0, angular0, _, _), profile0 = pictures(whole)
    assert live[:64].max() == 0 and live[64:].min() == 1
    assert (flat[:64] == 0).all() and (angular[:64] == 0).all()
    np.testing.assert_allclose(flat[64:], flat0[64:], atol=0.02)
    np.testing.assert_allclose(angular[64:], angular0[64:], atol=0.02)
    np.testing.assert_allclose(profile[0, 0, 8:60], profile0[0, 0, 8:60], atol=0.02)


def test_a_narrow_gap_is_not_dark():
    image = rings()
    image[70:72] = 0
    _, flat, angular, _, live = pictures(image)[0]
    assert (live[70:72] == 0).all() and live[:70].min() == 1 and live[72:].min() == 1
    assert (flat[70:72] == 0).all() and (angular[70:72] == 0).all()


def test_counts_of_zero_far_out_are_alive():
    image = np.random.default_rng(0).poisson(0.3, (128, 128)).astype("f4")
    live = pictures(image)[0][4]
    assert live.mean() > 0.95


def test_an_empty_image_gives_finite_answers():
    network = build_network("spi").eval()
    with torch.inference_mode():
        found = network(torch.zeros(2, 1, 128, 128), torch.tensor([GEOMETRY] * 2))
    assert all(torch.isfinite(values).all() for values in found.values())


def test_the_size_follows_the_geometry_and_nothing_else_does():
    network = build_network("spi").eval()
    image = torch.from_numpy(rings())[None, None]
    with torch.inference_mode():
        near = network(image, torch.tensor([GEOMETRY]))
        far = network(image, torch.tensor([[2 * GEOMETRY[0], *GEOMETRY[1:]]]))
        pooled = network(image, torch.tensor([[*GEOMETRY[:3], 4.0]]))
    assert far["size_nm"].item() == pytest.approx(2 * near["size_nm"].item(), rel=1e-5)
    assert pooled["size_nm"].item() == pytest.approx(2 * near["size_nm"].item(), rel=1e-5)
    for name in ("count", "particle", "quality"):
        torch.testing.assert_close(near[name], far[name])


def test_images_of_other_sides_are_refused():
    with pytest.raises(ConfigurationError, match="size = 50"):
        build_network("spi", size=50)


# --- what surrounds a particle --------------------------------------------------------------------

EVERYTHING = Augment(fields=1.0, contrast=0.3, background=1.0, dead_half=0.5, gap=0.5, strip=0.3,
                     stop=0.5)


def test_surroundings_are_the_same_for_the_same_random_numbers_and_keep_dead_pixels():
    images = np.stack([rings()] * 16)
    images[:, 30:34] = 0
    found = [surround(images.copy(), EVERYTHING, np.random.default_rng(3)) for _ in range(2)]
    np.testing.assert_array_equal(*found)
    assert (found[0][:, 30:34] == 0).all() and np.isfinite(found[0]).all()
    assert len({one.tobytes() for one in found[0]}) == 16


def test_without_surroundings_images_are_left_alone():
    images = np.stack([rings()] * 2)
    assert surround(images, Augment(), np.random.default_rng(0)) is images
    np.testing.assert_array_equal(images[0], rings())


def test_loss_of_contrast_keeps_the_rings_means():
    image = rings()
    image[:, :64] *= 1.5
    faded = surround(image[None].copy(), Augment(contrast=0.01), np.random.default_rng(1))[0]
    axis = np.arange(128) - 63.5
    ring = np.hypot(axis[:, None], axis[None]).astype(int).ravel()
    means = [np.bincount(ring, one.ravel()) / np.bincount(ring) for one in (image, faded)]
    np.testing.assert_allclose(*means, rtol=1e-4)
    far = np.hypot(axis[:, None], axis[None]) > 5
    assert abs(faded - faded[:, ::-1])[far].sum() < 0.99 * abs(image - image[:, ::-1])[far].sum()


def test_a_field_has_mean_one_and_the_asked_deviation():
    images = np.ones((200, 128, 128), "f4")
    found = surround(images, Augment(fields=1.0, field_sigma=0.4), np.random.default_rng(7))
    assert found.mean() == pytest.approx(1.0, abs=0.03)
    assert 0.1 < found.std((1, 2)).max() <= 0.6


# --- labels ---------------------------------------------------------------------------------------

def test_labels_that_an_image_does_not_have_are_missing():
    shard = SpiShard("quality_varied", 7, 0, 4, 20, "standins")
    labels = drawn_labels(shard)
    drawn = [draw_spi(7, run, event, "quality_varied") for run in range(4) for event in range(20)]
    np.testing.assert_array_equal(labels["quality"], [c.kind == "good" for c in drawn])
    labels["diameter_A"] = np.array([c.diameter_A for c in drawn], "f4")
    labels["count"] = np.array([c.count - 1 if c.kind in ("good", "bad") else -1 for c in drawn])
    size = label_of(labels, "single_nm")
    np.testing.assert_array_equal(np.isfinite(size), labels["quality"] > 0)
    assert label_of(labels, "count").max() == 3         # five are none of the classes
    labels["distance_m"] = np.array([c.distance_m for c in drawn])
    rows = geometry_rows(labels)
    assert rows[3] == pytest.approx([1e3 * drawn[3].distance_m, 0.075, drawn[3].wavelength_A, 4])


def test_the_varied_preset_is_not_the_experiments():
    varied, experiment = spi_preset("quality_varied"), spi_preset("quality_experiment")
    assert varied.particles == ("icosahedron",)
    for name in ("positive", "fluence", "contrast", "background", "background_radial", "gap_px",
                 "half_chance", "stop_px", "read_noise_photons", "fluctuation_sigma",
                 "photon_energy_eV", "distance_m", "diameter_A", "fluctuation_px"):
        assert getattr(varied, name) != getattr(experiment, name), name
