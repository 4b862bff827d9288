"""Geometries: psana's and CrystFEL's files, read back by psana and cfelpyutils themselves."""
import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest

from xfel_classify.core import GeometryError
from xfel_classify.detectors import (
    assembled_geometry,
    default_geometry,
    detector,
    flat_geometry,
    read_geometry,
    write_crystfel_geom,
)
from xfel_classify.detectors.psana_geometry import psana_coords

REAL = (Path(__file__).resolve().parents[2] / "../shared/data/real/geom").resolve()
PSANA_FILES = sorted((REAL / "psana").glob("*.data"))
CRYSTFEL_FILES = sorted((REAL / "crystfel").glob("*.geom"))
SHIPPED = [(kind, n) for kind in ("jungfrau", "epix10ka", "cspad", "pnccd")
           for n in detector(kind).geometry]
needs_real = pytest.mark.skipif(not REAL.exists(), reason="../shared is not here")


def panel_positions(panel):
    """Pixel centres of a panel in metres, float64 (3, rows, columns)."""
    s = np.arange(panel.max_ss - panel.min_ss + 1)[:, None] + 0.5
    f = np.arange(panel.max_fs - panel.min_fs + 1)[None] + 0.5
    return np.stack([panel.corner_m[k] + s * panel.ss_m[k] + f * panel.fs_m[k] for k in range(3)])


def region(panel):
    return (panel.index, slice(panel.min_ss, panel.max_ss + 1),
            slice(panel.min_fs, panel.max_fs + 1))


# --- psana ----------------------------------------------------------------------------------------

def sensor_line(name: str) -> str:
    return f"IP 0 {name} 0 10 -20 -100000 90 180 0 0.3 -0.2 0.1\n"


def check_against_psana(text: str, tmp_path) -> None:
    access = pytest.importorskip("psana.pscalib.geometry.GeometryAccess").GeometryAccess
    (tmp_path / "g.data").write_text(text)
    theirs = access(str(tmp_path / "g.data"))
    mine = psana_coords(text)
    for a, b in zip(mine, theirs.get_pixel_coords(), strict=True):
        assert np.abs(a - b.reshape(a.shape)).max() < 0.1            # micrometres
    geometry = read_geometry(text)
    lab = theirs.get_pixel_coords(cframe=1)
    z = geometry.z_m_PSF.astype(float) + (geometry.distance_m or 0.0)
    for a, b in zip((geometry.x_m_PSF, geometry.y_m_PSF, z), lab, strict=True):
        assert np.abs(a - b.reshape(a.shape) * 1e-6).max() < 0.1e-6


@pytest.mark.psana
@needs_real
@pytest.mark.parametrize("path", PSANA_FILES, ids=lambda p: p.stem)
def test_pixels_are_where_psana_puts_them(path, tmp_path):
    check_against_psana(path.read_text(), tmp_path)


@pytest.mark.psana
@pytest.mark.parametrize("name", [
    "JUNGFRAU:V1", "JUNGFRAU:V2", "EPIX10KA:V1", "EPIX100:V1", "SENS2X1:V1", "PNCCD:V1",
    "EPIXHR2X2:V1", "EPIXMASIC:V1", "MTRX:30:40:50:75", "MTRX:V2:30:40:50:75"])
def test_every_sensor_is_psana_s(name, tmp_path):
    check_against_psana(sensor_line(name), tmp_path)


