"""Radius on the detector and inverse resolution: exact physics shared by networks and losses.

A network that knows the geometry answers with a radius in window pixels, which stays the same
kind of number for every detector; theta = arctan(x f p / D) / 2 and 1/d = 2 sin(theta) / lambda
turn it into inverse resolution [CICH23; MEN24, their code].

Axes: B image, 4 = (distance in mm, detector pixel in mm, wavelength in angstrom, pooling f).
"""
from __future__ import annotations

import torch
from torch import Tensor


def inverse_d_A(radius_px_BK: Tensor, geometry_B4: Tensor) -> Tensor:
    """1/d in 1/angstrom, (B, K), of radii in window (pooled) pixels.

    Odd in the radius: a negative number gives a negative 1/d and keeps its gradient.
    """
    distance_B1, pixel_B1, wavelength_B1, pool_B1 = (
        geometry_B4[:, i:i + 1] for i in range(4))
    tangent_BK = radius_px_BK * (pool_B1 * pixel_B1 / distance_B1)
    return torch.sin(0.5 * torch.atan(tangent_BK)) * (2.0 / wavelength_B1)
