"""FAKES of a CUDA driver, pycuda and TensorRT, for tests of the order of calls only.

Nothing here is a GPU.  Streams are queues that run when somebody waits, so work that was not
waited for is seen to be missing; device memory is bytes under made-up addresses; a "plan" is the
ONNX file, run by ONNX Runtime.  ``journal`` holds the calls in order.
"""
from __future__ import annotations

import ctypes
import enum
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from xfel_classify.engines import gpu_driver
from xfel_classify.engines import tensorrt as engine_module
from xfel_classify.engines.gpu_driver import Driver


class FakeCuda:
    """The functions of ``libcuda`` that the package calls, as Python."""

    def __init__(self, devices: int = 1, memory: int = 1 << 34) -> None:
        self.devices, self.memory, self.free = devices, memory, memory
        self.journal: list[str] = []
        self.blocks: dict[int, bytearray] = {}
        self.host: dict[int, Any] = {}
        self.queues: dict[int, list] = {}
        self.done: set[int] = set()             # records that have run
        self.events: dict[int, int | None] = {}     # event -> its latest record
        self.records: dict[int, int] = {}       # record -> stream
        self.graphs: dict[int, list] = {}
        self.capturing: int | None = None
        self.stack: list[int] = []
        self.retained = 0
        self.fails: dict[str, int] = {}         # function -> CUDA error
        self._next = 1 << 40

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)

        def call(*arguments: Any) -> int:
            if name in self.fails:
                return self.fails[name]
            plain = [a.value if isinstance(a, ctypes._SimpleCData) else a for a in arguments]
            self.journal.append(name)
            return getattr(self, f"_{name}")(*plain) or 0

        call.argtypes = ()                      # type: ignore[attr-defined]
        return call

    def new(self, step: int = 256) -> int:
        self._next += step
        return self._next

    @staticmethod
    def put(reference: Any, value: Any) -> None:
        reference._obj.value = value

    def enqueue(self, stream: int, what: tuple) -> None:
        if self.capturing == stream:
            self.graphs[0].append(what)
        else:
            self.queues[stream].append(what)

    def run(self, stream: int, until: int | None = None) -> None:
        while self.queues[stream] and (until is None or until not in self.done):
            kind, *rest = self.queues[stream].pop(0)
            if kind == "do":
                rest[0]()
            elif kind == "record":
                self.done.add(rest[0])
            elif kind == "wait" and rest[0] is not None and rest[0] not in self.done:
                self.run(self.records[rest[0]], rest[0])

    def load(self, address: int, nbytes: int) -> bytes:
        return bytes(self.blocks[address][:nbytes])

    def store(self, address: int, content: bytes) -> None:
        self.blocks[address][:len(content)] = content

    # --- what the driver does -------------------------------------------------------------------

    def _cuInit(self, flags: int) -> None: ...

    def _cuGetErrorName(self, number: int, to: Any) -> None:
        self.put(to, b"CUDA_ERROR_FAKE")

    def _cuGetErrorString(self, number: int, to: Any) -> None:
        self.put(to, b"made up by the test")

    def _cuDriverGetVersion(self, to: Any) -> None:
        self.put(to, 13000)

    def _cuDeviceGetCount(self, to: Any) -> None:
        self.put(to, self.devices)

    def _cuDeviceGet(self, to: Any, index: int) -> None:
        self.put(to, index)

    def _cuDeviceGetName(self, to: Any, size: int, device: int) -> None:
        to.value = b"FAKE GPU"

    def _cuDeviceGetAttribute(self, to: Any, which: int, device: int) -> None:
        self.put(to, {75: 9, 76: 0}[which])

    def _cuDeviceTotalMem_v2(self, to: Any, device: int) -> None:
        self.put(to, self.memory)

    def _cuDevicePrimaryCtxRetain(self, to: Any, device: int) -> None:
        self.retained += 1
        self.put(to, 77)

    def _cuDevicePrimaryCtxRelease_v2(self, device: int) -> None:
        self.retained -= 1

    def _cuCtxPushCurrent_v2(self, context: int) -> None:
        self.stack.append(context)

    def _cuCtxPopCurrent_v2(self, to: Any) -> None:
        self.put(to, self.stack.pop())

    def _cuMemGetInfo_v2(self, free: Any, total: Any) -> None:
        self.put(free, self.free)
        self.put(total, self.memory)

    def _cuMemAlloc_v2(self, to: Any, nbytes: int) -> None:
        address = self.new(nbytes)
        self.blocks[address] = bytearray(nbytes)
        self.put(to, address)

    def _cuMemFree_v2(self, address: int) -> None:
        del self.blocks[address]

    def _cuMemAllocHost_v2(self, to: Any, nbytes: int) -> None:
        block = ctypes.create_string_buffer(nbytes)
        self.host[ctypes.addressof(block)] = block
        self.put(to, ctypes.addressof(block))

    def _cuMemFreeHost(self, address: int) -> None:
        del self.host[address]

    def _cuMemcpyHtoDAsync_v2(self, device: int, host: int, nbytes: int, stream: int) -> None:
        self.enqueue(stream, ("do", lambda: self.store(device, ctypes.string_at(host, nbytes))))

    def _cuMemcpyDtoHAsync_v2(self, host: int, device: int, nbytes: int, stream: int) -> None:
        self.enqueue(stream, ("do", lambda: ctypes.memmove(host, self.load(device, nbytes),
                                                           nbytes)))

    def _cuMemsetD32Async(self, device: int, word: int, count: int, stream: int) -> None:
        content = np.full(count, word, np.uint32).tobytes()
        self.enqueue(stream, ("do", lambda: self.store(device, content)))

    def _cuStreamCreate(self, to: Any, flags: int) -> None:
        assert flags == 1, "only streams that do not wait for the default stream"
        stream = self.new()
        self.queues[stream] = []
        self.put(to, stream)

    def _cuStreamDestroy_v2(self, stream: int) -> None:
        del self.queues[stream]

    def _cuStreamSynchronize(self, stream: int) -> None:
        self.run(stream)

    def _cuStreamWaitEvent(self, stream: int, event: int, flags: int) -> None:
        self.enqueue(stream, ("wait", self.events[event]))

    def _cuStreamBeginCapture_v2(self, stream: int, mode: int) -> None:
        self.capturing = stream
        self.graphs[0] = []

    def _cuStreamEndCapture(self, stream: int, to: Any) -> None:
        self.capturing = None
        graph = self.new()
        self.graphs[graph] = self.graphs.pop(0)
        self.put(to, graph)

    def _cuGraphInstantiateWithFlags(self, to: Any, graph: int, flags: int) -> None:
        self.put(to, graph)

    def _cuGraphLaunch(self, graph: int, stream: int) -> None:
        for what in self.graphs[graph]:
            self.enqueue(stream, what)

    def _cuGraphExecDestroy(self, graph: int) -> None: ...

    def _cuGraphDestroy(self, graph: int) -> None:
        del self.graphs[graph]

    def _cuEventCreate(self, to: Any, flags: int) -> None:
        event = self.new()
        self.events[event] = None
        self.put(to, event)

    def _cuEventRecord(self, event: int, stream: int) -> None:
        record = self.new()
        self.events[event], self.records[record] = record, stream
        self.enqueue(stream, ("record", record))

    def _cuEventSynchronize(self, event: int) -> None:
        record = self.events[event]
        if record is not None and record not in self.done:
            self.run(self.records[record], record)

    def _cuEventDestroy_v2(self, event: int) -> None:
        del self.events[event]

    def nothing_left(self) -> bool:
        """True when everything that was taken has been given back."""
        return not (self.blocks or self.host or self.queues or self.graphs or self.events
                    or self.stack or self.retained)


