"""The CXI file, read back with plain h5py."""
import logging
import os
import shutil

import h5py
import numpy as np
import pytest
from conformance.sink_conformance import SinkConformance
from mockdata.hand_result import (
    EPOCH_STAMPS,
    SHAPE,
    empty_result,
    hand_constants,
    hand_pixels,
    hand_result,
)

from xfel_classify.core import ConfigurationError, OutputError, OutputFull
from xfel_classify.sinks.cxi import Sink

NAME = "mfxl1033223_r0095.cxi"
KEPT = [1, 3, 4]


class TestCxiConforms(SinkConformance):
    @pytest.fixture
    def sink(self):
        return Sink()


def written(tmp_path, result=None, **options):
    result = hand_result() if result is None else result
    names = Sink(Sink.Config(**options)).write(result, tmp_path)
    assert names == [NAME]
    return h5py.File(tmp_path / f"{NAME}.tmp")


def test_frames_are_stacked_panels_one_chunk_each(tmp_path):
    with written(tmp_path) as file:
        frames = file["entry_1/data_1/data"]
        assert frames.shape == (3, 16, 16) and frames.dtype == np.float32
        assert frames.chunks == (1, 16, 16) and frames.compression is None
        for position, row in enumerate(KEPT):
            np.testing.assert_array_equal(frames[position], hand_pixels(row).reshape(16, 16))
        assert frames.attrs["axes"] == "experiment_identifier:y:x"
        assert frames.attrs["units"] == "photon"


def test_mask_is_one_where_bad_in_the_dimensions_of_the_frames(tmp_path):
    with written(tmp_path) as file:
        mask = file["entry_1/data_1/mask"]
        assert mask.dtype == np.uint16 and mask.shape == (3, 16, 16)
        for position in range(3):
            np.testing.assert_array_equal(
                mask[position].reshape(SHAPE), ~hand_constants().good_PSF)
        assert mask.id.get_num_chunks() == 3


def test_peaks_are_pixel_indices_in_the_stack(tmp_path):
    with written(tmp_path) as file:
        group = file["entry_1/result_1"]
        np.testing.assert_array_equal(group["nPeaks"], [3, 0, 1])
        assert group["nPeaks"].attrs["maxPeaks"] == 3 and group["nPeaks"].attrs["minPeaks"] == 0
        np.testing.assert_array_equal(group["peakXPosRaw"],
                                      [[0, 3.25, 15], [0, 0, 0], [7.5, 0, 0]])
        np.testing.assert_array_equal(group["peakYPosRaw"],
                                      [[0, 8 + 2.5, 8 + 7], [0, 0, 0], [6.75, 0, 0]])
        np.testing.assert_array_equal(group["peakTotalIntensity"],
                                      [[10, 20, 30], [0, 0, 0], [40, 0, 0]])
        for name in ("peakMaxIntensity", "peakMaximumValue"):
            np.testing.assert_array_equal(group[name], [[5, 6, 7], [0, 0, 0], [8, 0, 0]])
        np.testing.assert_array_equal(group["peakNPixels"][0], [2, 3, 4])
        np.testing.assert_array_equal(group["peakSNR"][2], [11, 0, 0])
        np.testing.assert_array_equal(group["peakRadius"][2], [4, 0, 0])
        assert all(group[n].dtype == np.float32 for n in ("peakXPosRaw", "peakYPosRaw"))
        assert group["peakXPosRaw"].attrs["axes"] == "experiment_identifier:peaks"


def test_a_centroid_beyond_its_panel_stays_on_it(tmp_path):
    rows = dict(hand_result().rows)
    rows["peaks/ss"] = [*rows["peaks/ss"][:4], np.array([7.9]), rows["peaks/ss"][5]]
    with written(tmp_path, hand_result(rows=rows)) as file:
        y = file["entry_1/result_1/peakYPosRaw"][2, 0]
        assert int(y + 0.5) == 7 and y == pytest.approx(7.49)


