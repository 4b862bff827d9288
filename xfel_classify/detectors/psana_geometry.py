"""Reads psana's text geometry (calibration type ``geometry``, files ``*.data``).

A file is a table of objects, each placed in its parent by an origin (um) and three rotations plus
three tilts (degrees); the leaves are sensors whose pixel positions are known by name
(``JUNGFRAU:V2``, ``SENS2X1:V1``, ...).  Format: "Detector geometry", LCLS documentation; the
numbers of each sensor agree with psana 4.3.4 and are tested against it.

psana's frame looks from the sample at the detector: x down, y right, z against the beam.  The
laboratory frame of this package (y up, z along the beam, right-handed) is therefore
(x, y, z) = (-y, -x, -z) of psana's, which is also what psana's CrystFEL export writes.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..core import Geometry, GeometryError, Panel

__all__ = ["Leaf", "is_psana_geometry", "leaf_shape", "psana_coords", "read_psana_geometry"]

UM = 1e-6
_TO_LAB = np.array([[0.0, -1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, -1.0]])


@dataclass(frozen=True)
class Leaf:
    """A sensor in its own frame (um): ``x = origin + s * ss + f * fs`` ASIC by ASIC.

    Between ASICs the centres of neighbouring pixels are ``gap_S`` / ``gap_F`` pixels apart.
    ``wide`` moves the pixels at such a border by half a pixel into the gap: they are twice as
    wide, and some definitions give the centre of the wide pixel.  ``rows_down`` is True when the
    slow axis runs against y; ``transposed`` when the slow axis is x and the fast one y, in which
    case the first pixel (not the middle) is the origin.
    """

    shape_SF: tuple[int, int]
    asic_SF: tuple[int, int]
    pitch_SF_um: tuple[float, float]
    gap_S: float = 1.0
    gap_F: float = 1.0
    wide: bool = False
    rows_down: bool = True
    transposed: bool = False

    def axis_um(self, axis: int, wide: bool) -> np.ndarray:
        """Positions (um) of the pixel centres along axis 0 (slow) or 1 (fast)."""
        n, asic, pitch = self.shape_SF[axis], self.asic_SF[axis], self.pitch_SF_um[axis]
        extra = (self.gap_S, self.gap_F)[axis] - 1.0
        index = np.arange(n)
        position = index + extra * (index // asic)
        if wide:
            position = position.astype(float)
            position[asic - 1:-1:asic] += 0.5
            position[asic::asic] -= 0.5
        if not self.transposed:
            position = position - position[[0, -1]].mean()
        return position * pitch

    def axes_um(self, wide: bool) -> tuple[np.ndarray, np.ndarray]:
        slow, fast = self.axis_um(0, wide), self.axis_um(1, wide)
        return (-slow if self.rows_down and not self.transposed else slow), fast

    def to_xy(self, slow: np.ndarray, fast: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return (slow, fast) if self.transposed else (fast, slow)


_LEAVES = {
    "JUNGFRAU:V1": Leaf((512, 1024), (256, 256), (75.0, 75.0), 3, 3),
    "JUNGFRAU:V2": Leaf((512, 1024), (256, 256), (75.0, 75.0), 3, 3, wide=True, rows_down=False),
    "EPIX10KA:V1": Leaf((352, 384), (176, 192), (100.0, 100.0), 3.5, 3.5),
    "EPIX100:V1": Leaf((704, 768), (352, 384), (50.0, 50.0), 6, 6, rows_down=False),
    "EPIXHR2X2:V1": Leaf((288, 384), (144, 192), (100.0, 100.0), 3.5, 3.5),
    "EPIXMASIC:V1": Leaf((192, 384), (192, 384), (50.0, 50.0)),
    "EPIXUHRASIC:V1": Leaf((168, 192), (168, 192), (100.0, 100.0)),
    "SENS2X1:V1": Leaf((185, 388), (185, 194), (109.92, 109.92), 1, 4),
    "PNCCD:V1": Leaf((512, 512), (512, 512), (75.0, 75.0), transposed=True),
}


def _leaf(name: str) -> Leaf | None:
    if name in _LEAVES:
        return _LEAVES[name]
    fields = name.split(":")
    if fields[0] != "MTRX":
        return None
    centred = len(fields) > 1 and fields[1] == "V2"
    try:
        rows, columns, pitch_s, pitch_f = fields[2:6] if centred else fields[1:5]
        shape = (int(rows), int(columns))
        return Leaf(shape, shape, (float(pitch_s), float(pitch_f)), transposed=not centred)
    except ValueError as error:
        raise GeometryError(
            f"a sensor MTRX:<rows>:<columns>:<pitch>:<pitch> was expected; {name!r} was found; "
            "correct the geometry file") from error


def leaf_shape(name: str) -> tuple[int, int]:
    """(S, F) of the sensor of that name; raises :class:`GeometryError` for an unknown one."""
    leaf = _leaf(name)
    if leaf is None:
        raise _unknown(name)
    return leaf.shape_SF


def _unknown(name: str) -> GeometryError:
    return GeometryError(
        f"the geometry places a sensor {name!r}; the known ones are {', '.join(_LEAVES)} and "
        "MTRX:<rows>:<columns>:<pitch>:<pitch>; convert the geometry to CrystFEL's format")


def _turn(angle_deg: float, i: int, j: int) -> np.ndarray:
    """Rotation that takes axis i towards axis j."""
    c, s = np.cos(np.radians(angle_deg)), np.sin(np.radians(angle_deg))
    matrix = np.eye(3)
    matrix[i, i] = matrix[j, j] = c
    matrix[i, j], matrix[j, i] = -s, s
    return matrix


@dataclass
class _Object:
    name: str
    parent: tuple[str, int] | None
    rotation: np.ndarray
    origin_um: np.ndarray
    children: list[_Object]


def is_psana_geometry(text: str) -> bool:
    """True when the first line that is no comment has the 13 columns of psana's table."""
    for line in text.splitlines():
        if line.strip() and line.lstrip()[0] not in "#;":
            fields = line.split()
            return len(fields) == 13 and fields[1].isdigit() and fields[3].isdigit()
    return False


