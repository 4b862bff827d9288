"""The peak finders as analyses: columns, gates, thresholds by unit, cut lists, psana's absence."""
from __future__ import annotations

import sys

import numpy as np
import pytest
from mockdata import peak_frames
from mockdata.peak_frames import View, run_of

from xfel_classify.config import component
from xfel_classify.core import Analysis, Batch, ConfigurationError, MissingDependency

OWN = ("peakfinder8", "peak_finder_v3r3")
PSANA = ("psana-peakfinder8", "psana-v3r3", "psana-v4r3")
FINDERS = [*OWN, *(pytest.param(name, marks=pytest.mark.psana) for name in PSANA)]


def started(name: str, scene, unit: str = "ADU", kind: str = "generic", batch: int = 4, **options):
    if name.startswith("psana"):
        pytest.importorskip("psana")
    cls = component("analyses", name)
    if name == "psana-v4r3" and unit == "ADU":      # its thresholds know no background
        options = {"thr_low": 250.0, "thr_high": 350.0, **options}
    analysis = cls(cls.Config(**options))
    analysis.start(*run_of(scene, unit, kind), batch)
    return analysis


def batch_of(selected: list[bool]) -> Batch:
    n = len(selected)
    return Batch(np.arange(n), np.arange(n), np.zeros(n, np.uint8), np.array(selected), {})


def asked(name: str, scene, unit: str = "ADU", kind: str = "generic", **options):
    """The answers about one frame, row 0."""
    analysis = started(name, scene, unit, kind, **options)
    analysis.take(View(scene.frame_PSF, scene.good_PSF), 0)
    return {column: rows[0] for column, rows in analysis.process(batch_of([True])).items()}


@pytest.mark.parametrize("name", FINDERS)
def test_columns_are_as_declared(name) -> None:
    scene = peak_frames.smooth(1)
    analysis = started(name, scene)
    assert {key for key in dir(Analysis) if not key.startswith("_")} <= set(dir(analysis))
    analysis.take(View(scene.frame_PSF, scene.good_PSF), 0)
    analysis.take(View(np.zeros_like(scene.frame_PSF), scene.good_PSF), 2)
    answers = analysis.process(batch_of([True, False, True]))
    assert set(answers) == set(analysis.columns)
    for key, column in analysis.columns.items():
        assert column.doc
        assert len(answers[key]) == 3
        if column.ragged:
            assert [row.dtype for row in answers[key]] == [np.dtype(column.dtype)] * 3, key
            assert len(answers[key][0]) == answers["peaks/n"][0] > 5
            assert len(answers[key][1]) == len(answers[key][2]) == 0
        else:
            assert answers[key].dtype == column.dtype
            assert answers[key][1] == column.missing
    assert answers["peaks/n"][2] == answers["peaks/hit"][2] == 0
    # a new batch knows nothing of the one before
    assert analysis.process(batch_of([True]))["peaks/n"].tolist() == [0]
    analysis.close()


@pytest.mark.parametrize("name", FINDERS)
def test_finds_planted_spots_and_tells_hits_from_misses(name) -> None:
    scene = peak_frames.sparse(4, n=14)
    found = asked(name, scene, unit="keV")
    distance = [np.where(found["peaks/panel"] == panel,
                         np.hypot(found["peaks/ss"] - ss, found["peaks/fs"] - fs), np.inf).min()
                for panel, ss, fs in scene.spots]
    assert np.mean(np.array(distance) < 2) >= 0.8
    assert found["peaks/hit"] == 1
    assert asked(name, peak_frames.sparse(5, n=0), unit="keV")["peaks/hit"] == 0


@pytest.mark.parametrize("name", FINDERS)
def test_photons_keV_and_stated_thresholds_find_the_same(name) -> None:
    scene = peak_frames.sparse(7, photon=1.0, noise=0.0)
    photons = asked(name, scene, unit="photon")
    scene.frame_PSF = scene.frame_PSF * np.float32(9.5)
    energy = asked(name, scene, unit="keV")
    assert energy["peaks/n"] == photons["peaks/n"] > 5
    np.testing.assert_allclose(energy["peaks/fs"], photons["peaks/fs"], atol=1e-3)
    np.testing.assert_allclose(energy["peaks/total"], 9.5 * photons["peaks/total"], rtol=1e-3)


