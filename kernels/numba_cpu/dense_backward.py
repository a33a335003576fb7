"""δ = (δ_next W_nextᵀ) ⊙ σ′(z), with the forward pass's dropout, for one tile of rows that stays in cache."""

from __future__ import annotations

from backprop_gpu.kernels.numba_cpu.activations import multiply_by_derivative
from backprop_gpu.kernels.numba_cpu.compile import compiled
from backprop_gpu.kernels.numba_cpu.dense_forward import transposed_of
from backprop_gpu.kernels.numba_cpu.dropout import multiply
from backprop_gpu.kernels.numba_cpu.gemm import gemm_nn
from backprop_gpu.kernels.numba_cpu.panels import panel_width

__all__ = ["dense_backward"]


@compiled
def dense_backward(thread, plan, layer, next_layer, memory, n_rows, at):
    """δ of `layer`, from δ of `next_layer`, for the tile at `at` in `passes`."""
    passes, delta = memory.passes, layer.delta + at
    panel = panel_width(passes)
    gemm_nn(
        (passes, next_layer.delta + at, plan.stride),
        transposed_of(next_layer, memory),
        (passes, delta, plan.stride),
        (n_rows, next_layer.n_out, next_layer.n_in),
        (memory.zeros, 0, 0),
        memory.scratch[thread],
    )
    count = n_rows * panel
    for p in range((layer.n_out + panel - 1) // panel):
        delta_panel = delta + p * plan.stride
        if layer.dropout > 0:
            multiply(passes, delta_panel, passes, layer.factors + at + p * plan.stride, count)
        if layer.from_z:
            z = layer.z + at + p * plan.stride
            multiply_by_derivative(layer.sigma, passes, z, 1.0, passes, delta_panel, count)
        else:  # a as it was before dropout
            a = layer.a + at + p * plan.stride
            multiply_by_derivative(layer.sigma, passes, a, 1 - layer.dropout, passes, delta_panel, count)
