"""Particles and their transforms: what is packaged, what files give, and the physics of F."""
import gzip
import logging

import numpy as np
import pytest

from xfel_classify.core import ConfigurationError, UnknownComponent
from xfel_classify.simulate import spi_volume
from xfel_classify.simulate.spi_particles import (
    SPI_PARTICLES,
    SPI_UNSEEN,
    STAND_INS,
    STRUCTURES_VARIABLE,
    Particle,
    load_particle,
    pack_particle,
    packaged_particle,
)
from xfel_classify.simulate.spi_volume import (
    PAPER_MESH,
    PAPER_VOXEL,
    amplitudes_direct,
    form_factor,
    mesh_for,
    particle_volume,
    volume_of_points,
)

PDB = """\
REMARK 350 BIOMOLECULE: 1
REMARK 350 APPLY THE FOLLOWING TO CHAINS: A
REMARK 350   BIOMT1   1  1.000000  0.000000  0.000000        0.00000
REMARK 350   BIOMT2   1  0.000000  1.000000  0.000000        0.00000
REMARK 350   BIOMT3   1  0.000000  0.000000  1.000000        0.00000
REMARK 350   BIOMT1   2 -1.000000  0.000000  0.000000       10.00000
REMARK 350   BIOMT2   2  0.000000 -1.000000  0.000000        0.00000
REMARK 350   BIOMT3   2  0.000000  0.000000  1.000000        0.00000
ATOM      1  N   GLY A   1      20.000   2.000   3.000  1.00 10.00           N
ATOM      2  CA  GLY A   1      21.500   2.000   3.000  0.50 10.00           C
ATOM      3  C   GLY B   1      50.000  50.000  50.000  1.00 10.00           C
HETATM    4  O   HOH A   2       0.000   0.000   0.000  1.00 10.00           O
END
"""


def atoms(points, numbers=None, name="dots"):
    points = np.asarray(points, np.float32)
    numbers = np.full(len(points), 6) if numbers is None else numbers
    return Particle(name, name, False, points, np.asarray(numbers, np.uint8),
                    np.ones(len(points), np.float32))


def cloud(count=300, reach=80.0, seed=1):
    rng = np.random.default_rng(seed)
    return atoms(rng.normal(0, reach / 3, (count, 3)), rng.choice([1, 6, 7, 8, 16], count))


# --- particles ------------------------------------------------------------------------------------

def test_all_classes_come_with_the_package(monkeypatch):
    monkeypatch.delenv(STRUCTURES_VARIABLE, raising=False)
    assert len(SPI_PARTICLES) == 11 and not set(SPI_PARTICLES) & set(SPI_UNSEEN)
    sizes = {}
    for name in SPI_PARTICLES + SPI_UNSEEN:
        one = load_particle(name)
        assert one.source == STAND_INS[name] and one.stand_in == (name in SPI_PARTICLES)
        assert np.abs(one.atoms_N3.mean(0)).max() < 0.01
        sizes[name] = one.radius_A
        assert 30 < one.gyration_A + 15 < one.radius_A + 15
    assert sizes["2cex"] < sizes["7dx8"] < sizes["1fpv"] < sizes["3j6r"]
    assert len(load_particle("1fpv").atoms_N3) == 60 * 5112
    # the hard pair differs by where one ACE2 is, and in nothing else
    pair = load_particle("7dx8"), load_particle("7dx9")
    assert np.array_equal(pair[0].number_N, pair[1].number_N)


def test_a_file_is_expanded_centred_and_without_water(tmp_path):
    path = tmp_path / "1abc.pdb.gz"
    with gzip.open(path, "wt") as out:
        out.write(PDB)
    one = load_particle(str(path))
    assert (one.name, one.source, one.stand_in) == ("1abc", "1abc.pdb.gz", False)
    assert sorted(one.number_N) == [6, 6, 7, 7] and sorted(one.weight_N) == [0.5, 0.5, 1, 1]
    np.testing.assert_allclose(one.origin_3, [5, 0, 3], atol=1e-4)
    assert one.radius_A == pytest.approx(np.hypot(16.5, 2), abs=1e-3)


