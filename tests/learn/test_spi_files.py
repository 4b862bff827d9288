"""Models judged on labelled image files: both layouts, and what is not one."""
from pathlib import Path

import h5py
import numpy as np
import pytest

from xfel_classify import cli
from xfel_classify.core import ConfigurationError
from xfel_classify.learn.spi_files import read_labelled
from xfel_classify.simulate.spi_sets import write_spi_set

SKOPI = Path(__file__).resolve().parents[2] / "../shared/data/skopi/skopi_spi_dev.h5"


def skopi_like(path, names=("groel14_1oel", "1ijg", "cat")):
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        file["images"] = rng.random((3, 8, 8), np.float32)
        file["labels/count"] = np.array([1, 4, 2], np.int32)
        file["labels/particle"] = np.array([0, 1, 2], np.int32)
        file["labels/particle"].attrs["names"] = list(names)
        file["labels/orientation"] = np.zeros((3, 4, 4))
    return path


def test_skopi_counts_from_one_names_particles_and_has_x_first(tmp_path):
    path = skopi_like(tmp_path / "s.h5")
    images, labels, structures = read_labelled(path)
    with h5py.File(path) as file:
        first = file["images"][0]
    assert images[0, 0, 5] == first[5, 7]           # top row, x = 5: y is largest there
    assert labels["count"].tolist() == [0, 3, 1]
    assert labels["particle"].tolist() == [1, 3, -1]    # 1ss8 by its stand-in, 1ijg, none
    np.testing.assert_allclose(labels["total"], images.sum((1, 2)), rtol=1e-5)
    assert structures == "groel14_1oel, 1ijg, cat" and "orientation" not in labels


def test_a_simulated_set_is_read_as_it_was_written(tmp_path):
    path = write_spi_set(tmp_path / "set.h5", "paper:particles=1ijg,counts=1+1", 3, 2)
    images, labels, structures = read_labelled(path)
    with h5py.File(path) as file:
        np.testing.assert_array_equal(images, file["images"][:])
    assert sorted(labels["count"]) == [0, 1] and set(labels["particle"]) == {3}
    assert "1ijg: connector" in structures


@pytest.mark.parametrize("write", [
    lambda path: path.write_text("no HDF5"),
    lambda path: h5py.File(path, "w").close(),
    lambda path: h5py.File(path, "w").create_dataset("images", data=np.zeros((3, 8, 8))
                                                     ).file.close(),
])
def test_other_files_are_refused_by_name(tmp_path, write):
    write(tmp_path / "other.h5")
    with pytest.raises(ConfigurationError, match=r"other\.h5.*simulate spi"):
        read_labelled(tmp_path / "other.h5")
    with pytest.raises(ConfigurationError, match="absent"):
        read_labelled(tmp_path / "absent.h5")


def test_the_second_simulators_file_is_understood():
    if not SKOPI.exists():
        pytest.skip("the images of skopi are not beside this checkout")
    images, labels, _ = read_labelled(SKOPI)
    assert images.shape == (120, 128, 128)
    assert np.bincount(labels["count"].astype(int)).tolist() == [30] * 4
    assert set(labels["particle"]) == {1.0, 7.0}        # 1ss8 and 6xs6


@pytest.mark.torch
def test_a_model_is_judged_on_a_file_by_command(tmp_path, capsys):
    pytest.importorskip("torch")
    path = write_spi_set(tmp_path / "set.h5", "jitter:particles=1ijg,counts=3+1", 3, 8)
    assert cli.main(["evaluate", "spi-multi-robust", "--labelled", str(path)]) == 0
    said = capsys.readouterr().out
    assert "stand-ins: 1ijg: connector" in said and "| set.h5 | 8 |" in said
    small = skopi_like(tmp_path / "small.h5")
    assert cli.main(["evaluate", "spi-multi-robust", "--labelled", str(small)]) != 0
    assert "8 x 8 pixels" in capsys.readouterr().err
