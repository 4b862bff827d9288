"""Simulated frames beside real ones at the same geometry: the figure of docs/simulation.md.

Executed by hand, where the shared real frames are::

    python docs/simulated_beside_real.py ../shared/data/real docs/simulated_beside_real.png

With a third word, "cspad", the figure shows the CSPAD frame too; its licence is not clear, so the
figure that is kept has only its curves.

Cell, wavelength, distance, pixels and gaps are those of the real frame; the background at 3.2
angstrom is the real one, and the crystal as strong that some hundred spots have 30 photons, as in
the real frame; everything else is drawn as for training (preset "training", seed below).  Nothing
in the package is fitted to these frames.
"""
from __future__ import annotations

import csv
import gzip
import io
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import fabio
import h5py
import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from xfel_classify.core import Geometry, Panel
from xfel_classify.detectors import assembled_geometry
from xfel_classify.learn.report_figures import BLUE, GAP, RED
from xfel_classify.learn.report_images import assembly
from xfel_classify.simulate.bragg import HC_EV_A
from xfel_classify.simulate.conditions import Conditions, draw_conditions
from xfel_classify.simulate.crystal import Crystal
from xfel_classify.simulate.sfx import SimulatedRun

SEED = 2013
ADU_PER_PHOTON = 25.0           # of the CSPAD, as the frames' own spot lists assume
REACH = 6                       # pixels of a spot's profile


@dataclass(frozen=True)
class Beside:
    """A frame in photons (P, S, F), 0 where bad, and its spots (panel, fs, ss)."""

    name: str
    photons_PSF: np.ndarray
    good_PSF: np.ndarray
    spots_N3: np.ndarray


def spots_of(path: Path, image: str) -> list[dict[str, str]]:
    with gzip.open(path, "rt") as file:
        return [row for row in csv.DictReader(file) if row["image"] == image]


def thermolysin(directory: Path) -> tuple[Beside, Geometry]:
    """LCLS CXI, CSPAD: the second frame and its geometry, beam along +z."""
    with h5py.File(directory / "cspad_thermolysin.h5") as file:
        raw = file["data"][0].reshape(32, 185, 388).astype(np.float32)
        names = [name.decode() for name in file["panel_name"][:]]
        origin, fast, slow = (file[f"panel_{what}"][:] for what in ("origin", "fast", "slow"))
        wavelength = float(np.ravel(file["wavelength_A"][()])[0])
    pixel, flip = 0.10992e-3, np.array([-1.0, 1.0, -1.0])       # DIALS has the beam along -z
    grid_s, grid_f = np.mgrid[0:185, 0:194]
    x, y = np.zeros((2, *raw.shape), np.float32)
    panels = []
    for name, at_mm, f, s in zip(names, origin, fast, slow, strict=True):
        quad, sensor, asic = (int(n) for n in re.findall(r"[QSA](\d+)", name)[-3:])
        index, first = quad * 8 + sensor, 194 * asic
        # the origin is the outer corner of the first pixel
        corner, f, s = 1e-3 * at_mm * flip, f * flip * pixel, s * flip * pixel
        place = corner + (grid_f[..., None] + 0.5) * f + (grid_s[..., None] + 0.5) * s
        part = (index, slice(None), slice(first, first + 194))
        x[part], y[part] = place[..., 0], place[..., 1]
        panels.append(Panel(name, index, 0, 184, first, first + 193, tuple(corner), tuple(f),
                            tuple(s)))
    good = (raw > -400) & (raw < 16383)
    spots = [(int(row["quad"]) * 8 + int(row["sensor"]), float(row["col"]), float(row["row"]))
             for row in spots_of(directory / "dials_spots.csv.gz",
                                  "idx-20130301060858401.cbf")]
    geometry = Geometry(x, y, np.zeros_like(x), pixel, tuple(panels), 0.1301,
                        HC_EV_A / wavelength, ~good, "cspad")
    return Beside("thermolysin", np.where(good, raw / ADU_PER_PHOTON, 0), good,
                  np.array(spots).reshape(-1, 3)), geometry