@pytest.mark.parametrize("name", FINDERS)
def test_a_cut_list_is_flagged_and_counted(name) -> None:
    scene = peak_frames.smooth(2)
    whole = asked(name, scene)
    assert whole["peaks/truncated"] == 0
    cut = asked(name, scene, max_num_peaks=3, min_peaks=3)
    assert cut["peaks/truncated"] == 1
    assert cut["peaks/hit"] == 1
    assert len(cut["peaks/fs"]) == 3
    assert cut["peaks/n"] > 3
    np.testing.assert_array_equal(cut["peaks/fs"], whole["peaks/fs"][:3])


@pytest.mark.parametrize("name", FINDERS)
def test_masks_resolution_limits_and_radii(name) -> None:
    scene = peak_frames.smooth(3, n=20)
    limited = asked(name, scene, min_res=60.0, max_res=110.0)
    radius = limited["peaks/radius_px"]
    assert len(radius) > 0
    assert radius.min() >= 58
    assert radius.max() <= 112
    row = np.rint(limited["peaks/ss"]).astype(int)
    column = np.rint(limited["peaks/fs"]).astype(int)
    np.testing.assert_allclose(scene.radius_px_PSF[limited["peaks/panel"], row, column], radius)


@pytest.mark.parametrize("name", FINDERS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_pixels_that_are_not_finite_do_no_harm(name, value) -> None:
    scene = peak_frames.smooth(4, masked=0.0)
    n = asked(name, scene)["peaks/n"]
    scene.frame_PSF[0, 60, 100] = scene.frame_PSF[1, 0, 0] = value
    assert abs(asked(name, scene)["peaks/n"] - n) <= 1


@pytest.mark.parametrize("name", OWN)
def test_wrong_options_are_refused(name) -> None:
    cls = component("analyses", name)
    least = "min_pixel_count" if name == "peakfinder8" else "npix_min"
    for options in ({"min_peaks": 0}, {"max_num_peaks": 5}, {"min_res": 9.0, "max_res": 5.0},
                    {least: 0}, {least: 99}):
        with pytest.raises(ConfigurationError):
            cls(cls.Config(**options))


def test_two_finders_side_by_side_need_a_prefix() -> None:
    first = component("analyses", "peakfinder8")
    second = component("analyses", "peak_finder_v3r3")
    assert set(first().columns) & set(second().columns)
    assert not set(first().columns) & set(second(second.Config(prefix="v3r3")).columns)


def test_the_summary_says_what_was_asked_for() -> None:
    scene = peak_frames.smooth(1)
    assert started("peakfinder8", scene, unit="keV").attributes() == {
        "peaks_finder": "peakfinder8", "peaks_adc_threshold": "3 photons"}
    assert started("peakfinder8", scene).attributes()["peaks_adc_threshold"] == "100 ADU"
    stated = started("peakfinder8", scene, unit="keV", adc_threshold=12.5)
    assert stated.attributes()["peaks_adc_threshold"] == "12.5 keV"


def test_cspad_panels_are_two_asics() -> None:
    rng = np.random.default_rng(0)
    scene = peak_frames.smooth(1)
    scene.frame_PSF = rng.normal(10, 2, (1, 185, 388)).astype(np.float32)
    scene.good_PSF = np.ones(scene.frame_PSF.shape, bool)
    scene.radius_px_PSF = np.zeros(scene.frame_PSF.shape, np.float32)
    scene.frame_PSF[0, 50, 191:197] = 1000
    assert asked("peakfinder8", scene, kind="cspad")["peaks/npix"].tolist() == [3, 3]
    assert asked("peakfinder8", scene, kind="generic")["peaks/npix"].tolist() == [6]


@pytest.mark.parametrize("name", PSANA)
def test_without_psana_the_message_says_what_to_do(name, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "psana", None)
    monkeypatch.setitem(sys.modules, "psana.peakfinder8", None)
    monkeypatch.setitem(sys.modules, "psana.psalg_ext", None)
    cls = component("analyses", name)
    with pytest.raises(MissingDependency, match="pip install"):
        cls().start(*run_of(peak_frames.smooth(1)), 1)
