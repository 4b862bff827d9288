"""CrystFEL geometry files: read through cfelpyutils, written for this package's CXI layout.

In a ``.geom`` file a panel is a rectangle of the stored array; ``corner_x``, ``corner_y`` (pixels)
are the outer corner of its first pixel, so that pixel's centre is corner + fs/2 + ss/2; ``res`` is
pixels per metre; the frame is the laboratory frame of :mod:`xfel_classify.core`.
(White et al. 2012, J. Appl. Cryst. 45, 335; ``man crystfel_geometry``.)
"""
from __future__ import annotations

import io
import logging
import math
import re
from typing import Any

import numpy as np

from ..core import Geometry, GeometryError, MissingDependency, Panel
from .cspad import SENSORS, SLAB_SHAPE, panels_from_slab
from .detector import detector

__all__ = ["fit_panels", "read_crystfel_geometry", "write_crystfel_geom"]

log = logging.getLogger(__name__)
_UNITS = re.compile(r"^(\s*(?:\S+/)?)(photon_energy|clen|wavelength)\s*=\s*"
                    r"([-+.\deE]*\d\.?)\s*(eV|keV|MeV|mm|m|A)?[ \t]*(?=;|$)", re.MULTILINE)
_VECTOR = re.compile(r"^(\s*(?:\S+/)?(?:fs|ss))\s*=([^;\n]*)", re.MULTILINE)
_TERM = re.compile(r"([-+]?)\s*(\d*\.?\d*(?:[eE][-+]?\d+)?)\s*([xyz])")
_FACTORS = {"eV": 1.0, "keV": 1e3, "MeV": 1e6, "m": 1.0, "mm": 1e-3, "A": 1e-10, "": 1.0}
HC_EV_M = 1.239841984e-6
_NO_INDEX = re.compile(r"^\s*(?:(\S+)/)?no_index\s*=\s*([^\s;]+)", re.MULTILINE)


# --- reading ------------------------------------------------------------------------------------

def read_crystfel_geometry(text: str, panel_shape: tuple[int, ...] | None = None, kind: str = "",
                           name: str = "") -> Geometry:
    """Geometry from the text of a ``.geom`` file, laid out as frames of ``panel_shape``.

    ``panel_shape`` is (P, S, F) or (S, F); None takes the layout of the file, cut into panels
    when ``kind`` has a known panel shape.  The stored array of the file may have another shape as
    long as its elements lie in the same order: a slab (P*S, F), or one plane per panel
    (``dim1 = 3``).  Cheetah's CSPAD slab (1480, 1552) is reordered.  ``bad_PSF`` holds the bad
    regions, ``no_index`` panels and pixels in no panel; those have position 0.

    ``z_m_PSF`` is relative to ``distance_m`` = ``clen`` + median ``coffset``; where ``clen`` names
    a place in the data file, ``distance_m`` is None and ``z_m_PSF`` is ``coffset``, to be added to
    that value.  Raises :class:`GeometryError` when the file cannot be parsed or does not fit.
    """
    try:
        from cfelpyutils.geometry import load_crystfel_geometry
    except ImportError as error:
        raise MissingDependency(
            f"CrystFEL geometry {name or 'text'} was to be read; cfelpyutils cannot be imported "
            f"({error}); install it with 'pip install cfelpyutils'") from error
    try:
        parsed = load_crystfel_geometry(io.StringIO(_plainer(text)))
    except (RuntimeError, ValueError, KeyError, IndexError, TypeError, ZeroDivisionError,
            AttributeError, SystemExit) as error:
        raise GeometryError(
            f"a CrystFEL geometry was expected in {name or 'the text given'}; cfelpyutils says "
            f"{type(error).__name__}: {error}; correct the file") from error
    found = parsed.detector["panels"]
    if not found:
        raise GeometryError(
            f"a CrystFEL geometry was expected in {name or 'the text given'}; it has no panel; "
            "check that the file is complete")
    return _Layout(found, parsed.detector["bad"], _not_indexed(text, found), name).geometry(
        parsed.beam, panel_shape, kind)


