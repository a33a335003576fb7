"""The `numba-cuda` backend's operations: kernels written in Python, compiled by Numba-CUDA, on one NVIDIA GPU.

A kernel is compiled when its case first comes up (σ, dtype, tile, …), which takes about a second. Nothing waits for the
GPU but `to_numpy` and whoever reads a scalar.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from backprop_gpu.activations import Activation
from backprop_gpu.backends import numba_cuda_arrays as arrays
from backprop_gpu.backends import numba_cuda_kernels as kernels
from backprop_gpu.backends import numba_cuda_plan as plan
from backprop_gpu.backends.contract import Array, Backend, Dropout, Trainer, TrainingJob
from backprop_gpu.backends.numba_cuda_arrays import stream_of
from backprop_gpu.backends.numba_cuda_step import StepTrainer, stretches_of
from backprop_gpu.kernels.numba_cuda import reductions, update
from backprop_gpu.losses import Loss
from backprop_gpu.optimizers import Optimizer

__all__ = ["NumbaCudaBackend", "Scalar"]


class Scalar:
    """A number that lies on the device in parts; float(…) and NumPy's functions wait for them and add them up."""

    def __init__(self, parts: Array) -> None:
        self.parts = parts

    def __float__(self) -> float:
        return float(arrays.to_host(self.parts).sum())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return np.asarray(float(self), dtype)


class NumbaCudaBackend(Backend):
    """Kernels of `kernels/numba_cuda` on the current device, on the stream that the arrays name."""

    name: ClassVar[str] = "numba-cuda"
    dtypes: tuple[str, ...] = ("float32", "float64")

    # Arrays

    def asarray(self, x: Any, dtype: str | None = None) -> Array:
        """`x` as a C-contiguous Numba device array, without a copy where it is on the device and fits."""
        return arrays.asarray(x, dtype)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """A new array."""
        return arrays.empty(shape, dtype)

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """A new array of zeros."""
        return arrays.asarray(np.zeros(shape, dtype))

    def to_numpy(self, x: Array) -> npt.NDArray[Any]:
        """A copy on the host."""
        return arrays.to_host(x)

    def owns(self, x: Any) -> bool:
        """Whether `x` is an array on the GPU, of whatever library."""
        return arrays.is_on_device(x)

    def sum_squares(self, x: Array) -> Scalar:
        """Σ x², in float64."""
        stream = stream_of(x)
        return Scalar(_squares(x.reshape(x.size), stream))

    # Whole steps

    def trainer(self, job: TrainingJob) -> Trainer:
        """Whole steps on the device, for every job."""
        return StepTrainer(job)

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
        kernels.dense_forward(a_prev, W, b, activation, dropout, a, z, stream_of(a_prev, W, b, a, z))(0, 0)

    def _output_forward(self, z: Array, output_activation: str, a: Array) -> None:
        kernels.output_forward(z, output_activation, a, stream_of(z, a))(0, 0)

    def _output_delta(
        self,
        z: Array,
        target: Array,
        loss: Loss,
        output_activation: str,
        sample_weight: Array | None,
        delta: Array,
    ) -> Scalar:
        stream, n = stream_of(z, target, sample_weight, delta), z.shape[0]
        share = arrays.empty((n,), "float64", stream)
        costs = arrays.empty((1, kernels.n_cost_blocks(*z.shape)), "float64", stream)
        target = target.reshape(n, 1) if target.ndim == 1 else target
        kernels.shares(sample_weight, share, stream)(0, 0)
        kernels.output_delta(z, target, loss, output_activation, share, delta, costs, 0, stream)(0, 0)
        return Scalar(costs)

    def _dense_backward(
        self,
        delta_next: Array,
        W_next: Array,
        kept: Array,
        activation: Activation,
        dropout: Dropout | None,
        delta: Array,
    ) -> None:
        stream = stream_of(delta_next, W_next, kept, delta)
        kernels.dense_backward(delta_next, W_next, kept, activation, dropout, delta, stream)(0, 0)

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
        stream = stream_of(a_prev, delta, W, dW, db)
        division = plan.division(dW.shape, a_prev.shape[0], dW.dtype.name)
        parts = arrays.empty((division.n, dW.size + db.size), dW.dtype, stream)
        kernels.dense_gradients(a_prev, delta, parts, 0, dW.size, division, stream)(0, 0)
        flat = dW.reshape(dW.size)
        alpha, weights = (0.0, flat) if W is None else (alpha, W.reshape(W.size))
        kernels.sum_parts(parts, 0, division.n, weights, alpha if W is not None else 0.0, accumulate, flat, stream)(
            0, 0
        )
        kernels.sum_parts(parts, dW.size, division.n, db, 0.0, accumulate, db, stream)(0, 0)

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
        slots = [state[slot] for slot in optimizer.slots]
        stream, size = stream_of(parameters, gradients, *slots), parameters.size
        scale = arrays.asarray(np.ones(1))
        if optimizer.clip_norm is not None:
            kernels.clip_scale(_squares(gradients, stream), optimizer.clip_norm, scale, stream)(0, 0)
        stretches = stretches_of([(0, n_weights, 1, True), (n_weights, size, 1, False)])
        numbers = arrays.asarray(np.array([update.numbers(optimizer, learning_rate, 0.0, step)]))
        parts = gradients.reshape(1, size)
        kernels.update(parameters, slots, parts, stretches, size, scale, numbers, optimizer, stream)(0, 0)


def _squares(x: Array, stream: Any) -> Array:
    """Parts of Σ x² of a vector, on the device."""
    sums = arrays.empty((1, reductions.shape(x.size)[0]), "float64", stream)
    kernels.sum_squares(x, sums, stream)(0, 0)
    return sums.reshape(sums.size)
