"""peak_finder_v3r3: equal to its numpy reference, and what a user may rely on."""
from __future__ import annotations

import numpy as np
import pytest
from mockdata import peak_frames
from mockdata.peak_frames import SHARED, Scene

from xfel_classify.analyses.peak_finder_v3r3 import (
    Parameters,
    PeakFinderV3R3,
    native,
    peak_finder_v3r3_reference,
)
from xfel_classify.analyses.peaks import Peaks
from xfel_classify.core import ConfigurationError

OPEN = Parameters(rank=3, r0=4, dr=2, nsigm=5, npix_min=1, npix_max=100, son_min=0)


def find(scene: Scene, parameters: Parameters) -> Peaks:
    return PeakFinderV3R3(scene.good_PSF, parameters).find(scene.frame_PSF)


def assert_same(peaks: Peaks, others: Peaks) -> None:
    assert peaks.found == others.found
    assert peaks.panel.tolist() == others.panel.tolist()
    assert peaks.npix.tolist() == others.npix.tolist()
    for name in ("fs", "ss", "total", "maximum", "snr", "sigma", "background"):
        np.testing.assert_allclose(getattr(peaks, name), getattr(others, name), rtol=1e-4,
                                   atol=1e-3, err_msg=name)


def small(seed: int, shape: tuple[int, int, int] = (2, 40, 47)) -> Scene:
    """Small frames of all sorts: noise, photon counts with many equal values, masks."""
    rng = np.random.default_rng(seed)
    spots_PSF, spots = peak_frames.planted(rng, shape, 4, (20, 400))
    noise_PSF = [rng.normal(10, 2, shape), rng.poisson(0.4, shape), rng.poisson(3, shape) * 9.5,
                 np.zeros(shape)][seed % 4]
    good_PSF = rng.random(shape) > (0.15 if seed % 3 else -1)
    frame_PSF = np.where(good_PSF, noise_PSF + np.rint(spots_PSF), 0).astype(np.float32)
    return Scene(f"small {seed}", frame_PSF, good_PSF, peak_frames.radius(shape), spots)


