"""``cluster`` as a user meets it."""
import re

import h5py
import numpy as np
import pytest
from mockdata.spi_patterns import patterns, write_run

pytest.importorskip("scipy")

from xfel_classify import cli


def cluster(*arguments):
    return cli.main(["cluster", *map(str, arguments), "--detector", "assembled", "--set",
                     "source.unit=photon", "--set", "source.pixel_size_m=3e-4"])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """400 patterns, half of them of single particles."""
    place = tmp_path_factory.mktemp("run")
    images, single = patterns(400, seed=7)
    return write_run(place / "amox27716_r0091.h5", images, single), single


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_labels_name_clusters_and_lists_hold_their_events(run, here, capsys):
    path, single = run
    assert cluster(path, "--labels", path, "--use-labels", 80, "--against", path, "-o", "out") == 0
    said = capsys.readouterr().out
    assert float(re.search(r"agreement with 320 labels: ([\d.]+)%", said)[1]) > 85
    name, = (path for path in (here / "out").glob("*_clusters.h5"))
    with h5py.File(name) as file:
        named, numbers = file["name"][()], file["cluster"][()]
        assert (named == single).mean() > 0.85
        assert file.attrs["labelled"] == 80 and file.attrs["scale"] == "rings"
        assert file.attrs["xfel_classify_version"] and file.attrs["neighbours"] == 30
        assert set(file.attrs["files"]) == {p.name for p in (here / "out").iterdir()} - {name.name}
        stem = name.name.removesuffix("_clusters.h5")
        stamps = file["timestamp"][()]
    good = np.load(here / "out" / f"{stem}_good.npy")
    assert good.dtype == np.uint64 and (good == np.sort(stamps[named == 1])).all()
    lines = (here / "out" / f"{stem}_good.txt").read_text().split()
    assert [int(i) for i in lines[1::2]] == np.flatnonzero(named == 1).tolist()
    lists = [len(np.load(p)) for p in sorted((here / "out").glob("*_cluster??.npy"))]
    assert sum(lists) == 400 and lists == np.bincount(numbers, minlength=len(lists)).tolist()
    page = (here / "out" / f"{stem}_clusters.html").read_text()
    assert page.count("<section") == len(lists) + 2 and "average" in page
    assert (here / "out" / f"{stem}_clusters.png").read_bytes()[:4] == b"\x89PNG"


def test_a_map_serves_another_run(run, here, capsys):
    path, _ = run
    assert cluster(path, "--labels", path, "-o", "first", "--clusters", 12) == 0
    images, single = patterns(120, seed=8)
    other = write_run(here / "amox27716_r0092.h5", images, single)
    drawn, = (here / "first").glob("*_clusters.h5")
    assert cluster(other, "--map", drawn, "--against", other, "-o", "second") == 0
    said = capsys.readouterr().out
    assert float(re.search(r"agreement with 120 labels: ([\d.]+)%", said)[1]) > 80
    assert "in 12 clusters" in said
    halves = write_run(here / "amox27716_r0093.h5", images[:, :, :30], single)
    assert cluster(halves, "--map", drawn, "-o", "third") == 1
    assert "another detector, mask or beam centre" in capsys.readouterr().err


def test_more_frames_than_the_map_holds(run, here, capsys):
    path, single = run
    assert cluster(path, "--labels", path, "--most", 200, "-o", "out") == 0
    with h5py.File(next((here / "out").glob("*_clusters.h5"))) as file:
        assert len(file["map/points"]) <= 200
        assert len(file["cluster"]) == 400
        assert (file["name"][()] == single).mean() > 0.85
        assert file["map/rows"][:3].tolist() == [0, 2, 4]


def test_without_labels_clusters_are_shown_unnamed(run, here, capsys):
    path, _ = run
    assert cluster(path, "--clusters", 5) == 0
    assert "labels" not in capsys.readouterr().out
    out, = here.glob("*_clusters")
    with h5py.File(next(out.glob("*_clusters.h5"))) as file:
        assert (file["name"][()] == -1).all()
    assert not list(out.glob("*_good.npy"))
    assert "unnamed" in next(out.glob("*.html")).read_text()
    assert cluster(path, "--clusters", 5) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert cluster(path, "--clusters", 3, "--overwrite") == 0
    assert len(list(out.glob("*_cluster??.npy"))) == 3


def test_errors_say_what_to_do(run, here, capsys):
    path, _ = run
    np.save(here / "list.npy", np.arange(3))
    for arguments, said in (
            ((path, "--names", "good"), "two different words"),
            ((path, "--map", path), "_clusters.h5 of an earlier"),
            ((path, "--labels", path, "--label-column", "count"), "choose one of these"),
            ((path, "--labels", "absent.h5"), "check the path"),
            ((path, "--most", "2"), "give at least 3"),
            ((path, "--side", "2"), "at least 4"),
            ((path, "--threads", "0"), "at least 1")):
        assert cluster(*arguments, "-o", "none") == 1
        assert said in capsys.readouterr().err
        assert not (here / "none").exists()
