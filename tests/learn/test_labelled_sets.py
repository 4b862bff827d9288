"""Labelled quadrants in one file: complete, reproducible, and described by their names."""
import h5py
import numpy as np
import pytest

from xfel_classify import cli
from xfel_classify.core import ConfigurationError, OutputExists
from xfel_classify.learn.labelled_sets import write_labelled_set
from xfel_classify.simulate.stills_512 import draw_still


def test_a_set_by_command_has_images_labels_and_geometry(tmp_path, capsys):
    assert cli.main(["simulate", "stills", "--out", str(tmp_path), "--preset", "uniform_f1",
                     "--seed", "4", "--events", "10"]) == 0
    path = capsys.readouterr().out.strip()
    with h5py.File(path) as file:
        labels = dict(zip(file["labels"].attrs["names"], file["labels"][:].T, strict=True))
        geom = dict(zip(file["geom"].attrs["names"], file["geom"][:].T, strict=True))
        images = file["images"][:]
        assert images.shape == (10, 512, 512) and images.dtype == np.uint8
        assert file["quadrant"].asstr()[0] in "ABCD"
    c = draw_still(4, 1, 1, "uniform_f1")           # event 9
    assert labels["n_lattices"][9] == c.n_lattices
    assert labels["B_A2"][9] == pytest.approx(4 * c.d_A ** 2 + 12, rel=1e-6)
    assert geom["distance_mm"][9] == pytest.approx(1e3 * c.distance_m, rel=1e-6)
    assert ((labels["misset_deg"] > 0) == (labels["n_lattices"] > 1)).all()
    assert (images.max(axis=(1, 2)) > 3).all()
    again = write_labelled_set(tmp_path / "again.h5", "uniform_f1", 4, 3)
    with h5py.File(again) as file:
        np.testing.assert_array_equal(file["images"][:], images[:3])


def test_what_cannot_be_written_is_explained(tmp_path):
    path = write_labelled_set(tmp_path / "one.h5", "resolution_f1", 4, 1, side=128)
    with pytest.raises(OutputExists, match="already there"):
        write_labelled_set(path, "resolution_f1", 4, 1)
    with pytest.raises(ConfigurationError, match="divides 512"):
        write_labelled_set(tmp_path / "two.h5", "resolution_f1", 4, 1, side=100)
    assert cli.main(["simulate", "stills", "--out", str(tmp_path), "--preset", "demo"]) != 0
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob(".*.tmp"))
