"""A hit model trains on a GPU, and learns there what it learns on a CPU."""
from __future__ import annotations

import pytest
from mockdata.toy_training import RECIPE, toy_images


def test_a_hit_model_trains_on_a_gpu_as_on_a_cpu(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    from xfel_classify.learn import datasets
    from xfel_classify.learn.training import train

    monkeypatch.setitem(datasets.GENERATORS, "toy", toy_images)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.replace("[optimiser]", '[optimiser]\nprecision = "float32"'))
    losses = {}
    for device in ("cpu", "cuda"):
        trained = train(recipe, tmp_path / device, device=device)
        losses[device] = [row["loss"] for row in trained.history]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=0.05)
