"""A user's labelled frames as the windows that a model sees, and their division into parts.

Frames of one stretch of a run resemble each other (same jet, same pulse, same hot pixels), so parts
are dealt in blocks of neighbouring events: what is held back is not next to what was learned from,
but at the few borders of blocks.

Axes: N frames in the order of the run, H row, W column.
"""
from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np

from ..analyses.classify import detector_reach_px, photons_scale, suited_window
from ..core import ConfigurationError, Constants, EventSource, EventStatus, Frame, Shard
from ..engines import Model
from ..pipeline.loop import DEFAULT_PHOTON_ENERGY_EV
from ..preprocess import plan_render, render
from .datasets import quantise
from .labels import HIT, MISS, Labels, rows_of

__all__ = ["CHOICE", "HELD_BACK", "PART_NAMES", "TRAINING", "LabelledFrames", "divide",
           "read_labelled"]

log = logging.getLogger(__name__)

TRAINING, CHOICE, HELD_BACK = 0, 1, 2
PART_NAMES = ("training", "choice", "held back")
SHARES = (0.6, 0.15, 0.25)
LEAST_FRAMES, LEAST_OF_A_CLASS = 100, 12
FEW_FRAMES, FEW_OF_A_CLASS = 36, 9          # enough for prototypes
LEAST_IN_PART = 3                   # of each class, in each part
BLOCK_EVENTS, MOST_BLOCKS = 8, 40
DRAWS = 400                         # divisions that are tried for the most even one


@dataclass(frozen=True)
class LabelledFrames:
    """Windows and labels of the labelled events of a run, in the order of the run.

    ``images_NHW`` is float16 as the network sees them; ``label_N`` int8 (1 hit, 0 miss),
    ``index_N`` the position in the run.  ``absent`` labelled events are not in the run,
    ``unusable`` ones have no usable image, ``left_out`` were more than was asked for.
    """

    images_NHW: np.ndarray
    label_N: np.ndarray
    index_N: np.ndarray
    energy_eV: tuple[float, float]
    exp: str
    run: int
    detector_kind: str
    absent: int = 0
    unusable: int = 0
    left_out: int = 0

    def __len__(self) -> int:
        return len(self.label_N)

    @property
    def hits(self) -> int:
        return int((self.label_N == HIT).sum())

    def describe(self) -> str:
        """One line: how many frames, and what became of the other labels."""
        others = [f"{count} {what}" for count, what in (
            (self.absent, "not in the run"), (self.unusable, "without a usable image"),
            (self.left_out, "left out as more than was asked for")) if count]
        return (f"{len(self)} labelled frames of {self.exp} run {self.run}, {self.hits} hits"
                + (f"; {', '.join(others)}" if others else ""))


def read_labelled(source: EventSource, labels: Labels, model: Model,
                  most: int = 3000, few: bool = False) -> LabelledFrames:
    """The windows of the labelled events of an opened source, at most ``most`` of them.

    ``few`` frames are enough where only prototypes are made.

    Only labelled events are read where the labels tell their positions.  When there are more than
    ``most``, some are taken evenly spread over the run.  Raises :class:`ConfigurationError` when
    the labels are of another run, of too few events, or of one class.
    """
    run = source.run
    if (labels.run >= 0 and labels.run != run.run) or (labels.exp and labels.exp != run.exp):
        raise ConfigurationError(
            f"labels {labels.name} are of {labels.exp or 'an unnamed experiment'} run "
            f"{labels.run}, the frames of {run.exp} run {run.run}; give the labels of these "
            "frames, or correct --exp and --set source.run=N")
    require_enough(labels.label_N, f"labels {labels.name} hold", few)
    chosen = np.arange(len(labels))
    if len(labels) > most:
        chosen = np.unique(np.linspace(0, len(labels) - 1, most).round().astype(int))
    known = bool((labels.index_N >= 0).all())
    todo = np.unique(labels.index_N[chosen]) if known else None
    seen, usable = [], []
    windows: list[np.ndarray] = []
    viewer = _Viewer(model, source.constants())
    by_stamp = {int(stamp): n for n, stamp in zip(chosen, labels.timestamp_N[chosen], strict=True)}
    for frame in source.frames(_shard(source, todo)):
        if todo is not None and not _is_in(todo, frame.index):
            continue
        if todo is None and frame.timestamp not in by_stamp:
            continue
        seen.append((frame.index, frame.timestamp))
        window = viewer.window(frame)
        usable.append(window is not None)
        if window is not None:
            windows.append(window)
    index_M, stamp_M = (np.array([one[axis] for one in seen], np.int64) for axis in (0, 1))
    rows_N = rows_of(labels, index_M, stamp_M)[chosen]
    if not (rows_N >= 0).any():
        raise ConfigurationError(
            f"labels {labels.name} name {len(labels)} events by "
            f"{'position and time stamp' if known else 'time stamp'}; none of them is among the "
            f"frames of {run.exp} run {run.run}; give the labels of these frames")
    place_M = np.cumsum(usable) - 1
    there = chosen[rows_N >= 0], rows_N[rows_N >= 0]
    good = np.array(usable)[there[1]]
    which, rows = there[0][good], there[1][good]
    order = np.argsort(index_M[rows], kind="stable")
    which, rows = which[order], rows[order]
    found = LabelledFrames(
        np.stack([windows[place_M[row]] for row in rows]) if len(rows) else np.zeros((0, 1, 1)),
        labels.label_N[which], index_M[rows], viewer.energy_eV, run.exp, run.run,
        run.detector_kind, absent=int((rows_N < 0).sum()), unusable=int((~good).sum()),
        left_out=len(labels) - len(chosen))
    require_enough(found.label_N, f"of the labels {labels.name}, {found.absent} are not in the "
                   f"run and {found.unusable} have no usable image; left are", few)
    return found


