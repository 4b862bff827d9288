"""Training starts from a user's safetensors file where the recipe names one."""
from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")
pytestmark = pytest.mark.torch

from xfel_classify.core import ConfigurationError  # noqa: E402
from xfel_classify.learn.networks import build_network  # noqa: E402
from xfel_classify.learn.pretrained import start_from  # noqa: E402
from xfel_classify.learn.training import train  # noqa: E402


def as_torchvision(network):
    """The trunk's tensors with three input channels, under torchvision's names."""
    tensors = {name: value for name, value in network.state_dict().items()
               if not name.startswith("heads.")}
    weight = tensors["conv1.weight"]
    return {name: value.contiguous() for name, value in tensors.items()} | {
        "conv1.weight": (weight / 3).repeat(1, 3, 1, 1).contiguous()}


def test_the_trunk_is_taken_over(tmp_path):
    torch.manual_seed(1)
    theirs = build_network("resnet", depth=18, heads=["lattice"])
    safetensors.save_file(as_torchvision(theirs), str(tmp_path / "imagenet.safetensors"))
    torch.manual_seed(2)
    ours = build_network("resnet", depth=18, heads=["lattice"])
    said = start_from(ours, tmp_path / "imagenet.safetensors")
    assert "started from imagenet.safetensors" in said and "4 of the heads are new" in said
    torch.testing.assert_close(ours.conv1.weight, theirs.conv1.weight)
    torch.testing.assert_close(ours.fc.weight, theirs.fc.weight)


def test_errors_say_what_to_do(tmp_path):
    network = build_network("resnet", depth=18, heads=["lattice"])
    with pytest.raises(ConfigurationError, match="relative to the recipe"):
        start_from(network, tmp_path / "nothing.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"not weights")
    with pytest.raises(ConfigurationError, match="safetensors file"):
        start_from(network, tmp_path / "bad.safetensors")
    safetensors.save_file({"conv1.weight": torch.zeros(64, 3, 7, 7)},
                          str(tmp_path / "few.safetensors"))
    with pytest.raises(ConfigurationError, match="of the same depth"):
        start_from(network, tmp_path / "few.safetensors")
    with pytest.raises(ConfigurationError, match=r"this network \(sfx_hit\).*leave the key out"):
        start_from(build_network("sfx_hit"), tmp_path / "few.safetensors")


def test_a_training_goes_on_from_an_earlier_one(toy_recipe, tmp_path):
    """The file is named relative to the recipe; what was learnt is there at the start."""
    earlier = train(toy_recipe, tmp_path / "earlier")
    (tmp_path / "earlier" / "best.safetensors").rename(toy_recipe.parent / "mine.safetensors")
    text = toy_recipe.read_text()
    toy_recipe.write_text('pretrained = "mine.safetensors"\n' + text)
    lines: list[str] = []
    train(toy_recipe, tmp_path / "further", report=lines.append)
    assert any("started from mine.safetensors: all" in line for line in lines)

    network = build_network("sfx_hit", **earlier.recipe.network)
    start_from(network, toy_recipe.parent / "mine.safetensors")
    for name, value in earlier.network.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], value)

    toy_recipe.write_text('pretrained = "nowhere.safetensors"\n' + text)
    with pytest.raises(ConfigurationError, match="relative to the recipe"):
        train(toy_recipe, tmp_path / "nothing")
