"""Whole training steps, as one compiled function that every thread runs.

A step has three phases, with a barrier after the first and after the last:

1. passes: each thread takes its rows of the mini-batch, a tile at a time, forward through all layers, through the
   loss and backward, while the tile is in its cache. With `split_columns` it first takes all rows through the columns
   of the first layer whose weights it owns, and waits for the others;
2. gradients: each thread owns some blocks of the packed parameters. With `split_rows` every thread has summed
   ∂C/∂W over its own rows while it had them, and the owner adds the threads' sums, in their order; without, the owner
   computes its blocks of ∂C/∂W over the whole mini-batch;
3. update: the owner updates its blocks, which are still in its cache, and their transposed copy.

Splitting the rows keeps a large batch of a narrow network in cache; splitting the blocks spares a wide network one
gradient vector per thread, and their sum; splitting the columns keeps the first layer's weights, often most of them,
and a⁰ in the cache of the core that has updated and gathered them. Nothing depends on timing, so a run with as many
threads has the same bits.

With `copies`, of a small network whose rows are split, each thread has the parameters and the optimizer's state for
itself, adds up all gradients and updates all parameters: twice the work, but only gradients go from core to core. Steps
alternate between two places for these, so nobody has to wait after the update.

Of a sparse X there is no tile: what is stored of it makes z of the first layer, and, sorted by column, its ∂C/∂W.

A thread in this sense is a share of the work. Those of the operating system are members: each does a share, or one does
them all, in turn, where there is too little to do for it to be worth starting another.
"""

from __future__ import annotations

import math

from backprop_gpu.kernels.numba_cpu.amx import begin, end
from backprop_gpu.kernels.numba_cpu.compile import compiled, entry_point
from backprop_gpu.kernels.numba_cpu.dense_backward import dense_backward
from backprop_gpu.kernels.numba_cpu.dense_forward import dense_forward, z_of_layer, zero_padding
from backprop_gpu.kernels.numba_cpu.dense_gradients import bias_gradients, blocks_in, blocks_in_panel, weight_gradients
from backprop_gpu.kernels.numba_cpu.entries import by_columns, gemm_nn_of_entries
from backprop_gpu.kernels.numba_cpu.gather import gather, gather_run, pack, pack_turned, unpack, unpack_turned
from backprop_gpu.kernels.numba_cpu.gemm import sum_rows, transpose_square
from backprop_gpu.kernels.numba_cpu.network import Memory, borrowed
from backprop_gpu.kernels.numba_cpu.nonzero import note_nonzero
from backprop_gpu.kernels.numba_cpu.output_delta import output_delta, output_forward, winners
from backprop_gpu.kernels.numba_cpu.panels import BLOCK_ROWS, HALF_BLOCK_ROWS, panel_width
from backprop_gpu.kernels.numba_cpu.team import run, wait
from backprop_gpu.kernels.numba_cpu.update import add, add_two, sum_squares, sum_squares_of_run, update

__all__ = ["LABELS", "A", "Z", "infer", "load", "store", "train"]

Z, A, LABELS = range(3)
"""What `infer` may be asked for."""


@entry_point
def train(n_members, barrier, arguments):
    """See `part_of_train`, to whose arguments n_members belongs too; False where not all could be started."""
    return run(part_of_train, n_members, barrier.ctypes.data, arguments)


