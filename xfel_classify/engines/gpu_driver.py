"""The CUDA driver through ctypes: is there a GPU, which one is mine, and what others lack.

Asked before TensorRT or pycuda are imported: some TensorRT versions end the whole process with a
segmentation fault where there is no driver, and no ``except`` catches that.  The calls that pycuda
does not offer (graphs, waiting for another stream, filling memory on a stream) are made here on
the handles of its streams.  Nothing in this module creates a context unless asked to.
"""
from __future__ import annotations

import ctypes
import functools
import os
import stat
from collections.abc import Callable
from ctypes import POINTER, byref, c_char_p, c_float, c_int, c_size_t, c_uint, c_uint64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core import ConfigurationError, EngineError

LIBRARY = "libcuda.so.1"

_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (POINTER(c_int),),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDeviceTotalMem_v2": (POINTER(c_size_t), c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuDevicePrimaryCtxRelease_v2": (c_int,),
    "cuCtxPushCurrent_v2": (c_void_p,),
    "cuCtxPopCurrent_v2": (POINTER(c_void_p),),
    "cuMemGetInfo_v2": (POINTER(c_size_t), POINTER(c_size_t)),
    "cuMemAlloc_v2": (POINTER(c_uint64), c_size_t),
    "cuMemFree_v2": (c_uint64,),
    "cuMemAllocHost_v2": (POINTER(c_void_p), c_size_t),
    "cuMemFreeHost": (c_void_p,),
    "cuMemcpyHtoDAsync_v2": (c_uint64, c_void_p, c_size_t, c_void_p),
    "cuMemcpyDtoHAsync_v2": (c_void_p, c_uint64, c_size_t, c_void_p),
    "cuMemsetD32Async": (c_uint64, c_uint, c_size_t, c_void_p),
    "cuStreamCreate": (POINTER(c_void_p), c_uint),
    "cuStreamDestroy_v2": (c_void_p,),
    "cuStreamSynchronize": (c_void_p,),
    "cuStreamWaitEvent": (c_void_p, c_void_p, c_uint),
    "cuStreamBeginCapture_v2": (c_void_p, c_int),
    "cuStreamEndCapture": (c_void_p, POINTER(c_void_p)),
    "cuGraphInstantiateWithFlags": (POINTER(c_void_p), c_void_p, c_uint64),
    "cuGraphLaunch": (c_void_p, c_void_p),
    "cuGraphExecDestroy": (c_void_p,),
    "cuGraphDestroy": (c_void_p,),
    "cuEventCreate": (POINTER(c_void_p), c_uint),
    "cuEventRecord": (c_void_p, c_void_p),
    "cuEventSynchronize": (c_void_p,),
    "cuEventElapsedTime": (POINTER(c_float), c_void_p, c_void_p),
    "cuEventDestroy_v2": (c_void_p,),
}

_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76
_NON_BLOCKING = 1                       # CU_STREAM_NON_BLOCKING
_BLOCKING_SYNC, _NO_TIMING = 1, 2       # CU_EVENT_*
_THREAD_LOCAL = 1                       # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
_OUT_OF_MEMORY = 2                      # CUDA_ERROR_OUT_OF_MEMORY


class DeviceLost(EngineError):
    """The GPU, or what runs on it, failed in the middle of a run; its answers cannot be trusted."""


@dataclass(frozen=True)
class Device:
    """One GPU as the driver names it; ``capability`` is (major, minor)."""

    index: int
    name: str
    capability: tuple[int, int]
    memory_bytes: int
    handle: int = 0                 # the driver's, as its functions want it

    def __str__(self) -> str:
        return f"GPU {self.index} ({self.name}, {self.memory_bytes / 2**30:.0f} GiB)"


