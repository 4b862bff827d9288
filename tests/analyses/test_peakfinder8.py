"""peakfinder8: equal to its numpy reference, and what a user may rely on."""
from __future__ import annotations

import threading

import numpy as np
import pytest
from mockdata import peak_frames
from mockdata.peak_frames import Scene

from xfel_classify.analyses.peakfinder8 import (
    Parameters,
    PeakFinder8,
    native,
    peakfinder8_reference,
)
from xfel_classify.analyses.peaks import Peaks
from xfel_classify.core import ConfigurationError

LOOSE = Parameters(adc_threshold=60, minimum_snr=4, min_pixel_count=1, max_pixel_count=40,
                   local_bg_radius=3)


def find(scene: Scene, parameters: Parameters, **options) -> Peaks:
    return PeakFinder8(scene.radius_px_PSF, scene.good_PSF, parameters, asics=scene.asics,
                       **options).find(scene.frame_PSF)


def assert_same(peaks: Peaks, others: Peaks, position: float = 1e-3) -> None:
    assert peaks.found == others.found
    assert peaks.panel.tolist() == others.panel.tolist()
    assert peaks.npix.tolist() == others.npix.tolist()
    for name, tolerance in (("fs", position), ("ss", position), ("total", 1e-3),
                            ("maximum", 1e-3), ("sigma", 1e-3), ("snr", 1e-3),
                            ("background", 1e-3)):
        np.testing.assert_allclose(getattr(peaks, name), getattr(others, name), rtol=1e-3,
                                   atol=tolerance, err_msg=name)


def flat(shape: tuple[int, int, int] = (1, 60, 60), seed: int = 0) -> Scene:
    """Even background 10 +- 2, one ring."""
    values = np.random.default_rng(seed).normal(10, 2, shape).astype(np.float32)
    return Scene("flat", values, np.ones(shape, bool), np.zeros(shape, np.float32),
                 np.zeros((0, 3)))


@pytest.fixture(params=native.variants())
def variant(request):
    native.set_variant(request.param)
    yield request.param
    native.set_variant(native.variants()[-1])


# --- equality with the reference, and between variants ------------------------------------------

@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("carry_over", [True, False])
def test_equal_to_the_reference_on_harsh_frames(seed, carry_over) -> None:
    scene = peak_frames.harsh(seed)
    counts = seed % 3 == 2
    parameters = Parameters(
        adc_threshold=1.0 if counts else 50.0, minimum_snr=2.0 + seed // 3 % 2,
        min_pixel_count=1 + seed % 2, max_pixel_count=(4, 30)[seed % 2],
        local_bg_radius=1 + seed % 4, carry_over=carry_over)
    expected = peakfinder8_reference(scene.frame_PSF, scene.radius_px_PSF, scene.good_PSF,
                                     parameters, scene.asics)
    assert expected.found > 0
    assert_same(find(scene, parameters), expected)


@pytest.mark.parametrize("scene", [peak_frames.smooth(1), peak_frames.sparse(2),
                                   peak_frames.sparse(3, photon=1.0, noise=0.0)],
                         ids=lambda scene: scene.name)
@pytest.mark.parametrize("snr", [2.5, 5.0, 8.0])
def test_equal_to_the_reference_on_ordinary_frames(scene, snr) -> None:
    threshold = {"smooth 1": 100.0, "sparse 2 9.5": 20.0}.get(scene.name, 2.0)
    parameters = Parameters(adc_threshold=threshold, minimum_snr=snr, min_pixel_count=2)
    expected = peakfinder8_reference(scene.frame_PSF, scene.radius_px_PSF, scene.good_PSF,
                                     parameters)
    assert len(expected) > 3
    assert_same(find(scene, parameters), expected)


def test_all_instruction_sets_give_the_same_bits(variant) -> None:
    native.set_variant("baseline")
    scene = peak_frames.harsh(1)
    expected = find(scene, LOOSE)
    native.set_variant(variant)
    peaks = find(scene, LOOSE)
    for name in ("panel", "fs", "ss", "total", "snr", "sigma", "background"):
        assert np.array_equal(getattr(peaks, name), getattr(expected, name))


