"""The rows of a mini-batch, out of the data that lies on the device."""

from __future__ import annotations

from typing import Any

from backprop_gpu.kernels.numba_cuda.device import SIMULATED, ceil_div, cuda, kernel

__all__ = ["gather", "shape"]

THREADS_X, THREADS_Y = (2, 2) if SIMULATED else (32, 8)
"""A warp to a row, so that it reads and writes neighbouring columns."""


# The kernel


@kernel
def gather(X: Any, target: Any, order: Any, X_batch: Any, target_batch: Any, first: Any) -> None:
    """Row r of the mini-batch ← row order[first + r] of the data.

    X : (N, n_in); target : (N, n_target); order : (at least first + n,) int64; X_batch : (n, n_in) and target_batch :
    (n, n_target), overwritten.
    """
    row = cuda.blockIdx.x * THREADS_Y + cuda.threadIdx.y
    if row < X_batch.shape[0]:
        source = order[first + row]
        for column in range(cuda.threadIdx.x, X_batch.shape[1], THREADS_X):
            X_batch[row, column] = X[source, column]
        for column in range(cuda.threadIdx.x, target_batch.shape[1], THREADS_X):
            target_batch[row, column] = target[source, column]


# The launch


def shape(n_rows: int) -> tuple[int, tuple[int, int]]:
    """(grid, block) for n_rows rows."""
    return ceil_div(n_rows, THREADS_Y), (THREADS_X, THREADS_Y)
