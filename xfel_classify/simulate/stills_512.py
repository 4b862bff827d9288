"""Labelled stills by quadrant, for the lattice and resolution networks (methods 5a and 7.3).

A quadrant is an assembled image of (512 f)^2 detector pixels with the beam at one corner; pooling,
rotation and the square root belong to the window that the networks share with inference, so they
are not done here.  A whole image is its four quadrants, pixel for pixel.

Random numbers depend on (seed, run, event, quadrant) alone.

Axes: S slow (row 0 on top), F fast (towards +x), N spot.
"""
from __future__ import annotations

import functools
from collections.abc import Generator
from dataclasses import dataclass, field

import numpy as np

from . import stills_panels
from .bragg import Spots, paint, predict
from .crystal import random_rotation, rotation_about
from .ewald import excited
from .stills_conditions import (
    DETECTORS,
    QUADRANTS,
    SIDE_PX,
    StillConditions,
    draw_still,
    label_B_A2,
)

__all__ = ["Still", "draw_still", "expected_quadrant", "simulate_image", "simulate_quadrant"]

VISIBLE_SNR = 5.0
SPOT_PIXELS = 9.0           # under a spot, for its signal to noise
LEAST_VISIBLE = 6           # spots of each lattice on the asked quadrant
ICE_D_A = (3.90, 3.67, 3.44, 2.67, 2.25, 2.07, 1.95, 1.92, 1.88, 1.72)
SALT_D_A = (3.256, 2.820, 1.994, 1.628, 1.410, 1.261)       # NaCl
NEAR_PX = 12                # beyond the edge, where a spot still reaches in
PATCHES = ((0.0, 1.3, 4), (1.3, 2.2, 6), (2.2, 99.0, 12))
"""(least and largest sigma of a spot, half a side of the patch it is painted on), pixels."""
LEAST_PHOTONS = 0.3         # of a spot that is worth painting
SIGNS = {"A": (-1, 1), "B": (1, 1), "C": (-1, -1), "D": (1, -1)}      # of x and y
_CRYSTAL, _DETECTOR, _PIXELS = 31, 32, 33       # purposes of random numbers
Shots = Generator[tuple[list[np.ndarray], float], int, tuple[list[np.ndarray], float]]


@dataclass(frozen=True)
class Still:
    """One simulated image with its labels.

    ``photons_SF`` is float32, 0 where ``good_SF`` is False; ``beam_center_px`` is (fast, slow)
    from the outer corner of the first pixel.  ``n_visible`` counts spots with S/N >= 5.
    """

    conditions: StillConditions
    photons_SF: np.ndarray = field(repr=False)
    good_SF: np.ndarray = field(repr=False)
    beam_center_px: tuple[float, float]
    n_visible: int


def simulate_quadrant(conditions: StillConditions, quadrant: str = "") -> Still:
    """A quadrant (default: the one that the conditions name) at detector resolution."""
    quadrant = quadrant or conditions.quadrant
    lattices, scale = lattices_of(conditions)
    photons, good, seen = _quadrant(conditions, quadrant, lattices, scale)
    side = SIDE_PX * conditions.pool
    beam = (side if quadrant in "AC" else 0, side if quadrant in "AB" else 0)
    return Still(conditions, photons, good, beam, seen)


def simulate_image(conditions: StillConditions) -> Still:
    """The whole image, (1024 f)^2 pixels with the beam in the middle: four quadrants."""
    lattices, scale = lattices_of(conditions)
    parts = {q: _quadrant(conditions, q, lattices, scale) for q in QUADRANTS}
    photons, good = (np.block([[parts["A"][i], parts["B"][i]], [parts["C"][i], parts["D"][i]]])
                     for i in (0, 1))
    side = SIDE_PX * conditions.pool
    return Still(conditions, photons, good, (side, side), sum(part[2] for part in parts.values()))


# --- the crystal ----------------------------------------------------------------------------------

