"""Events of a simulated run with torch: the formulas of :mod:`.sfx` on a GPU, or on a processor.

What is drawn of an event, its crystal and where its spots fall are the host's, from the event's own
generator: a few hundred spots cost it less than a millisecond.  The device does what has a number
per pixel: background, painting, counting and the detector.  Labels and truth are those of the
host route, expected photons agree to float32 rounding, and so do gains and bad pixels; photons,
readout noise, common mode and stray pixels have other random numbers of the same law, from a seed
per event, and differ between kinds of device.

Axes: B event, P panel, S slow, F fast, N spot.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .bragg_torch import paint_all
from .panel_spots import HALF_PX, Located, OnPanel
from .sfx import Light, SimulatedRun, Truth
from .torch_device import torch_on

__all__ = ["RunOnDevice"]

_COUNTING, _FAULTS = 91, 92         # purposes of random numbers
_PIXELS = 1 << 25                   # on a device at a time


class RunOnDevice:
    """A :class:`.sfx.SimulatedRun` whose pixels are on ``device``: "cuda", "cuda:1", "cpu-torch".

    Raises :class:`MissingDependency` without torch, :class:`ConfigurationError` for a device that
    is not there.
    """

    def __init__(self, run: SimulatedRun, device: str = "cuda") -> None:
        self.run = run
        self.torch, self.device = torch_on(device)
        geometry = run.geometry
        self._air, self._ring, self._s, self._x, self._y = (self._put(one) for one in (
            run.air_PSF, run.ring_PSF, run.s_PSF, geometry.x_m_PSF, geometry.y_m_PSF))
        self._bad = self._put(~run.good_PSF)
        self._gain = None if run.gain_PSF is None else self._put(run.gain_PSF.astype(np.float32))
        self._shadow = None if run.shadow_PSF is None else self._put(run.shadow_PSF)
        self._hot = self._put(run.hot)
        self.batch = max(1, min(64, _PIXELS // run.good_PSF.size))

    def event(self, number: int) -> tuple[np.ndarray, Truth]:
        """(photons_PSF float32, truth) of one event, as :meth:`.sfx.SimulatedRun.event`."""
        return next(self.events([number]))

    def events(self, numbers: Sequence[int]) -> Iterator[tuple[np.ndarray, Truth]]:
        """The same of several events, in their order; faster than one by one."""
        for photons, truth in self.on_device(numbers):
            yield photons.cpu().numpy(), truth

    def on_device(self, numbers: Sequence[int]) -> Iterator[tuple[Any, Truth]]:
        """(photons (P, S, F), a tensor on the device, truth) of each event."""
        for first in range(0, len(numbers), self.batch):
            some = numbers[first:first + self.batch]
            expected_BPSF, truths = self.expected(some)
            for number, expected, truth in zip(some, expected_BPSF, truths, strict=True):
                yield self._detected(number, expected), truth

    def expected(self, numbers: Sequence[int]) -> tuple[Any, list[Truth]]:
        """(expected photons (B, P, S, F), before counting, truths) of a batch of events."""
        run, torch = self.run, self.torch
        scenes = [run.scene(number, coarse=True) for number in numbers]
        expected = torch.stack([self._background(scene.light) for scene in scenes])
        located = [run.locate(scene.spots, scene) for scene in scenes]
        placed = [(*columns[:5], run.background(scene.light, at), *columns[5:])
                  for scene, (_, columns, at) in zip(scenes, located, strict=True)]
        self._paint(expected, [one[0] for one in located])
        further = [run.locate(scene.more, scene) for scene in scenes]
        under = self._under(expected, further)
        self._paint(expected, [one[0] for one in further])
        if self._shadow is not None:
            expected *= self._shadow
        return expected, [run.truth(scene, one, (*columns[:5], background, *columns[5:]))
                          for scene, one, (_, columns, _), background in zip(
                              scenes, placed, further, under, strict=True)]

    def _put(self, array: np.ndarray) -> Any:
        return self.torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def _background(self, light: Light) -> Any:
        """As :meth:`.sfx.SimulatedRun.background`."""
        single = np.float32
        expected = self._air * float(single(light.pulse))
        expected += self._ring * float(single(light.pulse * light.thickness))
        for d, height, width in light.ice:
            away = (self._s - float(single(1 / d))) / float(single(width))
            expected += float(single(height)) * (-0.5 * away ** 2).exp()
        if light.streak:
            angle, height, reach, width = light.streak
            cosine, sine = float(single(np.cos(angle))), float(single(np.sin(angle)))
            across = self._x * sine - self._y * cosine
            along = self._x * cosine + self._y * sine
            expected += float(single(height)) * (
                -along.abs() / float(single(reach))
                - 0.5 * (across / float(single(width))) ** 2).exp()
        return expected

    def _paint(self, expected_BPSF: Any, pieces_B: Sequence[list[OnPanel]]) -> None:
        """Add the spots of every event, panel by panel, in place."""
        by_region: dict[tuple, list[tuple[int, OnPanel]]] = {}
        for number, pieces in enumerate(pieces_B):
            for one in pieces:
                panel = one.panel
                key = (panel.index, panel.min_ss, panel.max_ss + 1, panel.min_fs,
                       panel.max_fs + 1)
                by_region.setdefault(key, []).append((number, one))
        for (index, top, bottom, left, right), found in by_region.items():
            added = self.torch.zeros((len(expected_BPSF), bottom - top, right - left),
                                     dtype=self.torch.float64, device=self.device)
            image = np.concatenate([np.full(len(one.fs_N), number) for number, one in found])
            fs, ss, photons, covariance = (self._put(np.concatenate(
                [getattr(one, name) for _, one in found]).astype(np.float64)) for name in (
                    "fs_N", "ss_N", "photons_N", "covariance_N22"))
            paint_all(self.torch, self._put(image), fs, ss, photons, covariance, added, HALF_PX)
            expected_BPSF[:, index, top:bottom, left:right] += added.float()

    def _under(self, expected_BPSF: Any, located_B: Sequence[Located]) -> list[np.ndarray]:
        """Expected photons at the pixels of spots that are about to be painted."""
        counts = [len(at[0]) for _, _, at in located_B]
        event = np.repeat(np.arange(len(counts)), counts)
        at = [np.concatenate([one[2][axis] for one in located_B]).astype(np.int64)
              for axis in range(3)]
        values = expected_BPSF[tuple(self._put(one) for one in (event, *at))].cpu().numpy()
        return np.split(values, np.cumsum(counts)[:-1])

    def _detected(self, number: int, expected_PSF: Any) -> Any:
        """Counting noise and the detector's faults; photons, float32."""
        run, torch, c = self.run, self.torch, self.run.conditions
        own = np.random.SeedSequence([c.seed, c.run, number, _COUNTING])
        generator = torch.Generator(device=self.device)
        generator.manual_seed(int(own.generate_state(1, np.uint64)[0]) >> 1)
        photons = torch.poisson(expected_PSF, generator=generator)
        if self._gain is not None:
            rng = np.random.default_rng([c.seed, c.run, number, _FAULTS])
            photons *= self._gain
            photons += c.read_noise_photons * torch.randn(photons.shape, generator=generator,
                                                          device=self.device)
            common = c.common_mode_photons * rng.standard_normal((len(photons), 1, 1), np.float32)
            photons += self._put(common.astype(np.float32))
            flat = photons.view(-1)
            hot = run.hot_photons * rng.uniform(0.5, 1.5, len(run.hot))
            flat.index_add_(0, self._hot, self._put(hot.astype(np.float32)))
            stray = rng.integers(flat.numel(), size=rng.poisson(c.salt_fraction * flat.numel()))
            light = np.exp(rng.uniform(np.log(5), np.log(1000), len(stray)))
            flat.index_add_(0, self._put(stray), self._put(light.astype(np.float32)))
            if c.saturation_photons:
                photons.clamp_(max=c.saturation_photons)
        photons[self._bad] = 0
        return photons
