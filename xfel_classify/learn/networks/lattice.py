"""One lattice or several: spots, the transform of their reciprocal-space positions, a small head.

Ours, not published.  One lattice puts every spot at q = R A* h, so that exp(2 pi i q t) is the same
for all of them at every vector t of the direct lattice, and |S(t)| = |sum_j w_j exp(2 pi i q_j t)|
reaches the sum of weights there.  Two lattices have two sets of such vectors and reach only their
shares.  The first part of the network has no weights to learn and follows this physics:

1. spots: local maxima over the local background, the brightest ``spots`` of them, their centroids,
   and a weight that leaves out noise and single stray pixels;
2. their positions q on the Ewald sphere, by the geometry;
3. S on a grid of t within ``REACH`` angstrom, described by its p-norms in shells of |t|;
4. back from S |S|^6 to the spots: how well each fits what most of them agree on, for short and for
   long t; those that do not fit are transformed again;
5. distances to neighbours, turns of close pairs about the beam, shapes of spots: what a small
   mis-setting changes.

The head is a perceptron on these numbers.  The parts' outputs can be kept: :meth:`describe` gives
them, and :meth:`forward` takes them in place of images.

Axes: B image, H row, W column, K spot, P pixel of a 5 x 5 patch, T index of t along an axis,
Z plane of t_z, M shell, N edge of a shell, F number of the description.
"""
from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...core import ConfigurationError
from ._spots import SpotFinder, beside_centre

REACH, STEP, STEP_Z = 126.0, 1.4, 5.0           # of t, in angstrom
TOGETHER = 5                # planes of t_z that are transformed at once
SHELLS = (26.0, 45.0, 60.0, 76.0, 92.0, 109.0, 126.0)
SHORT = 3                   # shells that count as short
NORMS = 5                   # p = 2, 4, 8, 16, 32
NEAR = (0.003, 0.005, 0.007, 0.009, 0.012, 0.015, 0.018, 0.022, 0.027, 0.033, 0.04)     # 1/A
NEAR_DEG = (0.3, 0.45, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 7.0)
PAIRS = (0.0015, 0.0025, 0.0035, 0.0045, 0.0055, 0.0065, 0.0075, 0.0085, 0.0095, 0.011, 0.0125,
         0.014, 0.016, 0.018, 0.02, 0.0225, 0.025, 0.0275, 0.03, 0.035, 0.04)           # 1/A
TURNS_DEG = (0.25, 0.4, 0.55, 0.7, 0.85, 1.0, 1.2, 1.4, 1.7, 2.0, 2.4, 2.8, 3.4, 4.0, 5.0)
ASPECTS = (0.6, 0.8, 1.0, 1.25, 1.5, 2.0, 2.5)
FITS = 15                   # bins of how well spots fit, -0.2 to 1.2
DESCRIPTION = 11 + 7 + len(PAIRS) + len(TURNS_DEG) + len(ASPECTS) + len(NEAR) + len(NEAR_DEG) \
    + 2 * (FITS + 4) + 2 + 2 * NORMS * (len(SHELLS) - 1)


