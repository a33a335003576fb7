"""The CUDA C++ backend: the kernels of `kernels/cuda/` through CuPy, on an NVIDIA GPU of compute capability 7.5 up.

Arrays are CuPy's. Every operation runs on CuPy's current stream and allocates from CuPy's pool; arrays that are on the
GPU already, CuPy's own or of any library with DLPack or the CUDA array interface, are taken without a copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from backprop_gpu.activations import Activation
from backprop_gpu.backends import cuda_plan
from backprop_gpu.backends.contract import Array, Backend, Dropout, Trainer, TrainingJob
from backprop_gpu.backends.cuda_kernels import Kernels, Whole, step_numbers, stretches
from backprop_gpu.backends.cuda_plan import NUMBERS
from backprop_gpu.backends.cuda_step import StepTrainer
from backprop_gpu.losses import Loss
from backprop_gpu.optimizers import Optimizer

__all__ = ["BACKEND", "CudaBackend", "probe"]

OLDEST_CAPABILITY = 75
OLDEST_CUDA = 12000
"""CUDA version that the driver must offer, and CuPy be built for, as CUDA counts: 12.0."""
LEAST_MEMORY = 32 << 20
"""Bytes that must be free: less than the kernels' machine code and a small network take."""


def probe(cp: Any = None) -> str | None:
    """Why this backend does not work here, and the way out; None where it works."""
    cp = cp or _cupy()
    return _wrong_cuda(cp) or _no_gpu(cp) or _no_compiler(cp) or _no_memory(cp)


