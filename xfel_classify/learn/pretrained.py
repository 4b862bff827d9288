"""Weights that a network starts from, instead of random ones: a safetensors file by path.

Recipe key ``pretrained``; the file is the user's own: ``best.safetensors`` of an earlier training
of the same network, or torchvision's ImageNet weights of a ResNet of the same depth, saved with
safetensors.  Nothing is fetched, no pickle is read.
"""
from __future__ import annotations

from pathlib import Path
from typing import Any

from ..core import ConfigurationError, MissingDependency

__all__ = ["start_from"]


def start_from(network: Any, path: Path) -> str:
    """Load the weights of ``path`` into ``network``; returns a line on what was taken.

    A network that knows weights of others (``load_pretrained``) takes those; any network takes its
    own, all of them.  Raises :class:`ConfigurationError` for a missing or unreadable file and one
    of another network.
    """
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise MissingDependency(f"pretrained weights are read with safetensors ({error}); "
                                "pip install 'xfel-classify[learn]'") from error
    try:
        tensors = safetensors.torch.load_file(str(path))
    except (OSError, safetensors.SafetensorError) as error:
        raise ConfigurationError(
            f"pretrained weights were to be read from {path}: {error}; give the path of a "
            "safetensors file, relative to the recipe (of torchvision's weights: "
            "safetensors.torch.save_file(model.state_dict(), path))") from error
    own = network.state_dict()
    if {name: value.shape for name, value in tensors.items()} == {
            name: value.shape for name, value in own.items()}:
        network.load_state_dict(tensors)
        return f"started from {path.name}: all {len(own)} tensors taken"
    if not hasattr(network, "load_pretrained"):
        missing, other = sorted(set(own) - set(tensors)), sorted(set(tensors) - set(own))
        raise ConfigurationError(
            f"pretrained weights were to be read from {path}; they are not those of this network "
            f"({type(network).__module__.rpartition('.')[2]}): {len(missing)} of its {len(own)} "
            f"tensors are missing, {len(other)} are none of its own"
            + ("" if missing or other else ", some have another shape")
            + "; name best.safetensors of a training with the same [network], or leave the key out")
    fresh = network.load_pretrained(tensors)
    return (f"started from {path.name}: {len(network.state_dict()) - len(fresh)} tensors taken, "
            f"{len(fresh)} of the heads are new")
