"""CXI, list and geometry together, read as CrystFEL reads them."""
import dataclasses

import numpy as np
import pytest
from conformance.sink_conformance import SinkConformance
from mockdata.crystfel_like import read_list
from mockdata.hand_result import (
    SHAPE,
    empty_result,
    hand_constants,
    hand_geometry,
    hand_pixels,
    hand_result,
)

from xfel_classify.core import GeometryError
from xfel_classify.sinks.cxi import Sink as CxiSink
from xfel_classify.sinks.event_lists import Sink as ListSink
from xfel_classify.sinks.geometry import Sink as GeometrySink

STEM = "mfxl1033223_r0095"


class TestEventListsConform(SinkConformance):
    @pytest.fixture
    def sink(self):
        return ListSink()


class TestGeometryConforms(SinkConformance):
    @pytest.fixture
    def sink(self):
        return GeometrySink()


def write_all(result, directory, **options):
    names = []
    for sink in (CxiSink(), ListSink(ListSink.Config(**options)), GeometrySink()):
        for name in sink.write(result, directory):
            (directory / f"{name}.tmp").rename(directory / name)
            names.append(name)
    return names


def centre_of(geometry, panel, fs, ss):
    """Laboratory x and y of a sub-pixel index, from the pixel centres of the core geometry."""
    f, s = min(int(fs), SHAPE[2] - 2), min(int(ss), SHAPE[1] - 2)
    place = []
    for axis in (geometry.x_m_PSF, geometry.y_m_PSF):
        a = axis[panel].astype(float)
        place.append(a[s, f] + (fs - f) * (a[s, f + 1] - a[s, f]) + (ss - s) * (
            a[s + 1, f] - a[s, f]))
    return place


def test_peaks_land_where_the_geometry_has_their_pixels(tmp_path):
    result = hand_result()
    write_all(result, tmp_path)
    patterns = read_list(tmp_path / f"{STEM}.lst", tmp_path / f"{STEM}.geom")
    assert [len(p.peaks) for p in patterns] == [3, 0, 1]
    for pattern, row in zip(patterns, result.kept, strict=True):
        for k, (name, x, y, intensity) in enumerate(pattern.peaks):
            panel, fs, ss = (result.rows[f"peaks/{c}"][row][k] for c in ("panel", "fs", "ss"))
            assert name == f"p{int(panel)}"
            np.testing.assert_allclose(
                (x, y), centre_of(result.constants.geometry, int(panel), fs, ss),
                atol=0.005 * 1e-4)
            assert intensity == result.rows["peaks/total"][row][k]


def test_a_peak_without_the_half_pixel_would_be_noticed(tmp_path):
    """The test above is sharp: half a pixel is a hundred times its tolerance."""
    geometry = hand_geometry()
    x, y = centre_of(geometry, 1, 3.25, 2.5)
    moved = centre_of(geometry, 1, 3.75, 3.0)
    assert np.hypot(x - moved[0], y - moved[1]) > 100 * 0.005 * 1e-4


def test_pixels_and_bad_pixels_land_in_their_panels(tmp_path):
    result = hand_result()
    write_all(result, tmp_path)
    patterns = read_list(tmp_path / f"{STEM}.lst", tmp_path / f"{STEM}.geom")
    for pattern, row in zip(patterns, result.kept, strict=True):
        for panel in range(2):
            np.testing.assert_array_equal(pattern.panels[f"p{panel}"], hand_pixels(row)[panel])
            np.testing.assert_array_equal(pattern.bad[f"p{panel}"],
                                          ~result.constants.good_PSF[panel])


def test_photon_energy_and_distance_reach_the_reader(tmp_path):
    write_all(hand_result(), tmp_path)
    patterns = read_list(tmp_path / f"{STEM}.lst", tmp_path / f"{STEM}.geom")
    assert [p.photon_energy_eV for p in patterns] == [9501, 9500, 9504]   # 9500 is the fallback
    assert [p.clen_m for p in patterns] == [0.1] * 3


