"""Crystals of PDB files: symmetry and structure factors as gemmi has them, and runs of them."""
import h5py
import numpy as np
import pytest

from xfel_classify import cli
from xfel_classify.core import ConfigurationError
from xfel_classify.simulate.crystal import reflections
from xfel_classify.simulate.crystal_models import crystal_of_model

gemmi = pytest.importorskip("gemmi")

CELLS = {"P 21 21 21": (40, 50, 60, 90, 90, 90), "C 1 2 1": (70, 40, 50, 90, 105, 90),
         "P 41 21 2": (50, 50, 70, 90, 90, 90), "P 31 2 1": (50, 50, 70, 90, 90, 120),
         "I 2 2 2": (50, 60, 70, 90, 90, 90), "R 3 :H": (60, 60, 80, 90, 90, 120),
         "P 1": (30, 35, 40, 80, 95, 100), "P 21 3": (60, 60, 60, 90, 90, 90),
         "P 61 2 2": (50, 50, 90, 90, 90, 120), "F 4 3 2": (90, 90, 90, 90, 90, 90)}


def write_model(path, group, cell, atoms=60):
    """A heap of carbon and sulphur atoms in a cell."""
    structure = gemmi.Structure()
    structure.cell = gemmi.UnitCell(*cell)
    structure.spacegroup_hm = group
    chain = gemmi.Chain("A")
    rng = np.random.default_rng(len(group))
    for number, place in enumerate(rng.uniform(5, 20, (atoms, 3))):
        residue = gemmi.Residue()
        residue.name, residue.seqid = "GLY", gemmi.SeqId(number + 1, " ")
        atom = gemmi.Atom()
        atom.name, atom.element = "CA", gemmi.Element("S" if number % 9 == 0 else "C")
        atom.pos, atom.b_iso, atom.occ = gemmi.Position(*place), 20.0, 1.0
        residue.add_atom(atom)
        chain.add_residue(residue)
    model = gemmi.Model(1)
    model.add_chain(chain)
    structure.add_model(model)
    structure.make_mmcif_document().write_file(str(path))
    return path


@pytest.mark.parametrize("group", CELLS)
def test_structure_factors_are_those_of_the_atoms(group, tmp_path):
    path = write_model(tmp_path / "model.cif", group, CELLS[group])
    crystal = crystal_of_model(path, domain_A=700.0, mosaicity_deg=0.2)
    assert crystal.cell == CELLS[group] and crystal.domain_A == 700.0
    table = reflections(crystal, 4.0)
    structure = gemmi.read_structure(str(path))
    for site in structure[0].all():
        site.atom.b_iso = crystal.wilson_B_A2
    sum_over_atoms = gemmi.StructureFactorCalculatorX(structure.cell)
    chosen = np.random.default_rng(1).choice(len(table.hkl_N3), 250, replace=False)
    wanted = np.array([abs(sum_over_atoms.calculate_sf_from_model(
        structure[0], [int(n) for n in table.hkl_N3[row]])) ** 2 for row in chosen])
    found = table.intensity_N[chosen]
    assert np.corrcoef(found, wanted)[0, 1] > 0.999
    # absent reflections are absent, and nothing else is
    assert not found[wanted < 1e-6 * wanted.max()].max(initial=0) > 1e-4 * found.max()
    assert (found[wanted > 0.01 * wanted.max()] > 0).all()


def test_models_that_are_no_crystal_or_in_another_setting_are_named(tmp_path):
    (tmp_path / "words.txt").write_text("nothing")
    with pytest.raises(ConfigurationError, match="give a PDB or mmCIF file"):
        crystal_of_model(tmp_path / "words.txt")
    with pytest.raises(ConfigurationError, match="give a PDB or mmCIF file"):
        crystal_of_model(tmp_path / "none.pdb")
    loose = write_model(tmp_path / "loose.cif", "P 1", (1, 1, 1, 90, 90, 90))
    with pytest.raises(ConfigurationError, match="model of a crystal"):
        crystal_of_model(loose)
    for group, cell in (("P 1 1 2", (40, 50, 60, 90, 90, 100)),
                        ("P 31 1 2", (50, 50, 70, 90, 90, 120))):
        with pytest.raises(ConfigurationError, match="standard setting"):
            crystal_of_model(write_model(tmp_path / "set.cif", group, cell))


def test_a_run_of_a_models_crystal(tmp_path):
    path = write_model(tmp_path / "heap.cif", "P 21 21 21", (60, 70, 80, 90, 90, 90), atoms=200)
    words = ["simulate", "sfx", "--crystal", str(path), "--events", "2", "--hit-fraction", "1"]
    assert cli.main([*words, "--segments", "1", "--out", str(tmp_path / "run")]) == 0
    with h5py.File(tmp_path / "run/mfxsim-r0095-truth.h5") as truth:
        assert truth["is_hit"][:].all() and (truth["n_visible"][:] > 3).all()
        d = truth["spots/d_A"][:]
    crystal = crystal_of_model(path)
    known = 1 / np.sqrt(reflections(crystal, 2.5).q2_N)
    strays = np.abs(known[None] - d[:, None]).min(axis=1) > 1e-3
    assert strays.sum() <= 2        # a chance spot of an event may be of no crystal
    assert cli.main([*words, "--format", "set", "--out", str(tmp_path / "set")]) == 0
    assert (tmp_path / "set/sfx_training_heap_s0.h5").exists()
