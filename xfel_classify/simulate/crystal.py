"""Crystals: random cells, Laue symmetry, Wilson structure factors, reflection lists, orientations.

Structure factors are a pure function of (h, k, l) and a seed: a hash of the symmetry-canonical
index gives |F|^2 / <|F|^2> ~ Exp(1) (acentric Wilson statistics), so that nothing has to be
stored, Friedel pairs are equal and systematically absent reflections of the centring are zero.
Axes: N reflections, 3 = (a*, b*, c*) or lab (x, y, z).  Lengths in angstrom.
"""
from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from xfel_classify.core import ConfigurationError

__all__ = [
    "CENTRINGS", "LATTICES", "Crystal", "Reflections", "amplitudes_from_model", "draw_crystal",
    "intensities", "laue_rotations", "protein_shape", "reflection_rotations", "reflections",
    "reciprocal_basis", "rotation_about", "random_rotation", "volume_A3", "wilson_intensities",
]

CENTRINGS = ("P", "A", "C", "I", "F", "R")
#: lattice type -> (Laue groups, centrings, chance of being drawn); chances follow the PDB roughly
LATTICES = {
    "triclinic": (("-1",), ("P",), 0.06),
    "monoclinic": (("2/m",), ("P", "P", "C"), 0.20),
    "orthorhombic": (("mmm",), ("P", "P", "C", "I", "F"), 0.30),
    "tetragonal": (("4/m", "4/mmm", "4/mmm"), ("P", "P", "I"), 0.16),
    "trigonal": (("-3", "-3m"), ("P", "R"), 0.08),
    "hexagonal": (("6/m", "6/mmm"), ("P",), 0.12),
    "cubic": (("m-3", "m-3m"), ("P", "I", "F"), 0.08),
}
_ABSENT_SHARE = {"P": 1.0, "A": 0.5, "C": 0.5, "I": 0.5, "F": 0.25, "R": 1 / 3}
_HALF_RANGE = 512      # Miller indices are within -511..511


@dataclass(frozen=True)
class Crystal:
    """A crystal form: everything about the sample that all its crystals share.

    ``cell`` is (a, b, c, alpha, beta, gamma) in angstrom and degrees; ``laue`` the Laue class;
    ``centring`` one of P A C I F R (R on hexagonal axes, obverse).  ``structure_seed`` selects
    the Wilson structure factors, unless ``model`` names a PDB/mmCIF file.  ``wilson_B_A2`` is
    the B already contained in them.  ``domain_A`` is the mosaic-domain size L,
    ``mosaicity_deg`` the full mosaic spread eta.
    """

    cell: tuple[float, float, float, float, float, float]
    laue: str = "-1"
    centring: str = "P"
    structure_seed: int = 0
    wilson_B_A2: float = 10.0
    domain_A: float = 500.0
    mosaicity_deg: float = 0.1
    model: str = ""

    @property
    def lattice(self) -> str:
        for name, (groups, _, _) in LATTICES.items():
            if self.laue in groups:
                return name
        raise ConfigurationError(
            f"asked for Laue class {self.laue!r}; known are "
            f"{sorted(g for groups, _, _ in LATTICES.values() for g in groups)}; name one of them")


@dataclass(frozen=True)
class Reflections:
    """Reflections of one crystal within a sphere, sorted by distance from the origin.

    ``hkl_N3`` float32; ``q2_N`` |q|^2 in 1/A^2; ``intensity_N`` |F|^2 on a scale where the mean
    at low resolution is 1, without the extra B of the resolution label.
    """

    hkl_N3: np.ndarray
    q2_N: np.ndarray
    intensity_N: np.ndarray
    basis_33: np.ndarray


def reciprocal_basis(cell: tuple[float, ...]) -> np.ndarray:
    """Columns a*, b*, c* in 1/A for the orientation with a along x and c* along z."""
    a, b, c = cell[:3]
    ca, cb, cg = (np.cos(np.deg2rad(v)) for v in cell[3:])
    sg = np.sin(np.deg2rad(cell[5]))
    volume = a * b * c * np.sqrt(max(1 - ca * ca - cb * cb - cg * cg + 2 * ca * cb * cg, 1e-9))
    direct = np.array([[a, b * cg, c * cb],
                       [0, b * sg, c * (ca - cb * cg) / sg],
                       [0, 0, volume / (a * b * sg)]])
    return np.linalg.inv(direct).T


