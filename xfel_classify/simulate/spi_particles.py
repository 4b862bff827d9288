"""Particles of single-particle imaging: atoms of real entries, packaged stand-ins, synthetic ones.

Three origins, in this order: a file of the user's directory (PDB or mmCIF, expanded to its first
biological assembly), a stand-in that the package carries, a shape made up from carbon atoms.  Which
one it was is part of the particle, and data sets say so.

Axes: N atom, 3 = (x, y, z) in angstrom.
"""
from __future__ import annotations

import functools
import hashlib
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from ..core import ConfigurationError, MissingDependency

__all__ = ["SPI_PARTICLES", "SPI_UNSEEN", "STAND_INS", "STRUCTURES_VARIABLE", "Particle",
           "find_structure", "load_particle", "pack_particle", "packaged_particle",
           "read_structure", "structure_directory"]

log = logging.getLogger(__name__)

SPI_PARTICLES: tuple[str, ...] = ("1fpv", "1ss8", "3j03", "1ijg", "3iyf", "6ody", "6sp2", "6xs6",
                                  "7dwz", "7dx8", "7dx9")
"""The eleven particles of the published set, in class order (methods section 1a)."""

SPI_UNSEEN: tuple[str, ...] = ("1igy", "2cex", "6m0j", "1ihm", "3j6r")
"""Particles that no network is trained with: they test the answer "unknown"."""

STAND_INS: dict[str, str] = {
    "1fpv": "1rb8", "1ss8": "groel14_1oel", "3j03": "cpn16_closed_like", "1ijg": "connector",
    "3iyf": "cpn16_open_like", "6ody": "rosette", "6sp2": "1ei7", "6xs6": "spike_closed",
    "7dwz": "spike_1up", "7dx8": "spike_1up_1ace2", "7dx9": "spike_1up_1ace2_tilt45",
    **{name: name for name in SPI_UNSEEN},
}
"""wanted entry -> what the package has in its place (methods section 7.1)."""

STRUCTURES_VARIABLE = "XFEL_CLASSIFY_STRUCTURES"
SUFFIXES = (".pdb", ".ent", ".cif", ".mmcif")
UNIT_A = 0.05           # of packaged coordinates: their error is invisible at 10 A and coarser
_FOLDER = "particles"


