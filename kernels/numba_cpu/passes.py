"""The forward pass and the backward pass of a whole network, apart from each other, as somebody else's autograd asks.

    forward:  out = the network's output, from X and the parameters; keeps a, and z where σ′ needs it
    backward: ∂C/∂X, ∂C/∂W and ∂C/∂b of every layer, from ∂C/∂out and what was kept

Weights are the caller's own arrays in the layout (n_out, n_in), Wᵀ in row-major order, and so are their gradients. The
backward product δ Wᵀ wants just that in panels, which is a copy by runs; the forward product wants W in panels, and
`pack_transposed` transposes squares in registers on the way. ∂C/∂Wᵀ = δᵀ a_prev is computed as it is wanted.

Each thread takes its rows, a tile at a time, through all layers. With `split_rows` it sums ∂C/∂W over its own rows
while it has them, and the threads' sums are added in their order; without, it computes its own blocks over all rows.
With `split_columns` it first takes all rows through the columns of the first layer whose weights it has packed.
Nothing depends on timing, so the same number of threads gives the same bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import carray, types
from numba.extending import intrinsic

from backprop_gpu.kernels.numba_cpu.activations import CODES, apply, multiply_by_derivative
from backprop_gpu.kernels.numba_cpu.amx import begin, end
from backprop_gpu.kernels.numba_cpu.compile import compiled, entry_point
from backprop_gpu.kernels.numba_cpu.dense_forward import pre_activation, zero_padding
from backprop_gpu.kernels.numba_cpu.dense_gradients import GROUP
from backprop_gpu.kernels.numba_cpu.dropout import keep_factors, multiply
from backprop_gpu.kernels.numba_cpu.gather import gather_run, pack, panels_of, unpack
from backprop_gpu.kernels.numba_cpu.gemm import gemm_nn, gemm_tn, sum_rows, transpose_square
from backprop_gpu.kernels.numba_cpu.network import borrowed
from backprop_gpu.kernels.numba_cpu.panels import BLOCK_ROWS, panel_width
from backprop_gpu.kernels.numba_cpu.step import computed, rows_of
from backprop_gpu.kernels.numba_cpu.team import run, run_by_team, wait
from backprop_gpu.kernels.numba_cpu.update import add

__all__ = ["LAYER", "NETWORK", "Work", "backward", "forward"]

PARAMETERS, GRADIENTS = range(2)
WEIGHT, BIAS = range(2)
"""Indices of `addresses`, (2, n_layers, 2): of a layer's parameters and of their gradients; 0 where there is none, or
none is wanted."""

IDENTITY = CODES["identity"]

LINE = 16
"""Entries of a row of Wᵀ that are transposed together: a cache line of float32, two of float64."""

NETWORK = np.dtype(
    [
        ("n_layers", "i8"),
        ("n_threads", "i8"),
        ("n_rows", "i8"),
        ("tile_rows", "i8"),
        ("split_rows", "i8"),
        ("chunk_rows", "i8"),  # rows over which a block of ∂C/∂W is summed in one go
        ("together", "i8"),  # 1: chunk by chunk goes through all panels of a group of blocks, see `groups_of_blocks`
        ("split_columns", "i8"),  # 0 or 1, see `parts`
        ("kept_stride", "i8"),  # from panel to panel of what the forward pass keeps
        ("kept_span", "i8"),  # from thread to thread of it; 0 where it holds all rows
        ("delta_stride", "i8"),  # likewise of δ
        ("delta_span", "i8"),
        ("tile_stride", "i8"),  # from panel to panel of a tile of its own, and from thread to thread
        ("tile_span", "i8"),
        ("n_kept", "i8"),  # entries of `kept` and `deltas`
        ("n_deltas", "i8"),
        # What changes from call to call: addresses of the first entry, but for two
        ("seed", "u8"),  # of the dropout masks
        ("lowest", "i8"),  # the lowest layer whose δ is wanted
        ("X", "i8"),
        ("out", "i8"),
        ("kept", "i8"),
        ("deltas", "i8"),
        ("d_out", "i8"),  # ∂C/∂out
        ("dX", "i8"),  # 0 where it is not wanted
    ],
    align=True,
)

LAYER = np.dtype(
    [
        ("n_in", "i8"),
        ("n_out", "i8"),
        ("sigma", "i8"),
        ("from_z", "i8"),  # 1: σ′ needs z, which is kept beside a
        ("pads", "i8"),  # 1: σ(0) is not 0, so the padding of a has to be zeroed
        ("dropout", "f8"),
        ("first_column", "i8"),  # 0, but where these are a thread's columns of a layer
        ("W", "i8"),  # offsets in `packed`
        ("W_stride", "i8"),
        ("b", "i8"),
        ("T", "i8"),  # of Wᵀ in `transposed`, and of ∂C/∂Wᵀ in a thread's gradients
        ("T_stride", "i8"),
        ("db", "i8"),  # offset of ∂C/∂b in a thread's gradients
        ("a_prev", "i8"),  # offsets in what is kept
        ("a", "i8"),
        ("z", "i8"),
        ("delta", "i8"),  # offset in δ
    ],
    align=True,
)


class Work(NamedTuple):
    """What a pass writes besides its results, of one dtype. Padding of the first two is 0, and stays so."""

    packed: Any
    """Every W in panels, then every b."""
    transposed: Any
    """Wᵀ of every layer, in panels."""
    gradients: Any
    """(n_threads, ·): ∂C/∂Wᵀ with `split_rows`, else a group of blocks of it, of as many panels as wait to be written;
    then ∂C/∂b."""
    tiles: Any
    """For each thread, a tile as wide as the widest layer or X."""
    scratch: Any
    """(n_threads, ·): what a thread's products need, see `thirds.entries`."""
    zeros: Any
    """One panel's width of zeros: the bias of a product without one."""