def test_every_hit_says_when_and_which_it_was(tmp_path):
    stamps = np.array(EPOCH_STAMPS)[KEPT]
    with written(tmp_path) as file:
        lcls = file["LCLS"]
        np.testing.assert_array_equal(lcls["timestamp"], stamps)
        np.testing.assert_array_equal(
            lcls["machineTime"][()] << 32 | lcls["machineTimeNanoSeconds"][()], stamps)
        np.testing.assert_array_equal(lcls["eventNumber"], KEPT)
        np.testing.assert_array_equal(lcls["fiducial"], [0, 0, 0])
        np.testing.assert_array_equal(lcls["photon_energy_eV"], [9501, 9500, 9504])
        np.testing.assert_array_equal(lcls["detector_1/EncoderValue"], [100, 100, 100])
        names = file["entry_1/experiment_identifier"].asstr()[()]
        assert list(names) == [f"mfxl1033223_r0095_{stamp}" for stamp in stamps]
        np.testing.assert_array_equal(file["entry_1/experimental_identifier"], KEPT)
        assert file["cxi_version"][()] == 140


def test_unix_time_is_that_of_psana(tmp_path):
    with written(tmp_path) as file:
        # 1990-01-01 + 1 100 000 001 s = 2024-11-09 03:33:21 UTC
        seconds = np.datetime64(int(file["LCLS/unixTime"][0]), "s")
        assert str(seconds) == str(np.datetime64("1990-01-01") + np.timedelta64(1100000001, "s"))
        assert file["LCLS/machineTime"].attrs["epoch"].startswith("1990-01-01")


def test_stamps_that_are_no_times_have_no_unix_time(tmp_path):
    rows = dict(hand_result().rows) | {"timestamp": np.arange(6)}
    with written(tmp_path, hand_result(rows=rows)) as file:
        assert np.isnan(file["LCLS/unixTime"][()]).all()
        np.testing.assert_array_equal(file["LCLS/machineTime"], [0, 0, 0])
        np.testing.assert_array_equal(file["LCLS/machineTimeNanoSeconds"], KEPT)


def test_scores_are_there_for_copy_header(tmp_path):
    with written(tmp_path) as file:
        np.testing.assert_array_equal(file["entry_1/result_1/hit/score"],
                                      np.float32([.9, .8, .7]))
        np.testing.assert_array_equal(file["entry_1/result_1/hit/label"], [1, 1, 1])
        assert file["entry_1/result_1/hit/score"].attrs["doc"] == "probability of a hit"
        assert "fs" not in file["entry_1/result_1/peaks"]


def test_powders_and_instrument(tmp_path):
    with written(tmp_path) as file:
        assert np.all(file["entry_1/data_1/powderHits"][()] == 7)
        assert np.all(file["entry_1/data_1/powderMisses"][()] == 2)
        detector = file["entry_1/instrument_1/detector_1"]
        assert detector["data"].shape == (3, 16, 16) and detector["mask"].shape == (3, 16, 16)
        assert detector["x_pixel_size"][()] == 1e-4 and detector["distance"][()] == 0.1


def test_powder_of_hits_is_made_from_the_frames_when_no_total_has_it(tmp_path):
    with written(tmp_path, hand_result(totals={})) as file:
        np.testing.assert_array_equal(file["entry_1/data_1/powderHits"],
                                      hand_pixels(4).reshape(16, 16))
        assert "powderMisses" not in file["entry_1/data_1"]


@pytest.mark.parametrize("compression", ["gzip", "bitshuffle-lz4"])
def test_compressed_frames_read_the_same(tmp_path, compression):
    with written(tmp_path, compression=compression) as file:
        frames = file["entry_1/data_1/data"]
        assert frames.id.get_create_plist().get_nfilters() > 0
        for position, row in enumerate(KEPT):
            np.testing.assert_array_equal(frames[position], hand_pixels(row).reshape(16, 16))


def test_no_hit_is_a_valid_file_without_frames(tmp_path):
    with written(tmp_path, empty_result(4)) as file:
        assert file["entry_1/data_1/data"].shape == (0, 16, 16)
        assert file["entry_1/data_1/mask"].shape == (0, 16, 16)
        assert file["entry_1/result_1/nPeaks"].shape == (0,)
        assert file["entry_1/experiment_identifier"].shape == (0,)


def test_without_a_peak_finder_hits_have_no_peaks(tmp_path):
    columns = {k: c for k, c in hand_result().columns.items() if not k.startswith("peaks")}
    with written(tmp_path, hand_result(columns=columns)) as file:
        group = file["entry_1/result_1"]
        np.testing.assert_array_equal(group["nPeaks"], [0, 0, 0])
        for name in ("peakXPosRaw", "peakYPosRaw", "peakTotalIntensity"):
            assert group[name].shape[0] == 3 and not group[name][()].any()


