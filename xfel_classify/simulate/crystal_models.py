"""The crystal form of a PDB or mmCIF file: its cell, symmetry and structure factors (by gemmi)."""
from __future__ import annotations

from pathlib import Path

import numpy as np

from ..core import ConfigurationError, MissingDependency
from .crystal import CENTRINGS, Crystal, reflection_rotations

__all__ = ["crystal_of_model"]

_GENERIC = np.array([1, 2, 5])      # of no special position in any Laue class


def crystal_of_model(path: Path | str, *, domain_A: float = 500.0,
                     mosaicity_deg: float = 0.1) -> Crystal:
    """The crystal that a model describes; intensities are computed from its atoms.

    Raises :class:`MissingDependency` without gemmi, :class:`ConfigurationError` for a file that is
    no model of a crystal, and for symmetry in another setting than :mod:`.crystal` knows.
    """
    try:
        import gemmi
    except ImportError as error:
        raise MissingDependency(f"the crystal of {path} was asked for; gemmi is not installed; pip "
                                "install gemmi, or leave the model out") from error
    try:
        structure = gemmi.read_structure(str(path))
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigurationError(f"the crystal of {path} was asked for; {error}; give a PDB or "
                                 "mmCIF file") from error
    cell = structure.cell
    group = gemmi.find_spacegroup_by_name(structure.spacegroup_hm, cell.alpha, cell.gamma)
    if group is None or not structure.cell.is_crystal() or not len(structure):
        raise ConfigurationError(f"the crystal of {path} was asked for; it states no cell, no "
                                 f"atoms or no space group ({structure.spacegroup_hm or 'none'}); "
                                 "give the model of a crystal")
    laue, centring = group.laue_str(), group.centring_type()
    # which reflections are equivalent, by gemmi and by ours
    theirs = {tuple(sign * np.array(op.apply_to_hkl(_GENERIC.tolist())))
              for op in group.operations().sym_ops for sign in (1, -1)}
    ours = {tuple(sign * (_GENERIC @ turn)) for turn in reflection_rotations(laue)
            for sign in (1, -1)}
    if centring not in CENTRINGS or theirs != ours:
        raise ConfigurationError(f"the crystal of {path} was asked for; its space group {group.hm} "
                                 "is in a setting that is not simulated; give the model in the "
                                 "standard setting")
    return Crystal(cell=tuple(cell.parameters), laue=laue, centring=centring, domain_A=domain_A,
                   mosaicity_deg=mosaicity_deg, model=str(path))
