"""Finding models, and refusing the ones that are not what their card says."""
import logging
import os

import numpy as np
import pytest

from xfel_classify.core import ModelInvalid, ModelNotFound, Window
from xfel_classify.engines import cards, check_model, find_model, list_models


@pytest.fixture(autouse=True)
def no_shipped_models(tmp_path, monkeypatch):
    """Only what a test writes is on the search path."""
    empty = tmp_path / "shipped"
    empty.mkdir()
    monkeypatch.setattr(cards, "shipped_directory", lambda: empty)
    monkeypatch.delenv("XFEL_CLASSIFY_MODELS", raising=False)
    return empty


def test_a_card_says_what_the_network_means(write_model):
    model = find_model(write_model())
    assert model.name == "tiny"
    assert model.card.window == Window("crop", 12, 10, normalize="clip", clip=100.0)
    task = model.card.task("hit")
    assert (task.positive_index, task.threshold) == (1, 0.4)
    assert model.onnx_path.is_file()
    with pytest.raises(ModelInvalid, match="no task 'count'; it has hit"):
        model.card.task("count")


def test_search_order_path_then_variable_then_shipped(write_model, tmp_path, monkeypatch,
                                                      no_shipped_models):
    write_model("shipped/tiny")
    in_variable = write_model("elsewhere/tiny")
    other = write_model("third/other", name="other")
    assert find_model("tiny").directory == no_shipped_models / "tiny"
    monkeypatch.setenv("XFEL_CLASSIFY_MODELS",
                       os.pathsep.join([str(tmp_path / "elsewhere"), str(other)]))
    assert find_model("tiny").directory == in_variable
    assert find_model("other").directory == other            # a directory that is a model itself
    assert {m.name for m in list_models()} == {"tiny", "other"}
    assert find_model(str(in_variable / "model.onnx")).directory == in_variable


def test_entry_points_are_searched(write_model, monkeypatch):
    directory = write_model("plugin/tiny")

    class Entry:
        name = "tiny"

        def load(self):
            return lambda: directory

    monkeypatch.setattr(cards, "entry_points", lambda group: [Entry()])
    assert find_model("tiny").directory == directory


def test_two_models_of_one_name(write_model, tmp_path, monkeypatch):
    first = write_model("a/tiny")
    write_model("b/copy")                                     # same name, same hash: fine
    monkeypatch.setenv("XFEL_CLASSIFY_MODELS",
                       os.pathsep.join([str(tmp_path / "a"), str(tmp_path / "b")]))
    assert find_model("tiny").directory == first
    write_model("b/different", seed=1)
    with pytest.raises(ModelInvalid, match="exists twice and differs"):
        find_model("tiny")
    with pytest.raises(ModelInvalid, match="exists twice and differs"):
        list_models()
    assert find_model(first).directory == first               # an explicit path still works


def test_an_unknown_name_lists_what_there_is(write_model, tmp_path, monkeypatch):
    write_model("a/tiny")
    monkeypatch.setenv("XFEL_CLASSIFY_MODELS", str(tmp_path / "a"))
    with pytest.raises(ModelNotFound, match=r"'tinny'; did you mean 'tiny'\?; found: tiny"):
        find_model("tinny")
    with pytest.raises(ModelNotFound, match="no card.toml"):
        find_model(tmp_path / "nothing")


@pytest.mark.parametrize(("wrong", "right", "expected"), [
    ("licence =", "license =", "unknown key 'license'.*did you mean 'licence'"),
    ("threshold =", "treshold =", "unknown key 'treshold'.*did you mean 'threshold'"),
    ("height =", "heigth =", "unknown key 'heigth'.*did you mean 'height'"),
    ('positive = "hit"', 'positive = "hits"', "calls 'hits' positive, its classes are miss, hit"),
    ("threshold = 0.4", "threshold = 40.0", "between 0 and 1"),
    ("height = 12", 'height = "tall"', "Expected `int`"),
    ("[window]", "[window", "cannot be read"),
])
def test_a_wrong_card_names_the_key_and_the_valid_ones(write_model, wrong, right, expected):
    directory = write_model()
    card = directory / "card.toml"
    card.write_text(card.read_text().replace(wrong, right))
    with pytest.raises(ModelInvalid, match=expected):
        find_model(directory)


def test_the_network_must_have_the_hash_of_the_card(write_model):
    directory = write_model()
    network = directory / "model.onnx"
    whole = network.read_bytes()
    network.write_bytes(whole[:-20])
    with pytest.raises(ModelInvalid, match="promises sha256"):
        find_model(directory)
    network.unlink()
    with pytest.raises(ModelInvalid, match="no readable model.onnx"):
        find_model(directory)


def test_a_broken_neighbour_does_not_hide_a_good_model(write_model, tmp_path, monkeypatch, caplog):
    write_model("a/tiny")
    broken = write_model("a/broken", name="broken")
    (broken / "model.onnx").write_bytes(b"")
    monkeypatch.setenv("XFEL_CLASSIFY_MODELS", str(tmp_path / "a"))
    assert find_model("tiny").name == "tiny"
    with caplog.at_level(logging.WARNING):
        assert [m.name for m in list_models()] == ["tiny"]
    assert "broken is unusable" in caplog.text
    with pytest.raises(ModelInvalid, match="promises sha256"):
        find_model("broken")


@pytest.mark.parametrize("damage", ["missing", "truncated", "incomplete"])
def test_damaged_check_values_are_reported(write_model, damage, tiny_images):
    directory = write_model()
    check = directory / "check.npz"
    if damage == "missing":
        check.unlink()
    elif damage == "truncated":
        check.write_bytes(check.read_bytes()[:100])
    else:
        np.savez(check, images=tiny_images)
    with pytest.raises(ModelInvalid, match="check.npz"):
        check_model(directory)
