"""The summary, read back with plain h5py."""
import h5py
import numpy as np
import pytest
from conformance.sink_conformance import SinkConformance
from mockdata.hand_result import (
    COLUMNS,
    EPOCH_STAMPS,
    SHAPE,
    empty_result,
    hand_constants,
    hand_result,
    ragged,
)

from xfel_classify.core import OutputError, Total
from xfel_classify.sinks.summary import Sink, radial_profile


class TestSummaryConforms(SinkConformance):
    @pytest.fixture
    def sink(self):
        return Sink()


@pytest.fixture
def summary(tmp_path):
    (name,) = Sink().write(hand_result(), tmp_path)
    with h5py.File(tmp_path / f"{name}.tmp") as file:
        yield file


def test_root_attributes_say_what_the_run_is(summary):
    assert summary.attrs["exp"] == "mfxl1033223" and summary.attrs["run"] == 95
    assert summary.attrs["events"] == 6 and summary.attrs["hits"] == 3
    assert bool(summary.attrs["complete"]) is True and summary.attrs["events_expected"] == 6
    assert summary.attrs["configuration"] == "[source]\n"
    assert summary.attrs["model_name"] == "sfx-hit"
    assert summary.attrs["constants_identity"] == "0123abcd"
    assert summary.attrs["versions"] == '{"numpy": "2"}'
    assert list(summary.attrs["notes"]) == ["photon energy assumed"]
    assert summary.attrs["source_files"] == "a.h5"
    assert summary.attrs["format_version"] == 1 and "offsets" in summary.attrs["layout"]


def test_identity_and_status(summary):
    assert summary["timestamp"].dtype == np.int64
    np.testing.assert_array_equal(summary["timestamp"], EPOCH_STAMPS)
    np.testing.assert_array_equal(summary["index"], np.arange(6))
    np.testing.assert_array_equal(summary["kept"], [0, 1, 0, 1, 1, 0])
    np.testing.assert_array_equal(summary["damage"], [0, 0, 0, 0, 0, 4])
    status = summary["status"]
    assert status.dtype == np.uint8
    names = dict(zip(status.attrs["values"], status.attrs["names"], strict=True))
    assert [names[value] for value in status[()]] == ["OK"] * 5 + ["DAMAGED"]
    assert "damaged" in status.attrs["reasons"][2]
    counts = dict(zip(summary["reason/names"].asstr()[()], summary["reason/counts"][()],
                      strict=True))
    assert counts["OK"] == 5 and counts["DAMAGED"] == 1 and sum(counts.values()) == 6


def test_columns_are_at_their_paths_with_unit_doc_and_missing_value(summary):
    score = summary["hit/score"]
    np.testing.assert_array_equal(score, np.float32([.1, .9, .2, .8, .7, np.nan]))
    assert score.attrs["doc"] == "probability of a hit" and np.isnan(score.attrs["missing"])
    assert list(summary["hit/label"].attrs["names"]) == ["miss", "hit"]
    assert summary["hit/label"].attrs["missing"] == -1 and summary["hit/label"][5] == -1
    assert summary["photon_energy_eV"].attrs["units"] == "eV"
    assert summary["hit/both"].shape == (6, 2)


def test_ragged_columns_are_sliced_by_their_offsets(summary):
    expected = hand_result().rows
    for path in (p for p, column in COLUMNS.items() if column.ragged):
        dataset = summary[path]
        offsets = summary[dataset.attrs["offsets"]][()]
        assert len(offsets) == 7
        assert dataset.dtype == COLUMNS[path].dtype
        for row in range(6):
            np.testing.assert_array_equal(
                dataset[offsets[row]:offsets[row + 1]], expected[path][row].astype(dataset.dtype))
    assert summary["peaks/fs"].attrs["offsets"] == "/peaks/offsets"
    assert summary["event_codes"].attrs["offsets"] == "/event_codes_offsets"


def test_ragged_columns_of_other_lengths_get_their_own_offsets(tmp_path):
    rows = dict(hand_result().rows)
    rows["peaks/snr"] = ragged([1.0], [], [], [], [], [])
    Sink().write(hand_result(rows=rows), tmp_path)
    with h5py.File(tmp_path / "mfxl1033223_r0095.h5.tmp") as file:
        assert file["peaks/snr"].attrs["offsets"] == "/peaks/snr_offsets"
        np.testing.assert_array_equal(file["peaks/snr_offsets"], [0, 1, 1, 1, 1, 1, 1])
        np.testing.assert_array_equal(
            file[file["peaks/fs"].attrs["offsets"]], [0, 0, 3, 3, 3, 4, 4])


