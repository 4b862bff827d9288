"""Conditions of one single-particle image: which particle, how many, how bright, on what detector.

Presets follow methods sections 1a, 7.1 and 7.2.  ``paper`` has no nuisance at all; every other
condition is a switch of :class:`SpiPreset`, and a preset's name may change switches:
``"paper:fluence_sigma=0.3,gap_px=16"`` or ``"realistic:half_chance=0"``; a range is ``"a..b"``.

Random numbers depend on (seed, run, event) alone.  A *run* shares its detector: gap, faults, beam
stop, noise and background level; its events differ in everything else.  In blocks of 7 events per
particle, every particle comes with its share of counts exactly.
"""
from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core import ConfigurationError
from .bragg import HC_EV_A
from .spi_particles import SPI_PARTICLES, SPI_UNSEEN, STAND_INS, packaged_particle

__all__ = ["SPI_BODIES", "SPI_PARTICLES", "SPI_PRESETS", "SPI_UNSEEN", "SpiConditions", "SpiPreset",
           "draw_spi", "spi_preset"]

PAPER_FLUENCE = 1e15 / (np.pi / 4)
"""Photons per square micrometre: 10^12 per pulse, times 1000, in a disc of 1 um (methods 1a)."""

SPI_BODIES = ("icosahedron", "truncated_icosahedron", "torus", "sphere", "dodecahedron", "capsule")
_RUN, _EVENT, _ORDER = 41, 42, 43       # purposes of random numbers

Range = tuple[float, float]


@dataclass(frozen=True)
class SpiPreset:
    """What a data set varies; all nuisances are off by default.  A range is drawn uniformly."""

    particles: tuple[str, ...] = SPI_PARTICLES
    counts: tuple[int, ...] = (4, 1, 1, 1)      # shares of 1, 2, 3, 4 copies
    bodies: bool = False                # shapes of methods 7.2 instead of structures
    positive: float = 0.5               # bodies: share of good images
    diameter_A: Range = (0.0, 0.0)      # bodies
    # the beam and the detector
    photon_energy_eV: Range = (4600.0, 4600.0)
    distance_m: Range = (0.2905, 0.2905)
    pixel_size_m: float = 75e-6
    block: int = 8                      # detector pixels along a pixel of the image
    shape: tuple[int, int] = (128, 128)
    first_px: tuple[float, float] | None = None     # (row, column) of the window's outer corner
    #                                     from the beam, detector pixels; None: centred
    fluence: Range = (1.0, 1.0)         # times the paper's, log-uniform
    fluence_sigma: float = 0.0          # of its logarithm
    focus: bool = False                 # position in a Gaussian focus, out to 1/100 of its peak
    center_jitter_px: float = 0.0       # sigma, detector pixels
    # the sample
    separation: Range = (1.0, 1.0)      # of neighbours, in units of touching (1.5 = 3 radii)
    coherence_A: float = np.inf         # copies further apart add up incoherently; 0: all do
    incoherent_chance: float = 0.0      # of an image whose copies all add up incoherently
    mixed_chance: float = 0.0           # of a multiple hit whose other copies are other particles
    hydration_A: float = 0.0            # thickness of a water layer, in half of the images
    center: bool = True                 # False: turn about the origin of the file, as published
    finer: int = 1                      # points of the transforms against the paper's 151
    # background, photons per detector pixel, log-uniform from 1/100 of it; 0: none
    background: float = 0.0
    background_radial: float = 0.0
    background_slope: float = 0.0       # sigma of the relative change across the window
    fluctuation_sigma: float = 0.0      # of a Gaussian random field that multiplies the image
    fluctuation_px: Range = (20.0, 60.0)    # its correlation length, image pixels
    contrast: Range = (1.0, 1.0)        # of the fringes
    # the detector
    gap_px: Range = (0.0, 0.0)          # between the halves
    half_chance: float = 0.0            # of a run with a dead half
    stop_px: Range = (0.0, 0.0)         # radius of a centre mask
    hot_fraction: float = 0.0
    dead_fraction: float = 0.0
    gain_noise: float = 0.0             # relative, per pixel
    read_noise_photons: Range = (0.0, 0.0)      # per detector pixel
    common_mode_photons: float = 0.0    # sigma per line of a bank
    saturation_photons: float = np.inf  # per detector pixel
    poisson: bool = True

    @property
    def block_events(self) -> int:
        """Events after which every particle had its exact share of counts."""
        return sum(self.counts) * len(self.particles)


