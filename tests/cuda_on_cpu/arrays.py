"""Arrays in emulated device memory, with as much of CuPy's interface as the library may use."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from .emulator import Operation

if TYPE_CHECKING:
    from .emulator import Emulator
    from .memory import Allocation

__all__ = ["asarray", "empty", "from_dlpack", "full", "ndarray"]

CUDA_DEVICE = 2  # DLPack's kDLCUDA


class _Flags:
    def __init__(self, view: np.ndarray) -> None:
        self.c_contiguous: bool = view.flags.c_contiguous
        self.f_contiguous: bool = view.flags.f_contiguous


class _Pointer:
    def __init__(self, ptr: int) -> None:
        self.ptr = ptr


class _ArrayDevice:
    id = 0


class ndarray:
    """An array on the device; what is not here raises AttributeError."""

    __array_ufunc__ = None

    def __init__(self, *_: Any, **__: Any) -> None:
        raise TypeError("cuda_on_cpu has no ndarray constructor: use empty, zeros, full or asarray")

    @classmethod
    def _of(cls, emulator: Emulator, allocation: Allocation, view: np.ndarray) -> ndarray:
        array = cls.__new__(cls)
        array._emulator, array._allocation, array._view = emulator, allocation, view
        return array

    def _like(self, view: np.ndarray) -> ndarray:
        return ndarray._of(self._emulator, self._allocation, view)

    # What it is

    shape = property(lambda self: self._view.shape)
    strides = property(lambda self: self._view.strides)
    ndim = property(lambda self: self._view.ndim)
    dtype = property(lambda self: self._view.dtype)
    size = property(lambda self: self._view.size)
    itemsize = property(lambda self: self._view.itemsize)
    nbytes = property(lambda self: self._view.nbytes)
    flags = property(lambda self: _Flags(self._view))
    device = property(lambda self: _ArrayDevice())
    data = property(lambda self: _Pointer(self._view.ctypes.data))

    def __len__(self) -> int:
        return len(self._view)

    def __repr__(self) -> str:
        return f"<device array {self.shape} {self.dtype}>"

    # Views

    def __getitem__(self, key: Any) -> ndarray:
        return self._like(self._view[(*_basic(key), ...)])

    def reshape(self, *shape: Any) -> ndarray:
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        view = self._view.reshape(shape)
        if view.size and not np.may_share_memory(view, self._view):  # it takes a copy, which is the device's work
            return _copy(self).reshape(shape)
        return self._like(view)

    def ravel(self) -> ndarray:
        return self.reshape(-1)

    def view(self, dtype: Any) -> ndarray:
        return self._like(self._view.view(dtype))

    # Work of the device

    def __setitem__(self, key: Any, value: Any) -> None:
        target = self._view[(*_basic(key), ...)]
        if isinstance(value, ndarray):
            source = np.broadcast_to(value._view, target.shape)
            self._emulator.counters.bytes_on_device += target.nbytes
            self._submit("a copy", lambda: np.copyto(target, source, "unsafe"), target, value)
        elif isinstance(value, int | float | bool | np.generic):
            self._submit("a fill", lambda: np.copyto(target, value, "unsafe"), target)
        else:
            raise TypeError(
                f"device arrays are set from device arrays and scalars; got {type(value)}: use cupy.asarray"
            )

    def fill(self, value: Any) -> None:
        self[...] = value

    def astype(self, dtype: Any, copy: bool = True) -> ndarray:
        if not copy and self.dtype == dtype:
            return self
        return _copy(self, dtype)

    def copy(self) -> ndarray:
        return _copy(self)

    def _submit(self, name: str, run: Any, target: np.ndarray, *sources: ndarray) -> None:
        memory = self._emulator.memory

        def run_and_mark() -> None:
            run()
            memory.mark_written(target)

        allocations = (self._allocation, *(source._allocation for source in sources))
        self._emulator.streams.submit(Operation(name, run_and_mark, allocations))

    # To and from the host

    def get(
        self, stream: Any = None, order: str = "C", out: np.ndarray | None = None, blocking: bool = True
    ) -> np.ndarray:
        streams = self._emulator.streams
        stream = stream or streams.current
        streams.forbid_while_capturing("a copy to the host", stream)
        if out is None:
            out = np.empty(self.shape, self.dtype, order)
        elif out.dtype != self.dtype or out.shape != self.shape or not out.flags.c_contiguous:
            raise ValueError(
                f"out must be a C-contiguous array of {self.shape} {self.dtype}; got {out.shape} {out.dtype}"
            )
        self._emulator.counters.bytes_to_host += self.nbytes
        view = self._view
        streams.submit(Operation("a copy to the host", lambda: np.copyto(out, view), (self._allocation,)), stream)
        if blocking:
            streams.host_waits(stream)
        return out

    def set(self, arr: np.ndarray, stream: Any = None) -> None:
        if not isinstance(arr, np.ndarray):
            raise TypeError("Only numpy.ndarray can be set to cupy.ndarray")
        if arr.dtype != self.dtype:
            raise TypeError(f"{arr.dtype} array cannot be set to {self.dtype} array")
        if arr.shape != self.shape:
            raise ValueError(f"Shape mismatch. Old shape: {self.shape}, new shape: {arr.shape}")
        streams = self._emulator.streams
        stream = stream or streams.current
        streams.forbid_while_capturing("a copy from host memory that is not pinned", stream)
        self._emulator.counters.bytes_to_device += self.nbytes
        pinned = self._emulator.pinned_at(arr.ctypes.data, arr.nbytes) is not None
        target, source = self._view, arr if pinned else arr.copy()  # page-locked memory is read when the copy runs
        with stream:
            self._submit("a copy from the host", lambda: np.copyto(target, source), target)

    def item(self) -> Any:
        return self.get().item()

    def tolist(self) -> Any:
        return self.get().tolist()

    def __float__(self) -> float:
        return float(self.get())

    def __int__(self) -> int:
        return int(self.get())

    def __bool__(self) -> bool:
        return bool(self.get())

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise TypeError(
            "Implicit conversion to a NumPy array is not allowed. "
            "Please use `.get()` to construct a NumPy array explicitly."
        )

    # Exchange with other libraries

    def __dlpack__(self, **_: Any) -> Any:
        return self._view.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return (CUDA_DEVICE, 0)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "descr": self.dtype.descr,
            "version": 3,
            "strides": None if self._view.flags.c_contiguous else self.strides,
            "data": (self._view.ctypes.data, False),
            "stream": 1 if self._emulator.streams.current.ptr == 0 else self._emulator.streams.current.ptr,
        }


def _basic(key: Any) -> tuple[Any, ...]:
    """The key as a tuple without a trailing ellipsis, which callers add: so NumPy returns views, never scalars."""
    keys = key if isinstance(key, tuple) else (key,)
    for part in keys:
        if not (part is None or part is Ellipsis or isinstance(part, slice | int | np.integer)) or isinstance(
            part, bool
        ):
            raise IndexError(f"cuda_on_cpu has basic slicing only (integers, slices, ..., None); got {part!r}")
    if sum(part is Ellipsis for part in keys) == 1:
        return _without_ellipsis(keys)
    return keys


def _without_ellipsis(keys: tuple[Any, ...]) -> tuple[Any, ...]:
    return keys[:-1] if keys[-1] is Ellipsis else keys


def empty(emulator: Emulator, shape: Any, dtype: Any = float) -> ndarray:
    shape = (shape,) if isinstance(shape, int | np.integer) else tuple(shape)
    dtype = np.dtype(dtype)
    nbytes = math.prod(shape) * dtype.itemsize
    allocation = emulator.allocate(nbytes)
    return ndarray._of(emulator, allocation, emulator.memory.at(allocation.address, nbytes).view(dtype).reshape(shape))


def full(emulator: Emulator, shape: Any, value: Any, dtype: Any) -> ndarray:
    array = empty(emulator, shape, dtype)
    array.fill(value)
    return array


def _copy(array: ndarray, dtype: Any = None) -> ndarray:
    copied = empty(array._emulator, array.shape, dtype or array.dtype)
    copied[...] = array
    return copied


def asarray(emulator: Emulator, x: Any, dtype: Any = None, *, contiguous: bool = False) -> ndarray:
    """`x` on the device: device arrays, and what exports the CUDA array interface, without a copy where possible."""
    if not isinstance(x, ndarray) and hasattr(x, "__cuda_array_interface__"):
        x = _from_interface(emulator, x.__cuda_array_interface__)
    if isinstance(x, ndarray):
        wanted = x.dtype if dtype is None else np.dtype(dtype)
        return x if x.dtype == wanted and (x.flags.c_contiguous or not contiguous) else _copy(x, wanted)
    host = np.asarray(x, dtype)
    if host.dtype.kind not in "biufc":
        raise ValueError(f"Unsupported dtype {host.dtype}")
    array = empty(emulator, host.shape, host.dtype)
    array.set(host)
    return array


def _from_interface(emulator: Emulator, interface: dict[str, Any]) -> ndarray:
    dtype, shape = np.dtype(interface["typestr"]), tuple(interface["shape"])
    strides = interface.get("strides") or np.empty(shape, dtype).strides
    return _at(emulator, interface["data"][0], dtype, shape, tuple(strides))


def _at(emulator: Emulator, address: int, dtype: np.dtype, shape: tuple[int, ...], strides: tuple[int, ...]) -> ndarray:
    nbytes = 0 if 0 in shape else sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + dtype.itemsize
    allocation = emulator.memory.find(address, nbytes)
    if allocation is None:
        raise ValueError(f"{address:#x} is not an address of this device")
    return ndarray._of(emulator, allocation, np.ndarray(shape, dtype, emulator.memory.at(address, nbytes), 0, strides))


class _HostDLPack:
    """A DLPack exporter that NumPy accepts, for one that says it is on the GPU."""

    def __init__(self, capsule: Any) -> None:
        self._capsule = capsule

    def __dlpack__(self, **_: Any) -> Any:
        return self._capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)


def from_dlpack(emulator: Emulator, x: Any) -> ndarray:
    """A device array that shares the memory of `x`."""
    if x.__dlpack_device__()[0] != CUDA_DEVICE:
        raise TypeError(
            "CPU arrays cannot be directly imported to CuPy. Use `cupy.array(numpy.from_dlpack(input))` instead."
        )
    view = np.from_dlpack(_HostDLPack(x.__dlpack__(stream=emulator.streams.current.ptr or 1)))
    return _at(emulator, view.ctypes.data, view.dtype, view.shape, view.strides)