def test_ragged_column_with_the_wrong_number_of_rows_is_refused(tmp_path):
    rows = dict(hand_result().rows)
    rows["peaks/fs"] = rows["peaks/fs"][:-1]
    with pytest.raises(OutputError, match="5 rows"):
        Sink().write(hand_result(rows=rows), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_rows_without_a_column_hold_its_missing_value(tmp_path):
    rows = {k: v for k, v in hand_result().rows.items() if not k.startswith(("hit", "peaks"))}
    Sink().write(hand_result(rows=rows), tmp_path)
    with h5py.File(tmp_path / "mfxl1033223_r0095.h5.tmp") as file:
        assert np.isnan(file["hit/score"][()]).all() and (file["hit/label"][()] == -1).all()
        assert (file["peaks/n"][()] == -1).all() and len(file["peaks/fs"]) == 0
        np.testing.assert_array_equal(file[file["peaks/fs"].attrs["offsets"]], [0] * 7)


def test_sums_come_out_in_their_unit_with_mean_and_radial_profile(summary):
    ramp = np.arange(256).reshape(SHAPE)
    total = summary["totals/sum"]
    assert total.dtype == np.float32 and total.attrs["events"] == 5
    np.testing.assert_array_equal(total, ramp)
    np.testing.assert_allclose(summary["totals/mean"], ramp / 5, rtol=1e-6)
    assert summary["totals/mean"].attrs["units"] == "photon"
    np.testing.assert_array_equal(summary["totals/powder_max_hits"], 7)
    profile, count = summary["totals/radial_profile"], summary["totals/radial_pixels"]
    assert count[()].sum() == hand_constants().good_PSF.sum()
    good, geometry = hand_constants().good_PSF, hand_constants().geometry
    radius = np.hypot(geometry.x_m_PSF, geometry.y_m_PSF) / geometry.pixel_size_m
    ring = good & (radius >= 6) & (radius < 7)
    assert count[6] == ring.sum()
    np.testing.assert_allclose(profile[6], (ramp / 5)[ring].mean(), rtol=1e-5)
    assert summary["totals/radial_radius_px"][6] == 6.5


def test_radial_profile_of_a_flat_image_is_flat_and_ignores_masked_pixels():
    radius = np.array([[[0.2, 1.5, 1.7, 3.1]]])
    image, good = np.full((1, 1, 4), 2.0), np.array([[[True, True, False, True]]])
    image[0, 0, 2] = 1e9
    profile, count = radial_profile(image, good, radius)
    np.testing.assert_array_equal(profile, np.float32([2, 2, np.nan, 2]))
    np.testing.assert_array_equal(count, [1, 1, 0, 1])


def test_timing_is_in_a_group_of_its_own(summary):
    assert list(summary["timing/stage"].asstr()[()]) == ["read", "infer"]
    np.testing.assert_array_equal(summary["timing/seconds"], [[1.0, 2.0]])


def test_only_timing_differs_between_equal_runs(tmp_path):
    contents = []
    for seconds in (1.0, 2.0):
        Sink().write(hand_result(timing={"seconds": np.array([seconds])}), tmp_path)
        with h5py.File(tmp_path / "mfxl1033223_r0095.h5.tmp") as file:
            found = {}
            file.visititems(lambda path, thing, found=found: found.update(
                {path: thing[()].tobytes()}) if isinstance(thing, h5py.Dataset)
                and thing.dtype.kind != "O" else None)
            contents.append(found)
    different = [path for path in contents[0] if contents[0][path] != contents[1][path]]
    assert different == ["timing/seconds"]


def test_an_empty_run_has_every_dataset_with_no_rows(tmp_path):
    Sink().write(empty_result(), tmp_path)
    with h5py.File(tmp_path / "mfxl1033223_r0095.h5.tmp") as file:
        for path, column in COLUMNS.items():
            assert file[path].shape == (() if column.ragged else (0, *column.shape)) or \
                file[path].shape == (0,)
        assert file["reason/counts"][()].sum() == 0
        assert np.all(file["totals/mean"][()] == 0)


def test_unknown_number_of_events_is_minus_one(tmp_path):
    Sink().write(hand_result(attributes={"complete": True, "events_expected": None}), tmp_path)
    with h5py.File(tmp_path / "mfxl1033223_r0095.h5.tmp") as file:
        assert file.attrs["events_expected"] == -1


def test_large_columns_are_compressed_and_tiny_files_stay_small(tmp_path):
    Sink().write(hand_result(), tmp_path)
    path = tmp_path / "mfxl1033223_r0095.h5.tmp"
    assert path.stat().st_size < 150_000
    totals = {"sum": Total(np.zeros((2, 512, 1024), np.int64), "sum", 5)}
    Sink().write(hand_result(totals=totals), tmp_path)
    with h5py.File(path) as file:
        assert file["totals/sum"].compression == "gzip" and file["totals/sum"].shuffle
        assert file["totals/sum"].chunks == (1, 512, 1024)
        assert file["hit/score"].compression is None
    assert path.stat().st_size < 200_000


def test_errors_of_the_rows_are_not_blamed_on_the_disk(tmp_path):
    rows = dict(hand_result().rows)
    rows["hit/score"] = np.zeros(5)
    with pytest.raises(ValueError, match="reshape"):
        Sink().write(hand_result(rows=rows), tmp_path)
    assert list(tmp_path.iterdir()) == []
