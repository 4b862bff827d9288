"""The torch device that a simulation was asked to run on, or why it cannot."""
from __future__ import annotations

from typing import Any

from ..core import ConfigurationError, MissingDependency

__all__ = ["torch_on"]


def torch_on(name: str) -> tuple[Any, Any]:
    """(torch, its device) of "cuda", "cuda:1" or "cpu-torch" ("cpu" means the same here).

    Raises :class:`MissingDependency` without torch and :class:`ConfigurationError` for a device
    that is not there.
    """
    try:
        import torch
    except ImportError as error:
        raise MissingDependency(
            f"a simulation on the device {name!r} was asked for; torch is not installed; pip "
            "install 'xfel-classify[learn]', or leave the device out") from error
    kind, _, number = name.partition(":")
    if name in ("cpu", "cpu-torch"):
        return torch, torch.device("cpu")
    if kind != "cuda" or not (number.isdigit() or name == "cuda"):
        raise ConfigurationError(f"a simulation on the device {name!r} was asked for; devices are "
                                 "cuda, cuda:N and cpu-torch; name one of them, or leave the "
                                 "device out for the compiled code")
    if not torch.cuda.is_available():
        found = ("this torch is built without CUDA" if torch.version.cuda is None
                 else "torch finds no CUDA device")
        raise ConfigurationError(f"a simulation on the device {name!r} was asked for; {found}; "
                                 "leave the device out to simulate on the processor")
    if number and int(number) >= torch.cuda.device_count():
        raise ConfigurationError(f"a simulation on the device {name!r} was asked for; there are "
                                 f"{torch.cuda.device_count()} CUDA devices; count from cuda:0")
    return torch, torch.device(name)
