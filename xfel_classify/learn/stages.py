"""Weights of several epochs in a row, kept beside the best: stages of one training.

[IGN21] select a pattern only if the models of five stages all select it.  Of every ``count``
epochs in a row those whose mean figure of merit is largest are kept, next to the latest, which may
become better ones; ``stage_0004.safetensors`` holds the weights after epoch 4.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ..core import ConfigurationError, OutputDamaged

__all__ = ["best_window", "forget_stages", "keep_stage", "stage_files"]


def best_window(figures: Sequence[float], count: int) -> range:
    """Epochs, numbered from 1, of the ``count`` in a row with the largest mean figure; the later
    ones of equals.  All epochs where there are fewer."""
    if len(figures) <= count:
        return range(1, len(figures) + 1)
    means = np.convolve(np.nan_to_num(figures, nan=-1.0), np.full(count, 1 / count), "valid")
    first = len(means) - 1 - int(np.round(means, 12)[::-1].argmax())
    return range(first + 1, first + 1 + count)


def keep_stage(out: Path, figures: Sequence[float], count: int, save: Callable[[Path], None]
               ) -> None:
    """Keep the weights of the epoch that has just ended, the last of ``figures``; remove those
    that no best window can hold any more."""
    latest = len(figures)
    save(_file(out, latest))
    wanted = {*best_window(figures, count), *range(latest - count + 1, latest + 1)}
    for path in out.glob("stage_*.safetensors"):
        if int(path.stem.removeprefix("stage_")) not in wanted:
            path.unlink()


def stage_files(out: Path, figures: Sequence[float], count: int) -> dict[int, Path]:
    """{epoch: file} of the best window of a finished training.

    Raises :class:`OutputDamaged` where one is missing.
    """
    if count < 1:
        raise ConfigurationError(f"stages of the training in {out} were asked for, whose recipe "
                                 "keeps none; set stages = 5 in [optimiser] and train again")
    found = {epoch: _file(out, epoch) for epoch in best_window(figures, count)}
    missing = [path.name for path in found.values() if not path.exists()]
    if missing:
        raise OutputDamaged(f"training in {out} lacks {', '.join(missing)}; train again with "
                            "--restart")
    return found


def forget_stages(out: Path) -> None:
    for path in out.glob("stage_*.safetensors"):
        path.unlink()


def _file(out: Path, epoch: int) -> Path:
    return out / f"stage_{epoch:04d}.safetensors"
