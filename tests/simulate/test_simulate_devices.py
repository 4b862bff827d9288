"""``simulate --device``: what a user asks for and what comes out."""
import h5py
import numpy as np
import pytest

from xfel_classify import cli
from xfel_classify.core import ConfigurationError
from xfel_classify.simulate.spi_conditions import draw_spi
from xfel_classify.simulate.spi_images import spi_image, spi_labels
from xfel_classify.simulate.spi_runs import spi_run
from xfel_classify.simulate.spi_sets import write_spi_set

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

SPI = "paper:particles=2cex+1igy"
NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


def simulate(*arguments):
    return cli.main(["simulate", *map(str, arguments)])


def test_particles_by_torch_are_those_of_the_compiled_code():
    for event in range(3):
        c = draw_spi(5, 0, event, SPI)
        one, other = spi_image(c), spi_image(c, device="cpu-torch")
        np.testing.assert_allclose(other.expected_HW, one.expected_HW,
                                   atol=1e-4 * one.expected_HW.max())
        np.testing.assert_array_equal(other.good_HW, one.good_HW)
        labels, found = spi_labels(c), spi_labels(c, device="cpu-torch")
        assert found.pop("photons") == pytest.approx(labels.pop("photons"), rel=1e-4)
        assert found == labels


def test_a_particle_set_by_torch(tmp_path):
    asked = ("spi", "--preset", SPI, "--events", 4, "--seed", 5, "--out")
    assert simulate(*asked, tmp_path / "a") == 0
    assert simulate(*asked, tmp_path / "b", "--device", "cpu-torch") == 0
    paths = [next((tmp_path / name).glob("*.h5")) for name in "ab"]
    with h5py.File(paths[0]) as one, h5py.File(paths[1]) as other:
        assert other.attrs["device"] == "cpu-torch"
        np.testing.assert_allclose(other["labels"][:], one["labels"][:], rtol=1e-4)
        a, b = one["images"][:], other["images"][:]
        # the same random numbers: nearly all counts are the same
        assert np.mean(a == b) > 0.99
    with pytest.raises(ConfigurationError, match="processes"):
        write_spi_set(tmp_path / "c.h5", SPI, 5, 4, processes=2, device="cpu-torch")


def test_a_particle_run_by_torch():
    kinds = [spi_run(5, 91, SPI, hit_fraction=1.0, device=device) for device in ("", "cpu-torch")]
    one, other = (next(run.events(range(1))).raw_PSF.astype(int) for run in kinds)
    assert np.mean(one == other) > 0.99


def test_stills_by_torch_from_the_command_line(tmp_path):
    assert simulate("stills", "--preset", "uniform_f1", "--events", 2, "--device", "cpu-torch",
                    "--out", tmp_path) == 0
    path, = tmp_path.glob("*.h5")
    with h5py.File(path) as file:
        assert file["images"].shape == (2, 512, 512) and file.attrs["device"] == "cpu-torch"


@NO_CUDA
@pytest.mark.parametrize("kind", ["stills", "spi", "sfx"])
def test_without_a_cuda_device_the_error_says_what_to_do(kind, tmp_path, capsys):
    assert simulate(kind, "--events", 1, "--device", "cuda", "--out", tmp_path) != 0
    said = capsys.readouterr().err
    assert "'cuda' was asked for" in said and "CUDA" in said and "leave the device out" in said
    assert not list(tmp_path.rglob("*.h5"))


def test_runs_of_stills_have_no_device(tmp_path, capsys):
    assert simulate("stills", "--format", "hdf5", "--events", 1, "--device", "cpu-torch",
                    "--out", tmp_path) != 0
    assert "leave --device out" in capsys.readouterr().err