def thaumatin(directory: Path, number: str = "14") -> tuple[Beside, Geometry]:
    """Diamond I24, Pilatus3 6M, a still of a grid scan."""
    raw = fabio.open(str(directory / f"thau_3_2_00{number}.cbf.bz2")).data[None].astype(np.float32)
    good = (raw >= 0) & (raw < 1046527)
    geometry = assembled_geometry(raw.shape[1:], 172e-6, (1261.61, 1306.96), 0.351)
    geometry = replace(geometry, bad_PSF=~good, photon_energy_eV=HC_EV_A / 0.96859)
    spots = [(0, float(row["col"]), float(row["row"]))
             for row in spots_of(directory / "dials_spots.csv.gz", f"thau_3_2_00{number}.cbf")]
    return Beside("thaumatin", np.where(good, raw, 0), good,
                  np.array(spots).reshape(-1, 3)), geometry


def simulated(real: Beside, geometry: Geometry, crystal: Crystal, spot_photons: float,
              hit: bool = True, **changes: float) -> Beside:
    """An event of a run at the geometry of ``real``, its background as high at 3.2 angstrom."""
    drawn = draw_conditions(SEED, 1, "training", hit_fraction=float(hit))
    at = replace(drawn, photon_energy_eV=geometry.photon_energy_eV, crystal=crystal,
                 distance_m=geometry.distance_m, pixel_size_m=geometry.pixel_size_m,
                 spot_photons=(spot_photons, 1.01 * spot_photons), streak_chance=0.0,
                 ice_chance=0.0, beam_stop_px=0.0, **changes)
    s, level = radial(real, geometry, at)
    top = float(np.interp(at.ring_s_A, s, level))
    at = replace(at, ring_photons=top, air_photons=3 * top)
    photons, truth = SimulatedRun(at, geometry).event(3)
    kept = truth.photons_N > 30
    return Beside("simulated", photons, real.good_PSF, np.stack(
        [truth.panel_N, truth.fs_N, truth.ss_N], axis=1)[kept])


def radial(frame: Beside, geometry: Geometry, at: Conditions) -> tuple[np.ndarray, np.ndarray]:
    """(1/d, median photons per pixel) in rings."""
    s_PSF = at.inverse_d_A(np.hypot(geometry.x_m_PSF, geometry.y_m_PSF).astype(np.float64))
    edges = np.linspace(0.03, float(s_PSF[frame.good_PSF].max()) * 0.97, 61)
    ring, values = np.digitize(s_PSF[frame.good_PSF], edges), frame.photons_PSF[frame.good_PSF]
    order = np.argsort(ring, kind="stable")
    parts = np.split(values[order], np.searchsorted(ring[order], np.arange(1, len(edges))))
    # of trimmed means: medians of counts are whole numbers
    level = [np.mean(np.sort(part)[:int(0.95 * len(part))]) if len(part) > 50 else np.nan
             for part in parts[1:]]
    return 0.5 * (edges[1:] + edges[:-1]), np.array(level)


def profile(frame: Beside) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(radius in pixels, lower quartile, median, upper quartile) of spots, 1 at the centroid."""
    radii = np.arange(0, REACH - 0.5, 0.5)
    found = []
    for panel, fs, ss in frame.spots_N3:
        p, f, s = int(panel), round(fs), round(ss)
        part = (p, slice(s - REACH, s + REACH + 1), slice(f - REACH, f + REACH + 1))
        piece, good = frame.photons_PSF[part].astype(float), frame.good_PSF[part]
        if min(s, f) < REACH or piece.shape != (2 * REACH + 1,) * 2 or not good.all():
            continue
        row, column = np.mgrid[-REACH:REACH + 1, -REACH:REACH + 1]
        piece -= np.median(piece[np.hypot(row, column) > 4.5])
        core = np.hypot(row, column) < 3.5
        weight = np.where(core, np.clip(piece, 0, None), 0)
        if piece[core].sum() < 60:
            continue
        r = np.hypot(row - (weight * row).sum() / weight.sum(),
                     column - (weight * column).sum() / weight.sum())
        line = np.array([piece[(r >= a - 0.35) & (r < a + 0.35)].mean()
                         if ((r >= a - 0.35) & (r < a + 0.35)).any() else np.nan for a in radii])
        found.append(line / np.nanmax(line[:4]))
    return (radii, *np.nanpercentile(found, (25, 50, 75), axis=0))


def show(axes, frame: Beside, geometry: Geometry, high: float) -> None:
    place = assembly(geometry, 620)
    image = place.image(np.where(frame.good_PSF, frame.photons_PSF, -np.inf))
    axes.imshow(np.sqrt(np.clip(image, 0, high)), extent=place.extent_mm, interpolation="none",
                cmap=colormaps["gray_r"].with_extremes(bad=GAP), vmin=0, vmax=np.sqrt(high))
    axes.set(title=frame.name, xlabel="x / mm", ylabel="y / mm")


def few_colours() -> Image.Image:
    """Greys, and the figure's colours paled in steps: a third of the bytes."""
    pale = [tuple(int(c * share + 255 * (1 - share)) for c in to_rgb(colour))
            for colour in (BLUE, RED, "#666666")
            for share in np.linspace(0.06, 1, 16)]
    greys = [(v, v, v) for v in np.linspace(0, 255, 64).astype(int)]
    palette = Image.new("P", (1, 1))
    palette.putpalette([int(v) for colour in [*greys, to_rgb(GAP), *pale] for v in colour])
    return palette


