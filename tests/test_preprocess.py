"""Laws of calibration and common mode: compiled == reference, masked pixels matter to nothing."""
import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from xfel_classify import preprocess
from xfel_classify.core import ConfigurationError, Constants, ConstantsError, EventError
from xfel_classify.detectors import (
    detector,
    flat_geometry,
    make_constants,
    uncalibrated_constants,
)

DTYPES = ["uint16", "int16", "int32", "uint32", "float32", "float64", "uint8", "int64", ">u2"]
shapes = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 70))


def gain_constants(shape, rng, kind="jungfrau", offset=False, bad=0.1) -> Constants:
    """Random constants of a gain-switching kind, for panels of any shape."""
    known = dataclasses.replace(detector(kind), panel_shape_SF=None)
    stages = (known.stages, *shape)
    mapping = {
        "pedestals": rng.normal(3000, 500, stages).astype(np.float32),
        "pixel_gain": (rng.normal(40, 3, stages)
                       * np.array([1, -0.03, -0.003])[:known.stages, None, None, None]),
        "pixel_status": np.where(rng.random(stages) < bad / 3, 4, 0).astype(np.uint64)}
    mapping["pixel_status"][:, 0, 0, 0] = 0
    if offset:
        mapping["pixel_offset"] = rng.normal(0, 9, stages).astype(np.float32)
    return make_constants(known, shape, mapping, flat_geometry(shape, 75e-6))


def raw_words(shape, rng, switched=0.2) -> np.ndarray:
    words = rng.integers(0, 1 << 14, shape).astype(np.uint16)
    codes = rng.choice([0, 1, 2, 3], shape, p=[1 - switched, switched / 2, switched / 4,
                                               switched / 4]).astype(np.uint16)
    return words | codes << 14


def same_bits(a, b) -> bool:
    return a.dtype == b.dtype == np.float32 and np.array_equal(a.view(np.uint32), b.view(np.uint32))


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def variant(request):
    if not preprocess.compiled():
        pytest.skip("the compiled paths are not built")
    have = preprocess._native.variants()
    if request.param not in have:
        pytest.skip(f"this machine has no {request.param}")
    for module in (preprocess._native, preprocess._native_common):
        module.set_variant(request.param)
    yield request.param
    for module in (preprocess._native, preprocess._native_common):
        module.set_variant(have[-1])


# --- calibrate ------------------------------------------------------------------------------------

@settings(max_examples=60, deadline=None)
@given(shapes, st.sampled_from(["jungfrau", "epix10ka"]), st.booleans(), st.integers(0, 2**31),
       st.sampled_from([0.0, 0.02, 0.5, 1.0]))
def test_calibrate_has_the_bits_of_the_reference(shape, kind, offset, seed, switched):
    rng = np.random.default_rng(seed)
    constants, raw = gain_constants(shape, rng, kind, offset), raw_words(shape, rng, switched)
    assert same_bits(preprocess.calibrate(raw, constants),
                     preprocess.calibrate_reference(raw, constants))


@pytest.mark.parametrize("switched", [0.0, 0.002, 0.05, 1.0])
@pytest.mark.parametrize("shape", [(2, 64, 256), (1, 33, 47), (1, 1, 1), (1, 5, 2049)])
def test_every_instruction_set_gives_the_same_bits(variant, shape, switched):
    rng = np.random.default_rng(3)
    constants, raw = gain_constants(shape, rng, offset=True), raw_words(shape, rng, switched)
    assert same_bits(preprocess.calibrate(raw, constants),
                     preprocess.calibrate_reference(raw, constants))


def test_calibrate_computes_the_formula():
    constants = gain_constants((1, 1, 3), np.random.default_rng(0), bad=0)
    ped, gain = constants.pedestals_GPSF[:, 0, 0], constants.gain_GPSF[:, 0, 0]
    raw = np.array([[[4000, 4000 | 1 << 14, 4000 | 3 << 14]]], np.uint16)
    expected = [(4000 - ped[g, i]) / gain[g, i] for i, g in enumerate((0, 1, 2))]
    np.testing.assert_allclose(preprocess.calibrate(raw, constants)[0, 0], expected, rtol=1e-6)


