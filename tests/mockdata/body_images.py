"""A made-up simulator of bodies in place of the real one: rings for one, stripes for all else."""
from __future__ import annotations

import numpy as np


def fake_image(c, structures=None):
    """Rings about the beam; several bodies striped, contaminants of finer rings, blanks dim."""
    rng = np.random.default_rng([c.seed, c.run, c.event])
    rows, columns = ((np.arange(count) + 0.5) * c.block + first
                     for count, first in zip(c.shape, c.first_px, strict=True))
    q = np.hypot(rows[:, None], columns[None]) / (c.block * 4)
    mean = 20 * np.cos(q * (2.0 if c.kind == "contaminant" else 1.0)) ** 2 * np.exp(-q / 8)
    if c.kind == "bad":
        turn = rng.uniform(0, np.pi)
        mean = mean * (1 + np.cos((np.cos(turn) * rows[:, None] + np.sin(turn) * columns[None])
                                  / c.block * 1.5))
    if c.kind == "blank":
        mean = np.full_like(mean, 0.05)
    return rng.poisson(mean * rng.uniform(0.5, 2)).astype(np.float32)


def fake_labels(c, structures=None):
    return {"count": c.count - 1 if c.kind in ("good", "bad") else -1, "particle": -1,
            "diameter_A": c.diameter_A, "distance_m": c.distance_m,
            "photons": 0.0 if c.kind == "blank" else 1e4, "quality": int(c.kind == "good")}