def _plainer(text: str) -> str:
    """The same geometry in the words that cfelpyutils reads right.

    It knows no units; and it keeps of a vector what a line does not name, so that ``fs = -y``
    would become (1, -1, 0): vectors get all three components here.
    """
    def vector(found: re.Match[str]) -> str:
        terms = _TERM.findall(found[2])
        if not terms or _TERM.sub("", found[2]).strip():
            return found[0]                 # nothing known: left for the parser to refuse
        sums = dict.fromkeys("xyz", 0.0)
        for sign, number, axis in terms:
            sums[axis] += float(f"{sign}{number or 1}")
        return f"{found[1]} = " + " ".join(f"{v:+.15f}{axis}" for axis, v in sums.items())

    def plain(found: re.Match[str]) -> str:
        panel, key, number, unit = found.groups()
        value = float(number) * _FACTORS[unit or ""]
        if key == "wavelength":
            return f"{panel}photon_energy = {HC_EV_M / value:.12g}"
        return f"{panel}{key} = {value:.12g}"

    return _VECTOR.sub(vector, _UNITS.sub(plain, text))


def _not_indexed(text: str, panels: dict[str, Any]) -> set[str]:
    """Panels with ``no_index`` set; cfelpyutils takes "0" for true, so it is read here."""
    off: dict[str, bool] = {}
    for panel, value in _NO_INDEX.findall(text):
        is_off = value.strip().lower() not in ("0", "false", "no")
        for one in [panel] if panel else list(panels):
            off[one] = is_off
    return {panel for panel, is_off in off.items() if is_off}