@compiled
def part_of_train(
    member,
    n_members,
    plan,
    layers,
    parts,
    groups,
    batches,
    starts,
    memory,
    barrier,
    settings,
    learning_rates,
    alphas,
    first_step,
    dropout_step,
    losses,
    vectors,
    n_loaded,
    n_stored,
    guarded,
):
    """One member's part of a step for each of `learning_rates`; returns early where the barrier is stopped.

    parts : (n_threads,), each thread's columns of the first layer, as a layer; empty without `split_columns`;
    groups : (n_threads, n, 3), the first block and the last + 1 of what each thread updates in one go, in this order,
    and 0 where the rows of W are those of the group before;
    starts : where in `batches.order` each mini-batch begins, and where the last one ends; settings : the optimizer's,
    see `update`; alphas : the L2 penalty of each step; first_step : number of the first step, from 1; dropout_step :
    its number for the dropout masks; losses : (n_threads, n_steps, 2), overwritten with each thread's part of each
    step's C without the penalty, and of the penalty; vectors : flat, the parameters and the optimizer's slots, empty
    where there is none, of which the first n_loaded are packed before the first step, and the first n_stored written
    after the last; guarded : only where all is finite, see `all_finite`.
    """
    here, batches, vectors, copies = plan[0], borrowed(batches), borrowed(vectors), borrowed(memory)
    memory, n_updates = memory_of(0, here, copies, 0), n_members if here.copies else here.n_threads
    begin(memory.passes)
    if n_loaded > 0 and not load_all(member, n_members, here, layers, vectors, n_loaded, memory, barrier):
        return
    if here.copies and member > 0:
        copy_first(copies, member)
    for s in range(learning_rates.size):
        memory = memory_of(member, here, copies, s)
        first_row, n_rows = starts[s], starts[s + 1] - starts[s]
        if here.by_entries:
            by_columns(batches.entries, batches.order, first_row, n_rows, layers[0].n_in, memory.sorted_entries)
        if here.split_columns:
            for thread in range(member, here.n_threads, n_members):
                first_layer(thread, here, parts[thread], batches, memory, first_row, n_rows, dropout_step + s)
            if not wait(barrier, n_members):
                return
        for thread in range(member, here.n_threads, n_members):
            losses[thread, s, 0] = passes(thread, here, layers, batches, memory, first_row, n_rows, dropout_step + s)
        if not wait(barrier, n_members):
            return
        if here.clip_norm < math.inf:
            for thread in range(member, n_updates, n_members):
                whole_gradients(thread, here, layers, parts, groups[thread], memory, n_rows, alphas[s])
            if not (here.copies or wait(barrier, n_members)):
                return
        for thread in range(member, n_updates, n_members):
            penalty = learn(
                thread,
                here,
                layers,
                parts,
                groups[thread],
                memory,
                settings,
                n_rows,
                learning_rates[s],
                alphas[s],
                first_step + s,
            )
            losses[thread, s, 1] = penalty if thread == 0 or not here.copies else 0.0
        if not (here.copies or wait(barrier, n_members)):
            return
    if n_stored > 0 and (not guarded or all_finite(member, n_members, here, memory, losses, barrier)):
        store_all(member, n_members, layers, vectors, n_stored, memory)
    end(memory.passes)


@compiled
def memory_of(member, plan, memory, step):
    """What a member works with in a step: with `copies` its own, and in every other step the other gradients."""
    copy, first = (member, step % 2 * plan.n_threads) if plan.copies else (0, 0)
    gradients = memory.gradients[first : first + plan.n_threads]
    return Memory(
        memory.parameters[copy],
        memory.transposed[copy],
        memory.slot_1[copy],
        memory.slot_2[copy],
        gradients,
        memory.sums[copy] if plan.copies else gradients[0],
        memory.passes,
        memory.nonzero,
        memory.rows_where,
        (memory.sorted_entries[0][member], memory.sorted_entries[1][member], memory.sorted_entries[2][member]),
        memory.scratch,
        memory.zeros,
        memory.norms,
    )


@compiled
def copy_first(memory, member):
    """The first copy, into a member's own; the first member may go on meanwhile, up to the next barrier."""
    memory.parameters[member, :] = memory.parameters[0]
    memory.transposed[member, :] = memory.transposed[0]
    memory.slot_1[member, :] = memory.slot_1[0]
    memory.slot_2[member, :] = memory.slot_2[0]