def search(c: StillConditions) -> Shots:
    """Look for a shot that shows each lattice on the quadrant that was asked for.

    A generator: it yields (orientations, photons of a mean low-angle reflection per lattice), is
    sent the visible spots of the lattice with fewest, and returns those it settles for.  Shots
    are redrawn, or made brighter, as long as their label is not in the picture.
    """
    code = list(c.preset.encode())
    rng = np.random.default_rng([c.seed, c.run, c.event, _CRYSTAL, *code])
    scale = c.spot_photons / c.n_lattices
    for _ in range(12):
        first = random_rotation(rng)
        turns = [first] + [rotation_about(rng.standard_normal(3), np.deg2rad(angle)) @ first
                           for angle in c.misset_deg]
        for _ in range(3):
            fewest = yield turns, scale
            if fewest >= LEAST_VISIBLE:
                return turns, scale
            scale *= 1.5
    return turns, scale


def lattices_of(c: StillConditions) -> tuple[list[np.ndarray], float]:
    """(orientations, photons of a mean low-angle reflection per lattice) of a shot."""
    level = profile(c)
    looking = search(c)
    turns, scale = next(looking)
    while True:
        try:
            turns, scale = looking.send(min(_visible(c, turn, scale, level) for turn in turns))
        except StopIteration as found:
            return found.value


def _visible(c: StillConditions, turn: np.ndarray, scale: float, level: np.ndarray) -> int:
    spots = spots_of(c, turn, scale, c.quadrant)
    sign = SIGNS[c.quadrant]
    reach = c.reach * SIDE_PX * c.pool * c.pixel_size_m
    x, y = sign[0] * spots.x_m_N, sign[1] * spots.y_m_N
    radius = np.hypot(x, y)
    inside = (x > 0) & (y > 0) & (x < reach) & (y < reach) & (radius > 1.3 * c.beam_stop_m)
    if c.layout:            # on a panel, not in a gap
        row, column = ((axis[inside] / c.pixel_size_m).astype(int) for axis in (y, x))
        inside[inside] = panels_under(c, sign)[row, column] >= 0
    return int((inside & _seen(c, spots.photons_N, radius, level)).sum())


def _seen(c: StillConditions, photons_N: np.ndarray, radius_m_N: np.ndarray,
          level: np.ndarray) -> np.ndarray:
    index = np.minimum((2 * radius_m_N / c.pixel_size_m).astype(int), len(level) - 1)
    noise = np.sqrt(photons_N + SPOT_PIXELS * (level[index] + c.read_noise_photons ** 2) + 1e-9)
    return photons_N / noise >= VISIBLE_SNR


def reach_A(c: StillConditions, scale: float) -> float:
    """|q| in 1/A out to which reflections are looked for."""
    corner = np.sqrt(2) * SIDE_PX * c.pool * c.pixel_size_m
    # beyond this |q| not even the strongest reflections have 0.3 photons
    faint = np.sqrt(2 * np.log(max(scale * 2.2 * 12 / 0.3, 2.0)) / label_B_A2(c.d_A))
    return min(float(c.inverse_d_A(np.array(corner))) + 0.02, faint)


def spots_of(c: StillConditions, turn: np.ndarray, scale: float, quadrant: str = "") -> Spots:
    """Spots of one lattice on a quadrant or just beside it; "": on all of them."""
    extra = label_B_A2(c.d_A) - c.crystal.wilson_B_A2
    table = excited(c.crystal, turn, k=1 / c.wavelength_A, q_max=reach_A(c, scale),
                    bandwidth=c.bandwidth, sector=SIGNS.get(quadrant))
    spots = predict(table, turn, photon_energy_eV=c.photon_energy_eV, distance_m=c.distance_m,
                    domain_A=c.crystal.domain_A,
                    mosaicity_rad=np.deg2rad(c.crystal.mosaicity_deg), bandwidth=c.bandwidth,
                    scale=scale, extra_B_A2=extra)
    return spots.take(spots.photons_N > LEAST_PHOTONS)


