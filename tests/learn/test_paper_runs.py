"""The paper's ten runs: event counts, hit rates, and its figures beside ours."""
from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from xfel_classify import cli  # noqa: E402
from xfel_classify.core import ConfigurationError  # noqa: E402
from xfel_classify.learn import paper_runs  # noqa: E402
from xfel_classify.learn.evaluation import Evaluation, RunScore  # noqa: E402
from xfel_classify.learn.paper_runs import (  # noqa: E402
    evaluate_paper_runs,
    paper_conditions,
    paper_table,
)
from xfel_classify.learn.published import PAPER  # noqa: E402
from xfel_classify.simulate.conditions import PAPER_RUNS  # noqa: E402


def test_runs_have_the_papers_hit_rates_and_three_are_shifted():
    for run in PAPER_RUNS:
        drawn = paper_conditions(run)
        assert drawn.hit_fraction == PAPER[run.run].hit_fraction
        assert run.events == PAPER[run.run].events
        assert drawn.preset == ("shifted" if run.run >= 98 else "training")


@pytest.mark.slow
def test_two_small_runs(monkeypatch):
    chosen = [run for run in PAPER_RUNS if run.run in (91, 99)]
    said = []
    found = evaluate_paper_runs("sfx-hit", scale=0.008, runs=chosen, report=said.append)
    assert [row.name for row in found.runs] == ["91", "99"]
    assert [row.events for row in found.runs] == [38, 89]
    assert found.runs[1].hit_fraction > 0.7 and found.runs[0].hit_fraction < 0.6
    assert len(said) == 2 and "run 99 (shifted): 89 events" in said[1]
    # the events of a smaller scale are the first of those of a larger one
    images, labels = paper_runs._block(chosen[0], paper_runs.PAPER_SEED, 0, 4)
    again, _ = paper_runs._block(chosen[0], paper_runs.PAPER_SEED, 2, 4)
    np.testing.assert_array_equal(images[2:], again)
    np.testing.assert_array_equal(labels, found.labels[0][:4])


def made_up(shifted_specificity):
    rows = []
    for run in PAPER_RUNS:
        misses = int(100 * (shifted_specificity if run.run >= 98 else 0.99))
        rows.append(RunScore(str(run.run), 98, 2, 100 - misses, misses))
    return Evaluation("sfx-hit", "0" * 64, "none", 0.5, tuple(rows))


def test_the_papers_column_stands_beside_ours():
    lines = paper_table(made_up(0.99)).splitlines()
    assert lines[2] == ("| 90 | training | 200 | 0.5000 | 0.9800 | 0.9900 | 0.9850 | 11429 | "
                        "0.3366 | 0.9974 | 0.8685 | 0.9119 |")
    assert len([line for line in lines if line.startswith("| ")]) == 1 + 10 + 4
    pooled = next(line for line in lines if line.startswith("| 98-100 |"))
    assert "| 0.951 | 0.558 | 0.731 |" in pooled            # methods, section 4c, within rounding
    assert sum("does not collapse" in line for line in lines) == 3
    fallen = paper_table(made_up(0.4))
    assert "Run 99 COLLAPSES: specificity 0.4000 (the paper's 0.1488)" in fallen


def test_scales_and_models_that_cannot_be(capsys):
    with pytest.raises(ConfigurationError, match="above 0, at most 1"):
        evaluate_paper_runs("sfx-hit", scale=0.0)
    assert cli.main(["evaluate", "sfx-hit", "--paper", "--scale", "2"]) == 1
    assert "at most 1" in capsys.readouterr().err