class _Layout:
    """The stored array of a ``.geom`` file as (planes, ss, fs), filled panel by panel."""

    def __init__(self, panels: dict[str, Any], regions: dict[str, Any], not_indexed: set[str],
                 name: str) -> None:
        self.panels, self.regions, self.not_indexed, self.name = panels, regions, not_indexed, name
        fixed = {key: tuple(d for d in (p["dim_structure"] or []) if isinstance(d, int))
                 for key, p in panels.items()}
        if len({len(f) for f in fixed.values()}) != 1:
            raise GeometryError(
                f"panels of a CrystFEL geometry should be stored alike; in {name or 'the text'} "
                "some have more fixed dimensions (dimN = number) than others; correct the file")
        self.extents = tuple(np.max(list(fixed.values()), axis=0).astype(int) + 1)
        self.plane = {key: int(np.ravel_multi_index(f, self.extents)) if f else 0
                      for key, f in fixed.items()}
        self.shape = (int(np.prod(self.extents, dtype=int)),
                      max(p["orig_max_ss"] for p in panels.values()) + 1,
                      max(p["orig_max_fs"] for p in panels.values()) + 1)

    def geometry(self, beam: Any, panel_shape: tuple[int, ...] | None, kind: str) -> Geometry:
        xyz, bad = self._positions()
        shape = self._target(panel_shape, kind)
        permuted = self.shape[1:] == SLAB_SHAPE and shape == (32, 185, 388)

        def arranged(stored: np.ndarray, fill: Any) -> np.ndarray:
            if permuted:
                return panels_from_slab(stored[0])
            flat = np.full(int(np.prod(shape)), fill, stored.dtype)
            flat[:stored.size] = stored.ravel()
            return flat.reshape(shape)

        first = next(iter(self.panels.values()))
        clen = float(first["clen"]) if not first["clen_from"] else math.nan
        offset, distance = 0.0, None
        if math.isfinite(clen):
            offset = float(np.median([p["coffset"] for p in self.panels.values()]))
            distance = round(clen + offset, 9)
        panels = tuple(piece for key, p in self.panels.items()
                       for piece in self._pieces(key, p, shape, permuted, offset))
        energy = float(beam["photon_energy"]) * float(beam["photon_energy_scale"] or 1.0)
        energy = 0.0 if beam["photon_energy_from"] else energy
        bad_PSF = arranged(bad, True)
        xyz[2][~bad] -= offset
        x_m, y_m, z_m = (arranged(axis, 0.0).astype(np.float32) for axis in xyz)
        return Geometry(
            x_m, y_m, z_m,
            pixel_size_m=1.0 / first["res"], panels=panels, distance_m=distance,
            photon_energy_eV=energy if energy > 0 else None,
            bad_PSF=bad_PSF if bad_PSF.any() else None, name=self.name)

    def _positions(self) -> tuple[np.ndarray, np.ndarray]:
        xyz, bad = np.zeros((3, *self.shape)), np.ones(self.shape, bool)
        for key, p in self.panels.items():
            if not (p["res"] > 0):
                raise GeometryError(
                    f"every panel of a CrystFEL geometry needs 'res' (pixels per metre); panel "
                    f"{key} of {self.name or 'the text'} has {p['res']}; add it to the file")
            there = (self.plane[key], slice(p["orig_min_ss"], p["orig_max_ss"] + 1),
                     slice(p["orig_min_fs"], p["orig_max_fs"] + 1))
            ss = np.arange(p["h"])[:, None] + 0.5
            fs = np.arange(p["w"])[None, :] + 0.5
            px = [p["cnx"] + fs * p["fsx"] + ss * p["ssx"],
                  p["cny"] + fs * p["fsy"] + ss * p["ssy"], fs * p["fsz"] + ss * p["ssz"]]
            for axis in range(3):
                xyz[(axis, *there)] = px[axis] / p["res"] + (p["coffset"] if axis == 2 else 0.0)
            bad[there] = key in self.not_indexed
            for region in self.regions.values():
                if region["panel"] not in ("", None, key):
                    continue
                if region["is_fsss"]:
                    s, f = ss + p["orig_min_ss"] - 0.5, fs + p["orig_min_fs"] - 0.5
                    low, high = ("min_ss", "min_fs"), ("max_ss", "max_fs")
                else:
                    s, f, low, high = px[1], px[0], ("min_y", "min_x"), ("max_y", "max_x")
                bad[there] |= ((s >= region[low[0]]) & (s <= region[high[0]])
                               & (f >= region[low[1]]) & (f <= region[high[1]]))
        return xyz, bad

    def _target(self, panel_shape: tuple[int, ...] | None, kind: str) -> tuple[int, int, int]:
        planes, ss, fs = self.shape
        if panel_shape is None:
            known = detector(kind).panel_shape_SF if kind else None
            if (ss, fs) == SLAB_SHAPE:
                return 32, 185, 388
            if known is not None and known[1] == fs and ss % known[0] == 0:
                return planes * ss // known[0], known[0], fs
            return self.shape
        p, s, f = (int(np.prod(panel_shape[:-2], dtype=int)), *panel_shape[-2:])
        if (ss, fs) == SLAB_SHAPE and (p, s, f) == (32, 185, 388):
            return p, s, f
        fits = fs == f and (planes * ss == p * s or (planes == 1 and ss < p * s)
                            or (ss == s and planes < p))
        if not fits:
            raise GeometryError(
                f"geometry {self.name or ''} was to describe frames of {tuple(panel_shape)}; its "
                f"panels fill an array of {self.shape}; use the geometry made for this detector")
        if planes * ss < p * s:
            log.warning("geometry %s covers %d of %d rows; the rest of the frame is masked",
                        self.name, planes * ss, p * s)
        return p, s, f

    def _pieces(self, key: str, p: Any, shape: tuple[int, int, int], permuted: bool,
                offset: float) -> list[Panel]:
        """The file's panel, cut where it crosses planes of the (P, S, F) array."""
        pieces: list[Panel] = []
        size = 1.0 / p["res"]
        fs = np.array([p["fsx"], p["fsy"], p["fsz"]]) * size
        ss = np.array([p["ssx"], p["ssy"], p["ssz"]]) * size
        corner = np.array([p["cnx"] * size, p["cny"] * size, p["coffset"] - offset])
        first_fs, planes_before = p["orig_min_fs"], self.plane[key] * self.shape[1]
        row, last = p["orig_min_ss"], p["orig_max_ss"]
        while row <= last:
            index, s = divmod(planes_before + row, shape[1])
            rows = min(last - row + 1, shape[1] - s)
            min_fs = first_fs
            if permuted:
                index, min_fs = first_fs // 388 * SENSORS + index, first_fs % 388
            here = corner + (row - p["orig_min_ss"]) * ss
            pieces.append(Panel(
                name=key if rows == p["h"] else f"{key}r{len(pieces)}", index=index, min_ss=s,
                max_ss=s + rows - 1, min_fs=min_fs, max_fs=min_fs + p["w"] - 1,
                corner_m=_triple(here), fs_m=_triple(fs), ss_m=_triple(ss)))
            row += rows
        return pieces


def _triple(vector: np.ndarray) -> tuple[float, float, float]:
    return float(vector[0]), float(vector[1]), float(vector[2])


# --- writing ------------------------------------------------------------------------------------

