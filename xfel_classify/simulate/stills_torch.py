"""Batches of stills with torch: the formulas of :mod:`.stills_512` on a GPU, or on a processor.

Whatever decides a label or an expected photon is drawn by the host from the event's own generator,
as there: conditions, orientations, the background's terms, grains, streak, shadow, gaps, dead
pixels, and gain and common mode of panels.  So expected images agree to float32 rounding and labels
are the same on every device.  What has a number per pixel is drawn by the device from seeds of
its own, per event (counting, readout) or per run and quadrant (gain of pixels), and stray and
hot pixels by the host from other seeds than there: these follow the same laws, with other numbers,
and differ between kinds of device.  One seed, one batch size or another, one device: the same set,
but for the order of additions where spots overlap (1e-16).

Reflections of a whole batch are predicted and painted together (:mod:`.bragg_torch`).

Axes: E shot (a lattice of a still), N spot, B still of a group with quadrants of one size, S slow,
F fast.
"""
from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from . import stills_512, stills_panels
from .bragg_torch import FlatSpots, Shot, paint_all, predict_all
from .stills_512 import LEAST_PHOTONS, NEAR_PX, PATCHES, SIGNS, SPOT_PIXELS, VISIBLE_SNR, Still
from .stills_conditions import SIDE_PX, StillConditions, label_B_A2
from .torch_device import torch_on

__all__ = ["Bench", "expected_quadrants", "simulate_quadrants"]

BATCH = 16
"""Stills at a time; a batch of the largest quadrants (f = 4) takes about 3 GB."""

_FAULTS, _COUNTING, _GAINS = 51, 52, 53     # purposes of random numbers

Drawn = tuple[list[np.ndarray], float]      # orientations, photons of a mean reflection


def expected_quadrants(conditions: Sequence[StillConditions], device: str = "cuda",
                       batch: int = BATCH) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """What :func:`.stills_512.expected_quadrant` gives for each, computed on ``device``.

    ``device`` is "cuda", "cuda:1" or "cpu-torch".  Raises :class:`MissingDependency` without
    torch, :class:`ConfigurationError` for a device that is not there.
    """
    bench = Bench(device)
    for group in _batches(conditions, batch):
        for expected, good, seen in bench.expected(group):
            yield expected.cpu().numpy(), good.cpu().numpy(), seen


def simulate_quadrants(conditions: Sequence[StillConditions], device: str = "cuda",
                       batch: int = BATCH) -> Iterator[Still]:
    """The quadrant that each of the conditions names, in their order.

    As :func:`.stills_512.simulate_quadrant`, with other noise; errors as
    :func:`expected_quadrants`.
    """
    bench = Bench(device)
    for group in _batches(conditions, batch):
        for c, (expected, good, seen) in zip(group, bench.expected(group), strict=True):
            photons = bench.detected(c, expected, good)
            axes = [axis for axis, sign in enumerate((-SIGNS[c.quadrant][1], SIGNS[c.quadrant][0]))
                    if sign < 0]
            side = SIDE_PX * c.pool
            beam = (side if c.quadrant in "AC" else 0, side if c.quadrant in "AB" else 0)
            yield Still(c, bench.host(photons, axes), bench.host(good, axes), beam, seen)


def _batches(conditions: Sequence[StillConditions],
             batch: int) -> Iterator[Sequence[StillConditions]]:
    for first in range(0, len(conditions), max(batch, 1)):
        yield conditions[first:first + max(batch, 1)]


