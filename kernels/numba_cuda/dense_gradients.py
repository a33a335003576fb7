"""dW = a_prevᵀ δ, db = Σ_rows δ, over parts of the mini-batch: sums that a second pass adds up in a fixed order.

A gradient has few tiles and a mini-batch many rows, so the rows are split, and every part of them writes sums of its
own: no two blocks write the same number, and the same split gives the same bits. The second pass is `update` in a
training step, `reductions.sum_parts` for the operation alone.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from backprop_gpu.kernels.numba_cuda.device import cuda, device, kernel
from backprop_gpu.kernels.numba_cuda.gemm import Tile, gemm

__all__ = ["dense_gradients"]


# The kernel; its launch shape is `gemm.shape(tile, n_in, n_out, n_parts)`


@cache
def dense_gradients(real: Any, tile: Tile) -> Any:
    """The kernel: part p takes the rows s · rows_per_part … of a_prev (N, n_in) and delta (N, n_out).

    parts : (n_parts or more, n_parameters), of which parts[p, W + …] and parts[p, b + …] are overwritten with the
    part's dW and db; W, b : where the layer's weights and biases begin in the flat vector of parameters.
    """

    @device
    def epilogue(row: Any, column: Any, value: Any, operands: Any) -> None:
        parts, W, _, n_out = operands
        parts[cuda.blockIdx.z, W + row * n_out + column] = value

    @device
    def column_epilogue(column: Any, value: Any, operands: Any) -> None:
        parts, _, b, _ = operands
        parts[cuda.blockIdx.z, b + column] = value

    product = gemm(real, "tn", tile, epilogue, column_epilogue)

    @kernel
    def dense_gradients(a_prev: Any, delta: Any, parts: Any, W: Any, b: Any, rows_per_part: Any) -> None:
        first = cuda.blockIdx.z * rows_per_part
        stop = min(first + rows_per_part, delta.shape[0])
        operands = (parts, W, b, delta.shape[1])
        product(a_prev, delta, first, stop, a_prev.shape[1], delta.shape[1], operands)

    return dense_gradients
