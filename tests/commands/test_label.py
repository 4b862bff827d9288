"""``label`` as a user meets it."""
import h5py
import numpy as np
import pytest
from mockdata.hand_output import write_output
from mockdata.hand_result import hand_result

from xfel_classify import cli


@pytest.fixture
def summary(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = hand_result().rows | {"peaks/n": np.array([0, 30, 5, 11, 1, -1], np.int32)}
    return write_output(tmp_path / "out", hand_result(rows=rows))


def label(*arguments):
    return cli.main(["label", *map(str, arguments)])


def test_labels_by_peak_counts(summary, tmp_path, capsys):
    assert label(summary, "-o", "labels.h5") == 0
    assert "2 hits, 2 misses, 2 dropped" in capsys.readouterr().out
    with h5py.File(tmp_path / "labels.h5") as file:
        assert file["label"][()].tolist() == [0, 1, 1, 0]
        assert file["index"][()].tolist() == [0, 1, 3, 4]
    assert label(summary, "-o", "labels.h5") == 1
    assert "already exists" in capsys.readouterr().err
    assert label(summary, "--hit-above", 12, "-o", "labels.h5", "--overwrite") == 0
    assert label("labels.h5") == 0
    said = capsys.readouterr().out
    assert "1 hits, 2 misses" in said and "nothing was written" in said


def test_agreement_with_an_expert(summary, tmp_path, capsys):
    (tmp_path / "expert.txt").write_text(
        "a.h5 [1] HIT\na.h5 [2] HIT\na.h5 [3] MISS\na.h5 [4] MAYBE\na.h5 [5] MISS\n")
    assert label(summary, "--against", "expert.txt") == 0
    said = capsys.readouterr().out
    assert "| hit | 1 | 0 |\n| miss | 1 | 1 |" in said and "3 events in both" in said
    assert "Cohen's kappa 0.4000" in said
    assert label(summary, "--column", "hit/label", "--against", summary,
                 "--against-column", "peaks/n") == 0
    assert "agreement 0.7500" in capsys.readouterr().out


def test_an_experts_list_becomes_a_label_file(summary, tmp_path):
    (tmp_path / "expert.txt").write_text("a.h5 [2] HIT\na.h5 [1] MISS\n")
    assert label("expert.txt", "--run-of", summary, "-o", "labels.h5") == 0
    with h5py.File(tmp_path / "labels.h5") as file, h5py.File(summary) as run:
        assert file.attrs["run"] == 95 and file["label"][()].tolist() == [0, 1]
        assert file["timestamp"][()].tolist() == run["timestamp"][:2].tolist()


def test_errors_say_what_to_do(summary, capsys):
    assert label("nothing.h5") == 1
    assert "does not exist" in capsys.readouterr().err
    assert label(summary, "--column", "no/such") == 1
    assert "--column" in capsys.readouterr().err
    assert label(summary, "--miss-below", 20) == 1
    assert "would be both" in capsys.readouterr().err