_NUISANCE: dict[str, Any] = dict(
    fluence_sigma=0.5, center_jitter_px=2.0, separation=(1.0, 1.5), incoherent_chance=0.05,
    hydration_A=6.0, background=0.5, background_radial=1.0, background_slope=0.3,
    gap_px=(10.0, 20.0), half_chance=0.05, stop_px=(0.0, 24.0), hot_fraction=2e-5,
    dead_fraction=1e-3, gain_noise=0.02, read_noise_photons=(0.05, 0.5), common_mode_photons=0.03,
    saturation_photons=12_000.0)
_QUALITY: dict[str, Any] = dict(
    particles=("icosahedron",), bodies=True, diameter_A=(400.0, 900.0),
    photon_energy_eV=(1600.0, 1800.0), distance_m=(0.30, 0.30), block=4, fluence=(1e-4, 1e-3))
_EXPERIMENT: dict[str, Any] = dict(
    positive=0.06, diameter_A=(550.0, 840.0), fluence_sigma=0.7, center_jitter_px=2.0,
    fluctuation_sigma=0.3, contrast=(0.4, 0.9), background=0.3, background_radial=1.0,
    background_slope=0.3, gap_px=(10.0, 20.0), half_chance=1.0, stop_px=(4.0, 16.0),
    hot_fraction=2e-5, dead_fraction=1e-3, gain_noise=0.03, read_noise_photons=(0.02, 0.15),
    common_mode_photons=0.02, saturation_photons=3000.0)
_VARIED: dict[str, Any] = dict(        # wider than any experiment, half of the images good
    photon_energy_eV=(1500.0, 1900.0), distance_m=(0.22, 0.40), fluence=(3e-5, 3e-3),
    center_jitter_px=3.0, fluctuation_sigma=0.15, fluctuation_px=(12.0, 90.0), contrast=(0.3, 1.0),
    background=0.6, background_radial=2.0, background_slope=0.5, gap_px=(0.0, 30.0),
    half_chance=0.4, stop_px=(0.0, 24.0), hot_fraction=4e-5, dead_fraction=2e-3, gain_noise=0.02,
    read_noise_photons=(0.0, 0.3), common_mode_photons=0.03, saturation_photons=6000.0)
_PR772: dict[str, Any] = {
    **_QUALITY, **_EXPERIMENT, "diameter_A": (600.0, 750.0), "photon_energy_eV": (1690.0, 1710.0),
    "distance_m": (0.130, 0.130), "block": 1, "shape": (123, 240), "first_px": (-133.0, -120.0),
    "positive": 0.055, "half_chance": 0.0, "gap_px": (20.0, 20.0), "stop_px": (10.0, 20.0),
    "fluctuation_px": (40.0, 120.0)}

SPI_PRESETS: dict[str, SpiPreset] = {
    "paper": SpiPreset(),
    "paper_small": SpiPreset(),
    "jitter": SpiPreset(fluence_sigma=0.5),
    "realistic": SpiPreset(**_NUISANCE),
    "faint": SpiPreset(fluence=(0.1, 0.1)),
    "faint_100": SpiPreset(fluence=(0.01, 0.01)),
    "faint_1000": SpiPreset(fluence=(0.001, 0.001)),
    "distance": SpiPreset(distance_m=(0.24, 0.40)),
}
SPI_PRESETS |= {f"{name}_unseen": dataclasses.replace(preset, particles=SPI_UNSEEN)
                for name, preset in SPI_PRESETS.items()}
SPI_PRESETS |= {
    "quality": SpiPreset(**_QUALITY),
    "quality_varied": SpiPreset(**{**_QUALITY, **_VARIED}),
    "quality_soccer": SpiPreset(**{**_QUALITY, "particles": ("truncated_icosahedron",)}),
    "quality_torus": SpiPreset(**{**_QUALITY, "particles": ("torus",)}),
    "quality_shapes": SpiPreset(**{**_QUALITY, "particles": SPI_BODIES}),
    "quality_experiment": SpiPreset(**{**_QUALITY, **_EXPERIMENT}),
    "pr772": SpiPreset(**_PR772),
}
"""name -> preset; see methods 1a and 7.1 for the first group, 7.2 for the bodies."""