class Network(nn.Module):
    """``size`` is the side of the quadrant in pixels, ``spots`` how many are looked at, ``width``
    that of the head's layers, ``reach`` the longest t in angstrom."""

    outputs = {"lattice": 1}
    uses_geometry = True
    core: Tensor
    bins: Tensor
    others: Tensor
    t: Tensor
    volume: Tensor

    def __init__(self, size: int = 512, spots: int = 128, width: int = 128,
                 dropout: float = 0.2, reach: float = REACH) -> None:
        super().__init__()
        self.finder = SpotFinder(size, spots)
        self.spots = spots
        self._keep("core", ((self.finder.row.abs() < 2) & (self.finder.column.abs() < 2)).float())
        self._keep("bins", torch.arange(float(FITS)))
        self._keep("others", 1.0 - torch.eye(spots))
        self._grid(reach)
        self.standard = nn.BatchNorm1d(DESCRIPTION, affine=False, momentum=0.02)
        self.head = nn.Sequential(
            nn.Linear(DESCRIPTION, width), nn.ReLU(), nn.Dropout(dropout),
            nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, 1))

    def _grid(self, reach: float) -> None:
        """Planes of t, some at a time, and the shells they are cut into.

        A shell of a plane lies between two squares, so that its sum is one of products: |x| in
        ring and |y| in box, and vice versa.
        """
        if not 4 * STEP_Z <= reach <= 400:
            raise ConfigurationError(f"lattice was asked for reach = {reach}; give "
                                     f"{4 * STEP_Z:g} to 400 angstrom")
        side = int(reach / STEP)
        number_T = torch.arange(-side, side + 1)
        self._keep("t", number_T * STEP)
        edges = [edge * (reach / REACH) for edge in SHELLS]
        heights = [number * STEP_Z for number in range(int((reach - 2.0) / STEP_Z) + 1)]
        volume = torch.zeros(len(edges) - 1)
        self.groups: list[slice] = []
        for start in range(0, len(heights), TOGETHER):
            group = heights[start:start + TOGETHER]
            half = int(math.sqrt(reach ** 2 - group[0] ** 2) / STEP)
            inside = slice(side - half, side + half + 1)
            steps = number_T[inside].abs()
            boxes, columns, rows = [], [], []
            for z in group:         # S(-t) is the conjugate of S(t): one half is enough
                once = 0.5 if z == 0 else 1.0
                box_TN = torch.stack([(steps * STEP < math.sqrt(max(edge ** 2 - z * z, 0.0)))
                                      for edge in edges], 1).float()
                box_TN[:, -1] = (steps <= int(math.sqrt(reach ** 2 - z * z) / STEP)).float()
                ring_TM = box_TN[:, 1:] - box_TN[:, :-1]
                columns.append(torch.cat([ring_TM, box_TN[:, :-1]], 1))
                rows.append(torch.cat([box_TN[:, 1:], ring_TM], 1) * once)
                boxes.append(box_TN[:, [0, SHORT, -1]] * once ** 0.5)
                counted = columns[-1].sum(0) * rows[-1].sum(0)
                volume += counted[:len(volume)] + counted[len(volume):]
            self._keep(f"z{len(self.groups)}", torch.tensor(group))
            self._keep(f"columns{len(self.groups)}", torch.stack(columns))
            self._keep(f"rows{len(self.groups)}", torch.stack(rows))
            self._keep(f"boxes{len(self.groups)}", torch.stack(boxes).permute(2, 0, 1))
            self.groups.append(inside)
        self._keep("volume", volume)

    def _keep(self, name: str, value: Tensor) -> None:
        self.register_buffer(name, value, persistent=False)

    def forward(self, images: Tensor, geometry_B4: Tensor | None = None) -> dict[str, Tensor]:
        """{"lattice": logits of "more than one" (B, 1)} of images (B, 1, H, W) with their geometry
        or of descriptions (B, F)."""
        described_BF = images if images.dim() == 2 else self.describe(images, geometry_B4)
        return {"lattice": self.head(self.standard(described_BF).clamp(-6.0, 6.0))}

    def describe(self, images_B1HW: Tensor, geometry_B4: Tensor | None) -> Tensor:
        """float32 (B, F): everything before the head; has no weights to learn."""
        if geometry_B4 is None:
            raise ConfigurationError("the lattice network judges by the geometry and got none; "
                                     "give (B, 4): distance_mm, pixel_mm, wavelength_A, pool")
        found = self.finder(images_B1HW)
        bright_BK = found.bright_BK
        patch_BKP = self.finder.patches((images_B1HW - found.level).clamp(min=0.0), found)
        level_BK = torch.gather(found.level.flatten(1), 1, found.index_BK)
        core_BKP = patch_BKP * self.core
        total_BK = core_BKP.sum(2).clamp(min=1e-3)
        x_px = found.column_BK + 0.5 + (core_BKP * self.finder.column).sum(2) / total_BK
        y_px = found.row_BK + 0.5 + (core_BKP * self.finder.row).sum(2) / total_BK
        wide_BK = beside_centre(patch_BKP)
        w_BK = ((bright_BK - 3.5) / 2).clamp(0.0, 1.0) * ((wide_BK - 0.06) / 0.1).clamp(0.0, 1.0)
        strong_BK = w_BK * ((bright_BK - 5) / 5).clamp(0.0, 1.0)

        distance, pixel, wavelength, pool = (geometry_B4[:, i:i + 1] for i in range(4))
        x, y = x_px * pixel * pool, y_px * pixel * pool
        flight = torch.sqrt(x * x + y * y + distance * distance)
        qx, qy, qz = x / flight / wavelength, y / flight / wavelength, \
            (distance / flight - 1) / wavelength
        q2_BK = qx * qx + qy * qy + qz * qz
        q_BK = q2_BK.sqrt()
        radius = torch.sqrt(x * x + y * y)
        across_x, across_y = x / radius, y / radius     # unit vector away from the beam
        pixel_q = pixel * pool / distance / wavelength
        sum_w = w_BK.sum(1, keepdim=True).clamp(min=1.0)

        frame = [sum_w.log(), (w_BK * w_BK).sum(1, keepdim=True).clamp(min=1.0).log(),
                 strong_BK.sum(1, keepdim=True).clamp(min=0.3).log(), mean(q_BK, w_BK),
                 mean(q2_BK, w_BK).sqrt(), pixel_q * 512, mean(qx, w_BK), mean(qy, w_BK),
                 wavelength, mean(level_BK, w_BK),
                 (bright_BK > 3.5).float().sum(1, keepdim=True) / 100]
        shapes = self._shapes(patch_BKP, across_x, across_y, q_BK, wide_BK, strong_BK)
        pairs = self._pairs(qx, qy, qz, q_BK, across_x, across_y, pixel_q, w_BK)

        waves_x, waves_y = self._waves(qx), self._waves(qy)
        norms_BF, fits = self._transform(waves_x, waves_y, qz, w_BK, True)
        agreement = []
        for fit_BK in fits:
            positive = fit_BK.clamp(min=0.0) * w_BK
            best = (positive ** 4).sum(1, keepdim=True) \
                / (positive ** 3).sum(1, keepdim=True).clamp(min=1e-20)
            fit_BK = fit_BK / best.clamp(min=1e-12)
            outer = w_BK * (q_BK > 0.2).float()
            near = (1 - (fit_BK[:, :, None] * 10 + 2 - self.bins).abs()).clamp(min=0.0)
            agreement.append((near * w_BK[:, :, None]).sum(1) / sum_w)
            agreement += [mean(fit_BK, w_BK), mean(fit_BK * fit_BK, w_BK), mean(fit_BK, outer),
                          mean(fit_BK * fit_BK, outer)]
        left_BK = w_BK * (1 - 1.5 * fit_BK.clamp(min=0.0)).clamp(0.0, 1.0)
        left = left_BK.sum(1, keepdim=True)
        norms_left_BF, _ = self._transform(waves_x, waves_y, qz, left_BK, False)
        return torch.cat([*frame, *shapes, *pairs, norms_BF, *agreement, left / sum_w,
                          left.clamp(min=0.3).log(), norms_left_BF], 1)

    def _shapes(self, patch_BKP: Tensor, across_x: Tensor, across_y: Tensor, q_BK: Tensor,
                wide_BK: Tensor, strong_BK: Tensor) -> list[Tensor]:
        """Mean squares of the widths along and across the radius, and shares of long spots."""
        photons = patch_BKP * patch_BKP
        total = photons.sum(2).clamp(min=1e-3)
        xx = (photons * self.finder.column ** 2).sum(2) / total
        yy = (photons * self.finder.row ** 2).sum(2) / total
        xy = (photons * (self.finder.column * self.finder.row)).sum(2) / total
        along = xx * across_x ** 2 + yy * across_y ** 2 + 2 * xy * across_x * across_y
        across = xx + yy - along
        far_BK = strong_BK * (q_BK / 0.3)
        count = strong_BK.sum(1, keepdim=True).clamp(min=1.0)
        aspect = (across / along.clamp(min=0.05)).clamp(0.2, 4.0)
        return [mean(along, strong_BK), mean(across, strong_BK), mean(along, far_BK),
                mean(across, far_BK), mean(along ** 2, strong_BK), mean(across ** 2, strong_BK),
                mean(wide_BK, strong_BK),
                *(((aspect > least).float() * strong_BK).sum(1, keepdim=True) / count
                  for least in ASPECTS)]

    def _pairs(self, qx: Tensor, qy: Tensor, qz: Tensor, q_BK: Tensor, across_x: Tensor,
               across_y: Tensor, pixel_q: Tensor, w_BK: Tensor) -> list[Tensor]:
        """Histograms of distances, and of turns about the beam, and nearest neighbours."""
        sum_w = w_BK.sum(1, keepdim=True).clamp(min=1.0)
        dx, dy, dz = (v[:, :, None] - v[:, None] for v in (qx, qy, qz))
        apart = (dx * dx + dy * dy + dz * dz).clamp(min=1e-12).sqrt()
        both = w_BK[:, :, None] * w_BK[:, None] * self.others
        length = q_BK.clamp(min=0.02)[:, :, None]
        turned = (dy * across_x[:, :, None] - dx * across_y[:, :, None]).abs()
        outwards = (dx * across_x[:, :, None] + dy * across_y[:, :, None]).abs()
        close = both * (1 - outwards / pixel_q[:, :, None] / 1.5).clamp(0.0, 1.0) \
            * (turned > outwards).float()
        found = [histogram(apart, both, PAIRS, sum_w),
                 histogram(turned / length, close, radians(TURNS_DEG), sum_w)]
        alone = 99.0 * (1 - (w_BK > 0.3).float()[:, None] * self.others)
        for measure, limits in ((apart, NEAR), (apart / length, radians(NEAR_DEG))):
            nearest_BK = (measure + alone).amin(2)
            below = (nearest_BK[:, :, None] < nearest_BK.new_tensor(limits)).float()
            found.append((below * w_BK[:, :, None]).sum(1) / sum_w)
        return found

    def _waves(self, q_BK: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of 2 pi q t along an axis, (B, K, T)."""
        return turns(q_BK[:, :, None] * self.t)

    def _transform(self, waves_x: tuple[Tensor, Tensor], waves_y: tuple[Tensor, Tensor],
                   qz: Tensor, w_BK: Tensor, back: bool) -> tuple[Tensor, list[Tensor]]:
        """Logarithms of the p-norms of |S| in shells (B, F), and with ``back`` how well each spot
        fits in (short, long) t."""
        share_BK1 = (w_BK / w_BK.sum(1, keepdim=True).clamp(min=1.0))[:, :, None]
        k, shells = self.spots, len(SHELLS) - 1
        sums = [torch.zeros_like(qz[:, :shells])] * NORMS
        fits = [torch.zeros_like(qz)] * 2 if back else []
        for number, inside in enumerate(self.groups):
            cos_z, sin_z = turns(qz[:, :, None] * self.get_buffer(f"z{number}"))
            cos_z, sin_z = cos_z[..., None], sin_z[..., None]
            cos_y, sin_y = (v[:, :, None, inside] for v in waves_y)
            cos_x, sin_x = (v[:, :, inside] for v in waves_x)
            yz = torch.cat([(cos_y * cos_z - sin_y * sin_z).flatten(2),
                            (cos_y * sin_z + sin_y * cos_z).flatten(2)], 1)
            re_x, im_x = cos_x * share_BK1, sin_x * share_BK1
            columns_ZTM = self.get_buffer(f"columns{number}")
            planes, n = columns_ZTM.shape[:2]
            s = yz.transpose(1, 2) @ torch.cat([torch.cat([re_x, im_x], 2),
                                                torch.cat([-im_x, re_x], 2)], 1)
            s = s.reshape(-1, planes, n, 2 * n)
            re, im = s[..., :n], s[..., n:]
            square = re * re + im * im
            power = square
            for order in range(NORMS):
                halves = ((power @ columns_ZTM) * self.get_buffer(f"rows{number}")).sum((1, 2))
                sums[order] = sums[order] + halves[:, :shells] + halves[:, shells:]
                if order < NORMS - 1:
                    power = power * power
            if not back:
                continue
            sharp = square * square * square
            core, short, whole = (sharp * box_ZT[:, None] * box_ZT[:, :, None]
                                  for box_ZT in self.get_buffer(f"boxes{number}").unbind(0))
            for part, chosen in enumerate((short - core, whole - short)):
                m = yz @ torch.cat([chosen * re, chosen * im], 3).flatten(1, 2)
                fits[part] = fits[part] + ((m[:, :k, :n] + m[:, k:, n:]) * cos_x
                                           + (m[:, :k, n:] - m[:, k:, :n]) * sin_x).sum(2)
        norms = [(total / self.volume).clamp(min=1e-30).pow(0.5 ** order).clamp(min=1e-7).log()
                 for order, total in enumerate(sums)]
        return torch.cat(norms, 1), fits


def turns(cycles: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of so many turns; whole ones are taken off first, for accuracy."""
    angle = 2 * math.pi * (cycles - torch.round(cycles))
    return angle.cos(), angle.sin()


def mean(values_BK: Tensor, w_BK: Tensor) -> Tensor:
    """Weighted mean (B, 1); towards 0 where the weights sum to less than one spot."""
    return (values_BK * w_BK).sum(1, keepdim=True) / w_BK.sum(1, keepdim=True).clamp(min=1.0)


def histogram(values: Tensor, weights: Tensor, limits: Sequence[float],
              norm_B1: Tensor) -> Tensor:
    """Weighted counts (B, number of limits) of (B, K, K) values below each limit and above the one
    before."""
    below = torch.stack([(weights * (values < limit).float()).sum((1, 2)) for limit in limits], 1)
    return torch.cat([below[:, :1], below[:, 1:] - below[:, :-1]], 1) / norm_B1


def radians(degrees: Sequence[float]) -> list[float]:
    return [math.radians(value) for value in degrees]