@compiled
def all_finite(member, n_members, plan, memory, losses, barrier):
    """Whether all losses and Σ parameters² are finite; their sum, which is then, stays in norms[0, 1]."""
    for thread in range(member, plan.n_threads, n_members):
        low, high = thread * plan.n_parameters // plan.n_threads, (thread + 1) * plan.n_parameters // plan.n_threads
        memory.norms[thread, 0] = sum_squares(memory.parameters, memory.parameters, 0.0, low, high)
    if not wait(barrier, n_members):
        return False
    total = 0.0
    for thread in range(plan.n_threads):
        total += memory.norms[thread, 0]
        for s in range(losses.shape[1]):
            total += losses[thread, s, 0] + losses[thread, s, 1]
    memory.norms[member, 1] = total
    return math.isfinite(total)


@entry_point
def infer(n_threads, barrier, arguments):
    """See `part_of_infer`, and `train`."""
    return run(part_of_infer, n_threads, barrier.ctypes.data, arguments)


@compiled
def part_of_infer(thread, plan, layers, x, entries, order, flat, memory, wanted, outputs, labels, sums):
    """One thread's part of what the network says of all rows of x, or of a sparse X's entries, without dropout.

    wanted : Z or A overwrites `outputs`, (N · n_out,), with z or σ(z) of the output layer; LABELS overwrites `labels`,
    (N,) int64, see `winners`. sums : (n_threads, panel), to which x is added: it stays finite if all of x is.

    Of a sparse X, which is finite: order : (N,) int64, in which its rows are taken; flat : the parameters, of which the
    first W is read, and a panel's width more.
    """
    here, layer = plan[0], layers[layers.size - 1]
    memory = memory_of(0, here, borrowed(memory), 0)
    outputs, labels, sums = borrowed(outputs), borrowed(labels), borrowed(sums)[thread]
    begin(memory.passes)
    low, high = rows_of(thread, here.n_threads, order.size if here.by_entries else x.shape[0])
    at, entries, order, flat = thread * here.span, borrowed(entries), borrowed(order), borrowed(flat)
    W = flat, 0, panel_width(flat), layers[0].n_out
    out, n_out = layer.a + at, layer.n_out
    for row in range(low, high, here.tile_rows):
        rows = min(here.tile_rows, high - row)
        if here.by_entries:
            z = z_of_entries(here, layers[0], W, entries, order, row, memory, rows, at)
            zero_padding(memory.passes, z, here.stride, computed(rows), layers[0].n_out)
        else:
            gather_run(x, row, rows, memory.passes, layers[0].a_prev + at, here.stride)
            look_for_zeros(here, layers[0], memory, at, rows)
            add_columns(layers[0], memory.passes, layers[0].a_prev + at, here.stride, rows, sums)
        hidden_layers(thread, here, layers, memory, computed(rows), at, 0, -1)
        if wanted == LABELS:
            winners(memory.passes, out, here.stride, rows, n_out, labels, row)
            continue
        if wanted == A:
            output_forward(here.sigma, memory.passes, out, here.stride, panel_width(memory.passes), rows, n_out)
        unpack(0, 1, memory.passes, out, here.stride, rows, n_out, outputs, row * n_out)
    end(memory.passes)


