"""Conditions of a run: one draw of beam, sample, background and detector faults.

A run keeps its conditions for all events, as at the beamline; events differ in orientation,
crystal size, pulse energy and noise.  ``training`` draws the condition the hit network is trained
for; ``shifted`` draws flux, concentration and background outside of it, as the published runs
98-100 did (methods section 4c).  ``training_stray`` and ``shifted_stray`` are the same runs with
stray spots on hits and misses alike, ``training_full`` and ``shifted_full`` with all that section
7.3 lists: those, tilt, shadows, salt, spotty ice, lipid and plastic, saturation.  A preset's name
may end in changed values, as in ``"training:hit_fraction=0.1,ice_chance=1"``.
"""
from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from ..core import ConfigurationError
from .bragg import HC_EV_A
from .crystal import Crystal, draw_crystal, volume_A3

__all__ = ["PAPER_RUNS", "PRESETS", "Conditions", "PaperRun", "draw_conditions"]

PRESETS = ("training", "shifted", "demo", "training_stray", "shifted_stray", "training_full",
           "shifted_full")
"""What stands before "_" is drawn alike, whatever follows: the same crystals, beams and faults."""

_BASES = ("training", "shifted", "demo")    # a place in this table is part of random numbers


@dataclass(frozen=True)
class Conditions:
    """Everything that the events of a run share; see the field comments for units."""

    seed: int
    run: int
    preset: str
    photon_energy_eV: float
    distance_m: float
    pixel_size_m: float
    crystal: Crystal
    bandwidth: float                # dlambda / lambda, full width (SASE about 2e-3)
    hit_fraction: float
    spot_photons: tuple[float, float]   # mean low-angle spot: weakest and strongest crystal
    extra_B_A2: float               # of the resolution label, 4 d^2 + 12 - 10
    spot_sigma_px: float
    air_photons: float              # expected photons per pixel at the beam, at mean pulse energy
    ring_photons: float             # ... at the top of the solvent ring
    ring_s_A: float                 # solvent ring: 1/d of its top and its width, 1/A
    ring_width_A: float
    slope: tuple[float, float]      # relative change of background across 0.1 m, x and y
    pulse_spread: float             # relative standard deviation of the pulse energy
    center_jitter_px: float         # of the beam, per event
    gain_spread: float              # relative, per panel
    gain_noise: float               # relative, per pixel
    read_noise_photons: float
    common_mode_photons: float      # per panel and event
    hot_fraction: float
    dead_fraction: float
    salt_fraction: float            # stray bright pixels per event
    chance_spot: float              # chance of a stray spot in an event, hit or miss
    streak_chance: float            # of a jet streak through the beam
    ice_chance: float               # of an ice ring
    beam_stop_px: float
    panel_px: tuple[int, int]       # of the mosaic that a crop is cut from: slow, fast
    gap_px: tuple[int, int]
    # what only later presets have; 0 leaves an event as it is without
    stray_spots: int = 0            # most bright spots of no crystal in an event, hit or miss
    stray_chance: float = 0.0       # of an event that has any
    stray_photons: tuple[float, float] = (30.0, 1e4)    # faintest and brightest, log-uniform
    tilt_deg: tuple[float, float] = (0.0, 0.0)          # of the detector about x and y
    shadow: float = 1.0             # transmission of a nozzle's shadow; 1 = none
    lipid_photons: float = 0.0      # expected at the top of each, as ring_photons
    plastic_photons: float = 0.0
    smooth_photons: float = 0.0     # most of each of three smooth terms that no formula knows
    ice_spots: int = 0              # most grains where there is an ice ring
    salt_chance: float = 0.0        # of an event with grains of salt
    salt_spots: int = 8             # most of them
    saturation_photons: float = 0.0     # a pixel's largest value in a crop; 0 = no limit

    @property
    def wavelength_A(self) -> float:
        return HC_EV_A / self.photon_energy_eV

    def inverse_d_A(self, radius_m: np.ndarray) -> np.ndarray:
        """1/d = 2 sin(theta)/lambda at a distance from the beam on the detector plane."""
        return 2.0 * np.sin(0.5 * np.arctan2(radius_m, self.distance_m)) / self.wavelength_A


