"""Fine-tuning: a user's labelled run in, a model folder that does better on what was held back."""
from __future__ import annotations

import tomllib

import h5py
import numpy as np
import pytest
from mockdata.hand_output import write_output
from mockdata.hand_result import hand_result

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")
pytestmark = pytest.mark.torch

from xfel_classify import cli  # noqa: E402
from xfel_classify.core import ConfigurationError  # noqa: E402
from xfel_classify.embed import Classifier  # noqa: E402
from xfel_classify.engines import check_model, find_model, open_engine  # noqa: E402
from xfel_classify.engines.cards import read_check  # noqa: E402
from xfel_classify.learn.finetuning import Graph  # noqa: E402
from xfel_classify.learn.labelled_frames import (  # noqa: E402
    CHOICE,
    HELD_BACK,
    TRAINING,
    divide,
)


@pytest.fixture(autouse=True)
def same_thread_count():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def frames(count, seed=0, salt=220, share=0.4):
    """(images (N, 350, 350), labels): spots of 2 x 2 pixels are hits; single hot pixels are not."""
    rng = np.random.default_rng([seed, 5])
    labels = (rng.random(count) < share).astype(int)
    images = rng.poisson(2.0, (count, 350, 350)).astype(np.float32)
    for image, label in zip(images, labels, strict=True):
        if label:
            rows, columns = rng.integers(4, 345, (2, 60))
            for step in ((0, 0), (0, 1), (1, 0), (1, 1)):
                image[rows + step[0], columns + step[1]] += 60.0
        if salt:
            image[rng.integers(0, 350, salt), rng.integers(0, 350, salt)] += rng.exponential(
                300.0, salt).astype(np.float32)
    return images, labels


def write_run(directory, count=130, **options):
    """(run file, expert's list) of an HDF5 run of assembled photons."""
    images, labels = frames(count, **options)
    with h5py.File(directory / "mine.h5", "w") as file:
        file["entry_1/data_1/data"] = images
        file["photon_energy_eV"] = np.full(count, 12_500.0)
        file.attrs["exp"], file.attrs["run"] = "mine", 7
    (directory / "expert.txt").write_text("\n".join(
        f"mine.h5 [{n}] {'HIT' if label else 'MISS'}" for n, label in enumerate(labels, 1)))
    return directory / "mine.h5", directory / "expert.txt"


def finetune(run, labels, output, *words):
    return cli.main(["finetune", "sfx-hit", str(run), "--labels", str(labels), "-o", str(output),
                     "--detector", "assembled", "--set", "source.pixel_size_m=75e-6",
                     *map(str, words)])


@pytest.mark.slow
def test_a_run_with_hot_pixels_is_learnt(tmp_path, capsys):
    run, labels = write_run(tmp_path)
    output = tmp_path / "models" / "mine"
    assert finetune(run, labels, output, "--name", "my-hit", "--epochs", 6,
                    "--learning-rate", 0.004) == 0
    said = capsys.readouterr().out
    assert "held back: 3" in said and "GAINED: balanced accuracy" in said
    model = find_model(output)
    base = find_model("sfx-hit")
    assert check_model(model).passed and model.sha256 != base.sha256
    images, truth = frames(30, seed=9)              # neither file has these
    right = {}
    for one in (base, model):
        with Classifier(one) as classify:
            right[one.name] = (classify(images)["hit/label"] == truth).mean()
    assert right["my-hit"] > right["sfx-hit"] + 0.2 and right["my-hit"] > 0.85

    card = tomllib.loads((output / "card.toml").read_text())
    how = card["provenance"]
    assert how["base_sha256"] == base.sha256 and how["gained"] is True
    assert how["frames"] == 130 and how["labels_kind"] == "expert"
    assert sum(part["frames"] for part in how["parts"].values()) == 130
    assert "blocks of neighbouring events" in how["split"]
    held_back = card["metrics"]["held_back"]
    assert held_back["before"]["events"] == how["parts"]["held_back"]["frames"]
    assert held_back["after"]["accuracy"] > held_back["before"]["accuracy"]
    assert card["photon_energy_eV"][1] == 12_500.0
    assert str(tmp_path).encode() not in model.onnx_path.read_bytes()
    assert finetune(run, labels, output) == 1
    assert "already holds one" in capsys.readouterr().err


@pytest.mark.slow
def test_where_nothing_is_gained_the_weights_are_kept(tmp_path, capsys):
    run, labels = write_run(tmp_path, count=110, salt=0)
    assert finetune(run, labels, tmp_path / "kept", "--epochs", 1) == 0
    said = capsys.readouterr().out
    base, model = find_model("sfx-hit"), find_model(tmp_path / "kept")
    assert "NOTHING GAINED" in said and "has the weights and the threshold of sfx-hit" in said
    assert model.onnx_path.read_bytes() == base.onnx_path.read_bytes()
    assert model.card.tasks[0].threshold == base.card.tasks[0].threshold
    assert model.name == "sfx-hit-mine-r0007" and model.card.provenance["gained"] is False
    assert check_model(model).passed