class FakeDriver(Driver):
    """The package's own Driver over the fake."""

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__(cuda)
        self.cuda = cuda


# --- pycuda ------------------------------------------------------------------------------------

def fake_pycuda(cuda: FakeCuda) -> Any:
    """A module with what the package uses of ``pycuda.driver``."""

    class Error(Exception):
        pass

    def checked(function: str, *arguments: Any) -> None:
        if getattr(cuda, function)(*arguments):
            raise Error(f"{function} failed")

    class Context:
        def __init__(self) -> None:
            self._thread = threading.get_ident()

        def push(self) -> None:
            checked("cuCtxPushCurrent_v2", 77)

        @staticmethod
        def pop() -> None:
            checked("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

        def detach(self) -> None:               # with the habits of the real one
            if threading.get_ident() == self._thread:
                self.push()
                checked("cuDevicePrimaryCtxRelease_v2", 0)

    class Device:
        def __init__(self, index: int) -> None:
            self.index = index

        def retain_primary_context(self) -> Context:
            checked("cuDevicePrimaryCtxRetain", ctypes.byref(ctypes.c_void_p()), self.index)
            return Context()

    class Stream:
        def __init__(self, flags: int) -> None:
            found = ctypes.c_void_p()
            checked("cuStreamCreate", ctypes.byref(found), flags)
            self.handle = found.value

        def synchronize(self) -> None:
            checked("cuStreamSynchronize", self.handle)

        def __del__(self) -> None:
            checked("cuStreamDestroy_v2", self.handle)

    class Allocation:
        def __init__(self, nbytes: int) -> None:
            found = ctypes.c_uint64()
            checked("cuMemAlloc_v2", ctypes.byref(found), nbytes)
            self.address = found.value

        def __int__(self) -> int:
            return self.address

        def free(self) -> None:
            checked("cuMemFree_v2", self.address)

    return SimpleNamespace(
        Error=Error, Context=Context, Device=Device, Stream=Stream, mem_alloc=Allocation,
        init=lambda: cuda.journal.append("pycuda init"), pagelocked_zeros=np.zeros,
        memcpy_htod_async=lambda to, host, stream: checked(
            "cuMemcpyHtoDAsync_v2", to, host.ctypes.data, host.nbytes, stream.handle),
        memcpy_dtoh_async=lambda host, device, stream: checked(
            "cuMemcpyDtoHAsync_v2", host.ctypes.data, device, host.nbytes, stream.handle))


# --- TensorRT ----------------------------------------------------------------------------------

# What each version's enums hold, as found by looking at the real modules.
VERSIONS: dict[str, dict[str, list[str]]] = {
    "8.6": {"network": ["EXPLICIT_BATCH"], "builder": ["FP16", "INT8", "TF32",
                                                       "OBEY_PRECISION_CONSTRAINTS"],
            "tactics": ["CUBLAS", "CUBLAS_LT", "CUDNN", "JIT_CONVOLUTIONS"]},
    "10": {"network": ["EXPLICIT_BATCH", "STRONGLY_TYPED"],
           "builder": ["FP16", "INT8", "BF16", "FP8", "TF32"],
           "tactics": ["CUBLAS", "CUBLAS_LT", "CUDNN", "JIT_CONVOLUTIONS"]},
    "11": {"network": ["STRONGLY_TYPED"], "builder": ["TF32"],
           "tactics": ["EDGE_MASK_CONVOLUTIONS"]},
    "rtx": {"network": ["STRONGLY_TYPED"], "builder": ["TF32", "DISTRIBUTIVE_INDEPENDENCE"],
            "tactics": []},
}


class FakeTensorRT:
    """A module ``tensorrt`` of one of :data:`VERSIONS` over a :class:`FakeCuda`."""

    def __init__(self, cuda: FakeCuda, version: str = "11") -> None:
        has = VERSIONS[version]
        self.cuda, self.version = cuda, version
        self.__name__ = "tensorrt_rtx" if version == "rtx" else "tensorrt"
        self.__version__ = version
        self.journal = cuda.journal
        self.flags: set[str] = set()
        self.tactics: int | None = None
        self.network_flags = -1
        self.builds = 0
        self.leaves_unwritten = self.gives_zeros = self.refuses = False
        self.noise = 0.0
        self.BuilderFlag = enum.IntEnum("BuilderFlag", has["builder"], start=0)
        self.NetworkDefinitionCreationFlag = enum.IntEnum("Flag", has["network"], start=0)
        self.TacticSource = enum.IntEnum("TacticSource", has["tactics"], start=0)
        self.MemoryPoolType = enum.Enum("MemoryPoolType", ["WORKSPACE"])
        self.TensorIOMode = enum.Enum("TensorIOMode", ["NONE", "INPUT", "OUTPUT"])
        self.DataType = enum.Enum("DataType", ["FLOAT", "HALF"])

        class ILogger:
            Severity = enum.IntEnum("Severity", ["INTERNAL_ERROR", "ERROR", "WARNING", "INFO",
                                                 "VERBOSE"], start=0)

        self.ILogger = ILogger

    # Builder, OnnxParser and Runtime are called like classes
    def Builder(self, logger: Any) -> Any:
        def create_network(flags: int) -> Any:
            self.network_flags = flags
            return SimpleNamespace(content=b"", num_layers=0)

        def build_serialized_network(network: Any, config: Any) -> bytes | None:
            self.journal.append("build")
            self.builds += 1
            assert len(config.profiles) == 1
            head = f"plan of {self.version} of TensorRT\n".encode()
            return None if self.refuses else head + network.content

        return SimpleNamespace(
            create_network=create_network, create_builder_config=lambda: _Config(self),
            create_optimization_profile=lambda: SimpleNamespace(set_shape=lambda *shapes: None),
            build_serialized_network=build_serialized_network)

    def OnnxParser(self, network: Any, logger: Any) -> Any:
        def parse(content: bytes) -> bool:
            import onnx

            graph = onnx.load_model_from_string(content).graph

            def tensor(one: Any) -> Any:
                dims = one.type.tensor_type.shape.dim
                return SimpleNamespace(name=one.name, shape=tuple(
                    d.dim_value if d.dim_value else -1 for d in dims))

            inputs, outputs = [tensor(i) for i in graph.input], [tensor(o) for o in graph.output]
            network.content = content
            network.num_inputs, network.num_outputs = len(inputs), len(outputs)
            network.get_input, network.get_output = inputs.__getitem__, outputs.__getitem__
            return True

        return SimpleNamespace(parse=parse, num_errors=0)

    def Runtime(self, logger: Any) -> Any:
        def deserialize(plan: bytes) -> Any:
            self.journal.append("deserialize")
            head, _, content = plan.partition(b"\n")
            if not head.startswith(f"plan of {self.version} ".encode()):
                return None
            return _Engine(self, content)

        return SimpleNamespace(deserialize_cuda_engine=deserialize)


class _Config:
    def __init__(self, module: FakeTensorRT) -> None:
        self._module = module
        module.flags = {"TF32"}                 # on by default, as in the real ones
        self.profiles: list[Any] = []
        self.builder_optimization_level = 3

    def set_memory_pool_limit(self, pool: Any, limit: int) -> None: ...

    def set_flag(self, flag: Any) -> None:
        self._module.flags.add(flag.name)

    def clear_flag(self, flag: Any) -> None:
        self._module.flags.discard(flag.name)

    def get_tactic_sources(self) -> int:
        return 0b1111

    def set_tactic_sources(self, sources: int) -> None:
        self._module.tactics = sources

    def add_optimization_profile(self, profile: Any) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1


class _Engine:
    def __init__(self, module: FakeTensorRT, content: bytes) -> None:
        import onnxruntime

        self._module = module
        self.session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        self.inputs = [i.name for i in self.session.get_inputs()]
        self.outputs = {o.name: o.shape[1] for o in self.session.get_outputs()}
        self.names = [*self.inputs, *self.outputs]
        self.num_io_tensors = len(self.names)
        self.device_memory_size = 1 << 20

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_mode(self, name: str) -> Any:
        mode = self._module.TensorIOMode
        return mode.INPUT if name in self.inputs else mode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return self._module.DataType.FLOAT

    def create_execution_context(self) -> Any:
        return _Execution(self._module, self)

    def __del__(self) -> None:
        self._module.journal.append("engine freed")


class _Execution:
    def __init__(self, module: FakeTensorRT, engine: _Engine) -> None:
        self._module, self._engine = module, engine
        self.shapes: dict[str, tuple] = {}
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple) -> bool:
        self.shapes[name] = shape
        return True

    def infer_shapes(self) -> list:
        return []

    def get_tensor_shape(self, name: str) -> tuple:
        batch = next(iter(self.shapes.values()))[0]
        return self.shapes.get(name) or (batch, self._engine.outputs[name])

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert self._module.cuda.stack, "no context is current"
        self._module.journal.append("execute")
        if "execute" in self._module.cuda.fails:
            return False
        addresses, shapes = dict(self.addresses), dict(self.shapes)
        self._module.cuda.enqueue(stream, ("do", lambda: self._compute(addresses, shapes)))
        return True

    def _compute(self, addresses: dict, shapes: dict) -> None:
        cuda, module = self._module.cuda, self._module
        given = {name: np.frombuffer(cuda.load(addresses[name], 4 * int(np.prod(shape))),
                                     np.float32).reshape(shape) for name, shape in shapes.items()}
        if module.leaves_unwritten:
            return
        found = self._engine.session.run(list(self._engine.outputs), given)
        for name, values in zip(self._engine.outputs, found, strict=True):
            answer = np.zeros_like(values) if module.gives_zeros else values + module.noise
            cuda.store(addresses[name], answer.astype(np.float32).tobytes())

    def __del__(self) -> None:
        self._module.journal.append("execution freed")


