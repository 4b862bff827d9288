"""The page of a lattice or resolution evaluation: its numbers and figures, all inside."""
from __future__ import annotations

import numpy as np
import pytest
from mockdata.report_pages import Page

pytest.importorskip("torch")
pytest.importorskip("matplotlib", reason="reports need matplotlib (the learn extra)")
pytestmark = pytest.mark.torch

from xfel_classify.core import OutputExists  # noqa: E402
from xfel_classify.engines.cards import Task  # noqa: E402
from xfel_classify.learn.report_stills import write_stills_evaluation  # noqa: E402
from xfel_classify.learn.stills_scores import StillsEvaluation, score_answers  # noqa: E402

RESOLUTION = Task(name="resolution", output="resolution", kind="regression")
LATTICE = Task(name="lattice", output="lattice", classes=["one", "several"], positive="several")


def evaluation(task, answers, labels):
    return StillsEvaluation("made-up", "ab" * 32, "direct", score_answers(task, answers, labels),
                            answers, labels)


def test_resolution(tmp_path):
    rng = np.random.default_rng(1)
    truth = rng.uniform(1 / 6, 1 / 1.4, 300)
    answers = truth + rng.normal(0, 0.05, 300)
    zero = np.zeros(300)
    found = evaluation(RESOLUTION, answers, {
        "inverse_d_A": truth, "n_lattices": zero + 1, "misset_deg": zero, "misset_sigma_deg": zero})
    page = Page(write_stills_evaluation(found, tmp_path / "page.html", command="x"))
    rows = {row[0]: row[1:] for row in page.tables["figures"][1:]}
    pearson = np.corrcoef(answers, truth)[0, 1]
    assert rows["Pearson correlation of 1/d"] == [f"{pearson:.4f}", "0.96"]
    within = np.abs(answers - truth) < 0.07
    assert rows["share within 0.07 per Å"][0].startswith(f"{within.mean():.4f}")
    assert sum(int(row[1]) for row in page.tables["by-resolution"][1:]) == 300
    assert page.tags.count("svg") == 1 and f"within 0.07 1/Å ({within.sum()})" in page.text
    assert all(ref.startswith(("#", "data:")) for ref in page.references)
    with pytest.raises(OutputExists):
        write_stills_evaluation(found, tmp_path / "page.html")


def test_lattice_by_angle_and_law(tmp_path):
    rng = np.random.default_rng(2)
    several = rng.random(400) < 0.5
    sigma = np.where(several, rng.choice([0.0, 1.0, 10.0], 400), 0.0)
    angle = np.where(several, np.where(sigma == 0, rng.uniform(1, 180, 400),
                                       0.3 + np.abs(rng.normal(0, np.maximum(sigma, 0.1)))), 0.0)
    answers = np.clip(np.where(several, 0.4 + 0.3 * np.log10(angle + 0.1), 0.2)
                      + rng.normal(0, 0.1, 400), 0, 1)
    labels = {"inverse_d_A": angle, "n_lattices": 1.0 + several, "misset_deg": angle,
              "misset_sigma_deg": sigma}
    page = Page(write_stills_evaluation(evaluation(LATTICE, answers, labels),
                                        tmp_path / "page.html"))
    right = ((answers >= 0.5) == several).mean()
    rows = {row[0]: row[1:] for row in page.tables["figures"][1:]}
    assert rows["accuracy"][0].startswith(f"{right:.4f}")
    by_angle = page.tables["by-angle"][1:]
    assert sum(int(row[1]) for row in by_angle) == several.sum()
    chosen = several & (sigma == 10) & (angle >= 3) & (angle < 10)
    row = next(row for row in by_angle if row[0] == "normal, σ = 10°, 3 to 10°")
    assert row[1] == f"{chosen.sum()}" and row[2].startswith(
        f"{(answers[chosen] >= 0.5).mean():.4f}")
    confusion = next(t for name, t in page.tables.items() if name.startswith("confusion"))
    assert int(confusion[1][1]) == (several & (answers >= 0.5)).sum()
    assert page.tags.count("svg") == 2


def test_one_kind_only_says_so(tmp_path):
    labels = {name: np.zeros(20) for name in ("inverse_d_A", "misset_deg", "misset_sigma_deg")}
    found = evaluation(LATTICE, np.linspace(0, 1, 20), labels | {"n_lattices": np.ones(20)})
    page = Page(write_stills_evaluation(found, tmp_path / "page.html"))
    assert "they need images of both kinds" in page.text