# --- the background -------------------------------------------------------------------------------

def profile(c: StillConditions) -> np.ndarray:
    """Expected background photons per pixel at radii of 0, 1/2, 1, ... detector pixels."""
    steps = int(2 * np.sqrt(2) * SIDE_PX * c.pool) + 4
    radius = (np.arange(steps) + 0.5) * 0.5 * c.pixel_size_m
    q = c.inverse_d_A(radius)
    water, air, lipid, plastic = c.background_shares
    level = (water * (np.exp(-0.5 * ((q - 0.31) / 0.06) ** 2) + 0.15)
             + 1.5 * air * np.exp(-(q / 0.12) ** 2)
             + lipid * np.exp(-0.5 * ((q - 1 / 4.5) / 0.018) ** 2)
             + plastic * np.exp(-0.5 * ((q - 1 / 5.2) / 0.03) ** 2))
    rng = np.random.default_rng([c.seed, c.run, c.event, _CRYSTAL, 7])
    for _ in range(3):      # what no formula knows: smooth and of any height
        level += rng.uniform(0, 0.3) * np.exp(-0.5 * (
            (q - rng.uniform(0.02, 0.8)) / rng.uniform(0.05, 0.3)) ** 2)
    if c.ice:
        for d in ICE_D_A[:int(rng.integers(1, len(ICE_D_A) + 1))]:
            level += c.ice * rng.uniform(0.2, 1) * np.exp(
                -0.5 * ((q - 1 / d) / rng.uniform(0.002, 0.008)) ** 2)
    solid_angle = (c.pixel_size_m / 100e-6) ** 2 * (0.1 / c.distance_m) ** 2
    cosine = 1 / np.sqrt(1 + (radius / c.distance_m) ** 2)
    return c.background_photons * level * solid_angle * cosine ** 3


@functools.lru_cache(maxsize=3)
def _polar(side: int) -> tuple[np.ndarray, np.ndarray]:
    """(radius in half pixels as index, cos^2 of the azimuth) of a quadrant, beam at (0, 0)."""
    step = np.arange(side, dtype=np.float32) + np.float32(0.5)
    square = step ** 2
    radius2 = square[:, None] + square[None, :]
    return (2 * np.sqrt(radius2)).astype(np.int32), square[None, :] / radius2


def _background(c: StillConditions, sign: tuple[int, int]) -> np.ndarray:
    """Expected background of a quadrant as the beam sees it: row along |y|, column along |x|."""
    side = SIDE_PX * c.pool
    level = profile(c)
    if any(c.tilt_deg):
        index, horizontal = _tilted_polar(c, sign, len(level) - 1)
    else:
        index, horizontal = _polar(side)
    radius = (np.arange(len(level)) + 0.5) * 0.5 * c.pixel_size_m
    sine2 = radius ** 2 / (radius ** 2 + c.distance_m ** 2)
    expected = np.take(level.astype(np.float32), index)
    expected -= np.take((level * sine2).astype(np.float32), index) * horizontal     # polarised
    return expected


def _tilted_polar(c: StillConditions, sign: tuple[int, int],
                  last: int) -> tuple[np.ndarray, np.ndarray]:
    """As :func:`_polar`, of the place that an upright detector would have for each pixel."""
    step = (np.arange(SIDE_PX * c.pool, dtype=np.float32) + np.float32(0.5)) * np.float32(
        c.pixel_size_m)
    x, y = stills_panels.seen_from(c.tilt_deg, c.distance_m, sign[0] * step[None, :],
                                   sign[1] * step[:, None])
    radius2 = x * x + y * y
    index = (2 * np.sqrt(radius2) / c.pixel_size_m).astype(np.int32)
    return np.minimum(index, last), (x * x / radius2).astype(np.float32)