def test_a_word_in_no_gain_stage_gives_zero():
    constants = gain_constants((1, 2, 40), np.random.default_rng(0))
    raw = np.full((1, 2, 40), 2 << 14 | 7000, np.uint16)
    assert not preprocess.calibrate(raw, constants).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pedestals", [True, False])
def test_one_gain_stage_in_every_type(dtype, pedestals):
    rng = np.random.default_rng(5)
    shape = (2, 9, 37)
    raw = rng.normal(60, 40, shape).clip(0, 255).astype(dtype)
    if raw.dtype.kind == "f":
        raw[rng.random(shape) < 0.1] = np.nan
        raw[0, 0, 1], raw[0, 0, 2] = np.inf, -np.inf
    good = rng.random(shape) > 0.2
    geometry = flat_geometry(shape, 75e-6)
    if pedestals:
        constants = make_constants(detector("generic"), shape, {
            "pedestals": rng.normal(9, 1, shape), "pixel_gain": rng.normal(2, .1, shape)},
            geometry, extra_good_PSF=good)
    else:
        constants = uncalibrated_constants(shape, geometry, good)
    got = preprocess.calibrate(raw, constants)
    assert same_bits(got, preprocess.calibrate_reference(raw, constants))
    assert np.isfinite(got).all() and not got[~good].any()
    if not pedestals:
        kept = good & np.isfinite(raw.astype(float))
        np.testing.assert_array_equal(got[kept], raw[kept].astype(np.float32))


@settings(max_examples=30, deadline=None)
@given(npst.arrays(np.float64, (1, 3, 11), elements=st.floats(width=64)))
def test_any_float_is_calibrated_to_something_finite(raw):
    constants = uncalibrated_constants(raw.shape, flat_geometry(raw.shape, 75e-6))
    with np.errstate(over="ignore"):
        got = preprocess.calibrate(raw, constants)
    assert np.isfinite(got).all()
    assert np.array_equal(got, preprocess.calibrate_reference(raw, constants))


@settings(max_examples=30, deadline=None)
@given(shapes, st.integers(0, 2**31))
def test_masked_words_change_nothing(shape, seed):
    rng = np.random.default_rng(seed)
    constants, raw = gain_constants(shape, rng, bad=0.6), raw_words(shape, rng)
    other = np.where(constants.good_PSF, raw, raw_words(shape, rng, 0.9))
    assert same_bits(preprocess.calibrate(raw, constants), preprocess.calibrate(other, constants))
    assert not preprocess.calibrate(other, constants)[~constants.good_PSF].any()


def test_out_is_filled_and_views_are_accepted():
    rng = np.random.default_rng(2)
    constants = gain_constants((2, 8, 16), rng)
    stack = raw_words((2, 2, 8, 16), rng)
    out = np.empty((2, 8, 16), np.float32)
    assert preprocess.calibrate(stack[:, 1], constants, out) is out
    assert same_bits(out, preprocess.calibrate_reference(stack[:, 1], constants))


def test_a_short_frame_and_floats_with_gain_bits_are_refused():
    constants = gain_constants((2, 8, 16), np.random.default_rng(2))
    with pytest.raises(EventError, match=r"\(2, 8, 16\).*\(1, 8, 16\)"):
        preprocess.calibrate(np.zeros((1, 8, 16), np.uint16), constants)
    with pytest.raises(ConstantsError, match="gain bits"):
        preprocess.calibrate(np.zeros((2, 8, 16), np.float32), constants)


def test_tables_follow_the_constants_object():
    rng = np.random.default_rng(2)
    raw = raw_words((1, 4, 8), rng)
    for _ in range(20):         # objects die and their ids come again
        constants = gain_constants((1, 4, 8), rng)
        assert same_bits(preprocess.calibrate(raw, constants),
                         preprocess.calibrate_reference(raw, constants))


# --- psana ----------------------------------------------------------------------------------------