@pytest.mark.psana
@needs_real
@pytest.mark.parametrize("stem, asic", [("epix10ka2m", 64), ("cspad", 64), ("jungfrau4M", 64)])
def test_panels_are_those_of_psana_s_own_crystfel_export(stem, asic, tmp_path):
    convert = pytest.importorskip("psana.pscalib.geometry.UtilsConvert").geometry_to_crystfel
    from cfelpyutils.geometry import load_crystfel_geometry
    text = (REAL / "psana" / f"geometry-def-{stem}.data").read_text()
    text = text.replace("JUNGFRAU:V2", "JUNGFRAU:V1")     # the export knows no other
    (tmp_path / "in.data").write_text(text)
    convert(str(tmp_path / "in.data"), str(tmp_path / "out.geom"))
    theirs = load_crystfel_geometry(str(tmp_path / "out.geom")).detector["panels"]
    geometry = read_geometry(text)
    assert len(geometry.panels) == len(theirs) == asic
    rows = geometry.shape[1]
    by_place = {(p["orig_min_ss"], p["orig_min_fs"]): p for p in theirs.values()}
    for panel in geometry.panels:
        p = by_place[panel.index * rows + panel.min_ss, panel.min_fs]
        size = 1 / p["res"]
        for k, axis in enumerate("xyz"):
            assert panel.fs_m[k] / size == pytest.approx(p[f"fs{axis}"], abs=2e-3)
            assert panel.ss_m[k] / size == pytest.approx(p[f"ss{axis}"], abs=2e-3)
        # their corners are pixel centres or edges depending on the version: within a pixel
        assert panel.corner_m[0] / size == pytest.approx(p["cnx"], abs=1.01)
        assert panel.corner_m[1] / size == pytest.approx(p["cny"], abs=1.01)


@pytest.mark.parametrize("kind, panels", SHIPPED)
def test_shipped_geometries_are_whole_and_centred(kind, panels):
    known = detector(kind)
    geometry = default_geometry(known, panels)
    assert geometry.shape == (panels, *known.panel_shape_SF)
    assert geometry.pixel_size_m == pytest.approx(known.pixel_size_m)
    assert 0.05 < geometry.distance_m < 0.2
    x, y = geometry.x_m_PSF, geometry.y_m_PSF
    assert abs(x.max() + x.min()) < 0.006 and abs(y.max() + y.min()) < 0.006
    cell = [np.floor(v / geometry.pixel_size_m + 5000.3).astype(np.int64) for v in (x, y)]
    taken = np.bincount((cell[0] * 10000 + cell[1]).ravel())
    assert (taken > 1).sum() < 0.03 * x.size        # panels do not overlap
    covered = np.zeros(geometry.shape, int)
    for panel in geometry.panels:
        covered[region(panel)] += 1
        inner = (slice(None), slice(1, -1), slice(1, -1))      # border pixels may be wide
        seen = np.stack([v[region(panel)] for v in (x, y, geometry.z_m_PSF)])
        np.testing.assert_allclose(panel_positions(panel)[inner], seen[inner], atol=3e-8)
    assert (covered == 1).all()


def test_a_default_that_is_not_shipped():
    with pytest.raises(GeometryError, match="1, 2, 8, 32"):
        default_geometry(detector("jungfrau"), 3)


@pytest.mark.parametrize("text, words", [
    ("IP 0 JUNGFRAU:V2 0 0 0 0 90 0 x 0 0 0\n", "line 1"),
    ("IP 0 SENSOR:V9 0 0 0 0 90 0 0 0 0 0\n", "SENSOR:V9"),
    (sensor_line("MTRX:a:b:c:d"), "MTRX:a:b:c:d"),
    (sensor_line("MTRX:3"), "MTRX:3"),
    (sensor_line("PNCCD:V1") + "IP 0 X 0 1 2 3\n", "line 2.*7 columns"),
    ("A 0 B 0 0 0 0 0 0 0 0 0 0\nA 0 B 0 0 0 0 0 0 0 0 0 0\n", "second"),
    ("A 0 B 0 0 0 0 0 0 0 0 0 0\nB 0 A 0 0 0 0 0 0 0 0 0 0\n", "frame of its own"),
    (sensor_line("PNCCD:V1") + sensor_line("EPIX100:V1"), "one shape"),
    ("hello\nworld\n", "neither"), ("data = /x\n", "CrystFEL"),
    ("p0/min_fs = x\n", "cfelpyutils says")])
