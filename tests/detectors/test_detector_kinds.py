"""Kinds, layouts of frames, masks."""
import h5py
import numpy as np
import pytest

from xfel_classify.core import ConstantsError, UnknownComponent
from xfel_classify.detectors import (
    as_panels,
    combine,
    detector,
    edges,
    guess_kind,
    kinds,
    load_mask,
    saturated,
)
from xfel_classify.detectors.cspad import panels_from_slab, slab_from_panels
from xfel_classify.detectors.epix10ka import planes_of_control_bits, select_stages
from xfel_classify.detectors.rayonix import pixel_size_m


def test_every_kind_is_found_by_its_file_name():
    assert set(kinds()) == {"assembled", "cspad", "epix10ka", "generic", "jungfrau", "pnccd",
                            "rayonix"}
    for kind in kinds():
        assert detector(kind).kind == kind


@pytest.mark.parametrize("kind", ["eiger", "detector", "constants", "../core", ""])
def test_an_unknown_kind_names_the_known_ones(kind):
    with pytest.raises(UnknownComponent, match="jungfrau, pnccd"):
        detector(kind)


@pytest.mark.parametrize("shape, kind", [
    ((8, 512, 1024), "jungfrau"), ((4096, 1024), "jungfrau"), ((512, 1024), "jungfrau"),
    ((16, 352, 384), "epix10ka"), ((4, 8, 185, 388), "cspad"), ((1480, 1552), "cspad"),
    ((32, 185, 388), "cspad"), ((4, 512, 512), "pnccd"), ((1, 1920, 1920), "rayonix"),
    ((2527, 2463), "assembled"), ((16, 512, 128), "generic")])
def test_kinds_are_guessed_from_shapes(shape, kind):
    assert guess_kind(shape) == kind


def test_frames_of_any_layout_become_panels():
    slab = np.arange(4096 * 1024, dtype=np.uint32).reshape(4096, 1024)
    panels = as_panels(slab, "jungfrau")
    assert panels.shape == (8, 512, 1024) and np.shares_memory(panels, slab)
    np.testing.assert_array_equal(panels[3], slab[1536:2048])
    assert as_panels(slab).shape == (1, 4096, 1024)
    quads = np.arange(4 * 8 * 185 * 388).reshape(4, 8, 185, 388)
    np.testing.assert_array_equal(as_panels(quads, "cspad"), quads.reshape(32, 185, 388))
    with pytest.raises(ConstantsError, match=r"\(512, 1024\)"):
        as_panels(np.zeros((100, 100)), "jungfrau")
    with pytest.raises(ConstantsError, match="panels, slow, fast"):
        as_panels(np.zeros(5), "jungfrau")


def test_the_slab_of_the_cspad_and_back():
    panels = np.arange(32 * 185 * 388).reshape(32, 185, 388)
    slab = slab_from_panels(panels)
    assert slab.shape == (1480, 1552)
    np.testing.assert_array_equal(slab[185:370, 388:776], panels[9])    # quadrant 1, sensor 1
    np.testing.assert_array_equal(panels_from_slab(slab), panels)
    np.testing.assert_array_equal(as_panels(slab, "cspad"), panels)


def test_rayonix_pixels_follow_the_binning():
    assert pixel_size_m(1920) == pytest.approx(177.08e-6, abs=1e-8)
    assert pixel_size_m(3840, "MX170") == pytest.approx(44.27e-6, abs=1e-8)


# --- ePix10ka -------------------------------------------------------------------------------------

def test_stages_by_mode_and_by_control_bits():
    planes = np.arange(7, dtype=np.float32)[:, None, None, None] * np.ones((1, 2, 3), np.float32)
    assert [p.flat[0] for p in select_stages(planes, "AML")] == [4, 6]
    control = np.array([[[28, 12, 8], [16, 0, 24]]])
    chosen = select_stages(planes, control)
    np.testing.assert_array_equal(chosen[0, 0], [[0, 1, 2], [3, 4, 2]])
    np.testing.assert_array_equal(chosen[1, 0], [[0, 1, 2], [5, 6, 2]])
    with pytest.raises(ConstantsError, match="AHL"):
        select_stages(planes, "XYZ")
    with pytest.raises(ConstantsError, match="7 planes"):
        select_stages(planes[:3], "FH")


