"""Labels: the paper's rule, experts' files, truth, and how far two sets agree."""
import gzip
from pathlib import Path

import h5py
import numpy as np
import pytest
from mockdata.hand_output import write_output
from mockdata.hand_result import EPOCH_STAMPS, hand_result

from xfel_classify.core import ConfigurationError, OutputDamaged, OutputError, OutputExists
from xfel_classify.learn.labels import (
    Agreement,
    Labels,
    agreement,
    read_labels,
    with_identity,
    write_labels,
)

REAL = Path(__file__).resolve().parents[2] / "../shared/data/real/labels_fv5080"
COUNTS = [1, 2, 10, 11, 0, -1]          # of the six events; the last one is damaged


def labels(values, *, index=None, stamps=None, name="made", **more):
    index = np.arange(len(values)) if index is None else np.asarray(index)
    stamps = np.full(len(values), -1) if stamps is None else np.asarray(stamps)
    return Labels(name, "expert", "by hand", np.array(values, np.int8), index, stamps, **more)


@pytest.fixture
def summary(tmp_path):
    result = hand_result()
    rows = result.rows | {"peaks/n": np.array(COUNTS, np.int32)}
    return write_output(tmp_path / "out", hand_result(rows=rows))


def write_truth(path, is_hit, stamps=EPOCH_STAMPS):
    with h5py.File(path, "w") as file:
        file["is_hit"] = np.array(is_hit, bool)
        file["timestamp"] = np.array(stamps[:len(is_hit)], np.int64)
    return path


# --- by peak counts -----------------------------------------------------------------------------

def test_the_papers_rule(summary):
    found = read_labels(summary)
    assert found.index_N.tolist() == [0, 3, 4] and found.label_N.tolist() == [0, 1, 0]
    assert found.timestamp_N.tolist() == [EPOCH_STAMPS[i] for i in (0, 3, 4)]
    assert found.dropped == 3 and (found.exp, found.run) == ("mfxl1033223", 95)
    assert "fewer than 2 miss, more than 10 hit" in found.rule


def test_other_limits_and_columns(summary):
    found = read_labels(summary, miss_below=1, hit_above=9)
    assert found.label_N.tolist() == [1, 1, 0] and found.index_N.tolist() == [2, 3, 4]
    everything = read_labels(summary, miss_below=3, hit_above=2)
    assert everything.label_N.tolist() == [0, 0, 1, 1, 0]
    answers = read_labels(summary, column="hit/label")
    assert answers.label_N.tolist() == [0, 1, 0, 1, 1] and answers.kind == "answers"


@pytest.mark.parametrize(("given", "said"), [
    ({"column": "hit/nothing"}, "no column 'hit/nothing'"),
    ({"column": "hit/score"}, "one whole number per event"),
    ({"column": "hit"}, "no column 'hit'"),
    ({"column": "peaks/panel"}, "one whole number per event"),
    ({"miss_below": 12}, "would be both"), ({"miss_below": -1}, "fewer than -1"),
])
def test_options_that_do_not_fit_a_summary(summary, given, said):
    with pytest.raises(ConfigurationError, match=said):
        read_labels(summary, **given)


# --- experts' lists -------------------------------------------------------------------------------

TEXT = "r1.h5 [1] HIT\nr1.h5 [2] MISS\n# note\n\nr1.h5 [4] maybe\nr1.h5 [5] Hit\n"


@pytest.mark.parametrize("packed", [False, True])
def test_an_experts_list(tmp_path, packed):
    path = tmp_path / ("expert.txt.gz" if packed else "expert.txt")
    path.write_bytes(gzip.compress(TEXT.encode()) if packed else TEXT.encode())
    found = read_labels(path)
    assert found.index_N.tolist() == [0, 1, 4] and found.label_N.tolist() == [1, 0, 1]
    assert found.dropped == 1 and found.run == -1 and (found.timestamp_N == -1).all()
    assert found.name == "expert" and found.provenance["images"] == "r1.h5"


def test_one_image_file_of_several(tmp_path):
    path = tmp_path / "expert.txt"
    path.write_text(TEXT + "my other.h5 [1] MISS\n")
    with pytest.raises(ConfigurationError, match="2 image files .*--file"):
        read_labels(path)
    assert read_labels(path, file="my other.h5").label_N.tolist() == [0]
    with pytest.raises(ConfigurationError, match="'r2.h5'"):
        read_labels(path, file="r2.h5")


