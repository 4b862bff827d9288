"""Where pixels are: reading geometries of either format, and the simple and default ones.

Everything ends in a :class:`xfel_classify.core.Geometry` in the laboratory frame: z along the
beam, y up, right-handed, the beam at x = y = 0.
"""
from __future__ import annotations

from dataclasses import replace
from importlib import resources
from pathlib import Path

import numpy as np

from ..core import Geometry, GeometryError, Panel
from .crystfel import read_crystfel_geometry
from .detector import Detector
from .psana_geometry import is_psana_geometry, read_psana_geometry

__all__ = ["assembled_geometry", "default_geometry", "flat_geometry", "read_geometry"]


def read_geometry(path_or_text: str | Path, panel_shape: tuple[int, ...] | None = None,
                  kind: str = "") -> Geometry:
    """Geometry from a file, or from its text, for frames of ``panel_shape`` (P, S, F).

    psana's ``.data`` and CrystFEL's ``.geom`` are told apart by content.  ``panel_shape`` None
    takes the layout of the file.  ``kind`` is the detector's kind.

    Raises :class:`GeometryError` (missing file, neither format, does not fit the frames).
    """
    text, name = _text(path_or_text)
    if is_psana_geometry(text):
        return _fitted(read_psana_geometry(text, name), panel_shape)
    if "=" not in text:
        raise GeometryError(
            f"a geometry was expected in {name or 'the text given'}; it is neither psana's table "
            "of 13 columns nor CrystFEL's 'key = value' lines; give one of these")
    return read_crystfel_geometry(text, panel_shape, kind, name)


def _text(path_or_text: str | Path) -> tuple[str, str]:
    if isinstance(path_or_text, str) and ("\n" in path_or_text or "=" in path_or_text
                                          and not Path(path_or_text).is_file()):
        return path_or_text, ""
    path = Path(path_or_text)
    try:
        return path.read_text(encoding="utf-8", errors="replace"), path.name
    except OSError as error:
        raise GeometryError(
            f"geometry {path} was to be read; {error.strerror or error}; check the path") from error


def _fitted(geometry: Geometry, panel_shape: tuple[int, ...] | None) -> Geometry:
    if panel_shape is None:
        return geometry
    p, s, f = (int(np.prod(panel_shape[:-2], dtype=int)), *panel_shape[-2:])
    n, rows, columns = geometry.shape
    if (p, s, f) == geometry.shape:
        return geometry
    if f != columns or p * s != n * rows:
        raise GeometryError(
            f"geometry {geometry.name or ''} was to describe frames of {tuple(panel_shape)}; it "
            f"has {n} panels of ({rows}, {columns}); use the geometry made for this detector")
    moved = []
    for panel in geometry.panels:
        plane, first = divmod(panel.index * rows + panel.min_ss, s)
        last = first + panel.max_ss - panel.min_ss
        if last >= s:
            raise GeometryError(
                f"geometry {geometry.name or ''} was to describe frames of {tuple(panel_shape)}; "
                f"its panel {panel.name} would lie on two of their planes; store whole panels")
        moved.append(replace(panel, index=plane, min_ss=first, max_ss=last))
    return replace(
        geometry, x_m_PSF=geometry.x_m_PSF.reshape(p, s, f),
        y_m_PSF=geometry.y_m_PSF.reshape(p, s, f), z_m_PSF=geometry.z_m_PSF.reshape(p, s, f),
        panels=tuple(moved))


def assembled_geometry(shape_SF: tuple[int, int], pixel_size_m: float,
                       beam_center_px: tuple[float, float] | None = None,
                       distance_m: float | None = None) -> Geometry:
    """Geometry of one flat image across the beam, row 0 on top, column 0 at lowest x.

    ``beam_center_px`` is (fast, slow) in pixels from the outer corner of the first pixel, so the
    centre of the first pixel is (0.5, 0.5); None is the middle of the image.

    Raises :class:`GeometryError` for a pixel size that is not positive.
    """
    if not pixel_size_m > 0:
        raise GeometryError(
            f"an assembled image needs its pixel size; {pixel_size_m!r} m was given; set "
            "source.pixel_size_m to a positive length in metres")
    n_s, n_f = shape_SF
    fast, slow = (n_f / 2, n_s / 2) if beam_center_px is None else beam_center_px
    x = (np.arange(n_f) + 0.5 - fast) * pixel_size_m
    y = (slow - np.arange(n_s) - 0.5) * pixel_size_m
    panel = Panel("p0", 0, 0, n_s - 1, 0, n_f - 1,
                  corner_m=(-fast * pixel_size_m, slow * pixel_size_m, 0.0),
                  fs_m=(pixel_size_m, 0.0, 0.0), ss_m=(0.0, -pixel_size_m, 0.0))
    shape = (1, n_s, n_f)
    return Geometry(
        x_m_PSF=np.broadcast_to(x[None, None, :], shape).astype(np.float32),
        y_m_PSF=np.broadcast_to(y[None, :, None], shape).astype(np.float32),
        z_m_PSF=np.zeros(shape, np.float32), pixel_size_m=pixel_size_m, panels=(panel,),
        distance_m=distance_m, name="assembled")


def flat_geometry(panel_shape: tuple[int, int, int], pixel_size_m: float,
                  distance_m: float | None = None) -> Geometry:
    """Panels below each other as one image, beam in its middle: the last resort without a file."""
    p, s, f = panel_shape
    whole = assembled_geometry((p * s, f), pixel_size_m, None, distance_m)
    return replace(_fitted(replace(whole, panels=()), panel_shape), name="flat", panels=tuple(
        replace(whole.panels[0], name=f"p{i}", index=i, max_ss=s - 1,
                corner_m=(whole.panels[0].corner_m[0], (p * s / 2 - i * s) * pixel_size_m, 0.0))
        for i in range(p)))


def default_geometry(detector: Detector, panel_count: int) -> Geometry:
    """The design geometry shipped for this kind and number of panels.

    Raises :class:`GeometryError` when none is shipped.
    """
    if panel_count not in detector.geometry:
        have = ", ".join(map(str, detector.geometry)) or "none"
        raise GeometryError(
            f"the default geometry of {detector.kind} with {panel_count} panels was asked for; "
            f"shipped are those with {have} panels; give a file with --geometry")
    name = detector.geometry[panel_count]
    text = (resources.files(__package__) / "geometry" / name).read_text(encoding="utf-8")
    return read_psana_geometry(text, name)
