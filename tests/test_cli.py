"""The command line as a user meets it: exit codes, messages, and what appears on disk."""
import subprocess
import sys

import h5py
import numpy as np
import pytest

from xfel_classify import cli
from xfel_classify.commands.compare import compare
from xfel_classify.core import ConfigurationError

SHAPE = (192, 96)


@pytest.fixture
def run_file(tmp_path, monkeypatch):
    """Twelve calibrated frames; odd ones carry twenty bright spots."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(1)
    frames = rng.normal(0, 0.1, (12, *SHAPE)).astype(np.float32)
    for event in range(1, 12, 2):
        for k in range(20):
            s, f = 6 + 11 * (k % 5), 8 + 20 * (k // 5)
            frames[event, s + 64 * (k % 3):, f:][:2, :2] += 60.0
    with h5py.File(tmp_path / "frames.h5", "w") as file:
        file["frames"] = frames
    return tmp_path / "frames.h5"


def run(*arguments):
    return cli.main(["run", *map(str, arguments)])


COMMON = ("--exp", "mfxtest", "--set", "source.run=95", "--detector", "assembled", "--set",
          "source.pixel_size_m=1e-4", "--set", "source.distance_m=0.1", "--set",
          "source.unit=photon", "--model", "none")


def test_a_run_of_a_file(run_file, tmp_path, capsys):
    assert run(run_file, *COMMON) == 0
    out = capsys.readouterr().out
    assert "12 of 12 events" in out and "6 hits" in out
    names = sorted(path.name for path in (tmp_path / "mfxtest_r0095").iterdir())
    assert names == ["mfxtest_r0095.cxi", "mfxtest_r0095.geom", "mfxtest_r0095.h5",
                     "mfxtest_r0095.lst", "mfxtest_r0095_hits.npy", "mfxtest_r0095_hits.txt"]
    with h5py.File(tmp_path / "mfxtest_r0095" / "mfxtest_r0095.h5") as file:
        found = file["peaks/n"][:]
        assert (found[::2] <= 1).all() and (found[1::2] >= 12).all()
    assert cli.main(["validate", "mfxtest_r0095"]) == 0


def test_a_second_run_needs_to_be_told_what_to_do(run_file, capsys):
    assert run(run_file, *COMMON) == 0
    assert run(run_file, *COMMON) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert run(run_file, *COMMON, "--overwrite") == 0
    assert run(run_file, *COMMON, "--resume") == 0


def test_a_summary_can_be_run_again_from_itself(run_file, tmp_path):
    assert run(run_file, *COMMON, "--set", "peakfinder8.minimum_snr=6", "-o", "first") == 0
    assert run(run_file, "--config", "first/mfxtest_r0095.h5", "-o", "second") == 0
    assert compare(tmp_path / "first", tmp_path / "second") == []


def test_a_dry_run_writes_nothing(run_file, tmp_path, capsys):
    assert run(run_file, *COMMON, "--dry-run") == 0
    assert "12 events" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [run_file]


def test_events_by_hits_of_the_peak_finder_only(run_file, tmp_path):
    assert run(run_file, *COMMON, "--max-events", "4", "-o", "few") == 0
    with h5py.File(tmp_path / "few" / "mfxtest_r0095.h5") as file:
        assert file.attrs["events_expected"] == 4 and file["timestamp"].shape == (4,)


@pytest.mark.parametrize("arguments, says", [
    (["absent.h5"], "absent.h5"),
    (["{file}", "--peaks", "peakfinder9"], "did you mean 'peakfinder8'"),
    (["{file}", "--model", "sfx-hitt"], "sfx-hitt"),
    (["{file}", "--set", "source.unitt=photon"], "did you mean 'unit'"),
    (["{file}", "--set", "batch=3"], "SECTION.KEY=VALUE"),
    (["{file}", "--config", "absent.toml"], "absent.toml"),
    (["{file}", "--mask", "absent.npy"], "absent.npy"),
    (["{file}", "--geometry", "absent.geom"], "absent.geom"),
    (["{file}", "--batch", "0"], "at least 1"),
    (["{file}", "--peaks-on", "hits"], "needs a model"),
    (["95", "--exp", "mfxtest", "--dir", "nowhere"], "nowhere"),
])
def test_wrong_input_is_exit_code_1_and_one_sentence(run_file, tmp_path, capsys, arguments, says):
    filled = [argument.format(file=run_file) for argument in arguments]
    common = () if arguments[0] == "95" else COMMON
    if arguments[0] == "95":
        pytest.importorskip("psana")
    if "--model" in arguments:
        common = COMMON[:-2]
    assert run(*common, *filled) == 1 if common else run(*filled) == 1
    err = capsys.readouterr().err
    assert says in err and "Traceback" not in err
    assert not list(tmp_path.glob("mfxtest*"))


def test_usage_errors_are_exit_code_2(capsys):
    for arguments in (["run"], ["fly"], ["run", "95", "--peaks-on", "sometimes"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        assert ended.value.code == 2


def test_the_command_starts_without_heavy_packages(run_file):
    code = ("import sys; from xfel_classify import cli; "
            "cli.parser(); "
            "print([m for m in ('torch', 'psana', 'mpi4py', 'matplotlib', 'onnxruntime') "
            "if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_an_uncaught_error_shows_its_traceback_and_ends_with_1(run_file):
    code = ("import sys; from xfel_classify import cli; "
            "from xfel_classify.commands import run; "
            "run.classify_run = lambda *a, **k: 1 / 0; "
            f"cli.main(['run', {str(run_file)!r}, *{list(COMMON)!r}])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr


def test_plugins_and_help_name_every_verb(capsys):
    assert cli.main(["plugins"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in ("psana2", "hdf5", "peakfinder8", "cxi", "summary"))
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert all(verb in text for verb in cli.verbs())


def test_peak_options_become_analyses():
    def analyses(*options):
        parser = cli.parser("run")
        from xfel_classify.commands.run import tables_of

        return tables_of(parser.parse_args(["run", "a.h5", *options]))["analyses"]

    assert [a["use"] for a in analyses()] == ["classify", "peakfinder8", "statistics"]
    assert analyses("--peaks-on", "hits")[1]["only"] == "hit/label"
    good = analyses("--model", "spi", "--peaks-on", "hits")     # single particles: good or bad
    assert good[1]["only"] == good[2]["hits"] == "quality/label"
    both = analyses("--model", "spi", "--model", "sfx-hit", "--peaks-on", "hits")
    assert both[2]["only"] == "hit/label"
    assert [a["use"] for a in analyses("--peaks", "none", "--model", "none")] == ["statistics"]
    twice = analyses("--model", "sfx-hit", "--model", "sfx-hit")[:2]
    assert [a["model"] for a in twice] == ["sfx-hit", "sfx-hit"]
    assert analyses("--model", "none")[-1]["hits"] == "peaks/hit"
    with pytest.raises(ConfigurationError):
        analyses("--model", "none", "--peaks-on", "hits")
