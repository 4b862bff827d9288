"""Form factors of bodies: face formula against masks, series against limits, and the meshes."""
import numpy as np
import pytest

from xfel_classify.core import ConfigurationError
from xfel_classify.simulate import spi_bodies
from xfel_classify.simulate.spi_bodies import (
    BODY_MESH,
    BODY_VOXEL,
    body_form_factor,
    body_names,
    body_vertices,
    body_volume,
    contains,
    form_factor_of_polyhedron,
    solid_volume,
)

GOLDEN = (1 + 5 ** 0.5) / 2
EDGE = {"icosahedron": 2 / np.hypot(1, GOLDEN) / 2, "dodecahedron": 1 / (3 ** 0.5 * GOLDEN),
        "truncated_icosahedron": 2 / np.sqrt(58 + 18 * 5 ** 0.5)}
KNOWN = {       # volumes of a body of diameter 1
    "icosahedron": 5 * (3 + 5 ** 0.5) / 12 * EDGE["icosahedron"] ** 3,
    "dodecahedron": (15 + 7 * 5 ** 0.5) / 4 * EDGE["dodecahedron"] ** 3,
    "truncated_icosahedron": (125 + 43 * 5 ** 0.5) / 4 * EDGE["truncated_icosahedron"] ** 3,
    "sphere": np.pi / 6,
    "torus": 2 * np.pi ** 2 * (1 / 3) * (1 / 6) ** 2,
    "capsule": np.pi * 0.25 ** 2 * (0.5 + 4 / 3 * 0.25),
}


@pytest.mark.parametrize("name", body_names())
def test_f_of_zero_is_the_volume(name):
    assert solid_volume(name) == pytest.approx(KNOWN[name], rel=1e-7)


@pytest.mark.parametrize("name", body_names())
def test_form_factor_is_the_transform_of_a_mask(name):
    """Against a sum over the cells of a fine mask, which knows nothing of faces."""
    n = 80
    axis = (np.arange(n) + 0.5) / n - 0.5
    points = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    inside = points[contains(name, points)]
    rng = np.random.default_rng(1)
    s = rng.normal(0, 1.5, (12, 3))
    masked = np.array([np.exp(2j * np.pi * inside @ one).sum() for one in s]) / n ** 3
    found = body_form_factor(name, s)
    assert np.abs(found - masked).max() < 0.004 * solid_volume(name)


@pytest.mark.parametrize("name", body_names())
def test_every_body_has_a_diameter_of_one_and_three_mirrors(name):
    rng = np.random.default_rng(2)
    s = rng.normal(0, 2, (5, 3))
    for mirror in ([-1, 1, 1], [1, -1, 1], [1, 1, -1]):
        np.testing.assert_allclose(body_form_factor(name, s * mirror), body_form_factor(name, s),
                                   atol=1e-9)
    points = rng.uniform(-0.6, 0.6, (200_000, 3))
    far = np.linalg.norm(points[contains(name, points)], axis=1).max()
    assert 0.47 < far <= 0.5 + 1e-9


@pytest.mark.parametrize("name", ["icosahedron", "dodecahedron", "truncated_icosahedron"])
def test_series_and_sums_of_polyhedra_meet(name):
    """No jump where the formula changes over: towards 0, along face normals, along edges."""
    faces = spi_bodies._faces(name)
    normal = np.cross(faces[0][1] - faces[0][0], faces[0][2] - faces[0][1])
    normal /= np.linalg.norm(normal)
    for direction in (np.array([0.3, 0.5, 0.8]), normal, body_vertices(name)[0]):
        sizes = np.geomspace(1e-6, 3, 400)
        values = body_form_factor(name, sizes[:, None] * direction)
        assert np.isfinite(values).all()
        assert np.abs(np.diff(values[sizes < 1e-2])).max() < 1e-5 * solid_volume(name)
    tilted = 1.7 * normal + np.geomspace(1e-6, 1e-2, 200)[:, None] * np.array([0.2, -0.7, 0.1])
    values = body_form_factor(name, tilted)
    assert np.abs(np.diff(values)).max() < 1e-3 * solid_volume(name)


def test_centred_polyhedra_are_real_and_equal_the_general_formula():
    s = np.random.default_rng(5).normal(0, 2, (200, 3))
    for name in ("icosahedron", "dodecahedron", "truncated_icosahedron"):
        general = form_factor_of_polyhedron(spi_bodies._faces(name), s)
        assert np.abs(general.imag).max() < 1e-10
        np.testing.assert_allclose(body_form_factor(name, s), general.real, atol=1e-10)


def test_number_of_faces_and_a_shifted_cube():
    counts = {"icosahedron": 20, "dodecahedron": 12, "truncated_icosahedron": 32}
    for name, count in counts.items():
        assert len(spi_bodies._faces(name)) == count
    corners = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)], float)
    loops = [[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]]
    faces = tuple(corners[loop] for loop in loops)
    s = np.random.default_rng(3).normal(0, 1, (6, 3))
    expected = np.prod(np.exp(1j * np.pi * s) * np.sinc(s), axis=1)
    np.testing.assert_allclose(form_factor_of_polyhedron(faces, s), expected, atol=1e-10)


def test_guinier_radius_of_a_sphere():
    """ln f falls as -(2 pi s)^2 Rg^2 / 6 with Rg^2 = 3/5 (1/2)^2."""
    s = np.array([[0.02, 0, 0]])
    slope = -np.log(body_form_factor("sphere", s)[0] / solid_volume("sphere"))
    assert 6 * slope / (2 * np.pi * 0.02) ** 2 == pytest.approx(0.6 * 0.25, rel=1e-3)


@pytest.mark.parametrize("name", ["capsule", "dodecahedron"])
def test_mesh_holds_the_form_factor(name):
    volume = body_volume(name)
    assert volume.shape == (BODY_MESH,) * 3 and volume.dtype == np.complex64
    index = np.random.default_rng(4).integers(1, BODY_MESH - 1, (40, 3))
    expected = body_form_factor(name, (index - BODY_MESH // 2) * BODY_VOXEL)
    np.testing.assert_allclose(volume[tuple(index.T)].real, expected,
                               atol=2e-5 * solid_volume(name))
    assert not volume[0].any() and not volume[:, :, -1].any()


def test_unknown_body():
    with pytest.raises(ConfigurationError, match="icosahedron"):
        body_form_factor("teapot", np.zeros((1, 3)))