@dataclass(frozen=True)
class Particle:
    """Atoms about their mean position, where rotations turn them.

    ``atoms_N3`` float32 in angstrom; ``number_N`` uint8 atomic numbers; ``weight_N`` float32
    occupancies; ``origin_3`` the mean position in the file.  ``name`` is what was asked for,
    ``source`` what it is: a file name, the name of a stand-in, or of a synthetic shape;
    ``stand_in`` is False for the entry itself.
    """

    name: str
    source: str
    stand_in: bool
    atoms_N3: np.ndarray = field(repr=False)
    number_N: np.ndarray = field(repr=False)
    weight_N: np.ndarray = field(repr=False)
    origin_3: np.ndarray = field(repr=False, default_factory=lambda: np.zeros(3))

    @functools.cached_property
    def radius_A(self) -> float:
        """Largest distance of an atom from the mean position."""
        return float(np.sqrt((self.atoms_N3.astype(np.float64) ** 2).sum(1).max()))

    @functools.cached_property
    def gyration_A(self) -> float:
        """Radius of gyration, atoms weighted by their electrons."""
        weight = self.weight_N.astype(np.float64) * self.number_N
        r = self.atoms_N3 - (weight @ self.atoms_N3) / weight.sum()
        return float(np.sqrt((weight * (r ** 2).sum(1)).sum() / weight.sum()))

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 over coordinates, elements and occupancies: names a volume in the cache."""
        one = hashlib.sha256(self.atoms_N3.tobytes())
        one.update(self.number_N.tobytes())
        one.update(self.weight_N.tobytes())
        return one.hexdigest()


def structure_directory(structures: str | Path | None = None) -> Path | None:
    """The directory of real entries: ``structures``, else ``$XFEL_CLASSIFY_STRUCTURES``, or None.

    Raises :class:`ConfigurationError` when the one that is named is no directory.
    """
    named = structures if structures is not None else os.environ.get(STRUCTURES_VARIABLE) or None
    if named is None:
        return None
    path = Path(named).expanduser()
    if not path.is_dir():
        raise ConfigurationError(
            f"structures were asked for in {path}; there is no such directory; name one with PDB "
            f"or mmCIF files, or leave it out (and {STRUCTURES_VARIABLE} unset) for stand-ins")
    return path


def find_structure(name: str, directory: Path) -> Path | None:
    """The file of an entry: ``1abc.pdb``, ``.cif``, ``pdb1abc.ent``, upper case, gzip, or the same
    in the two-letter folders of a PDB mirror (``ab/``)."""
    stems = (name, name.upper(), f"pdb{name}")
    for folder in (directory, directory / name[1:3]):
        for stem in stems:
            for suffix in SUFFIXES:
                for end in ("", ".gz"):
                    path = folder / f"{stem}{suffix}{end}"
                    if path.is_file():
                        return path
    return None


def load_particle(name: str, structures: str | Path | None = None) -> Particle:
    """The particle called ``name``: an entry of ``structures``, else its stand-in.

    ``name`` may also be a stand-in's own name or the path of a file.  Entries that the directory
    lacks are replaced with a warning.  Raises :class:`UnknownComponent` for a name that is neither.
    """
    directory = structure_directory(structures)
    return _load(name, None if directory is None else str(directory.resolve()))


def packaged_particle(name: str) -> Particle:
    """The stand-in of ``name``, whatever entries the user has."""
    return _load(name, None)


@functools.lru_cache(maxsize=32)
def _load(name: str, directory: str | None) -> Particle:
    if os.sep in name or name.endswith((".gz", *SUFFIXES)):
        return read_structure(name)
    if directory is not None:
        path = find_structure(name, Path(directory))
        if path is not None:
            return read_structure(path, name=name)
        if name in SPI_PARTICLES or name in SPI_UNSEEN:
            log.warning("no file of entry %s is in %s: its stand-in %s is used", name, directory,
                        STAND_INS[name])
    source = STAND_INS.get(name, name)
    made = {"connector": _connector, "rosette": _rosette}.get(source)
    if made is not None:
        atoms = made()
        number = np.full(len(atoms), 6, np.uint8)
        weight = np.ones(len(atoms), np.float32)
    else:
        atoms, number, weight = _packaged(source)
    return _centred(name, source, source != name, atoms, number, weight)


def _centred(name: str, source: str, stand_in: bool, atoms_N3: np.ndarray, number_N: np.ndarray,
             weight_N: np.ndarray) -> Particle:
    origin_3 = atoms_N3.mean(0, dtype=np.float64)
    return Particle(name, source, stand_in, (atoms_N3 - origin_3).astype(np.float32), number_N,
                    weight_N, origin_3)


# --- files ----------------------------------------------------------------------------------------

def read_structure(path: str | Path, *, name: str = "") -> Particle:
    """Atoms of a PDB or mmCIF file (also gzip), expanded to the first biological assembly.

    Waters are left out; alternative positions count with their occupancy.  Raises
    :class:`MissingDependency` without gemmi, :class:`ConfigurationError` for a file without atoms.
    """
    try:
        import gemmi
    except ImportError as error:
        raise MissingDependency(f"the structure {path} was asked for; gemmi, which reads it, is "
                                "not installed; pip install gemmi") from error
    path = Path(path)
    try:
        structure = gemmi.read_structure(str(path))
    except (RuntimeError, ValueError, OSError) as error:
        raise ConfigurationError(f"{path} was asked for as a structure; gemmi cannot read it "
                                 f"({error}); give a PDB or mmCIF file") from error
    structure.setup_entities()
    structure.remove_waters()
    if len(structure) == 0:
        raise ConfigurationError(f"{path} was asked for as a structure; it has no model; give a "
                                 "PDB or mmCIF file with atoms")
    table = [(*atom.pos.tolist(), atom.element.atomic_number, atom.occ, chain.name)
             for chain in structure[0] for residue in chain for atom in residue]
    if not table:
        raise ConfigurationError(f"{path} was asked for as a structure; it has no atoms; give a "
                                 "PDB or mmCIF file with atoms")
    atoms = np.array([row[:3] for row in table])
    number = np.array([row[3] for row in table], np.uint8)
    weight = np.array([row[4] for row in table], np.float32)
    chains = np.array([row[5] for row in table])
    atoms, number, weight = _assembled(structure, atoms, number, weight, chains)
    stem = path.name.split(".")[0].lower().removeprefix("pdb")
    return _centred(name or stem, path.name, False, atoms, number, weight)


def _assembled(structure: Any, atoms: np.ndarray, number: np.ndarray, weight: np.ndarray,
               chains: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The first assembly of the file (REMARK 350 or _pdbx_struct_assembly), else all atoms."""
    if not structure.assemblies:
        return atoms, number, weight
    subchains = {sub.subchain_id(): chain.name for chain in structure[0]
                 for sub in chain.subchains()}
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    for generator in structure.assemblies[0].generators:
        wanted = set(generator.chains) | {subchains.get(s, s) for s in generator.subchains}
        chosen = np.isin(chains, sorted(wanted)) if wanted else np.ones(len(chains), bool)
        where = np.flatnonzero(chosen)
        for operator in generator.operators:
            rotation = np.array(operator.transform.mat.tolist())
            shift = np.array(operator.transform.vec.tolist())
            parts.append((atoms[where] @ rotation.T + shift, where))
    if not sum(len(where) for _, where in parts):
        return atoms, number, weight
    index = np.concatenate([where for _, where in parts])
    return np.concatenate([moved for moved, _ in parts]), number[index], weight[index]