@pytest.mark.psana
@pytest.mark.parametrize("offset", [False, True])
def test_bits_of_psana_s_own_routine(offset):
    routine = pytest.importorskip("psana.utilsdetector_ext").cy_calib_jungfrau_v3
    rng = np.random.default_rng(11)
    shape = (1, 512, 1024)
    constants = gain_constants(shape, rng, offset=offset)
    raw = raw_words(shape, rng, 0.05)
    pedestals = constants.pedestals_GPSF
    if offset:
        pedestals = pedestals + constants.offset_GPSF
    factor = np.divide(np.ones_like(pedestals), constants.gain_GPSF) * constants.good_PSF
    zero = np.zeros(shape, np.float32)
    table = np.stack([np.stack([p.ravel(), f.ravel()], 1) for p, f in (
        (pedestals[0], factor[0]), (pedestals[1], factor[1]), (zero, zero),
        (pedestals[2], factor[2]))]).astype(np.float32).ravel()
    theirs = np.empty(raw.size, np.float32)
    routine(raw.ravel(), table, raw.size, 512 * 1024, theirs)
    good = constants.good_PSF
    assert same_bits(preprocess.calibrate(raw, constants)[good], theirs.reshape(shape)[good])


@pytest.mark.psana
@pytest.mark.slow
def test_bits_of_det_raw_calib_on_a_written_run(tmp_path):
    import subprocess
    import sys
    pytest.importorskip("psana")
    shared = (Path(__file__).resolve().parents[1] / "../shared/psana").resolve()
    if not (shared / "make_xtc2_run.py").exists():
        pytest.skip("../shared is not here")
    subprocess.run([sys.executable, str(shared / "make_xtc2_run.py"), "--out", str(tmp_path),
                    "--segments", "1", "--events", "3"], check=True, capture_output=True)
    script = tmp_path / "read.py"
    script.write_text(READ_RUN)
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True, capture_output=True,
                   timeout=240)
    read = np.load(tmp_path / "read.npz")
    from xfel_classify.detectors import load_constants, read_geometry
    from xfel_classify.detectors import make_constants as make
    shape = read["raw"].shape[1:]
    mapping = load_constants(tmp_path / "constants.h5", "jungfrau", "jungfrau", shape)
    geometry = read_geometry(mapping["geometry"], shape, "jungfrau")
    constants = make(detector("jungfrau"), shape, mapping, geometry)
    good = constants.good_PSF
    assert len(read["raw"]) >= 1 and (read["raw"] >> 14).any()
    np.testing.assert_array_equal(good, read["good"].reshape(shape) != 0)
    for raw, calib in zip(read["raw"], read["calib"], strict=True):
        assert same_bits(preprocess.calibrate(raw, constants)[good], calib[good])


READ_RUN = """
import sys
from pathlib import Path
import h5py, numpy as np
from psana import DataSource
from psana.psexp.ds_base import DataSourceBase
import psana.pscalib.calib.MDBWebUtils as wu
folder = Path(sys.argv[1])
with h5py.File(folder / "constants.h5") as file:
    kept = {name: (one.asstr()[()] if name == "geometry" else one[()],
                   {"experiment": "cxitst95", "run": 95})
            for name, one in file["jungfrau"].items()}
wu.calib_constants_all_types = lambda uid, *a, **k: kept if "jungfrau" in uid else {}
DataSourceBase._get_file_info_from_db = lambda self, runnum: {}
ds = DataSource(exp="cxitst95", run=95, dir=str(folder))
raw, calib = [], []
for run in ds.runs():
    det = run.Detector("jungfrau")
    for evt in run.events():
        if det.raw.raw(evt) is not None:
            raw.append(det.raw.raw(evt).copy())
            calib.append(det.raw.calib(evt).copy())
    good = det.raw._mask()
np.savez(folder / "read.npz", raw=raw, calib=calib, good=good)
"""


# --- common mode ----------------------------------------------------------------------------------

