"""Several processes that train one network together, by torch's own DistributedDataParallel.

Started by torch's launcher, which tells every process its rank:

    torchrun --nproc-per-node 4 --no-python xfel-classify train RECIPE.toml -o DIR

Every process takes its share of each minibatch, on a GPU of its own where there are any; gradients
are averaged.  The first one simulates, judges and writes.  Weights equal those of one process to
rounding where the network has no batch normalisation; with one, statistics are shared between
GPUs and, on CPUs, are each process's own.

Axes: B images of a minibatch.
"""
from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core import ConfigurationError

__all__ = ["Team", "join_team"]

PATIENCE = timedelta(hours=6)       # of the others, while the first process simulates


@dataclass(frozen=True)
class Team:
    """This process among those that train together; one alone is a team as well."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0             # on its node

    @property
    def leads(self) -> bool:
        """Whether this is the process that simulates, judges and writes."""
        return self.rank == 0

    def device(self, device: torch.device) -> torch.device:
        """A GPU of this process's own, where ``device`` is one."""
        if self.size == 1 or device.type != "cuda":
            return device
        if self.local_rank >= torch.cuda.device_count():
            raise ConfigurationError(
                f"process {self.local_rank} of this node was to train on a GPU of its own; there "
                f"are {torch.cuda.device_count()}; start as many processes as there are GPUs")
        return torch.device("cuda", self.local_rank)

    def share(self, chosen_B: np.ndarray) -> np.ndarray:
        """This process's part of a minibatch."""
        return chosen_B[self.rank::self.size]

    def check(self, batch: int) -> None:
        """Raise :class:`ConfigurationError` unless the shares of a minibatch are equal."""
        if batch % self.size:
            raise ConfigurationError(
                f"{self.size} processes were to share minibatches of {batch}; gradients are "
                "averaged over equal shares: start a number of processes that divides the batch")

    def wrap(self, network: nn.Module, device: torch.device) -> Any:
        """``network`` as the training calls it; its own weights move."""
        if self.size == 1:
            return network
        if device.type != "cuda":
            return nn.parallel.DistributedDataParallel(network)
        return nn.parallel.DistributedDataParallel(
            nn.SyncBatchNorm.convert_sync_batchnorm(network), device_ids=[device])

    def mean(self, value: Tensor) -> float:
        """Of a number that every process has."""
        if self.size > 1:
            value = value / self.size
            torch.distributed.all_reduce(value)
        return float(value)

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            torch.distributed.barrier()


@contextmanager
def join_team(device: torch.device) -> Iterator[Team]:
    """The team that torch's launcher started, or a team of one."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "MASTER_ADDR" not in os.environ:
        yield Team()
        return
    team = Team(int(os.environ["RANK"]), size, int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda":
        torch.cuda.set_device(team.device(device))
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                         timeout=PATIENCE)
    try:
        yield team
        team.wait()                 # nobody leaves while others still talk to them
    finally:
        torch.distributed.destroy_process_group()
