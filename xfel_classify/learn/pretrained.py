"""Weights that a network starts from, instead of random ones: a safetensors file by path.

Recipe key ``pretrained``; the file is the user's own (torchvision's ImageNet weights of a ResNet of
the same depth, saved with safetensors).  Nothing is fetched, no pickle is read.
"""
from __future__ import annotations

from pathlib import Path
from typing import Any

from ..core import ConfigurationError, MissingDependency

__all__ = ["start_from"]


def start_from(network: Any, path: Path) -> str:
    """Load the weights of ``path`` into ``network``; returns a line on what was taken.

    Raises :class:`ConfigurationError` for a missing or unreadable file, one of another network,
    and networks that have no such weights.
    """
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise MissingDependency(f"pretrained weights are read with safetensors ({error}); "
                                "pip install 'xfel-classify[learn]'") from error
    if not hasattr(network, "load_pretrained"):
        raise ConfigurationError(f"the recipe says pretrained = {str(path)!r}; its network "
                                 f"({type(network).__module__.rpartition('.')[2]}) takes none; "
                                 "leave the key out, or use architecture = \"resnet\"")
    try:
        tensors = safetensors.torch.load_file(str(path))
    except (OSError, safetensors.SafetensorError) as error:
        raise ConfigurationError(
            f"pretrained weights were to be read from {path}: {error}; give the path of a "
            "safetensors file, relative to the recipe (of torchvision's weights: "
            "safetensors.torch.save_file(model.state_dict(), path))") from error
    fresh = network.load_pretrained(tensors)
    return (f"started from {path.name}: {len(network.state_dict()) - len(fresh)} tensors taken, "
            f"{len(fresh)} of the heads are new")