# --- packaged stand-ins ---------------------------------------------------------------------------

def _packaged(source: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    from ..core import UnknownComponent

    place = resources.files("xfel_classify.simulate") / _FOLDER / f"{source}.npz"
    if not place.is_file():
        raise UnknownComponent(
            f"the particle {source!r} was asked for; the package has neither an entry nor a "
            f"stand-in of that name; known are {', '.join(STAND_INS)}; or give the path of a "
            "PDB or mmCIF file")
    with place.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
        step, number = file["step_N3"], file["number_N"]
        operators, percent = file["operators_M34"], file["percent_N"]
    unit = np.cumsum(step.astype(np.int32), axis=0) * UNIT_A
    atoms = np.concatenate([unit @ one[:, :3].T + one[:, 3] for one in operators])
    weight = (percent / 100).astype(np.float32)
    return atoms, np.tile(number, len(operators)), np.tile(weight, len(operators))


def pack_particle(path: Path, atoms_N3: np.ndarray, number_N: np.ndarray, weight_N: np.ndarray,
                  operators_M34: Iterable[np.ndarray] = ()) -> None:
    """Write a stand-in as the package keeps it: one unit and the operators that repeat it.

    Coordinates are rounded to 0.05 A and stored as int16 steps from atom to atom, occupancies
    ``weight_N`` in percent.
    """
    grid = np.rint(np.asarray(atoms_N3, np.float64) / UNIT_A).astype(np.int64)
    step = np.diff(grid, axis=0, prepend=np.zeros((1, 3), np.int64))
    if np.abs(step).max() > np.iinfo(np.int16).max:
        raise ConfigurationError(f"{path.name}: atoms lie too far apart to be packed; centre them")
    operators = np.array(list(operators_M34) or [np.eye(3, 4)], np.float64)
    np.savez_compressed(path, step_N3=step.astype(np.int16),
                        number_N=np.asarray(number_N, np.uint8),
                        percent_N=np.rint(100 * np.asarray(weight_N)).astype(np.uint8),
                        operators_M34=operators)


# --- synthetic shapes -----------------------------------------------------------------------------

def _filled(inside: Any, half_A: tuple[float, float, float], count: int, seed: int) -> np.ndarray:
    """``count`` points drawn uniformly from the part of a box where ``inside(x, y, z)``."""
    rng = np.random.default_rng(seed)
    found: list[np.ndarray] = []
    while sum(map(len, found)) < count:
        points = rng.uniform(-1, 1, (4 * count, 3)) * half_A
        found.append(points[inside(*points.T)])
    return np.concatenate(found)[:count]


@functools.cache
def _connector() -> np.ndarray:
    """For the phi29 connector: a hollow cone 75 A high, outer radius 33 to 69 A, bore 18 A, twelve
    lobes, 29,000 carbons."""
    def inside(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        radius, along = np.hypot(x, y), (z + 37.5) / 75.0
        outer = 33.0 + 36.0 * along ** 1.5
        lobes = outer * (1 + 0.06 * np.cos(12 * np.arctan2(y, x)))
        return (radius > 18.0) & (radius < lobes)
    return _filled(inside, (75.0, 75.0, 37.5), 29_000, 1)


@functools.cache
def _rosette() -> np.ndarray:
    """For the VacA hexamer: six curved arms about a ring, 280 A across, 55 A thick."""
    def inside(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        radius, angle = np.hypot(x, y), np.arctan2(y, x)
        bent = np.cos(6 * (angle - 0.006 * (radius - 40.0)))
        arm = bent > 0.25 + 0.5 * (radius / 140.0) ** 2
        ring = (radius > 22.0) & (radius < 52.0)
        thick = np.where(radius < 60.0, 27.5, 27.5 - 0.15 * (radius - 60.0))
        return (radius < 140.0) & (ring | (arm & (radius >= 52.0))) & (np.abs(z) < thick)
    return _filled(inside, (140.0, 140.0, 27.5), 38_000, 2)
