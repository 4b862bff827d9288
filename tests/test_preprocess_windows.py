"""Laws of windows: render == window(calibrate), and windows show the right pixels."""
import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xfel_classify import preprocess
from xfel_classify.core import ConfigurationError, EventError, Geometry, Window
from xfel_classify.detectors import (
    assembled_geometry,
    default_geometry,
    detector,
    flat_geometry,
    make_constants,
    uncalibrated_constants,
)

NORMALIZE = ["none", "clip", "sqrt_floor", "standardize"]
windows = st.builds(
    Window, kind=st.sampled_from(["crop", "downsample", "quadrant"]), height=st.integers(1, 40),
    width=st.integers(1, 40), pool=st.integers(1, 5), quadrant=st.sampled_from("ABCD"),
    normalize=st.sampled_from(NORMALIZE), clip=st.sampled_from([0.5, 3.0, 65025.0]),
    pool_by=st.sampled_from(["max", "mean"]))


def scattered_geometry(shape, rng, tilt=True) -> Geometry:
    """Panels of a ring around the beam, turned and shifted at random, with gaps."""
    p, s, f = shape
    size = 75e-6
    x, y = np.empty(shape), np.empty(shape)
    for i in range(p):
        angle = rng.integers(0, 4) * np.pi / 2 + (rng.normal(0, 0.01) if tilt else 0.0)
        at = 0.6 * (s + f) * np.array([np.cos(2 * np.pi * i / p), np.sin(2 * np.pi * i / p)])
        ss, fs = np.arange(s)[:, None] - (s - 1) / 2, np.arange(f)[None] - (f - 1) / 2
        x[i] = at[0] + np.cos(angle) * fs - np.sin(angle) * ss
        y[i] = at[1] + np.sin(angle) * fs + np.cos(angle) * ss
    x, y = (x * size).astype(np.float32), (y * size).astype(np.float32)
    bad = rng.random(shape) < 0.02
    bad[0, 0, 0] = False
    return Geometry(x, y, np.zeros_like(x), size, bad_PSF=bad)


def gain_run(shape, rng, geometry):
    kind = dataclasses.replace(detector("jungfrau"), panel_shape_SF=None)
    stages = (3, *shape)
    status = (rng.random(stages) < 0.03).astype(np.uint64)
    status[:, 0, 0, 0] = 0
    constants = make_constants(kind, shape, {
        "pedestals": rng.normal(3000, 50, stages),
        "pixel_gain": rng.normal(40, 3, stages) * np.array([1, -.03, -.003])[:, None, None, None],
        "pixel_offset": rng.normal(0, 2, stages),
        "pixel_status": status}, geometry)
    codes = rng.choice([0, 1, 2, 3], shape, p=[0.9, 0.06, 0.01, 0.03]).astype(np.uint16)
    return constants, rng.integers(2000, 9000, shape).astype(np.uint16) | codes << 14


@settings(max_examples=150, deadline=None)
@given(windows, st.integers(1, 4), st.integers(1, 24), st.integers(1, 40), st.integers(0, 2**31),
       st.sampled_from([1.0, 1 / 9.5]))
def test_render_is_window_of_calibrate(window, p, s, f, seed, scale):
    rng = np.random.default_rng(seed)
    geometry = scattered_geometry((p, s, f), rng)
    constants, raw = gain_run((p, s, f), rng, geometry)
    plan = preprocess.plan_render(constants, window)
    out = np.full(window.shape, np.nan, np.float32)
    preprocess.render(raw, plan, out, scale)
    expected = preprocess.window(preprocess.calibrate(raw, constants), plan, scale)
    assert expected.dtype == np.float32
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(out, preprocess._render_reference(raw, plan, scale))
    assert not out[~plan.good_HW].any()
    assert set(plan.panels) <= set(range(p))


