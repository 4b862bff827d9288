"""``report``: the page's numbers, what it asks for, and what it says when something is missing."""
import json
import re
import shutil
import subprocess
import sys

import h5py
import numpy as np
import pytest
from mockdata.hand_result import EPOCH_STAMPS, empty_result, hand_geometry
from mockdata.report_pages import Page, made_run

from xfel_classify import cli

pytest.importorskip("matplotlib", reason="reports need matplotlib (the learn extra)")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
NASTY = '<script>alert(1)</script>&"\' $x_1$'


def report(*arguments):
    return cli.main(["report", *map(str, arguments)])


def labelled(place, *runs, **options):
    """Page of some made-up runs with their truth."""
    made = [made_run(place, run) for run in runs]
    words = [word for _, truth in made for word in ("--labels", truth)]
    words += [word for name, value in options.items() for word in (f"--{name}", value)]
    assert report(*[summary for summary, _ in made], *words, "-o", place / "page.html") == 0
    return Page(place / "page.html"), made


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return labelled(tmp_path_factory.mktemp("two"), 95, 99)


def truth_of(made):
    """score, peaks, called, called by peaks, is_hit of the usable events of a run."""
    summary, truth = made
    with h5py.File(summary) as run, h5py.File(truth) as true:
        usable = run["status"][()] == 0
        return [values[usable] for values in (
            run["hit/score"][()], run["peaks/n"][()], run["hit/label"][()] == 1,
            run["peaks/hit"][()] == 1, true["is_hit"][()])]


def shares(called, is_hit):
    return [f"{len(is_hit)}", f"{is_hit.mean():.4f}", f"{called[is_hit].mean():.4f}",
            f"{(~called[~is_hit]).mean():.4f}", f"{(called == is_hit).mean():.4f}"]


# --- numbers ------------------------------------------------------------------------------------

@pytest.mark.parametrize(("table", "which"), [("scores-hit-label", 2), ("scores-peaks-hit", 3)])
def test_the_papers_table(two, table, which):
    page, made = two
    rows = page.tables[table][2:]
    each = [truth_of(run) for run in made]
    assert [row[0] for row in rows] == ["mfxl1_r0095", "mfxl1_r0099", "all"]
    for row, values in zip(rows, each, strict=False):
        assert row[1:6] == shares(values[which], values[4])
    together = [np.concatenate(v) for v in zip(*each, strict=True)]
    assert rows[2][1:6] == shares(together[which], together[4])
    assert rows[0][6:] == ["12647", "0.1468", "0.9822", "0.9728", "0.9741"]
    assert rows[1][6:] == ["11081", "0.8471", "0.9892", "0.1488", "0.8608"]
    assert rows[2][6:] == ["–"] * 5


def test_confusion_matrices(two):
    page, made = two
    _, _, called, _, is_hit = truth_of(made[0])
    rows = next(t for name, t in page.tables.items() if name.startswith("confusion"))
    assert [row[1:] for row in rows[1:]] == [
        [f"{(called & is_hit).sum()}", f"{(~called & is_hit).sum()}"],
        [f"{(called & ~is_hit).sum()}", f"{(~called & ~is_hit).sum()}"]]
    for published in ("0.1441", "0.0026", "0.0232", "0.8300"):
        assert f"paper {published}" in page.source


def test_areas_under_the_curves(two):
    page, made = two
    rows = {(row[0], row[1]): row[2:] for row in page.tables["areas"][1:]}
    for name, run in zip(("mfxl1_r0095", "mfxl1_r0099"), made, strict=True):
        score, count, _, _, is_hit = truth_of(run)
        for answer, values in (("hit/label", score), ("peaks/hit", count)):
            gap = values[is_hit][:, None] - values[~is_hit]
            auc = (gap > 0).mean() + (gap == 0).mean() / 2
            assert rows[name, answer][:3] == [f"{is_hit.sum()}", f"{(~is_hit).sum()}", f"{auc:.4f}"]
            assert f"AUC {auc:.4f}" in page.text or answer == "peaks/hit"
    assert ("all runs", "hit/label") in rows