@pytest.mark.parametrize(("content", "said"), [
    (b"r1.h5 [1] HIT\nr1.h5 [2] PERHAPS\n", "line 2 .*PERHAPS"),
    (b"r1.h5 [0] HIT\n", "counted from 1"),
    (b"r1.h5 [1] HIT\nr1.h5 [1] MISS\n", "line 2 .*contradicts"),
    (b"\xff\xfe\x00nonsense", "neither HDF5 nor text"),
    (gzip.compress(b"r1.h5 [1] HIT\n" * 99)[:30], "neither HDF5 nor text"),
])
def test_lists_that_are_none(tmp_path, content, said):
    path = tmp_path / "expert.txt"
    path.write_bytes(content)
    with pytest.raises(OutputDamaged, match=said):
        read_labels(path)


def test_an_empty_list_labels_nothing(tmp_path):
    path = tmp_path / "expert.txt"
    path.write_text("")
    assert len(read_labels(path)) == 0


@pytest.mark.skipif(not REAL.exists(), reason="the real label files are not here (../shared)")
@pytest.mark.parametrize(("name", "hits", "maybes", "misses", "both", "hits_listed", "wrong"), [
    ("LG36", 235, 57, 1708, 218, 235, 45), ("LN83", 346, 63, 1591, 336, 346, 2),
    ("LO19", 730, 151, 1119, 695, 728, 0)])
def test_real_experts_and_a_real_finder(name, hits, maybes, misses, both, hits_listed, wrong):
    """The counts that the README of the label files gives."""
    expert = read_labels(REAL / f"{name}_expert_annotation.txt.gz")
    assert (expert.hits, expert.dropped, len(expert) - expert.hits) == (hits, maybes, misses)
    assert len(expert) + expert.dropped == 2000
    found = agreement(expert, read_labels(REAL / f"{name}_dials_annotation.txt.gz"))
    assert (found.both_hit, found.both_hit + found.first_hit, found.second_hit) == (
        both, hits_listed, wrong)
    assert 0.8 < found.kappa < 1


# --- truth, and what is no label file ----------------------------------------------------------

def test_truth_of_a_simulated_run(tmp_path, summary):
    path = write_truth(tmp_path / "mfxl1033223-r0095-truth.h5", [0, 1, 1, 1, 0, 0])
    found = read_labels(path)
    assert found.label_N.tolist() == [0, 1, 1, 1, 0, 0] and found.kind == "truth"
    assert (found.exp, found.run) == ("mfxl1033223", 95)
    compared = agreement(read_labels(summary), found)
    assert (compared.both_hit, compared.both_miss, compared.only_second) == (1, 2, 3)
    assert read_labels(write_truth(tmp_path / "other.h5", [1])).run == -1


def test_files_without_labels(tmp_path):
    with pytest.raises(OutputError, match="does not exist"):
        read_labels(tmp_path / "nothing.h5")
    with pytest.raises(ConfigurationError, match="directory"):
        read_labels(tmp_path)
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = 1
    with pytest.raises(OutputDamaged, match="neither a summary"):
        read_labels(tmp_path / "other.h5")
    (tmp_path / "cut.h5").write_bytes((tmp_path / "other.h5").read_bytes()[:200])
    with pytest.raises(OutputDamaged):
        read_labels(tmp_path / "cut.h5")
    (tmp_path / "text.h5").write_text("r1.h5 [1] HIT\n")
    with pytest.raises(OutputDamaged, match="not a whole HDF5"):
        read_labels(tmp_path / "text.h5")


# --- the label file ----------------------------------------------------------------------------

def test_a_label_file_comes_back(tmp_path, summary):
    made = read_labels(summary)
    path = write_labels(made, tmp_path / "labels.h5", command="xfel-classify label")
    found = read_labels(path)
    for name in ("label_N", "index_N", "timestamp_N"):
        assert getattr(found, name).tolist() == getattr(made, name).tolist()
    assert (found.name, found.kind, found.rule, found.dropped, found.exp, found.run) == (
        made.name, made.kind, made.rule, 3, "mfxl1033223", 95)
    with h5py.File(path) as file:
        assert file.attrs["format"] == "xfel_classify labels" and file.attrs["hits"] == 1
        assert file.attrs["command"] == "xfel-classify label"
        assert file.attrs["source_file"] == summary.name
        assert list(file["label"].attrs["names"]) == ["miss", "hit"]
        assert all("doc" in dataset.attrs for dataset in file.values())
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["labels.h5"]


