"""The simulated source: needs nothing, and is the run that the writers write."""
from __future__ import annotations

import numpy as np
import pytest
from conformance.source_conformance import SourceConformance, summary, whole

from xfel_classify.core import ConfigurationError, EventStatus
from xfel_classify.simulate.conditions import draw_conditions
from xfel_classify.simulate.hdf5_runs import write_hdf5_run
from xfel_classify.simulate.raw_runs import JungfrauRun
from xfel_classify.sources import hdf5
from xfel_classify.sources.simulated import Source


def source(**options) -> Source:
    return Source(Source.Config(**{"events": 4, **options}))


class TestSimulatedConforms(SourceConformance):
    @pytest.fixture
    def again(self):
        return source


def test_it_is_the_run_that_is_written(tmp_path):
    """Read from HDF5 or made on the fly: the same frames, times, scalars and constants."""
    run = JungfrauRun(draw_conditions(1, 95, "demo"), 1, missing=(2,))
    written = write_hdf5_run(tmp_path, run, 4, exp="simulated")
    with source(missing=[2]) as made:
        expected = summary(made.frames(whole(made)))
        constants = made.constants()
    assert [expected[i][1] for i in range(4)] == [
        EventStatus.OK, EventStatus.OK, EventStatus.NO_DETECTOR, EventStatus.OK]
    with hdf5.Source(hdf5.Source.Config(files=[f"{tmp_path}/*.h5"],
                                        constants=str(written.constants))) as read:
        found = summary(read.frames(whole(read)))
        assert (read.run.exp, read.run.run) == ("simulated", 95)
        assert read.run.panel_shape == (1, 512, 1024)
        assert np.array_equal(read.constants().good_PSF, constants.good_PSF)
        assert np.array_equal(read.constants().gain_GPSF, constants.gain_GPSF)
    assert [found[i][0] for i in range(4)] == [expected[i][0] for i in range(4)]
    for i in range(4):
        assert found[i][1:4] == expected[i][1:4]
        for name, value in found[i][4].items():
            assert value == pytest.approx(expected[i][4][name]), name


def test_damaged_images_are_flagged():
    with source(damaged=[1]) as made:
        found = summary(made.frames(whole(made)))
        assert found[1][1:4] == (EventStatus.DAMAGED, 4, None)


def test_another_seed_is_another_run():
    with source(events=1) as one, source(events=1, seed=2) as two:
        assert summary(one.frames(whole(one))) != summary(two.frames(whole(two)))


def test_a_preset_may_be_changed():
    with source(events=4, preset="demo:air_photons=40") as bright, source(events=4) as plain:
        means = [np.mean([frame.raw_PSF.astype(float).mean() for frame in
                          opened.frames(whole(opened))]) for opened in (bright, plain)]
    assert means[0] > means[1]


@pytest.mark.parametrize("wrong", [{"events": -1}, {"preset": "nice"}, {"hit_fraction": 2.0},
                                   {"preset": "demo:nothing=1"}])
def test_wrong_options_are_refused(wrong):
    with pytest.raises(ConfigurationError):
        source(**wrong)


def test_a_jungfrau_of_three_modules_does_not_exist():
    with pytest.raises(ConfigurationError, match="3 segments"), source(segments=3):
        pass
