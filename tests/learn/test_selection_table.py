"""The published selections follow from their counts, and ours are judged alike."""
import math

import numpy as np
import pytest

from xfel_classify.core import ConfigurationError
from xfel_classify.learn.selection_table import (
    COLUMNS,
    PUBLISHED,
    Selection,
    intersection,
    judged,
    markdown,
    published_selection,
    votes,
)


def test_hand_made_numbers():
    """6 selected, 4 of them among 5 manual ones, of 20."""
    selected, manual = np.zeros(20, bool), np.zeros(20, bool)
    selected[:6], manual[2:7] = True, True
    found = judged("by hand", selected, manual)
    assert (found.selected, found.common, found.manual, found.patterns) == (6, 4, 5, 20)
    assert found.numbers() == pytest.approx({
        "selected": 6, "in manual": 4, "IoU %": 100 * 4 / 7, "accuracy %": 85.0,
        "precision %": 100 * 4 / 6, "recall %": 80.0, "F1 %": 100 * 8 / 11})


# what the paper's table does not say of itself: (row, column) -> what follows from 995
CONTRADICTIONS = {("YOLOv2 gray log", "recall %"): 48.9, ("EM based (reference)", "recall %"): 57.7,
                  ("EM based (reference)", "IoU %"): 38.1}


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row.name)
def test_the_papers_rows_follow_from_995(row):
    numbers = published_selection(row).numbers()
    for column, printed in zip(COLUMNS[2:6], row.printed, strict=True):
        expected = CONTRADICTIONS.get((row.name, column))
        if expected is None:
            assert abs(numbers[column] - printed) <= 1.0, column     # printed without decimals
        else:
            assert numbers[column] == pytest.approx(expected, abs=0.05)
            assert abs(numbers[column] - printed) > 1.0


@pytest.mark.parametrize(("name", "f1"), [
    ("YOLOv2 colour linear", 54.8), ("YOLOv2 colour log", 52.0), ("YOLOv2 gray linear", 45.2),
    ("YOLOv2 gray log", 51.3), ("YOLOv3 colour linear", 49.6), ("YOLOv3 gray linear", 28.1),
    ("EM based (reference)", 55.2)])
def test_f1_of_the_papers_rows(name, f1):
    row, = (row for row in PUBLISHED if row.name == name)
    assert published_selection(row).numbers()["F1 %"] == pytest.approx(f1, abs=0.05)


def test_the_reference_fits_a_larger_manual_set():
    row = PUBLISHED[-1]
    found = published_selection(row, manual=1196).numbers()
    assert found["recall %"] == pytest.approx(48.0, abs=0.05)
    assert found["IoU %"] == pytest.approx(33.6, abs=0.05)


def test_always_no_is_accurate_and_useless():
    nothing = Selection("none", 0, 0, 995, 17_932).numbers()
    assert nothing["accuracy %"] == pytest.approx(94.5, abs=0.05)
    assert nothing["recall %"] == nothing["F1 %"] == 0
    assert math.isnan(nothing["precision %"])


def test_an_intersection_needs_all_five():
    rng = np.random.default_rng(0)
    chosen = {number: rng.random(1000) < 0.7 for number in range(3900, 4600, 100)}
    found = intersection(chosen)
    assert (found == np.all([chosen[n] for n in (4000, 4100, 4200, 4300, 4400)], axis=0)).all()
    del chosen[4200]
    with pytest.raises(ConfigurationError, match="there are 3900, 4000, 4100, 4300"):
        intersection(chosen)


def test_independent_mistakes_do_not_survive_an_intersection():
    """Five stages that find 90 % of the singles and call 6 % of the rest: precision rises."""
    rng = np.random.default_rng(1)
    manual = np.arange(17_932) < 995
    stages = {4000 + 100 * i: np.where(manual, rng.random(17_932) < 0.9, rng.random(17_932) < 0.06)
              for i in range(5)}
    alone = [judged(str(number), one, manual) for number, one in stages.items()]
    together = judged("all", intersection(stages), manual)
    assert together.precision > max(one.precision for one in alone) + 0.3
    assert together.recall < min(one.recall for one in alone)


def test_votes():
    cast = np.array([[1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 0]], bool)
    assert votes(cast, 2).tolist() == [True, True, False, False]
    with pytest.raises(ConfigurationError, match="4 of 3 selections"):
        votes(cast, 4)


def test_impossible_counts_are_refused():
    for numbers in ((5, 6, 10, 100), (5, 2, 1, 100), (50, 1, 60, 100)):
        with pytest.raises(ConfigurationError, match="contradict"):
            Selection("x", *numbers)
    with pytest.raises(ConfigurationError, match="same patterns"):
        judged("x", np.zeros(3, bool), np.zeros(4, bool))


def test_the_table_has_every_column_and_the_papers_rows():
    table = markdown([Selection("ours", 1000, 700, 995, 17_932)]).splitlines()
    assert all(column in table[0] for column in COLUMNS)
    assert table[2] == "| ours | 1000 | 700 | 54.1 | 96.7 | 70.0 | 70.4 | 70.2 |"
    printed, = (line for line in table if line.startswith("| YOLOv2 gray log [IGN21]"))
    assert "50 / 48.9" in printed and printed.count("|") == len(COLUMNS) + 2