def test_overview_and_statuses(two):
    page, made = two
    _, _, called, _, _ = truth_of(made[0])
    row = page.tables["runs"][1]
    assert row[:3] == ["mfxl1_r0095", "mfxl1", "95"] and row[4:8] == [
        "60", "complete", "59", f"{called.sum()}"]
    assert row[8] == f"{called.sum() / 59:.4f}"
    status = next(t for name, t in page.tables.items() if "status" in name)
    assert [r[:2] for r in status[1:]] == [["OK", "59"], ["DAMAGED", "1"]]
    assert "1 labelled events have no answer" in page.text


def test_agreement_of_truth_and_peak_counts(two):
    page, made = two
    _, count, _, _, is_hit = truth_of(made[0])
    labelled_N = count < 2
    a, b = is_hit[labelled_N], np.zeros(int(labelled_N.sum()), bool)
    row = page.tables["agreement"][1]
    assert row[3:8] == [f"{len(a)}", "0", f"{(a & ~b).sum()}", "0", f"{(~a & ~b).sum()}"]


def test_gallery_counts_and_order(two):
    page, made = two
    score, _, called, _, is_hit = truth_of(made[0])
    for name, chosen in (("Hits, called hits", called & is_hit),
                         ("False positives: misses called hits", called & ~is_hit),
                         ("False negatives: hits called misses", ~called & is_hit),
                         ("Misses, called misses", ~called & ~is_hit)):
        assert f"{name} ({chosen.sum()}" in page.text
    worst = np.sort(score[called & ~is_hit])[::-1][:4]
    shown = page.source.split("<h3>False positives")[1].split("<h3>")[0]
    assert [float(x) for x in re.findall(r"<figcaption>[^<]*score ([\d.]+)", shown)] == [
        pytest.approx(float(s), abs=1e-3) for s in worst]


# --- the page as a document --------------------------------------------------------------------

def test_the_page_asks_for_nothing(two):
    page, _ = two
    for reference in page.references:
        assert reference.startswith(("#", "data:")), reference
    assert not {"script", "iframe", "object", "embed", "video", "audio"} & set(page.tags)
    assert "@import" not in page.source and "http://" not in page.source
    assert "default-src 'none'" in page.source
    assert len(page.ids) == len(set(page.ids))
    for target in (r[1:] for r in page.references if r.startswith("#")):
        assert target in page.ids


def test_names_are_escaped(tmp_path):
    summary, truth = made_run(tmp_path, 90, events=30)
    with h5py.File(summary, "r+") as file:
        file.attrs["exp"] = file.attrs["detector"] = file.attrs["peaks_finder"] = NASTY
        file.attrs["notes"] = [NASTY]
        file.attrs["configuration"] = f"# {NASTY}"
        file.attrs["model_x_version"] = NASTY
    strange = tmp_path / f"_{NASTY.replace('/', '')}.h5"
    truth.rename(strange)
    assert report(summary, "--labels", strange, "-o", tmp_path / "page.html", "--title",
                  NASTY) == 0
    page = Page(tmp_path / "page.html")
    assert "script" not in page.tags and not any(a.startswith("on") for a in page.attributes)
    assert page.text.count(NASTY) > 5 and page.tables["runs"][1][1] == NASTY


def test_drawings_say_what_they_are(two):
    page, _ = two
    assert page.source.count("<svg") == page.source.count('role="img"')
    assert page.source.count("aria-label=") >= page.source.count("<svg")


