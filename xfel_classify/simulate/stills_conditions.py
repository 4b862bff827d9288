"""Conditions of one labelled still for the lattice and resolution networks.

Ranges of methods sections 5a and 7.3: distances of 60 to 300 mm, 9 to 13 keV, detectors pooled by
f = 1, 2 or 4, B = 4 d^2 + 12 as the resolution label, mis-setting angles N(0, sigma) with sigma
0.1, 1 or 10 degrees or U(1, 180) degrees.  A *run* is a crystal form on a detector; its events
differ in everything else.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core import ConfigurationError
from .bragg import HC_EV_A
from .crystal import Crystal, draw_crystal, volume_A3
from .stills_panels import LAYOUTS, layout_geometry, layout_pools

__all__ = ["DETECTORS", "GEOMETRY", "QUADRANTS", "SIDE_PX", "STILL_PRESETS", "StillConditions",
           "StillPreset", "draw_still", "label_B_A2", "modern_d_A"]

SIDE_PX = 512                       # of a pooled quadrant
QUADRANTS = "ABCD"                  # upper left, upper right, lower left, lower right
GEOMETRY = ("distance_mm", "pixel_mm", "wavelength_A", "pool")
_RUN, _EVENT = 21, 22               # purposes of random numbers


@dataclass(frozen=True)
class StillPreset:
    """What a data set varies.  ``misset`` is "uniform", "gaussian" or "gaussian_all".

    "gaussian" draws again below 0.3 degrees, where two lattices are one to the eye and to the
    label; "gaussian_all" keeps such shots, as the published set does.
    """

    misset: str
    multiple: float                 # share of shots with two or three lattices
    pools: tuple[int, ...] = (1, 2, 4)
    panels: bool = False            # of real geometries, tilted, with faults of their own


STILL_PRESETS = {
    "uniform": StillPreset("uniform", 0.5),
    "gaussian": StillPreset("gaussian", 0.5),
    "gaussian_all": StillPreset("gaussian_all", 0.5),
    "resolution": StillPreset("uniform", 0.1),
    "uniform_f1": StillPreset("uniform", 0.5, (1,)),
    "gaussian_f1": StillPreset("gaussian", 0.5, (1,)),
    "resolution_f1": StillPreset("uniform", 0.1, (1,)),
    "uniform_f12": StillPreset("uniform", 0.5, (1, 2)),
    "gaussian_f12": StillPreset("gaussian", 0.5, (1, 2)),
    "resolution_f12": StillPreset("uniform", 0.1, (1, 2)),
    # new ones come last: a preset's place in this table is part of its random numbers
    "uniform_panels": StillPreset("uniform", 0.5, (1, 2), panels=True),
    "gaussian_panels": StillPreset("gaussian", 0.5, (1, 2), panels=True),
    "resolution_panels": StillPreset("uniform", 0.1, (1, 2), panels=True),
}


@dataclass(frozen=True)
class StillDetector:
    """Pixel and mosaic of a detector; ``pools`` are the binnings it is looked at with."""

    pixel_size_m: float
    panel_px: tuple[int, int]       # slow, fast
    gap_px: tuple[int, int]
    pools: tuple[int, ...]


DETECTORS = {
    "pilatus": StillDetector(172e-6, (195, 487), (17, 7), (1, 2)),
    "rayonix_2x2": StillDetector(88.6e-6, (4096, 4096), (1, 1), (1, 2)),
    "rayonix_4x4": StillDetector(177.2e-6, (4096, 4096), (1, 1), (1,)),
    "jungfrau": StillDetector(75e-6, (512, 1024), (36, 10), (1, 2, 4)),
    "eiger": StillDetector(75e-6, (514, 1030), (37, 10), (2, 4)),
    "epix10k": StillDetector(100e-6, (176, 192), (8, 8), (1, 2)),
    "cspad": StillDetector(110e-6, (185, 388), (30, 30), (1, 2)),
}


@dataclass(frozen=True)
class StillConditions:
    """Everything that decides one still; two equal ones have the same pixels."""

    seed: int
    run: int
    event: int
    preset: str
    detector: str
    crystal: Crystal
    photon_energy_eV: float
    distance_m: float
    pixel_size_m: float
    pool: int
    quadrant: str
    d_A: float                      # the resolution label
    misset_deg: tuple[float, ...]   # of the second and third lattice against the first
    misset_sigma_deg: float         # of the law they were drawn from; 0 for the uniform one
    bandwidth: float                # dlambda / lambda, full width
    spot_photons: float             # mean low-angle reflection, summed over the lattices
    spot_sigma_px: float
    background_photons: float       # per 100 um pixel at 100 mm, top of the strongest part
    background_shares: tuple[float, float, float, float]    # water, air, lipid, plastic
    slope: tuple[float, float]      # relative change of background across 0.1 m, x and y
    ice: float                      # height of ice rings over the background; 0 = none
    ice_spots: int                  # grains that make the rings spotty
    salt_spots: int
    beam_stop_m: float
    shadow: float                   # transmission of a shadow's edge strip; 1 = none
    center_jitter_px: tuple[float, float]
    reach: float                    # share of the quadrant that the detector covers
    gain_noise: float               # relative, per pixel
    read_noise_photons: float
    hot_pixels: int
    dead_fraction: float
    stray_fraction: float           # salt-and-pepper pixels
    # of presets with panels; 0 and "" leave a still as it is without them
    layout: str = ""                # panels: see stills_panels
    layout_shift_m: tuple[float, float] = (0.0, 0.0)    # of the detector against the beam
    tilt_deg: tuple[float, float] = (0.0, 0.0)          # of the detector about x and y
    panel_gain: float = 0.0         # relative error, per panel
    common_mode_photons: float = 0.0                    # per panel and event
    streak_photons: float = 0.0     # of the jet's streak at the beam; 0 = none
    saturation_photons: float = 0.0                     # a pixel's largest value; 0 = no limit

    @property
    def wavelength_A(self) -> float:
        return HC_EV_A / self.photon_energy_eV

    @property
    def n_lattices(self) -> int:
        return 1 + len(self.misset_deg)

    @property
    def geometry_4(self) -> tuple[float, float, float, float]:
        """(distance in mm, detector pixel in mm, wavelength in angstrom, pooling f)."""
        return (1e3 * self.distance_m, 1e3 * self.pixel_size_m, self.wavelength_A,
                float(self.pool))

    def inverse_d_A(self, radius_m: np.ndarray) -> np.ndarray:
        """1/d = 2 sin(theta)/lambda at a distance from the beam on the detector plane."""
        return 2.0 * np.sin(0.5 * np.arctan2(radius_m, self.distance_m)) / self.wavelength_A

    @property
    def edge_d_A(self) -> float:
        """d at the edge of the quadrant (nearest point)."""
        half = SIDE_PX * self.pool * self.pixel_size_m
        return float(1.0 / self.inverse_d_A(np.array(half)))


def label_B_A2(d_A: Any) -> Any:
    """B of a crystal that diffracts to ``d_A``: 4 d^2 + 12 (Holton), the label's definition."""
    return 4.0 * d_A ** 2 + 12.0