@dataclass(frozen=True)
class PaperRun:
    """A run of the paper's table (methods section 4c): events, share of hits, condition."""

    run: int
    events: int
    hit_fraction: float
    preset: str


PAPER_RUNS = (
    PaperRun(90, 11429, 0.3366, "training"), PaperRun(91, 4755, 0.3171, "training"),
    PaperRun(92, 14244, 0.0791, "training"), PaperRun(93, 5820, 0.2864, "training"),
    PaperRun(94, 13820, 0.3727, "training"), PaperRun(95, 12647, 0.1468, "training"),
    PaperRun(96, 12157, 0.3822, "training"), PaperRun(98, 14208, 0.0934, "shifted"),
    PaperRun(99, 11081, 0.8471, "shifted"), PaperRun(100, 10730, 0.4781, "shifted"),
)


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def _lattice_in_window(crystal: Crystal, q_max: float, domain_A: float) -> float:
    """Reflections expected on the Ewald sphere within ``q_max`` (1/A) of the beam."""
    share = {"A": 0.5, "C": 0.5, "I": 0.5, "F": 0.25, "R": 1 / 3}.get(crystal.centring, 1.0)
    return float(np.pi * q_max ** 2 * 3.5 / domain_A * volume_A3(crystal.cell) * share)


def draw_conditions(seed: int, run: int, preset: str = "training", *,
                    hit_fraction: float | None = None) -> Conditions:
    """The conditions of run ``run`` of the data set ``seed``.

    The crystal form is redrawn until its lattice puts spots into the central 350 pixels: the
    published network looks nowhere else.  Raises :class:`ConfigurationError` for an unknown
    preset, and for changes after its name that no run can have.
    """
    name, _, changes = preset.partition(":")
    if name not in PRESETS:
        raise ConfigurationError(f"no preset is called {name!r}; known: {', '.join(PRESETS)}")
    base, _, variant = name.partition("_")
    drawn = _draw(seed, run, base, hit_fraction)
    if variant:
        rng = np.random.default_rng([seed, run, _BASES.index(base), 51])
        drawn = dataclasses.replace(drawn, stray_spots=8, stray_chance=float(rng.uniform(0.4, 1)),
                                    stray_photons=(30.0, 3 * drawn.spot_photons[1]))
    if variant == "full":
        drawn = _with_everything(drawn, np.random.default_rng(
            [seed, run, _BASES.index(base), 52]))
    drawn = dataclasses.replace(drawn, preset=preset)
    return _changed(drawn, changes) if changes else drawn


def _with_everything(c: Conditions, rng: np.random.Generator) -> Conditions:
    """Nuisances of section 7.3 that the first presets leave out."""
    def sometimes(chance: float, low: float, high: float) -> float:
        return float(rng.uniform(low, high)) if rng.random() < chance else 0.0

    return dataclasses.replace(
        c, tilt_deg=(float(rng.uniform(-3, 3)), float(rng.uniform(-3, 3))),
        shadow=float(rng.choice([0.0, rng.uniform(0, 0.5)])) if rng.random() < 0.15 else 1.0,
        lipid_photons=c.ring_photons * sometimes(0.3, 0, 1.5),
        plastic_photons=c.ring_photons * sometimes(0.3, 0, 1.5),
        smooth_photons=c.ring_photons * sometimes(0.7, 0, 0.6), ice_spots=int(rng.integers(200)),
        salt_chance=sometimes(0.4, 0, 0.3), salt_fraction=_log_uniform(rng, 1e-6, 3e-4),
        saturation_photons=_log_uniform(rng, 2e3, 5e4))


