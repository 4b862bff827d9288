"""Training, validation, test and shifted runs of the shipped recipes share nothing."""
from __future__ import annotations

import itertools
import tomllib
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from xfel_classify.core import ConfigurationError  # noqa: E402
from xfel_classify.learn.paper_runs import PAPER_SEED, paper_conditions  # noqa: E402
from xfel_classify.learn.recipes import read_recipe, runs_of  # noqa: E402
from xfel_classify.simulate.conditions import PAPER_RUNS, draw_conditions  # noqa: E402
from xfel_classify.simulate.stills_conditions import draw_still  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "engines").glob("*/recipe*.toml"))
MODELS = sorted(path.parent for path in (ROOT / "engines").glob("*/card.toml"))
SPLITS = ("training", "validation", "test", "shifted")


def of_sfx(run):
    """(cell, structure, background) of a run of crops."""
    c = draw_conditions(run.seed, run.run, run.preset)
    return (c.crystal.cell, c.crystal.structure_seed,
            (c.air_photons, c.ring_photons, c.ring_s_A, c.slope))


def of_stills(run):
    """The same of a run of stills, by its first event; all events share the crystal."""
    c = draw_still(run.seed, run.run, 0, run.preset)
    return c.crystal.cell, c.crystal.structure_seed, (c.background_photons, c.background_shares)


DRAWN = {"sfx": of_sfx, "stills": of_stills, "described_stills": of_stills}


def name_of(path):
    return f"{path.parent.name}/{path.name}"


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_no_split_shares_a_seed_or_a_run(path):
    recipe = read_recipe(path)
    seeds = {split: {part.seed for part in getattr(recipe.data, split)} for split in SPLITS}
    for one, other in itertools.combinations(SPLITS, 2):
        assert not seeds[one] & seeds[other], (one, other)
    assert PAPER_SEED not in set().union(*seeds.values())
    keys = [(run.preset, run.seed, run.run) for split in SPLITS for run in runs_of(recipe, split)]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("path", [p for p in RECIPES
                                  if read_recipe(p).data.generator in DRAWN], ids=name_of)
def test_no_split_shares_a_cell_a_structure_or_a_background(path):
    recipe = read_recipe(path)
    draw = DRAWN[recipe.data.generator]
    found = {split: [draw(run) for run in runs_of(recipe, split)] for split in SPLITS}
    if recipe.data.generator == "sfx":      # and the ten runs of evaluate --paper
        found["paper"] = [(c.crystal.cell, c.crystal.structure_seed, (
            c.air_photons, c.ring_photons, c.ring_s_A, c.slope))
            for c in map(paper_conditions, PAPER_RUNS)]
    for which, what in enumerate(("cell", "structure", "background")):
        values = {split: {one[which] for one in drawn} for split, drawn in found.items()}
        assert all(len(values[split]) == len(found[split]) for split in found), what
        for one, other in itertools.combinations(found, 2):
            assert not values[one] & values[other], (what, one, other)


def test_all_events_of_a_run_of_stills_have_its_crystal():
    crystals = {draw_still(5, 2, event, "uniform").crystal for event in range(8)}
    assert len(crystals) == 1


def test_a_recipe_whose_splits_share_a_seed_is_refused(tmp_path):
    recipe = read_recipe(ROOT / "engines" / "sfx-hit" / "recipe.toml")
    text = (ROOT / "engines" / "sfx-hit" / "recipe.toml").read_text()
    training, test = recipe.data.training[0].seed, recipe.data.test[0].seed
    (tmp_path / "recipe.toml").write_text(text.replace(f"seed = {test}", f"seed = {training}"))
    with pytest.raises(ConfigurationError, match="splits never share a seed"):
        read_recipe(tmp_path / "recipe.toml")


@pytest.mark.parametrize("directory", MODELS, ids=lambda path: path.name)
def test_cards_say_the_split(directory):
    card = tomllib.loads((directory / "card.toml").read_text(encoding="utf-8"))
    seeds = card["provenance"]["seeds"]
    assert seeds["training"] and seeds["validation"] and seeds["test"]
    for one, other in itertools.combinations(seeds, 2):
        assert not set(seeds[one]) & set(seeds[other]), (one, other)
    recipe = read_recipe(directory / "recipe.toml")
    if recipe.sha256 == card["provenance"]["recipe_sha256"]:
        assert seeds == {split: [part.seed for part in getattr(recipe.data, split)]
                         for split in seeds}
