"""Diffraction of copies with torch: the formulas of :mod:`.spi_diffraction` on any device.

For a GPU that would otherwise wait; two processor cores make the published set in minutes with the
compiled code.  Counting photons and the detector stay in numpy, so that random numbers do not
depend on the device.

Axes: C copy, H image row, W image column.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..core import MissingDependency
from .spi_diffraction import ELECTRON_RADIUS_M, Copy, View, pair_coherence

__all__ = ["expected_photons_torch"]


def expected_photons_torch(copies: Sequence[Copy], view: View, photons_m2: float,
                           coherence_A: float = np.inf, device: str = "cpu") -> np.ndarray:
    """What :func:`.spi_diffraction.expected_photons` computes, to 1e-4 of the maximum.

    Raises :class:`MissingDependency` without torch.
    """
    try:
        import torch
    except ImportError as error:
        raise MissingDependency("diffraction was asked for on a torch device; torch is not "
                                "installed; pip install 'xfel-classify[learn]'") from error
    if not copies:
        return np.zeros(view.shape, np.float32)

    def on_device(array: np.ndarray) -> Any:
        return torch.from_numpy(np.array(array)).to(device)

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
        waves.append(_looked_up(torch, on_device(one.volume_XYZ), s_HW3
                                @ on_device(one.matrix_33).T)
                     * one.weight * torch.polar(torch.ones_like(phase), phase))
    wave_CHW = torch.stack(waves)
    mixed = torch.einsum("cd,dhw->chw", pairs.to(wave_CHW.dtype), wave_CHW)
    total = (wave_CHW.conj() * mixed).real.sum(0) * factor
    total *= photons_m2 * ELECTRON_RADIUS_M ** 2 * view.pixel_size_m ** 2
    return np.maximum(view.pooled(total.cpu().numpy()), 0)


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
