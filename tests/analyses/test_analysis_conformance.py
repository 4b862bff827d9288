"""Every built-in analysis behaves as the loop and the sinks expect."""
import numpy as np
import pytest
from conformance.analysis_conformance import AnalysisConformance

from xfel_classify.analyses import classify, peak_finder_v3r3, peakfinder8, statistics
from xfel_classify.analyses.statistics import FIXED_POINT, accumulate_reference
from xfel_classify.core import Constants
from xfel_classify.detectors import assembled_geometry
from xfel_classify.native import powder

SHAPE = (1, 400, 380)


def planted(n=7):
    """Photon-sparse background; odd frames carry thirty Gaussian spots; a masked corner."""
    rng = np.random.default_rng(5)
    frames = rng.poisson(0.3, (n, *SHAPE)).astype(np.float32)
    s, f = np.mgrid[-3:4, -3:4]
    spot = np.exp(-(s ** 2 + f ** 2) / 1.6)
    for event in range(1, n, 2):
        for row, column in rng.integers(20, 360, (30, 2)):
            frames[event, 0, row - 3:row + 4, column - 3:column + 4] += rng.poisson(60 * spot)
    return frames


class Base(AnalysisConformance):
    def constants(self):
        good = np.ones(SHAPE, bool)
        good[0, 100:130, 50:200] = False
        geometry = assembled_geometry(SHAPE[1:], 75e-6, beam_center_px=(190, 200))
        return Constants(good, geometry, unit="photon", identity="x")

    def frames(self):
        return planted()


class TestPeakfinder8(Base):
    def make(self):
        return peakfinder8.Analysis(peakfinder8.Analysis.Config())


class TestPeakFinderV3r3(Base):
    def make(self):
        return peak_finder_v3r3.Analysis(peak_finder_v3r3.Analysis.Config())


class TestClassify(Base):
    def make(self):
        return classify.Analysis(classify.Analysis.Config(backend="onnxruntime"))


class TestClassifyDirect(Base):
    def make(self):
        return classify.Analysis(classify.Analysis.Config(backend="direct"))


class TestStatistics(Base):
    earlier = {"hit/label": np.arange(7) % 2}

    def make(self):
        return statistics.Analysis(statistics.Analysis.Config(hits="hit/label"))

    def test_powders_are_those_of_hits_and_misses(self):
        _, totals = self.answers(3)
        frames = self.frames() * self.constants().good_PSF
        np.testing.assert_array_equal(totals["powder_max_hits"].values, frames[1::2].max(axis=0))
        np.testing.assert_array_equal(totals["powder_max_misses"].values, frames[::2].max(axis=0))
        assert (totals["powder_max_hits"].events, totals["powder_max_misses"].events) == (3, 4)
        np.testing.assert_allclose(totals["sum"].values * totals["sum"].scale,
                                   frames.sum(axis=0), atol=7 * FIXED_POINT)


@pytest.mark.parametrize("seed", range(3))
def test_the_compiled_accumulation_is_the_reference_bit_for_bit(seed):
    rng = np.random.default_rng(seed)
    frames = (rng.normal(0, 1, (5, 2, 9, 17)) * 10.0 ** rng.integers(-4, 9, (5, 2, 9, 17)))
    frames = frames.astype(np.float32)
    results = []
    for accumulate in (powder.accumulate, accumulate_reference):
        total = np.zeros(frames.shape[1:], np.int64)
        top = np.full(frames.shape[1:], -np.inf, np.float32)
        for frame in frames:
            accumulate(frame, total, top, 1 / FIXED_POINT)
        results.append((total, top))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    np.testing.assert_array_equal(results[0][1], results[1][1])
    with pytest.raises(ValueError, match="size"):
        powder.accumulate(frames[0], results[0][0][:1], results[0][1], 1.0)