def test_a_misleading_sample_changes_nothing() -> None:
    # outliers fill the evenly spread sample of the ring, so that its guess is far off
    scene = flat((1, 100, 100))
    values = scene.frame_PSF.reshape(-1)
    sampled = (2 * np.arange(64) + 1) * len(values) // 128
    for offset in (300.0, -5000.0, 1e6):
        scene.frame_PSF = flat((1, 100, 100)).frame_PSF.copy()
        scene.frame_PSF.reshape(-1)[sampled[::2]] += offset
        expected = peakfinder8_reference(scene.frame_PSF, scene.radius_px_PSF, scene.good_PSF,
                                         LOOSE)
        assert_same(find(scene, LOOSE), expected)


# --- what a user may rely on ---------------------------------------------------------------------

@pytest.mark.parametrize("scene,parameters", [
    (peak_frames.smooth(5), Parameters(adc_threshold=150.0)),
    (peak_frames.sparse(6), Parameters(adc_threshold=28.5)),
], ids=["smooth", "sparse"])
def test_finds_planted_spots(scene, parameters) -> None:
    peaks = find(scene, parameters)
    distance = np.array([np.where(peaks.panel == panel, np.hypot(peaks.ss - ss, peaks.fs - fs),
                                  np.inf).min() for panel, ss, fs in scene.spots])
    assert (distance < 2).mean() >= 0.9
    assert np.median(distance) < 0.3
    assert len(peaks) <= len(scene.spots) + 1


def test_centroids_are_sub_pixel() -> None:
    rng = np.random.default_rng(8)
    shape = (1, 200, 200)
    spots_PSF, spots = peak_frames.planted(rng, shape, 20, (3000, 6000))
    scene = Scene("bright", (spots_PSF + rng.normal(0, 1, shape)).astype(np.float32),
                  np.ones(shape, bool), np.zeros(shape, np.float32), spots)
    peaks = find(scene, Parameters(adc_threshold=100.0, max_pixel_count=60))
    for panel, ss, fs in spots:
        assert np.hypot(peaks.ss - ss, peaks.fs - fs)[peaks.panel == panel].min() < 0.05