def test_mmcif_gives_the_same_atoms_as_pdb(tmp_path):
    gemmi = pytest.importorskip("gemmi")
    (tmp_path / "one.pdb").write_text(PDB)
    structure = gemmi.read_structure(str(tmp_path / "one.pdb"))
    structure.setup_entities()
    structure.make_mmcif_document().write_file(str(tmp_path / "two.cif"))
    pdb, cif = (load_particle(str(tmp_path / name)) for name in ("one.pdb", "two.cif"))
    order = [np.lexsort(one.atoms_N3.round(3).T) for one in (pdb, cif)]
    np.testing.assert_allclose(cif.atoms_N3[order[1]], pdb.atoms_N3[order[0]], atol=2e-3)
    np.testing.assert_array_equal(cif.weight_N[order[1]], pdb.weight_N[order[0]])


def test_entries_of_the_user_come_first_and_missing_ones_are_told(tmp_path, caplog, monkeypatch):
    (tmp_path / "ss").mkdir()
    (tmp_path / "ss" / "pdb1ss8.ent").write_text(PDB)
    with caplog.at_level(logging.WARNING):
        assert not load_particle("1ss8", tmp_path).stand_in
        assert load_particle("6sp2", tmp_path).stand_in
    assert "6sp2" in caplog.text and "1ei7" in caplog.text and "1ss8" not in caplog.text
    monkeypatch.setenv(STRUCTURES_VARIABLE, str(tmp_path))
    assert load_particle("1ss8").source == "pdb1ss8.ent"
    assert packaged_particle("1ss8").stand_in


def test_wrong_names_and_files_are_refused(tmp_path):
    with pytest.raises(UnknownComponent, match="1ss8"):
        load_particle("9xyz")
    with pytest.raises(ConfigurationError, match="no such directory"):
        load_particle("1ss8", tmp_path / "nowhere")
    (tmp_path / "empty.pdb").write_text("END\n")
    with pytest.raises(ConfigurationError, match="empty.pdb"):
        load_particle(str(tmp_path / "empty.pdb"))


def test_packing_keeps_atoms_to_a_twentieth_of_an_angstrom(tmp_path, monkeypatch):
    from xfel_classify.simulate import spi_particles

    points = np.random.default_rng(2).uniform(-150, 150, (50, 3))
    turn = np.c_[np.diag([-1.0, -1.0, 1.0]), [3.0, 0.0, 0.0]]
    (tmp_path / "particles").mkdir()
    pack_particle(tmp_path / "particles" / "one.npz", points, np.full(50, 8), np.ones(50),
                  [np.eye(3, 4), turn])
    monkeypatch.setattr(spi_particles.resources, "files", lambda package: tmp_path)
    found, number, weight = spi_particles._packaged("one")
    assert len(found) == len(number) == len(weight) == 100
    assert np.abs(found[:50] - points).max() <= 0.0251
    np.testing.assert_allclose(found[50:], found[:50] @ turn[:, :3].T + turn[:, 3], atol=1e-9)


# --- the transform --------------------------------------------------------------------------------

def test_form_factors_agree_with_other_tables():
    gemmi = pytest.importorskip("gemmi")
    s = np.linspace(0, 0.1, 20)
    for number in (1, 6, 7, 8, 15, 16, 17, 20, 30):
        ours = form_factor(number, s)
        assert ours[0] == pytest.approx(number, rel=1e-3)
        other = [gemmi.Element(number).it92.calculate_sf(stol2=one ** 2 / 4) for one in s]
        # hydrogen: free here, bonded there
        np.testing.assert_allclose(ours, other, rtol=0.015 if number == 1 else 0.006)
    assert form_factor(26, np.zeros(1))[0] == pytest.approx(26, rel=1e-3)


