"""What each process of ``test_team`` does; started by torch's launcher, no test itself."""
import sys
from pathlib import Path

import numpy as np
import torch
from mockdata.toy_training import toy_images
from torch import nn

from xfel_classify.learn import datasets
from xfel_classify.learn.team import join_team
from xfel_classify.learn.training import train


def gradients(network, called, images, labels):
    network.zero_grad()
    nn.functional.cross_entropy(called(images), labels).backward()
    return [parameter.grad.clone() for parameter in network.parameters()]


def averaged_gradients_are_those_of_the_whole_batch():
    with join_team(torch.device("cpu")) as team:
        torch.manual_seed(3)
        network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
        images, labels = torch.randn(8, 1, 8, 8), torch.arange(8) % 2
        whole = gradients(network, network, images, labels)
        mine = torch.from_numpy(team.share(np.arange(8)))
        assert (team.size, len(mine)) == (2, 4)
        shared = team.wrap(network, torch.device("cpu"))
        for one, other in zip(gradients(network, shared, images[mine], labels[mine]), whole,
                              strict=True):
            torch.testing.assert_close(one, other)
        assert team.mean(torch.tensor(float(team.rank))) == 0.5
        print("all as expected", flush=True)


if __name__ == "__main__":          # once per process: torch's store knows one group of a name
    what, place = sys.argv[1], Path(sys.argv[2])
    if what == "gradients":
        averaged_gradients_are_those_of_the_whole_batch()
    else:
        datasets.GENERATORS["toy"] = toy_images
        assert len(train(place / "recipe.toml", place / "out", report=print).history) == 2