def require_enough(label_N: np.ndarray, found: str, few: bool = False) -> None:
    """Raise :class:`ConfigurationError` for too few frames, or nearly all of one class."""
    hits, misses = int((label_N == HIT).sum()), int((label_N == MISS).sum())
    frames, of_a_class = (FEW_FRAMES, FEW_OF_A_CLASS) if few else (LEAST_FRAMES, LEAST_OF_A_CLASS)
    if len(label_N) < frames or min(hits, misses) < of_a_class:
        raise ConfigurationError(
            f"{'prototypes need' if few else 'fine-tuning needs'} at least {frames} labelled "
            f"frames with {of_a_class} hits and {of_a_class} misses; {found} {hits} hits and "
            f"{misses} misses; label more events of the run, of both kinds"
            + ("" if few else f", or take --prototypes, for which {FEW_FRAMES} are enough"))


class _Viewer:
    """Renders frames as the model sees them; remembers the range of photon energies."""

    def __init__(self, model: Model, constants: Constants) -> None:
        self._constants = constants
        self._window = suited_window(model, detector_reach_px(constants))
        self._plan = plan_render(constants, self._window)
        self._low, self._high = np.inf, 0.0

    def window(self, frame: Frame) -> np.ndarray | None:
        """float16 (H, W); None for an event without a usable image."""
        raw = frame.raw_PSF
        if frame.status is not EventStatus.OK or raw is None or raw.shape != self._constants.shape:
            return None
        energy = float(frame.scalars.get("photon_energy_eV", np.nan))
        if not energy > 0:
            energy = self._constants.geometry.photon_energy_eV or DEFAULT_PHOTON_ENERGY_EV
        self._low, self._high = min(self._low, energy), max(self._high, energy)
        window_HW = np.zeros(self._window.shape, np.float32)
        render(raw, self._plan, window_HW,
               scale=photons_scale(self._window, self._constants.unit, energy))
        return quantise(window_HW)

    @property
    def energy_eV(self) -> tuple[float, float]:
        return (self._low, self._high) if self._high else (0.0, 0.0)


def _shard(source: EventSource, todo: np.ndarray | None) -> Shard:
    """All of ``todo`` (or of the run) for this process."""
    total = source.expected_events() if todo is None else len(todo)
    position = 0

    def claim(count: int) -> range:
        nonlocal position
        first = position
        position = first + count if total is None else min(first + count, total)
        return range(first, position)

    return Shard(claim, todo)


def _is_in(sorted_N: np.ndarray, value: int) -> bool:
    at = int(np.searchsorted(sorted_N, value))
    return at < len(sorted_N) and int(sorted_N[at]) == value


# --- parts ----------------------------------------------------------------------------------------

def divide(label_N: np.ndarray, seed: int = 0) -> tuple[np.ndarray, int]:
    """(part of each frame, number of blocks); frames are in the order of the run.

    The run is cut into blocks of equal length, which are dealt to training (60 %), choice (15 %)
    and held back (25 %).  Of :data:`DRAWS` random dealings the one is taken whose parts have the
    most equal shares of hits.  Raises :class:`ConfigurationError` when the hits or the misses are
    so bunched that a part would have fewer than three.
    """
    label_N = np.asarray(label_N)
    count = int(np.clip(len(label_N) // BLOCK_EVENTS, 12, MOST_BLOCKS))
    blocks = np.array_split(np.arange(len(label_N)), count)
    hits_K = np.array([(label_N[block] == HIT).sum() for block in blocks])
    size_K = np.array([len(block) for block in blocks])
    dealt = np.repeat(np.arange(len(SHARES)), _counts(count))
    share = hits_K.sum() / size_K.sum()
    rng = np.random.default_rng([seed, 41])
    best, least = None, np.inf
    for _ in range(DRAWS):
        part_K = rng.permutation(dealt)
        hits = np.bincount(part_K, hits_K, len(SHARES))
        events = np.bincount(part_K, size_K, len(SHARES))
        if min(hits.min(), (events - hits).min()) < LEAST_IN_PART:
            continue
        uneven = float(np.abs(hits / events - share).max())
        if uneven < least:
            best, least = part_K, uneven
    if best is None:
        raise ConfigurationError(
            f"{len(label_N)} labelled frames were to be divided in {count} blocks of neighbouring "
            f"events, each part with at least {LEAST_IN_PART} hits and misses; {int(hits_K.sum())} "
            f"hits lie in {int((hits_K > 0).sum())} of the blocks; label events from more "
            "stretches of the run")
    return np.repeat(best, size_K).astype(np.int8), count


def _counts(blocks: int) -> list[int]:
    choice, held_back = (max(1, round(share * blocks)) for share in SHARES[1:])
    return [blocks - choice - held_back, choice, held_back]