def test_geometries_that_cannot_be_read_say_why(text, words):
    with pytest.raises(GeometryError, match=words):
        read_geometry(text)


def test_a_missing_file_and_a_geometry_of_another_detector(tmp_path):
    with pytest.raises(GeometryError, match="none.data"):
        read_geometry(tmp_path / "none.data")
    with pytest.raises(GeometryError, match=r"\(2, 512, 1024\)"):
        read_geometry(sensor_line("JUNGFRAU:V2"), (2, 512, 1024))
    geometry = write_crystfel_geom(flat_geometry((2, 4, 6), 1e-4))
    with pytest.raises(GeometryError, match=r"\(2, 4, 7\)"):
        read_geometry(geometry, (2, 4, 7))


def test_psana_panels_as_a_slab():
    text = (sensor_line("MTRX:V2:4:6:75:75") + sensor_line("MTRX:V2:4:6:75:75"))
    slab, panels = read_geometry(text, (1, 8, 6)), read_geometry(text, (2, 4, 6))
    np.testing.assert_array_equal(slab.x_m_PSF.reshape(2, 4, 6), panels.x_m_PSF)
    assert [p.min_ss for p in slab.panels] == [0, 4]


# --- CrystFEL -------------------------------------------------------------------------------------

EXPECTED = {    # shape without knowing the detector, panels, distance, bad pixels
    "Eiger16M-binning2-nativefiles": ((1, 2167, 2070), 1, 0.1, True),
    "agipd_mar18_v11": ((16, 512, 128), 128, 0.125714, False),
    "agipd_p700000_r0030": ((16, 512, 128), 128, 0.119314, False),
    "cspad-cxiformat": ((32, 185, 388), 64, None, False),
    "epix10k2M": ((1, 5632, 384), 64, None, False),
    "jungfrau4M_20220207-cxilz0720": ((1, 4096, 1024), 64, 0.652, False),
    "jungfrau4M_om": ((1, 4096, 1024), 64, None, False),
    "pilatus": ((1, 2527, 2463), 1, None, True)}


@needs_real
@pytest.mark.parametrize("path", CRYSTFEL_FILES, ids=lambda p: p.stem)
def test_real_crystfel_files(path):
    shape, panels, distance, bad = EXPECTED[path.stem]
    geometry = read_geometry(path)
    assert geometry.shape == shape and len(geometry.panels) == panels
    assert geometry.distance_m == (None if distance is None else pytest.approx(distance))
    assert (geometry.bad_PSF is not None) == bad
    for panel in geometry.panels:
        there = region(panel)
        seen = np.stack([v[there] for v in (geometry.x_m_PSF, geometry.y_m_PSF)])
        np.testing.assert_allclose(panel_positions(panel)[:2], seen, atol=3e-8)
    assert 0.04 < np.abs(geometry.x_m_PSF).max() < 0.3


@needs_real
def test_bad_regions_by_array_place_and_by_position():
    eiger = read_geometry(REAL / "crystfel/Eiger16M-binning2-nativefiles.geom").bad_PSF[0]
    assert eiger[:, 1030:1040].all() and eiger[514:551].all()
    assert not eiger[:514, :1030].any()
    pilatus = read_geometry(REAL / "crystfel/pilatus.geom")
    x = pilatus.x_m_PSF[0] / pilatus.pixel_size_m
    y = pilatus.y_m_PSF[0] / pilatus.pixel_size_m
    stop = (x > -1999) & (x < 99) & (y > -39) & (y < 99)
    assert stop.any() and pilatus.bad_PSF[0][stop].all()
    assert pilatus.bad_PSF[0][:, 487:494].all() and not pilatus.bad_PSF[0][5, 5]


@needs_real
@pytest.mark.parametrize("stem, kind, shape", [
    ("jungfrau4M_om", "jungfrau", (8, 512, 1024)), ("epix10k2M", "epix10ka", (16, 352, 384)),
    ("cspad-cxiformat", "cspad", (4, 8, 185, 388))])
