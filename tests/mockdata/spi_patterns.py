"""Single-particle patterns by closed formulas: one sphere with bumps, or several at a distance."""
from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

SIDE = 48


def grid(side: int = SIDE) -> tuple[np.ndarray, np.ndarray]:
    """y (up) and x of pixel centres from the beam, in pixels."""
    place = np.arange(side) - side / 2 + 0.5
    return -place[:, None] + 0 * place[None, :], place[None, :] + 0 * place[:, None]


def sphere(q: np.ndarray, radius: float) -> np.ndarray:
    """Amplitude 3 (sin x - x cos x) / x^3 at x = q radius."""
    x = np.maximum(q * radius, 1e-6)
    return np.where(x < 1e-2, 1 - x ** 2 / 10, 3 * (np.sin(x) - x * np.cos(x)) / x ** 3)


def pattern(rng: np.random.Generator, single: bool, photons: float, order: int = 6,
            side: int = SIDE, radius: float = 0.42, lobes: float = 0.25) -> np.ndarray:
    """Expected photons (side, side) of a particle with ``order``-fold lobes, or of two."""
    y, x = grid(side)
    q, angle = np.hypot(y, x), np.arctan2(y, x)
    radius *= rng.uniform(0.95, 1.05)
    turn = rng.uniform(0, 2 * np.pi)
    bumps = 1 + lobes * np.cos(order * (angle - turn)) * np.clip(q * radius / 6, 0, 1)
    amplitude = sphere(q, radius) ** 2 * bumps
    if not single:
        distance, way = rng.uniform(0.6, 1.5), rng.uniform(0, 2 * np.pi)
        amplitude = amplitude * (1 + np.cos(distance * (x * np.cos(way) + y * np.sin(way))))
    return photons * amplitude / amplitude.sum()


def patterns(events: int, seed: int = 0, share: float = 0.5, photons: float = 2e4,
             **more: float) -> tuple[np.ndarray, np.ndarray]:
    """(images (N, side, side) float32, single (N,) bool), brightness varying tenfold."""
    rng = np.random.default_rng(seed)
    single = rng.random(events) < share
    images = [rng.poisson(pattern(rng, bool(one), photons * 10 ** rng.uniform(-0.5, 0.5), **more))
              for one in single]
    return np.array(images, np.float32), single


def write_run(path: Path, images: np.ndarray, single: np.ndarray, start: int = 10_000) -> Path:
    """A labelled set in one file: images, labels with names, time stamps."""
    with h5py.File(path, "w") as file:
        file["images"] = images
        labels = file.create_dataset("labels", data=single.astype("f4")[:, None])
        labels.attrs["names"] = ["quality"]
        file["timestamp"] = np.arange(len(images), dtype=np.uint64) + start
    return path
