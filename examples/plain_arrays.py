"""The network's answer for images that your program already has in memory.

    python plain_arrays.py

The images here are made up: photons of a smooth background, with Bragg-like spots in every
second one. Yours would come from a file, a stream, or another detector's library.
"""
import numpy as np

from xfel_classify import Classifier

rng = np.random.default_rng(95)
images_BHW = rng.poisson(0.3, (6, 500, 600)).astype(np.float32)        # photons per pixel
for image_HW in images_BHW[1::2]:
    for row, column in rng.integers((80, 130), (420, 470), (40, 2)):
        image_HW[row - 1:row + 2, column - 1:column + 2] += rng.poisson(25.0, (3, 3))
good_HW = np.ones((500, 600), bool)
good_HW[240:260] = False                                                # a gap between panels

with Classifier("sfx-hit") as classify:
    # the beam hits the plane at column 300, row 250; the window is cut around that point
    answers = classify(images_BHW, beam_center_px=(300, 250), good=good_HW)

for number, (score, label) in enumerate(zip(answers["hit/score"], answers["hit/label"],
                                            strict=True)):
    print(f"image {number}: score {score:.4f} {'hit' if label else 'miss'}")