def test_slabs_become_panels(stem, kind, shape):
    path = REAL / f"crystfel/{stem}.geom"
    geometry = read_geometry(path, shape, kind)
    assert geometry.shape == (int(np.prod(shape[:-2])), *shape[-2:])
    np.testing.assert_array_equal(read_geometry(path, None, kind).x_m_PSF, geometry.x_m_PSF)
    for panel in geometry.panels:
        seen = np.stack([v[region(panel)] for v in (geometry.x_m_PSF, geometry.y_m_PSF)])
        np.testing.assert_allclose(panel_positions(panel)[:2], seen, atol=3e-8)
    if kind == "jungfrau":
        return      # that file mirrors the modules of psana's default (raw order of another DAQ)
    assert hand(geometry) == hand(default_geometry(detector(kind), geometry.shape[0]))


def hand(geometry) -> float:
    """Sign of fs x ss along the beam: what a mirrored detector would have the other way round."""
    x, y = geometry.x_m_PSF[0], geometry.y_m_PSF[0]
    fs, ss = (x[0, 1] - x[0, 0], y[0, 1] - y[0, 0]), (x[1, 0] - x[0, 0], y[1, 0] - y[0, 0])
    return float(np.sign(fs[0] * ss[1] - fs[1] * ss[0]))


def positions_by_cfelpyutils(text, rows):
    """Pixel centres in pixels from cfelpyutils' parsing alone: {(plane, ss, fs): (x, y)}."""
    from cfelpyutils.geometry import load_crystfel_geometry
    loaded = load_crystfel_geometry(io.StringIO(text))
    out = {}
    for p in loaded.detector["panels"].values():
        s, f = np.arange(p["h"])[:, None] + 0.5, np.arange(p["w"])[None] + 0.5
        plane, first = divmod(p["orig_min_ss"], rows)
        out[plane, first, p["orig_min_fs"]] = np.stack(
            [p["cnx"] + f * p["fsx"] + s * p["ssx"], p["cny"] + f * p["fsy"] + s * p["ssy"]])
    return out, loaded


@pytest.mark.parametrize("kind, panels", SHIPPED)
def test_what_is_written_is_read_to_a_millionth_of_a_pixel(kind, panels):
    geometry = default_geometry(detector(kind), panels)
    text = write_crystfel_geom(geometry, comments=("made by a test",))
    found, loaded = positions_by_cfelpyutils(text, geometry.shape[1])
    assert len(found) == len(geometry.panels)
    for panel in geometry.panels:
        expected = panel_positions(panel)[:2] / geometry.pixel_size_m
        np.testing.assert_allclose(found[panel.index, panel.min_ss, panel.min_fs], expected,
                                   rtol=0, atol=1e-6)
    again = read_geometry(text, geometry.shape)
    assert again.distance_m == pytest.approx(geometry.distance_m, abs=2e-3)
    first = next(iter(loaded.detector["panels"].values()))
    assert first["dim_structure"] == ["%", "ss", "fs"]
    assert first["data"] == "/entry_1/data_1/data" and first["mask"] == "/entry_1/data_1/mask"
    assert first["adu_per_eV"] == 0.001
    assert "\npeak_list = /entry_1/result_1\n" in text
    assert loaded.beam["photon_energy_from"] == "/LCLS/photon_energy_eV"
    assert loaded.detector["mask_bad"] == 0xFFFF and loaded.detector["mask_good"] == 0


def test_units_and_lengths_of_a_written_file():
    geometry = assembled_geometry((6, 8), 1e-4, (3.5, 2.0), 0.25)
    text = write_crystfel_geom(geometry, unit="photon", clen="/LCLS/detector_1/EncoderValue",
                               photon_energy=9500.0, mask=None, peak_list=None)
    again = read_geometry(text, (1, 6, 8))
    assert again.distance_m is None and again.photon_energy_eV == 9500.0
    assert "adu_per_photon = 1" in text and "mask" not in text and "peak_list" not in text
    np.testing.assert_allclose(again.x_m_PSF, geometry.x_m_PSF, atol=1e-10)
    np.testing.assert_allclose(again.y_m_PSF, geometry.y_m_PSF, atol=1e-10)
    assert "adu_per_eV = 0.0004" in write_crystfel_geom(geometry, unit="ADU", adu_per_eV=4e-4)