# Arrays by their addresses


@intrinsic
def _pointer(typing_context: Any, address: Any, like: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(like.dtype)(types.intp, like), generate


@compiled
def vector(address, size, like):
    """The `size` numbers at `address`, of the dtype of `like`."""
    return carray(_pointer(address, like), (size,))


@compiled
def rows(address, n_rows, n_columns, like):
    """The row-major matrix at `address`, of the dtype of `like`."""
    return carray(_pointer(address, like), (n_rows, n_columns))


# The forward pass


@entry_point
def forward(by_team, team, n_threads, barrier, arguments):
    """See `part_of_forward`; by the team where asked for, see `run_by_team`; False where not all threads are there."""
    if by_team and run_by_team(part_of_forward, team[0], team[1], team[2], team[3], n_threads, arguments):
        return True
    return run(part_of_forward, n_threads, barrier.ctypes.data, arguments)


@compiled
def part_of_forward(thread, network, layers, parts, addresses, work, barrier):
    """One thread's rows of the output, and of what the backward pass needs.

    parts : (n_threads,), each thread's columns of the first layer, as a layer; empty without `split_columns`.
    """
    here, work = network[0], borrowed(work)
    begin(work.packed)
    for index in range(here.n_layers):
        pack_layer(thread, here.n_threads, layers[index], addresses[PARAMETERS, index], work.packed)
    kept, panel = vector(here.kept, here.n_kept, work.packed), panel_width(work.packed)
    X = rows(here.X, here.n_rows, layers[0].n_in, work.packed)
    if here.split_columns:
        first_layer(thread, here, parts[thread], work, kept, X)
    if not wait(barrier, here.n_threads):
        return
    low, high = rows_of(thread, here.n_threads, here.n_rows)
    for row in range(low, high, here.tile_rows):
        n_rows = min(here.tile_rows, high - row)
        at = thread * here.kept_span if here.kept_span else row * panel
        if here.split_columns == 0:
            gather_run(X, row, n_rows, kept, layers[0].a_prev + at, here.kept_stride)
        for index in range(here.split_columns, here.n_layers - 1):
            layer = layers[index]
            a_prev = kept, layer.a_prev + at, here.kept_stride
            layer_forward(thread, here, layer, index, work, a_prev, kept, at, row, computed(n_rows))
        output_forward(thread, here, layers[here.n_layers - 1], work, kept, at, row, n_rows)
    end(work.packed)


@compiled
def pack_layer(thread, n_threads, layer, addresses, packed):
    """One thread's panels of W, and the bias, from their addresses."""
    W, bias = vector(addresses[WEIGHT], layer.n_out * layer.n_in, packed), addresses[BIAS]
    pack_transposed(thread, n_threads, W, layer.n_out, layer.n_in, packed, layer.W, layer.W_stride)
    if bias:
        panel, b = panel_width(packed), vector(bias, layer.n_out, packed)
        first, last = panels_of(thread, n_threads, layer.n_out, panel)
        for j in range(first * panel, min(last * panel, layer.n_out)):
            packed[layer.b + j] = b[j]


@compiled
def pack_transposed(thread, n_threads, flat, n_rows, n_columns, packed, start, stride):
    """One thread's panels of the transpose of a row-major matrix, (n_columns, n_rows); padding is left as it is."""
    panel = panel_width(packed)
    whole_rows, whole_columns = n_rows // BLOCK_ROWS * BLOCK_ROWS, n_columns // BLOCK_ROWS * BLOCK_ROWS
    low, high = panels_of(thread, n_threads, n_rows, panel)
    for p in range(low, high):
        first, to = p * panel, start + p * stride
        last = min(first + panel, whole_rows)
        for line in range(0, whole_columns, LINE):
            for row in range(first, last, BLOCK_ROWS):
                for column in range(line, min(line + LINE, whole_columns), BLOCK_ROWS):
                    transpose_square(
                        flat, row * n_columns + column, n_columns, packed, to + column * panel + row - first, panel
                    )
        copy_transposed(flat, n_columns, first, last, whole_columns, n_columns, packed, to, panel)
        copy_transposed(flat, n_columns, last, min(first + panel, n_rows), 0, n_columns, packed, to, panel)


@compiled
def copy_transposed(flat, n_columns, first_row, last_row, first_column, last_column, packed, start, panel):
    """What no square covers."""
    for row in range(first_row, last_row):
        for column in range(first_column, last_column):
            packed[start + column * panel + row % panel] = flat[row * n_columns + column]


@compiled
def first_layer(thread, network, part, work, kept, X):
    """a of a thread's columns of the first layer for all rows of X: its own are kept, the others' only looked at."""
    for owner in range(network.n_threads):
        low, high = rows_of(owner, network.n_threads, network.n_rows)
        for row in range(low, high, network.tile_rows):
            n_rows = min(network.tile_rows, high - row)
            at = row * panel_width(kept)
            a_prev = kept, part.a_prev + at, network.kept_stride
            if owner != thread:
                a_prev = work.tiles, thread * network.tile_span, network.tile_stride
            gather_run(X, row, n_rows, a_prev[0], a_prev[1], a_prev[2])
            layer_forward(thread, network, part, 0, work, a_prev, kept, at, row, computed(n_rows))


@compiled
def layer_forward(thread, network, layer, index, work, a_prev, kept, at, row, n_rows):
    """a = σ(a_prev W + b), with dropout, for a tile of whole half blocks; a_prev, as `gemm_nn` takes it, may be any."""
    stride, count, panel = network.kept_stride, n_rows * panel_width(kept), panel_width(kept)
    z = (layer.z if layer.from_z else layer.a) + at
    pre_activation(layer, work.packed, a_prev, (kept, z, stride), n_rows, work.scratch[thread])
    factors = thread * network.tile_span
    if layer.dropout > 0:
        draw_factors(network, layer, index, work.tiles, factors, row, n_rows)
    for p in range((layer.n_out + panel - 1) // panel):
        a_panel = layer.a + at + p * stride
        apply(layer.sigma, kept, z + p * stride, kept, a_panel, count)
        if layer.dropout > 0:
            multiply(kept, a_panel, work.tiles, factors + p * network.tile_stride, count)
    if layer.pads:
        zero_padding(kept, layer.a + at, stride, n_rows, layer.n_out)


@compiled
def draw_factors(network, layer, index, factors, start, row, n_rows):
    """The dropout factors of a tile, the same in both passes; the key is new in each pass, so the step is 0."""
    panel = panel_width(factors)
    keep_factors(
        factors,
        start,
        network.tile_stride,
        panel,
        n_rows,
        layer.n_out,
        row,
        layer.first_column,
        layer.dropout,
        network.seed,
        index,
        0,
    )


@compiled
def output_forward(thread, network, layer, work, kept, at, row, n_rows):
    """The output layer's rows of `out`: nothing of it is kept where σ is the identity."""
    out = vector(network.out, network.n_rows * layer.n_out, kept)
    to, a_prev = row * layer.n_out, (kept, layer.a_prev + at, network.kept_stride)
    if layer.sigma == IDENTITY:
        tile, tiles, stride = thread * network.tile_span, work.tiles, network.tile_stride
        z, blocks = (tiles, tile, stride), computed(n_rows)
        pre_activation(layer, work.packed, a_prev, z, blocks, work.scratch[thread])
        unpack(0, 1, tiles, tile, stride, n_rows, layer.n_out, out, to)
    else:
        layer_forward(thread, network, layer, network.n_layers - 1, work, a_prev, kept, at, row, computed(n_rows))
        unpack(0, 1, kept, layer.a + at, network.kept_stride, n_rows, layer.n_out, out, to)


# The backward pass


@entry_point
def backward(by_team, team, n_threads, barrier, arguments):
    """See `part_of_backward`, and `forward`."""
    if by_team and run_by_team(part_of_backward, team[0], team[1], team[2], team[3], n_threads, arguments):
        return True
    return run(part_of_backward, n_threads, barrier.ctypes.data, arguments)


@compiled
def part_of_backward(thread, network, layers, addresses, work, barrier):
    """One thread's rows of ∂C/∂X, and its part of every gradient that is wanted; all are overwritten."""
    here, work = network[0], borrowed(work)
    begin(work.packed)
    for index in range(here.lowest + (here.dX == 0), here.n_layers):
        layer = layers[index]
        W = vector(addresses[PARAMETERS, index, WEIGHT], layer.n_out * layer.n_in, work.packed)
        pack(thread, here.n_threads, W, 0, layer.n_out, layer.n_in, work.transposed, layer.T, layer.T_stride)
    if not wait(barrier, here.n_threads):
        return
    kept = vector(here.kept, here.n_kept, work.packed)
    deltas = vector(here.deltas, here.n_deltas, work.packed)
    low, high = rows_of(thread, here.n_threads, here.n_rows)
    if low == high:
        work.gradients[thread][:] = 0
    for row in range(low, high, here.tile_rows):
        n_rows = min(here.tile_rows, high - row)
        tile_backward(thread, here, layers, addresses, work, kept, deltas, row, n_rows, row > low)
    if not wait(barrier, here.n_threads):
        return
    for index in range(here.lowest, here.n_layers):
        weight, bias = addresses[GRADIENTS, index, WEIGHT], addresses[GRADIENTS, index, BIAS]
        if bias and index % here.n_threads == thread:
            finish_bias(here, layers[index], bias, work)
        if weight and here.split_rows:
            add_weights(thread, here, layers[index], weight, work)
    if not here.split_rows:
        own_weights(thread, here, layers, addresses, work, kept, deltas)
    end(work.packed)


@compiled
def tile_backward(thread, network, layers, addresses, work, kept, deltas, row, n_rows, accumulate):
    """δ of every layer for a tile of rows; what is summed over them; ∂C/∂X."""
    panel, blocks = panel_width(kept), computed(n_rows)
    at = row * panel
    at_delta = thread * network.delta_span if network.split_rows else at
    output_delta(thread, network, layers[network.n_layers - 1], work, kept, deltas, at, at_delta, row, n_rows)
    for index in range(network.n_layers - 1, network.lowest - 1, -1):
        layer = layers[index]
        if addresses[GRADIENTS, index, BIAS]:
            for p in range((layer.n_out + panel - 1) // panel):
                delta = layer.delta + at_delta + p * network.delta_stride
                sum_rows(deltas, delta, work.gradients[thread], layer.db + p * panel, n_rows, accumulate)
        if addresses[GRADIENTS, index, WEIGHT] and network.split_rows:
            sum_weights(thread, network, layer, work, kept, deltas, at, at_delta, n_rows, accumulate)
        if index > network.lowest:
            layer_backward(
                thread, network, layers[index - 1], index - 1, layer, work, kept, deltas, at, at_delta, row, blocks
            )
    if network.dX:
        input_gradient(thread, network, layers[0], work, deltas, at_delta, row, n_rows)


@compiled
def output_delta(thread, network, layer, work, kept, deltas, at, at_delta, row, n_rows):
    """δ = ∂C/∂out ⊙ σ′ at the output layer."""
    d_out = rows(network.d_out, network.n_rows, layer.n_out, kept)
    gather_run(d_out, row, n_rows, deltas, layer.delta + at_delta, network.delta_stride)
    if layer.sigma != IDENTITY:
        multiply_by_sigma(
            thread, network, layer, network.n_layers - 1, work, kept, deltas, at, at_delta, row, computed(n_rows)
        )


@compiled
def multiply_by_sigma(thread, network, layer, index, work, kept, deltas, at, at_delta, row, n_rows):
    """δ, which holds ∂C/∂a, becomes ∂C/∂a ⊙ σ′(z), with the forward pass's dropout."""
    panel = panel_width(kept)
    factors, count = thread * network.tile_span, n_rows * panel
    if layer.dropout > 0:
        draw_factors(network, layer, index, work.tiles, factors, row, n_rows)
    # a as it was before dropout
    scale = 1.0 if layer.from_z else 1 - layer.dropout
    for p in range((layer.n_out + panel - 1) // panel):
        delta = layer.delta + at_delta + p * network.delta_stride
        if layer.dropout > 0:
            multiply(deltas, delta, work.tiles, factors + p * network.tile_stride, count)
        source = (layer.z if layer.from_z else layer.a) + at + p * network.kept_stride
        multiply_by_derivative(layer.sigma, kept, source, scale, deltas, delta, count)


@compiled
def layer_backward(thread, network, layer, index, next_layer, work, kept, deltas, at, at_delta, row, n_rows):
    """δ = (δ_next W_nextᵀ) ⊙ σ′(z), for a tile of whole half blocks."""
    stride = network.delta_stride
    delta_next, delta = (deltas, next_layer.delta + at_delta, stride), (deltas, layer.delta + at_delta, stride)
    times_transposed(thread, next_layer, work, delta_next, delta, n_rows)
    multiply_by_sigma(thread, network, layer, index, work, kept, deltas, at, at_delta, row, n_rows)


@compiled
def times_transposed(thread, layer, work, delta, c, n_rows):
    """C = δ Wᵀ; both as `gemm_nn` takes matrices."""
    T, shape = (work.transposed, layer.T, layer.T_stride), (n_rows, layer.n_out, layer.n_in)
    gemm_nn(delta, T, c, shape, (work.zeros, 0, 0), work.scratch[thread])


@compiled
def input_gradient(thread, network, layer, work, deltas, at_delta, row, n_rows):
    """Rows of ∂C/∂X = δ Wᵀ of the first layer."""
    tile, stride = thread * network.tile_span, network.tile_stride
    delta = deltas, layer.delta + at_delta, network.delta_stride
    times_transposed(thread, layer, work, delta, (work.tiles, tile, stride), computed(n_rows))
    dX = vector(network.dX, network.n_rows * layer.n_in, deltas)
    unpack(0, 1, work.tiles, tile, stride, n_rows, layer.n_in, dX, row * layer.n_in)


# Gradients of the parameters


@compiled
def sum_weights(thread, network, layer, work, kept, deltas, at, at_delta, n_rows, accumulate):
    """∂C/∂Wᵀ = δᵀ a_prev over a tile, into this thread's gradients."""
    panel, n_out = panel_width(kept), (layer.n_out + BLOCK_ROWS - 1) // BLOCK_ROWS * BLOCK_ROWS
    for p in range((layer.n_in + panel - 1) // panel):
        gemm_tn(
            (deltas, layer.delta + at_delta, network.delta_stride),
            (0, n_out),
            (kept, layer.a_prev + at, network.kept_stride),
            p,
            (work.gradients[thread], layer.T + p * layer.T_stride),
            (n_rows, layer.n_in),
            accumulate,
            work.zeros,
            work.scratch[thread],
            p == 0,
            (work.packed, -1),
        )


@compiled
def add_weights(thread, network, layer, d_weight, work):
    """Add the threads' sums for this thread's rows of ∂C/∂Wᵀ, and write them where they are wanted."""
    panel = panel_width(work.packed)
    first, last = thread * layer.n_out // network.n_threads, (thread + 1) * layer.n_out // network.n_threads
    for p in range((layer.n_in + panel - 1) // panel):
        start = layer.T + p * layer.T_stride
        for other in range(1, network.n_threads):
            add(work.gradients[0], work.gradients[other], start + first * panel, start + last * panel)
        write_rows(layer, d_weight, work.gradients[0], start + first * panel, p, first, last)


@compiled
def write_rows(layer, d_weight, gradients, start, p, first, last):
    """Rows first … last − 1 of panel p of ∂C/∂Wᵀ, from `start` on, to the caller's array at `d_weight`."""
    panel = panel_width(gradients)
    wanted = vector(d_weight, layer.n_out * layer.n_in, gradients)
    count = min(panel, layer.n_in - p * panel)
    for j in range(first, last):
        a = start + (j - first) * panel
        b = j * layer.n_in + p * panel
        source, target = gradients[a : a + count], wanted[b : b + count]
        for i in range(count):
            target[i] = source[i]


@compiled
def own_weights(thread, network, layers, addresses, work, kept, deltas):
    """This thread's blocks of ∂C/∂Wᵀ, over all rows."""
    total = 0
    for index in range(network.lowest, network.n_layers):
        total += blocks_in(layers[index], addresses[GRADIENTS, index, WEIGHT], kept)
    first, last = thread * total // network.n_threads, (thread + 1) * total // network.n_threads
    for index in range(network.lowest, network.n_layers):
        weight = addresses[GRADIENTS, index, WEIGHT]
        blocks = blocks_in(layers[index], weight, kept)
        low, high = max(first, 0), min(last, blocks)
        if low < high:
            groups_of_blocks(thread, network, layers[index], weight, work, kept, deltas, low, high)
        first, last = first - blocks, last - blocks


@compiled
def groups_of_blocks(thread, network, layer, weight, work, kept, deltas, low, high):
    """Blocks low … high − 1: those of the same neurons in each panel together, so that their δ stay in cache.

    Network L takes 14.7 in place of 15.4 ms under autograd on two cores of a Xeon, and M the same. Of more rows than
    are split at once, every chunk goes through all panels, whose sums wait side by side to be written.
    """
    in_panel, gradients = (layer.n_out + BLOCK_ROWS - 1) // BLOCK_ROWS, work.gradients[thread]
    n_groups, size = (in_panel + GROUP - 1) // GROUP, GROUP * BLOCK_ROWS * panel_width(kept)
    first_panel, last_panel = low // in_panel, (high - 1) // in_panel + 1
    at_once = network.chunk_rows if network.together else network.n_rows
    for g in range(n_groups):
        for row in range(0, network.n_rows, at_once):
            last_row, before_first, before_last = min(row + at_once, network.n_rows), -1, -1
            for p in range(first_panel, last_panel):
                first = max(low - p * in_panel, g * in_panel // n_groups)
                last = min(high - p * in_panel, (g + 1) * in_panel // n_groups)
                if first < last:
                    fresh = first != before_first or last != before_last
                    to = (p - first_panel) * size if network.together else 0
                    group_of_blocks(
                        thread, network, layer, work, kept, deltas, p, first, last, row, last_row, to, fresh
                    )
                    if last_row == network.n_rows:
                        low_row, high_row = first * BLOCK_ROWS, min(last * BLOCK_ROWS, layer.n_out)
                        write_rows(layer, weight, gradients, to, p, low_row, high_row)
                    before_first, before_last = first, last


@compiled
def blocks_in(layer, d_weight, kept):
    """Blocks of ∂C/∂Wᵀ that are wanted: BLOCK_ROWS neurons by one panel of inputs."""
    panel = panel_width(kept)
    panels, blocks = (layer.n_in + panel - 1) // panel, (layer.n_out + BLOCK_ROWS - 1) // BLOCK_ROWS
    return panels * blocks if d_weight else 0


@compiled
def group_of_blocks(thread, network, layer, work, kept, deltas, p, first, last, first_row, last_row, to, fresh):
    """Blocks first … last − 1 of panel p over some rows, in gradients from `to` on; fresh : see `gemm_tn`."""
    panel, chunk = panel_width(kept), network.chunk_rows
    for row in range(first_row, last_row, chunk):
        gemm_tn(
            (deltas, layer.delta + row * panel, network.delta_stride),
            (first * BLOCK_ROWS, last * BLOCK_ROWS),
            (kept, layer.a_prev + row * panel, network.kept_stride),
            p,
            (work.gradients[thread], to),
            (min(chunk, last_row - row), layer.n_in),
            row > 0,
            work.zeros,
            work.scratch[thread],
            fresh,
            (work.packed, -1),
        )


@compiled
def finish_bias(network, layer, d_bias, work):
    """∂C/∂b: the threads' sums in their order."""
    wanted = vector(d_bias, layer.n_out, work.packed)
    for other in range(1, network.n_threads):
        add(work.gradients[0], work.gradients[other], layer.db, layer.db + layer.n_out)
    wanted[:] = work.gradients[0][layer.db : layer.db + layer.n_out]