@pytest.mark.parametrize("dtype", ["uint16", "int16", "int32", "uint32", "float32", "float64"])
@pytest.mark.parametrize("pool, by", [(1, "max"), (3, "max"), (3, "mean")])
@pytest.mark.parametrize("normalize", NORMALIZE)
def test_calibrated_frames_of_every_type(dtype, pool, by, normalize):
    rng = np.random.default_rng(8)
    shape = (3, 20, 33)
    good = rng.random(shape) > 0.1
    constants = uncalibrated_constants(shape, scattered_geometry(shape, rng), good)
    raw = rng.normal(20, 10, shape).clip(0 if dtype[0] == "u" else -99, 99).astype(dtype)
    if raw.dtype.kind == "f":
        raw[rng.random(shape) < 0.1] = np.nan
        raw[rng.random(shape) < 0.05] = np.inf
    window = Window(height=40 // pool, width=44 // pool, pool=pool, normalize=normalize, clip=25.,
                    pool_by=by)
    plan = preprocess.plan_render(constants, window)
    out = np.empty(window.shape, np.float32)
    preprocess.render(raw, plan, out, 0.3)
    np.testing.assert_array_equal(out, preprocess.window(raw.astype(np.float32), plan, 0.3))
    assert np.isfinite(out).all()
    # what is masked, or not finite, may hold anything
    other = np.where(plan.good_PSF, raw, np.asarray(77, dtype))
    if raw.dtype.kind == "f":
        other[~np.isfinite(raw)] = -np.inf
    again = np.empty_like(out)
    preprocess.render(other, plan, again, 0.3)
    np.testing.assert_array_equal(out, again)


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_standardize_and_friends_ignore_masked_pixels(normalize):
    rng = np.random.default_rng(1)
    image = rng.poisson(5.0, (40, 50)).astype(np.float32)
    good = rng.random(image.shape) > 0.3
    window = Window(height=20, width=24, normalize=normalize, clip=8.0)
    a = preprocess.image_window(image, window, good_HW=good)
    b = preprocess.image_window(np.where(good, image, np.float32(9e9)), window, good_HW=good)
    np.testing.assert_array_equal(a, b)
    if normalize == "standardize":
        inside = good[10:30, 13:37]
        assert abs(a[inside].mean()) < 1e-6 and abs(a[inside].std() - 1) < 1e-6
        assert not a[~inside].any()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 3), st.integers(1, 3), st.integers(1, 60), st.integers(1, 2100),
       st.integers(0, 2**31), st.sampled_from(["uint16", "float32"]))
def test_pixels_side_by_side_are_copied_either_way_round(turns, p, s, f, seed, dtype):
    """Axis-aligned panels with gaps, turned by quarters, wider than the kernel's blocks."""
    rng = np.random.default_rng(seed)
    geometry = scattered_geometry((p, s, f), rng, tilt=False)
    x, y = geometry.x_m_PSF, geometry.y_m_PSF
    for _ in range(turns):
        x, y = -y, x
    geometry = dataclasses.replace(geometry, x_m_PSF=x, y_m_PSF=y)
    good = rng.random((p, s, f)) > 0.01
    good[0, 0, 0], geometry.bad_PSF[...] = True, False
    constants = uncalibrated_constants((p, s, f), geometry, good)
    raw = rng.integers(0, 65536, (p, s, f)).astype(dtype)
    window = Window(height=61, width=int(rng.integers(1, 3000)), normalize="none")
    plan = preprocess.plan_render(constants, window)
    out = np.empty(window.shape, np.float32)
    preprocess.render(raw, plan, out)
    expected = np.where(plan.index_HW >= 0, raw.ravel()[np.maximum(plan.index_HW, 0)], 0)
    np.testing.assert_array_equal(out, expected.astype(np.float32))


