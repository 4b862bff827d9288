"""Constants: files, checks, bad pixels, identity."""
import dataclasses

import h5py
import numpy as np
import pytest

from xfel_classify.core import ConstantsError
from xfel_classify.detectors import (
    detector,
    flat_geometry,
    load_constants,
    make_constants,
    save_constants,
    uncalibrated_constants,
)

SHAPE = (2, 8, 16)
TINY = dataclasses.replace(detector("jungfrau"), panel_shape_SF=None)
GEOMETRY = flat_geometry(SHAPE, 75e-6)


def mapping(**changes):
    rng = np.random.default_rng(0)
    stages = (3, *SHAPE)
    return {"pedestals": rng.normal(3000, 9, stages).astype(np.float32),
            "pixel_gain": np.array([41.5, -1.39, -0.11], np.float32)[:, None, None, None]
            * np.ones(stages, np.float32),
            "pixel_rms": np.full(stages, 2.5, np.float32),
            "pixel_status": np.zeros(stages, np.uint64),
            "geometry": "# text", **changes}


def test_constants_come_back_from_a_file(tmp_path):
    path, given = tmp_path / "constants.h5", mapping()
    save_constants(path, "jungfrau", given)
    save_constants(path, "epix", {"pedestals": np.ones((1, 2, 2))})
    save_constants(path, "jungfrau", given)
    found = load_constants(path, "jungfrau", "jungfrau", SHAPE)
    assert found["geometry"] == "# text" and set(found) == set(given)
    for name in ("pedestals", "pixel_gain", "pixel_rms", "pixel_status"):
        np.testing.assert_array_equal(found[name], given[name])
        assert found[name].dtype == given[name].dtype
    with h5py.File(path) as file:
        assert sorted(file) == ["epix", "jungfrau"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_with_one_detector_serves_any_name(tmp_path):
    save_constants(tmp_path / "c.h5", "other", mapping())
    assert "pedestals" in load_constants(tmp_path / "c.h5", "jungfrau")
    save_constants(tmp_path / "c.h5", "second", mapping())
    with pytest.raises(ConstantsError, match="other, second"):
        load_constants(tmp_path / "c.h5", "jungfrau")


def test_files_that_cannot_be_used_say_why(tmp_path):
    with pytest.raises(ConstantsError, match="no such file"):
        load_constants(tmp_path / "none.h5", "jungfrau")
    (tmp_path / "broken.h5").write_bytes(b"not hdf5")
    with pytest.raises(ConstantsError, match="copy the file again"):
        load_constants(tmp_path / "broken.h5", "jungfrau")
    with h5py.File(tmp_path / "empty.h5", "w") as file:
        file["jungfrau/something"] = 1
    with pytest.raises(ConstantsError, match="none of pedestals"):
        load_constants(tmp_path / "empty.h5", "jungfrau")
    save_constants(tmp_path / "c.h5", "jungfrau", mapping())
    with pytest.raises(ConstantsError, match=r"\(4, 8, 16\).*\(3, 2, 8, 16\)"):
        load_constants(tmp_path / "c.h5", "jungfrau", "jungfrau", (4, 8, 16))
    with pytest.raises(ConstantsError, match="none of"):
        save_constants(tmp_path / "c.h5", "jungfrau", {"note": "x"})
    with pytest.raises(ConstantsError, match="space left"):
        save_constants(tmp_path / "no" / "c.h5", "jungfrau", mapping())


def test_bad_pixels_are_those_with_status_or_unusable_numbers():
    given = mapping()
    given["pixel_gain"][1, 0, 0, 0] = np.nan
    given["pixel_gain"][0, 0, 0, 1] = 0
    given["pedestals"][2, 0, 0, 2] = np.inf
    given["pixel_status"][1, 0, 0, 3] = 1
    extra = np.ones(SHAPE, bool)
    extra[0, 0, 4] = False
    bad = np.zeros(SHAPE, bool)
    bad[0, 0, 5] = True
    mask = np.ones(SHAPE, np.uint8)
    mask[0, 0, 6] = 0
    constants = make_constants(TINY, SHAPE, {**given, "pixel_mask": mask},
                               dataclasses.replace(GEOMETRY, bad_PSF=bad), extra_good_PSF=extra)
    assert np.flatnonzero(~constants.good_PSF).tolist() == [0, 1, 2, 3, 4, 5, 6]
    for array in (constants.pedestals_GPSF, constants.gain_GPSF, constants.noise_PSF):
        assert np.isfinite(array).all()
    assert constants.gain_bits == "top2" and constants.unit == "keV" and not constants.calibrated
    assert (constants.gain_GPSF[1][constants.good_PSF] < 0).all()
    assert constants.noise_PSF.shape == SHAPE and constants.noise_PSF[1, 0, 0] == 2.5


def test_the_arrays_given_are_left_alone():
    given = mapping()
    given["pixel_gain"][0, 0, 0, 0] = 0
    before = {name: np.copy(v) for name, v in given.items() if name != "geometry"}
    make_constants(TINY, SHAPE, given, GEOMETRY)
    for name, values in before.items():
        np.testing.assert_array_equal(given[name], values)


@pytest.mark.parametrize("changes, words", [
    ({"pedestals": None}, "need pedestals.*pixel_gain"),
    ({"pedestals": np.zeros((3, 2, 8, 15))}, r"'pedestals'.*\(3, 2, 8, 15\)"),
    ({"pixel_gain": np.ones((2, *SHAPE))}, "'pixel_gain' has 2 planes.*3 gain stages"),
    ({"pixel_gain": np.full((3, *SHAPE), np.nan)}, "no pixel has a finite pedestal"),
    ({"pixel_status": np.ones((3, *SHAPE))}, "no good pixel is left"),
    ({"pixel_mask": np.ones((3, *SHAPE))}, "'pixel_mask'"),
])
def test_constants_that_cannot_be_used_say_why(changes, words):
    given = mapping()
    given.update(changes)
    with pytest.raises(ConstantsError, match=words):
        make_constants(TINY, SHAPE, given, GEOMETRY)


def test_masks_and_geometries_must_fit():
    with pytest.raises(ConstantsError, match="extra mask"):
        make_constants(TINY, SHAPE, mapping(), GEOMETRY, extra_good_PSF=np.ones((1, 8, 16)))
    with pytest.raises(ConstantsError, match="geometry"):
        make_constants(TINY, SHAPE, mapping(), flat_geometry((1, 8, 16), 75e-6))
    with pytest.raises(ConstantsError, match="no good pixel"):
        uncalibrated_constants(SHAPE, GEOMETRY, np.zeros(SHAPE, bool))


def test_a_single_stage_needs_no_stage_axis_and_no_gain():
    generic = detector("generic")
    constants = make_constants(generic, SHAPE, {"pedestals": np.ones(SHAPE)}, GEOMETRY)
    assert constants.pedestals_GPSF.shape == (1, *SHAPE) and constants.unit == "ADU"
    slab = np.arange(32 * 185 * 388, dtype=np.float32).reshape(4, 8, 185, 388)
    cspad = make_constants(detector("cspad"), (32, 185, 388), {"pedestals": slab},
                           flat_geometry((32, 185, 388), 1e-4))
    np.testing.assert_array_equal(cspad.pedestals_GPSF[0], slab.reshape(32, 185, 388))


def test_epix_planes_need_a_mode():
    shape = (1, 352, 384)
    given = {"pedestals": np.arange(7.)[:, None, None, None] * np.ones(shape),
             "pixel_gain": np.ones((7, *shape)), "pixel_status": np.zeros((7, *shape), int)}
    geometry = flat_geometry(shape, 1e-4)
    with pytest.raises(ConstantsError, match="which gain mode"):
        make_constants(detector("epix10ka"), shape, given, geometry)
    constants = make_constants(detector("epix10ka"), shape, given, geometry, gain_mode="AHL")
    assert [p.flat[0] for p in constants.pedestals_GPSF] == [3, 5]
    control = np.full(shape, 16)
    control[0, 0, 0] = 4                        # names no mode
    constants = make_constants(detector("epix10ka"), shape, given, geometry, gain_mode=control)
    assert not constants.good_PSF[0, 0, 0] and constants.good_PSF.sum() == 352 * 384 - 1


def test_identity_changes_with_everything_that_matters():
    first = make_constants(TINY, SHAPE, mapping(), GEOMETRY).identity
    assert first == make_constants(TINY, SHAPE, mapping(), GEOMETRY).identity and len(first) == 64
    extra = np.ones(SHAPE, bool)
    extra[0, 0, 0] = False
    others = [make_constants(TINY, SHAPE, mapping(), GEOMETRY, extra_good_PSF=extra),
              make_constants(TINY, SHAPE, mapping(), dataclasses.replace(GEOMETRY, distance_m=.2)),
              make_constants(TINY, SHAPE, mapping(), GEOMETRY, unit="ADU"),
              make_constants(TINY, SHAPE, mapping(pedestals=mapping()["pedestals"] + 1), GEOMETRY),
              uncalibrated_constants(SHAPE, GEOMETRY)]
    assert len({first} | {c.identity for c in others}) == 6