@compiled
def add_columns(layer, tile, start, stride, n_rows, sums):
    """sums += Σ_rows of every panel of a layer's input."""
    for p in range((layer.n_in + panel_width(tile) - 1) // panel_width(tile)):
        sum_rows(tile, start + p * stride, sums, 0, n_rows, True)


# Phase 1: passes


@compiled
def first_layer(thread, plan, part, batches, memory, first_row, n_rows, dropout_step):
    """a of a thread's columns of the first layer, for all rows of a mini-batch, which it gathers for itself."""
    take_rows(plan, part, batches, first_row, memory, n_rows, 0)
    dense_forward(thread, plan, part, 0, memory, computed(n_rows), 0, 0, dropout_step)


@compiled
def take_rows(plan, layer, batches, first, memory, n_rows, at):
    """Rows order[first], … of X as the input of the first layer; of a sparse X, that layer's z."""
    if plan.by_entries:
        W = memory.parameters, layer.W, layer.W_stride, panel_width(memory.parameters)
        z_of_entries(plan, layer, W, batches.entries, batches.order, first, memory, n_rows, at)
    else:
        gather(batches.x, batches.order, first, n_rows, memory.passes, layer.a_prev + at, plan.stride)
        look_for_zeros(plan, layer, memory, at, n_rows)


@compiled
def z_of_entries(plan, layer, W, entries, order, first, memory, n_rows, at):
    """z of the first layer for rows order[first], … of a sparse X; returns where it is."""
    bias = memory.parameters, layer.b, panel_width(memory.parameters)
    z, shape = (layer.z if layer.from_z else layer.a) + at, (n_rows, computed(n_rows), layer.n_out)
    gemm_nn_of_entries(entries, order, first, W, (memory.passes, z, plan.stride), shape, bias)
    return z


@compiled
def look_for_zeros(plan, layer, memory, at, n_rows):
    """In the rows of X that have been gathered, for the products of the first layer, which `layer` is."""
    if plan.z_where or plan.dW_where:
        note_nonzero(memory.passes, layer.a_prev + at, plan.stride, n_rows, layer.n_in, memory.nonzero)


@compiled
def passes(thread, plan, layers, batches, memory, first_row, n_rows, dropout_step):
    """Forward, loss and backward for this thread's rows of a mini-batch; returns their part of C."""
    panel = panel_width(memory.passes)
    low, high = rows_of(thread, plan.n_threads, n_rows)
    cost = 0.0
    for row in range(low, high, plan.tile_rows):
        rows = min(plan.tile_rows, high - row)
        at = thread * plan.span + (0 if plan.split_rows else row * panel)
        if plan.split_columns == 0:
            take_rows(plan, layers[0], batches, first_row + row, memory, rows, at)
        cost += forward(thread, plan, layers, batches, memory, first_row, row, rows, at, dropout_step)
        backward(thread, plan, layers, memory, rows, at, row > low)
    if low == high:
        no_rows(thread, plan, memory)
    return cost


@compiled
def rows_of(thread, n_threads, n_rows):
    """The rows of one thread, first and last + 1: as even as half blocks allow."""
    halves = (n_rows + HALF_BLOCK_ROWS - 1) // HALF_BLOCK_ROWS
    low = thread * halves // n_threads * HALF_BLOCK_ROWS
    high = (thread + 1) * halves // n_threads * HALF_BLOCK_ROWS
    return min(n_rows, low), min(n_rows, high)


@compiled
def computed(n_rows):
    """n_rows rounded up to half a block: what the passes compute, where only n_rows count."""
    return (n_rows + HALF_BLOCK_ROWS - 1) // HALF_BLOCK_ROWS * HALF_BLOCK_ROWS


@compiled
def forward(thread, plan, layers, batches, memory, first_row, row, n_rows, at, dropout_step):
    """The forward pass and the loss of a tile: leaves δ of the output layer, returns the tile's part of C."""
    layer = layers[plan.n_layers - 1]
    hidden_layers(thread, plan, layers, memory, computed(n_rows), at, row, dropout_step)
    return output_delta(
        plan.loss,
        plan.loss_setting,
        plan.sigma,
        memory.passes,
        layer.a + at,
        layer.delta + at,
        plan.stride,
        panel_width(memory.passes),
        n_rows,
        layer.n_out,
        batches,
        first_row + row,
    )


@compiled
def hidden_layers(thread, plan, layers, memory, n_rows, at, row, dropout_step):
    """The forward pass of a tile, up to z of the output layer; a negative dropout_step leaves no neuron out."""
    last = plan.n_layers - 1
    for index in range(plan.split_columns, last):
        dense_forward(thread, plan, layers[index], index, memory, n_rows, at, row, dropout_step)
    if last == 0 and plan.by_entries:
        return
    layer, passes = layers[last], memory.passes
    a_prev, z = (passes, layer.a_prev + at, plan.stride), (passes, layer.a + at, plan.stride)
    z_of_layer(thread, plan, layer, last, memory, a_prev, z, n_rows)


@compiled
def backward(thread, plan, layers, memory, n_rows, at, accumulate):
    """The backward pass of a tile: δ of every layer, db, and with `split_rows` dW."""
    for index in range(plan.n_layers - 1, -1, -1):
        layer = layers[index]
        bias_gradients(plan, layer, memory, thread, n_rows, at, accumulate)
        if plan.split_rows:
            in_panel = blocks_in_panel(layer, memory.parameters)
            panels, blocks = (0, blocks_in(layer, memory.parameters) // in_panel), (0, in_panel)
            weight_gradients(
                thread, plan, layer, index, memory, thread, panels, blocks, 0, n_rows, at, accumulate, False, True
            )
        if index > 0:
            dense_backward(thread, plan, layers[index - 1], layer, memory, computed(n_rows), at)


@compiled
def no_rows(thread, plan, memory):
    """A thread without rows in a small mini-batch adds nothing."""
    first = 0 if plan.split_rows else plan.n_weights
    for i in range(first, plan.n_parameters):
        memory.gradients[thread, i] = 0


# Phases 2 and 3: gradients and update


@compiled
def block_size(memory):
    """Elements of a block of the packed parameters."""
    return BLOCK_ROWS * panel_width(memory.parameters)


@compiled
def biases_of(thread, plan):
    """The range of the packed biases that a thread updates."""
    biases, n_shares = plan.n_parameters - plan.n_weights, plan.n_threads
    if plan.copies:
        thread, n_shares = 0, 1
    first, last = thread * biases // n_shares, (thread + 1) * biases // n_shares
    return plan.n_weights + first, plan.n_weights + last


@compiled
def whole_gradients(thread, plan, layers, parts, groups, memory, n_rows, alpha):
    """The gradients of the parameters that this thread owns, for clipping by the norm of all: its part into `norms`."""
    first, last = biases_of(thread, plan)
    sum_over_threads(plan, memory, first, last)
    size, norm = block_size(memory), sum_squares(memory.sums, memory.parameters, 0.0, first, last)
    made = 0
    for g in range(groups.shape[0]):
        if g == made:
            made = made_with(plan, groups, g)
            own_gradients(thread, plan, layers, parts, memory, 0, groups, g, made, 0, n_rows)
        norm += sum_squares(memory.sums, memory.parameters, alpha, groups[g, 0] * size, groups[g, 1] * size)
    memory.norms[thread, 0] = norm


@compiled
def learn(thread, plan, layers, parts, groups, memory, settings, n_rows, learning_rate, alpha, step):
    """Gradients, unless `whole_gradients` has made them, and update of the parameters that this thread owns.

    They are groups of blocks, and a range of biases. Returns their part of the penalty ½ alpha Σ W², from before the
    update.
    """
    size, squares = block_size(memory), 0.0
    first_bias, last_bias = biases_of(thread, plan)
    clips = plan.clip_norm < math.inf
    scale = clip_scale(thread, plan, memory) if clips else 1.0
    if not clips:
        sum_over_threads(plan, memory, first_bias, last_bias)
    # Unless the whole gradient is needed, a group's takes the place of the last group's, which is still in cache.
    at_once, made, shift = not (clips or plan.split_rows), 0, 0
    gradients = memory.gradients[thread] if at_once else memory.sums
    for g in range(groups.shape[0]):
        start, stop = groups[g, 0] * size, groups[g, 1] * size
        if g == made and not clips:
            made, shift = made_with(plan, groups, g), start if at_once else 0
            own_gradients(thread, plan, layers, parts, memory, thread if at_once else 0, groups, g, made, shift, n_rows)
        if alpha > 0:
            squares += sum_squares_of_run(memory.parameters, start, stop)
        update_range(plan, memory, settings, gradients, start, stop, shift, learning_rate, alpha, scale, step, False)
        transpose_range(plan, layers, memory, groups[g, 0], groups[g, 1])
    update_range(plan, memory, settings, memory.sums, first_bias, last_bias, 0, learning_rate, 0.0, scale, step, True)
    return 0.5 * alpha * squares


@compiled
def made_with(plan, groups, g):
    """Up to which group gradients are made with those of group g, the last + 1: the same rows of W, panel by panel."""
    end = g + 1
    while end < min(g + plan.panels_at_once, groups.shape[0]) and groups[end, 2] == 0 and groups[end, 1] > 0:
        end += 1
    return end


@compiled
def own_gradients(thread, plan, layers, parts, memory, row, groups, g, end, shift, n_rows):
    """∂C/∂W of groups g … end − 1, over the whole mini-batch, into gradients[row], `shift` entries before their place.

    The groups are those of `made_with`. Chunk by chunk of rows, each through all of their panels: in thirds, a chunk of
    a_prev is split once for all of them.
    """
    size, chunk, (first, last) = block_size(memory), plan.chunk_rows, (groups[g, 0], groups[g, 1])
    if plan.split_rows:
        sum_over_threads(plan, memory, first * size, last * size)
        return
    for index in range(plan.n_layers):
        layer = parts[thread] if index < plan.split_columns else layers[index]
        start = layer.W // size
        if not (start <= first < last <= start + blocks_in(layer, memory.parameters)):
            continue
        in_panel = blocks_in_panel(layer, memory.parameters)
        p, low = (first - start) // in_panel, (first - start) % in_panel
        for start_row in range(0, 1 if index == 0 and plan.by_entries else n_rows, chunk):
            weight_gradients(
                thread,
                plan,
                layer,
                index,
                memory,
                row,
                (p, p + end - g),
                (low, low + last - first),
                shift,
                min(chunk, n_rows - start_row),
                start_row * panel_width(memory.passes),
                start_row > 0,
                start_row + chunk >= n_rows,
                groups[g, 2] != 0 or n_rows > chunk,
            )


@compiled
def sum_over_threads(plan, memory, start, stop):
    """sums = gradients[0] + gradients[1] + …, in this order; without `copies`, gradients[0] is where the sums are."""
    for thread in range(1, plan.n_threads):
        if plan.copies and thread == 1:
            add_two(memory.sums, memory.gradients[0], memory.gradients[1], start, stop)
        else:
            add(memory.sums, memory.gradients[thread], start, stop)


@compiled
def clip_scale(thread, plan, memory):
    """clip_norm / norm where the gradient's norm exceeds clip_norm, NaN where it is not finite, else 1."""
    total = 0.0
    first, last = (thread, thread + 1) if plan.copies else (0, plan.n_threads)
    for part in range(first, last):
        total += memory.norms[part, 0]
    norm = math.sqrt(total)
    if norm <= plan.clip_norm:
        return 1.0
    return plan.clip_norm / norm if norm < math.inf else math.nan


@compiled
def transpose_range(plan, layers, memory, first, last):
    """Copy the blocks first … last − 1 into the transposed weights."""
    size = block_size(memory)
    for index in range(1, plan.n_layers):
        layer = layers[index]
        start = layer.W // size
        if layer.turned == 0:
            blocks = blocks_in(layer, memory.parameters)
            transpose_blocks(layer, memory, max(first - start, 0), min(last - start, blocks))


@compiled
def transpose_blocks(layer, memory, first, last):
    """Copy a layer's blocks first … last − 1 into Wᵀ."""
    panel = panel_width(memory.parameters)
    size = block_size(memory)
    blocks_in_panel = layer.W_stride // size
    for number in range(first, last):
        p = number // blocks_in_panel
        row = (number - p * blocks_in_panel) * BLOCK_ROWS
        to = layer.T + row // panel * layer.T_stride + p * panel * panel + row % panel
        block = layer.W + number * size
        for column in range(0, min(panel, layer.n_out - p * panel), BLOCK_ROWS):
            transpose_square(memory.parameters, block + column, panel, memory.transposed, to + column * panel, panel)


@compiled
def update_range(plan, memory, settings, gradients, start, stop, shift, learning_rate, alpha, scale, step, biases):
    """One optimizer step on the packed parameters start … stop − 1, which are all weights or all biases.

    Their gradients are `shift` entries earlier.
    """
    update(
        plan.optimizer,
        settings,
        memory.parameters[start:stop],
        gradients[start - shift : stop - shift],
        memory.slot_1[start:stop],
        memory.slot_2[start:stop],
        0,
        stop - start,
        learning_rate,
        alpha,
        scale,
        step,
        biases,
    )


# Between the flat vectors of the contract and the packed ones


@entry_point
def load(plan, layers, flat, memory):
    """A flat vector (all W, then all b) into what a forward pass reads of it: packed, and some of Wᵀ."""
    here = plan[0]
    memory = memory_of(0, here, borrowed(memory), 0)
    load_vector(0, 1, layers, here.by_entries, borrowed(flat), memory.parameters)
    for index in range(1, layers.size):
        layer = layers[index]
        if layer.few > 0 and layer.turned == 0:
            in_panel, p = layer.W_stride // block_size(memory), (layer.n_out - layer.few) // panel_width(memory.passes)
            transpose_blocks(layer, memory, p * in_panel, (p + 1) * in_panel)


@entry_point
def store(thread, n_threads, layers, packed, flat):
    """The inverse of `load_vector`."""
    store_vector(thread, n_threads, layers, borrowed(packed), borrowed(flat))


@compiled
def load_all(member, n_members, plan, layers, vectors, n_loaded, memory, barrier):
    """The first n_loaded vectors, and Wᵀ; False where the barrier is stopped."""
    load_vector(member, n_members, layers, 0, vectors[0], memory.parameters)
    if n_loaded > 1 and vectors[1].size > 0:
        load_vector(member, n_members, layers, 0, vectors[1], memory.slot_1)
    if n_loaded > 2 and vectors[2].size > 0:
        load_vector(member, n_members, layers, 0, vectors[2], memory.slot_2)
    if not wait(barrier, n_members):
        return False
    for index in range(1, plan.n_layers):
        blocks = 0 if layers[index].turned else blocks_in(layers[index], memory.parameters)
        first, last = member * blocks // n_members, (member + 1) * blocks // n_members
        transpose_blocks(layers[index], memory, first, last)
    return wait(barrier, n_members)


@compiled
def store_all(member, n_members, layers, vectors, n_stored, memory):
    """The inverse of `load_all`."""
    store_vector(member, n_members, layers, memory.parameters, vectors[0])
    if n_stored > 1 and vectors[1].size > 0:
        store_vector(member, n_members, layers, memory.slot_1, vectors[1])
    if n_stored > 2 and vectors[2].size > 0:
        store_vector(member, n_members, layers, memory.slot_2, vectors[2])


@compiled
def load_vector(thread, n_threads, layers, first, flat, packed):
    """One thread's panels of a flat vector into its packed form, W from layer `first` on."""
    at = 0
    for index in range(layers.size):
        layer = layers[index]
        if layer.turned:
            pack_turned(thread, n_threads, flat, at, layer.n_in, layer.n_out, packed, layer.W, layer.W_stride)
        elif index >= first:
            pack(thread, n_threads, flat, at, layer.n_in, layer.n_out, packed, layer.W, layer.W_stride)
        at += layer.n_in * layer.n_out
    for index in range(layers.size):
        layer = layers[index]
        pack(thread, n_threads, flat, at, 1, layer.n_out, packed, layer.b, panel_width(packed))
        at += layer.n_out


@compiled
def store_vector(thread, n_threads, layers, packed, flat):
    """The inverse of `load_vector`."""
    at = 0
    for index in range(layers.size):
        layer = layers[index]
        if layer.turned:
            unpack_turned(thread, n_threads, packed, layer.W, layer.W_stride, layer.n_in, layer.n_out, flat, at)
        else:
            unpack(thread, n_threads, packed, layer.W, layer.W_stride, layer.n_in, layer.n_out, flat, at)
        at += layer.n_in * layer.n_out
    for index in range(layers.size):
        layer = layers[index]
        unpack(thread, n_threads, packed, layer.b, panel_width(packed), 1, layer.n_out, flat, at)
        at += layer.n_out