def test_torch_gives_what_the_engines_give():
    model = find_model("sfx-hit")
    graph = Graph(model)
    images, _, expected = read_check(model)
    with open_engine(model, "onnxruntime") as engine:
        found = engine.infer(images)["hit"][:, 1]
    np.testing.assert_allclose(graph.scores(images), found, atol=1e-5)
    np.testing.assert_allclose(graph.expected(), expected["hit"], atol=1e-7)
    logits = graph.logits(torch.from_numpy(images[:5])[:, None])
    graph.parameters()
    loss = torch.nn.functional.cross_entropy(
        graph.logits(torch.from_numpy(images)[:, None]), torch.ones(len(images), dtype=int))
    loss.backward()
    assert logits.shape == (5, 2)
    assert all(torch.isfinite(weight.grad).all() for weight in graph.parameters())


# --- parts ----------------------------------------------------------------------------------------

def test_parts_are_blocks_of_neighbours():
    labels = (np.random.default_rng(1).random(400) < 0.3).astype(int)
    parts, blocks = divide(labels, seed=3)
    assert blocks == 40 and len(parts) == 400
    assert (np.diff(parts.reshape(40, 10)) == 0).all()          # whole blocks
    counts = np.bincount(parts)
    assert counts.tolist() == [240, 60, 100]
    for part in (TRAINING, CHOICE, HELD_BACK):
        assert abs(labels[parts == part].mean() - labels.mean()) < 0.05
    np.testing.assert_array_equal(parts, divide(labels, seed=3)[0])
    assert (parts != divide(labels, seed=4)[0]).any()


def test_hits_in_one_stretch_cannot_be_divided():
    labels = np.zeros(200, int)
    labels[50:62] = 1
    with pytest.raises(ConfigurationError, match="label events from more stretches"):
        divide(labels)


# --- what cannot be ---------------------------------------------------------------------------

def test_errors_say_what_to_do(tmp_path, capsys):
    run, labels = write_run(tmp_path, count=110, salt=0)
    lines = labels.read_text().splitlines()

    def refused(text, *words, labels=labels):
        assert finetune(run, labels, tmp_path / "out", *words) == 1
        assert text in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    few = tmp_path / "few.txt"
    few.write_text("\n".join(lines[:60]))
    refused("needs at least 100 labelled frames", labels=few)
    few.write_text("\n".join(line.replace("HIT", "MISS") for line in lines))
    refused("0 hits and 110 misses; label more", labels=few)
    few.write_bytes(b"\x00\xff\x00")
    refused("neither HDF5 nor text", labels=few)
    few.write_text("\n".join(f"mine.h5 [{n}] {'HIT' if n % 2 else 'MISS'}"
                             for n in range(5001, 5201)))
    refused("none of them is among the frames", labels=few)
    few.write_text("\n".join([*lines[:90], *(f"mine.h5 [{n}] {'HIT' if n % 2 else 'MISS'}"
                                            for n in range(5001, 5201))]))
    refused("200 are not in the run", labels=few)
    refused("does not exist", labels=tmp_path / "nowhere.txt")
    refused("give another name", "--name", "sfx-hit")
    refused("give another name", "--name", "a/b")
    refused("at least 1 epoch", "--epochs", 0)
    refused("--max-frames 0", "--max-frames", 0)
    assert cli.main(["finetune", "no-such", str(run), "--labels", str(labels), "-o",
                     str(tmp_path / "out")]) == 1
    summary = write_output(tmp_path / "other", hand_result())
    refused("give the labels of these frames", labels=summary)


def test_labels_of_another_run_are_refused(tmp_path, capsys):
    from xfel_classify.learn.labels import Labels, write_labels

    run, _ = write_run(tmp_path, count=110, salt=0)
    count = 110
    other = write_labels(Labels("theirs", "expert", "", (np.arange(count) % 2).astype(np.int8),
                                np.arange(count), np.full(count, -1), exp="mine", run=8),
                         tmp_path / "theirs.h5")
    assert finetune(run, other, tmp_path / "out") == 1
    said = capsys.readouterr().err
    assert "are of mine run 8, the frames of mine run 7" in said


def test_models_without_a_yes_or_no_are_refused(tmp_path):
    import msgspec

    from xfel_classify.learn.finetuning import require_hit_model

    base = find_model("sfx-hit")
    for change in ({"geometry": "geometry"}, {"tasks": [*base.card.tasks, *base.card.tasks]}):
        other = type(base)(msgspec.structs.replace(base.card, **change), base.directory)
        with pytest.raises(ConfigurationError, match="one yes/no question about an image"):
            require_hit_model(other)
