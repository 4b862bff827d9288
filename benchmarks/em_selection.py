"""EM classes side by side: this package and spi-em-class of PyPI, on patterns whose truth is known.

    python benchmarks/em_selection.py [--json FILE] [--patterns N] [--classes K] [--seed S]

Patterns come from closed formulas: spheres with six-fold lobes (single) and pairs of spheres, of
brightness varying tenfold (``tests/mockdata/spi_patterns.py``).  Both programs get the same frames,
annulus, classes, rotations and iterations.  Printed: processor time, purity (share of patterns in
classes whose majority is of their kind), and precision, recall and F1 of the classes that hold
more than half singles, which is what a person would choose.  The row of spi-em-class is left out
where it is not installed (pip install spi-em-class; needs numba); its programs are only called.
"""
from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np

from xfel_classify.learn.em_selection import EmSettings, em_classes, prepared
from xfel_classify.learn.selection_table import judged

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from mockdata.spi_patterns import SIDE, patterns

INNER, OUTER, ROTATIONS, ITERATIONS = 3, 22, 60, 20
PROGRAMS = ("spi_em_create.py", "spi_em_config.py", "spi_em_run.py")

def ours(images: np.ndarray, classes: int, seed: int, log: bool) -> tuple[np.ndarray, float]:
    """(class of each pattern, processor seconds)"""
    start = time.process_time()
    middle = images.shape[1] / 2
    data, x, y = prepared(images, np.ones(images.shape[1:], bool), (middle, middle), 1, INNER,
                          OUTER)
    found = em_classes(data, x, y, EmSettings(classes=classes, rotations=ROTATIONS, log=log,
                                              iterations=ITERATIONS, tolerance=0.0, seed=seed))
    return found.class_N, time.process_time() - start


def spi_em_class(images: np.ndarray, classes: int, log: bool) -> tuple[np.ndarray, float]:
    """The same by the programs of spi-em-class."""
    with tempfile.TemporaryDirectory() as place:
        cxi, store = (Path(place) / name for name in ("in.cxi", "em.h5"))
        with h5py.File(cxi, "w") as file:
            file["cxi_version"] = 140
            part = file.create_group("entry_1/image_1")
            part["data"] = images
            part["mask"] = np.zeros(images.shape[1:], np.int32)
            part["image_center"] = np.array([SIDE / 2 - 0.5, SIDE / 2 - 0.5, 0.0])
        options = ["--q_min", INNER, "--q_max", OUTER, "--num_rot", ROTATIONS, "--num_class",
                   classes, "--friedel", "--logscale" if log else "--no-logscale"]
        before = os.times()
        for program, *arguments in (
                ("spi_em_create.py", "-d", store, cxi),
                ("spi_em_config.py", "-d", store, *options),
                ("spi_em_run.py", "-d", store, ITERATIONS)):
            subprocess.run([sys.executable, str(shutil.which(program)), *map(str, arguments)],
                           check=True, capture_output=True, cwd=place)
        after = os.times()
        seconds = (after.children_user - before.children_user
                   + after.children_system - before.children_system)
        with h5py.File(store) as file:
            class_N = file[f"iter_{ITERATIONS}/classes"][()]
        return np.asarray(class_N).reshape(-1), seconds


def row(name: str, class_N: np.ndarray, single_N: np.ndarray, seconds: float) -> dict:
    mostly = {k: single_N[class_N == k].mean() > 0.5 for k in np.unique(class_N)}
    chosen = np.array([mostly[k] for k in class_N])
    found = judged(name, chosen, single_N)
    return {"name": name, "seconds": round(seconds, 1),
            "purity": round(float((chosen == single_N).mean()), 3),
            "precision": round(found.precision, 3), "recall": round(found.recall, 3),
            "F1": round(found.f1, 3), "classes": len(mostly)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--patterns", type=int, default=600)
    parser.add_argument("--classes", type=int, default=8)
    parser.add_argument("--photons", type=float, default=300.0, help="per pattern, geometric mean")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    images, single = patterns(args.patterns, seed=args.seed, share=0.3, photons=args.photons)
    rows = []
    for log in (False, True):
        scale = "log" if log else "linear"
        rows.append(row(f"xfel_classify, {scale}",
                        *_timed(ours(images, args.classes, args.seed, log), single)))
        if all(shutil.which(program) for program in PROGRAMS):
            rows.append(row(f"spi-em-class, {scale}",
                            *_timed(spi_em_class(images, args.classes, log), single)))
        else:
            print("spi-em-class is not installed: its rows are left out", file=sys.stderr)
    columns = list(rows[0])
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for one in rows:
        print("| " + " | ".join(str(one[column]) for column in columns) + " |")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


def _timed(found: tuple[np.ndarray, float], single: np.ndarray
           ) -> tuple[np.ndarray, np.ndarray, float]:
    return found[0], single, found[1]


if __name__ == "__main__":
    main()