def test_a_label_file_is_not_replaced_unasked(tmp_path):
    path = write_labels(labels([1]), tmp_path / "labels.h5")
    with pytest.raises(OutputExists, match="--overwrite"):
        write_labels(labels([0]), path)
    assert read_labels(path).label_N.tolist() == [1]
    assert read_labels(write_labels(labels([0]), path, overwrite=True)).label_N.tolist() == [0]
    with pytest.raises(OutputError, match="does not exist"):
        write_labels(labels([0]), tmp_path / "nowhere" / "labels.h5")


def test_a_damaged_label_file(tmp_path):
    path = write_labels(labels([1, 0]), tmp_path / "labels.h5")
    with h5py.File(path, "r+") as file:
        file["label"][0] = 7
    with pytest.raises(OutputDamaged, match="one 0 or 1 per event"):
        read_labels(path)
    with h5py.File(path, "r+") as file:
        del file["index"]
    with pytest.raises(OutputDamaged, match="lacks a dataset"):
        read_labels(path)


def test_an_experts_list_learns_its_run(tmp_path, summary):
    found = with_identity(labels([1, 0], index=[3, 0]), summary)
    assert (found.exp, found.run) == ("mfxl1033223", 95)
    assert found.timestamp_N.tolist() == [EPOCH_STAMPS[3], EPOCH_STAMPS[0]]
    with pytest.raises(ConfigurationError, match="1 of its 2 events are not in there"):
        with_identity(labels([1, 0], index=[3, 6]), summary)
    (tmp_path / "text").write_text("x")
    with pytest.raises(OutputError, match="no HDF5"):
        with_identity(labels([1]), tmp_path / "text")


# --- agreement ------------------------------------------------------------------------------------

def test_kappa_of_a_worked_example():
    # 20 yes-yes, 15 no-no, 5 and 10 mixed: agreement 0.7, by chance 0.5
    found = Agreement("a", "b", 20, 5, 10, 15)
    assert found.agreement == pytest.approx(0.7) and found.kappa == pytest.approx(0.4)
    assert "kappa 0.4000" in str(found) and "| miss | 10 | 15 |" in str(found)


def test_kappa_of_random_labels_by_its_definition():
    rng = np.random.default_rng(4)
    a, b = rng.integers(0, 2, 300), (rng.random(300) < 0.3).astype(int)
    found = agreement(labels(a), labels(b, name="b"))
    chance = a.mean() * b.mean() + (1 - a.mean()) * (1 - b.mean())
    assert found.kappa == pytest.approx(((a == b).mean() - chance) / (1 - chance))


def test_agreement_of_one_class_is_undefined_not_perfect():
    found = agreement(labels([1, 1]), labels([1, 1]))
    assert found.agreement == 1 and np.isnan(found.kappa) and "one class only" in str(found)
    assert np.isnan(agreement(labels([]), labels([1])).agreement)


def test_events_are_matched_by_time_stamp_or_index():
    first = labels([1, 0, 1], stamps=[70, 50, 60])
    second = labels([1, 0, 0], index=[9, 8, 7], stamps=[60, 50, 40])
    found = agreement(first, second)
    assert (found.both_hit, found.both_miss, found.only_first, found.only_second) == (1, 1, 1, 1)
    expert = labels([1, 0], index=[2, 1])
    assert agreement(first, expert).both_hit == 1
    repeated = labels([1, 0, 1], stamps=[5, 5, 6])          # stamps that do not name one event
    assert agreement(repeated, labels([1, 0, 1], stamps=[5, 5, 6])).events == 3


def test_sets_of_different_runs():
    with pytest.raises(ConfigurationError, match="run 95 .* run 96"):
        agreement(labels([1], run=95), labels([1], run=96))
    with pytest.raises(ConfigurationError, match="no event in common"):
        agreement(labels([1]), labels([1], index=[4]))