@dataclass(frozen=True)
class SpiConditions:
    """Everything that decides one image; two equal ones have the same pixels.

    ``kind`` is "particles" for structures; "good", "bad" (several), "contaminant" or "blank" for
    bodies.  ``count`` is 1 to 4 (bodies: to 5; blank: 0).  ``particle_index`` is the class, -1 for
    a particle outside of the eleven.  ``stand_in`` is what the package has for the particle;
    ``diameter_A`` is twice the largest distance of that from its centre (of a body: as drawn).
    ``fluence`` is relative to the paper's and contains all that varies it.
    """

    seed: int
    run: int
    event: int
    preset: str
    kind: str
    particle: str
    particle_index: int
    stand_in: str
    count: int
    diameter_A: float
    photon_energy_eV: float
    distance_m: float
    pixel_size_m: float
    block: int
    shape: tuple[int, int]
    first_px: tuple[float, float]       # outer corner of the window from the beam, (row, column)
    fluence: float
    center_jitter_px: tuple[float, float]
    separation: float
    coherence_A: float
    mixed: bool
    hydration_A: float
    center: bool
    finer: int
    background: float
    background_radial: float
    background_slope: tuple[float, float]
    fluctuation_sigma: float
    fluctuation_px: float
    contrast: float
    gap_px: float
    half: str                           # "", "left", "right", "top" or "bottom": dead
    stop_px: float
    hot_fraction: float
    dead_fraction: float
    gain_noise: float
    read_noise_photons: float
    common_mode_photons: float
    saturation_photons: float
    poisson: bool

    @property
    def wavelength_A(self) -> float:
        return HC_EV_A / self.photon_energy_eV

    @property
    def photons_um2(self) -> float:
        """Photons per square micrometre on the particle."""
        return PAPER_FLUENCE * self.fluence

    @property
    def code(self) -> list[int]:
        """What random numbers of the event are seeded with, before their purpose."""
        return [self.seed, self.run, self.event, *self.preset.encode()]


@functools.lru_cache(maxsize=64)
def spi_preset(text: str) -> SpiPreset:
    """The preset of a name, with the switches that follow a colon.

    Raises :class:`ConfigurationError` for an unknown name, switch or value.
    """
    name, _, changes = text.partition(":")
    if name not in SPI_PRESETS:
        raise ConfigurationError(f"no preset of single particles is called {name!r}; known: "
                                 f"{', '.join(SPI_PRESETS)}")
    preset = SPI_PRESETS[name]
    values = {}
    for change in filter(None, changes.split(",")):
        key, equals, value = change.partition("=")
        key = key.strip()
        if not equals or not hasattr(preset, key) or key == "block_events":
            known = ", ".join(field.name for field in dataclasses.fields(preset))
            raise ConfigurationError(f"the switch {change!r} of preset {text!r} is not known; give "
                                     f"name=value with one of {known}")
        try:
            values[key] = _value(getattr(preset, key), value)
        except ValueError as error:
            raise ConfigurationError(f"the value of {change!r} in preset {text!r} cannot be read; "
                                     "give a number, or a range as 'low..high'") from error
    return dataclasses.replace(preset, **values)


def _value(old: Any, text: str) -> Any:
    """``text`` as the kind of value that ``old`` is."""
    if isinstance(old, bool):
        word = text.strip().lower()
        if word not in ("true", "false", "1", "0"):
            raise ValueError(word)
        return word in ("true", "1")
    if isinstance(old, int):
        return int(text)
    if isinstance(old, float):
        return float(text)
    if isinstance(old, tuple) and old and isinstance(old[0], str):
        return tuple(one.strip() for one in text.split("+"))
    if isinstance(old, tuple) and all(isinstance(one, int) for one in old):
        return tuple(int(one) for one in text.split("+"))
    low, dots, high = text.partition("..")
    return float(low), float(high if dots else low)


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high)))) if low < high else float(low)


