"""Models that are told the geometry: cards, runtimes, the analysis of a run, the classifier."""
import logging

import numpy as np
import pytest
from mockdata.geometry_model import CARD_TOML, SIDE, inverse_d, write_geometry_model

pytest.importorskip("onnx")

from xfel_classify import Classifier
from xfel_classify.analyses.classify import HC_EV_A, Analysis, suited_window
from xfel_classify.core import (
    Batch,
    ConfigurationError,
    Constants,
    EngineError,
    Frame,
    ModelInvalid,
    RunInfo,
)
from xfel_classify.detectors import assembled_geometry
from xfel_classify.engines import check_model, find_model, open_engine
from xfel_classify.pipeline.loop import OpenFrame
from xfel_classify.pipeline.stages import Stages

BACKENDS = ["onnxruntime", pytest.param("torch", marks=pytest.mark.torch)]


@pytest.fixture
def model(tmp_path):
    return find_model(write_geometry_model(tmp_path / "rings"))


def some(count=4):
    rng = np.random.default_rng(2)
    images = rng.uniform(0, 12, (count, SIDE, SIDE)).astype(np.float32)
    geometry = np.stack([rng.uniform(60, 300, count), rng.uniform(0.07, 0.2, count),
                         rng.uniform(0.9, 1.4, count), rng.choice([1, 2, 4], count)], 1)
    return images, geometry


@pytest.mark.parametrize("backend", BACKENDS)
def test_runtimes_feed_the_geometry_of_each_image(model, backend):
    pytest.importorskip(backend)
    images, geometry = some()
    with open_engine(model, backend, max_batch=3) as engine:
        found = engine.infer(images, geometry)["inverse"]
        np.testing.assert_allclose(found, inverse_d(images, geometry), atol=1e-6)
        assert engine.infer(images[:0], geometry[:0])["inverse"].shape == (0, 1)
        for wrong in (None, geometry[:2], geometry[:, :3]):
            with pytest.raises(EngineError, match="needs the geometry of its 4 images"):
                engine.infer(images, wrong)


def test_the_check_values_come_with_their_geometry(model):
    assert check_model(model).passed
    stored = dict(np.load(model.check_path))
    del stored["geometry"]
    np.savez(model.check_path, **stored)
    with pytest.raises(ModelInvalid, match="lacks geometry"):
        check_model(model)


def test_runtimes_without_geometry_are_passed_over(model, caplog, monkeypatch):
    from xfel_classify.engines import onnxruntime

    monkeypatch.setattr(onnxruntime.Engine, "takes_geometry", False)
    with pytest.raises(EngineError, match="without a geometry input"):
        open_engine(model, "onnxruntime")
    pytest.importorskip("torch")
    with caplog.at_level(logging.WARNING):
        assert open_engine(model).name == "torch"


@pytest.mark.parametrize(("old", "new", "expected"), [
    ('kind = "regression"', 'kind = "number"', "valid are classes, regression"),
    ('transform = "reciprocal"', 'transform = "log"', "valid are none, reciprocal"),
    ('value = "d_A"', 'classes = ["a", "b"]', "regression and has classes"),
    ('kind = "regression"', 'kind = "classes"', "has no classes"),
    ("pools = [1, 2, 4]", "pools = [0, 2]", "at least 1"),
    ('geometry = "geometry"', 'geometry = "where"', "names the input 'images' and 'where'"),
    ('geometry = "geometry"', "", "names the input 'images', the network has"),
])
def test_wrong_cards_are_explained(model, old, new, expected):
    card = model.directory / "card.toml"
    assert old in CARD_TOML
    card.write_text(card.read_text().replace(old, new))
    with pytest.raises(ModelInvalid, match=expected):
        open_engine(model.directory, "onnxruntime")


# --- a run --------------------------------------------------------------------------------------

SHAPE = (1, 40, 50)


def constants(distance_m=0.1):
    geometry = assembled_geometry(SHAPE[1:], 100e-6, (26, 18), distance_m)
    return Constants(np.ones(SHAPE, bool), geometry, unit="photon")


def run_over(model, frames, scalars, constants, **config):
    analysis = Analysis(Analysis.Config(model=str(model.directory), backend="onnxruntime",
                                        **config))
    analysis.start(RunInfo("t", 1, "d", "generic", SHAPE, "float32", "memory"), constants,
                   len(frames))
    view = OpenFrame(constants, Stages())
    for row, (frame, known) in enumerate(zip(frames, scalars, strict=True)):
        view.load(Frame(frame, row, row, scalars=known), frame,
                  known.get("photon_energy_eV", 9500.0), {}, row)
        analysis.take(view, row)
    n = len(frames)
    batch = Batch(np.arange(n), np.arange(n), np.zeros(n, np.uint8), np.ones(n, bool), {})
    answers, said = analysis.process(batch), analysis.attributes()
    assert answers.keys() == analysis.columns.keys()
    analysis.close()
    return answers["resolution/d_A"], said


