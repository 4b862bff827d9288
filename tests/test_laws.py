"""Laws of whole runs: what may not change when only the way of computing does.

The laws of single parts are beside them: fused == reference in ``test_preprocess*.py``, finders ==
references and psana in ``analyses/``, any number of ranks and resumed == uninterrupted in ``mpi/``
and ``pipeline/``, a summary's own configuration == the summary in ``test_cli.py``.
"""
import h5py
import numpy as np
import pytest

from xfel_classify import cli, find_model
from xfel_classify.commands.compare import compare
from xfel_classify.simulate.conditions import draw_conditions
from xfel_classify.simulate.hdf5_runs import write_hdf5_run
from xfel_classify.simulate.raw_runs import JungfrauRun

EVENTS = 14


@pytest.fixture(scope="module")
def simulated():
    return JungfrauRun(draw_conditions(777_002, 95, "demo", hit_fraction=0.5), 2, missing=[4])


@pytest.fixture(scope="module")
def run_of(simulated, tmp_path_factory):
    """``run_of(name, *options)`` classifies the run with ``options``; returns the directory."""
    folder = tmp_path_factory.mktemp("laws")
    files = write_hdf5_run(folder, simulated, EVENTS, exp="mfxlaws")
    done = {}

    def classify(name, *options):
        if name not in done:
            out = done[name] = folder / name
            assert cli.main(["run", str(files.files[0]), "--constants", str(files.constants),
                             "-o", str(out), *options]) == 0
        return done[name]

    return classify


def columns(directory, *names):
    with h5py.File(directory / "mfxlaws_r0095.h5") as file:
        return [file[name][:] for name in names]


def test_the_answers_are_the_truth(simulated, run_of):
    truth = np.array([event.truth.is_hit for event in simulated.events(range(EVENTS))])
    status, network, finder = columns(run_of("whole"), "status", "hit/label", "peaks/hit")
    usable = status == 0
    assert usable.sum() == EVENTS - 1 and not usable[4]
    assert (network[usable] == truth[usable]).mean() > 0.9
    assert (finder[usable] == truth[usable]).mean() > 0.9


@pytest.mark.parametrize("batch", [1, 5])
def test_the_batch_size_changes_nothing(run_of, batch):
    assert compare(run_of("whole"), run_of(f"batch{batch}", "--batch", str(batch))) == []


@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_runtimes_agree_within_the_cards_tolerance(run_of, backend):
    if backend == "torch":
        pytest.importorskip("torch")
    tolerance = find_model("sfx-hit").card.tolerance_of("float32")
    scores, labels = columns(run_of("direct", "--backend", "direct"), "hit/score", "hit/label")
    other_scores, other_labels = columns(run_of(backend, "--backend", backend), "hit/score",
                                         "hit/label")
    np.testing.assert_allclose(scores, other_scores, atol=tolerance)
    np.testing.assert_array_equal(labels, other_labels)


def test_peaks_of_hits_are_the_same_whether_or_not_misses_are_searched(run_of):
    names = "hit/label", "peaks/n", "peaks/fs", "peaks/offsets"
    label, n, fs, offsets = columns(run_of("whole"), *names)
    _, only_n, only_fs, only_offsets = columns(run_of("hits", "--peaks-on", "hits"), *names)
    for event in range(EVENTS):
        if label[event] == 1:
            np.testing.assert_array_equal(fs[offsets[event]:offsets[event + 1]],
                                          only_fs[only_offsets[event]:only_offsets[event + 1]])
            assert n[event] == only_n[event]
        else:
            assert only_n[event] == -1
            assert only_offsets[event] == only_offsets[event + 1]


def test_without_peaks_the_network_answers_the_same(run_of):
    np.testing.assert_array_equal(columns(run_of("whole"), "hit/score")[0],
                                  columns(run_of("bare", "--peaks", "none"), "hit/score")[0])


@pytest.mark.psana
def test_psana2_and_hdf5_give_the_same_rows(simulated, run_of, tmp_path):
    pytest.importorskip("psana")
    from xfel_classify.simulate.xtc2_runs import write_xtc2_run

    files = write_xtc2_run(tmp_path, simulated, EVENTS, exp="mfxlaws", streams=2)
    assert cli.main(["run", "95", "--exp", "mfxlaws", "--dir", str(tmp_path), "--constants",
                     str(files.constants), "-o", str(tmp_path / "out")]) == 0
    for name in ("timestamp", "status", "hit/score", "peaks/n", "peaks/fs", "peaks/total",
                 "photon_energy_eV", "distance_m", "totals/powder_max_hits", "totals/mean"):
        np.testing.assert_array_equal(columns(tmp_path / "out", name)[0],
                                      columns(run_of("whole"), name)[0], err_msg=name)