def test_distance_comes_from_the_events_when_the_geometry_has_none(tmp_path):
    constants = hand_constants(geometry=hand_geometry(distance_m=None))
    columns = dict(hand_result().columns)
    columns["distance_m"] = dataclasses.replace(columns["photon_energy_eV"], unit="m")
    rows = dict(hand_result().rows) | {"distance_m": np.linspace(0.1, 0.6, 6)}
    write_all(hand_result(constants=constants, columns=columns, rows=rows), tmp_path)
    patterns = read_list(tmp_path / f"{STEM}.lst", tmp_path / f"{STEM}.geom")
    np.testing.assert_allclose([p.clen_m for p in patterns], [0.2, 0.4, 0.5])


def test_no_hits_is_an_empty_list(tmp_path):
    write_all(empty_result(3), tmp_path)
    assert (tmp_path / f"{STEM}.lst").read_bytes() == b""
    assert (tmp_path / f"{STEM}_hits.txt").read_bytes() == b""
    stamps = np.load(tmp_path / f"{STEM}_hits.npy", allow_pickle=False)
    assert stamps.shape == (0,) and stamps.dtype == np.uint64


def test_lists_name_the_hits(tmp_path):
    result = hand_result()
    write_all(result, tmp_path)
    assert (tmp_path / f"{STEM}.lst").read_text().splitlines() == [
        f"{tmp_path / STEM}.cxi //{k}" for k in range(3)]
    stamps = np.load(tmp_path / f"{STEM}_hits.npy", allow_pickle=False)
    assert stamps.dtype == np.uint64
    np.testing.assert_array_equal(stamps, result.rows["timestamp"][[1, 3, 4]])
    assert (tmp_path / f"{STEM}_hits.txt").read_text() == "95 1\n95 3\n95 4\n"


def test_relative_list_works_after_moving_the_directory(tmp_path):
    (tmp_path / "here").mkdir()
    write_all(hand_result(), tmp_path / "here", paths="relative")
    (tmp_path / "here").rename(tmp_path / "there")
    assert len(read_list(tmp_path / "there" / f"{STEM}.lst",
                         tmp_path / "there" / f"{STEM}.geom")) == 3


def test_list_without_cxi_is_left_out(tmp_path):
    names = ListSink(ListSink.Config(cxi=False)).write(hand_result(), tmp_path)
    assert names == [f"{STEM}_hits.npy", f"{STEM}_hits.txt"]


@pytest.mark.psana
def test_psana2_takes_the_time_stamps_file(tmp_path):
    ds_base = pytest.importorskip("psana.psexp.ds_base", reason="psana2 is not installed")
    write_all(hand_result(), tmp_path)
    read = ds_base.DataSourceBase.get_filter_timestamps(None, str(tmp_path / f"{STEM}_hits.npy"))
    assert read.dtype == np.uint64
    np.testing.assert_array_equal(read, hand_result().rows["timestamp"][[1, 3, 4]])


def test_run_without_constants_has_no_geometry_file(tmp_path, caplog):
    assert GeometrySink().write(hand_result(constants=None), tmp_path) == []
    assert "--geometry" in caplog.text and list(tmp_path.iterdir()) == []


def test_pixels_that_are_not_on_flat_panels_are_refused(tmp_path):
    bent = hand_geometry(panels=())
    bent.x_m_PSF[0, 3, 3] += 1e-3
    with pytest.raises(GeometryError):
        GeometrySink().write(hand_result(constants=hand_constants(geometry=bent)), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_unknown_numbers_are_pointed_out_in_the_geometry(tmp_path):
    unknown = hand_constants(geometry=hand_geometry(distance_m=None, photon_energy_eV=None))
    rows = dict(hand_result().rows) | {"photon_energy_eV": np.full(6, np.nan)}
    GeometrySink().write(hand_result(constants=unknown, rows=rows), tmp_path)
    text = (tmp_path / f"{STEM}.geom.tmp").read_text()
    assert "replace clen" in text and "replace photon_energy" in text
    given = GeometrySink.Config(clen_m=0.25, photon_energy_eV=7000.0)
    GeometrySink(given).write(hand_result(constants=unknown, rows=rows), tmp_path)
    text = (tmp_path / f"{STEM}.geom.tmp").read_text()
    assert "clen = 0.25" in text and "photon_energy = 7000" in text and "replace" not in text
