"""a = σ(a_prev W + b), with dropout, for one tile of rows that stays in cache."""

from __future__ import annotations

from backprop_gpu.kernels.numba_cpu.activations import apply
from backprop_gpu.kernels.numba_cpu.compile import compiled
from backprop_gpu.kernels.numba_cpu.dropout import keep_factors, multiply
from backprop_gpu.kernels.numba_cpu.gemm import gemm_nn
from backprop_gpu.kernels.numba_cpu.narrow import gemm_nn_narrow
from backprop_gpu.kernels.numba_cpu.nonzero import gemm_nn_where
from backprop_gpu.kernels.numba_cpu.panels import panel_width

__all__ = ["dense_forward", "pre_activation", "transposed_of", "z_of_layer", "zero_padding"]


@compiled
def transposed_of(layer, memory):
    """Wᵀ of a layer, as `gemm_nn` takes a matrix: the packed parameters themselves, or their copy."""
    if layer.turned:
        return memory.parameters, layer.W, layer.W_stride
    return memory.transposed, layer.T, layer.T_stride


@compiled
def pre_activation(layer, parameters, a_prev, z, n_rows, scratch):
    """z = a_prev W + b; a_prev and z as `gemm_nn` takes matrices."""
    W, bias = (parameters, layer.W, layer.W_stride), (parameters, layer.b, panel_width(parameters))
    gemm_nn(a_prev, W, z, (n_rows, layer.n_in, layer.n_out), bias, scratch)


@compiled
def z_of_layer(thread, plan, layer, index, memory, a_prev, z, n_rows):
    """`pre_activation` of layer `index` in a step, as its zeros and its few columns allow (`nonzero`, `narrow`)."""
    parameters, many = memory.parameters, layer.n_out - layer.few
    W, bias = (parameters, layer.W, layer.W_stride), (parameters, layer.b, panel_width(parameters))
    shape = n_rows, layer.n_in, layer.n_out
    if index == 0 and plan.z_where:
        gemm_nn_where(memory.nonzero, a_prev, W, z, shape, bias)
        return
    if many > 0:
        gemm_nn(a_prev, W, z, (n_rows, layer.n_in, many), bias, memory.scratch[thread])
    if layer.few > 0:
        T, own_bias = transposed_of(layer, memory), (parameters, layer.b)
        gemm_nn_narrow(a_prev, T, z, shape, own_bias, layer.few, layer.turned != 0)


@compiled
def dense_forward(thread, plan, layer, index, memory, n_rows, at, first_row, step):
    """a = σ(a_prev W + b) for the tile at `at` in `passes`.

    n_rows : whole half blocks; first_row : of the tile in its mini-batch; step : dropout's, negative for none. Of a
    sparse X, z of the first layer is there already.
    """
    passes, panel = memory.passes, panel_width(memory.passes)
    a, factors = layer.a + at, layer.factors + at
    z = (layer.z if layer.from_z else layer.a) + at
    drops = layer.dropout > 0 and step >= 0
    if not (index == 0 and plan.by_entries):
        a_prev = passes, layer.a_prev + at, plan.stride
        z_of_layer(thread, plan, layer, index, memory, a_prev, (passes, z, plan.stride), n_rows)
    if drops:
        keep_factors(
            passes,
            factors,
            plan.stride,
            panel,
            n_rows,
            layer.n_out,
            first_row,
            layer.first_column,
            layer.dropout,
            plan.seed,
            index,
            step,
        )
    count = n_rows * panel
    for p in range((layer.n_out + panel - 1) // panel):
        a_panel = a + p * plan.stride
        apply(layer.sigma, passes, z + p * plan.stride, passes, a_panel, count)
        if drops:
            multiply(passes, a_panel, passes, factors + p * plan.stride, count)
    if layer.pads:
        zero_padding(passes, a, plan.stride, n_rows, layer.n_out)


@compiled
def zero_padding(x, start, stride, n_rows, n_columns):
    """Columns that fill up the last panel become 0, where σ(0) is not."""
    panel = panel_width(x)
    used = n_columns % panel
    if used:
        last = start + (n_columns // panel) * stride
        for r in range(n_rows):
            for j in range(used, panel):
                x[last + r * panel + j] = 0