def grains(c: StillConditions, rng: np.random.Generator) -> Spots:
    """Spots of ice grains and salt, anywhere on their rings."""
    kinds = [(d, 20.0) for d in rng.choice(ICE_D_A[:6], c.ice_spots if c.ice else 0)]
    kinds += [(d, 2000.0) for d in rng.choice(SALT_D_A, c.salt_spots)]
    d = np.array([one[0] for one in kinds])
    photons = np.array([one[1] for one in kinds]) * rng.exponential(1.0, len(kinds))
    reachable = c.wavelength_A / (2 * np.maximum(d, 0.1)) < 0.65
    d, photons = d[reachable], photons[reachable]
    radius = c.distance_m * np.tan(2 * np.arcsin(c.wavelength_A / (2 * d)))
    azimuth = rng.uniform(0, 2 * np.pi, len(d))
    n = len(d)
    return Spots(radius * np.cos(azimuth), radius * np.sin(azimuth), photons, np.zeros(n),
                 np.zeros(n), d, np.zeros((n, 3), np.float32), np.zeros(n))


# --- the detector ---------------------------------------------------------------------------------

def _quadrant(c: StillConditions, quadrant: str, lattices: list[np.ndarray],
              scale: float) -> tuple[np.ndarray, np.ndarray, int]:
    """(photons_SF, good_SF, visible spots) of a quadrant, row 0 on top."""
    sign = SIGNS[quadrant]
    rng = np.random.default_rng([c.seed, c.run, c.event, _PIXELS, ord(quadrant),
                                 *c.preset.encode()])
    expected, good, seen = _expected(c, quadrant, lattices, scale)
    photons = _detect(c, quadrant, rng, expected)
    if c.layout:
        _differ_by_panel(c, sign, photons)
    photons[~good] = 0
    turned = (slice(None, None, -sign[1]), slice(None, None, sign[0]))
    return np.ascontiguousarray(photons[turned]), np.ascontiguousarray(good[turned]), seen


def expected_quadrant(c: StillConditions, quadrant: str = "") -> tuple[np.ndarray, np.ndarray, int]:
    """(expected photons float32, good pixels, visible spots) as the beam sees a quadrant.

    Before counting and the detector's errors; beam at pixel (0, 0).
    """
    return _expected(c, quadrant or c.quadrant, *lattices_of(c))


def _expected(c: StillConditions, quadrant: str, lattices: list[np.ndarray],
              scale: float) -> tuple[np.ndarray, np.ndarray, int]:
    sign = SIGNS[quadrant]
    shared = shared_rng(c)
    p, side = c.pixel_size_m, SIDE_PX * c.pool
    expected = _background(c, sign)
    along = (np.arange(side, dtype=np.float32) + 0.5) * np.float32(p / 0.1)
    expected *= np.maximum(1 + c.slope[0] * sign[0] * along[None, :]
                           + c.slope[1] * sign[1] * along[:, None], np.float32(0.1))
    spots = Spots.join([*(spots_of(c, turn, scale, quadrant) for turn in lattices),
                        grains(c, shared)])
    x, y = spots.x_m_N, spots.y_m_N
    if any(c.tilt_deg):
        x, y = stills_panels.on_tilted(c.tilt_deg, c.distance_m, x, y)
    x = sign[0] * (x / p + c.center_jitter_px[0])
    y = sign[1] * (y / p + c.center_jitter_px[1])
    near = (x > -NEAR_PX) & (x < side + NEAR_PX) & (y > -NEAR_PX) & (y < side + NEAR_PX)
    spots, x, y = spots.take(near), x[near], y[near]
    _paint(c, expected, spots, x, y)
    if c.streak_photons:
        expected += stills_panels.streak(jet_rng(c), c.streak_photons, sign, side)
    good = _good(c, quadrant)
    if c.shadow < 1:
        _cast_shadow(c, draw_shadow(c, shared), sign, expected, good)
    seen = int((_seen(c, spots.photons_N, np.hypot(x, y) * p, profile(c)) & (x > 0) & (y > 0)
                & (x < c.reach * side) & (y < c.reach * side)).sum())
    return expected, good, seen