# --- all of it in place ------------------------------------------------------------------------

def install_fakes(monkeypatch: Any, cache: Path) -> Any:
    """Make the package find one fake GPU with everything installed.

    The answer has ``cuda``, ``driver``, ``tensorrt`` and ``install(version)``, which changes the
    version of TensorRT.  Plans go to ``cache``.
    """
    cuda = FakeCuda()
    here = SimpleNamespace(cuda=cuda, driver=FakeDriver(cuda))
    pycuda: Any = ModuleType("pycuda")
    pycuda.driver = fake_pycuda(cuda)
    monkeypatch.setitem(sys.modules, "pycuda", pycuda)
    monkeypatch.setitem(sys.modules, "pycuda.driver", pycuda.driver)
    monkeypatch.setenv("XFEL_CLASSIFY_CACHE", str(cache))
    monkeypatch.setattr(gpu_driver, "_place", None)

    def install(version: str) -> FakeTensorRT:
        here.tensorrt = FakeTensorRT(cuda, version)
        monkeypatch.setattr(engine_module, "find_tensorrt", lambda: here.tensorrt)
        return here.tensorrt

    here.install = install
    install("11")
    monkeypatch.setattr(engine_module, "open_driver", lambda: here.driver)
    monkeypatch.setattr(engine_module, "no_gpu", lambda: "")
    monkeypatch.setattr(engine_module, "installed", lambda: ["tensorrt"])
    return here
