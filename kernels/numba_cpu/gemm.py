"""Products of matrices in panels: one loop of fused multiply-adds behind every product of a training step.

    gemm_nn:  C = A B + bias        forward: z = a_prev W + b; backward: δ_next W_nextᵀ, from a transposed copy of W
    gemm_tn:  C = Aᵀ B, or C += Aᵀ B    ∂C/∂W = a_prevᵀ δ
    sum_rows: c = Σ_rows B              ∂C/∂b = Σ_rows δ

A block of C, BLOCK_ROWS × VECTORS vectors, stays in registers while the loop runs over the inner dimension: each step
loads a row of B's panel as vectors and BLOCK_ROWS single elements of A (see `block`).
"""

from __future__ import annotations

from typing import Any

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from backprop_gpu.kernels.numba_cpu.amx import MOST_DEPTH, by_thirds, in_tiles, multiply
from backprop_gpu.kernels.numba_cpu.block import (
    CACHE_LINE,
    IN_FIRST_LEVEL,
    IN_SECOND_LEVEL,
    SIZE,
    UNROLL,
    Block,
    Vectors,
    for_each_width,
)
from backprop_gpu.kernels.numba_cpu.compile import compiled
from backprop_gpu.kernels.numba_cpu.panels import (
    BLOCK_ROWS,
    HALF_BLOCK_ROWS,
    VECTOR_BYTES,
    VECTORS,
    first_entry,
    panel_width,
)
from backprop_gpu.kernels.numba_cpu.thirds import (
    BLOCK,
    LEFT_STEP,
    RIGHT_STEP,
    ROWS,
    steps_in,
    thirds_of_columns,
    thirds_of_panel,
    thirds_of_rows,
    transposed,
)

__all__ = [
    "copy_vectors",
    "gemm_nn",
    "gemm_tn",
    "prefetch_panel",
    "prefetch_panel_early",
    "sum_rows",
    "transpose_square",
]

ROWS_OF_SUM = 256
"""Rows over which a block of Aᵀ B is summed in one go: a longer float32 sum costs digits."""

BLOCKS_AHEAD = VECTORS * VECTOR_BYTES * UNROLL // CACHE_LINE
"""Blocks of a panel's rows in which the whole of the next panel is asked for, at a cache line a turn of the loop.

The first block to read a panel waits for it, as weights come from afar: from the third-level cache, or from that of the
core that updated them. Two cores of a Xeon, in µs a step: network M 628 without and 587 with it, 256-256-256-10 with
256 rows 696 and 657, S 46.2 and 45.2; L 18.6 and 17.7 ms.
"""


