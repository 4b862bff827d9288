"""The classifier inside somebody's program: arrays, panels, archived runs, psana2 events."""
import subprocess
import sys

import h5py
import numpy as np
import pytest

from xfel_classify import Classifier, open_run
from xfel_classify.core import Constants, EventStatus, Geometry, UnknownComponent
from xfel_classify.detectors import assembled_geometry
from xfel_classify.simulate.conditions import draw_conditions
from xfel_classify.simulate.sfx import crops


@pytest.fixture(scope="module")
def stills():
    """(images_BHW, labels) of a run that no training saw."""
    images_BHW, truths = crops(draw_conditions(777_001, 3), range(16))
    return images_BHW, np.array([truth.is_hit for truth in truths])


@pytest.fixture(scope="module")
def classify():
    with Classifier("sfx-hit") as classifier:
        yield classifier


def test_images_are_judged_right_one_by_one_and_together(classify, stills):
    images_BHW, labels = stills
    together = classify(images_BHW)
    assert set(together) == {"hit/score", "hit/label"}
    assert (together["hit/label"] == labels).mean() >= 0.9
    alone = np.concatenate([classify(image)["hit/score"] for image in images_BHW])
    np.testing.assert_allclose(alone, together["hit/score"], atol=1e-5)


def test_a_larger_image_is_cropped_about_its_beam(classify, stills):
    images_BHW, _ = stills
    frame = np.zeros((500, 620), np.float32)
    frame[40:390, 200:550] = images_BHW[1]
    score = classify(frame, beam_center_px=(200 + 175, 40 + 175))["hit/score"]
    np.testing.assert_allclose(score, classify(images_BHW[1])["hit/score"], atol=1e-5)


def test_masked_pixels_change_nothing_whatever_their_value(classify, stills):
    image = stills[0][0].copy()
    good = np.ones(image.shape, bool)
    good[100:140] = False
    first = classify(image, good=good)["hit/score"]
    for value in (1e9, -1e9, np.nan, np.inf):
        image[100:140] = value
        np.testing.assert_array_equal(classify(image, good=good)["hit/score"], first)


def test_panels_go_through_their_constants(stills):
    image = stills[0][0]
    geometry: Geometry = assembled_geometry(image.shape, 75e-6, beam_center_px=(175, 175))
    constants = Constants(np.ones((1, *image.shape), bool), geometry, unit="photon")
    with Classifier(constants=constants) as classify, Classifier() as plain:
        score = classify(image[None])["hit/score"]
        np.testing.assert_allclose(score, plain(image)["hit/score"], atol=1e-5)
        assert classify(np.stack([image, image])[:, None])["hit/score"].shape == (2,)


def test_shapes_that_fit_nothing_are_named(classify):
    with pytest.raises(ValueError, match=r"\(H, W\) or \(B, H, W\)"):
        classify(np.zeros((2, 3, 350, 350), np.float32))
    with pytest.raises(TypeError, match="open_run"):
        next(classify.stream([1, 2]))


def test_an_archived_run_is_walked_through_in_order(tmp_path, classify, stills):
    images_BHW, labels = stills
    with h5py.File(tmp_path / "frames.h5", "w") as file:
        file["frames"] = images_BHW
        file["timestamp"] = 5000 + np.arange(len(images_BHW))
    with open_run(tmp_path / "frames.h5", detector="assembled", pixel_size_m=75e-6,
                  unit="photon") as source:
        answers = list(classify.stream(source))
    assert [frame.timestamp for frame, _ in answers] == list(range(5000, 5016))
    found = np.array([answer["hit/label"] for _, answer in answers])
    np.testing.assert_array_equal(found, classify(images_BHW)["hit/label"])


@pytest.mark.psana
def test_psana2_events_as_in_a_script_of_ones_own(tmp_path):
    pytest.importorskip("psana")
    from xfel_classify.detectors import load_constants
    from xfel_classify.simulate.raw_runs import JungfrauRun
    from xfel_classify.simulate.xtc2_runs import write_xtc2_run

    run = JungfrauRun(draw_conditions(777_001, 95, "demo", hit_fraction=0.5), 1, damaged=[2],
                      missing=[3])
    files = write_xtc2_run(tmp_path, run, 8, exp="mfxtest")
    script = tmp_path / "script.py"
    script.write_text(f"""
import numpy as np
import psana
import psana.pscalib.calib.MDBWebUtils as web
from psana.psexp.ds_base import DataSourceBase
from xfel_classify import Classifier
from xfel_classify.detectors import load_constants
mapping = load_constants({str(files.constants)!r}, "jungfrau")
DataSourceBase._get_file_info_from_db = lambda self, run: {{}}
web.calib_constants_all_types = lambda det, **k: (
    {{name: (value, {{}}) for name, value in mapping.items()}} if "jungfrau" in det else {{}})
ds = psana.DataSource(exp="mfxtest", run=95, dir={str(tmp_path)!r})
run = next(ds.runs())
ebeam = run.Detector("ebeam")
for event, answer in Classifier("sfx-hit").stream(
        run.events(), detector=run.Detector("jungfrau"),
        photon_energy_eV=ebeam.raw.ebeamPhotonEnergy):
    print(event.timestamp, answer["status"], answer["hit/label"], answer["hit/score"])
""")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line[0].isdigit()]
    assert len(rows) == 8
    status = [int(row[1]) for row in rows]
    assert status == [0, 0, EventStatus.DAMAGED, EventStatus.NO_DETECTOR, 0, 0, 0, 0]
    assert rows[2][2:] == ["-1", "nan"]
    assert load_constants(files.constants, "jungfrau")["pedestals"].shape == (3, *run.shape)
    _same_as_the_command(tmp_path, files, rows)


def _same_as_the_command(directory, files, rows):
    """The scores are those that ``xfel-classify run`` finds for the same run."""
    from xfel_classify import cli

    assert cli.main(["run", "95", "--exp", "mfxtest", "--dir", str(directory), "--constants",
                     str(files.constants), "--peaks", "none", "-o", str(directory / "out")]) == 0
    with h5py.File(directory / "out" / "mfxtest_r0095.h5") as file:
        np.testing.assert_allclose(file["hit/score"][:], [float(row[3]) for row in rows],
                                   atol=1e-5)


def test_open_run_names_wrong_sources(tmp_path):
    with pytest.raises(UnknownComponent, match="hdf5"):
        open_run(tmp_path / "x.h5", use="hdf6")