def shared_rng(c: StillConditions) -> np.random.Generator:
    """Random numbers that all quadrants of a shot share: first grains, then the shadow."""
    return np.random.default_rng([c.seed, c.run, c.event, _PIXELS, *c.preset.encode()])


def jet_rng(c: StillConditions) -> np.random.Generator:
    """Random numbers of the jet's streak."""
    return np.random.default_rng([c.seed, c.run, c.event, _PIXELS, *c.preset.encode(), 2])


def _paint(c: StillConditions, expected: np.ndarray, spots: Spots, x: np.ndarray,
           y: np.ndarray) -> None:
    """Add spots at (x, y) pixels from the beam, longer along and across the radial direction."""
    if not len(spots):
        return
    radius = np.maximum(np.hypot(x, y), 1e-6)
    radial = np.stack([x, y]) / radius
    across = np.stack([-radial[1], radial[0]])
    a = np.minimum(spots.radial_m_N / c.pixel_size_m, 4.0) ** 2
    b = np.minimum(spots.tangential_m_N / c.pixel_size_m, 4.0) ** 2
    covariance = a * radial[:, None] * radial[None] + b * across[:, None] * across[None]
    covariance = np.moveaxis(covariance, 2, 0) + c.spot_sigma_px ** 2 * np.eye(2)
    wide = np.sqrt(np.maximum(a, b) + c.spot_sigma_px ** 2)
    for low, high, half in PATCHES:
        chosen = (wide >= low) & (wide < high)
        paint(expected, x[chosen] - 0.5, y[chosen] - 0.5, spots.photons_N[chosen],
              covariance[chosen], half=half)


def _good(c: StillConditions, quadrant: str) -> np.ndarray:
    """Pixels that exist and work, in the beam's view; the same for all events of a run."""
    side = SIDE_PX * c.pool
    sign = SIGNS[quadrant]
    good = panels_under(c, sign) >= 0 if c.layout else _between_gaps(c, sign)
    reach = int(c.reach * side)
    good[reach:], good[:, reach:] = False, False
    good.reshape(-1)[dead_pixels(c, quadrant)] = False
    index, _ = _polar(side)
    stop = int(c.beam_stop_m / c.pixel_size_m) + 1
    corner = index[:stop, :stop]
    good[:stop, :stop] &= corner >= 2 * c.beam_stop_m / c.pixel_size_m
    return good


def dead_pixels(c: StillConditions, quadrant: str) -> np.ndarray:
    """Flat indices of a quadrant's dead pixels."""
    side = SIDE_PX * c.pool
    own = np.random.default_rng([c.seed, c.run, _DETECTOR, ord(quadrant)])
    return own.integers(side * side, size=own.poisson(c.dead_fraction * side * side))


def _between_gaps(c: StillConditions, sign: tuple[int, int]) -> np.ndarray:
    """False in the straight gaps of a mosaic of equal panels."""
    rows, columns = straight_gaps(c, sign)
    return ~(rows[:, None] | columns[None, :])


