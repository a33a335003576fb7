"""Sums in a fixed order: within a block, over the parts of a split gradient, of squares, of a mini-batch's weights.

Every sum over rows or parameters is taken in float64, and by the same tree whenever it is repeated: there are no
floating-point atomics.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np

from backprop_gpu.kernels.numba_cuda.device import (
    Function,
    block_size,
    ceil_div,
    cuda,
    device,
    kernel,
    most_blocks,
    sqrt,
)

__all__ = [
    "block_reduce",
    "clip_scale",
    "greater",
    "plus",
    "shape",
    "shares",
    "sum_of_parts",
    "sum_parts",
    "sum_squares",
    "total_gradients",
]

THREADS = block_size(256)

MOST_BLOCKS = most_blocks(512)
"""Of a sum whose parts one block, or the host, adds up."""

float64 = np.float64


# Device functions


@device
def plus(x: Any, y: Any) -> Any:
    """x + y."""
    return x + y


@device
def greater(x: Any, y: Any) -> Any:
    """The larger of two numbers; NaN where x is NaN."""
    return y if y > x else x


def block_reduce(real: Any, threads: int, group: int, combine: Function) -> Function:
    """(value, thread) → the values of a group of neighbouring threads combined: for all threads of a block, together.

    `threads` in a block, `group` of them combined, both powers of two. Each use in a kernel is made by a call of this:
    libNVVM refuses a kernel in which two functions call one that has shared memory.
    """

    @device
    def alone(value: Any, thread: Any) -> Any:
        return value

    @device
    def reduce(value: Any, thread: Any) -> Any:
        shared = cuda.shared.array(threads, real)
        shared[thread] = value
        cuda.syncthreads()  # every value is there
        half = group // 2
        while half > 0:
            if thread % group < half:
                shared[thread] = combine(shared[thread], shared[thread + half])
            # A round reads [half, 2 half) of a group and writes [0, half): the next one reads what this one writes. The
            # barrier is outside the branch, and `half` is the same for all threads, so all come to it.
            cuda.syncthreads()
            half //= 2
        result = shared[thread - thread % group]
        # All have read the result before the memory is used again: on a GPU each use has its own, and no kernel comes
        # to one twice, but in the simulator all uses of one dtype are this line's array.
        cuda.syncthreads()
        return result

    return alone if group == 1 else reduce


sum_of_block = block_reduce(float64, THREADS, THREADS, plus)


@cache
def sum_of_parts(real: Any) -> Function:
    """(parts, i, n_parts, in_float64) → Σ_p parts[p, i], p ascending: biases' sums, which are over rows, in float64."""
    zero = real(0)

    @device
    def sum_of_parts(parts: Any, i: Any, n_parts: Any, in_float64: Any) -> Any:
        total, wide = zero, 0.0
        for p in range(n_parts):
            if in_float64:
                wide += float64(parts[p, i])
            else:
                total += parts[p, i]
        return real(wide) if in_float64 else total

    return sum_of_parts


# The kernels


@cache
def sum_parts(real: Any) -> Any:
    """out ← Σ_p parts[p, start + i] + alpha · W[i] (+ out[i] with accumulate), for i < out.size, p ascending.

    parts : (≥ n_parts, n); W, out : vectors of the same size; W is read only for alpha ≠ 0. `in_float64` : how the
    sum is taken.
    """

    sum_parts_at = sum_of_parts(real)

    @kernel
    def sum_parts(
        parts: Any, start: Any, n_parts: Any, W: Any, alpha: Any, accumulate: Any, in_float64: Any, out: Any
    ) -> None:
        for i in range(cuda.grid(1), out.size, cuda.gridsize(1)):
            total = sum_parts_at(parts, start + i, n_parts, in_float64)
            if alpha != 0:
                total += real(alpha) * W[i]
            out[i] = out[i] + total if accumulate else total

    return sum_parts


@cache
def total_gradients(real: Any) -> Any:
    """gradients ← Σ_p parts[p] + alpha W, and the sum of their squares, block by block.

    parts : (most parts, n_parameters); stretches : (n_stretches, 4) of first, stop, n_parts and whether weights;
    parameters, gradients : (n_parameters,); numbers : as for `update`; squares : (gridDim.y · gridDim.x,) float64.
    """
    sum_parts_at = sum_of_parts(real)

    @kernel
    def total_gradients(
        parts: Any, stretches: Any, parameters: Any, gradients: Any, squares: Any, numbers: Any, step: Any
    ) -> None:
        stretch = cuda.blockIdx.y
        first, stop, n_parts, weights = (
            stretches[stretch, 0],
            stretches[stretch, 1],
            stretches[stretch, 2],
            stretches[stretch, 3] != 0,
        )
        alpha = real(numbers[step, 0]) if weights else real(0)
        total = 0.0
        for i in range(first + cuda.grid(1), stop, cuda.gridsize(1)):
            g = sum_parts_at(parts, i, n_parts, not weights)
            if alpha != real(0):
                g += alpha * parameters[i]
            gradients[i] = g
            total += float64(g) * float64(g)
        total = sum_of_block(total, cuda.threadIdx.x)
        if cuda.threadIdx.x == 0:
            squares[stretch * cuda.gridDim.x + cuda.blockIdx.x] = total

    return total_gradients


@kernel
def sum_squares(x: Any, sums: Any, row: Any) -> None:
    """sums[row, block] ← Σ x² over the block's part of the vector x; sums : (≥ row + 1, gridDim.x) float64."""
    total = 0.0
    for i in range(cuda.grid(1), x.size, cuda.gridsize(1)):
        total += float64(x[i]) * float64(x[i])
    total = sum_of_block(total, cuda.threadIdx.x)
    if cuda.threadIdx.x == 0:
        sums[row, cuda.blockIdx.x] = total


@kernel
def clip_scale(squares: Any, clip_norm: Any, scale: Any) -> None:
    """scale[0] ← what clipping multiplies a gradient by, from the parts of the sum of its squares; one block.

    A norm that is not finite makes it NaN, and shows.
    """
    total = 0.0
    for i in range(cuda.threadIdx.x, squares.size, THREADS):
        total += squares[i]
    norm = sqrt(sum_of_block(total, cuda.threadIdx.x))
    if cuda.threadIdx.x == 0:
        if norm <= clip_norm:
            scale[0] = 1.0
        else:
            scale[0] = clip_norm / norm if norm < math.inf else math.nan


@cache
def shares(weighted: bool) -> Any:
    """share ← w / Σ w, each row's part in the mean, 0 where all w are 0; without weights, 1 / N. One block.

    w : (N,), not read if not `weighted`; share : (N,) float64, overwritten.
    """

    @kernel
    def shares(w: Any, share: Any) -> None:
        total = 0.0
        for i in range(cuda.threadIdx.x, share.size, THREADS):
            total += float64(w[i]) if weighted else 1.0
        total = sum_of_block(total, cuda.threadIdx.x)
        for i in range(cuda.threadIdx.x, share.size, THREADS):
            weight = float64(w[i]) if weighted else 1.0
            share[i] = weight / total if total != 0.0 else 0.0

    return shares


# The launch


def shape(n: int) -> tuple[int, int]:
    """(grid, block) for n numbers; `clip_scale` and `shares` are launched as (1, THREADS)."""
    return max(1, min(ceil_div(n, THREADS), MOST_BLOCKS)), THREADS