def test_mesh_equals_the_direct_sum():
    one = cloud()
    mesh, voxel = 61, 1.5e-3
    volume = particle_volume(one, mesh, voxel)
    index = np.random.default_rng(3).integers(0, mesh, (60, 3))
    direct = amplitudes_direct(one, (index - mesh // 2) * voxel)
    random_level = np.sqrt((one.number_N.astype(float) ** 2).sum())
    assert np.abs(volume[tuple(index.T)] - direct).max() < 2e-3 * random_level


def test_two_weights_are_transformed_at_once():
    rng = np.random.default_rng(4)
    points, weights = rng.uniform(-100, 100, (40, 3)), rng.normal(0, 1, (40, 2))
    both = volume_of_points(points, weights, 31, 2e-3)
    s = (np.stack(np.meshgrid(*[np.arange(31)] * 3, indexing="ij"), -1) - 15) * 2e-3
    for found, weight in zip(both, weights.T, strict=True):
        exact = (weight * np.exp(2j * np.pi * s.reshape(-1, 3) @ points.T)).sum(1)
        np.testing.assert_allclose(found.ravel(), exact, atol=1e-4 * np.abs(weight).sum())


def test_atoms_at_the_edge_of_the_period_wrap_around():
    voxel = 2e-3
    far = atoms([[249.9, -249.9, 0.0], [0.0, 249.0, -249.0]])
    volume = particle_volume(far, 31, voxel)
    index = np.random.default_rng(5).integers(0, 31, (30, 3))
    direct = amplitudes_direct(far, (index - 15) * voxel)
    np.testing.assert_allclose(volume[tuple(index.T)], direct, atol=1e-3)
    with pytest.raises(ConfigurationError, match="finer mesh"):
        particle_volume(atoms([[260.0, 0, 0], [-260.0, 0, 0]]), 31, voxel)


def test_friedel_symmetry_and_electrons_at_the_origin():
    one = cloud()
    volume = particle_volume(one, 61, 1.5e-3)
    np.testing.assert_allclose(volume, np.conj(volume[::-1, ::-1, ::-1]), atol=1e-3)
    assert volume[30, 30, 30].real == pytest.approx(one.number_N.sum(), rel=1e-3)


def test_guinier_radius():
    """ln |F|^2 falls as (2 pi s Rg)^2 / 3 in every direction on average: Rg of the atoms."""
    one = packaged_particle("1ss8")
    step = PAPER_VOXEL
    volume = particle_volume(one)
    middle = PAPER_MESH // 2
    near = [volume[middle + i, middle + j, middle + k] for i, j, k in
            ((1, 0, 0), (0, 1, 0), (0, 0, 1))]
    fall = -np.mean(np.log(np.abs(near) / np.abs(volume[middle, middle, middle])))
    assert np.sqrt(6 * fall) / (2 * np.pi * step) == pytest.approx(one.gyration_A, rel=0.02)


def test_the_paper_has_151_points():
    corner = 2 * np.sin(0.5 * np.arctan(np.sqrt(2) * 511.5 * 75e-6 / 0.2905)) / 2.6953086
    assert mesh_for(corner) == PAPER_MESH == 151
    assert 1 / corner == pytest.approx(14.62, abs=0.005)


def test_water_adds_electrons_outside():
    one = cloud(200, 60.0)
    dry, wet = (particle_volume(one, 41, 2e-3, thickness) for thickness in (0.0, 6.0))
    gain = (wet[20, 20, 20] - dry[20, 20, 20]).real
    assert 0.2 * one.number_N.sum() < gain < 100 * one.number_N.sum()
    near = np.abs(wet[21, 20, 20] / wet[20, 20, 20]) < np.abs(dry[21, 20, 20] / dry[20, 20, 20])
    assert near     # a larger radius of gyration


def test_volumes_are_kept_and_damaged_ones_made_again(caplog):
    one = cloud(50, 40.0, seed=9)
    first = np.array(particle_volume(one, 31, 2e-3))
    (path,) = [p for p in spi_volume.volume_directory().glob("dots-*.npy")
               if np.load(p, mmap_mode="r").shape == (31,) * 3
               and np.array_equal(np.load(p, mmap_mode="r"), first)]
    path.write_bytes(b"\x93NUMPY rubbish")
    spi_volume._opened.cache_clear()
    with caplog.at_level(logging.WARNING):
        again = particle_volume(one, 31, 2e-3)
    assert "made again" in caplog.text
    np.testing.assert_array_equal(again, first)
    assert not list(path.parent.glob("*.tmp"))


def test_a_cache_that_cannot_be_written_costs_time_only(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XFEL_CLASSIFY_CACHE", str(tmp_path / "file"))
    one = cloud(20, 30.0, seed=11)
    with caplog.at_level(logging.WARNING):
        volume = particle_volume(one, 21, 2e-3)
    assert "cannot be kept" in caplog.text
    assert volume[10, 10, 10].real == pytest.approx(one.number_N.sum(), rel=1e-3)
