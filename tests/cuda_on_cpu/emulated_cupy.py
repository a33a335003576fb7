"""`emulated()`: an object with as much of the module cupy as the library may use; the rest raises AttributeError."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from . import arrays, streams
from .compiler import missing
from .emulator import Emulator, Operation
from .errors import CompileException, CUDADriverError, CUDARuntimeError, EmulationError, OutOfMemoryError
from .kernels import RawKernel, RawModule
from .memory import PinnedMemory

__all__ = ["emulated"]

DTYPES = (
    "bool_",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "float16",
    "float32",
    "float64",
)

HOST_TO_HOST, HOST_TO_DEVICE, DEVICE_TO_HOST, DEVICE_TO_DEVICE, DEFAULT = range(5)  # cudaMemcpyKind


class _Namespace:
    """Attributes, and for all others an error that says where to add them."""

    def __init__(self, name: str, **attributes: Any) -> None:
        self.__dict__.update(attributes, __name__=name)

    def __getattr__(self, attribute: str) -> Any:
        raise AttributeError(f"{self.__name__}.{attribute} is not in cuda_on_cpu (tests/cuda_on_cpu/emulated_cupy.py)")


def emulated(
    *,
    checked: bool = False,
    schedules: Sequence[str] = ("forward",),
    compute_capability: str = "90",
    late: bool = False,
    step_limit: int = 10**9,
    seed: int = 0,
) -> Any:
    """A new emulated device, as an object that stands for the module cupy.

    checked : find races, bad accesses, reads before writes, overflow, deadlock and endless loops, with their lines
        (some ten times slower)
    schedules : each launch runs under all of them, one after another, and must give the same bytes under each
    compute_capability : "75" to "120"; limits shared memory, and sets __CUDA_ARCH__
    late : streams run as late as events and synchronisations allow, instead of at once
    step_limit : memory accesses, branches and barriers after which a kernel counts as endless (fast builds: barriers)
    seed : of the schedule "shuffled"
    """
    if reason := missing():
        raise EmulationError(reason)
    emulator = Emulator(
        checked=checked,
        schedules=schedules,
        compute_capability=compute_capability,
        late=late,
        step_limit=step_limit,
        seed=seed,
    )
    return _Namespace(
        "cupy",
        __version__="14.0.0",
        emulator=emulator,
        ndarray=arrays.ndarray,
        asarray=partial(arrays.asarray, emulator),
        ascontiguousarray=partial(arrays.asarray, emulator, contiguous=True),
        empty=partial(arrays.empty, emulator),
        zeros=lambda shape, dtype=float: arrays.full(emulator, shape, 0, dtype),
        full=lambda shape, fill_value, dtype: arrays.full(emulator, shape, fill_value, dtype),
        asnumpy=lambda x, **options: x.get(**options) if isinstance(x, arrays.ndarray) else np.asarray(x),
        from_dlpack=partial(arrays.from_dlpack, emulator),
        RawModule=type("RawModule", (RawModule,), {"_emulator": emulator}),
        RawKernel=RawKernel,
        cuda=_cuda(emulator),
        dtype=np.dtype,
        **{name: getattr(np, name) for name in DTYPES},
    )


def _cuda(emulator: Emulator) -> _Namespace:
    return _Namespace(
        "cupy.cuda",
        Stream=emulator.streams.Stream,
        Event=emulator.streams.Event,
        Graph=streams.Graph,
        get_current_stream=lambda device_id=-1: emulator.streams.current,
        get_elapsed_time=streams.get_elapsed_time,
        Device=type("Device", (_Device,), {"_emulator": emulator}),
        alloc_pinned_memory=partial(_allocate_pinned, emulator),
        runtime=_runtime(emulator),
        memory=_Namespace("cupy.cuda.memory", OutOfMemoryError=OutOfMemoryError),
        compiler=_Namespace("cupy.cuda.compiler", CompileException=CompileException),
        driver=_Namespace("cupy.cuda.driver", CUDADriverError=CUDADriverError),
        nvrtc=_Namespace("cupy.cuda.nvrtc", getVersion=lambda: (13, 0)),
        cublas=_Namespace("cupy.cuda.cublas"),
        is_available=lambda: True,
    )


# Devices


def _attributes(emulator: Emulator) -> dict[str, int]:
    """The H100's, but for what the compute capability says."""
    return {
        "MultiProcessorCount": 132,
        "MaxSharedMemoryPerBlock": 48 << 10,
        "MaxSharedMemoryPerBlockOptin": emulator.max_shared_memory,
        "MaxSharedMemoryPerMultiprocessor": emulator.max_shared_memory + 1024,
        "L2CacheSize": 50 << 20,
        "WarpSize": 32,
        "MaxThreadsPerBlock": 1024,
        "MaxThreadsPerMultiProcessor": 2048,
        "MaxRegistersPerBlock": 65536,
        "ClockRate": 1980000,
        "ComputeCapabilityMajor": int(emulator.compute_capability[:-1]),
        "ComputeCapabilityMinor": int(emulator.compute_capability[-1]),
    }


