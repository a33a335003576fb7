"""δ = (δ_next W_nextᵀ) ⊙ σ′(z), with the forward pass's dropout."""

from __future__ import annotations

from functools import cache
from typing import Any

from backprop_gpu.activations import ACTIVATIONS
from backprop_gpu.kernels.numba_cuda.activations import DERIVATIVE
from backprop_gpu.kernels.numba_cuda.device import Function, device, kernel
from backprop_gpu.kernels.numba_cuda.dropout import is_kept
from backprop_gpu.kernels.numba_cuda.gemm import Tile, gemm

__all__ = ["dense_backward"]


# Device functions


@cache
def epilogue_of(real: Any, activation: str, dropout: bool) -> Function:
    """What is done with an entry of the product: the same function for every tile, which Numba compiles once."""
    derivative, from_a = DERIVATIVE[activation], ACTIVATIONS[activation].derivative_from == "a"

    @device
    def epilogue(row: Any, column: Any, dA: Any, operands: Any) -> None:
        kept, delta = operands
        delta[row, column] = dA * derivative(kept[row, column])

    @device
    def epilogue_with_dropout(row: Any, column: Any, dA: Any, operands: Any) -> None:
        kept, delta, rate, seed, layer, step = operands
        before = real(1.0 - rate) if from_a else real(1)  # makes a as it was before dropout
        slope = derivative(kept[row, column] * before)
        is_in = is_kept(row, column, rate, seed, layer, step)
        # Where a was left out, σ′ of the 0 in its place counts too: what is NaN stays NaN, as in the reference.
        delta[row, column] = (dA * real(1.0 / (1.0 - rate)) if is_in else real(0)) * slope

    return epilogue_with_dropout if dropout else epilogue


# The kernel; its launch shape is `gemm.shape(tile, N, n_out)`


@cache
def dense_backward(real: Any, tile: Tile, activation: str, dropout: bool) -> Any:
    """The kernel for one σ′; with `dropout` it takes the four numbers of a `Dropout`.

    delta_next : (N, n_next); W_next : (n_out, n_next); kept : (N, n_out), a or z as `derivative_from` says; delta :
    (N, n_out), overwritten.
    """
    product = gemm(real, "nt", tile, epilogue_of(real, activation, dropout))

    if dropout:

        @kernel
        def dense_backward_with_dropout(
            delta_next: Any, W_next: Any, kept: Any, delta: Any, rate: Any, seed: Any, layer: Any, step: Any
        ) -> None:
            operands = (kept, delta, rate, seed, layer, step)
            product(delta_next, W_next, 0, W_next.shape[1], delta.shape[0], delta.shape[1], operands)

        return dense_backward_with_dropout

    @kernel
    def dense_backward(delta_next: Any, W_next: Any, kept: Any, delta: Any) -> None:
        product(delta_next, W_next, 0, W_next.shape[1], delta.shape[0], delta.shape[1], (kept, delta))

    return dense_backward