def expected_d(frame, distance_m, energy_eV, pool, quadrant="A"):
    """From the definition: the quadrant left above the beam, max-pooled."""
    padded = np.zeros((200, 200), np.float32)
    padded[100 - 18:100 + 22, 100 - 26:100 + 24] = frame[0]
    whole = {"A": padded[:100, :100][::-1, ::-1], "D": padded[100:, 100:]}[quadrant]
    part = whole[:SIDE * pool, :SIDE * pool].reshape(SIDE, pool, SIDE, pool).max(axis=(1, 3))
    row = [1e3 * distance_m, 0.1, HC_EV_A / energy_eV, pool]
    return 1 / inverse_d(part[None], np.array([row]))[0, 0]


def test_a_run_tells_distance_pixel_wavelength_and_pool(model):
    frames = np.random.default_rng(1).uniform(0, 9, (3, *SHAPE)).astype(np.float32)
    scalars = [{}, {"distance_m": 0.2}, {"distance_m": 0.15, "photon_energy_eV": 12_000.0}]
    found, said = run_over(model, frames, scalars, constants())
    pool = suited_window(model, 26).pool
    assert pool == said["model_rings_pool"] == 2      # 2 x 16 of the 26 pixels to the edge
    expected = [expected_d(frames[0], 0.1, 9500.0, pool), expected_d(frames[1], 0.2, 9500.0, pool),
                expected_d(frames[2], 0.15, 12_000.0, pool)]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_events_without_a_distance_have_no_answer_and_do_not_disturb_the_others(model, caplog):
    frames = np.random.default_rng(1).uniform(0, 9, (3, *SHAPE)).astype(np.float32)
    with caplog.at_level(logging.WARNING):
        found, _ = run_over(model, frames, [{}, {"distance_m": 0.2}, {}], constants(None))
    assert np.isnan(found[[0, 2]]).all()
    assert found[1] == pytest.approx(expected_d(frames[1], 0.2, 9500.0, 2), rel=1e-4)
    assert len([r for r in caplog.records if "needs the distance" in r.message]) == 1


def test_an_empty_image_has_no_resolution(model):
    found, _ = run_over(model, np.zeros((1, *SHAPE), np.float32), [{}], constants())
    assert np.isnan(found[0])


def test_two_quadrants_give_the_smaller_d(model):
    frames = np.random.default_rng(1).uniform(0, 9, (2, *SHAPE)).astype(np.float32)
    frames[1, :, :18] *= 0.5
    both, _ = run_over(model, frames, [{}, {}], constants(), quadrants=["A", "D"])
    expected = [min(expected_d(frame, 0.1, 9500.0, 2, q) for q in "AD") for frame in frames]
    np.testing.assert_allclose(both, expected, rtol=1e-4)
    with pytest.raises(ConfigurationError, match="quadrants A, B, C and D"):
        Analysis(Analysis.Config(model=str(model.directory), quadrants=["E"]))


def test_the_classifier_takes_the_geometry_with_the_images(model):
    frames = np.random.default_rng(1).uniform(0, 9, (2, *SHAPE)).astype(np.float32)
    with Classifier(model, backend="onnxruntime") as classify:
        with pytest.raises(ConfigurationError, match="distance_m is None"):
            classify(frames[:, 0], beam_center_px=(26, 18))
        found = classify(frames[:, 0], beam_center_px=(26, 18), distance_m=0.1,
                         pixel_size_m=100e-6, photon_energy_eV=9500.0)
    expected = [expected_d(frame, 0.1, 9500.0, 2) for frame in frames]
    np.testing.assert_allclose(found["resolution/d_A"], expected, rtol=1e-4)
    with Classifier(model, backend="onnxruntime", constants=constants()) as classify:
        np.testing.assert_allclose(classify(frames)["resolution/d_A"], expected, rtol=1e-4)


def test_the_command_writes_the_resolution_of_every_event(model, tmp_path):
    """Distances from the file event by event; two models side by side."""
    h5py = pytest.importorskip("h5py")
    from xfel_classify import cli

    frames = np.random.default_rng(1).uniform(0, 9, (5, *SHAPE)).astype(np.float32)
    distance_m = np.array([0.1, 0.15, np.nan, 0.2, 0.3])
    with h5py.File(tmp_path / "frames.h5", "w") as file:
        file["frames"] = frames[:, 0]
        file["distance_m"] = distance_m
    second = write_geometry_model(tmp_path / "second", "second")
    card = second / "card.toml"
    card.write_text(card.read_text().replace('name = "resolution"', 'name = "again"'))
    (tmp_path / "run.toml").write_text(f"""
[source]
use = "hdf5"
detector = "assembled"
pixel_size_m = 1e-4
unit = "photon"
beam_center_px = [26, 18]

[[analyses]]
use = "classify"
model = "{model.directory}"

[[analyses]]
use = "classify"
model = "{second}"

[[sinks]]
use = "summary"
""")
    assert cli.main(["run", str(tmp_path / "frames.h5"), "--config", str(tmp_path / "run.toml"),
                     "-o", str(tmp_path / "out")]) == 0
    with h5py.File(next((tmp_path / "out").glob("*_r0000.h5"))) as file:
        found, again = file["resolution/d_A"][:], file["again/d_A"][:]
        assert file["resolution/d_A"].attrs["units"] == "A"
        assert file.attrs["model_rings_pool"] == 2
    expected = [expected_d(frame, z, 9500.0, 2) for frame, z in zip(frames, distance_m,
                                                                   strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    np.testing.assert_array_equal(found, again)