def straight_gaps(c: StillConditions, sign: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """(rows, columns) of a quadrant that lie in a gap of the mosaic, bool."""
    side, one = SIDE_PX * c.pool, DETECTORS[c.detector]
    rng = np.random.default_rng([c.seed, c.run, _DETECTOR])
    found = []
    for axis in (0, 1):
        period = one.panel_px[axis] + one.gap_px[axis]
        offset = int(rng.integers(period))
        # pixel numbers of the whole detector, 0 just beyond the beam towards +x or -y
        number = np.arange(side) if (sign[0] > 0 if axis else sign[1] < 0) \
            else -1 - np.arange(side)
        found.append((number + offset) % period < one.gap_px[axis])
    return found[0], found[1]


def panels_under(c: StillConditions, sign: tuple[int, int]) -> np.ndarray:
    """Number of the panel under each pixel, -1 = none."""
    return stills_panels.panel_map(c.layout, sign, SIDE_PX * c.pool, c.layout_shift_m)


def panel_faults(c: StillConditions, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(gain, common mode in photons) of ``count`` panels, float32; a last one for no panel."""
    gains = np.random.default_rng([c.seed, c.run, _DETECTOR, 3])
    event = np.random.default_rng([c.seed, c.run, c.event, _DETECTOR, 4])
    # drawn for more panels than a quadrant has, so that all quadrants see the same
    gain = (1 + c.panel_gain * gains.standard_normal(512)).astype(np.float32)
    common = (c.common_mode_photons * event.standard_normal(512)).astype(np.float32)
    return np.append(gain[:count], np.float32(1)), np.append(common[:count], np.float32(0))


def _differ_by_panel(c: StillConditions, sign: tuple[int, int], photons: np.ndarray) -> None:
    """Gain errors and common mode of whole panels, and the largest value; in place."""
    panels = panels_under(c, sign)
    gain, common = panel_faults(c, int(panels.max(initial=-1)) + 1)
    photons *= gain[panels]
    photons += common[panels]
    if c.saturation_photons:
        np.minimum(photons, np.float32(c.saturation_photons), out=photons)


@dataclass(frozen=True)
class Shadow:
    """Half a plane, or a strip, behind an edge ``far_px`` from the beam."""

    angle: float
    far_px: float
    masked: bool
    width_px: float         # 0: all of the half plane


def draw_shadow(c: StillConditions, rng: np.random.Generator) -> Shadow:
    """The shadow of a nozzle or a beam-stop arm; ``rng`` is :func:`shared_rng` after grains."""
    angle = rng.uniform(0, 2 * np.pi)
    far = rng.uniform(0.4, 0.95) * (SIDE_PX * c.pool)
    masked = rng.random() < 0.5
    width = rng.uniform(10, 80) * c.pool if rng.random() < 0.5 else 0.0
    return Shadow(angle, far, masked, width)


def _cast_shadow(c: StillConditions, shadow: Shadow, sign: tuple[int, int],
                 expected: np.ndarray, good: np.ndarray) -> None:
    """Dims what is behind the edge; opaque shadows may be masked."""
    step = np.arange(len(expected), dtype=np.float32)
    depth = (np.float32(np.cos(shadow.angle) * sign[0]) * step[None, :]
             + np.float32(np.sin(shadow.angle) * sign[1]) * step[:, None]
             ) - np.float32(shadow.far_px)
    behind = depth > 0
    if shadow.width_px:
        behind &= depth < np.float32(shadow.width_px)
    expected[behind] *= np.float32(c.shadow)
    if shadow.masked and c.shadow == 0:
        good[behind] = False


def _detect(c: StillConditions, quadrant: str, rng: np.random.Generator,
            expected: np.ndarray) -> np.ndarray:
    """Counting noise, calibration errors, hot and stray pixels; photons, float32."""
    photons = rng.poisson(expected).astype(np.float32)
    gains = np.random.default_rng([c.seed, c.run, _DETECTOR, ord(quadrant), 1])
    photons *= 1 + np.float32(c.gain_noise) * gains.standard_normal(photons.shape, np.float32)
    if c.read_noise_photons:
        photons += np.float32(c.read_noise_photons) * rng.standard_normal(photons.shape,
                                                                          np.float32)
    flat = photons.reshape(-1)
    flat[gains.integers(flat.size, size=c.hot_pixels)] = 2.0 ** 16
    stray = rng.integers(flat.size, size=rng.poisson(c.stray_fraction * flat.size))
    flat[stray] += np.exp(rng.uniform(np.log(5), np.log(1000), len(stray)))
    return photons