def test_only_one_frame_is_in_memory_at_a_time(tmp_path):
    asked = []

    class Frames:
        def __call__(self, row):
            asked.append(row)
            return hand_pixels(row)

    written(tmp_path, hand_result(pixels=Frames())).close()
    assert asked == KEPT


def test_hits_without_kept_pixels_are_refused(tmp_path):
    with pytest.raises(OutputError, match="not kept"):
        written(tmp_path, hand_result(pixels=None))
    assert list(tmp_path.iterdir()) == []


def test_a_frame_of_another_shape_is_refused(tmp_path):
    with pytest.raises(OutputError, match="shape"):
        written(tmp_path, hand_result(pixels=lambda row: np.zeros((1, 8, 16), np.float32)))
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_pixels_is_not_blamed_on_the_output(tmp_path):
    def pixels(row):
        raise OSError("the part is damaged")

    with pytest.raises(OSError, match="the part is damaged"):
        written(tmp_path, hand_result(pixels=pixels))
    assert list(tmp_path.iterdir()) == []


def test_too_many_frames_are_refused_before_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage",
                        lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 100, 100))
    with pytest.raises(OutputFull, match="--resume"):
        written(tmp_path, hand_result(pixels=lambda row: pytest.fail("asked for pixels")))
    assert list(tmp_path.iterdir()) == []


# --- links ------------------------------------------------------------------------------------

@pytest.fixture(params=[(6, *SHAPE), (6, 16, 16)], ids=["panels", "stacked"])
def linked(tmp_path, request):
    """A result whose pixels are in a calibrated HDF5 file of the given layout."""
    source = tmp_path / "100% source.h5"
    with h5py.File(source, "w") as file:
        file["frames"] = np.stack([hand_pixels(r) for r in range(6)]).reshape(request.param)
    return hand_result(locate=lambda row: (str(source), "/frames", row), pixels=None), source


def test_linked_frames_are_those_of_the_source(tmp_path, linked):
    result, source = linked
    size_of_frames = 3 * 256 * 4
    with written(tmp_path, result, link=True) as file:
        frames = file["entry_1/data_1/data"]
        assert frames.is_virtual and frames.dtype == np.float32
        for position, row in enumerate(KEPT):
            np.testing.assert_array_equal(frames[position], hand_pixels(row).reshape(16, 16))
        assert file.attrs["pixels"] == "linked"
        assert frames.id.get_storage_size() < size_of_frames


def test_a_vanished_source_reads_as_nan_not_as_empty_frames(tmp_path, linked):
    result, source = linked
    written(tmp_path, result, link=True).close()
    os.unlink(source)
    with h5py.File(tmp_path / f"{NAME}.tmp") as file:
        assert np.isnan(file["entry_1/data_1/data"][()]).all()


def test_links_to_what_cannot_be_linked_are_copies(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    raw = hand_constants(pedestals_GPSF=np.zeros((1, *SHAPE)), gain_GPSF=np.ones((1, *SHAPE)))
    for result, why in ((hand_result(constants=raw), "raw"), (hand_result(), "not a file")):
        with written(tmp_path, result, link=True) as file:
            assert not file["entry_1/data_1/data"].is_virtual
            assert file.attrs["pixels"] == "copied"
        assert why in caplog.text
        caplog.clear()


def test_impossible_links_are_refused_before_the_run(tmp_path, linked):
    result, source = linked
    sink = Sink(Sink.Config(link=True))
    assert not sink.wants_pixels and Sink().wants_pixels
    sink.check(result.run, result.constants, result.locate)
    Sink().check(result.run, result.constants, None)
    sink.check(result.run, result.constants, [].__getitem__)        # a run without events
    raw = hand_constants(pedestals_GPSF=np.zeros((1, *SHAPE)), gain_GPSF=np.ones((1, *SHAPE)))
    for constants, locate in ((raw, result.locate), (result.constants, None),
                              (result.constants, lambda i: (str(source), "/nothing", i)),
                              (result.constants, lambda i: (str(tmp_path / "no"), "/x", i))):
        with pytest.raises(ConfigurationError, match="--cxi-link"):
            sink.check(result.run, constants, locate)


def test_links_without_hits_are_an_empty_file(tmp_path, linked):
    result, _ = linked
    with written(tmp_path, empty_result(3, locate=result.locate), link=True) as file:
        assert file["entry_1/data_1/data"].shape == (0, 16, 16)
