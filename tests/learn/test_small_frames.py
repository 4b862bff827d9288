"""Small pictures of frames: where the beam is, what counts, and pixels that never answer."""
import h5py
import numpy as np
import pytest

from xfel_classify.config import build
from xfel_classify.core import ConfigurationError
from xfel_classify.learn.event_selections import event_lists, labels_of, selected_events
from xfel_classify.learn.small_frames import Shrinker, read_small, small_frames


def opened(path, **more):
    return build("sources", {"use": "hdf5", "files": [str(path)], "detector": "assembled",
                             "unit": "photon", "pixel_size_m": 1e-4, **more})


@pytest.fixture
def run(tmp_path):
    rng = np.random.default_rng(0)
    frames = rng.poisson(4.0, (30, 40, 60)).astype("f4")
    with h5py.File(tmp_path / "run.h5", "w") as file:
        file["data"] = frames
        file["timestamp"] = np.arange(30, dtype="u8") + 500
    return tmp_path / "run.h5", frames


def test_elements_are_means_about_the_beam(run):
    path, frames = run
    with opened(path, beam_center_px=[24.0, 16.0]) as source:
        small = read_small(source, side=16)
    assert small.pool == 4 and small.images_NHW.shape == (30, 10, 15)
    expected = frames.reshape(30, 10, 4, 15, 4).mean((2, 4))
    np.testing.assert_allclose(small.images_NHW, expected, rtol=1e-5)
    assert small.beam_RC == (4.0, 6.0)          # from the top: 16 of 40 rows, 24 of 60 columns
    assert small.good_HW.all() and small.index_N.tolist() == list(range(30))
    assert small.timestamp_N[0] == 500 and not small.unusable


def test_a_reach_cuts_and_chunks_agree(run):
    path, _ = run
    with opened(path) as source:
        whole = read_small(source, side=100, reach_px=10)
        pieces = list(small_frames(source, side=100, reach_px=10, chunk=7))
    assert whole.images_NHW.shape == (30, 20, 20) and whole.pool == 1
    np.testing.assert_array_equal(np.concatenate([p.images_NHW for p in pieces]),
                                  whole.images_NHW)


def test_masked_pixels_do_not_dilute(run, tmp_path):
    path, frames = run
    mask = np.ones((40, 60), "u1")
    mask[:, 1::2] = 0
    np.save(tmp_path / "mask.npy", mask)
    with opened(path, mask=str(tmp_path / "mask.npy"), beam_center_px=[24.0, 16.0]) as source:
        small = read_small(source, side=16)
    expected = frames[:, :, ::2].reshape(30, 10, 4, 15, 2).mean((2, 4))
    np.testing.assert_allclose(small.images_NHW, expected, rtol=1e-5)


def test_a_gap_that_no_mask_names_is_found(tmp_path):
    rng = np.random.default_rng(1)
    frames = rng.poisson(4.0, (30, 40, 60)).astype("f4")
    frames[:, :, 30:37] = 0                     # one element and three quarters
    with h5py.File(tmp_path / "run.h5", "w") as file:
        file["data"] = frames
    with opened(tmp_path / "run.h5") as source:
        small = read_small(source, side=16)
    assert not small.good_HW[:, 8].any() and small.good_HW.sum() == 150
    assert small.images_NHW[:, :, 7].mean() == pytest.approx(4.0, rel=0.1)
    assert small.images_NHW[:, :, 9].mean() == pytest.approx(4.0, rel=0.1)
    assert "280 pixels are 0 in every frame" in small.notes[-1]


def test_far_pixels_without_photons_are_no_gap(tmp_path):
    y, x = np.mgrid[-15:15, -15:15] + 0.5
    frames = np.random.default_rng(2).poisson(50 * np.exp(-np.hypot(y, x) / 1.5), (20, 30, 30))
    with h5py.File(tmp_path / "run.h5", "w") as file:
        file["data"] = frames.astype("f4")
    with opened(tmp_path / "run.h5") as source:
        small = read_small(source, side=30)
    assert small.good_HW.all() and (small.images_NHW.sum(0) == 0).any()


def test_nothing_within_reach(run):
    path, _ = run
    with opened(path, beam_center_px=[500.0, 500.0]) as source, \
            pytest.raises(ConfigurationError, match="no working pixel lies within 20"):
        Shrinker(source.constants(), 16, reach_px=20)


def test_event_lists_are_read_back(tmp_path):
    index, stamps = np.array([7, 2, 5]), np.array([70, 20, 50])
    for name, content in event_lists("r0001_good", 1, index, stamps).items():
        (tmp_path / name).write_bytes(content)
    assert (tmp_path / "r0001_good.txt").read_text() == "1 2\n1 5\n1 7\n"
    assert np.load(tmp_path / "r0001_good.npy").dtype == np.uint64
    for suffix in ("npy", "txt"):
        found = selected_events(tmp_path / f"r0001_good.{suffix}", np.arange(8),
                                10 * np.arange(8))
        assert np.flatnonzero(found).tolist() == [2, 5, 7]


def test_labels_of_an_experts_list(tmp_path):
    (tmp_path / "expert.txt").write_text("a.h5 [1] HIT\na.h5 [3] MISS\na.h5 [4] MAYBE\n")
    found = labels_of(tmp_path / "expert.txt", np.arange(6), np.arange(6) + 100)
    assert found.tolist() == [1, -1, 0, -1, -1, -1]
    (tmp_path / "other.txt").write_text("a.h5 [99] HIT\n")
    with pytest.raises(ConfigurationError, match="none of them"):
        labels_of(tmp_path / "other.txt", np.arange(6), np.arange(6) + 100)
