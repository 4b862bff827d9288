"""Networks whose first part has nothing to learn: it is run once per image, and kept on disk.

Such a network has ``describe(images, geometry) -> (B, F)`` and takes descriptions in place of
images.  A file of images (see :mod:`.shards`) has a neighbour for each first part, named by the
sources of the network and by its options; it is made again when the images have changed.

Axes: N images, B images of a batch, F number of a description.
"""
from __future__ import annotations

import hashlib
import inspect
import logging
import multiprocessing
import os
import zipfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from .networks import build_network

__all__ = ["descriptions"]

log = logging.getLogger(__name__)

AT_ONCE = 8
SHARED = ("_geometry.py", "_spots.py")


def descriptions(architecture: str, options: Mapping[str, Any], paths: Sequence[Path],
                 processes: int = 1) -> np.ndarray:
    """float32 (N, F) of the images of all ``paths``, in order; ``processes`` work on files."""
    network = build_network(architecture, **options)
    mark = _mark(network, options)
    todo = [path for path in paths if _read(path, mark) is None]
    jobs = [(architecture, dict(options), path, mark) for path in todo]
    if processes > 1 and len(todo) > 1:
        with ProcessPoolExecutor(processes,
                                 mp_context=multiprocessing.get_context("spawn")) as pool:
            for done, future in enumerate([pool.submit(_write, *job) for job in jobs], 1):
                log.info("described %s (%d of %d)", future.result(), done, len(todo))
    else:
        for done, job in enumerate(jobs, 1):
            log.info("described %s (%d of %d)", _write(*job), done, len(todo))
    found = [_read(path, mark) for path in paths]
    return np.concatenate([one for one in found if one is not None])


def _mark(network: Any, options: Mapping[str, Any]) -> str:
    """Of everything that decides a description but the images."""
    source = Path(inspect.getfile(type(network)))
    texts = [path.read_bytes() for path in (source, *(source.parent / name for name in SHARED))]
    fixed = {name: options[name] for name in ("size", "spots") if name in options}
    texts.append(repr(sorted(fixed.items())).encode())
    return hashlib.sha256(b"\0".join(texts)).hexdigest()[:12]


def _kept(path: Path, mark: str) -> Path:
    return path.with_name(f"{path.stem}.{mark}.npz")


def _state_of(path: Path) -> list[int]:
    state = path.stat()
    return [state.st_size, state.st_mtime_ns]


def _read(path: Path, mark: str) -> np.ndarray | None:
    """Descriptions of a file that are up to date, or None."""
    try:
        with np.load(_kept(path, mark), allow_pickle=False) as kept:
            return kept["described"] if kept["images"].tolist() == _state_of(path) else None
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        return None


def _write(architecture: str, options: dict[str, Any], path: Path, mark: str) -> str:
    """Describe the images of one file; visible under its name only when complete."""
    torch.set_num_threads(1)
    network = build_network(architecture, **options).eval()
    found = []
    with h5py.File(path) as file, torch.inference_mode():
        images, geometry = file["images"], file["geometry"][:]
        for start in range(0, len(images), AT_ONCE):
            rows = slice(start, start + AT_ONCE)
            found.append(network.describe(
                torch.from_numpy(images[rows].astype(np.float32))[:, None],
                torch.from_numpy(geometry[rows])).numpy())
    unfinished = path.with_name(f".{path.stem}.{mark}.{os.getpid()}.npz")
    np.savez(unfinished, allow_pickle=False, described=np.concatenate(found),
             images=np.array(_state_of(path)))
    unfinished.replace(_kept(path, mark))
    return path.name
