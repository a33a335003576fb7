"""a = σ(z), z = a_prev W + b, with dropout on a."""

from __future__ import annotations

from functools import cache
from typing import Any

from backprop_gpu.kernels.numba_cuda.activations import FORWARD
from backprop_gpu.kernels.numba_cuda.device import Function, device, kernel
from backprop_gpu.kernels.numba_cuda.dropout import is_kept
from backprop_gpu.kernels.numba_cuda.gemm import Tile, gemm

__all__ = ["dense_forward"]


# Device functions


@cache
def epilogue_of(real: Any, activation: str, keeps_z: bool, dropout: bool) -> Function:
    """What is done with an entry of the product: the same function for every tile, which Numba compiles once."""
    sigma = FORWARD[activation]

    @device
    def epilogue(row: Any, column: Any, product: Any, operands: Any) -> None:
        b, a, z = operands
        value = product + b[column]
        if keeps_z:
            z[row, column] = value
        a[row, column] = sigma(value)

    @device
    def epilogue_with_dropout(row: Any, column: Any, product: Any, operands: Any) -> None:
        b, a, z, rate, seed, layer, step = operands
        value = product + b[column]
        if keeps_z:
            z[row, column] = value
        kept = is_kept(row, column, rate, seed, layer, step)
        a[row, column] = sigma(value) * real(1.0 / (1.0 - rate)) if kept else real(0)

    return epilogue_with_dropout if dropout else epilogue


# The kernel; its launch shape is `gemm.shape(tile, N, n_out)`


@cache
def dense_forward(real: Any, tile: Tile, activation: str, keeps_z: bool, dropout: bool) -> Any:
    """The kernel for one σ: with `keeps_z` it writes z too, with `dropout` it takes the four numbers of a `Dropout`.

    a_prev : (N, n_in); W : (n_in, n_out); b : (n_out,); a, z : (N, n_out), overwritten; z may be a without `keeps_z`.
    """
    product = gemm(real, "nn", tile, epilogue_of(real, activation, keeps_z, dropout))

    if dropout:

        @kernel
        def dense_forward_with_dropout(
            a_prev: Any, W: Any, b: Any, a: Any, z: Any, rate: Any, seed: Any, layer: Any, step: Any
        ) -> None:
            product(a_prev, W, 0, W.shape[0], a.shape[0], a.shape[1], (b, a, z, rate, seed, layer, step))

        return dense_forward_with_dropout

    @kernel
    def dense_forward(a_prev: Any, W: Any, b: Any, a: Any, z: Any) -> None:
        product(a_prev, W, 0, W.shape[0], a.shape[0], a.shape[1], (b, a, z))

    return dense_forward
