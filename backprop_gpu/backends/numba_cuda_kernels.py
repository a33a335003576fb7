"""Every launch of the `numba-cuda` backend: the kernel for a case, its grid and block, its stream and its arguments.

A launch is made ready once, with all that stays the same, and then called with the numbers of a step. The operations
call it at once, with zeros; a trainer keeps it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numba.core.errors import NumbaPerformanceWarning

from backprop_gpu.activations import Activation
from backprop_gpu.backends import numba_cuda_plan as plan
from backprop_gpu.backends.contract import Dropout
from backprop_gpu.backends.numba_cuda_arrays import Array
from backprop_gpu.kernels.numba_cuda import dense_backward as backward_kernels
from backprop_gpu.kernels.numba_cuda import dense_forward as forward_kernels
from backprop_gpu.kernels.numba_cuda import dense_gradients as gradient_kernels
from backprop_gpu.kernels.numba_cuda import gather as gather_kernels
from backprop_gpu.kernels.numba_cuda import gemm, reductions
from backprop_gpu.kernels.numba_cuda import output_delta as delta_kernels
from backprop_gpu.kernels.numba_cuda import output_forward as output_kernels
from backprop_gpu.kernels.numba_cuda import update as update_kernels
from backprop_gpu.kernels.numba_cuda.device import SIMULATED
from backprop_gpu.losses import Loss
from backprop_gpu.optimizers import Optimizer

__all__ = [
    "Launch",
    "clip_scale",
    "dense_backward",
    "dense_forward",
    "dense_gradients",
    "gather",
    "n_cost_blocks",
    "output_delta",
    "output_forward",
    "shares",
    "sum_parts",
    "sum_squares",
    "total_gradients",
    "update",
]

Launch: TypeAlias = Callable[[int, int], None]
"""(i, step): row i of what was uploaded for these steps, and the number of the update, which dropout counts by."""


def _ready(kernel: Any, shape: tuple[Any, Any], stream: Any) -> Any:
    """The kernel with its launch shape. Numba warns of every grid below 128 blocks; small networks have no more."""
    if SIMULATED:  # where a kernel has one launch shape at a time
        return lambda *args: kernel[(*shape, stream)](*args)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NumbaPerformanceWarning)
        return kernel[(*shape, stream)]


def dense_forward(
    a_prev: Array,
    W: Array,
    b: Array,
    activation: Activation,
    dropout: Dropout | None,
    a: Array,
    z: Array | None,
    stream: Any,
) -> Launch:
    """a = σ(z), z = a_prev W + b."""
    tile = plan.tile(a.shape, a.dtype.name)
    kernel = forward_kernels.dense_forward(a.dtype.type, tile, activation.name, z is not None, dropout is not None)
    launch = _ready(kernel, gemm.shape(tile, *a.shape), stream)
    arrays = (a_prev, W, b, a, a if z is None else z)
    return lambda i, step: launch(*arrays, *_numbers(dropout, step))


def dense_backward(
    delta_next: Array,
    W_next: Array,
    kept: Array,
    activation: Activation,
    dropout: Dropout | None,
    delta: Array,
    stream: Any,
) -> Launch:
    """δ = (δ_next W_nextᵀ) ⊙ σ′(z)."""
    tile = plan.tile(delta.shape, delta.dtype.name)
    kernel = backward_kernels.dense_backward(delta.dtype.type, tile, activation.name, dropout is not None)
    launch = _ready(kernel, gemm.shape(tile, *delta.shape), stream)
    arrays = (delta_next, W_next, kept, delta)
    return lambda i, step: launch(*arrays, *_numbers(dropout, step))


def _numbers(dropout: Dropout | None, step: int) -> tuple[Any, ...]:
    """What the kernels read of a `Dropout`; it counts its steps from dropout.step on, by their lower 32 bits."""
    if dropout is None:
        return ()
    return dropout.rate, np.uint64(dropout.seed), dropout.layer, (dropout.step + step) % 2**32


def dense_gradients(
    a_prev: Array, delta: Array, parts: Array, W: int, b: int, division: plan.Division, stream: Any
) -> Launch:
    """parts[p, W : …] ← a_prevᵀ δ and parts[p, b : …] ← Σ_rows δ, over the rows of each part p."""
    shape = gemm.shape(division.tile, a_prev.shape[1], delta.shape[1], division.n)
    launch = _ready(gradient_kernels.dense_gradients(delta.dtype.type, division.tile), shape, stream)
    return lambda i, step: launch(a_prev, delta, parts, W, b, division.rows)


def gather(
    X: Array, target: Array, order: Array, X_batch: Array, target_batch: Array, batch_size: int, stream: Any
) -> Launch:
    """The rows of mini-batch i."""
    launch = _ready(gather_kernels.gather, gather_kernels.shape(X_batch.shape[0]), stream)
    return lambda i, step: launch(X, target, order, X_batch, target_batch, i * batch_size)


def output_forward(z: Array, output_activation: str, a: Array, stream: Any) -> Launch:
    """a = σ(z), where σ may be softmax."""
    lanes = output_kernels.lanes(z.shape[1])
    kernel = output_kernels.output_forward(z.dtype.type, output_activation, lanes)
    launch = _ready(kernel, output_kernels.shape(z.shape[0], lanes), stream)
    return lambda i, step: launch(z, a)


def n_cost_blocks(n_rows: int, n_out: int) -> int:
    """Blocks of `output_delta`, each of which writes a part of C."""
    n_blocks: int = delta_kernels.shape(n_rows, delta_kernels.lanes(n_out))[0]
    return n_blocks


def output_delta(
    z: Array,
    target: Array,
    loss: Loss,
    output_activation: str,
    share: Array,
    delta: Array,
    costs: Array,
    batch_size: int,
    stream: Any,
) -> Launch:
    """δ, and C as the sum of costs[i], for rows whose shares begin at i · batch_size. Labels are an (N, 1) target."""
    lanes, labels = delta_kernels.lanes(z.shape[1]), target.dtype == np.int32
    kernel = delta_kernels.output_delta(z.dtype.type, loss.name, output_activation, labels, lanes)
    launch = _ready(kernel, delta_kernels.shape(z.shape[0], lanes), stream)
    setting = delta_kernels.setting(loss)
    return lambda i, step: launch(z, target, share, i * batch_size, setting, delta, costs, i)


def update(
    parameters: Array,
    slots: list[Array],
    parts: Array,
    stretches: Array,
    longest: int,
    scale: Array,
    numbers: Array,
    optimizer: Optimizer,
    stream: Any,
) -> Launch:
    """The optimizer, with row i of `numbers`; see the kernel."""
    shape = update_kernels.shape(longest, stretches.shape[0], plan.n_multiprocessors())
    kernel = update_kernels.update(parameters.dtype.type, type(optimizer), optimizer.clip_norm is not None)
    launch = _ready(kernel, shape, stream)
    return lambda i, step: launch(parameters, slots[0], slots[-1], parts, stretches, scale, numbers, i)


def total_gradients(
    parts: Array,
    stretches: Array,
    longest: int,
    parameters: Array,
    gradients: Array,
    squares: Array,
    numbers: Array,
    stream: Any,
) -> Launch:
    """gradients ← Σ_p parts[p] + alpha W, and squares, of one entry for each block, whose sum is Σ gradients²."""
    kernel = reductions.total_gradients(parameters.dtype.type)
    launch = _ready(kernel, ((squares.size // stretches.shape[0], stretches.shape[0]), reductions.THREADS), stream)
    return lambda i, step: launch(parts, stretches, parameters, gradients, squares, numbers, i)


def clip_scale(squares: Array, clip_norm: float, scale: Array, stream: Any) -> Launch:
    """scale[0] ← what clipping multiplies the gradient by."""
    launch = _ready(reductions.clip_scale, (1, reductions.THREADS), stream)
    return lambda i, step: launch(squares, float(clip_norm), scale)


def sum_squares(x: Array, sums: Array, stream: Any) -> Launch:
    """sums[i] ← parts whose sum is Σ x²."""
    launch = _ready(reductions.sum_squares, (sums.shape[1], reductions.THREADS), stream)
    return lambda i, step: launch(x, sums, i)


def sum_parts(
    parts: Array, start: int, n_parts: int, W: Array, alpha: float, accumulate: bool, out: Array, stream: Any
) -> Launch:
    """out ← Σ_p parts[p, start : …] + alpha W, or added to out; a vector of biases passes itself for W, and alpha 0."""
    launch = _ready(reductions.sum_parts(out.dtype.type), reductions.shape(out.size), stream)
    return lambda i, step: launch(parts, start, n_parts, W, float(alpha), accumulate, W is out, out)


def shares(sample_weight: Array | None, share: Array, stream: Any) -> Launch:
    """share ← each row's part in the mean."""
    launch = _ready(reductions.shares(sample_weight is not None), (1, reductions.THREADS), stream)
    return lambda i, step: launch(share if sample_weight is None else sample_weight, share)