def opened(page, place):
    """(console lines, addresses asked for by the page) when Chromium opens a file."""
    place.mkdir()
    log, shot = place / "net.json", place / "page.png"
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
         "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", f"--user-data-dir={place / 'profile'}", "--enable-logging=stderr",
         f"--log-net-log={log}", "--window-size=1200,900", f"--screenshot={shot}", page.as_uri()],
        capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0 and shot.exists(), done.stderr[-2000:]
    asked = [event["params"] for event in json.loads(log.read_text(errors="replace"))["events"]
             if "initiator" in (event.get("params") or {})]
    # the browser's own requests come from no page: their initiator is no origin
    return re.findall(r"CONSOLE.*", done.stderr), [
        p["url"] for p in asked if p["initiator"] != "not an origin" and "http" in p["url"]]


@pytest.mark.skipif(CHROMIUM is None, reason="needs the Debian package chromium")
def test_a_browser_opens_it_without_errors_or_requests(two, tmp_path):
    page = tmp_path / "page.html"
    page.write_text(two[0].source, encoding="utf-8")
    assert opened(page, tmp_path / "page") == ([], [])
    page.write_text("<img src='http://127.0.0.1:9/x.png'><script>console.error('x')</script>")
    console, asked = opened(page, tmp_path / "control")
    assert len(console) >= 1 and asked == ["http://127.0.0.1:9/x.png"]


# --- runs that lack something --------------------------------------------------------------------

def page_of(tmp_path, summary, *words):
    assert report(summary, *words, "-o", tmp_path / "page.html", "--overwrite") == 0
    return Page(tmp_path / "page.html")


def test_without_labels(tmp_path):
    summary, _ = made_run(tmp_path)
    page = page_of(tmp_path, summary)
    assert "No labels were given" in page.text and "Called hits" in page.text
    assert not any(name.startswith(("scores", "confusion")) for name in page.tables)


def test_an_empty_run(tmp_path):
    from mockdata.hand_output import write_output

    summary = write_output(tmp_path / "out", empty_result())
    page = page_of(tmp_path, summary)
    assert "has no events" in page.text and page.tables["runs"][1][4:8] == [
        "0", "complete", "0", "0"]


def test_a_single_remark_of_a_run_stands_whole_on_the_page(tmp_path):
    summary, truth = made_run(tmp_path)
    with h5py.File(summary, "r+") as file:
        file.attrs["notes"] = "no photon energy was stated"
    assert "no photon energy was stated" in page_of(tmp_path, summary, "--labels", truth).text


def test_a_run_without_usable_events_or_answers(tmp_path):
    summary, truth = made_run(tmp_path, events=3)
    with h5py.File(summary, "r+") as file:
        file["status"][...] = 1
    page = page_of(tmp_path, summary, "--labels", truth)
    assert "no event with a usable image" in page.text and not re.search(r"\bnan\b", page.text)
    with h5py.File(summary, "r+") as file:
        del file["hit"], file["peaks"], file["timing"], file["totals"]
        file.attrs["complete"] = False
    page = page_of(tmp_path, summary, "--labels", truth)
    assert "neither a model nor a peak finder" in page.text and "INCOMPLETE" in page.text


@pytest.mark.parametrize("value", [0, 1])
def test_one_class_only(tmp_path, value):
    summary, truth = made_run(tmp_path)
    with h5py.File(truth, "r+") as file:
        file["is_hit"][...] = bool(value)
    page = page_of(tmp_path, summary, "--labels", truth, "--gallery", 0)
    row = page.tables["scores-hit-label"][2]
    assert row[3 if value == 0 else 4] == "–" and row[4 if value == 0 else 3] != "–"
    assert "one class only" in page.text and "No curves" in page.text


def test_without_geometry_or_cxi(tmp_path):
    summary, truth = made_run(tmp_path)
    summary.with_suffix(".geom").unlink()
    summary.with_suffix(".cxi").unlink()
    page = page_of(tmp_path, summary, "--labels", truth)
    assert "panels are shown below each other" in page.text
    assert "could not be shown" in page.text and "<circle" in page.source
    quiet = page_of(tmp_path, summary, "--gallery", 0)
    assert "could not be shown" not in quiet.text


