"""a = σ(z) at the output layer, where σ may be softmax over each row."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from backprop_gpu.kernels.numba_cuda.activations import FORWARD
from backprop_gpu.kernels.numba_cuda.device import Function, block_size, ceil_div, cuda, device, exp, kernel
from backprop_gpu.kernels.numba_cuda.reductions import block_reduce, greater, plus

__all__ = ["lanes", "output_forward", "row_softmax", "shape"]

THREADS = block_size(128)


# Device functions


@device
def shifted(z: Any, most: Any, lowest: Any) -> Any:
    """z − most, which is 0 for the largest entry, even if that is infinite, and never −∞."""
    d = z - most
    d = lowest if d < lowest else d
    return type(z)(0) if z == most else d


def row_softmax(real: Any, n_lanes: int) -> Function:
    """(z, row, lane, thread) → the largest entry of the row and Σₖ exp(zₖ − largest); the row may be beyond the last.

    `n_lanes` neighbouring threads share a row; all threads of the block take part, each with its row.
    """
    largest_of = block_reduce(real, THREADS, n_lanes, greater)
    sum_of = block_reduce(real, THREADS, n_lanes, plus)
    low = lowest(real)

    @device
    def row_softmax(z: Any, row: Any, lane: Any, thread: Any) -> Any:
        n = z.shape[1] if row < z.shape[0] else 0
        most = z[row, 0] if n > 0 else real(0)
        for k in range(lane, n, n_lanes):
            most = greater(most, z[row, k])
        most = largest_of(most, thread)
        total = real(0)
        for k in range(lane, n, n_lanes):
            total += exp(shifted(z[row, k], most, low))
        return most, sum_of(total, thread)

    return row_softmax


def lowest(real: Any) -> Any:
    """A number so low that its exp is 0, and whose differences are still finite."""
    return real(-float(np.finfo(real).max) / 4)


# The kernel


@cache
def output_forward(real: Any, output_activation: str, n_lanes: int) -> Any:
    """The kernel for one σ, with `n_lanes` threads to a row. z : (N, n_out); a : (N, n_out), overwritten."""
    rows = THREADS // n_lanes
    if output_activation == "softmax":
        low, of_row = lowest(real), row_softmax(real, n_lanes)

        @kernel
        def softmax(z: Any, a: Any) -> None:
            thread = cuda.threadIdx.x
            row, lane = cuda.blockIdx.x * rows + thread // n_lanes, thread % n_lanes
            most, total = of_row(z, row, lane, thread)
            if row < z.shape[0]:
                for k in range(lane, z.shape[1], n_lanes):
                    a[row, k] = exp(shifted(z[row, k], most, low)) / total

        return softmax

    sigma = FORWARD[output_activation]

    @kernel
    def output_forward(z: Any, a: Any) -> None:
        row, lane = cuda.blockIdx.x * rows + cuda.threadIdx.x // n_lanes, cuda.threadIdx.x % n_lanes
        if row < z.shape[0]:
            for k in range(lane, z.shape[1], n_lanes):
                a[row, k] = sigma(z[row, k])

    return output_forward


# The launch


def lanes(n_out: int) -> int:
    """Threads that share a row of n_out entries: one where the row is short, a warp, or the whole block."""
    return 1 if n_out <= 8 else min(32, THREADS // 2) if n_out <= 1024 else THREADS


def shape(n_rows: int, n_lanes: int) -> tuple[int, int]:
    """(grid, block) for n_rows rows."""
    return ceil_div(n_rows, THREADS // n_lanes), THREADS