def modern_d_A(d_A: np.ndarray) -> np.ndarray:
    """The same B read by the modern fit B = 15 d^2 - 33 d + 37; ``d_A`` where it has no root."""
    d = np.asarray(d_A, np.float64)
    square = 33.0 ** 2 - 60.0 * (37.0 - label_B_A2(d))
    return np.where(square >= 0, (33.0 + np.sqrt(np.maximum(square, 0))) / 30.0, d)


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def _spots_expected(crystal: Crystal, q_edge: float) -> float:
    """Reflections of one lattice on a quadrant, roughly."""
    share = {"A": 0.5, "C": 0.5, "I": 0.5, "F": 0.25, "R": 1 / 3}.get(crystal.centring, 1.0)
    width = np.hypot(0.45 / crystal.domain_A, 0.5 * np.deg2rad(crystal.mosaicity_deg) * q_edge)
    return float(np.pi / 4 * q_edge ** 2 * 5.0 * width * volume_A3(crystal.cell) * share)


def _missettings(rng: np.random.Generator, preset: StillPreset,
                 count: int) -> tuple[tuple[float, ...], float]:
    """(angles in degrees, sigma of their law or 0)."""
    if preset.misset == "uniform":
        return tuple(float(v) for v in rng.uniform(1, 180, count)), 0.0
    least = 0.3 if preset.misset == "gaussian" else 0.0
    while True:
        sigma = (0.1, 1.0, 10.0)[int(rng.integers(3))]
        angles = np.abs(rng.normal(0, sigma, count))
        if np.all(angles >= least):
            return tuple(float(v) for v in angles), sigma