class Driver:
    """An initialised CUDA driver with at least one device.  Errors are ``EngineError``."""

    def __init__(self, library: Any) -> None:
        self._library = library

    def call(self, name: str, *arguments: Any) -> None:
        """Call ``name``; a result other than 0 becomes an ``EngineError`` with CUDA's words."""
        function = getattr(self._library, name)
        if function.argtypes is None:
            function.argtypes = _SIGNATURES[name]
        result = function(*arguments)
        if result:
            advice = ("use a smaller batch, or fewer ranks per GPU" if result == _OUT_OF_MEMORY
                      else "see nvidia-smi and the system log")
            raise EngineError(f"the CUDA call {name} failed with {self.error(result)}; {advice}, "
                              "or run with --backend onnxruntime")

    def error(self, number: int) -> str:
        """``CUDA_ERROR_NAME (number): text``."""
        words = []
        for function in (self._library.cuGetErrorName, self._library.cuGetErrorString):
            text = c_char_p()
            known = function(c_int(number), byref(text)) == 0 and text.value
            words.append(text.value.decode() if known and text.value else "")
        return f"{words[0] or 'error'} ({number})" + (f": {words[1]}" if words[1] else "")

    @property
    def version(self) -> int:
        """Newest CUDA that the driver serves, as 1000 major + 10 minor."""
        found = c_int()
        self.call("cuDriverGetVersion", byref(found))
        return found.value

    def devices(self) -> list[Device]:
        """The devices this process may use (``CUDA_VISIBLE_DEVICES`` is honoured by CUDA)."""
        count = c_int()
        self.call("cuDeviceGetCount", byref(count))
        return [self._device(index) for index in range(count.value)]

    def _device(self, index: int) -> Device:
        handle, major, minor, size = c_int(), c_int(), c_int(), c_size_t()
        name = ctypes.create_string_buffer(256)
        self.call("cuDeviceGet", byref(handle), index)
        self.call("cuDeviceGetName", name, 256, handle)
        self.call("cuDeviceGetAttribute", byref(major), _CAPABILITY_MAJOR, handle)
        self.call("cuDeviceGetAttribute", byref(minor), _CAPABILITY_MINOR, handle)
        self.call("cuDeviceTotalMem_v2", byref(size), handle)
        return Device(index, name.value.decode(), (major.value, minor.value), size.value,
                      handle.value)

    # --- on the current context ----------------------------------------------------------------

    def free_memory(self) -> tuple[int, int]:
        """(free, total) bytes of the current context's device."""
        free, total = c_size_t(), c_size_t()
        self.call("cuMemGetInfo_v2", byref(free), byref(total))
        return free.value, total.value

    def fill(self, address: int, word: int, nbytes: int, stream: int) -> None:
        """Set device memory to a 32-bit word, in the order of ``stream``."""
        self.call("cuMemsetD32Async", address, word, nbytes // 4, stream)

    def event(self, spin: bool = False, timing: bool = False) -> int:
        """A new event; waiting for it burns the core when ``spin``, sleeps otherwise."""
        found = c_void_p()
        self.call("cuEventCreate", byref(found),
                  (0 if spin else _BLOCKING_SYNC) | (0 if timing else _NO_TIMING))
        return found.value or 0

    def record(self, event: int, stream: int) -> None:
        self.call("cuEventRecord", event, stream)

    def wait_on(self, stream: int, event: int) -> None:
        """Everything put on ``stream`` later waits for ``event``; the caller does not."""
        self.call("cuStreamWaitEvent", stream, event, 0)

    def wait(self, event: int) -> None:
        """Return when ``event`` has happened."""
        self.call("cuEventSynchronize", event)

    def elapsed_ms(self, first: int, second: int) -> float:
        """Milliseconds between two timing events that have happened."""
        found = c_float()
        self.call("cuEventElapsedTime", byref(found), first, second)
        return found.value

    def drop_event(self, event: int) -> None:
        self.call("cuEventDestroy_v2", event)

    def capture(self, stream: int, enqueue: Callable[[], None]) -> Graph:
        """What ``enqueue`` puts on ``stream``, as a graph to be launched again and again."""
        graph, ready = c_void_p(), c_void_p()
        self.call("cuStreamBeginCapture_v2", stream, _THREAD_LOCAL)
        try:
            enqueue()
        except EngineError:
            self._library.cuStreamEndCapture(c_void_p(stream), byref(graph))
            raise
        self.call("cuStreamEndCapture", stream, byref(graph))
        try:
            self.call("cuGraphInstantiateWithFlags", byref(ready), graph, 0)
        except EngineError:
            self.call("cuGraphDestroy", graph)
            raise
        return Graph(self, graph, ready)


class Graph:
    """A captured sequence of device work."""

    def __init__(self, driver: Driver, graph: c_void_p, ready: c_void_p) -> None:
        self._driver, self._graph, self._ready = driver, graph, ready

    def launch(self, stream: int) -> None:
        self._driver.call("cuGraphLaunch", self._ready, stream)

    def close(self) -> None:
        self._driver.call("cuGraphExecDestroy", self._ready)
        self._driver.call("cuGraphDestroy", self._graph)


# --- is there a GPU ------------------------------------------------------------------------------

@functools.cache
def _open(library: str) -> Driver | str:
    """The driver, or the first cause why no device can be used."""
    try:
        cuda = ctypes.CDLL(library)
    except OSError as error:
        return f"there is no CUDA driver here ({error})"
    driver = Driver(cuda)
    result = cuda.cuInit(c_uint(0))
    if result:
        return f"the CUDA driver does not start: cuInit gives {driver.error(result)}"
    count = c_int()
    result = cuda.cuDeviceGetCount(byref(count))
    if result:
        return f"the CUDA driver cannot list its devices: {driver.error(result)}"
    if count.value < 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        hidden = f" (CUDA_VISIBLE_DEVICES={visible!r})" if visible is not None else ""
        return f"the CUDA driver shows this process no device{hidden}"
    return driver


def no_gpu() -> str:
    """Why no GPU can be used here; "" when one can.  Creates no context."""
    found = _open(LIBRARY)
    return found if isinstance(found, str) else ""


def open_driver() -> Driver:
    """The driver, or an ``EngineError`` with the first cause."""
    found = _open(LIBRARY)
    if isinstance(found, str):
        raise EngineError(f"a GPU was asked for, but {found}; run on a GPU node, or use "
                          "--backend onnxruntime")
    return found


# --- whose GPU -----------------------------------------------------------------------------------

@dataclass(frozen=True)
class Place:
    """Position of this process among the ``ranks`` of its node that work on events."""

    index: int = 0
    ranks: int = 1


_place: Place | None = None

# (index, count) as launchers tell them, where nobody called take_place(): Open MPI, MPICH/Hydra,
# PALS, MVAPICH, Slurm.  They count ranks that only serve others (psana2) as well.
_LAUNCHERS = (("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
              ("MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
              ("PALS_LOCAL_RANKID", "PALS_LOCAL_SIZE"),
              ("MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
              ("SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"))


def take_place(index: int, ranks: int) -> None:
    """Say which of the node's working ranks this process is; the pipeline calls it once."""
    global _place
    _place = Place(index, ranks)


def place() -> Place:
    """The place taken, else what the launcher's environment tells, else alone."""
    if _place is not None:
        return _place
    for index, count in _LAUNCHERS:
        if os.environ.get(index, "").isdigit():
            mine = int(os.environ[index])
            all_of_them = os.environ.get(count, "")
            return Place(mine, int(all_of_them) if all_of_them.isdigit() else mine + 1)
    return Place()


def choose_device(devices: list[Device], asked: str | None, here: Place) -> Device:
    """The device for this process: ``asked`` ("cuda:1"), else the ranks of a node take turns.

    Where the batch system shows each task only its own GPU (Slurm's ``--gpus-per-task``), that
    one is number 0 and everybody's choice.
    """
    if asked in (None, "cuda", "gpu"):
        return devices[here.index % len(devices)]
    kind, _, number = str(asked).partition(":")
    if kind not in ("cuda", "gpu") or not number.isdigit():
        raise ConfigurationError(f"device {asked!r} is no GPU; say \"cuda\" to let the ranks of a "
                                 "node share its GPUs, or \"cuda:0\" for a certain one")
    if int(number) >= len(devices):
        raise EngineError(f"device {asked!r} was asked for, this process sees {len(devices)}: "
                          f"{', '.join(map(str, devices))}; leave the device out to share them")
    return devices[int(number)]


def ranks_per_gpu(devices: int, asked: str | None, here: Place) -> int:
    """How many working ranks of the node share one GPU at most."""
    if asked not in (None, "cuda", "gpu"):
        return here.ranks
    on_node = os.environ.get("SLURM_GPUS_ON_NODE", "")
    gpus = max(devices, int(on_node) if on_node.isdigit() else 0)
    return -(-here.ranks // gpus)


def mps_pipe() -> str:
    """The pipe of a running MPS control daemon, or "" when there is none."""
    folder = Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY") or "/tmp/nvidia-mps")
    control = folder / "control"
    try:
        mode = control.stat().st_mode
    except OSError:
        return ""
    return str(folder) if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) else ""


def check_budget(device: Device, need_bytes: int, ranks: int, free_bytes: int,
                 still_bytes: int) -> None:
    """Refuse when the ranks of one GPU do not fit on it together.

    ``need_bytes`` is one rank's share with its context; of it, ``still_bytes`` are not yet
    allocated while ``free_bytes`` are free.  The whole memory bounds the number of ranks, the
    free memory this one: other programs may use the GPU.
    """
    fit = int(0.95 * device.memory_bytes) // need_bytes
    if ranks > fit:
        raise EngineError(
            f"{ranks} ranks share {device}, each needs {need_bytes / 2**20:.0f} MiB: at most "
            f"{fit} fit; start fewer ranks per node, or use a smaller batch")
    if still_bytes > free_bytes:
        raise EngineError(
            f"{device} has {free_bytes / 2**20:.0f} MiB free, this rank needs another "
            f"{still_bytes / 2**20:.0f} MiB: other processes use the rest; see nvidia-smi, use a "
            "smaller batch, or another GPU")


CONTEXT_BYTES = 600 << 20
"""Memory that a context with its kernels takes besides what is asked for; an upper guess."""