def _parse(text: str) -> tuple[_Object, float]:
    """Root object and the largest distance (um) of a detector from the interaction point."""
    groups: dict[tuple[str, int], _Object] = {}     # sensors may share their index
    rows: list[_Object] = []
    distance_um = 0.0
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        fields = line.split()
        try:
            if len(fields) != 13:
                raise ValueError(f"{len(fields)} columns")
            parent, name = (fields[0], int(fields[1])), (fields[2], int(fields[3]))
            values = np.array([float(v) for v in fields[4:]])
        except ValueError as error:
            raise GeometryError(
                f"line {number} of a psana geometry should be parent, index, object, index and "
                f"nine numbers; found {line.strip()!r} ({error}); correct the line") from error
        origin = values[:3].copy()
        if parent[0].startswith("IP"):
            origin[2] = -abs(origin[2])         # z of a detector is downstream whatever its sign
            distance_um = max(distance_um, -origin[2])
        angles = values[3:6] + values[6:9]      # design + tilt about z, y, x
        rotation = _turn(angles[2], 1, 2) @ _turn(angles[1], 2, 0) @ _turn(angles[0], 0, 1)
        rows.append(_Object(name[0], parent, rotation, origin, []))
        if _leaf(name[0]) is None:
            if name in groups:
                raise GeometryError(
                    f"every group of a psana geometry has one line; {name[0]} {name[1]} has a "
                    f"second one (line {number}); remove one of them")
            groups[name] = rows[-1]
    root: _Object | None = None
    for row in rows:
        assert row.parent is not None
        if row.parent not in groups:
            root = groups[row.parent] = _Object(row.parent[0], None, np.eye(3), np.zeros(3), [])
        groups[row.parent].children.append(row)
    if root is None:
        raise GeometryError(
            "a psana geometry was expected; no line places an object in a frame of its own (IP); "
            "check that the file is complete")
    return root, distance_um


def _leaves(node: _Object, rotation: np.ndarray, origin: np.ndarray, depth: int = 0
            ) -> list[tuple[str, np.ndarray, np.ndarray]]:
    if depth > 16:
        raise GeometryError("objects of a psana geometry contain each other in a circle; "
                            "more than 16 levels were found; correct the parents")
    here_r, here_t = rotation @ node.rotation, rotation @ node.origin_um + origin
    if _leaf(node.name) is not None:
        return [(node.name, here_r, here_t)]
    if not node.children:
        raise _unknown(node.name)
    return [found for child in node.children
            for found in _leaves(child, here_r, here_t, depth + 1)]