def volume_A3(cell: tuple[float, ...]) -> float:
    """Volume of the cell in cubic angstrom."""
    return float(1.0 / np.linalg.det(reciprocal_basis(cell)))


def _axis_rotation(text: str) -> np.ndarray:
    """'-y,x,z' style -> 3x3 integer matrix acting on (h, k, l) row vectors from the right."""
    rows = []
    for part in text.split(","):
        row = [0, 0, 0]
        sign = 1
        for ch in part:
            if ch in "+-":
                sign = -1 if ch == "-" else 1
            else:
                row["xyz".index(ch)] += sign
                sign = 1
        rows.append(row)
    return np.array(rows).T


_GENERATORS = {
    "-1": (),
    "2/m": ("-x,y,-z",),
    "mmm": ("-x,y,-z", "x,-y,-z"),
    "4/m": ("-y,x,z",),
    "4/mmm": ("-y,x,z", "x,-y,-z"),
    "-3": ("-y,x-y,z",),
    "-3m": ("-y,x-y,z", "y,x,-z"),
    "6/m": ("x-y,x,z",),
    "6/mmm": ("x-y,x,z", "y,x,-z"),
    "m-3": ("z,x,y", "-x,y,-z", "x,-y,-z"),
    "m-3m": ("z,x,y", "-y,x,z", "x,-y,-z"),
}


def laue_rotations(laue: str) -> np.ndarray:
    """Proper rotations of a Laue class, int (M, 3, 3), to apply as ``hkl @ rotation``."""
    if laue not in _GENERATORS:
        raise ConfigurationError(f"asked for Laue class {laue!r}; known are "
                                 f"{sorted(_GENERATORS)}; name one of them")
    generators = [_axis_rotation(text) for text in _GENERATORS[laue]]
    group = [np.eye(3, dtype=int)]
    fresh = list(group)
    while fresh:
        found = []
        for left, right in itertools.product(fresh, generators):
            product = left @ right
            if not any(np.array_equal(product, known) for known in group):
                group.append(product)
                found.append(product)
        fresh = found
    return np.array(group)


def reflection_rotations(laue: str) -> np.ndarray:
    """As :func:`laue_rotations`, in the setting that reflections of space groups have.

    The two agree but for trigonal and hexagonal classes, where :func:`laue_rotations` has the
    transposed matrices: what it calls equivalent has not the same |q|.  Made-up intensities keep
    it, since models were trained on them and one still does not show which spots are equivalent.
    """
    return laue_rotations(laue).transpose(0, 2, 1)


def _present(hkl_N3: np.ndarray, centring: str) -> np.ndarray:
    h, k, m = hkl_N3.T
    if centring == "A":
        return (k + m) % 2 == 0
    if centring == "C":
        return (h + k) % 2 == 0
    if centring == "I":
        return (h + k + m) % 2 == 0
    if centring == "F":
        return ((h + k) % 2 == 0) & ((k + m) % 2 == 0)
    if centring == "R":
        return (-h + k + m) % 3 == 0
    return np.ones(len(hkl_N3), bool)


def _canonical_key(hkl_N3: np.ndarray, rotations_M33: np.ndarray) -> np.ndarray:
    """One int64 per set that rotations and Friedel's law make equivalent."""
    hkl = hkl_N3.astype(np.float64)
    best = np.full(len(hkl), -1, np.int64)
    weights = np.array([4.0 * _HALF_RANGE ** 2, 2.0 * _HALF_RANGE, 1.0])
    origin = _HALF_RANGE * weights.sum()
    for rotation in rotations_M33:
        # key is linear in (h, k, l): one dot product per operation, Friedel mate = sign flip
        key = np.abs(hkl @ (rotation @ weights)) + origin
        np.maximum(best, key.astype(np.int64), out=best)
    return best


