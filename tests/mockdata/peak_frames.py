"""Frames for peak finders: made ones with planted spots, and the recorded ones of ../shared."""
from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from xfel_classify.core import Constants, Frame, Geometry, RunInfo

SHARED = Path(__file__).resolve().parents[2] / "../shared/data"


@dataclass
class Scene:
    """A frame (P, S, F) with what a finder needs, and the planted spots (panel, ss, fs)."""

    name: str
    frame_PSF: np.ndarray
    good_PSF: np.ndarray
    radius_px_PSF: np.ndarray
    spots: np.ndarray
    asics: tuple[int, int] = (1, 1)


def radius(shape: tuple[int, int, int], gap: int = 8) -> np.ndarray:
    """Panels stacked along the slow axis around the beam, distance in pixels."""
    panels, height, width = shape
    panel, ss, fs = np.indices(shape)
    y = ss + panel * (height + gap) - (panels * (height + gap) - gap) / 2 + 0.5
    return np.hypot(y, fs - width / 2 + 0.5).astype(np.float32)


def planted(rng: np.random.Generator, shape: tuple[int, int, int], n: int,
            strength: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Expected values of ``n`` Gaussian spots that do not touch, and where they are."""
    expected_PSF, spots = np.zeros(shape), []
    ss, fs = np.mgrid[-5:6, -5:6]
    while len(spots) < n:
        panel = int(rng.integers(shape[0]))
        y, x = rng.uniform(8, shape[1] - 9), rng.uniform(8, shape[2] - 9)
        if any(p == panel and np.hypot(a - y, b - x) < 16 for p, a, b in spots):
            continue
        top, left = round(y), round(x)
        width = rng.uniform(0.7, 1.3)
        spot = np.exp(-((ss + top - y) ** 2 + (fs + left - x) ** 2) / (2 * width**2))
        expected_PSF[panel, top - 5:top + 6, left - 5:left + 6] += rng.uniform(*strength) * spot
        spots.append((panel, y, x))
    return expected_PSF, np.array(spots).reshape(-1, 3)


def smooth(seed: int, shape: tuple[int, int, int] = (2, 128, 256), n: int = 12,
           masked: float = 0.02) -> Scene:
    """A water ring with Gaussian noise, in ADU-like units."""
    rng = np.random.default_rng(seed)
    radius_px_PSF = radius(shape)
    ring_PSF = 40 + 120 * np.exp(-(((radius_px_PSF - 80) / 25) ** 2))
    spots_PSF, spots = planted(rng, shape, n, (300, 3000))
    frame_PSF = ring_PSF + spots_PSF + rng.normal(0, 1.2, shape) * np.sqrt(ring_PSF)
    good_PSF = rng.random(shape) >= masked
    frame_PSF = np.where(good_PSF, frame_PSF, 0).astype(np.float32)
    return Scene(f"smooth {seed}", frame_PSF, good_PSF, radius_px_PSF, spots)


def sparse(seed: int, shape: tuple[int, int, int] = (2, 128, 256), n: int = 12,
           photon: float = 9.5, noise: float = 0.3) -> Scene:
    """Fewer than one photon per pixel; ``photon`` = its value (1 and noise 0: exact counts)."""
    rng = np.random.default_rng(seed)
    radius_px_PSF = radius(shape)
    spots_PSF, spots = planted(rng, shape, n, (10, 60))
    expected_PSF = 0.05 + 0.25 * np.exp(-(((radius_px_PSF - 80) / 25) ** 2)) + spots_PSF
    frame_PSF = rng.poisson(expected_PSF) * photon + rng.normal(0, 1, shape) * noise
    good_PSF = rng.random(shape) >= 0.01
    frame_PSF = np.where(good_PSF, frame_PSF, 0).astype(np.float32)
    return Scene(f"sparse {seed} {photon}", frame_PSF, good_PSF, radius_px_PSF, spots)


def harsh(seed: int, shape: tuple[int, int, int] = (1, 160, 160)) -> Scene:
    """Heavy-tailed noise: many candidates, touching regions, every rule of a finder at work."""
    rng = np.random.default_rng(seed)
    radius_px_PSF = radius(shape) / np.float32(4)
    frame_PSF = [rng.exponential(20, shape) + 30, rng.normal(0, 20, shape) ** 3 / 400,
                 rng.poisson(0.3, shape) * 1.0][seed % 3]
    good_PSF = rng.random(shape) > (0.1 if seed % 2 else -1)
    asics = [(1, 1), (4, 2), (4, 1), (2, 2)][seed % 4]
    return Scene(f"harsh {seed}", np.where(good_PSF, frame_PSF, 0).astype(np.float32), good_PSF,
                 radius_px_PSF, np.zeros((0, 3)), asics)


def recorded() -> Iterator[Scene]:
    """Frames recorded at LCLS and Diamond, and nanoBragg's; skips where they are not there."""
    if not SHARED.exists():
        pytest.skip("the recorded frames (../shared/data) are not there")
    h5py = pytest.importorskip("h5py")
    with h5py.File(SHARED / "real/cspad_thermolysin/cspad_thermolysin.h5") as file:
        radius_px_PSF = np.zeros((4, 8, 185, 388), np.float32)
        ss, fs = np.mgrid[0.5:185, 0.5:194]
        for name, origin, fast, slow in zip(file["panel_name"].asstr()[:], file["panel_origin"][:],
                                            file["panel_fast"][:], file["panel_slow"][:],
                                            strict=True):
            quad, sensor, asic = (int(n) for n in re.findall(r"[QSA](\d+)", name)[-3:])
            x, y = (origin[i] / 0.10992 + fs * fast[i] / np.linalg.norm(fast)
                    + ss * slow[i] / np.linalg.norm(slow) for i in (0, 1))
            radius_px_PSF[quad, sensor, :, 194 * asic:194 * asic + 194] = np.hypot(x, y)
        for i in range(2):
            frame_PSF = file["data"][i].reshape(32, 185, 388).astype(np.float32)
            yield Scene(f"CSPAD {i}", frame_PSF, (frame_PSF > -400) & (frame_PSF < 16000),
                        radius_px_PSF.reshape(32, 185, 388), np.zeros((0, 3)), (1, 2))
    frame = np.load(SHARED / "real/cspad_asic/cxitut13_r10_32_cspadAsic.npy")[None]
    yield Scene("CSPAD 2x1", frame, np.ones(frame.shape, bool), radius(frame.shape),
                np.zeros((0, 3)))
    with h5py.File(SHARED / "nanobragg/nanobragg_dev_1024.h5") as file:
        for i in (0, 4, 9, 18):
            frame = file["images"][i][None].astype(np.float32)
            yield Scene(f"nanoBragg {i}", frame, np.ones(frame.shape, bool), radius(frame.shape),
                        np.zeros((0, 3)))
    fabio = pytest.importorskip("fabio")
    ss, fs = np.mgrid[:2527, :2463]
    from_beam = np.hypot(ss - 1306.96, fs - 1261.61).astype(np.float32)[None]
    for number in ("02", "14", "16"):
        path = SHARED / f"real/thaumatin_grid/thau_3_2_00{number}.cbf.bz2"
        frame = fabio.open(str(path)).data.astype(np.float32)[None]
        yield Scene(f"thaumatin {number}", frame, (frame >= 0) & (frame < 1046527), from_beam,
                    np.zeros((0, 3)))


class View:
    """The calibrated frame that an analysis sees."""

    def __init__(self, frame_PSF: np.ndarray, good_PSF: np.ndarray, index: int = 0) -> None:
        self.raw_PSF = self.calibrated_PSF = frame_PSF
        self.good_PSF = good_PSF
        self.photon_energy_eV = 9500.0
        self.frame = Frame(frame_PSF, index, index)

    def earlier(self, column: str) -> float:
        raise LookupError(column)


def run_of(scene: Scene, unit: str = "ADU", kind: str = "generic") -> tuple[RunInfo, Constants]:
    """A run whose pixels lie at the scene's radii (on the x axis, which a finder cannot tell)."""
    zero_PSF = np.zeros(scene.frame_PSF.shape, np.float32)
    geometry = Geometry(scene.radius_px_PSF * np.float32(1e-4), zero_PSF, zero_PSF, 1e-4)
    run = RunInfo("made", 1, "detector", kind, scene.frame_PSF.shape, "float32", "made")
    return run, Constants(scene.good_PSF, geometry, unit=unit)
