"""Ranks: who they are, how work is dealt, how all of them end together.

The only module that imports mpi4py, and only in a process that an MPI launcher started.  A
:class:`World` is what the loop needs of MPI; :data:`SERIAL` is the world of one process and the
test double.
"""
from __future__ import annotations

import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NoReturn, TypeVar

import numpy as np

from ..core import Constants, MissingDependency, XfelClassifyError

T = TypeVar("T")

# Environment variables that launchers set in every rank (Open MPI, MPICH/Hydra, MVAPICH, PALS).
_LAUNCHER_SIZE = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "PALS_SIZE")

# Slots of the shared counters that rank 0 hosts.
_CLAIMED, _DONE, _HITS, _STOP = range(4)


class FailedElsewhere(XfelClassifyError):
    """Rank 0 failed with ``cause`` and says why; this rank ends with the same code, silently."""

    everywhere = True

    def __init__(self, cause: XfelClassifyError) -> None:
        super().__init__(str(cause))
        self.cause = cause


class World:
    """One process on its own; the base of the MPI world."""

    rank = 0
    size = 1

    def __init__(self) -> None:
        self._counters = np.zeros(4, np.int64)

    def reset(self) -> None:
        """Zero the shared counters (collective)."""
        self._counters[:] = 0

    def _fetch_add(self, slot: int, amount: int) -> int:
        before = int(self._counters[slot])
        self._counters[slot] += amount
        return before

    def claim(self, n: int, total: int) -> range:
        """The next at most ``n`` of ``total`` positions that no rank has claimed yet."""
        first = self._fetch_add(_CLAIMED, n)
        return range(min(first, total), min(first + n, total))

    def advance(self, events: int, hits: int) -> None:
        """Count finished events and hits for the progress display."""
        self._fetch_add(_DONE, events)
        if hits:
            self._fetch_add(_HITS, hits)

    def progress(self) -> tuple[int, int]:
        """(finished events, hits) of all ranks."""
        return self._fetch_add(_DONE, 0), self._fetch_add(_HITS, 0)

    def stop(self) -> None:
        """Ask every rank to finish early."""
        self._fetch_add(_STOP, 1)

    def stopping(self) -> bool:
        return self._fetch_add(_STOP, 0) > 0

    def together(self, function: Callable[[], T]) -> T:
        """Run ``function`` on rank 0 and give every rank its result, or end every rank."""
        return function()

    def allgather(self, value: T) -> list[T]:
        return [value]

    def share(self, build: Callable[[], Constants]) -> Constants:
        """The constants that ``build`` makes; one copy per node, whatever the number of ranks."""
        return build()

    def local_place(self, member: bool) -> tuple[int, int]:
        """(position, number) of this rank among the member ranks of its node (collective)."""
        places = self.allgather((socket.gethostname(), bool(member)))
        mine = (places[self.rank][0], True)
        return sum(p == mine for p in places[:self.rank]), sum(p == mine for p in places)

    def barrier(self) -> None:
        """Wait for all ranks without burning a core."""

    def abort(self, code: int) -> NoReturn:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class MPIWorld(World):
    """All ranks of ``MPI.COMM_WORLD``.

    The counters live in a one-sided window on rank 0: a rank claims work with a single
    ``Fetch_and_op`` and no rank is given up to dealing.
    """

    def __init__(self, MPI: Any) -> None:
        super().__init__()
        self._MPI = MPI
        self._comm = MPI.COMM_WORLD.Dup()
        self.rank = self._comm.Get_rank()
        self.size = self._comm.Get_size()
        bytes_here = self._counters.nbytes if self.rank == 0 else 0
        self._window = MPI.Win.Allocate(bytes_here, 8, comm=self._comm)
        if self.rank == 0:
            np.frombuffer(self._window.tomemory(), np.int64)[:] = 0
        self._comm.Barrier()
        self._window.Lock_all()
        self._shared: list[Any] = []

    def reset(self) -> None:
        self.barrier()
        if self.rank == 0:
            for slot in range(len(self._counters)):
                self._fetch_add(slot, -self._fetch_add(slot, 0))
        self.barrier()

    def _fetch_add(self, slot: int, amount: int) -> int:
        before = np.zeros(1, np.int64)
        operation = self._MPI.SUM if amount else self._MPI.NO_OP
        self._window.Fetch_and_op(np.array([amount], np.int64), before, 0, slot, operation)
        self._window.Flush(0)
        return int(before[0])

    def together(self, function: Callable[[], T]) -> T:
        result: Any = None
        failure: XfelClassifyError | None = None
        if self.rank == 0:
            try:
                result = function()
            except XfelClassifyError as error:
                failure = error
        self.barrier()      # a long function leaves the others asleep, not spinning in a broadcast
        result, known = self._comm.bcast((result, failure), root=0)
        if failure is not None:
            failure.everywhere = True
            raise failure
        if known is not None:
            raise FailedElsewhere(known)
        return result

    def share(self, build: Callable[[], Constants]) -> Constants:
        node = self._comm.Split_type(self._MPI.COMM_TYPE_SHARED)
        built: Any = None
        failure: XfelClassifyError | None = None
        if node.Get_rank() == 0:
            try:
                built = build()
            except XfelClassifyError as error:
                failure = error
        arrays, rest = _taken_apart(built) if built is not None else ({}, None)
        layout = {name: (array.dtype.str, array.shape) for name, array in arrays.items()}
        layout, rest, known = node.bcast((layout, rest, failure), root=0)
        if known is not None:
            raise failure or FailedElsewhere(known)
        size = sum(_padded(dtype, shape) for dtype, shape in layout.values())
        # the window lives as long as the process: the arrays are views of it
        window = self._MPI.Win.Allocate_shared(size if node.Get_rank() == 0 else 0, 1, comm=node)
        self._shared.append(window)
        memory, _ = window.Shared_query(0)
        offset, views = 0, {}
        for name, (dtype, shape) in layout.items():
            count = int(np.prod(shape))
            views[name] = np.frombuffer(memory, dtype, count, offset).reshape(shape)
            if node.Get_rank() == 0:
                views[name][...] = arrays[name]
            offset += _padded(dtype, shape)
        node.Barrier()
        for view in views.values():
            view.flags.writeable = False
        return _put_together(views, rest)

    def allgather(self, value: T) -> list[T]:
        return self._comm.allgather(value)

    def barrier(self) -> None:
        request = self._comm.Ibarrier()
        pause = 1e-5
        while not request.Test():
            time.sleep(pause)
            pause = min(2 * pause, 5e-3)

    def abort(self, code: int) -> NoReturn:
        sys.stdout.flush()
        sys.stderr.flush()
        self._MPI.COMM_WORLD.Abort(code)
        os._exit(code)


