"""Arrays of the `numba-cuda` backend: Numba's, in and out without a copy, on their owner's stream.

What offers the CUDA array interface or DLPack comes in as it lies, and so do our arrays go out. An array carries the
stream that it was last written on, if its owner named one (the interface's `stream`); operations go there, and what
they allocate says so in turn. Arrays without one, such as those made here, stand on the default stream, which waits
for the others and they for it.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from numba import cuda as numba_cuda
from numba.cuda.cudadrv import devicearray as numba_arrays

from backprop_gpu.kernels.numba_cuda.device import SIMULATED

__all__ = ["Array", "asarray", "empty", "free_bytes", "is_on_device", "stream_of", "to_host"]

Array: TypeAlias = Any

cuda: Any = numba_cuda
devicearray: Any = numba_arrays

CUDA_DEVICES = (2, 13)
"""DLPack's kDLCUDA and kDLCUDAManaged."""

if SIMULATED:

    def _ours(x: Array) -> Array:
        return x

else:
    from cuda.core.utils import StridedMemoryView

    class DeviceArray(devicearray.DeviceNDArray):  # type: ignore[misc]
        """Numba's device array, which has the CUDA array interface, with DLPack beside it."""

        def __dlpack__(self, *, stream: int | None = None, **options: Any) -> Any:
            """A capsule over this memory; what is under way on it is waited for, unless `stream` is −1."""
            if stream != -1:
                (self.stream or cuda.default_stream()).synchronize()
            return StridedMemoryView.from_cuda_array_interface(self, stream_ptr=-1).__dlpack__(**options)

        def __dlpack_device__(self) -> tuple[int, int]:
            """kDLCUDA and the number of the GPU."""
            return CUDA_DEVICES[0], self.gpu_data.context.device.id

    def _ours(x: Array) -> Array:
        """Numba's array as ours, over the same memory."""
        if isinstance(x, DeviceArray):
            return x
        return DeviceArray(x.shape, x.strides, x.dtype, stream=x.stream, gpu_data=x.gpu_data)


def asarray(x: Any, dtype: str | None = None) -> Array:
    """`x`, of the host or the device, as a C-contiguous array of ours; copied only where it has to be."""
    on_device = _from_device(x)
    if on_device is None:
        return _ours(cuda.to_device(_on_host(x, dtype)))
    wanted = np.dtype(dtype or on_device.dtype)
    if on_device.is_c_contiguous() and on_device.dtype == wanted:
        return _ours(on_device)
    fitting = empty(on_device.shape, wanted, on_device.stream)
    fitting[...] = on_device
    return fitting


def is_on_device(x: Any) -> bool:
    """Whether `x` lies on a GPU, of whatever library; the simulator's arrays count as if they did."""
    return bool(
        devicearray.is_cuda_ndarray(x)
        or hasattr(x, "__cuda_array_interface__")
        or (hasattr(x, "__dlpack_device__") and x.__dlpack_device__()[0] in CUDA_DEVICES)
    )


def _from_device(x: Any) -> Array | None:
    """What lies on the device, as Numba's array over the same memory."""
    if devicearray.is_cuda_ndarray(x):
        return x
    if hasattr(x, "__cuda_array_interface__"):
        return cuda.as_cuda_array(x, sync=False)
    return _from_dlpack(x) if is_on_device(x) else None


def _from_dlpack(x: Any) -> Array:
    view = StridedMemoryView.from_dlpack(x, stream_ptr=-1)
    strides = view.strides and tuple(view.dtype.itemsize * n for n in view.strides)
    description = {
        "version": 3,
        "shape": view.shape,
        "strides": strides,
        "typestr": view.dtype.str,
        "data": (view.ptr, view.readonly),
    }
    return cuda.from_cuda_array_interface(description, owner=view)


def _on_host(x: Any, dtype: str | None) -> npt.NDArray[Any]:
    """`x` as NumPy's, C-contiguous and in this machine's byte order."""
    x = np.from_dlpack(x) if hasattr(x, "__dlpack__") and not hasattr(x, "__array__") else np.asarray(x)
    return np.ascontiguousarray(x, dtype or x.dtype.newbyteorder("="))


def empty(shape: tuple[int, ...], dtype: Any, stream: Any = 0) -> Array:
    """A new array, to be written on that stream."""
    return _ours(cuda.device_array(shape, dtype, stream=stream))


def to_host(x: Array) -> npt.NDArray[Any]:
    """A copy on the host, once all that was launched for it is done; what is there already stays itself."""
    on_device = _from_device(x)
    if on_device is None:
        return np.asarray(x)
    host: npt.NDArray[Any] = on_device.copy_to_host()
    if on_device.stream:
        on_device.stream.synchronize()
    return host


def stream_of(*arrays: Array | None) -> Any:
    """The stream of an operation on these arrays: the one that they name, or the default; others are waited for."""
    present = [x for x in arrays if x is not None]
    for x in present:
        if not devicearray.is_cuda_ndarray(x):
            raise TypeError(
                f"operations take Numba's device arrays; got {type(x).__name__} (ops.asarray(x) puts x on the device)"
            )
    streams = [x.stream for x in present if x.stream]
    for other in streams[1:]:
        if other is not streams[0]:
            other.synchronize()
    return streams[0] if streams else 0


def free_bytes() -> float:
    """Memory of the device that nobody uses; the simulator's is not counted."""
    return float("inf") if SIMULATED else float(cuda.current_context().get_memory_info().free)
