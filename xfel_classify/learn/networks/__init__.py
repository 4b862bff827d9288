"""Networks by name: one readable file each, defining ``Network`` (a ``torch.nn.Module``).

``Network.forward`` takes images (B, 1, H, W) and returns {output name: logits (B, K)}.
"""
from __future__ import annotations

import difflib
import importlib
import inspect
from pathlib import Path
from typing import Any

from ...core import ConfigurationError, UnknownComponent

__all__ = ["build_network", "network_class", "network_names"]


def network_names() -> list[str]:
    """Architectures of the package."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py")
                  if not path.stem.startswith("_"))


def network_class(architecture: str) -> Any:
    """The ``Network`` of ``networks/<architecture>.py``; ``UnknownComponent`` when there is none.
    """
    names = network_names()
    if architecture not in names:
        close = difflib.get_close_matches(architecture, names, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise UnknownComponent(f"no network is called {architecture!r}; known: "
                               f"{', '.join(names)}{hint}")
    return importlib.import_module(f"{__name__}.{architecture}").Network


def build_network(architecture: str, **options: Any) -> Any:
    """The ``Network`` of ``networks/<architecture>.py``, freshly initialised.

    Raises ``UnknownComponent`` for a name that is not there and ``ConfigurationError`` for an
    option the network does not have.
    """
    network = network_class(architecture)
    valid = [name for name in inspect.signature(network).parameters]
    wrong = sorted(set(options) - set(valid))
    if wrong:
        raise ConfigurationError(f"network {architecture} has no option {', '.join(wrong)}; "
                                 f"valid options are {', '.join(valid)}")
    return network(**options)