def test_a_geometry_without_panels_is_fitted_or_refused():
    geometry = dataclasses.replace(default_geometry(detector("epix10ka"), 4), panels=())
    with pytest.raises(GeometryError, match="not one flat piece"):
        write_crystfel_geom(geometry)           # four ASICs with a gap are no single panel
    flat = dataclasses.replace(flat_geometry((3, 20, 30), 1e-4), panels=())
    again = read_geometry(write_crystfel_geom(flat), (3, 20, 30))
    np.testing.assert_allclose(again.x_m_PSF, flat.x_m_PSF, atol=2e-9)
    np.testing.assert_allclose(again.y_m_PSF, flat.y_m_PSF, atol=2e-9)


def test_small_print_of_crystfel_files():
    text = """
    res = 10000
    clen = 0.1
    photon_energy = 9000 eV
    data = /d
    dim0 = %
    dim1 = 3
    dim2 = ss
    dim3 = fs
    rigid_group_a = b
    bad_q/panel = b
    bad_q/min_fs = 1
    bad_q/max_fs = 2
    bad_q/min_ss = 0
    bad_q/max_ss = 1
    a/min_fs = 0
    a/max_fs = 3
    a/min_ss = 0
    a/max_ss = 1
    a/fs = -y
    a/ss = x
    a/corner_x = 1
    a/corner_y = 2
    a/no_index = 0
    b/dim1 = 1
    b/min_fs = 0
    b/max_fs = 3
    b/min_ss = 0
    b/max_ss = 1
    b/fs = x
    b/ss = -y
    b/corner_x = -5
    b/corner_y = -6
    b/no_index = 0
    """.replace("    ", "")
    geometry = read_geometry(text, (4, 2, 4))
    np.testing.assert_allclose(geometry.x_m_PSF[3] * 1e4, [[1.5] * 4, [2.5] * 4], rtol=1e-6)
    np.testing.assert_allclose(geometry.y_m_PSF[3, 0] * 1e4, [1.5, .5, -.5, -1.5], rtol=1e-6)
    np.testing.assert_allclose(geometry.x_m_PSF[1, 0] * 1e4, [-4.5, -3.5, -2.5, -1.5], rtol=1e-6)
    expected = np.ones((4, 2, 4), bool)
    expected[[1, 3]] = False
    expected[1, :, 1:3] = True
    np.testing.assert_array_equal(geometry.bad_PSF, expected)
    assert geometry.photon_energy_eV == 9000
    in_mm = read_geometry(text.replace("clen = 0.1", "clen = 100 mm ; far").replace(
        "photon_energy = 9000 eV", "wavelength = 1.2398419843 A"), (4, 2, 4))
    assert in_mm.distance_m == pytest.approx(0.1)
    assert in_mm.photon_energy_eV == pytest.approx(10000)
    off = read_geometry(text.replace("b/no_index = 0", "b/no_index = 1"), (4, 2, 4))
    assert off.bad_PSF[1].all() and not off.bad_PSF[3].any()


def test_an_assembled_image_has_y_up():
    geometry = assembled_geometry((4, 6), 1e-4, (1.0, 3.0), 0.1)
    assert geometry.x_m_PSF[0, 0, 0] == pytest.approx(-0.5e-4)
    assert geometry.y_m_PSF[0, 0, 0] == pytest.approx(2.5e-4)
    assert geometry.y_m_PSF[0, 3, 0] == pytest.approx(-0.5e-4)
    with pytest.raises(GeometryError, match="source.pixel_size_m"):
        assembled_geometry((4, 6), 0.0)