@pytest.mark.psana
def test_control_bits_mean_what_they_mean_to_psana():
    utils = pytest.importorskip("psana.detector.UtilsEpix10ka")
    control = np.arange(32).reshape(1, 4, 8)
    for bit14 in (0, 1):
        maps = np.array(utils.gain_maps_epix10ka_any_alg(control | bit14 << 5))
        expected = np.where(maps.any(axis=0), maps.argmax(axis=0), -1)
        np.testing.assert_array_equal(planes_of_control_bits(control)[bit14], expected)


# --- masks ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("layout", [(2, 4, 6), (8, 6), (1, 2, 4, 6)])
def test_masks_of_any_file_and_layout(tmp_path, layout):
    good = np.random.default_rng(0).random((2, 4, 6)) > 0.3
    np.save(tmp_path / "m.npy", good.reshape(layout))
    np.savez(tmp_path / "m.npz", mask=good.reshape(layout).astype(np.uint8))
    with h5py.File(tmp_path / "m.h5", "w") as file:
        file["mask"] = good.reshape(layout).astype(np.int32)
        file["entry_1/data_1/mask"] = (~good).reshape(layout).astype(np.uint32) * 16
    for where in ("m.npy", "m.npz", "m.h5:/mask", "m.h5:/entry_1/data_1/mask"):
        np.testing.assert_array_equal(load_mask(tmp_path / where, (2, 4, 6)), good)
    np.testing.assert_array_equal(load_mask(tmp_path / "m.npy", (2, 4, 6), good_is=0), ~good)


def test_masks_that_cannot_be_used_say_why(tmp_path):
    np.save(tmp_path / "m.npy", np.ones((3, 3)))
    with h5py.File(tmp_path / "m.h5", "w") as file:
        file["a/b"] = np.ones((2, 4, 6))
    np.savez(tmp_path / "m.npz", a=np.ones(2), b=np.ones(2))
    (tmp_path / "broken.npy").write_bytes(b"nothing")
    for where, words in (("m.npy", r"\(3, 3\)"), ("m.h5", "needs a data set"),
                         ("m.h5:/a/c", "no such data set"), ("m.npz", "rename the mask"),
                         ("none.npy", "no such file"), ("broken.npy", "plain array")):
        with pytest.raises(ConstantsError, match=words):
            load_mask(tmp_path / where, (2, 4, 6))


def test_edges_are_those_of_asics():
    good = edges(detector("jungfrau"), (1, 512, 1024))
    assert not good[0, [0, 255, 256, 511]].any() and not good[0, :, [0, 255, 256, 1023]].any()
    assert good.sum() == 8 * 254 * 254
    assert edges(detector("generic"), (2, 5, 5), 1).sum() == 2 * 9
    assert edges(detector("jungfrau"), (1, 512, 1024), 0).all()


def test_masks_combine():
    a, b = np.array([[[1, 1, 0]]]), np.array([[[True, False, True]]])
    np.testing.assert_array_equal(combine(None, a, b), [[[True, False, False]]])
    assert combine(None, None) is None


def test_full_pixels():
    words = np.array([16383, 3 << 14, 3 << 14 | 5, 1 << 14], np.uint16)
    assert saturated(words, detector("jungfrau")).tolist() == [False, True, False, False]
    assert saturated(words, detector("epix10ka")).tolist() == [True, False, False, False]
    assert saturated(np.array([65535, 3]), detector("rayonix")).tolist() == [True, False]
    assert not saturated(words, detector("generic")).any()
