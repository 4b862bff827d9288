"""Device memory, pinned memory and streams: pycuda's, in the device's primary context.

The seam has five methods (:class:`Memory`: alloc, pinned, h2d, d2h, sync) and a stream, so that
another owner of memory can take over.  :class:`DriverContext` is a second one, through ctypes
alone, for machines where pycuda (which has no wheels) was not compiled.

Only the primary context is used, which TensorRT, torch and cupy share within a process.  Every
thread pushes it for itself, once around a call, and pops it again: nothing stays on a stack that a
thread or the interpreter would find at its end.
"""
from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import byref, c_uint64, c_void_p
from typing import Any, Protocol

import numpy as np

from ..core import EngineError, MissingDependency
from .gpu_driver import Device, Driver

log = logging.getLogger(__name__)


class Memory(Protocol):
    """Memory and one stream of a device; all of it is used with the context current.

    ``stream`` is the driver's handle.  Copies are asynchronous, in the order of the stream.
    """

    stream: int

    def alloc(self, nbytes: int) -> int:
        """Address of new device memory."""

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """A new page-locked array."""

    def h2d(self, device: int, host: np.ndarray) -> None:
        """Copy a pinned array to the device."""

    def d2h(self, host: np.ndarray, device: int) -> None:
        """Copy device memory into a pinned array."""

    def sync(self) -> None:
        """Wait until everything on the stream is done."""