@pytest.mark.parametrize("bar", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_renders_the_same(bar):
    if not preprocess.compiled() or bar not in preprocess._native.variants():
        pytest.skip(f"this machine has no {bar}")
    rng = np.random.default_rng(2)
    shape = (4, 60, 130)
    constants, raw = gain_run(shape, rng, scattered_geometry(shape, rng))
    try:
        for pool, by in ((1, "max"), (2, "max"), (4, "max"), (5, "max"), (4, "mean"), (5, "mean")):
            window = Window(kind="downsample", height=200 // pool, width=180 // pool, pool=pool,
                            pool_by=by)
            plan = preprocess.plan_render(constants, window)
            out = np.empty(window.shape, np.float32)
            preprocess._native.set_variant(bar)
            preprocess.render(raw, plan, out, 0.1)
            np.testing.assert_array_equal(out, preprocess._render_reference(raw, plan, 0.1))
    finally:
        preprocess._native.set_variant(preprocess._native.variants()[-1])


def test_an_assembled_image_is_cropped_about_the_beam():
    image = np.arange(60 * 80, dtype=np.float32).reshape(60, 80)
    got = preprocess.image_window(image, Window(height=10, width=12, normalize="none"),
                                  beam_center_px=(30.0, 20.0))
    np.testing.assert_array_equal(got, image[15:25, 24:36])


@pytest.mark.parametrize("quadrant, k", [("A", 2), ("B", 3), ("C", 1), ("D", 0)])
@pytest.mark.parametrize("pool", [1, 2, 4])
def test_quadrants_have_the_beam_at_their_first_pixel(quadrant, k, pool):
    """methods.md section 5a: quadrant next to the beam, max-pool, rotate by k x 90 degrees."""
    rng = np.random.default_rng(0)
    image = rng.poisson(3.0, (96, 80)).astype(np.float32)
    row, column, n = 44, 36, 32
    cut = {"A": image[row - n:row, column - n:column], "B": image[row - n:row, column:column + n],
           "C": image[row:row + n, column - n:column], "D": image[row:row + n, column:column + n]}
    pooled = cut[quadrant].reshape(n // pool, pool, n // pool, pool).max(axis=(1, 3))
    window = Window(kind="quadrant", quadrant=quadrant, height=n // pool, width=n // pool,
                    pool=pool, normalize="sqrt_floor", clip=65025.0)
    expected = np.rot90(np.floor(np.sqrt(pooled)), k)
    got = preprocess.image_window(image, window, (float(column), float(row)))
    np.testing.assert_array_equal(got, expected)


@settings(max_examples=100, deadline=None)
@given(windows, st.integers(2, 40), st.integers(2, 50), st.floats(-10, 60), st.floats(-10, 60),
       st.integers(0, 2**31))
def test_image_window_is_render_of_an_assembled_detector(window, s, f, fast, slow, seed):
    rng = np.random.default_rng(seed)
    image = rng.normal(3, 9, (s, f)).astype(np.float32)
    good = rng.random((s, f)) > 0.2
    good[0, 0] = True
    constants = uncalibrated_constants(
        (1, s, f), assembled_geometry((s, f), 1e-4, (fast, slow)), good[None])
    # positions are float32: beam centres within rounding of a tie may go either way
    for centre in (fast, slow):
        edge = (centre + 0.5) % 1.0
        if abs(edge - preprocess.TIE_PX) < 2e-3 or abs(edge + preprocess.TIE_PX - 1) < 2e-3:
            return
    plan = preprocess.plan_render(constants, window)
    out = np.empty(window.shape, np.float32)
    preprocess.render(image[None], plan, out, 0.5)
    np.testing.assert_array_equal(
        out, preprocess.image_window(image, window, (fast, slow), good, scale=0.5))


def test_beam_in_the_middle_of_a_pixel_gives_a_whole_image():
    shape = (31, 41)
    image = np.arange(31 * 41, dtype=np.float32).reshape(shape) + 1
    constants = uncalibrated_constants((1, *shape), assembled_geometry(shape, 75e-6, (20.5, 15.5)))
    plan = preprocess.plan_render(constants, Window(height=20, width=20, normalize="none"))
    out = np.empty((20, 20), np.float32)
    preprocess.render(image[None], plan, out)
    np.testing.assert_array_equal(np.diff(out, axis=1), 1)
    np.testing.assert_array_equal(np.diff(out, axis=0), 41)


@pytest.mark.parametrize("kind, panels", [("jungfrau", 2), ("epix10ka", 4), ("cspad", 32)])
def test_no_pixel_of_a_detector_is_lost_by_pooling(kind, panels):
    geometry = default_geometry(detector(kind), panels)
    constants = uncalibrated_constants(geometry.shape, geometry)
    window = Window(kind="downsample", pool=4, height=600, width=600, normalize="none")
    plan = preprocess.plan_render(constants, window)
    assert (plan.target_PSF >= 0).all()
    rng = np.random.default_rng(3)
    frame = np.zeros(geometry.shape, np.float32)
    out = np.empty(window.shape, np.float32)
    for _ in range(5):
        spot = tuple(rng.integers(0, geometry.shape))
        frame[...] = 0
        frame[spot] = 5
        preprocess.render(frame, plan, out)
        row, column = np.argwhere(out == 5)[0]
        assert (out > 0).sum() == 1
        pixel = geometry.pixel_size_m * 4
        assert abs((column - 299.5) * pixel - geometry.x_m_PSF[spot]) <= pixel * 0.51
        assert abs((299.5 - row) * pixel - geometry.y_m_PSF[spot]) <= pixel * 0.51


def test_means_are_over_the_good_pixels_of_a_block():
    """A pnCCD of 1024 x 1024 as the published single-particle networks see it: 8 x 8 means."""
    rng = np.random.default_rng(5)
    image = rng.poisson(2.0, (1024, 1024)).astype(np.float32)
    good = rng.random(image.shape) > 0.1
    good[:8, :8] = False
    window = Window(kind="downsample", height=128, width=128, pool=8, pool_by="mean",
                    normalize="none")
    constants = uncalibrated_constants(
        (1, 1024, 1024), assembled_geometry((1024, 1024), 75e-6, (512.0, 512.0)), good[None])
    out = np.empty((128, 128), np.float32)
    preprocess.render(image[None], preprocess.plan_render(constants, window), out)
    blocks = np.ma.array(image, mask=~good).reshape(128, 8, 128, 8)
    expected = blocks.mean(axis=(1, 3), dtype=np.float64).filled(0)
    np.testing.assert_allclose(out, expected, rtol=1e-6)
    assert out[0, 0] == 0


def test_a_crop_shows_the_nearest_pixels_of_a_real_geometry():
    geometry = default_geometry(detector("jungfrau"), 8)
    constants = uncalibrated_constants(geometry.shape, geometry)
    window = Window(height=200, width=220)
    plan = preprocess.plan_render(constants, window)
    row, column = np.nonzero(plan.good_HW)
    there = plan.index_HW[row, column]
    x = (column + 0.5 - 110) * geometry.pixel_size_m
    y = (100 - row - 0.5) * geometry.pixel_size_m
    half = geometry.pixel_size_m * 0.51
    assert np.abs(geometry.x_m_PSF.ravel()[there] - x).max() <= half
    assert np.abs(geometry.y_m_PSF.ravel()[there] - y).max() <= half
    assert len(np.unique(there)) == len(there)
    assert 0.3 < plan.good_HW.mean() < 1        # the hole for the beam is seen


def test_windows_larger_than_the_detector_are_padded_with_zeros():
    shape = (1, 12, 8)
    constants = uncalibrated_constants(shape, flat_geometry(shape, 1e-4))
    for pool in (1, 2):
        plan = preprocess.plan_render(constants, Window(height=20, width=30, pool=pool,
                                                        normalize="none"))
        out = np.empty((20, 30), np.float32)
        preprocess.render(np.full(shape, 7, np.uint16), plan, out)
        assert out.sum() == 7 * 96 / pool**2 and out[0].sum() == 0
        assert plan.good_HW.sum() == 96 // pool**2


def test_a_slot_of_a_batch_is_filled_and_others_are_left():
    shape = (1, 8, 8)
    constants = uncalibrated_constants(shape, flat_geometry(shape, 1e-4))
    plan = preprocess.plan_render(constants, Window(height=4, width=4, normalize="none"))
    batch = np.full((3, 4, 4), -1, np.float32)
    preprocess.render(np.arange(64, dtype=np.int32).reshape(shape), plan, batch[1])
    np.testing.assert_array_equal(batch[1], np.arange(64).reshape(8, 8)[2:6, 2:6])
    assert (batch[[0, 2]] == -1).all()
    with pytest.raises(EventError, match="expected"):
        preprocess.render(np.zeros((1, 4, 8), np.int32), plan, batch[1])


@pytest.mark.parametrize("change, words", [
    ({"kind": "circle"}, "circle"), ({"normalize": "log"}, "log"), ({"pool": 0}, "pool"),
    ({"pool_by": "median"}, "'median'"),
    ({"kind": "quadrant", "quadrant": "E"}, "'E'"), ({"clip": -1.0}, "clip")])
def test_impossible_windows_are_named(change, words):
    shape = (1, 8, 8)
    constants = uncalibrated_constants(shape, flat_geometry(shape, 1e-4))
    window = dataclasses.replace(Window(), **change)
    with pytest.raises(ConfigurationError, match=words):
        preprocess.plan_render(constants, window)
    with pytest.raises(ConfigurationError, match=words):
        preprocess.image_window(np.zeros((8, 8)), window)