class _Device:
    """As `cupy.cuda.Device`; there is one."""

    _emulator: Emulator

    def __init__(self, device: Any = None) -> None:
        self.id = int(getattr(device, "id", device or 0))
        _check_device(self.id)

    def __int__(self) -> int:
        return self.id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Device) and other.id == self.id

    def __hash__(self) -> int:
        return self.id

    def __enter__(self) -> _Device:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def use(self) -> None:
        """Makes it current, which it is."""

    def synchronize(self) -> None:
        self._emulator.streams.host_waits()

    @property
    def compute_capability(self) -> str:
        return self._emulator.compute_capability

    @property
    def attributes(self) -> dict[str, int]:
        return _attributes(self._emulator)

    @property
    def mem_info(self) -> tuple[int, int]:
        return self._emulator.memory_size - self._emulator.memory.used, self._emulator.memory_size


def _check_device(device: int) -> None:
    if device != 0:
        raise CUDARuntimeError(101, f"there is device 0 only; got {device}")


def _properties(emulator: Emulator, device: int) -> dict[str, Any]:
    _check_device(device)
    attributes = _attributes(emulator)
    return {
        "name": b"cuda_on_cpu",
        "totalGlobalMem": emulator.memory_size,
        "major": attributes["ComputeCapabilityMajor"],
        "minor": attributes["ComputeCapabilityMinor"],
        "multiProcessorCount": attributes["MultiProcessorCount"],
        "sharedMemPerBlock": attributes["MaxSharedMemoryPerBlock"],
        "sharedMemPerBlockOptin": attributes["MaxSharedMemoryPerBlockOptin"],
        "sharedMemPerMultiprocessor": attributes["MaxSharedMemoryPerMultiprocessor"],
        "l2CacheSize": attributes["L2CacheSize"],
        "warpSize": 32,
        "maxThreadsPerBlock": 1024,
    }


# The runtime


def _runtime(emulator: Emulator) -> _Namespace:
    return _Namespace(
        "cupy.cuda.runtime",
        CUDARuntimeError=CUDARuntimeError,
        getDeviceCount=lambda: 1,
        getDevice=lambda: 0,
        setDevice=_check_device,
        driverGetVersion=lambda: 13000,
        runtimeGetVersion=lambda: 13000,
        getDeviceProperties=partial(_properties, emulator),
        deviceSynchronize=emulator.streams.host_waits,
        memcpyAsync=partial(_copy_async, emulator),
        memsetAsync=partial(_set_async, emulator),
        memcpyHostToHost=HOST_TO_HOST,
        memcpyHostToDevice=HOST_TO_DEVICE,
        memcpyDeviceToHost=DEVICE_TO_HOST,
        memcpyDeviceToDevice=DEVICE_TO_DEVICE,
        memcpyDefault=DEFAULT,
        streamCaptureModeGlobal=0,
        streamCaptureModeThreadLocal=1,
        streamCaptureModeRelaxed=2,
        is_hip=False,
    )


def _allocate_pinned(emulator: Emulator, nbytes: int) -> PinnedMemory:
    emulator.streams.forbid_while_capturing("an allocation of pinned memory")
    memory = PinnedMemory(nbytes)
    emulator.pinned.append(weakref.ref(memory))
    return memory


def _copy_async(emulator: Emulator, dst: int, src: int, size: int, kind: int, stream: int) -> None:
    """cudaMemcpyAsync between pointers, each checked against what is allocated."""
    to_device, from_device = kind in (HOST_TO_DEVICE, DEVICE_TO_DEVICE), kind in (DEVICE_TO_HOST, DEVICE_TO_DEVICE)
    target, target_owner = _bytes_at(emulator, dst, size, to_device)
    source, source_owner = _bytes_at(emulator, src, size, from_device)

    def run() -> None:
        target[...] = source
        if to_device:
            emulator.memory.mark_written(target)

    counters = emulator.counters
    if to_device and from_device:
        counters.bytes_on_device += size
    elif to_device:
        counters.bytes_to_device += size
    else:
        counters.bytes_to_host += size
    owners = tuple(owner for owner in (target_owner, source_owner) if owner is not None)
    emulator.streams.submit(Operation("memcpyAsync", run, owners), emulator.streams.by_handle(stream))


def _set_async(emulator: Emulator, ptr: int, value: int, size: int, stream: int) -> None:
    target, owner = _bytes_at(emulator, ptr, size, True)

    def run() -> None:
        target[...] = value & 0xFF
        emulator.memory.mark_written(target)

    emulator.streams.submit(Operation("memsetAsync", run, (owner,)), emulator.streams.by_handle(stream))


def _bytes_at(emulator: Emulator, address: int, size: int, on_device: bool) -> tuple[np.ndarray, Any]:
    """The bytes at a pointer, and what owns them: a device allocation, pinned memory, or for other host memory None."""
    allocation = emulator.memory.find(address, size)
    if on_device:
        if allocation is None:
            raise CUDARuntimeError(1, f"{size} bytes at {address:#x} are not in one living allocation of the device")
        return emulator.memory.at(address, size), allocation
    if allocation is not None:
        raise CUDARuntimeError(1, f"{address:#x} is on the device, where the copy's kind says host")
    return np.frombuffer((ctypes.c_ubyte * size).from_address(address), np.uint8), emulator.pinned_at(address, size)
