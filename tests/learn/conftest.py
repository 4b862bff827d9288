"""A recipe of the made-up generator of :mod:`mockdata.toy_training`."""
from pathlib import Path

import pytest
from mockdata.toy_training import RECIPE, toy_images


@pytest.fixture
def toy_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe of the toy generator; its cache is a folder of the test."""
    pytest.importorskip("torch")
    from xfel_classify.learn import datasets

    monkeypatch.setitem(datasets.GENERATORS, "toy", toy_images)
    monkeypatch.setenv("XFEL_CLASSIFY_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path