@pytest.mark.parametrize("seed", range(16))
def test_equal_to_the_reference(seed) -> None:
    scene = small(seed)
    parameters = Parameters(
        rank=1 + seed % 5, r0=(3.0, 4.0, 5.5)[seed % 3], dr=(0.05, 1.0, 2.0)[seed % 3],
        nsigm=(0.0, 2.0, 5.0)[seed % 3], npix_min=1 + seed % 2, npix_max=(10, 200)[seed % 2],
        amax_thr=(0.0, 15.0)[seed % 2], atot_thr=(0.0, 30.0)[seed // 2 % 2],
        son_min=(0.0, 4.0)[seed // 4 % 2])
    expected = peak_finder_v3r3_reference(scene.frame_PSF, scene.good_PSF, parameters)
    assert len(expected) > 0
    assert_same(find(scene, parameters), expected)


@pytest.mark.parametrize("variant", native.variants())
def test_all_instruction_sets_agree(variant) -> None:
    scene = peak_frames.smooth(1)
    expected = find(scene, OPEN)
    native.set_variant(variant)
    peaks = find(scene, OPEN)
    native.set_variant(native.variants()[-1])
    assert len(expected) > 10
    assert np.array_equal(peaks.total, expected.total)
    assert np.array_equal(peaks.fs, expected.fs)


@pytest.mark.parametrize("scene,least", [(peak_frames.smooth(5), 80.0),
                                         (peak_frames.sparse(6), 38.0)],
                         ids=["smooth", "sparse"])
def test_finds_planted_spots(scene, least) -> None:
    peaks = find(scene, Parameters(amax_thr=least, atot_thr=1.5 * least, npix_max=60))
    distance = np.array([np.where(peaks.panel == panel, np.hypot(peaks.ss - ss, peaks.fs - fs),
                                  np.inf).min() for panel, ss, fs in scene.spots])
    assert (distance < 2).mean() >= 0.9
    assert np.median(distance) < 0.3
    assert len(peaks) <= len(scene.spots) + 1


def test_masked_pixels_are_no_peaks_and_change_nothing() -> None:
    scene = peak_frames.smooth(9, masked=0.05)
    expected = find(scene, OPEN)
    for garbage in (1e6, -1e6, np.nan, np.inf, -np.inf):
        scene.frame_PSF[~scene.good_PSF] = garbage
        assert_same(find(scene, OPEN), expected)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_pixels_that_are_not_finite_count_as_masked(value) -> None:
    scene = peak_frames.smooth(10, masked=0.0)
    chosen = np.random.default_rng(0).random(scene.frame_PSF.shape) < 0.01
    scene.good_PSF[chosen] = False
    expected = find(scene, OPEN)
    scene.good_PSF[:] = True
    scene.frame_PSF[chosen] = value
    assert_same(find(scene, OPEN), expected)


@pytest.mark.parametrize("value", [0.0, 10.0, np.nan])
def test_a_frame_without_structure_has_no_peaks(value) -> None:
    frame_PSF = np.full((1, 40, 40), value, np.float32)
    finder = PeakFinderV3R3(np.ones(frame_PSF.shape, bool), Parameters())
    assert len(finder.find(frame_PSF)) == 0
    assert len(PeakFinderV3R3(np.zeros(frame_PSF.shape, bool), Parameters()).find(frame_PSF)) == 0


def test_peaks_in_the_corners() -> None:
    frame_PSF = np.random.default_rng(0).normal(10, 2, (1, 30, 30)).astype(np.float32)
    for ss, fs in ((0, 0), (0, 29), (29, 0), (29, 29)):
        frame_PSF[0, ss, fs] = 500
    peaks = find(Scene("corners", frame_PSF, np.ones(frame_PSF.shape, bool), frame_PSF,
                       np.zeros((0, 3))), Parameters(npix_min=1, amax_thr=100))
    assert {(round(y), round(x)) for y, x in zip(peaks.ss, peaks.fs, strict=True)} == {
        (0, 0), (0, 29), (29, 0), (29, 29)}


def test_the_flipped_image_has_the_mirrored_peaks() -> None:
    path = SHARED / "real/cspad_asic/cxitut13_r10_32_cspadAsic.npy"
    if not path.exists():
        pytest.skip("the recorded frame (../shared/data/real/cspad_asic) is not there")
    image = np.load(path)
    # r0, dr and thresholds of psana's own test of this image
    finder = PeakFinderV3R3(np.ones((1, *image.shape), bool),
                            Parameters(rank=3, r0=4, dr=2, nsigm=0, npix_min=2, npix_max=30,
                                       amax_thr=200, atot_thr=600, son_min=7))
    upright, flipped = finder.find(image[None]), finder.find(image[::-1, ::-1][None])
    assert len(upright) >= 3
    height, width = image.shape
    there = sorted(zip(upright.ss.round(2), upright.fs.round(2), upright.npix, strict=True))
    back = sorted(zip((height - 1 - flipped.ss).round(2), (width - 1 - flipped.fs).round(2),
                      flipped.npix, strict=True))
    np.testing.assert_allclose(there, back, atol=0.02)


def test_thresholds_of_a_call_replace_the_parameters() -> None:
    scene = peak_frames.smooth(3)
    finder = PeakFinderV3R3(scene.good_PSF, OPEN)
    strong = finder.find(scene.frame_PSF, amax_thr=200.0, atot_thr=400.0)
    assert 0 < len(strong) < len(finder.find(scene.frame_PSF))
    assert strong.maximum.min() >= 200
    assert strong.total.min() >= 400


def test_wrong_input_is_refused() -> None:
    finder = PeakFinderV3R3(np.ones((1, 20, 20), bool), OPEN)
    with pytest.raises(ConfigurationError, match="prepared for frames"):
        finder.find(np.zeros((2, 20, 20), np.float32))
    with pytest.raises(ConfigurationError, match="rank"):
        PeakFinderV3R3(np.ones((1, 20, 20), bool), Parameters(rank=0))