@settings(max_examples=50, deadline=None)
@given(st.integers(1, 2), st.integers(1, 4), st.integers(1, 3), st.integers(1, 9),
       st.integers(1, 40), st.integers(0, 2**31), st.floats(0, 1), st.integers(0, 12))
def test_common_mode_equals_the_reference(p, banks_s, banks_f, rows, columns, seed, bad, minimum):
    rng = np.random.default_rng(seed)
    shape = (p, banks_s * rows, banks_f * columns)
    frame = np.round(rng.normal(0, 3, shape), rng.integers(0, 4)).astype(np.float32)
    good = rng.random(shape) >= bad
    fast, slow = frame.copy(), frame.copy()
    preprocess.common_mode(fast, good, ("banks", "rows", "columns"), (rows, columns), limit=2.5,
                           minimum=minimum)
    preprocess.common_mode_reference(slow, good, ("banks", "rows", "columns"), (rows, columns),
                                     limit=2.5, minimum=minimum)
    np.testing.assert_array_equal(fast, slow)
    np.testing.assert_array_equal(fast[~good], frame[~good])


@pytest.mark.parametrize("kind", ["banks", "rows", "columns"])
def test_medians_in_every_instruction_set(variant, kind):
    rng = np.random.default_rng(1)
    frame = rng.standard_cauchy((1, 40, 150)).astype(np.float32)
    frame[0, 3, 5], frame[0, 4, 6] = np.nan, np.inf
    good = rng.random(frame.shape) > 0.05
    expected = preprocess.common_mode_reference(frame.copy(), good, (kind,), (20, 75))
    got = preprocess.common_mode(frame.copy(), good, (kind,), (20, 75))
    np.testing.assert_array_equal(got, expected)
    axes = {"banks": (2, 4), "rows": (4,), "columns": (2,)}[kind]
    tiles = np.where(good & np.isfinite(got), got, np.nan).reshape(1, 2, 20, 2, 75)
    np.testing.assert_allclose(np.nanmedian(tiles, axis=axes), 0, atol=1e-6)


def test_masked_pixels_do_not_shift_the_common_mode():
    rng = np.random.default_rng(1)
    frame = rng.normal(0, 1, (1, 32, 64)).astype(np.float32)
    good = rng.random(frame.shape) > 0.3
    other = np.where(good, frame, np.float32(1e6))
    kinds = ("banks", "rows", "columns")
    a = preprocess.common_mode(frame, good, kinds, (16, 32))
    b = preprocess.common_mode(other, good, kinds, (16, 32))
    np.testing.assert_array_equal(a[good], b[good])
    assert (b[~good] == 1e6).all()


def test_common_mode_like_psana_s():
    ucm = pytest.importorskip("psana.detector.UtilsCommonMode")
    rng = np.random.default_rng(4)
    frame = rng.normal(5, 2, (1, 256, 128)).astype(np.float32)
    good = rng.random(frame.shape) > 0.02
    theirs, mask = frame[0].copy(), good[0].astype(np.uint8)
    ucm.common_mode_2d_hsplit_nbanks(theirs, mask=mask, nbanks=2, cormax=100, npix_min=10)
    ucm.common_mode_rows_hsplit_nbanks(theirs, mask=mask, nbanks=2, cormax=100, npix_min=10)
    ucm.common_mode_cols(theirs, mask=mask, cormax=100, npix_min=10)
    mine = preprocess.common_mode(frame, good, ("banks", "rows", "columns"), (256, 64), limit=100)
    np.testing.assert_allclose(mine[0], theirs, atol=2e-6)


def test_common_mode_says_what_is_wrong():
    frame, good = np.zeros((1, 8, 8), np.float32), np.ones((1, 8, 8), bool)
    with pytest.raises(ConfigurationError, match="'diagonals'"):
        preprocess.common_mode(frame, good, ("diagonals",))
    with pytest.raises(ConfigurationError, match="divides the panel"):
        preprocess.common_mode(frame, good, ("rows",), (3, 8))
    with pytest.raises(ConfigurationError, match="float64"):
        preprocess.common_mode(frame.astype(float), good)
