"""Image files through fabio: mini-CBF with its header, TIFF, EDF; damaged and foreign files."""
from __future__ import annotations

import builtins
import logging
from pathlib import Path

import numpy as np
import pytest
from conformance.source_conformance import SourceConformance, summary, whole

from xfel_classify.core import (
    ConfigurationError,
    EventStatus,
    GeometryError,
    MissingDependency,
    RunDamaged,
    RunNotFound,
)
from xfel_classify.sources.images import Source, read_cbf_header

fabio = pytest.importorskip("fabio", reason="fabio is not installed")
THAUMATIN = Path(__file__).resolve().parents[2] / "../shared/data/real/thaumatin_grid"
HEADER = """\r
# Detector: PILATUS3 6M, S/N 60-0119\r
# Pixel_size 172e-6 m x 172e-6 m\r
# Count_cutoff 1000 counts\r
# Wavelength 1.2000 A\r
# Detector_distance 0.35100 m\r
# Beam_xy (10.50, 20.25) pixels\r
"""


def images(events: int) -> list[np.ndarray]:
    rng = np.random.default_rng(7)
    return [rng.integers(0, 900, (40, 30)).astype(np.int32) for _ in range(events)]


def write_cbf(path: Path, image: np.ndarray, header: str = HEADER) -> Path:
    fabio.cbfimage.CbfImage(image, {"_array_data.header_convention": "PILATUS_1.2",
                                    "_array_data.header_contents": header}).write(str(path))
    return path


def source(*files: Path, **options) -> Source:
    return Source(Source.Config(files=[str(f) for f in files], **options))


class TestCbfConforms(SourceConformance):
    @pytest.fixture
    def again(self, tmp_path):
        files = [write_cbf(tmp_path / f"i{n}.cbf", image) for n, image in enumerate(images(5))]
        return lambda: source(*files)


def test_pixels_and_header_of_a_mini_cbf(tmp_path):
    image = images(1)[0]
    image[3, 4], image[5, 6], image[7, 8] = -1, -2, 1001
    with source(write_cbf(tmp_path / "a.cbf", image)) as opened:
        frame = next(iter(opened.frames(whole(opened))))
        masked = np.isnan(frame.raw_PSF[0])
        assert masked.sum() == 3 and masked[3, 4] and masked[5, 6] and masked[7, 8]
        assert np.array_equal(frame.raw_PSF[0][~masked], image[~masked])
        assert frame.scalars["photon_energy_eV"] == pytest.approx(12398.42 / 1.2, rel=1e-6)
        assert frame.scalars["distance_m"] == 0.351
        constants = opened.constants()
        assert constants.unit == "photon" and constants.geometry.pixel_size_m == 172e-6
        assert not constants.good_PSF[0, 3, 4] and constants.good_PSF[0, 7, 8]
        # the beam is 10.5 pixels right of, and 20.25 below the corner of the image
        assert abs(constants.geometry.x_m_PSF[0, 20, 10]) < 1e-9
        assert constants.geometry.y_m_PSF[0, 20, 10] == pytest.approx(-0.25 * 172e-6, rel=1e-4)


def test_what_is_stated_wins_over_the_header(tmp_path):
    path = write_cbf(tmp_path / "a.cbf", images(1)[0])
    with source(path, wavelength_A=1.0, distance_m=0.2, pixel_size_m=1e-4,
                beam_center_px=(0.5, 0.5)) as opened:
        frame = next(iter(opened.frames(whole(opened))))
        assert frame.scalars["photon_energy_eV"] == pytest.approx(12398.42, rel=1e-6)
        assert frame.scalars["distance_m"] == 0.2
        assert opened.constants().geometry.x_m_PSF[0, 0, 0] == 0


@pytest.mark.parametrize("suffix", [".tif", ".edf"])
def test_formats_without_such_a_header(tmp_path, suffix):
    image = images(1)[0] - 100
    path = tmp_path / f"a{suffix}"
    kind = fabio.tifimage.TifImage if suffix == ".tif" else fabio.edfimage.EdfImage
    kind(image).write(str(path))
    with source(path, pixel_size_m=1e-4) as opened:
        frame = next(iter(opened.frames(whole(opened))))
        assert np.array_equal(frame.raw_PSF[0], image)      # negative values are values
        assert opened.constants().unit == "ADU"
        assert "photon_energy_eV" not in frame.scalars
        assert any("photon energy" in note for note in opened.run.notes)
    with source(path) as opened, pytest.raises(GeometryError, match="pixel_size_m"):
        opened.constants()


def test_damaged_and_foreign_files_are_rows(tmp_path, caplog):
    files = [write_cbf(tmp_path / f"i{n}.cbf", image) for n, image in enumerate(images(5))]
    data = files[1].read_bytes()
    files[1].write_bytes(data[: len(data) // 2])
    data = bytearray(files[2].read_bytes())
    data[-700] ^= 0xff                                      # the checksum does not fit any more
    files[2].write_bytes(data)
    write_cbf(files[3], np.zeros((8, 9), np.int32))
    with source(*files) as opened, caplog.at_level(logging.CRITICAL, logger="fabio"):
        found = summary(opened.frames(whole(opened)))       # also where fabio is kept quiet
    bad = EventStatus.UNREADABLE
    assert [found[i][1] for i in range(5)] == [
        EventStatus.OK, bad, bad, EventStatus.WRONG_SHAPE, EventStatus.OK]


def test_nothing_readable(tmp_path):
    path = tmp_path / "a.cbf"
    path.write_bytes(b"no image")
    with pytest.raises(RunDamaged, match="none of 1 image files"), source(path):
        pass
    with pytest.raises(RunNotFound), source(tmp_path / "*.tif"):
        pass
    with pytest.raises(ConfigurationError):
        source()


def test_without_fabio_the_message_says_how_to_get_it(tmp_path, monkeypatch):
    path = write_cbf(tmp_path / "a.cbf", images(1)[0])
    real = builtins.__import__

    def importing(name, *rest, **more):
        if name.startswith("fabio"):
            raise ImportError("No module named 'fabio'")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", importing)
    with pytest.raises(MissingDependency, match=r"xfel-classify\[images\]"), source(path):
        pass


def test_header_values_that_are_not_believable():
    header = read_cbf_header("# Wavelength 0.00000 A\n# Beam_xy (0.00, 0.00) pixels\n"
                             "# Detector_distance nan m\n")
    assert header.wavelength_A is None and header.beam_center_px is None
    assert header.distance_m is None and header.detector is None


def test_real_thaumatin_stills():
    if not THAUMATIN.exists():
        pytest.skip("the real stills are not here")
    with source(THAUMATIN / "*.cbf.bz2") as opened:
        assert opened.expected_events() == 6
        constants = opened.constants()
        assert opened.run.panel_shape == (1, 2527, 2463)
        assert constants.geometry.pixel_size_m == 172e-6
        assert np.hypot(constants.geometry.x_m_PSF, constants.geometry.y_m_PSF)[
            0, 1306, 1261] < 172e-6
        assert 0.05 < 1 - constants.good_PSF.mean() < 0.12           # the gaps
        shard = whole(opened)
        frame = next(iter(opened.frames(shard)))
        assert frame.scalars["photon_energy_eV"] == pytest.approx(12398.42 / 0.96859, rel=1e-6)
        assert np.isfinite(frame.raw_PSF[constants.good_PSF]).mean() > 0.999
        assert np.nanmin(frame.raw_PSF) >= 0
