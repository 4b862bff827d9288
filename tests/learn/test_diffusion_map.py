"""The diffusion map: its mathematics on graphs one can solve by hand, its clusters on patterns."""
import numpy as np
import pytest
from mockdata.spi_patterns import patterns

pytest.importorskip("scipy")

from xfel_classify.core import ConfigurationError
from xfel_classify.learn import diffusion_map as dm


def blobs(sizes, seed=0, width=0.1, distance=1.0):
    rng = np.random.default_rng(seed)
    centres = np.eye(len(sizes), 4) * distance * 10
    points = np.concatenate([c + width * rng.standard_normal((n, 4))
                             for n, c in zip(sizes, centres, strict=True)])
    return points.astype(np.float32), np.repeat(np.arange(len(sizes)), sizes)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("block_bytes", [4 * 500 * 7, 2 ** 26])
def test_neighbours_are_those_of_brute_force(own, block_bytes, monkeypatch):
    monkeypatch.setattr(dm, "BLOCK_BYTES", block_bytes)
    rng = np.random.default_rng(1)
    points = rng.normal(100.0, 1.0, (500, 9)).astype(np.float32)
    others = points if own else rng.normal(100.0, 1.0, (41, 9)).astype(np.float32)
    distance, index = dm.nearest(points, 6, None if own else others)
    full = np.linalg.norm(others[:, None].astype(float) - points[None].astype(float), axis=2)
    if own:
        np.fill_diagonal(full, np.inf)
    expected = np.sort(full, axis=1)[:, :6]
    np.testing.assert_allclose(distance, expected, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(np.take_along_axis(full, index, 1), distance, rtol=1e-3, atol=1e-3)


def test_eigenpairs_are_those_of_the_random_walk(monkeypatch):
    """P = D^-1 W built densely by the formulas has these eigenvalues, and psi as eigenvectors."""
    rng = np.random.default_rng(2)
    points = rng.normal(size=(250, 3)).astype(np.float32)
    for alpha in (0.0, 1.0):
        found = dm.diffusion_map(points, neighbours=12, alpha=alpha, eigenpairs=6)
        d = np.linalg.norm(points[:, None].astype(float) - points[None].astype(float), axis=2)
        order = np.argsort(d, axis=1)[:, 1:13]
        sigma = d[np.arange(250), order[:, 6]]
        weights = np.zeros((250, 250))
        for i in range(250):
            weights[i, order[i]] = np.exp(-d[i, order[i]] ** 2 / (sigma[i] * sigma[order[i]]))
        weights = np.maximum(weights, weights.T) + np.eye(250)
        if alpha:
            density = weights.sum(1)
            weights = weights / np.outer(density, density)
        walk = weights / weights.sum(1, keepdims=True)
        expected = np.sort(np.linalg.eigvals(walk).real)[::-1][1:7]
        np.testing.assert_allclose(found.eigenvalues_L, expected, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(walk @ found.psi_NL, found.psi_NL * found.eigenvalues_L,
                                   atol=0.02)
        monkeypatch.setattr(dm, "DENSE_BELOW", 1000)
        dense = dm.diffusion_map(points, neighbours=12, alpha=alpha, eigenpairs=6)
        np.testing.assert_allclose(dense.eigenvalues_L, found.eigenvalues_L, atol=1e-5)
        monkeypatch.undo()


def test_separate_groups_are_found_and_counted():
    points, truth = blobs([150, 40, 90])
    found = dm.diffusion_map(points, neighbours=15)
    assert dm.eigengap(found.eigenvalues_L) == 3
    coordinates = found.coordinates(count=2)
    cluster = dm.nearest_centre(coordinates, dm.cluster_centres(coordinates, 3))
    assert all(len(set(cluster[truth == group])) == 1 for group in range(3))
    assert len(set(cluster)) == 3


def test_new_points_fall_where_their_like_are():
    points, truth = blobs([150, 90])
    found = dm.diffusion_map(points, neighbours=15, eigenpairs=5)
    fresh, group = blobs([20, 30], seed=9)
    coordinates = found.coordinates(count=1)
    centres = dm.cluster_centres(coordinates, 2)
    placed = dm.nearest_centre(found.coordinates(found.extend(fresh), count=1), centres)
    names = dm.names_of(dm.nearest_centre(coordinates, centres), truth, 2)
    assert (names[placed] == group).all()
    # a point of the map is placed at its own coordinates, but for its own weight
    again = found.extend(points)
    assert np.corrcoef(again[:, 0], found.psi_NL[:, 0])[0, 1] > 0.999
    with pytest.raises(ConfigurationError, match="prepare both in the same way"):
        found.extend(fresh[:, :3])


def test_a_few_labels_name_clusters():
    cluster = np.array([0, 0, 0, 1, 1, 2])
    labels = np.array([1, 1, 0, 0, -1, -1])
    assert dm.names_of(cluster, labels, 3).tolist() == [1, 0, -1]


@pytest.mark.parametrize("scale", dm.SCALES)
def test_vectors_forget_brightness(scale):
    images, _ = patterns(3, photons=1e5)
    good = np.ones(images.shape[1:], bool)
    good[:, 20:24] = False
    points = dm.vectors(images, good, scale)
    brighter = dm.vectors(images * (1 if scale == "log1p" else 7), good, scale)
    np.testing.assert_allclose(brighter, points, rtol=1e-3, atol=1e-5)
    hidden = images.copy()
    hidden[:, 20:24] += 0                     # rows are seen, columns 20 to 23 are not
    hidden[:, :, 20:24] = 1e6
    np.testing.assert_array_equal(dm.vectors(hidden, good, scale), points)
    if scale in ("linear", "log1p"):
        np.testing.assert_allclose(points.sum(1), 1, rtol=1e-4)
    if scale == "sqrt":
        np.testing.assert_allclose((points ** 2).sum(1), 1, rtol=1e-4)


def test_rings_do_not_change_when_the_particle_turns():
    images, _ = patterns(4, photons=1e8, share=1.0)
    good = np.ones(images.shape[1:], bool)
    turned = np.rot90(images, axes=(1, 2))
    upright, rings = (dm.vectors(images, good, scale) for scale in ("sqrt", "rings"))
    moved, same = (dm.vectors(turned, good, scale) for scale in ("sqrt", "rings"))
    np.testing.assert_allclose(same, rings, atol=1e-3 * np.abs(rings).max())
    assert np.abs(moved - upright).max() > 0.02 * upright.max()


def test_singles_and_doubles_separate_by_clusters_named_by_forty_labels():
    images, single = patterns(900, seed=3)
    points = dm.vectors(images, np.ones(images.shape[1:], bool), "rings")
    found = dm.diffusion_map(points, neighbours=20, alpha=1.0)
    coordinates = found.coordinates()
    cluster = dm.nearest_centre(coordinates, dm.cluster_centres(coordinates, 12, starts=3))
    labels = np.where(np.arange(900) < 60, single, -1)
    names = dm.names_of(cluster, labels, 12)
    assert (names[cluster] == single).mean() > 0.9


def test_ten_thousand_frames_never_need_a_square_matrix():
    """Blocks bound the memory: the peak is far below 10,000 x 10,000 distances (400 MB)."""
    import tracemalloc

    rng = np.random.default_rng(5)
    points = rng.normal(size=(10_000, 8)).astype(np.float32)
    tracemalloc.start()
    distance, _ = dm.nearest(points, 10)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 150e6
    assert distance.shape == (10_000, 10)


def test_errors_say_what_to_do():
    images = np.ones((5, 4, 4), np.float32)
    with pytest.raises(ConfigurationError, match="linear, log1p, sqrt, rings"):
        dm.vectors(images, np.ones((4, 4), bool), "log")
    with pytest.raises(ConfigurationError, match="check mask"):
        dm.vectors(images, np.zeros((4, 4), bool))
    with pytest.raises(ConfigurationError, match="at least three"):
        dm.diffusion_map(np.zeros((2, 3), np.float32))
    with pytest.raises(ConfigurationError, match="not finite"):
        dm.diffusion_map(np.full((9, 3), np.nan, np.float32))
    with pytest.raises(ConfigurationError, match="fewer neighbours"):
        dm.nearest(np.zeros((4, 2), np.float32), 9)
    with pytest.raises(ConfigurationError, match="7 clusters of 5"):
        dm.cluster_centres(np.zeros((5, 2)), 7)