def draw_still(seed: int, run: int, event: int, preset: str = "resolution",
               layout: str = "") -> StillConditions:
    """Conditions of event ``event`` of run ``run`` of the data set ``seed``.

    ``layout`` lays the panels of a geometry (see :mod:`.stills_panels`) under the still; presets
    with panels draw one of the package's when it is "".
    """
    if preset not in STILL_PRESETS:
        raise ConfigurationError(f"no still preset is called {preset!r}; known: "
                                 f"{', '.join(STILL_PRESETS)}")
    chosen = STILL_PRESETS[preset]
    code = list(STILL_PRESETS).index(preset)
    rng = np.random.default_rng([seed, run, code, _RUN])
    pool = chosen.pools[int(rng.choice(len(chosen.pools), p=_shares(len(chosen.pools))))]
    names = [name for name, one in DETECTORS.items() if pool in one.pools]
    detector = names[int(rng.integers(len(names)))]
    pixel = DETECTORS[detector].pixel_size_m
    panels: dict[str, Any] = {}
    if chosen.panels or layout:
        layout, pool, panels = _draw_panels(
            np.random.default_rng([seed, run, code, _RUN, 2]), layout, chosen.pools)
        detector, pixel = layout, layout_geometry(layout).pixel_size_m
    half = SIDE_PX * pool * pixel
    reach = 1.0 if rng.random() < 0.6 else float(rng.uniform(0.75, 1.0))
    gain_noise, read_noise = float(rng.uniform(0.0, 0.03)), float(rng.uniform(0.0, 0.15))
    beam_stop = 0.0 if rng.random() < 0.4 else float(rng.uniform(0.5e-3, 6e-3))
    dead = _log_uniform(rng, 1e-5, 1e-3)
    rng = np.random.default_rng([seed, run, code, event, _EVENT])
    while True:             # geometries that see less than 3.3 A teach nothing
        energy, distance = float(rng.uniform(9000, 13000)), float(rng.uniform(0.06, 0.3))
        q_edge = 2 * np.sin(0.5 * np.arctan(reach * half / distance)) * energy / HC_EV_A
        if q_edge > 1 / 3.3 or half < 0.1 and distance < 0.1:
            break
    crystals = np.random.default_rng([seed, run, code, _RUN, 1])
    while True:
        crystal = draw_crystal(crystals, (38.0, 130.0))
        if 25 < _spots_expected(crystal, 0.4) < 1200:
            break
    d = 0.5 / float(rng.uniform(0.15, 0.35))
    if rng.random() < 0.5 or d < 0.85 / q_edge:
        d = float(rng.uniform(max(1.4, 1.0 / q_edge), 6.0))
    lattices = 1 if rng.random() >= chosen.multiple else int(rng.integers(2, 4))
    angles, sigma = _missettings(rng, chosen, lattices - 1)
    shares = rng.dirichlet((1.2, 0.8, 0.5, 0.4))
    shares = shares / shares.max()
    if panels:
        jet = np.random.default_rng([seed, run, code, event, _EVENT, 2])
        panels["streak_photons"] = _log_uniform(jet, 1, 100) if jet.random() < 0.15 else 0.0
        reach = 1.0
    return StillConditions(
        seed=seed, run=run, event=event, preset=preset, detector=detector, crystal=crystal,
        photon_energy_eV=energy, distance_m=distance, pixel_size_m=pixel, pool=pool,
        quadrant=QUADRANTS[int(rng.integers(4))], d_A=d, misset_deg=angles,
        misset_sigma_deg=sigma, bandwidth=_log_uniform(rng, 2e-4, 3e-3),
        spot_photons=_log_uniform(rng, 300, 20_000), spot_sigma_px=float(rng.uniform(0.6, 1.1)),
        background_photons=_log_uniform(rng, 0.05, 20),
        background_shares=(float(shares[0]), float(shares[1]), float(shares[2]),
                           float(shares[3])),
        slope=(float(rng.normal(0, 0.3)), float(rng.normal(0, 0.3))),
        ice=_log_uniform(rng, 0.1, 3) if rng.random() < 0.12 else 0.0,
        ice_spots=int(rng.integers(0, 200)),
        salt_spots=int(rng.integers(1, 12)) if rng.random() < 0.08 else 0,
        beam_stop_m=beam_stop,
        shadow=float(rng.choice([0.0, rng.uniform(0.0, 0.5)])) if rng.random() < 0.15 else 1.0,
        center_jitter_px=(float(rng.normal(0, 0.7)), float(rng.normal(0, 0.7))), reach=reach,
        gain_noise=gain_noise, read_noise_photons=read_noise, hot_pixels=int(rng.integers(0, 6)),
        dead_fraction=dead, stray_fraction=_log_uniform(rng, 1e-6, 1e-4), **panels)


def _draw_panels(rng: np.random.Generator, layout: str,
                 pools: tuple[int, ...]) -> tuple[str, int, dict[str, Any]]:
    """(layout, pooling, what the run's panels add to its conditions)."""
    layout = layout or LAYOUTS[int(rng.integers(len(LAYOUTS)))]
    fitting = [pool for pool in layout_pools(layout) if pool in pools] or list(
        layout_pools(layout)[:1])
    pool = fitting[int(rng.integers(len(fitting)))]
    return layout, pool, {
        "layout": layout,
        "layout_shift_m": (float(rng.uniform(-3e-3, 3e-3)), float(rng.uniform(-3e-3, 3e-3))),
        "tilt_deg": (float(rng.uniform(-3, 3)), float(rng.uniform(-3, 3))),
        "panel_gain": float(rng.uniform(0, 0.04)),
        "common_mode_photons": float(rng.uniform(0, 0.1)),
        "saturation_photons": _log_uniform(rng, 2e3, 5e4)}


def _shares(count: int) -> list[float]:
    """Smaller poolings are drawn more often: they are cheaper and as good a lesson."""
    return {1: [1.0], 2: [0.6, 0.4], 3: [0.5, 0.4, 0.1]}[count]