def fit_panels(geometry: Geometry, tolerance_px: float = 0.02) -> tuple[Panel, ...]:
    """One flat panel per plane of the array, fitted to the pixel positions.

    Raises :class:`GeometryError` where a plane is not flat and regular to ``tolerance_px``.
    """
    panels = []
    _, n_s, n_f = geometry.shape
    s, f = np.meshgrid(np.arange(n_s) + 0.5, np.arange(n_f) + 0.5, indexing="ij")
    design = np.stack([np.ones(s.size), s.ravel(), f.ravel()], axis=1)
    inverse = np.linalg.pinv(design)
    xyz = (geometry.x_m_PSF, geometry.y_m_PSF, geometry.z_m_PSF)
    for p in range(geometry.shape[0]):
        seen = np.stack([axis[p].ravel().astype(float) for axis in xyz], axis=1)
        fitted = inverse @ seen
        worst = np.abs(design @ fitted - seen).max() / geometry.pixel_size_m
        if worst > tolerance_px:
            raise GeometryError(
                f"a CrystFEL geometry was to be written; panel {p} of {geometry.name or 'it'} is "
                f"not one flat piece (off by {worst:.2f} pixels); give the geometry its panels")
        panels.append(Panel(f"p{p}", p, 0, n_s - 1, 0, n_f - 1, _triple(fitted[0]),
                            _triple(fitted[2]), _triple(fitted[1])))
    return tuple(panels)


def write_crystfel_geom(geometry: Geometry, *, unit: str = "keV", adu_per_eV: float | None = None,
                        clen: str | float | None = None,
                        photon_energy: str | float = "/LCLS/photon_energy_eV",
                        data: str = "/entry_1/data_1/data",
                        mask: str | None = "/entry_1/data_1/mask",
                        peak_list: str | None = "/entry_1/result_1",
                        comments: tuple[str, ...] = ()) -> str:
    """Text of a ``.geom`` file for frames stored as (events, P*S, F).

    ``unit`` is that of the stored values: keV (0.001 "ADU" per eV), photon (1 per photon), or ADU
    with ``adu_per_eV``.  ``clen`` is a length in metres or a place in the data file; None takes
    ``geometry.distance_m``, or ``/LCLS/detector_1/EncoderValue`` where that is unknown.  The mask
    is 0 where good.  ``comments`` become lines at the top.

    Raises :class:`GeometryError` when the geometry has no panels and its planes are not flat.
    """
    panels = geometry.panels or fit_panels(geometry)
    size, rows = geometry.pixel_size_m, geometry.shape[1]
    if clen is None:
        clen = "/LCLS/detector_1/EncoderValue" if geometry.distance_m is None \
            else geometry.distance_m
    scale = {"keV": "adu_per_eV = 0.001", "photon": "adu_per_photon = 1"}.get(
        unit, f"adu_per_eV = {adu_per_eV or 1.0:.9g}")
    lines = [f"; {comment}" for comment in comments]
    lines += [f"photon_energy = {_value(photon_energy)}", scale, f"clen = {_value(clen)}",
              f"res = {1.0 / size:.12g}", "", f"data = {data}", "dim0 = %", "dim1 = ss",
              "dim2 = fs"]
    if mask:
        lines += ["", f"mask = {mask}", "mask_good = 0x0000", "mask_bad = 0xffff"]
    if peak_list:
        lines += ["", f"peak_list = {peak_list}", "peak_list_type = cxi"]
    modules: dict[int, list[str]] = {}
    for panel in panels:
        modules.setdefault(panel.index, []).append(panel.name)
    lines += [""] + [f"rigid_group_m{i} = {','.join(names)}" for i, names in modules.items()]
    lines += ["rigid_group_collection_modules = " + ",".join(f"m{i}" for i in modules)]
    for panel in panels:
        first = panel.index * rows
        name = panel.name
        lines += ["",
                  f"{name}/min_fs = {panel.min_fs}", f"{name}/max_fs = {panel.max_fs}",
                  f"{name}/min_ss = {first + panel.min_ss}",
                  f"{name}/max_ss = {first + panel.max_ss}",
                  f"{name}/fs = {_vector(panel.fs_m, size)}",
                  f"{name}/ss = {_vector(panel.ss_m, size)}",
                  f"{name}/corner_x = {panel.corner_m[0] / size:.9f}",
                  f"{name}/corner_y = {panel.corner_m[1] / size:.9f}",
                  f"{name}/coffset = {panel.corner_m[2]:.9f}"]
    return "\n".join(lines) + "\n"


def _value(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.12g}"


def _vector(step_m: tuple[float, float, float], size: float) -> str:
    return " ".join(f"{step / size:+.12f}{axis}" for step, axis in zip(step_m, "xyz", strict=True)
                    if axis != "z" or abs(step / size) > 1e-12)
