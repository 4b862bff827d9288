"""Images of a made-up generator: spots on counting noise, easy to tell apart; and its recipe."""
import numpy as np

RECIPE = """
name = "toy"
version = "0.1"
architecture = "sfx_hit"
summary = "spots or no spots"
seed = 7
detectors = ["generic"]
photon_energy_eV = [9000.0, 10000.0]

[network]
dropout = [0.0, 0.1, 0.1]

[task]
name = "hit"
output = "hit"
classes = ["miss", "hit"]
positive = "hit"

[[data.training]]
preset = "easy"
seed = 1
runs = 2
events = 16

[[data.validation]]
preset = "easy"
seed = 2
runs = 2
events = 8

[[data.test]]
preset = "easy"
seed = 3
runs = 2
events = 6

[data]
generator = "toy"

[optimiser]
kind = "adam"
learning_rate = 0.003
schedule = "cosine"
batch = 8
epochs = 2
"""


def toy_images(run, events):
    """(images_NHW, labels_N): 40 sharp spots on 2 photons per pixel, or only the background."""
    images, labels = [], []
    for event in events:
        rng = np.random.default_rng([run.seed, run.run, event])
        image_HW = rng.poisson(2.0, (350, 350)).astype(np.float32)
        label = int(rng.integers(2))
        if label:
            rows, columns = rng.integers(4, 346, (2, 40))
            image_HW[rows, columns] += 60.0
            image_HW[rows + 1, columns] += 40.0
        images.append(image_HW)
        labels.append(label)
    return np.stack(images), np.array(labels)