def _changed(conditions: Conditions, changes: str) -> Conditions:
    """Conditions with the numbers that "name=value,name=value" gives."""
    numbers = {field.name: type(getattr(conditions, field.name))
               for field in dataclasses.fields(conditions)
               if isinstance(getattr(conditions, field.name), int | float)
               and field.name not in ("seed", "run")}
    values = {}
    for change in changes.split(","):
        name, equals, text = (part.strip() for part in change.partition("="))
        if not equals or name not in numbers:
            raise ConfigurationError(f"the change {change!r} of preset {conditions.preset!r} is "
                                     f"not known; give name=number with one of "
                                     f"{', '.join(numbers)}")
        try:
            values[name] = numbers[name](text)
        except ValueError as error:
            raise ConfigurationError(f"{name} of preset {conditions.preset!r} was to be {text!r}; "
                                     "that is no number; give one") from error
    return dataclasses.replace(conditions, **values)


def _draw(seed: int, run: int, preset: str, hit_fraction: float | None) -> Conditions:
    rng = np.random.default_rng([seed, run, _BASES.index(preset)])
    shifted = preset == "shifted"
    demo = preset == "demo"
    energy = 9500.0 if demo else rng.uniform(7000, 11500)
    pixel = 75e-6 if demo or rng.random() < 0.5 else 110e-6
    distance = 0.10 if demo else rng.uniform(0.08, 0.16)
    edge = 2 * np.sin(0.5 * np.arctan(150 * pixel / distance)) * energy / HC_EV_A
    while True:
        crystal = draw_crystal(rng, (50.0, 90.0) if demo else (50.0, 160.0))
        if 9 < _lattice_in_window(crystal, edge, crystal.domain_A) < 400:
            break
    ring = _log_uniform(rng, 0.03, 6.0) * (_log_uniform(rng, 3, 10) if shifted else 1.0)
    label_d_A = 0.5 / rng.uniform(0.15, 0.35)
    strength = _log_uniform(rng, 0.7, 1.5) * (_log_uniform(rng, 0.2, 3) if shifted else 1.0)
    shape = ((185, 194), (512, 1024), (256, 256), (352, 384))[int(rng.integers(4))]
    return Conditions(
        seed=seed, run=run, preset=preset, photon_energy_eV=energy, distance_m=distance,
        pixel_size_m=pixel, crystal=crystal, bandwidth=_log_uniform(rng, 5e-4, 3e-3),
        hit_fraction=hit_fraction if hit_fraction is not None else float(
            rng.uniform(0.5, 0.85) if shifted else rng.uniform(0.15, 0.5)),
        spot_photons=(25.0 * strength, 4000.0 * strength),
        extra_B_A2=4 * label_d_A ** 2 + 2, spot_sigma_px=rng.uniform(0.7, 1.2),
        air_photons=ring * _log_uniform(rng, 0.3, 4.0), ring_photons=ring,
        ring_s_A=rng.uniform(0.29, 0.32), ring_width_A=rng.uniform(0.03, 0.05),
        slope=(rng.normal(0, 0.3), rng.normal(0, 0.3)),
        pulse_spread=rng.uniform(0.05, 0.3), center_jitter_px=rng.uniform(0, 3),
        gain_spread=rng.uniform(0, 0.04), gain_noise=rng.uniform(0.01, 0.03),
        read_noise_photons=rng.uniform(0.02, 0.15), common_mode_photons=rng.uniform(0, 0.05),
        hot_fraction=_log_uniform(rng, 1e-6, 3e-5), dead_fraction=_log_uniform(rng, 1e-5, 1e-3),
        salt_fraction=_log_uniform(rng, 1e-6, 1e-4 if shifted else 1e-5),
        chance_spot=rng.uniform(0, 0.4), streak_chance=0.5 if shifted else rng.uniform(0, 0.15),
        ice_chance=0.3 if shifted else rng.uniform(0, 0.05),
        beam_stop_px=0.0 if rng.random() < 0.4 else rng.uniform(5, 30),
        panel_px=shape, gap_px=(int(rng.integers(2, 35)), int(rng.integers(2, 35))))
