"""``select`` as a user meets it."""
import re

import h5py
import numpy as np
import pytest
from mockdata.spi_patterns import patterns, write_run

pytest.importorskip("scipy")

from xfel_classify import cli

QUICK = ("--classes-per-run", 6, "--rotations", 30, "--iterations", 12, "--inner", 3)


def select(*arguments):
    return cli.main(["select", *map(str, arguments), "--detector", "assembled", "--set",
                     "source.unit=photon", "--set", "source.pixel_size_m=4e-4"])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """160 patterns, a third of them of single particles with six-fold lobes."""
    place = tmp_path_factory.mktemp("run")
    images, single = patterns(160, seed=11, share=0.35, photons=3e4, side=40)
    return write_run(place / "amox27716_r0094.h5", images, single), single


@pytest.fixture(scope="module")
def by_symmetry(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("selected") / "out"
    assert select(run[0], *QUICK, "--runs", 3, "--orders", "6", "-o", out) == 0
    return out


def test_the_symmetric_ones_are_selected(run, by_symmetry):
    _, single = run
    name, = by_symmetry.glob("*_selection.h5")
    with h5py.File(name) as file:
        selected, votes = file["selected"][()] == 1, file["votes"][()]
        assert (selected & single).sum() / selected.sum() > 0.9
        assert (selected & single).sum() / single.sum() > 0.6
        assert (selected == (votes >= 2)).all()
        assert file["em/averages"].shape[:2] == (3, 6) and file["class"].shape == (160, 3)
        assert file.attrs["choice_how"] == "symmetry" and file.attrs["em_rotations"] == 30
        stamps = file["timestamp"][()]
    stem = name.name.removesuffix("_selection.h5")
    assert (np.load(by_symmetry / f"{stem}_selected.npy") == stamps[selected]).all()
    lines = (by_symmetry / f"{stem}_selected.txt").read_text().split()
    assert [int(i) for i in lines[1::2]] == np.flatnonzero(selected).tolist()
    page = (by_symmetry / f"{stem}_selection.html").read_text()
    assert "class 2.5" in page and "CHOSEN" in page


def test_classes_are_chosen_again_by_hand_and_by_labels(run, by_symmetry, tmp_path, capsys,
                                                        monkeypatch):
    path, single = run
    monkeypatch.chdir(tmp_path)
    name, = by_symmetry.glob("*_selection.h5")
    assert select(path, "--reuse", name, "--classes", "0.1,0.4", "-o", "hand") == 0
    with h5py.File(name) as before, h5py.File(next((tmp_path / "hand").glob("*.h5"))) as file:
        assert (file["selected"][()] == np.isin(before["class"][:, 0], [1, 4])).all()
    assert select(path, "--reuse", name, "--labels", path, "--against", path, "-o", "labels") == 0
    said = capsys.readouterr().out
    with h5py.File(next((tmp_path / "labels").glob("*.h5"))) as file:
        assert ((file["selected"][()] == 1) == single).mean() > 0.9
    row = re.search(r"\| this one \(EM\) \| (.*) \|", said)[1].split(" | ")
    assert len(row) == 7 and float(row[6]) > 85                 # F1 in percent
    assert "YOLOv2 gray log [IGN21]" in said
    assert select(path, "--reuse", name, "--classes", "3.0", "-o", "none") == 1
    assert "runs 0 to 2" in capsys.readouterr().err


def test_sizes_need_the_geometry(run, tmp_path, capsys, monkeypatch):
    path, _ = run
    monkeypatch.chdir(tmp_path)
    assert select(path, *QUICK, "--size", "55,84") == 1
    assert "source.photon_energy_eV" in capsys.readouterr().err
    known = ("--set", "source.distance_m=0.13", "--set", "source.photon_energy_eV=1700",
             "--runs", 1, "--classes-per-run", 2)
    assert select(path, *QUICK, "--size", "400,500", *known) == 1
    assert "only 0 of 160 frames" in capsys.readouterr().err
    assert select(path, *QUICK, "--size", "20,140", *known, "-o", "out") == 0
    with h5py.File(next((tmp_path / "out").glob("*.h5"))) as file:
        assert file["diameter_nm"].shape == (160,)
        assert file.attrs["candidates"] == (file["class"][:, 0] >= 0).sum() > 100


def test_errors_say_what_to_do(run, tmp_path, capsys, monkeypatch):
    path, _ = run
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.txt").write_text("mine")
    for arguments, said in (
            (("--size", "84,55"), "two diameters"), (("--orders", "six"), "separated by commas"),
            (("--classes", "a.b"), "run.class as on the page"), (("--runs", "0"), "at least 1"),
            (("--classes", "1", "--labels", path), "give one of them"),
            (("--labels", "absent"), "no file"), (("--reuse", path), "_selection.h5 of an earlier"),
            (("-o", "full"), "already exists"),
            (("-o", "full", "--overwrite"), "nothing that this command wrote")):
        assert select(path, *arguments) == 1
        assert said in capsys.readouterr().err
    assert (tmp_path / "full" / "a.txt").read_text() == "mine"
