"""Own peak finders give psana's peak lists, frame by frame.

Lists are compared peak by peak and in order: positions to 0.003 pixels (the reference adds
float32 products of value and row number), totals and signal to noise to 0.1 %.  No difference is
allowed on any frame here.
"""
from __future__ import annotations

import numpy as np
import pytest
from mockdata import peak_frames
from mockdata.peak_frames import Scene

from xfel_classify.analyses import peak_finder_v3r3 as v3r3
from xfel_classify.analyses import peakfinder8 as pf8
from xfel_classify.analyses.peaks import Peaks

pytestmark = pytest.mark.psana


def psana_peakfinder8(scene: Scene, parameters: pf8.Parameters) -> np.ndarray:
    """(N, 7): fs, row of the stacked panels, total, npix, max, sigma, snr."""
    finder = pytest.importorskip("psana.peakfinder8").peakfinder_8
    panels, height, width = scene.frame_PSF.shape
    asics_ss, asics_fs = scene.asics
    fs, row, total, _, npix, maximum, sigma, snr = finder(
        parameters.max_num_peaks, scene.frame_PSF.reshape(-1, width),
        scene.good_PSF.reshape(-1, width).astype(np.int8),
        scene.radius_px_PSF.reshape(-1, width), width // asics_fs, height // asics_ss, asics_fs,
        panels * asics_ss, parameters.adc_threshold, parameters.minimum_snr,
        parameters.min_pixel_count, parameters.max_pixel_count, parameters.local_bg_radius)
    return np.array([fs, row, total, npix, maximum, sigma, snr], np.float64).T.reshape(-1, 7)


def stacked(peaks: Peaks, height: int) -> np.ndarray:
    return np.stack([peaks.fs, peaks.ss + peaks.panel * height, peaks.total, peaks.npix,
                     peaks.maximum, peaks.sigma, peaks.snr], axis=1).astype(np.float64)


def assert_peakfinder8_equal(scene: Scene, parameters: pf8.Parameters) -> int:
    theirs = psana_peakfinder8(scene, parameters)
    ours = stacked(pf8.PeakFinder8(scene.radius_px_PSF, scene.good_PSF, parameters,
                                   asics=scene.asics).find(scene.frame_PSF),
                   scene.frame_PSF.shape[1])
    assert len(ours) == len(theirs), scene.name
    np.testing.assert_array_equal(ours[:, 3], theirs[:, 3], err_msg=scene.name)
    np.testing.assert_allclose(ours[:, :2], theirs[:, :2], atol=3e-3, err_msg=scene.name)
    np.testing.assert_allclose(ours[:, 2:], theirs[:, 2:], rtol=1e-3, atol=1e-3,
                               err_msg=scene.name)
    return len(theirs)


@pytest.mark.parametrize("seed", range(24))
def test_peakfinder8_on_harsh_frames(seed) -> None:
    counts = seed % 3 == 2
    parameters = pf8.Parameters(
        adc_threshold=1.0 if counts else 50.0, minimum_snr=2.0 + seed // 3 % 2,
        min_pixel_count=1 + seed // 2 % 2, max_pixel_count=(4, 30)[seed % 2],
        local_bg_radius=1 + seed % 4)
    assert assert_peakfinder8_equal(peak_frames.harsh(seed), parameters) > 0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("make,threshold", [
    (peak_frames.smooth, 100.0), (peak_frames.sparse, 20.0),
    (lambda seed, shape, n: peak_frames.sparse(seed, shape, n, photon=1.0, noise=0.0), 2.0),
], ids=["smooth", "sparse", "counts"])
@pytest.mark.parametrize("snr,least", [(5.0, 1), (7.0, 2)])
def test_peakfinder8_on_planted_spots(seed, make, threshold, snr, least) -> None:
    scene = make(seed, (4, 256, 512), 60)
    parameters = pf8.Parameters(adc_threshold=threshold, minimum_snr=snr, min_pixel_count=least,
                                max_pixel_count=40, max_num_peaks=100_000)
    assert assert_peakfinder8_equal(scene, parameters) > 30


def test_peakfinder8_on_recorded_frames() -> None:
    peaks = 0
    for scene in peak_frames.recorded():
        for threshold, snr, least in ((10.0, 5.0, 2), (100.0, 6.0, 1)):
            peaks += assert_peakfinder8_equal(scene, pf8.Parameters(
                adc_threshold=threshold, minimum_snr=snr, min_pixel_count=least,
                max_pixel_count=60, max_num_peaks=100_000))
    assert peaks > 3000


def test_peakfinder8_cuts_a_long_list_like_psana() -> None:
    scene = peak_frames.harsh(0)
    parameters = pf8.Parameters(adc_threshold=50.0, minimum_snr=2.0, min_pixel_count=1,
                                max_num_peaks=50)
    assert assert_peakfinder8_equal(scene, parameters) == 50


# --- v3r3 -------------------------------------------------------------------------------------

def assert_v3r3_equal(scene: Scene, parameters: v3r3.Parameters) -> int:
    algorithms = pytest.importorskip("psana.psalg_ext").peak_finder_algos
    rows = []
    for panel, (values, good) in enumerate(zip(scene.frame_PSF, scene.good_PSF, strict=True)):
        finder = algorithms(panel, 0)
        finder.set_peak_selection_parameters(parameters.npix_min, parameters.npix_max,
                                             parameters.amax_thr, parameters.atot_thr,
                                             parameters.son_min)
        rows += [(p.seg, p.col_cgrav, p.row_cgrav, p.amp_tot, p.amp_max, p.son, p.npix, p.noise,
                  p.bkgd) for p in finder.peak_finder_v3r3_d2(
                      values, good.astype(np.uint16), parameters.rank, parameters.r0,
                      parameters.dr, parameters.nsigm)]
    theirs = np.array(rows, np.float64).reshape(-1, 9)
    found = v3r3.PeakFinderV3R3(scene.good_PSF, parameters).find(scene.frame_PSF)
    ours = np.stack([found.panel, found.fs, found.ss, found.total, found.maximum, found.snr,
                     found.npix, found.sigma, found.background], axis=1).astype(np.float64)
    assert len(ours) == len(theirs), scene.name
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=3e-3, err_msg=scene.name)
    return len(theirs)


@pytest.mark.parametrize("seed", range(24))
def test_v3r3_on_harsh_frames(seed) -> None:
    parameters = v3r3.Parameters(
        rank=1 + seed % 5, r0=(3.0, 4.0, 5.5)[seed % 3], dr=(0.05, 1.0, 2.0)[seed // 2 % 3],
        nsigm=(0.0, 2.0, 5.0)[seed // 3 % 3], npix_min=1 + seed % 2, npix_max=(10, 200)[seed % 2],
        amax_thr=(0.0, 20.0)[seed // 2 % 2], atot_thr=(0.0, 50.0)[seed // 4 % 2],
        son_min=(0.0, 3.0)[seed // 5 % 2])
    make = (peak_frames.harsh, peak_frames.smooth, peak_frames.sparse,
            lambda seed: peak_frames.sparse(seed, photon=1.0, noise=0.0))[seed % 4]
    assert_v3r3_equal(make(seed), parameters)


def test_v3r3_on_recorded_frames() -> None:
    peaks = 0
    for scene in peak_frames.recorded():
        scene.frame_PSF[~scene.good_PSF] = 0        # as calibrated frames have it
        for least in (0.0, 50.0):
            peaks += assert_v3r3_equal(scene, v3r3.Parameters(
                rank=3, r0=4, dr=2, nsigm=3, npix_max=60, amax_thr=least, atot_thr=2 * least))
    assert peaks > 3000