class Bench:
    """A device, and what does not change from still to still on it."""

    def __init__(self, device: str) -> None:
        self.torch, self.device = torch_on(device)
        self._polar = functools.lru_cache(maxsize=3)(self._make_polar)
        self._map = functools.lru_cache(maxsize=8)(self._make_map)
        self._gain = functools.lru_cache(maxsize=4)(self._make_gain)

    def put(self, array: np.ndarray) -> Any:
        return self.torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def host(self, image: Any, flipped: list[int]) -> np.ndarray:
        """On the processor, turned so that row 0 is on top."""
        return (self.torch.flip(image, flipped) if flipped else image).cpu().numpy()

    def _steps(self, side: int) -> Any:
        return self.torch.arange(side, dtype=self.torch.float32, device=self.device)

    def _make_polar(self, side: int) -> tuple[Any, Any]:
        """As :func:`.stills_512._polar`."""
        square = (self._steps(side) + 0.5) ** 2
        radius2 = square[:, None] + square[None, :]
        return (2 * radius2.sqrt()).int(), square[None, :] / radius2

    def _make_map(self, layout: str, sign: tuple[int, int], side: int,
                  shift_m: tuple[float, float]) -> Any:
        return self.put(stills_panels.panel_map(layout, sign, side, shift_m)).long()

    def panels(self, c: StillConditions, sign: tuple[int, int]) -> Any:
        """Number of the panel under each pixel, -1 = none."""
        return self._map(c.layout, sign, SIDE_PX * c.pool, c.layout_shift_m)

    # --- expected photons ---------------------------------------------------------------------

    def expected(self, group: Sequence[StillConditions]) -> Iterator[tuple[Any, Any, int]]:
        """(expected_SF, good_SF, visible spots) of each still of a batch, beam at (0, 0)."""
        levels = _Levels(self, group)
        spots, still_E = self._predict(group, self._settled(group, levels))
        drawn = [stills_512.shared_rng(c) for c in group]
        grains = [FlatSpots.of(self.torch, self.device, stills_512.grains(c, rng), number)
                  for number, (c, rng) in enumerate(zip(group, drawn, strict=True))]
        on_still = FlatSpots(still_E[spots.shot_N], *(
            getattr(spots, name) for name in list(FlatSpots.__dataclass_fields__)[1:]))
        spots = FlatSpots.join(self.torch, [on_still, *grains])
        spots, x, y = self._placed(group, spots)
        seen = self._count_seen(group, levels, spots, x, y)
        added: dict[int, tuple[Any, dict[int, int]]] = {}
        for pool in sorted({c.pool for c in group}):
            members = [number for number, c in enumerate(group) if c.pool == pool]
            added[pool] = (self._painted(group, members, spots, x, y),
                           {number: place for place, number in enumerate(members)})
        for number, c in enumerate(group):
            images, place = added[c.pool]
            expected = self._background(c, levels.level(number))
            expected += images[place[number]].float()
            if c.streak_photons:
                expected += self._streak(c)
            good = self._good(c)
            if c.shadow < 1:
                self._cast_shadow(c, stills_512.draw_shadow(c, drawn[number]), expected, good)
            yield expected, good, seen[number]

    def _settled(self, group: Sequence[StillConditions], levels: _Levels) -> list[Drawn]:
        """The shot that :func:`.stills_512.search` settles for, of all stills at once."""
        looking = {number: stills_512.search(c) for number, c in enumerate(group)}
        asked = {number: next(one) for number, one in looking.items()}
        found: dict[int, Drawn] = {}
        while asked:
            fewest = self._fewest_visible(group, levels, asked)
            for number in list(asked):
                try:
                    asked[number] = looking[number].send(fewest[number])
                except StopIteration as settled:
                    found[number] = settled.value
                    del asked[number]
        return [found[number] for number in range(len(group))]

    def _fewest_visible(self, group: Sequence[StillConditions], levels: _Levels,
                        asked: dict[int, Drawn]) -> dict[int, int]:
        """Visible spots of the lattice that has fewest, of each still that is asked for."""
        numbers = list(asked)
        spots, still_E = self._predict(group, [asked[n] for n in numbers], numbers)
        still = still_E[spots.shot_N]
        per = _PerStill(self, group)
        x, y = per.sign_x[still] * spots.x_m_N, per.sign_y[still] * spots.y_m_N
        reach = (per.reach * per.side * per.pixel)[still]
        radius = self.torch.hypot(x, y)
        inside = (x > 0) & (y > 0) & (x < reach) & (y < reach) & (radius > 1.3 * per.stop[still])
        for number in numbers:
            c = group[number]
            if c.layout:
                own = self.torch.nonzero(inside & (still == number))[:, 0]
                row, column = ((axis[own] / c.pixel_size_m).long() for axis in (y, x))
                inside[own] = self.panels(c, SIGNS[c.quadrant])[row, column] >= 0
        inside &= levels.seen(still, spots.photons_N, radius)
        counts = self.torch.bincount(spots.shot_N[inside], minlength=len(still_E)).tolist()
        fewest: dict[int, int] = {}
        for number, count in zip(still_E.tolist(), counts, strict=True):
            fewest[number] = min(fewest.get(number, count), count)
        return fewest

    def _predict(self, group: Sequence[StillConditions], drawn: Sequence[Drawn],
                 numbers: Sequence[int] | None = None) -> tuple[FlatSpots, Any]:
        """(spots of all lattices, the still of each shot)."""
        shots: list[Shot] = []
        still: list[int] = []
        modelled: list[tuple[int, Any]] = []
        for number, (turns, scale) in zip(numbers or range(len(group)), drawn, strict=True):
            c = group[number]
            for turn in turns:
                if c.crystal.model:     # a list of reflections: not worth a second formula
                    modelled.append((len(still), stills_512.spots_of(c, turn, scale, c.quadrant)))
                shots.append(Shot(
                    c.crystal, turn, 1 / c.wavelength_A, c.distance_m, c.bandwidth,
                    0.0 if c.crystal.model else stills_512.reach_A(c, scale), scale,
                    label_B_A2(c.d_A) - c.crystal.wilson_B_A2, SIGNS[c.quadrant]))
                still.append(number)
        spots = predict_all(self.torch, self.device, shots, LEAST_PHOTONS)
        spots = FlatSpots.join(self.torch, [spots, *(
            FlatSpots.of(self.torch, self.device, one, shot) for shot, one in modelled)])
        return spots, self.put(np.array(still, np.int64))

    def _placed(self, group: Sequence[StillConditions],
                spots: FlatSpots) -> tuple[FlatSpots, Any, Any]:
        """Spots on or near their quadrant, with pixels from the beam along |x| and |y|."""
        per, still = _PerStill(self, group), spots.shot_N
        x, y = spots.x_m_N.clone(), spots.y_m_N.clone()
        for number, c in enumerate(group):
            if any(c.tilt_deg):
                own = self.torch.nonzero(still == number)[:, 0]
                axes = stills_panels.tilt_axes(c.tilt_deg)
                u, v = x[own], y[own]
                stretch = c.distance_m * axes[2, 2] / (axes[0, 2] * u + axes[1, 2] * v
                                                       + axes[2, 2] * c.distance_m)
                at = (stretch * u, stretch * v, c.distance_m * (stretch - 1))
                x[own], y[own] = (sum(float(axes[i, axis]) * at[i] for i in range(3))
                                  for axis in (0, 1))
        x = per.sign_x[still] * (x / per.pixel[still] + per.jitter_x[still])
        y = per.sign_y[still] * (y / per.pixel[still] + per.jitter_y[still])
        side = per.side[still]
        near = (x > -NEAR_PX) & (x < side + NEAR_PX) & (y > -NEAR_PX) & (y < side + NEAR_PX)
        return spots.take(near), x[near], y[near]

    def _count_seen(self, group: Sequence[StillConditions], levels: _Levels, spots: FlatSpots,
                    x: Any, y: Any) -> list[int]:
        per, still = _PerStill(self, group), spots.shot_N
        reach = (per.reach * per.side)[still]
        seen = levels.seen(still, spots.photons_N, self.torch.hypot(x, y) * per.pixel[still])
        seen &= (x > 0) & (y > 0) & (x < reach) & (y < reach)
        return self.torch.bincount(still[seen], minlength=len(group)).tolist()

    def _painted(self, group: Sequence[StillConditions], members: list[int], spots: FlatSpots,
                 x: Any, y: Any) -> Any:
        """float64 (B, S, F): spots of the stills ``members``, whose quadrants have one size."""
        torch = self.torch
        places = torch.full((len(group),), -1, device=self.device)
        places[torch.tensor(members, device=self.device)] = torch.arange(len(members),
                                                                        device=self.device)
        image = places[spots.shot_N]
        own = image >= 0
        per, still = _PerStill(self, group), spots.shot_N[own]
        spots, x, y, image = spots.take(own), x[own], y[own], image[own]
        side = SIDE_PX * group[members[0]].pool
        added = torch.zeros((len(members), side, side), dtype=torch.float64, device=self.device)
        radius = torch.hypot(x, y).clamp(min=1e-6)
        radial = torch.stack([x / radius, y / radius], 1)
        across = torch.stack([-radial[:, 1], radial[:, 0]], 1)
        a = (spots.radial_m_N / per.pixel[still]).clamp(max=4.0) ** 2
        b = (spots.tangential_m_N / per.pixel[still]).clamp(max=4.0) ** 2
        sigma2 = per.sigma[still] ** 2
        covariance = (a[:, None, None] * radial[:, :, None] * radial[:, None]
                      + b[:, None, None] * across[:, :, None] * across[:, None]
                      + sigma2[:, None, None] * torch.eye(2, device=self.device,
                                                          dtype=torch.float64))
        wide = (torch.maximum(a, b) + sigma2).sqrt()
        for low, high, half in PATCHES:
            chosen = torch.nonzero((wide >= low) & (wide < high))[:, 0]
            paint_all(torch, image[chosen], x[chosen] - 0.5, y[chosen] - 0.5,
                      spots.photons_N[chosen], covariance[chosen], added, half)
        return added

    def _background(self, c: StillConditions, level: np.ndarray) -> Any:
        """As :func:`.stills_512._background`, with the slope."""
        sign, side = SIGNS[c.quadrant], SIDE_PX * c.pool
        if any(c.tilt_deg):
            index, horizontal = self._tilted_polar(c, sign, len(level) - 1)
        else:
            index, horizontal = self._polar(side)
        radius = (np.arange(len(level)) + 0.5) * 0.5 * c.pixel_size_m
        sine2 = radius ** 2 / (radius ** 2 + c.distance_m ** 2)
        index = index.long()
        expected = self.put(level.astype(np.float32))[index]
        expected -= self.put((level * sine2).astype(np.float32))[index] * horizontal
        along = (self._steps(side) + 0.5) * float(np.float32(c.pixel_size_m / 0.1))
        expected *= (1 + c.slope[0] * sign[0] * along[None, :]
                     + c.slope[1] * sign[1] * along[:, None]).clamp(min=float(np.float32(0.1)))
        return expected

    def _tilted_polar(self, c: StillConditions, sign: tuple[int, int],
                      last: int) -> tuple[Any, Any]:
        step = ((self._steps(SIDE_PX * c.pool) + 0.5) * float(np.float32(c.pixel_size_m))).double()
        axes = stills_panels.tilt_axes(c.tilt_deg)
        u, v = sign[0] * step[None, :], sign[1] * step[:, None]
        x, y, z = (float(axes[i, 0]) * u + float(axes[i, 1]) * v for i in range(3))
        stretch = c.distance_m / (c.distance_m + z)
        x, y = stretch * x, stretch * y
        radius2 = x * x + y * y
        index = (2 * radius2.sqrt() / c.pixel_size_m).int()
        return index.clamp(max=last), (x * x / radius2).float()

    def _streak(self, c: StillConditions) -> Any:
        """As :func:`.stills_panels.streak`."""
        angle, reach, width = stills_panels.streak_shape(stills_512.jet_rng(c))
        sign, step = SIGNS[c.quadrant], self._steps(SIDE_PX * c.pool) + 0.5
        x, y = sign[0] * step[None, :], sign[1] * step[:, None]
        cosine, sine = float(np.float32(np.cos(angle))), float(np.float32(np.sin(angle)))
        across, along = x * sine - y * cosine, x * cosine + y * sine
        return c.streak_photons * (-along.abs() / reach - 0.5 * (across / width) ** 2).exp()

    def _good(self, c: StillConditions) -> Any:
        """As :func:`.stills_512._good`."""
        sign, side = SIGNS[c.quadrant], SIDE_PX * c.pool
        if c.layout:
            good = self.panels(c, sign) >= 0
        else:
            rows, columns = (self.put(gap) for gap in stills_512.straight_gaps(c, sign))
            good = ~(rows[:, None] | columns[None, :])
        reach = int(c.reach * side)
        good[reach:], good[:, reach:] = False, False
        good.view(-1)[self.put(stills_512.dead_pixels(c, c.quadrant))] = False
        stop = int(c.beam_stop_m / c.pixel_size_m) + 1
        index, _ = self._polar(side)
        good[:stop, :stop] &= index[:stop, :stop] >= 2 * c.beam_stop_m / c.pixel_size_m
        return good

    def _cast_shadow(self, c: StillConditions, shadow: stills_512.Shadow, expected: Any,
                     good: Any) -> None:
        sign, step = SIGNS[c.quadrant], self._steps(len(expected))
        depth = (float(np.float32(np.cos(shadow.angle) * sign[0])) * step[None, :]
                 + float(np.float32(np.sin(shadow.angle) * sign[1])) * step[:, None]
                 ) - float(np.float32(shadow.far_px))
        behind = depth > 0
        if shadow.width_px:
            behind &= depth < float(np.float32(shadow.width_px))
        expected[behind] *= c.shadow
        if shadow.masked and c.shadow == 0:
            good[behind] = False

    # --- the detector -------------------------------------------------------------------------

    def _generator(self, *purpose: int) -> Any:
        seed = int(np.random.SeedSequence(purpose).generate_state(1, np.uint64)[0])
        generator = self.torch.Generator(device=self.device)
        generator.manual_seed(seed >> 1)
        return generator

    def _make_gain(self, seed: int, run: int, quadrant: str, side: int, noise: float) -> Any:
        """Relative gain of each pixel, the same for all events of a run."""
        generator = self._generator(seed, run, _GAINS, ord(quadrant))
        gain = self.torch.randn((side, side), generator=generator, device=self.device)
        return 1 + noise * gain

    def detected(self, c: StillConditions, expected: Any, good: Any) -> Any:
        """Counting noise, calibration errors, hot and stray pixels; float32, 0 where not good."""
        sign, side = SIGNS[c.quadrant], len(expected)
        own = (c.seed, c.run, c.event, _COUNTING, ord(c.quadrant), *c.preset.encode())
        generator = self._generator(*own)
        photons = self.torch.poisson(expected, generator=generator)
        photons *= self._gain(c.seed, c.run, c.quadrant, side, c.gain_noise)
        if c.read_noise_photons:
            photons += c.read_noise_photons * self.torch.randn(
                photons.shape, generator=generator, device=self.device)
        flat = photons.view(-1)
        run = np.random.default_rng([c.seed, c.run, _FAULTS, ord(c.quadrant)])
        flat[self.put(run.integers(flat.numel(), size=c.hot_pixels))] = 2.0 ** 16
        rng = np.random.default_rng([*own, _FAULTS])
        stray = rng.integers(flat.numel(), size=rng.poisson(c.stray_fraction * flat.numel()))
        light = np.exp(rng.uniform(np.log(5), np.log(1000), len(stray))).astype(np.float32)
        flat.index_add_(0, self.put(stray), self.put(light))
        if c.layout:
            panels = self.panels(c, sign)
            gain, common = stills_512.panel_faults(c, int(panels.max()) + 1)
            photons *= self.put(gain)[panels]
            photons += self.put(common)[panels]
            if c.saturation_photons:
                photons.clamp_(max=c.saturation_photons)
        photons[~good] = 0
        return photons