def test_masked_pixels_are_no_peaks_and_change_nothing() -> None:
    scene = peak_frames.smooth(9, masked=0.05)
    parameters = Parameters(adc_threshold=100.0)
    expected = find(scene, parameters)
    for garbage in (1e6, -1e6, np.nan, np.inf, -np.inf):
        scene.frame_PSF[~scene.good_PSF] = garbage
        assert_same(find(scene, parameters), expected, position=0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_pixels_that_are_not_finite_count_as_masked(value) -> None:
    scene = peak_frames.smooth(10, masked=0.0)
    chosen = np.random.default_rng(0).random(scene.frame_PSF.shape) < 0.01
    scene.good_PSF[chosen] = False
    parameters = Parameters(adc_threshold=100.0)
    expected = find(scene, parameters)
    scene.good_PSF[:] = True
    scene.frame_PSF[chosen] = value
    assert_same(find(scene, parameters), expected)
    fast = find(scene, parameters, fast=True)
    assert not chosen[fast.panel, np.rint(fast.ss).astype(int), np.rint(fast.fs).astype(int)].any()


@pytest.mark.parametrize("value", [0.0, 10.0, np.nan])
def test_a_frame_without_structure_has_no_peaks(value) -> None:
    scene = flat()
    scene.frame_PSF[:] = value
    assert find(scene, LOOSE).found == 0
    assert find(scene, LOOSE, fast=True).found == 0


def test_everything_masked() -> None:
    scene = flat()
    scene.good_PSF[:] = False
    assert find(scene, LOOSE).found == 0


def test_peaks_start_one_pixel_inside_an_asic_and_do_not_leave_it() -> None:
    scene = flat((2, 40, 40))
    scene.asics = (1, 2)
    parameters = Parameters(adc_threshold=100.0, min_pixel_count=1)
    for ss, fs, found in ((0, 5, 0), (1, 5, 1), (38, 5, 1), (39, 5, 0), (5, 19, 0), (5, 20, 0),
                          (5, 18, 1), (5, 21, 1)):
        scene.frame_PSF = flat((2, 40, 40)).frame_PSF.copy()
        scene.frame_PSF[1, ss, fs] = 1000
        assert len(find(scene, parameters)) == found, (ss, fs)
    scene.frame_PSF = flat((2, 40, 40)).frame_PSF.copy()
    scene.frame_PSF[0, 5, 17:23] = 1000
    assert find(scene, parameters).npix.tolist() == [3, 3]
    scene.frame_PSF = flat((2, 40, 40)).frame_PSF.copy()
    scene.frame_PSF[0, 38:, 5] = scene.frame_PSF[1, :2, 5] = 1000
    peaks = find(scene, parameters)
    assert peaks.panel.tolist() == [0, 1]
    assert np.allclose(peaks.ss, [38.5, 0.5])


def test_carry_over_swallows_a_distant_pixel_as_the_reference_does() -> None:
    scene = flat((2, 40, 20))
    scene.frame_PSF[0, 20, 10:12] = 1000            # leaves the entry (20, 11) behind
    scene.frame_PSF[1, 8, 5] = 1000
    scene.frame_PSF[1, 21, 12] = 1000               # beside it, in the next panel
    parameters = {"adc_threshold": 100.0, "min_pixel_count": 1}
    assert find(scene, Parameters(**parameters)).npix.tolist() == [2, 2]
    assert find(scene, Parameters(**parameters, carry_over=False)).npix.tolist() == [2, 1, 1]


def test_pixel_counts_and_list_length_are_limits() -> None:
    scene = flat((1, 100, 100))
    for i, side in enumerate((1, 2, 3, 4)):
        scene.frame_PSF[0, 10 + 20 * i:10 + 20 * i + side, 50:50 + side] = 1000
    counts = find(scene, Parameters(adc_threshold=100.0, min_pixel_count=2, max_pixel_count=9))
    assert counts.npix.tolist() == [4, 9]
    cut = find(scene, Parameters(adc_threshold=100.0, min_pixel_count=1, max_num_peaks=2))
    assert (len(cut), cut.found, cut.npix.tolist()) == (2, 4, [1, 4])


def test_the_same_finder_gives_the_same_answer_after_another_frame() -> None:
    first, second = peak_frames.smooth(11), peak_frames.smooth(12)
    finder = PeakFinder8(first.radius_px_PSF, first.good_PSF, Parameters(adc_threshold=100.0))
    expected = finder.find(first.frame_PSF)
    finder.find(second.frame_PSF)
    assert_same(finder.find(first.frame_PSF), expected, position=0)


def test_fast_mode_finds_nearly_the_same_peaks() -> None:
    for seed in range(3):
        scene = peak_frames.smooth(20 + seed)
        parameters = Parameters(adc_threshold=150.0)
        exact, fast = find(scene, parameters), find(scene, parameters, fast=True)
        places = {(p, round(y), round(x)) for p, y, x in zip(exact.panel, exact.ss, exact.fs,
                                                             strict=True)}
        again = {(p, round(y), round(x)) for p, y, x in zip(fast.panel, fast.ss, fast.fs,
                                                            strict=True)}
        assert len(places & again) >= 0.9 * len(places)
        assert len(again) <= 1.1 * len(places)


def test_finders_work_in_threads() -> None:
    scene = peak_frames.smooth(13)
    expected = find(scene, LOOSE)
    answers: list[Peaks] = []

    def work() -> None:
        answers.append(find(scene, LOOSE))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 4
    for peaks in answers:
        assert_same(peaks, expected, position=0)


def test_wrong_input_is_refused() -> None:
    scene = flat()
    finder = PeakFinder8(scene.radius_px_PSF, scene.good_PSF, LOOSE)
    with pytest.raises(ConfigurationError, match="prepared for frames"):
        finder.find(np.zeros((1, 60, 61), np.float32))
    with pytest.raises(ConfigurationError, match="does not divide"):
        PeakFinder8(scene.radius_px_PSF, scene.good_PSF, LOOSE, asics=(7, 1))
    with pytest.raises(ConfigurationError, match="65534"):
        PeakFinder8(scene.radius_px_PSF + 1e6, scene.good_PSF, LOOSE)
