"""Diffraction of copies with torch: the formulas of :mod:`.spi_diffraction` on any device.

For a GPU that would otherwise wait; two processor cores make the published set in minutes with the
compiled code.  Counting photons and the detector stay in numpy with the event's own generator: the
labels do not depend on the device, expected photons agree to 1e-4 of the maximum, and most
counts are the same.

Axes: C copy, H image row, W image column.
"""
from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np

from .spi_diffraction import ELECTRON_RADIUS_M, Copy, View, check_reach, pair_coherence
from .torch_device import torch_on

__all__ = ["expected_photons_torch"]

KEPT_BYTES = 2 << 30        # of transforms that stay on a device


def expected_photons_torch(copies: Sequence[Copy], view: View, photons_m2: float,
                           coherence_A: float = np.inf, device: str = "cpu-torch") -> np.ndarray:
    """What :func:`.spi_diffraction.expected_photons` computes, to 1e-4 of the maximum.

    ``device`` is "cuda", "cuda:1" or "cpu-torch".  Raises :class:`MissingDependency` without
    torch, :class:`ConfigurationError` for a device that is not there, and for a mesh that does not
    reach the corner of the image.
    """
    torch, where = torch_on(device)
    if not copies:
        return np.zeros(view.shape, np.float32)
    for one in copies:
        check_reach(one, view)

    def on_device(array: np.ndarray) -> Any:
        return torch.from_numpy(np.array(array)).to(where)

    x, y = torch.meshgrid(on_device(view.x_W), on_device(view.y_H), indexing="xy")
    across = x * x + y * y
    r = torch.sqrt(across + view.distance_m ** 2)
    s_HW3 = torch.stack([x / r, y / r, -across / (r + view.distance_m) / r],
                        -1) / view.wavelength_A
    factor = (1 - (x / r) ** 2) * view.distance_m / r ** 3
    positions_C3 = np.stack([one.position_3 for one in copies])
    pairs = on_device(pair_coherence(positions_C3, view, coherence_A).astype(np.float32))
    waves = []
    for one in copies:
        turns = s_HW3 @ on_device(one.position_3.astype(np.float32))
        phase = 2 * torch.pi * (turns - torch.round(turns))
        waves.append(_looked_up(torch, _kept(device).get(torch, where, one.volume_XYZ), s_HW3
                                @ on_device(one.matrix_33).T)
                     * one.weight * torch.polar(torch.ones_like(phase), phase))
    wave_CHW = torch.stack(waves)
    mixed = torch.einsum("cd,dhw->chw", pairs.to(wave_CHW.dtype), wave_CHW)
    total = (wave_CHW.conj() * mixed).real.sum(0) * factor
    total *= photons_m2 * ELECTRON_RADIUS_M ** 2 * view.pixel_size_m ** 2
    return np.maximum(view.pooled(total.cpu().numpy()), 0)


class _Transforms:
    """Transforms on a device, the latest :data:`KEPT_BYTES` of them."""

    def __init__(self) -> None:
        self._known: OrderedDict[int, tuple[np.ndarray, Any]] = OrderedDict()

    def get(self, torch: Any, where: Any, volume_XYZ: np.ndarray) -> Any:
        key = id(volume_XYZ)        # stays this array's as long as it is held here
        if key not in self._known:
            self._known[key] = (volume_XYZ, torch.from_numpy(np.array(volume_XYZ)).to(where))
            while len(self._known) > 1 and sum(
                    held.nbytes for held, _ in self._known.values()) > KEPT_BYTES:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return self._known[key][1]


@functools.cache
def _kept(device: str) -> _Transforms:
    return _Transforms()


def _looked_up(torch: Any, volume_XYZ: Any, offset_HW3: Any) -> Any:
    """Trilinear interpolation at mesh points counted from the mesh's centre, complex64 (H, W)."""
    n = volume_XYZ.shape[0]
    at = (offset_HW3 + (n - 1) / 2).clamp(0, n - 1)
    low = at.long().clamp(max=n - 2)
    share = at - low
    first = (low[..., 0] * n + low[..., 1]) * n + low[..., 2]
    flat = volume_XYZ.reshape(-1)
    total = torch.zeros(first.shape, dtype=flat.dtype, device=flat.device)
    for i in (0, 1):
        for j in (0, 1):
            for k in (0, 1):
                weight = torch.ones_like(share[..., 0])
                for axis, corner in enumerate((i, j, k)):
                    weight = weight * (share[..., axis] if corner else 1 - share[..., axis])
                total += weight * flat[first + (i * n + j) * n + k]
    return total