_GEOMETRY_ARRAYS = ("x_m_PSF", "y_m_PSF", "z_m_PSF", "bad_PSF")
_CONSTANTS_ARRAYS = ("good_PSF", "pedestals_GPSF", "gain_GPSF", "offset_GPSF", "noise_PSF")


def _padded(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of an array, rounded up so that the next one is aligned."""
    return -(-int(np.prod(shape)) * np.dtype(dtype).itemsize // 64) * 64


def _taken_apart(constants: Constants) -> tuple[dict[str, np.ndarray], Constants]:
    """(the large arrays, the constants without them)."""
    arrays = {name: getattr(constants, name) for name in _CONSTANTS_ARRAYS}
    arrays |= {name: getattr(constants.geometry, name) for name in _GEOMETRY_ARRAYS}
    nothing: Any = None
    geometry = replace(constants.geometry, **dict.fromkeys(_GEOMETRY_ARRAYS, nothing))
    bare = replace(constants, geometry=geometry, **dict.fromkeys(_CONSTANTS_ARRAYS, nothing))
    return {name: array for name, array in arrays.items() if array is not None}, bare


def _put_together(arrays: dict[str, Any], bare: Constants) -> Constants:
    geometry = replace(bare.geometry, **{
        name: arrays[name] for name in _GEOMETRY_ARRAYS if name in arrays})
    return replace(bare, geometry=geometry, **{
        name: arrays[name] for name in _CONSTANTS_ARRAYS if name in arrays})


SERIAL = World()
"""The world of a single process."""

_world: World | None = None


def current() -> World:
    """The world if it was asked for already, else that of one process; never starts MPI."""
    return _world or SERIAL


def world() -> World:
    """The world this process was started in; mpi4py is imported only under an MPI launcher."""
    global _world
    if _world is None:
        _world = _launched_world() if launched_ranks() > 1 else World()
    return _world


def launched_ranks() -> int:
    """How many ranks the launcher says it started; 1 without a launcher."""
    for name in _LAUNCHER_SIZE:
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    if "PMIX_RANK" in os.environ:       # srun --mpi=pmix tells the size only in SLURM's words
        return int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    return 1


def _launched_world() -> World:
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise MissingDependency(
            f"started as {launched_ranks()} MPI ranks, but mpi4py cannot be imported ({error}); "
            "install it with: pip install 'xfel-classify[mpi]'"
        ) from error
    if MPI.COMM_WORLD.Get_size() == 1:
        raise MissingDependency(
            f"the launcher started {launched_ranks()} ranks, but mpi4py sees only one: it was "
            "built for another MPI than this mpirun. Reinstall it with the MPI in use: "
            "pip install --force-reinstall --no-binary mpi4py mpi4py"
        )
    return MPIWorld(MPI)


def end_all_on_uncaught_errors() -> None:
    """Make any uncaught error on any rank end all ranks with that traceback.

    Console scripts bypass ``python -m mpi4py``, which would do this, so the entry point installs
    it; psana installs a hook of its own, which the loop's entry replaces.
    """

    def hook(kind: type[BaseException], error: BaseException, where: Any) -> None:
        here = world()
        label = f"[rank {here.rank} of {here.size}] " if here.size > 1 else ""
        text = "".join(traceback.format_exception(kind, error, where))
        sys.stderr.write(f"{label}uncaught error; finished work is kept and --resume "
                         f"continues from it\n{text}")
        here.abort(130 if issubclass(kind, KeyboardInterrupt) else 1)

    sys.excepthook = hook


def end_soon(seconds: float, code: int) -> None:
    """End all ranks with ``code`` unless the process ends by itself within ``seconds``."""

    def watch() -> None:
        time.sleep(seconds)
        sys.stderr.write(f"not finished {seconds:g} s after the interruption: ending all ranks; "
                         "work up to the last checkpoint is kept, --resume continues from it\n")
        world().abort(code)

    threading.Thread(target=watch, daemon=True, name="end-soon").start()