@pytest.mark.parametrize(("words", "said"), [
    (["nothing.h5"], "does not exist"), (["empty"], "holds no summary"),
    (["text.h5"], "cannot be read as HDF5"), (["truth.h5"], "not a summary"),
    (["run", "--labels", "nothing"], "does not exist"),
    (["run", "--labels", "run96"], "are of mfxl1 run 96"),
    (["run", "--labels", "shifted.txt"], "name no event of"),
    (["run", "again", "--labels", "shifted.txt"], "do not say which of"),
    (["run", "--column", "hit/nothing"], "no column 'hit/nothing'"),
    (["run", "--column", "hit/score"], "one whole number"),
    (["run", "--gallery", "-1"], "0 or more"), (["run", "--name", "x"], "--elog"),
    (["run", "--elog", "e", "--name", "../x"], "letters, digits"),
    (["run", "--geometry", "nothing.geom"], "nothing.geom"),
    (["run", "-o", "no/such/page.html"], "cannot be written"), (["run", "-o", "."], "directory"),
])
def test_errors(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    summary, truth = made_run(tmp_path, events=20)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.h5").write_text("text")
    (tmp_path / "shifted.txt").write_text("a.h5 [100] HIT\n")
    names = {"run": summary, "again": made_run(tmp_path, 99, events=20)[0], "truth.h5": truth,
             "run96": tmp_path / "mfxl1-r0096-truth.h5"}
    shutil.copy(truth, names["run96"])
    assert report(*[names.get(word, word) for word in words]) == 1
    assert said in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.html*"))


def test_matplotlib_is_asked_for_by_name(tmp_path, monkeypatch, capsys):
    summary, _ = made_run(tmp_path, events=20)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert report(summary, "-o", tmp_path / "page.html") == 1
    assert "pip install 'xfel-classify[learn]'" in capsys.readouterr().err


def test_a_page_is_not_replaced_unasked(tmp_path, capsys):
    summary, _ = made_run(tmp_path, events=20)
    assert report(summary, "-o", tmp_path / "page.html", "--gallery", 0) == 0
    assert report(summary, "-o", tmp_path / "page.html") == 1
    assert "--overwrite" in capsys.readouterr().err


def test_folders_of_the_elog(tmp_path):
    summary, _ = made_run(tmp_path, events=20)
    assert report(summary, "--elog", tmp_path / "summary", "--gallery", 0) == 0
    assert (tmp_path / "summary/xfel_classify_r0095/report.html").exists()
    assert report(summary.parent, "--elog", tmp_path / "summary", "--name", "r0095/hits",
                  "--gallery", 0) == 0
    assert (tmp_path / "summary/r0095/hits/report.html").exists()


# --- pictures -----------------------------------------------------------------------------------

@pytest.mark.parametrize("longest", [1000, 12])
def test_peaks_are_drawn_on_their_pixels(longest):
    """On tilted panels, too: the circle's centre lies in the picture element of the pixel."""
    from xfel_classify.learn.report_images import assembly

    place = assembly(hand_geometry(), longest)
    p, s, f = np.meshgrid(*map(np.arange, (2, 8, 16)), indexing="ij")
    at = place.positions(np.stack([p.ravel(), f.ravel(), s.ravel()], axis=1))
    elements = np.floor(at[:, 1]).astype(int) * place.shape_HW[1] + np.floor(at[:, 0]).astype(int)
    # float32 geometry may put a centre that lies on an edge on its other side
    off_edge = np.abs(at - np.rint(at)).min(axis=1) > 1e-3
    assert (elements == place.place_PSF.ravel())[off_edge].all() and off_edge.sum() > 100
    values = np.zeros((2, 8, 16), np.float32)
    values[1, 3, 7] = 5
    image = place.image(values)
    assert image.ravel()[place.place_PSF[1, 3, 7]] == 5 and np.nansum(image) == 5


def test_pngs_are_what_they_should_be():
    import io

    from matplotlib.image import imread

    from xfel_classify.learn.report_images import png

    grey_HW = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
    shown_HW = grey_HW != 40
    read = imread(io.BytesIO(png(grey_HW, shown_HW)), format="png")
    assert np.array_equal(np.rint(read[..., 0] * 255), grey_HW)
    assert np.array_equal(read[..., -1] > 0.5, shown_HW)


def test_a_simulated_run_end_to_end(tmp_path, monkeypatch, caplog):
    """Frames of misses are read from the run again, and hold what the run saw."""
    from xfel_classify.detectors import (
        detector,
        load_constants,
        make_constants,
        read_geometry,
    )
    from xfel_classify.learn.report_images import frames_of
    from xfel_classify.learn.report_runs import open_runs
    from xfel_classify.preprocess import calibrate

    monkeypatch.chdir(tmp_path)
    assert cli.main(["simulate", "sfx", "--out", "sim", "--segments", "1", "--events", "8",
                     "--hit-fraction", "0.5", "--seed", "5"]) == 0
    assert cli.main(["run", "sim/mfxsim-r0095.h5", "--constants", "sim/constants.h5", "--model",
                     "none", "-o", "out"]) == 0
    assert report("out", "--labels", "sim/mfxsim-r0095-truth.h5", "-o", "page.html") == 0
    page = Page(tmp_path / "page.html")
    assert "could not be shown" not in page.text and "simulated frames of that kind" in page.text
    assert page.tables["scores-peaks-hit"][2][1] == "8"
    run = open_runs([tmp_path / "out/mfxsim_r0095.h5"])[0]
    frames, remark = frames_of(run, list(range(8)))
    assert remark == "" and len(frames) == 8
    with h5py.File("sim/mfxsim-r0095.h5") as file:
        raw = file[str(run.attributes["source_dataset"])][()]
    mapping = load_constants(tmp_path / "sim/constants.h5", "jungfrau", "jungfrau", (512, 1024))
    geometry = read_geometry(str(mapping["geometry"]), (1, 512, 1024), "jungfrau")
    constants = make_constants(detector("jungfrau"), (1, 512, 1024), mapping, geometry)
    for row, frame in frames.items():
        expected = calibrate(raw[row].reshape(1, 512, 1024), constants)
        assert np.array_equal(frame, expected)
    only_hits, remark = frames_of(run, list(range(8)), read_run=False)
    assert len(only_hits) == run.hits and ("could not be shown" in remark) == (run.hits < 8)
    (tmp_path / "sim/mfxsim-r0095.h5").unlink()
    assert len(frames_of(run, list(range(8)))[0]) == run.hits


def test_times_are_those_of_the_run():
    from xfel_classify.learn.report_figures import times

    since, unit = times(np.array(EPOCH_STAMPS))
    assert unit == "seconds" and since == pytest.approx(np.arange(6) * (1 + 1e-9))
    assert times(np.arange(5))[1] == "event"
    assert len(times(np.zeros(0, np.int64))[0]) == 0


def test_a_page_of_an_evaluation(tmp_path):
    from xfel_classify.learn.evaluation import Evaluation, score_run
    from xfel_classify.learn.reports import write_evaluation

    rng = np.random.default_rng(3)
    truth = [rng.integers(0, 2, 40) for _ in range(2)]
    scores = [np.clip(0.6 * t + 0.4 * rng.random(40), 0, 1) for t in truth]
    runs = tuple(score_run(f"training 1/{i}", s, t, 0.45)
                 for i, (s, t) in enumerate(zip(scores, truth, strict=True)))
    found = Evaluation("sfx-hit", "ab" * 32, "onnxruntime", 0.45, runs, tuple(scores),
                       tuple(truth))
    page = Page(write_evaluation(found, tmp_path / "page.html"))
    rows = page.tables["scores-hit-label"][1:]
    assert [row[3] for row in rows] == [f"{r.sensitivity:.4f}" for r in (*runs, found.pooled)]
    assert "Every frame is simulated" in page.text