class _PerStill:
    """Numbers of each still of a batch, float64 (B,)."""

    def __init__(self, bench: Bench, group: Sequence[StillConditions]) -> None:
        def put(values: list[float]) -> Any:
            return bench.put(np.array(values, np.float64))

        self.sign_x, self.sign_y = (put([SIGNS[c.quadrant][axis] for c in group])
                                    for axis in (0, 1))
        self.jitter_x, self.jitter_y = (put([c.center_jitter_px[axis] for c in group])
                                        for axis in (0, 1))
        self.side = put([SIDE_PX * c.pool for c in group])
        self.pixel, self.reach = put([c.pixel_size_m for c in group]), put([c.reach for c in group])
        self.stop, self.sigma = (put([c.beam_stop_m for c in group]),
                                 put([c.spot_sigma_px for c in group]))


class _Levels:
    """Background along the radius of each still (:func:`.stills_512.profile`), end to end."""

    def __init__(self, bench: Bench, group: Sequence[StillConditions]) -> None:
        self._levels = [stills_512.profile(c) for c in group]
        lengths = np.array([len(level) for level in self._levels])
        self._torch = bench.torch
        self._flat = bench.put(np.concatenate(self._levels))
        self._first, self._last = bench.put(np.cumsum(lengths) - lengths), bench.put(lengths - 1)
        self._pixel = bench.put(np.array([c.pixel_size_m for c in group]))
        self._noise2 = bench.put(np.array([c.read_noise_photons ** 2 for c in group]))

    def level(self, number: int) -> np.ndarray:
        return self._levels[number]

    def seen(self, still_N: Any, photons_N: Any, radius_m_N: Any) -> Any:
        """As :func:`.stills_512._seen`."""
        index = (2 * radius_m_N / self._pixel[still_N]).long()
        level = self._flat[self._first[still_N] + self._torch.minimum(index, self._last[still_N])]
        noise = (photons_N + SPOT_PIXELS * (level + self._noise2[still_N]) + 1e-9).sqrt()
        return photons_N / noise >= VISIBLE_SNR
