"""dW = a_prevᵀ δ and db = Σ_rows δ, block by block of the packed parameters.

A block is BLOCK_ROWS rows of a panel of W; blocks follow each other in memory, so any run of them is a run of the
parameters' vector, and any share of the work is a range of block numbers.
"""

from __future__ import annotations

from backprop_gpu.kernels.numba_cpu.compile import compiled
from backprop_gpu.kernels.numba_cpu.entries import gemm_tn_of_entries
from backprop_gpu.kernels.numba_cpu.gemm import claim, gemm_tn, sum_rows
from backprop_gpu.kernels.numba_cpu.narrow import gemm_tn_narrow, gemm_tn_turned
from backprop_gpu.kernels.numba_cpu.nonzero import gemm_tn_where
from backprop_gpu.kernels.numba_cpu.panels import BLOCK_ROWS, panel_width

__all__ = ["GROUP", "bias_gradients", "blocks_in", "blocks_in_panel", "weight_gradients"]

GROUP = 32
"""Blocks of which the gradient is computed in one go: few enough to stay in a core's cache."""


@compiled
def blocks_in(layer, parameters):
    """Blocks of a layer's W."""
    panel = panel_width(parameters)
    columns, size = layer.n_in if layer.turned else layer.n_out, BLOCK_ROWS * panel
    return ((columns + panel - 1) // panel * layer.W_stride + size - 1) // size


@compiled
def blocks_in_panel(layer, parameters):
    """Those of a panel of W; of a layer that is `turned`, whose panels are smaller than a block, all of them."""
    if layer.turned:
        return blocks_in(layer, parameters)
    return layer.W_stride // (BLOCK_ROWS * panel_width(parameters))


@compiled
def weight_gradients(
    thread, plan, layer, index, memory, row, panels, blocks, shift, n_rows, at, accumulate, last_time, fresh
):
    """dW of layer `index`, in some blocks of each of some panels of W, over n_rows rows from `at` on.

    panels, blocks : (first, last + 1), the blocks counted in their panel; see `blocks_in_panel`. They go into
    gradients[row], `shift` entries before their place among the parameters.
    last_time : the update follows, so the parameters, of which other cores have copies, are claimed in the meantime;
    fresh : unless the thread's last call had the same rows and columns of a_prev.
    Those of a sparse X are over all of a mini-batch's rows, from the first call for some on.
    """
    if layer.turned:
        turned_gradients(plan, layer, memory, row, blocks, shift, n_rows, at, accumulate, last_time)
        return
    passes, panel, gradients = memory.passes, panel_width(memory.passes), memory.gradients[row]
    (first_panel, end), (low, high), many = panels, blocks, layer.n_out - layer.few
    A, columns = (passes, layer.a_prev + at, plan.stride), (low * BLOCK_ROWS, high * BLOCK_ROWS)
    B, shape = (passes, layer.delta + at, plan.stride), (n_rows, layer.n_out)
    start = layer.W + first_panel * layer.W_stride + low * BLOCK_ROWS * panel
    if index == 0 and plan.dW_where:
        C, claimed = (gradients, start - shift, layer.W_stride), (memory.parameters, start if last_time else -1)
        rows = memory.rows_where[thread]
        gemm_tn_where(memory.nonzero, A, columns, B, panels, C, shape, accumulate, rows, fresh, claimed)
        return
    for p in range(first_panel, end):
        C, claimed = (gradients, start - shift), (memory.parameters, start if last_time else -1)
        if index == 0 and plan.by_entries:
            gemm_tn_of_entries(memory.sorted_entries, layer.n_in, columns, B, p, C, claimed)
        else:
            scratch, is_fresh = memory.scratch[thread], fresh and p == first_panel
            if many > p * panel:
                gemm_tn(A, columns, B, p, C, (n_rows, many), accumulate, memory.zeros, scratch, is_fresh, claimed)
            else:
                claim(claimed, 0, (high - low) * BLOCK_ROWS, 0)
                if not accumulate:
                    clear(C[0], C[1], C[1] + (high - low) * BLOCK_ROWS * panel)
            if layer.few > 0 and p == many // panel:
                gemm_tn_narrow(A, columns, B, C, shape, layer.few)
        start += layer.W_stride


@compiled
def turned_gradients(plan, layer, memory, row, blocks, shift, n_rows, at, accumulate, last_time):
    """See `weight_gradients`, of a layer that is `turned`: a block is a few panels of dWᵀ, then 0."""
    passes, panel, (first, last) = memory.passes, panel_width(memory.passes), blocks
    in_block, n_panels = BLOCK_ROWS * panel // layer.W_stride, (layer.n_in + panel - 1) // panel
    low, high = first * in_block, min(last * in_block, n_panels)
    A, B = (passes, layer.a_prev + at, plan.stride), (passes, layer.delta + at, plan.stride)
    start, gradients = layer.W + low * layer.W_stride, memory.gradients[row]
    claim((memory.parameters, start if last_time else -1), 0, (last - first) * BLOCK_ROWS, 0)
    C = gradients, start - shift, layer.W_stride
    gemm_tn_turned(A, (low, high), B, C, n_rows, layer.n_out, accumulate)
    if not accumulate and last * in_block > n_panels:
        clear(gradients, layer.W + n_panels * layer.W_stride - shift, layer.W + last * BLOCK_ROWS * panel - shift)


@compiled
def clear(x, start, stop):
    """0 in entries start … stop − 1."""
    some = x[start:stop]
    for i in range(some.size):
        some[i] = 0


@compiled
def bias_gradients(plan, layer, memory, thread, n_rows, at, accumulate):
    """db into gradients[thread], over n_rows rows from `at` on."""
    gradients, passes = memory.gradients[thread], memory.passes
    panel = panel_width(passes)
    for p in range((layer.n_out + panel - 1) // panel):
        sum_rows(passes, layer.delta + at + p * plan.stride, gradients, layer.b + p * panel, n_rows, accumulate)