class Context:
    """The primary context of one device; makes :class:`Memory` and frees it again."""

    def __init__(self) -> None:
        self._depth = threading.local()

    def memory(self) -> Any:
        """A :class:`Memory` with a stream of its own."""
        raise NotImplementedError

    def _push(self) -> None:
        raise NotImplementedError

    def _pop(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Let go of the context; memory and streams must be closed before."""
        raise NotImplementedError

    @contextmanager
    def current(self) -> Iterator[None]:
        """The context is this thread's inside; one push however deep the calls are nested."""
        depth = getattr(self._depth, "value", 0)
        if depth == 0:
            self._push()
        self._depth.value = depth + 1
        try:
            yield
        finally:
            self._depth.value = depth
            if depth == 0:
                self._pop()


def open_context(driver: Driver, device: Device, owner: str = "") -> Context:
    """The primary context of ``device``, owned by "pycuda", or by "driver" where that is absent."""
    if owner == "driver":
        return DriverContext(driver, device)
    try:
        return PycudaContext(driver, device)
    except MissingDependency as error:
        if owner:
            raise
        log.info("%s; the CUDA driver is called directly instead", error)
        return DriverContext(driver, device)


# --- pycuda ------------------------------------------------------------------------------------

class PycudaContext(Context):
    """``retain_primary_context``; never ``pycuda.autoinit``, which makes a context of its own."""

    def __init__(self, driver: Driver, device: Device) -> None:
        super().__init__()
        self._driver, self._device = driver, device
        self._thread = threading.get_ident()
        try:
            import pycuda.driver as cuda
        except ImportError as error:
            raise MissingDependency(f"pycuda cannot be imported ({error}); install it where nvcc "
                                    "is: pip install pycuda") from error
        self.cuda = cuda
        with _in_words(cuda, f"opening {device}"):
            cuda.init()
            self._context = cuda.Device(device.index).retain_primary_context()

    def memory(self) -> PycudaMemory:
        return PycudaMemory(self.cuda)

    def _push(self) -> None:
        with _in_words(self.cuda, "making the context current"):
            self._context.push()

    def _pop(self) -> None:
        with _in_words(self.cuda, "giving the context back"):
            self.cuda.Context.pop()

    def close(self) -> None:
        # pycuda's detach() pushes the context, releases it and leaves it on the thread's stack;
        # in another thread than the one that opened it, it does nothing at all
        held = c_void_p()
        self._driver.call("cuDevicePrimaryCtxRetain", byref(held), self._device.handle)
        with _in_words(self.cuda, "closing the context"):
            self._context.detach()
        if threading.get_ident() == self._thread:
            self._driver.call("cuCtxPopCurrent_v2", byref(c_void_p()))
        else:
            self._driver.call("cuDevicePrimaryCtxRelease_v2", self._device.handle)
        self._driver.call("cuDevicePrimaryCtxRelease_v2", self._device.handle)


class PycudaMemory:
    """Memory and a stream by pycuda."""

    def __init__(self, cuda: Any) -> None:
        self._cuda = cuda
        self._device: dict[int, Any] = {}
        self._pinned: list[np.ndarray] = []
        with _in_words(cuda, "creating a stream"):
            self._stream = cuda.Stream(1)       # non-blocking: independent of the default stream
        self.stream = int(self._stream.handle)

    def alloc(self, nbytes: int) -> int:
        with _in_words(self._cuda, f"allocating {nbytes} bytes on the GPU (a smaller batch or "
                       "fewer ranks per GPU need less)"):
            found = self._cuda.mem_alloc(nbytes)
        self._device[int(found)] = found
        return int(found)

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        with _in_words(self._cuda, "allocating page-locked memory"):
            self._pinned.append(self._cuda.pagelocked_zeros(shape, np.dtype(dtype)))
        return self._pinned[-1]

    def h2d(self, device: int, host: np.ndarray) -> None:
        with _in_words(self._cuda, "copying to the GPU"):
            self._cuda.memcpy_htod_async(device, host, self._stream)

    def d2h(self, host: np.ndarray, device: int) -> None:
        with _in_words(self._cuda, "copying from the GPU"):
            self._cuda.memcpy_dtoh_async(host, device, self._stream)

    def sync(self) -> None:
        with _in_words(self._cuda, "waiting for the GPU"):
            self._stream.synchronize()

    def close(self) -> None:
        """Free device memory, pinned memory and the stream, in that order."""
        with _in_words(self._cuda, "freeing GPU memory"):
            for found in self._device.values():
                found.free()
        self._device.clear()
        self._pinned.clear()
        del self._stream


@contextmanager
def _in_words(cuda: Any, what: str) -> Iterator[None]:
    try:
        yield
    except (cuda.Error, RuntimeError, MemoryError) as error:
        raise EngineError(f"{what} failed: {error}; see nvidia-smi, or run with --backend "
                          "onnxruntime") from error


# --- the driver alone ----------------------------------------------------------------------------

class DriverContext(Context):
    """The primary context through the driver's own functions."""

    def __init__(self, driver: Driver, device: Device) -> None:
        super().__init__()
        self._driver, self._device = driver, device
        self._context = c_void_p()
        driver.call("cuDevicePrimaryCtxRetain", byref(self._context), device.handle)

    def memory(self) -> DriverMemory:
        return DriverMemory(self._driver)

    def _push(self) -> None:
        self._driver.call("cuCtxPushCurrent_v2", self._context)

    def _pop(self) -> None:
        self._driver.call("cuCtxPopCurrent_v2", byref(c_void_p()))

    def close(self) -> None:
        self._driver.call("cuDevicePrimaryCtxRelease_v2", self._device.handle)


class DriverMemory:
    """Memory and a stream by the driver's own functions."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._device: list[int] = []
        self._pinned: list[c_void_p] = []
        handle = c_void_p()
        driver.call("cuStreamCreate", byref(handle), 1)     # CU_STREAM_NON_BLOCKING
        self.stream = int(handle.value or 0)

    def alloc(self, nbytes: int) -> int:
        found = c_uint64()
        self._driver.call("cuMemAlloc_v2", byref(found), nbytes)
        self._device.append(found.value)
        return found.value

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        nbytes = max(1, int(np.prod(shape)) * np.dtype(dtype).itemsize)
        found = c_void_p()
        self._driver.call("cuMemAllocHost_v2", byref(found), nbytes)
        self._pinned.append(found)
        block = (ctypes.c_char * nbytes).from_address(found.value or 0)
        array = np.frombuffer(block, dtype, int(np.prod(shape))).reshape(shape)
        array[...] = 0
        return array

    def h2d(self, device: int, host: np.ndarray) -> None:
        self._driver.call("cuMemcpyHtoDAsync_v2", device, host.ctypes.data, host.nbytes,
                          self.stream)

    def d2h(self, host: np.ndarray, device: int) -> None:
        self._driver.call("cuMemcpyDtoHAsync_v2", host.ctypes.data, device, host.nbytes,
                          self.stream)

    def sync(self) -> None:
        self._driver.call("cuStreamSynchronize", self.stream)

    def close(self) -> None:
        """Free device memory, pinned memory and the stream, in that order."""
        for address in self._device:
            self._driver.call("cuMemFree_v2", address)
        for found in self._pinned:
            self._driver.call("cuMemFreeHost", found)
        self._device.clear()
        self._pinned.clear()
        self._driver.call("cuStreamDestroy_v2", self.stream)