def to_rgb(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[i:i + 2], 16) for i in (1, 3, 5))


def main(directory: Path, output: Path, cspad: bool = False) -> None:
    rows = []           # sample, real, simulated, geometry, shown, line style
    real, geometry = thermolysin(directory / "cspad_thermolysin")
    crystal = Crystal((92.9, 92.9, 130.4, 90, 90, 120), "6/mmm", "P", structure_seed=1,
                      domain_A=1000.0, mosaicity_deg=0.05)
    ours = simulated(real, geometry, crystal, 45.0, bandwidth=2e-3, extra_B_A2=8.0)
    rows.append(("thermolysin", real, ours, geometry, cspad, "-"))
    crystal = Crystal((58.7, 58.7, 152.3, 90, 90, 90), "4/mmm", "P", structure_seed=2,
                      domain_A=1500.0, mosaicity_deg=0.1)
    for number, name, style in (("14", "thaumatin", "--"), ("16", "thaumatin, miss", ":")):
        real, geometry = thaumatin(directory / "thaumatin_grid", number)
        ours = simulated(real, geometry, crystal, 800.0, hit=number == "14", bandwidth=3e-4,
                         extra_B_A2=18.0)
        rows.append((name, real, ours, geometry, True, style))
    shown = [row for row in rows if row[4]]
    figure = Figure(figsize=(11, 4.9 * len(shown) + 3.2), layout="constrained", dpi=72)
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(shown) + 1, 2, height_ratios=[1.05] * len(shown) + [0.62])
    for axes, (name, real, ours, geometry, _, _) in zip(grid, shown, strict=False):
        show(axes[0], replace(real, name=f"real: {name}"), geometry, 60.0)
        show(axes[1], replace(ours, name=f"simulated: {name}"), geometry, 60.0)
    for name, real, ours, geometry, _, style in rows:
        at = replace(draw_conditions(SEED, 1, "training"), distance_m=geometry.distance_m,
                     photon_energy_eV=geometry.photon_energy_eV)
        for frame, colour, what in ((real, BLUE, "real"), (ours, RED, "simulated")):
            s, level = radial(frame, geometry, at)
            print(f"{name}, {what}: photons per pixel at 1/d", ", ".join(
                f"{at_s} {np.interp(at_s, s, level):.2f}" for at_s in (0.05, 0.1, 0.15, 0.2, 0.28,
                                                                       0.35, 0.4, 0.5)))
            grid[-1, 0].plot(s, level, ls=style, color=colour, label=f"{name}, {what}")
            if len(frame.spots_N3) < 20:
                continue
            radius, low, middle, top = profile(frame)
            grid[-1, 1].plot(radius, middle, ls=style, color=colour, label=f"{name}, {what}")
            grid[-1, 1].fill_between(radius, low, top, color=colour, alpha=0.12, lw=0)
            print(f"{name}, {what}: {len(frame.spots_N3)} spots, half width at half maximum "
                  f"{np.interp(-0.5, -middle, radius):.2f} px")
    grid[-1, 0].set(xlabel="1/d (1/Å)", ylabel="photons per pixel (trimmed mean)",
                    title="radial background", yscale="log")
    grid[-1, 1].set(xlabel="distance from the centroid / pixels", ylim=(-0.05, 1.1),
                    title="spot profile, median and quartiles")
    for axes in grid[-1]:
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    Image.open(drawn).convert("RGB").quantize(palette=few_colours(), dither=Image.Dither.NONE).save(
        output, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), "cspad" in sys.argv[3:])