def _hash_uniform(key_N: np.ndarray, seed: int) -> np.ndarray:
    """splitmix64 of key and seed -> float64 in (0, 1)."""
    with np.errstate(over="ignore"):
        z = key_N.astype(np.uint64) + np.uint64(seed % 2**63) * np.uint64(0x9E3779B97F4A7C15)
        z = (z + np.uint64(0x9E3779B97F4A7C15))
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) * 2.0 ** -53 + 2.0 ** -54


def intensities(hkl_N3: np.ndarray, crystal: Crystal) -> np.ndarray:
    """|F|^2 / <|F|^2> of integer ``hkl_N3``: Exp(1) distributed, symmetric, 0 where absent."""
    hkl = np.asarray(hkl_N3)
    value = -np.log(_hash_uniform(_canonical_key(hkl, laue_rotations(crystal.laue)),
                                   crystal.structure_seed))
    return np.where(_present(np.rint(hkl).astype(int), crystal.centring), value, 0.0)


def protein_shape(crystal: Crystal) -> tuple[float, float]:
    """(depth of the dip near 6 A, height of the bump near 4.5 A) of :func:`wilson_intensities`."""
    shape = np.random.default_rng([crystal.structure_seed, 7])
    return shape.uniform(0.3, 0.8), shape.uniform(0.2, 0.9)


def _protein_profile(q2_N: np.ndarray, crystal: Crystal) -> np.ndarray:
    """Mean intensity against resolution: solvent dip near 6 A, bump near 4.5 A, then exp(-2Bs^2).

    Depth and width vary with the structure seed.  1 at very low angle.
    """
    dip, bump = protein_shape(crystal)
    q = np.sqrt(q2_N)
    mean = 1.0 - dip * np.exp(-(((q - 1 / 6.2) / 0.035) ** 2))
    mean += bump * np.exp(-(((q - 1 / 4.4) / 0.04) ** 2))
    return mean * np.exp(-2.0 * crystal.wilson_B_A2 * q2_N / 4.0)


def wilson_intensities(hkl_N3: np.ndarray, q2_N: np.ndarray, crystal: Crystal) -> np.ndarray:
    """|F|^2 with the mean intensity of a protein crystal: what :func:`reflections` tabulates."""
    return intensities(hkl_N3, crystal) * _protein_profile(q2_N.astype(np.float64), crystal)


def amplitudes_from_model(path: Path | str, d_min_A: float, b_A2: float = 10.0,
                          ) -> tuple[np.ndarray, np.ndarray, tuple[float, ...]]:
    """(hkl int (N, 3), |F| (N,), cell) of a PDB/mmCIF model by gemmi (density -> FFT).

    All atoms at the same B of ``b_A2``; no bulk solvent.  Asymmetric-unit reflections to
    ``d_min_A``.  Raises MissingDependency without gemmi.
    """
    from xfel_classify.core import MissingDependency
    try:
        import gemmi
    except ImportError as error:
        raise MissingDependency("structure factors of a model were asked for; gemmi is not "
                                "installed; pip install gemmi") from error
    structure = gemmi.read_structure(str(path))
    structure.remove_hydrogens()
    for model in structure:
        for chain in model:
            for residue in chain:
                for atom in residue:
                    atom.b_iso = b_A2
    density = gemmi.DensityCalculatorX()
    density.d_min = d_min_A
    density.grid.setup_from(structure)
    # atoms are blurred on the grid and sharpened after: sharp ones would alias by 10 %
    density.set_refmac_compatible_blur(structure[0])
    density.put_model_density_on_grid(structure[0])
    grid = gemmi.transform_map_to_f_phi(density.grid)
    asu = grid.prepare_asu_data(dmin=d_min_A, unblur=density.blur)
    return (np.array(asu.miller_array), np.abs(np.array(asu.value_array)),
            tuple(structure.cell.parameters))


