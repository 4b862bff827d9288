"""The hard pair of docs/single_particles.md: a network beside the best that can be done.

Executed by hand, a minute for 200 images::

    python docs/hard_pair.py --model spi-multi-robust --images 200

Single hits of 7dx8 and 7dx9 (their stand-ins differ by a hinge of 10 degrees), at the fluence of
the study and at 1/10, 1/100 and 1/1000 of it.  "best orientation" and "library" are template
matching with the simulator itself (xfel_classify/learn/template_matching.py), which knows that the
image shows one copy of one of the two; a search fell short where the true orientation is likelier
than the one that was found.  A network is asked about eleven particles and any count; "of the two"
compares its two probabilities only.
"""
from __future__ import annotations

import argparse

import numpy as np

from xfel_classify.engines import find_model, open_engine
from xfel_classify.learn.template_matching import Matching
from xfel_classify.simulate.spi_conditions import SPI_PARTICLES, draw_spi
from xfel_classify.simulate.spi_images import copies_of, simulate_spi

PAIR = ("7dx8", "7dx9")
SEED = 4901             # of no recipe
FAINTER = (1, 10, 100, 1000)


def worse(answer_N: np.ndarray, truth_N: np.ndarray) -> str:
    """Both recalls in percent, the worse one first."""
    recalls = sorted(float((answer_N[truth_N == k] == k).mean()) for k in (0, 1))
    return " / ".join(f"{100 * one:.1f}" for one in recalls)


def network(name: str, images_NHW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Answers of a model: 0 or 1 of the pair (2: another particle), and of the two alone."""
    with open_engine(find_model(name)) as engine:
        found_NK = np.concatenate([engine.infer(images_NHW[start:start + 32])["particle"]
                                   for start in range(0, len(images_NHW), 32)])
    first = SPI_PARTICLES.index(PAIR[0])
    called_N = found_NK.argmax(1) - first
    return np.where((called_N < 0) | (called_N > 1), 2, called_N), \
        found_NK[:, first:first + 2].argmax(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", default=[], help="repeatable")
    parser.add_argument("--images", type=int, default=200, help="per fluence (default: 200)")
    parser.add_argument("--orientations", type=int, default=30_000, help="of the library")
    args = parser.parse_args()
    spacing = np.degrees((8 * np.pi ** 2 / args.orientations) ** (1 / 3))
    print(f"{args.images} single hits per line, seed {SEED}, library of {args.orientations} "
          f"orientations {spacing:.1f} degrees apart; recall, % (worse / better)\n")
    columns = ["photons", "searches that fell short", "best orientation", "library",
               *(f"{name}{more}" for name in args.model for more in ("", ", of the two"))]
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    matching = None
    for fainter in FAINTER:
        preset = f"paper:particles={'+'.join(PAIR)},counts=1,fluence={1 / fainter}"
        drawn = [draw_spi(SEED, 0, event, preset) for event in range(args.images)]
        images_NHW = np.stack([simulate_spi(c) for c in drawn])
        truth_N = np.array([PAIR.index(c.particle) for c in drawn])
        matching = matching or Matching(PAIR, drawn[0], args.orientations)
        found = matching.match(images_NHW)
        short = sum(found.fine_NP[n, k] < matching.log_likelihood(
            images_NHW[n], k, copies_of(c)[0].rotation_33) - 1 for n, (k, c) in enumerate(
                zip(truth_N, drawn, strict=True)))
        cells = [f"{short}", worse(found.fine_NP.argmax(1), truth_N),
                 worse(found.coarse_NP.argmax(1), truth_N)]
        for name in args.model:
            cells += [worse(answer_N, truth_N) for answer_N in network(name, images_NHW)]
        photons = images_NHW.sum(dtype=np.float64) * drawn[0].block ** 2 / len(images_NHW)
        print(f"| {photons:,.0f} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