def _block_nn(n_rows: int) -> Any:
    @intrinsic
    def block_nn(
        typing_context, a, a_start, a_stride, b, b_start, c, c_start, depth, bias, bias_start, n_vectors, ahead
    ):
        """One block of C = A B + bias, A in panels `a_stride` apart, in the first n_vectors of each row.

        Asks for `depth` / UNROLL cache lines of b from entry `ahead` on.
        """

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            _, a_start, a_stride, _, b_start, _, c_start, depth, _, bias_start, n_vectors, ahead = arguments
            a, b, c, bias = (first_entry(context, builder, signature.args[i], arguments[i]) for i in (0, 3, 5, 8))

            def generate_width(width: int) -> None:
                vectors = Vectors(builder, signature.args[0].dtype, width)
                panel = SIZE(vectors.panel)
                block = Block(vectors, n_rows)
                block.start_from([vectors.load(p) for p in vectors.row(vectors.pointer(bias, bias_start), 0)])
                full = builder.udiv(depth, panel)
                lines = SIZE(vectors.panel // UNROLL * CACHE_LINE // vectors.itemsize)
                with cgutils.for_range(builder, full) as loop:
                    block.add_products(
                        vectors.pointer(a, a_start, builder.mul(loop.index, a_stride)),
                        vectors.panel,
                        1,
                        vectors.pointer(b, b_start, builder.mul(loop.index, SIZE(vectors.panel**2))),
                        panel,
                        vectors.pointer(b, ahead, builder.mul(loop.index, lines)),
                    )
                block.add_products(
                    vectors.pointer(a, a_start, builder.mul(full, a_stride)),
                    vectors.panel,
                    1,
                    vectors.pointer(b, b_start, builder.mul(full, SIZE(vectors.panel**2))),
                    builder.urem(depth, panel),
                )
                block.write(vectors.pointer(c, c_start))

            for_each_width(builder, n_vectors, generate_width)
            return context.get_dummy_value()

        size = types.intp
        return types.void(a, size, size, b, size, c, size, size, bias, size, size, size), generate

    return block_nn


_block_nn_whole, _block_nn_half = _block_nn(BLOCK_ROWS), _block_nn(HALF_BLOCK_ROWS)


@intrinsic
def _block_tn(typing_context, a, a_start, b, b_start, c, c_start, depth, accumulate, n_vectors):
    """One block of C = Aᵀ B or C += Aᵀ B, over `depth` rows of A's panel and of the first n_vectors of B's."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, a_start, _, b_start, _, c_start, depth, accumulate, n_vectors = arguments
        a, b, c = (first_entry(context, builder, signature.args[i], arguments[i]) for i in (0, 2, 4))

        def generate_width(width: int) -> None:
            vectors = Vectors(builder, signature.args[0].dtype, width)
            block = Block(vectors)
            block.start_from_zero()
            block.add_products(vectors.pointer(a, a_start), 1, vectors.panel, vectors.pointer(b, b_start), depth)
            block.write_or_add(vectors.pointer(c, c_start), accumulate)

        for_each_width(builder, n_vectors, generate_width)
        return context.get_dummy_value()

    size = types.intp
    return types.void(a, size, b, size, c, size, size, types.boolean, size), generate


@intrinsic
def sum_rows(typing_context, x, x_start, sums, sums_start, n_rows, accumulate):
    """sums = Σ_rows x, or sums += Σ_rows x, over n_rows rows of one panel."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, x_start, _, sums_start, n_rows, accumulate = arguments
        x, sums = (first_entry(context, builder, signature.args[i], arguments[i]) for i in (0, 2))
        vectors = Vectors(builder, signature.args[0].dtype, VECTORS)
        block = Block(vectors, n_rows=1)
        block.start_from_zero()
        with cgutils.for_range(builder, n_rows) as loop:
            block.add_row(vectors.pointer(x, x_start, builder.mul(loop.index, SIZE(vectors.panel))))
        block.write_or_add(vectors.pointer(sums, sums_start), accumulate)
        return context.get_dummy_value()

    size = types.intp
    return types.void(x, size, sums, size, size, types.boolean), generate


@intrinsic
def copy_vectors(typing_context, x, x_start, y, y_start, n_vectors):
    """n_vectors of one panel's row from x to y, in registers: half the time of a loop that LLVM vectorises."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, x_start, _, y_start, n_vectors = arguments
        x, y = (first_entry(context, builder, signature.args[i], arguments[i]) for i in (0, 2))

        def generate_width(width: int) -> None:
            vectors = Vectors(builder, signature.args[0].dtype, width)
            source, target = (vectors.row(vectors.pointer(*at), 0) for at in ((x, x_start), (y, y_start)))
            for value, pointer in zip([vectors.load(pointer) for pointer in source], target, strict=True):
                vectors.store(value, pointer)

        for_each_width(builder, n_vectors, generate_width)
        return context.get_dummy_value()

    return types.void(x, types.intp, y, types.intp, types.intp), generate


def _prefetch_panel(locality: int) -> Any:
    @intrinsic
    def prefetch_panel(typing_context, x, start):
        """Ask for one panel's width of elements, to be read soon; nothing happens where there are none."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            vectors = Vectors(builder, signature.args[0].dtype, VECTORS)
            start = vectors.pointer(first_entry(context, builder, signature.args[0], arguments[0]), arguments[1])
            for pointer in vectors.row(start, 0):
                vectors.prefetch(pointer, locality)
            return context.get_dummy_value()

        return types.void(x, types.intp), generate

    return prefetch_panel


prefetch_panel, prefetch_panel_early = _prefetch_panel(IN_FIRST_LEVEL), _prefetch_panel(IN_SECOND_LEVEL)


@intrinsic
def claim_panel(typing_context, x, start):
    """Store 64 bits of every vector of one panel's width of elements again, which no other thread reads or writes.

    For that, other cores have to give up their copies, and this one computes meanwhile. To ask for the line (PREFETCHW)
    seems to do nothing on a Zen 4 that has a copy itself: network M with 32 rows takes 386 µs a step so, and 325 like
    this, on two cores that share no cache, and 241 and 235 on two that do. On a Zen 5 without a common cache it took
    M from 460 to 420 µs; claims are not measured there, nor on Intel.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vectors = Vectors(builder, signature.args[0].dtype, VECTORS)
        start = vectors.pointer(first_entry(context, builder, signature.args[0], arguments[0]), arguments[1])
        for pointer in vectors.row(start, 0):
            bits = builder.bitcast(pointer, SIZE.as_pointer())
            builder.store_atomic(builder.load_atomic(bits, "monotonic", 8), bits, "monotonic", 8)
        return context.get_dummy_value()

    return types.void(x, types.intp), generate


@intrinsic
def transpose_square(typing_context, x, x_start, x_step, y, y_start, y_step):
    """y = xᵀ for BLOCK_ROWS × BLOCK_ROWS elements, in registers; from row to row it is `x_step`, `y_step` elements."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, x_start, x_step, _, y_start, y_step = arguments
        x, y = (first_entry(context, builder, signature.args[i], arguments[i]) for i in (0, 3))
        vectors = Vectors(builder, signature.args[0].dtype, 1, lanes=BLOCK_ROWS)
        x, y = vectors.pointer(x, x_start), vectors.pointer(y, y_start)
        rows = [vectors.load(vectors.pointer(x, builder.mul(SIZE(i), x_step))) for i in range(BLOCK_ROWS)]
        for i, row in enumerate(transposed(builder, rows)):
            vectors.store(row, vectors.pointer(y, builder.mul(SIZE(i), y_step)))
        return context.get_dummy_value()

    size = types.intp
    return types.void(x, size, size, y, size, size), generate


@compiled
def vectors_in_use(x, n_columns):
    """Vectors in a row of a panel of which n_columns, or all, are in use: the last panel often holds few."""
    lanes = panel_width(x) // VECTORS
    return min(VECTORS, (n_columns + lanes - 1) // lanes)


# A matrix is (array, its first entry, entries from panel to panel) below.


@compiled
def gemm_nn(A, B, C, shape, bias, scratch):
    """C = A B + bias, overwriting C: n_rows rounded up to HALF_BLOCK_ROWS are read and written.

    shape : (n_rows, depth, n_columns); bias : (array, its first entry, entries from one panel's to the next, 0 for the
    same in each); scratch : as many entries as `thirds.entries` says.
    """
    (a, a_start, a_stride), (b, b_start, b_stride), (c, c_start, c_stride) = A, B, C
    (n_rows, depth, n_columns), (bias, bias_start, bias_step) = shape, bias
    panel = panel_width(a)
    if by_thirds(a, n_rows, depth, n_columns):
        done = in_tiles(n_rows)
        _gemm_nn_by_thirds(A, B, C, (done, depth, n_columns), (bias, bias_start, bias_step), scratch)
        a_start, c_start, n_rows = a_start + done * panel, c_start + done * panel, n_rows - done
    whole = (n_rows + HALF_BLOCK_ROWS - 1) // BLOCK_ROWS * BLOCK_ROWS
    step = b_stride // BLOCKS_AHEAD
    for p in range((n_columns + panel - 1) // panel):
        n = vectors_in_use(a, n_columns - p * panel)
        b_panel, c_panel, bias_panel = b_start + p * b_stride, c_start + p * c_stride, bias_start + p * bias_step
        ahead = b_panel + b_stride
        for i in range(0, whole * panel, BLOCK_ROWS * panel):
            ahead = min(ahead + step, b.size) - step  # what lies behind b may be another thread's, to write
            _block_nn_whole(a, a_start + i, a_stride, b, b_panel, c, c_panel + i, depth, bias, bias_panel, n, ahead)
            ahead += step
        if whole < n_rows:
            i = whole * panel
            _block_nn_half(a, a_start + i, a_stride, b, b_panel, c, c_panel + i, depth, bias, bias_panel, n, b_panel)


@compiled
def _gemm_nn_by_thirds(A, B, C, shape, bias, scratch):
    """See `gemm_nn`; just n_rows are read and written."""
    (a, a_start, a_stride), (b, b_start, b_stride), panel = A, B, panel_width(A[0])
    n_rows, depth, n_columns = shape
    for k in range(0, depth, MOST_DEPTH):
        some_A, some_B = (a, a_start + k // panel * a_stride, a_stride), (b, b_start + k * panel, b_stride)
        some_of_nn(some_A, some_B, C, (n_rows, min(MOST_DEPTH, depth - k), n_columns), bias, k > 0, scratch)


@compiled
def some_of_nn(A, B, C, shape, bias, accumulate, scratch):
    """C = A B + bias, or C += A B, for a depth up to MOST_DEPTH."""
    (a, a_start, a_stride), (b, b_start, b_stride), (c, c_start, c_stride) = A, B, C
    (n_rows, depth, n_columns), (bias, bias_start, bias_step) = shape, bias
    panel, steps = panel_width(a), steps_in(depth)
    right, other = BLOCK, BLOCK + steps * RIGHT_STEP
    left = other + steps * RIGHT_STEP
    thirds_of_rows(a, a_start, a_stride, n_rows, depth, scratch, left)
    thirds_of_panel(b, b_start, depth, 0, scratch, right)
    n_panels = (n_columns + panel - 1) // panel
    for p in range(n_panels):
        following, pair = b_start + (p + 1) * b_stride, 0 if p < n_panels - 1 else ROWS
        for row in range(0, n_rows, 2 * ROWS):
            here, rows = left + row // ROWS * steps * LEFT_STEP, min(2 * ROWS, n_rows - row)
            block, offset = c_start + p * c_stride + row * panel, bias_start + p * bias_step
            pair = multiply(
                scratch, here, steps, right, rows, c, block, bias, offset, accumulate, b, following, depth, other, pair
            )
        if p < n_panels - 1:
            thirds_of_panel(b, following, depth, pair, scratch, other)
        right, other = other, right


@compiled
def gemm_tn(A, columns, B, p, C, shape, accumulate, zeros, scratch, fresh, claimed):
    """Panel p of C = AᵀB, for the columns first … last − 1 of A, whole blocks, or of C += AᵀB; its padding becomes 0.

    columns : (first, last); C : (array, where the panel's row `first` begins); shape : (rows of A and B, columns of B),
    of rows MOST_DEPTH at the most if it is by thirds;
    zeros : a panel's width; scratch : as many entries as `thirds.entries` says; fresh : unless the last call with this
    scratch was for the panel before, and otherwise alike; claimed : what is written next, as C, and claimed meanwhile
    (see `claim_panel`); nothing, if its place is negative.
    """
    (a, a_start, a_stride), (b, b_start, b_stride), (c, c_start) = A, B, C
    (first, last), (depth, n_columns) = columns, shape
    panel, at_b = panel_width(a), b_start + p * b_stride
    done, n = first, vectors_in_use(a, n_columns - p * panel)
    if by_thirds(a, last - first, depth, n_columns):
        done = first + in_tiles(last - first)
        _gemm_tn_by_thirds(A, (first, done), B, p, C, shape, accumulate, zeros, scratch, fresh, claimed)
    for column in range(done, last, BLOCK_ROWS):
        at, row = a_start + column // panel * a_stride + column % panel, (column - first) * panel
        claim(claimed, row, BLOCK_ROWS, min(BLOCK_ROWS, last - column - BLOCK_ROWS))
        for k in range(0, depth, ROWS_OF_SUM):
            some, here = min(ROWS_OF_SUM, depth - k), k * panel
            _block_tn(a, at + here, b, at_b + here, c, c_start + row, some, accumulate or k > 0, n)


@compiled
def _gemm_tn_by_thirds(A, columns, B, p, C, shape, accumulate, zeros, scratch, fresh, claimed):
    """See `gemm_tn`."""
    (a, a_start, a_stride), (b, b_start, b_stride), (c, c_start) = A, B, C
    (first, last), (depth, n_columns) = columns, shape
    panel, steps = panel_width(a), steps_in(depth)
    left = BLOCK + 2 * steps * RIGHT_STEP
    right, other = BLOCK + p % 2 * steps * RIGHT_STEP, BLOCK + (p + 1) % 2 * steps * RIGHT_STEP
    following, more = b_start + (p + 1) * b_stride, n_columns > (p + 1) * panel
    if fresh:
        thirds_of_columns(a, a_start, a_stride, first, last, depth, scratch, left)
        thirds_of_panel(b, b_start + p * b_stride, depth, 0, scratch, right)
    pair = 0 if more else ROWS
    for column in range(0, last - first, 2 * ROWS):
        here, rows = left + column // ROWS * steps * LEFT_STEP, min(2 * ROWS, last - first - column)
        block = c_start + column * panel
        claim(claimed, column * panel, rows, min(2 * ROWS, last - first - column - rows))
        pair = multiply(
            scratch, here, steps, right, rows, c, block, zeros, 0, accumulate, b, following, depth, other, pair
        )
    if more:
        thirds_of_panel(b, following, depth, pair, scratch, other)


@compiled
def claim(claimed, at, n_rows, n_next):
    """n_rows of a panel, see `gemm_tn`; asks for the n_next after them, so that the next claim finds these.

    Network L takes 24.7 ms a step with this and 24.8 without, M with 32 rows 239 and 243 µs.
    """
    w, w_start = claimed
    if w_start >= 0:
        panel, start = panel_width(w), w_start + at
        for i in range(n_rows):
            claim_panel(w, start + i * panel)
        for i in range(n_rows, n_rows + n_next):
            prefetch_panel(w, start + i * panel)