def reflections(crystal: Crystal, d_min_A: float, limit: int = 600_000) -> Reflections:
    """All present reflections to ``d_min_A`` (coarser when more than ``limit`` would result)."""
    basis = reciprocal_basis(crystal.cell)
    share = _ABSENT_SHARE[crystal.centring]
    count = volume_A3(crystal.cell) * share * 4.189 / d_min_A ** 3
    q_max = (min(1.0, limit / count) ** (1 / 3)) / d_min_A
    direct = np.linalg.inv(basis)
    # |h| <= |a| q_max, one axis at a time; rows of the direct matrix are a, b, c
    spans = [min(int(q_max * np.linalg.norm(row)), _HALF_RANGE - 1) for row in direct]
    h, k, m = np.meshgrid(*(np.arange(-n, n + 1, dtype=np.int16) for n in spans), indexing="ij")
    hkl = np.stack([h.ravel(), k.ravel(), m.ravel()], axis=1)
    q2 = np.zeros(len(hkl), np.float32)
    metric = basis.T @ basis
    hkl_f = hkl.astype(np.float32)
    q2 = np.einsum("ni,ni->n", hkl_f @ metric.astype(np.float32), hkl_f)
    keep = (q2 > 1e-7) & (q2 <= q_max ** 2) & _present(hkl, crystal.centring)
    hkl_f, q2 = hkl_f[keep], q2[keep]
    order = np.argsort(q2, kind="stable")
    hkl_f, q2 = hkl_f[order], q2[order]
    if crystal.model:
        value = _model_intensities(hkl_f, crystal, d_min_A)
    else:
        value = wilson_intensities(hkl_f, q2, crystal)
    return Reflections(np.ascontiguousarray(hkl_f), q2, value.astype(np.float32), basis)


def _model_intensities(hkl_N3: np.ndarray, crystal: Crystal, d_min_A: float) -> np.ndarray:
    index_M3, amplitude_M, _ = amplitudes_from_model(
        crystal.model, 0.999 * d_min_A, crystal.wilson_B_A2)     # with those on the edge
    rotations = reflection_rotations(crystal.laue)
    known = _canonical_key(index_M3, rotations)
    order = np.argsort(known)
    known = known[order]
    wanted = _canonical_key(hkl_N3, rotations)
    place = np.clip(np.searchsorted(known, wanted), 0, len(known) - 1)
    value = np.where(known[place] == wanted, amplitude_M[order][place] ** 2, 0.0)
    low = value[: max(len(value) // 50, 20)]
    return value / max(low.mean(), 1e-30)


def draw_crystal(rng: np.random.Generator, axes_A: tuple[float, float] = (30.0, 150.0)) -> Crystal:
    """A random crystal form: any lattice type, axes log-uniform within ``axes_A``."""
    names = list(LATTICES)
    chance = np.array([LATTICES[n][2] for n in names])
    name = names[int(rng.choice(len(names), p=chance / chance.sum()))]
    groups, centrings, _ = LATTICES[name]
    laue = groups[int(rng.integers(len(groups)))]
    centring = centrings[int(rng.integers(len(centrings)))]
    a, b, c = np.exp(rng.uniform(np.log(axes_A[0]), np.log(axes_A[1]), 3))
    angles = [90.0, 90.0, 90.0]
    if name == "triclinic":
        angles = list(rng.uniform(70, 110, 3))
    elif name == "monoclinic":
        angles[1] = rng.uniform(91, 120)
    elif name == "tetragonal":
        b = a
    elif name in ("trigonal", "hexagonal"):
        b, angles[2] = a, 120.0
        centring = centring if name == "trigonal" else "P"
    elif name == "cubic":
        b = c = a
    return Crystal(
        cell=(float(a), float(b), float(c), float(angles[0]), float(angles[1]),
              float(angles[2])), laue=laue,
        centring=centring, structure_seed=int(rng.integers(2**31)),
        domain_A=float(np.exp(rng.uniform(np.log(350), np.log(1500)))),
        mosaicity_deg=float(np.exp(rng.uniform(np.log(0.02), np.log(0.5)))))


def random_rotation(rng: np.random.Generator) -> np.ndarray:
    """A rotation matrix uniform over all orientations (unit quaternion of normal numbers)."""
    w, x, y, z = (lambda q: q / np.linalg.norm(q))(rng.standard_normal(4))
    return np.array([
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)]])


def rotation_about(axis_3: np.ndarray, angle_rad: float) -> np.ndarray:
    """Rotation by ``angle_rad`` about ``axis_3`` (any length)."""
    x, y, z = axis_3 / np.linalg.norm(axis_3)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle_rad) * cross + (1 - np.cos(angle_rad)) * (cross @ cross)