def draw_spi(seed: int, run: int, event: int, preset: str = "paper") -> SpiConditions:
    """Conditions of event ``event`` of run ``run`` of the data set ``seed``."""
    chosen = spi_preset(preset)
    code = list(preset.encode())
    rng = np.random.default_rng([seed, run, _RUN, *code])
    shape, block = chosen.shape, chosen.block
    shared: dict[str, Any] = dict(
        seed=seed, run=run, event=event, preset=preset, pixel_size_m=chosen.pixel_size_m,
        block=block, shape=shape, coherence_A=chosen.coherence_A, center=chosen.center,
        finer=chosen.finer,
        first_px=chosen.first_px or (-shape[0] * block / 2, -shape[1] * block / 2),
        fluctuation_sigma=chosen.fluctuation_sigma, hot_fraction=chosen.hot_fraction,
        dead_fraction=chosen.dead_fraction, gain_noise=chosen.gain_noise,
        common_mode_photons=chosen.common_mode_photons, poisson=chosen.poisson,
        saturation_photons=chosen.saturation_photons,
        distance_m=float(rng.uniform(*chosen.distance_m)),
        photon_energy_eV=float(rng.uniform(*chosen.photon_energy_eV)),
        gap_px=float(round(rng.uniform(*chosen.gap_px))),
        stop_px=float(rng.uniform(*chosen.stop_px)),
        read_noise_photons=float(rng.uniform(*chosen.read_noise_photons)),
        half=("", "left", "right", "top", "bottom")[
            int(rng.integers(1, 5)) * bool(rng.random() < chosen.half_chance)])
    level, radial = (_log_uniform(rng, 0.01, 1.0) * v for v in (
        chosen.background, chosen.background_radial))
    slope = chosen.background_slope * rng.standard_normal(2)
    rng = np.random.default_rng([seed, run, event, _EVENT, *code])
    if chosen.distance_m[0] < chosen.distance_m[1]:     # a label: it differs within a run
        shared["distance_m"] = float(rng.uniform(*chosen.distance_m))
    fluence = _log_uniform(rng, *chosen.fluence)
    fluence *= float(np.exp(chosen.fluence_sigma * rng.standard_normal()))
    if chosen.focus:            # r^2 is uniform, so is the logarithm of exp(-r^2)
        fluence *= float(10 ** (-2 * rng.random()))
    shared.update(
        fluence=fluence,
        center_jitter_px=tuple(float(v) for v in chosen.center_jitter_px * rng.standard_normal(2)),
        background=level * float(rng.uniform(0.7, 1.3)),
        background_radial=radial * float(rng.uniform(0.7, 1.3)),
        background_slope=(float(slope[0]), float(slope[1])),
        fluctuation_px=float(rng.uniform(*chosen.fluctuation_px)),
        contrast=float(rng.uniform(*chosen.contrast)), separation=float(rng.uniform(
            *chosen.separation)),
        hydration_A=chosen.hydration_A if rng.random() < 0.5 else 0.0)
    if rng.random() < chosen.incoherent_chance:
        shared["coherence_A"] = 0.0
    mixed = bool(rng.random() < chosen.mixed_chance)
    return _body(rng, chosen, shared) if chosen.bodies else _structure(chosen, shared, mixed)


def _structure(chosen: SpiPreset, shared: dict[str, Any], mixed: bool) -> SpiConditions:
    """Which particle and how many: each block of events holds every particle in its shares."""
    size = chosen.block_events
    block, place = divmod(shared["event"], size)
    order = _order(shared["seed"], shared["run"], block, shared["preset"], size)
    number, slot = divmod(int(order[place]), sum(chosen.counts))
    count = 1 + int(np.searchsorted(np.cumsum(chosen.counts), slot, side="right"))
    name = chosen.particles[number]
    return SpiConditions(
        **shared, kind="particles", particle=name, stand_in=STAND_INS.get(name, name),
        particle_index=SPI_PARTICLES.index(name) if name in SPI_PARTICLES else -1, count=count,
        diameter_A=2 * _radius_A(STAND_INS.get(name, name)), mixed=mixed and count > 1)


@functools.lru_cache(maxsize=256)
def _order(seed: int, run: int, block: int, preset: str, size: int) -> np.ndarray:
    rng = np.random.default_rng([seed, run, block, _ORDER, *preset.encode()])
    return rng.permutation(size)


@functools.lru_cache(maxsize=64)
def _radius_A(source: str) -> float:
    return packaged_particle(source).radius_A


def _body(rng: np.random.Generator, chosen: SpiPreset, shared: dict[str, Any]) -> SpiConditions:
    """Good, or one of the ways in which an image of bodies is bad (methods 7.2)."""
    shape = chosen.particles[int(rng.integers(len(chosen.particles)))]
    kind, count = "good", 1
    if rng.random() >= chosen.positive:
        kind = ("bad", "contaminant", "blank")[int(rng.choice(3, p=(0.6, 0.3, 0.1)))]
        count = {"bad": 2 + int(rng.choice(4, p=(0.5, 0.25, 0.15, 0.1))), "contaminant": 1,
                 "blank": 0}[kind]
    diameter = float(rng.uniform(*chosen.diameter_A))
    return SpiConditions(**shared, kind=kind, particle=shape, particle_index=-1, stand_in=shape,
                         count=count, diameter_A=diameter, mixed=False)