def psana_coords(text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, y, z (um, float64, (P, S, F)) of pixel centres in psana's own frame.

    The same numbers as psana's ``GeometryAccess.get_pixel_coords()``.
    """
    xyz = _coords_um(_placed(text)[0])
    return xyz[0], xyz[1], xyz[2]


def _placed(text: str) -> tuple[list[tuple[str, np.ndarray, np.ndarray]], float]:
    root, distance_um = _parse(text)
    leaves = _leaves(root, np.eye(3), np.zeros(3))
    if len({leaf_shape(name) for name, _, _ in leaves}) != 1:
        raise GeometryError(
            "all sensors of a detector should have one shape; the geometry places "
            f"{sorted({name for name, _, _ in leaves})}; use one geometry per detector")
    return leaves, distance_um


def _coords_um(leaves: list[tuple[str, np.ndarray, np.ndarray]]) -> np.ndarray:
    xyz = np.empty((3, len(leaves), *leaf_shape(leaves[0][0])))
    for p, (name, rotation, origin) in enumerate(leaves):
        leaf = _leaf(name)
        assert leaf is not None
        slow, fast = leaf.axes_um(leaf.wide)
        x, y = leaf.to_xy(slow[:, None], fast[None, :])
        for axis in range(3):
            xyz[axis, p] = rotation[axis, 0] * x + rotation[axis, 1] * y + origin[axis]
    return xyz


def read_psana_geometry(text: str, name: str = "") -> Geometry:
    """Geometry (n sensors, S, F) in the laboratory frame from psana's text.

    ``panels`` has one entry per ASIC.  Where the sensor definition gives wide border pixels their
    true centre (JUNGFRAU:V2) those rows and columns lie half a pixel off the panel's lattice.

    Raises :class:`GeometryError` naming the line that cannot be read or the unknown sensor.
    """
    leaves, distance_um = _placed(text)
    lab = np.einsum("ij,jpsf->ipsf", _TO_LAB, _coords_um(leaves)) * UM
    lab[2] -= distance_um * UM
    x_m, y_m, z_m = lab.astype(np.float32)
    panels = []
    for p, (leaf_name, rotation, origin) in enumerate(leaves):
        leaf = _leaf(leaf_name)
        assert leaf is not None
        panels += _asics(leaf, p, _TO_LAB @ rotation, _TO_LAB @ origin, distance_um)
    first = _leaf(leaves[0][0])
    assert first is not None
    return Geometry(
        x_m, y_m, z_m,
        pixel_size_m=min(first.pitch_SF_um) * UM,
        panels=tuple(panels),
        distance_m=round(distance_um * UM, 9) if distance_um > 0 else None,
        name=name,
    )


def _asics(leaf: Leaf, p: int, rotation: np.ndarray, origin_um: np.ndarray, distance_um: float
           ) -> list[Panel]:
    slow, fast = leaf.axes_um(wide=False)
    step_s = leaf.pitch_SF_um[0] if slow[-1] > slow[0] else -leaf.pitch_SF_um[0]
    unit_s, unit_f = ((0, 1) if leaf.transposed else (1, 0))
    ss, fs = rotation[:, unit_s] * step_s, rotation[:, unit_f] * leaf.pitch_SF_um[1]
    (n_s, n_f), (a_s, a_f) = leaf.shape_SF, leaf.asic_SF
    found = []
    for s in range(0, n_s, a_s):
        for f in range(0, n_f, a_f):
            x, y = leaf.to_xy(slow[s], fast[f])
            first = rotation[:, 0] * x + rotation[:, 1] * y + origin_um
            corner = first - 0.5 * ss - 0.5 * fs - [0.0, 0.0, distance_um]
            number = (s // a_s) * (n_f // a_f) + f // a_f
            found.append(Panel(
                name=f"p{p}a{number}", index=p, min_ss=s, max_ss=s + a_s - 1, min_fs=f,
                max_fs=f + a_f - 1, corner_m=_triple(corner * UM), fs_m=_triple(fs * UM),
                ss_m=_triple(ss * UM)))
    return found


def _triple(vector: np.ndarray) -> tuple[float, float, float]:
    return float(vector[0]), float(vector[1]), float(vector[2])