def _wrong_cuda(cp: Any) -> str | None:
    """Asked first: of a driver that is too old CUDA answers no other question."""
    driver, built_for = cp.cuda.runtime.driverGetVersion(), cp.cuda.runtime.runtimeGetVersion()
    needed = max(OLDEST_CUDA, built_for // 1000 * 1000)
    if driver == 0:
        return f"there is no NVIDIA driver; install one that offers CUDA {_version(needed)} or newer"
    if driver < needed:
        return (
            f"the NVIDIA driver offers CUDA {_version(driver)}, and CuPy is built for {_version(built_for)}; "
            "update the driver, or install the CuPy of its CUDA version (cupy-cuda12x, cupy-cuda13x)"
        )
    if built_for < OLDEST_CUDA:
        return (
            f"CuPy is built for CUDA {_version(built_for)}, and {_version(OLDEST_CUDA)} is the oldest to work with; "
            f"uninstall it, and pip install cupy-cuda{min(driver // 1000, 13)}x"
        )
    return None


def _no_gpu(cp: Any) -> str | None:
    try:
        n_devices = cp.cuda.runtime.getDeviceCount()
    except cp.cuda.runtime.CUDARuntimeError as error:
        return f"CUDA finds no GPU ({error}), or CUDA_VISIBLE_DEVICES hides it; nvidia-smi should list one"
    if n_devices == 0:
        return "there is no NVIDIA GPU, or CUDA_VISIBLE_DEVICES hides it"
    capability = int(cp.cuda.Device().compute_capability)
    if capability < OLDEST_CAPABILITY:
        return (
            f"the GPU has compute capability {capability / 10}, and the kernels need {OLDEST_CAPABILITY / 10} (Turing) "
            "or newer; choose another GPU by CUDA_VISIBLE_DEVICES"
        )
    return None


def _no_compiler(cp: Any) -> str | None:
    """CuPy is there without NVRTC where its wheel is installed alone."""
    try:
        cp.cuda.nvrtc.getVersion()
    except (ImportError, OSError, RuntimeError) as error:
        major = cp.cuda.runtime.runtimeGetVersion() // 1000
        return (
            f"CuPy finds no NVRTC, which compiles the kernels ({error}); install the CUDA {major} toolkit, or "
            f"pip install 'cuda-toolkit[cudart,nvrtc]=={major}.*'"
        )
    return None


def _no_memory(cp: Any) -> str | None:
    try:
        free, total = cp.cuda.Device().mem_info
    except cp.cuda.runtime.CUDARuntimeError as error:  # no room for CUDA's own, or another process has the GPU
        return f"the GPU cannot be used ({error}); end what else runs on it, or choose another by CUDA_VISIBLE_DEVICES"
    if free < LEAST_MEMORY:
        return (
            f"{free >> 20} of the GPU's {total >> 20} MiB are free, and {LEAST_MEMORY >> 20} are the least to work "
            "with; end what else runs on it, or choose another GPU by CUDA_VISIBLE_DEVICES"
        )
    return None


def _cupy() -> Any:
    import cupy

    return cupy


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


class CudaBackend(Backend):
    """Compiled by NVRTC as it is needed, and kept on disk by CuPy."""

    name: ClassVar[str] = "cuda"

    def __init__(self, cp: Any = None, dtype: str | None = None) -> None:
        self.cp = cp or _cupy()
        self.kernels = Kernels(self.cp)
        self.dtype = dtype
        capability = self.kernels.gpu.capability
        self.dtypes = tuple(name for name, number in NUMBERS.items() if capability >= number.oldest_capability)

    def computing_in(self, dtype: str) -> CudaBackend:
        """Products of tf32, bfloat16 or float16: operands rounded to it, sums and all else in float32."""
        return self if dtype in ("float32", "float64") else type(self)(self.cp, dtype)

    def _operand(self, x: Array) -> Array:
        """`x` as products read it."""
        if self.dtype is None or NUMBERS[self.dtype].array == x.dtype.name:
            return x
        narrow = self.cp.empty(x.shape, NUMBERS[self.dtype].array)
        self.kernels.convert(x, narrow, self.dtype)()
        return narrow

    # Arrays

    def asarray(self, x: Any, dtype: str | None = None) -> Array:
        """`x` as a C-contiguous CuPy array on the current device; no copy of one that is there and fits.

        Raises ValueError for an array on another device.
        """
        cp = self.cp
        with self._memory_told():
            if not isinstance(x, cp.ndarray):
                x = self._taken(x, dtype)
            self._check_device("the array", x)
            return cp.ascontiguousarray(x, dtype)

    @contextmanager
    def _memory_told(self) -> Iterator[None]:
        """Out of memory: what is free, and what to change."""
        try:
            yield
        except self.cp.cuda.memory.OutOfMemoryError as error:
            free, total = self.cp.cuda.Device().mem_info
            raise MemoryError(
                f"no memory for an array: {free >> 20} of the GPU's {total >> 20} MiB are free ({error}); take fewer "
                "rows at a time, free other arrays (cupy.get_default_memory_pool().free_all_blocks()), or backend='cpu'"
            ) from error

    def _check_device(self, name: str, x: Array) -> None:
        here = self.cp.cuda.Device().id
        if x.device.id != here:
            raise ValueError(
                f"{name} is on GPU {x.device.id}, and the current device is GPU {here}; "
                f"use `with cupy.cuda.Device({x.device.id}):`, or copy the array"
            )

    def _check_arrays(self, **arrays: Array | None) -> None:
        """TypeError or ValueError for an array that a kernel cannot read as it is."""
        for name, x in arrays.items():
            if x is None:
                continue
            if not isinstance(x, self.cp.ndarray):
                kind = f"{type(x).__module__}.{type(x).__name__}"
                raise TypeError(f"{name} must be a CuPy array on the GPU; got {kind}: take it there by ops.asarray")
            if not x.flags.c_contiguous:
                raise ValueError(
                    f"{name} must be C-contiguous; got strides {x.strides}: ops.asarray makes a copy that is"
                )
            self._check_device(name, x)

    def _taken(self, x: Any, dtype: str | None) -> Array:
        """An array of another library, by its interface, or from the host."""
        if hasattr(x, "__cuda_array_interface__"):
            return self.cp.asarray(x)
        if _dlpack_device(x) == DLPACK_CUDA:
            return self.cp.from_dlpack(x)
        host = np.asarray(x, dtype)
        return self.cp.asarray(np.ascontiguousarray(host, host.dtype.newbyteorder("=")))

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """A new array on the current device."""
        with self._memory_told():
            return self.cp.empty(shape, dtype)

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """A new array of zeros on the current device."""
        with self._memory_told():
            return self.cp.zeros(shape, dtype)

    def to_numpy(self, x: Array) -> npt.NDArray[Any]:
        """A copy of `x` on the host."""
        copy: npt.NDArray[Any] = self.cp.asnumpy(self.asarray(x) if self.owns(x) else x)
        return copy

    def owns(self, x: Any) -> bool:
        """Whether `x` is an array on the GPU, of whatever library."""
        return hasattr(x, "__cuda_array_interface__") or _dlpack_device(x) == DLPACK_CUDA

    def sum_squares(self, x: Array) -> Array:
        """Σ x², in float64, as an array without dimensions."""
        self._check_arrays(x=x)
        result = self.cp.empty((1,), "float64")
        self.kernels.sum_squares(x, result)()
        return result.reshape(())

    # Whole steps

    def trainer(self, job: TrainingJob) -> Trainer:
        """Whole steps as CUDA graphs, for every job."""
        return StepTrainer(job, self.kernels)

    # Operations

    def _dense_forward(
        self,
        a_prev: Array,
        W: Array,
        b: Array,
        activation: Activation,
        dropout: Dropout | None,
        a: Array,
        z: Array | None,
    ) -> None:
        self._check_arrays(a_prev=a_prev, W=W, b=b, a=a, z=z)
        a_prev, W, dtype = self._operand(a_prev), self._operand(W), self.dtype or a_prev.dtype.name
        self.kernels.dense_forward(a_prev, W, b, a, z, activation.name, dropout, dtype=dtype)()

    def _output_forward(self, z: Array, output_activation: str, a: Array) -> None:
        self._check_arrays(z=z, a=a)
        self.kernels.output_forward(z, a, output_activation)()

    def _output_delta(
        self,
        z: Array,
        target: Array,
        loss: Loss,
        output_activation: str,
        sample_weight: Array | None,
        delta: Array,
    ) -> Array:
        self._check_arrays(z=z, target=target, sample_weight=sample_weight, delta=delta)
        share = None
        if sample_weight is not None:
            share = self.cp.empty((len(z),), "float64")
            self.kernels.shares(sample_weight, share)()
        C = self.cp.empty((1,), "float64")
        scratch = self.kernels.scratch(self.kernels.output_delta_blocks(*z.shape))
        settings = {"share": share, "scratch": scratch, "dtype": z.dtype.name}
        self.kernels.output_delta(z, target, delta, C, loss, output_activation, **settings)()
        return C.reshape(())

    def _dense_backward(
        self,
        delta_next: Array,
        W_next: Array,
        kept: Array,
        activation: Activation,
        dropout: Dropout | None,
        delta: Array,
    ) -> None:
        self._check_arrays(delta_next=delta_next, W_next=W_next, kept=kept, delta=delta)
        delta_next, W_next, dtype = self._operand(delta_next), self._operand(W_next), self.dtype or delta.dtype.name
        self.kernels.dense_backward(delta_next, W_next, kept, delta, activation.name, dropout, dtype=dtype)()

    def _dense_gradients(
        self,
        a_prev: Array,
        delta: Array,
        W: Array | None,
        alpha: float,
        accumulate: bool,
        dW: Array,
        db: Array,
    ) -> None:
        self._check_arrays(a_prev=a_prev, delta=delta, W=W, dW=dW, db=db)
        cp, kernels = self.cp, self.kernels
        n_in, n_out = dW.shape
        plan = cuda_plan.parts(len(delta), n_in, n_out, self.dtype or delta.dtype.name, kernels.gpu, whole=True)
        parts_W = cp.empty((plan.n_parts, n_in, n_out), dW.dtype)
        parts_b = cp.empty((plan.n_parts, n_out), dW.dtype)
        whole = Whole(dW, db, W, alpha, accumulate)
        kernels.dense_gradients(self._operand(a_prev), self._operand(delta), parts_W, parts_b, plan, whole)()

    def _update(
        self,
        parameters: Array,
        gradients: Array,
        state: Mapping[str, Array],
        optimizer: Optimizer,
        learning_rate: float,
        step: int,
        n_weights: int,
    ) -> None:
        self._check_arrays(parameters=parameters, gradients=gradients, **state)
        cp, kernels = self.cp, self.kernels
        counts = [count for count in (n_weights, parameters.size - n_weights) if count]
        whole = [(count, 1, count == n_weights and i == 0) for i, count in enumerate(counts)]
        table, n_blocks = cp.asarray(stretches(whole, 1)), kernels.parameter_blocks(counts)
        squares = None if optimizer.clip_norm is None else self.sum_squares(gradients).reshape(1)
        numbers = step_numbers(optimizer, np.array([learning_rate]), np.zeros(1), step - 1)
        kernels.update(
            parameters,
            [state[slot] for slot in optimizer.slots],
            gradients,
            table,
            n_blocks,
            optimizer,
            numbers=cp.asarray(numbers),
            counters=cp.zeros((2,), "uint32"),
            losses=cp.zeros((1,), "float64"),
            squares=squares,
            scratch=kernels.scratch(n_blocks),
        )()


def _dlpack_device(x: Any) -> int | None:
    return int(x.__dlpack_device__()[0]) if hasattr(x, "__dlpack_device__") else None


DLPACK_CUDA = 2
"""kDLCUDA of DLPack's device types."""

BACKEND = CudaBackend
