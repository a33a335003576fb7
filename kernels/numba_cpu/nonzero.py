"""The first layer's products without those by 0, for data that is mostly 0: images, one-hot columns, counts of words.

    note_nonzero:  which elements of A = X are not 0
    gemm_nn_where: C = A B + bias       z = X W + b, without the columns of A that are 0 in all of a few rows
    gemm_tn_where: C = Aᵀ B, or C += Aᵀ B    ∂C/∂W = Xᵀ δ, without the rows in which a few columns of A are all 0

A few are two, through two panels of B and C; with one panel, `FEW_OF_ONE`. What is left is summed in the order of
`gemm`, to the same bits, as x + 0 · w is x; but for a w that is not finite, whose product with 0 counts as 0 here.
"""

from __future__ import annotations

import math
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from backprop_gpu.kernels.numba_cpu.block import SIZE, Block, Vectors, for_each_width
from backprop_gpu.kernels.numba_cpu.compile import compiled
from backprop_gpu.kernels.numba_cpu.gemm import ROWS_OF_SUM, claim, vectors_in_use
from backprop_gpu.kernels.numba_cpu.panels import HALF_BLOCK_ROWS, VECTORS, first_entry, panel_width, width

__all__ = [
    "PANELS_AT_ONCE",
    "ROWS_AT_ONCE",
    "gemm_nn_where",
    "gemm_tn_where",
    "n_together",
    "note_nonzero",
    "rows_words",
]

FEW, PANELS_AT_ONCE = 2, 2
"""Rows of C in a block, and its panels.

The fewer rows, the more products are by 0 in all of them, but the fewer multiply-adds there are for what is loaded. On
one core of a Zen 4, in µs, 100 rows in float64, by `gemm`, and by blocks of so many rows × panels, the least and the
most of two runs where they differ:

    product     data and columns of W       gemm    4 × 1      4 × 2      2 × 2      1 × 2      1 × 4
    X W         digits, 51 % not 0, 100     22.8    16.6       16.3       15.1       17.3       19.0
    Xᵀ δ                                    23.4    25.4       23.4       18.9       22.1       30.4
    X W         MNIST, 19 % not 0, 128      345     155-165    142-145    152-178    184-214    178-209
    Xᵀ δ                                    350     138-140    118        110-116    143-174    174-196
"""

FEW_OF_ONE = HALF_BLOCK_ROWS
"""Rows of a block in one panel, which needs as many for its multiply-adds not to wait for each other."""

WORD, ROWS_OF_BITS = ir.IntType(32), ir.IntType(64)
"""A bit for each column of a panel, and for each of as many rows as are looked at together."""

ROWS_AT_ONCE = ROWS_OF_BITS.width

LANES = 16
"""Words that are compared together: those of a vector of 64 bytes, of which LLVM makes several smaller ones."""


def rows_words(n_rows: int, n_columns: int) -> int:
    """Words for so many rows of some columns of A: for every FEW columns, one of a bit each for ROWS_AT_ONCE rows."""
    return math.ceil(n_columns / FEW) * math.ceil(n_rows / ROWS_AT_ONCE)


def n_together(n_columns: int, dtype: Any) -> int:
    """Rows of A, or columns, that have to be 0 together to be left out, of a product with n_columns."""
    return FEW if n_columns > width(dtype) else FEW_OF_ONE


def _bits(builder: Any, found: Any, kind: Any) -> Any:
    """The outcome of a comparison of vectors as an integer of `kind`, a bit for each."""
    return builder.zext(builder.bitcast(found, ir.IntType(found.type.count)), kind)


@intrinsic
def _columns_not_0(typing_context, x, start):
    """A bit for each column of a panel's row from entry `start` on, 1 where it is not 0: NaN is not."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vectors = Vectors(builder, signature.args[0].dtype, VECTORS)
        start = vectors.pointer(first_entry(context, builder, signature.args[0], arguments[0]), arguments[1])
        bits = WORD(0)
        for v, pointer in enumerate(vectors.row(start, 0)):
            some = builder.fcmp_unordered("!=", vectors.load(pointer), vectors.zero)
            bits = builder.or_(bits, builder.shl(_bits(builder, some, WORD), WORD(v * vectors.lanes)))
        return bits

    return types.uint32(x, types.intp), generate


@compiled
def note_nonzero(a, a_start, a_stride, n_rows, n_columns, nonzero):
    """For each row of each panel of A, (n_rows, n_columns), which of its elements are not 0.

    nonzero : (·,) uint32, of which entry i // panel_width(a) is overwritten for the row that begins at a[i]: bit c is
    its element c's. The products read `ROWS_AT_ONCE` entries more, and those of all HALF_BLOCK_ROWS where only some are
    A's: they have to be 0, or of an earlier A of as many columns.
    """
    panel = panel_width(a)
    for p in range((n_columns + panel - 1) // panel):
        start = a_start + p * a_stride
        for r in range(n_rows):
            nonzero[start // panel + r] = _columns_not_0(a, start + r * panel)


def _block_nn(n_rows: int, n_panels: int) -> Any:
    @intrinsic
    def block_nn(
        typing_context,
        nonzero,
        at,
        step,
        a,
        a_start,
        a_stride,
        b,
        b_start,
        b_stride,
        c,
        c_start,
        c_stride,
        n_panels_of_a,
        bias,
        bias_start,
        bias_step,
        n_vectors,
    ):
        """n_rows of n_panels of C = A B + bias, in the first n_vectors of the last of these panels.

        at : of the first row's word in `nonzero` for A's first panel; step : from one panel's to the next.
        """

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            _, at, step, _, a_start, a_stride, _, b_start, b_stride, _, c_start, c_stride, of_a, *others = arguments
            entries = (first_entry(context, builder, signature.args[i], arguments[i]) for i in (0, 3, 6, 9, 13))
            (nonzero, a, b, c, bias), (_, bias_start, bias_step, width) = entries, others

            def generate_width(n_vectors: int) -> None:
                vectors = Vectors(builder, signature.args[3].dtype, n_vectors)
                block = Block(vectors, n_rows, n_panels)
                own_bias = vectors.pointer(bias, bias_start)
                block.start_from([vectors.load(p) for p in block.row(own_bias, 0, bias_step)])
                with cgutils.for_range(builder, of_a) as loop:
                    words, columns = vectors.pointer(nonzero, at, builder.mul(loop.index, step)), WORD(0)
                    for i in range(n_rows):
                        columns = builder.or_(columns, builder.load(vectors.pointer(words, i), align=4))
                    left = vectors.pointer(a, a_start, builder.mul(loop.index, a_stride))
                    right = vectors.pointer(b, b_start, builder.mul(loop.index, SIZE(vectors.panel**2)))
                    block.add_products_where(columns, left, vectors.panel, 1, right, b_stride)
                block.write(vectors.pointer(c, c_start), c_stride)

            for_each_width(builder, width, generate_width)
            return context.get_dummy_value()

        size = types.intp
        matrices = a, size, size, b, size, size, c, size, size
        return types.void(nonzero, size, size, *matrices, size, bias, size, size, size), generate

    return block_nn


_block_nn_of_one, _block_nn_of_two = _block_nn(FEW_OF_ONE, 1), _block_nn(FEW, PANELS_AT_ONCE)


def _rows_with(builder: Any, words: Any, columns: Any, count: Any) -> Any:
    """A bit for each row, 1 where one of these columns is not 0; for `count` rows at the most."""
    kind, rows = ir.VectorType(WORD, LANES), ROWS_OF_BITS(0)
    undefined, none = ir.Constant(kind, ir.Undefined), ir.Constant(kind, [0] * LANES)
    wanted = builder.shuffle_vector(builder.insert_element(undefined, columns, WORD(0)), undefined, none)
    for i in range(0, ROWS_AT_ONCE, LANES):
        pointer = builder.bitcast(builder.gep(words, [SIZE(i)]), kind.as_pointer())
        some = builder.icmp_unsigned("!=", builder.and_(builder.load(pointer, align=4), wanted), none)
        rows = builder.or_(rows, builder.shl(_bits(builder, some, ROWS_OF_BITS), ROWS_OF_BITS(i)))
    counted = builder.sub(builder.shl(ROWS_OF_BITS(1), count), ROWS_OF_BITS(1))
    return builder.select(
        builder.icmp_unsigned("<", count, ROWS_OF_BITS(ROWS_AT_ONCE)), builder.and_(rows, counted), rows
    )


@intrinsic
def _rows_not_0(typing_context, nonzero, at, column, count):
    """A bit for each of `count` rows, `ROWS_AT_ONCE` at the most, 1 where one of FEW columns of a panel is not 0.

    at : of the first row's word in `nonzero`; column : the first of them, in their panel.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        nonzero, (_, at, column, count) = first_entry(context, builder, signature.args[0], arguments[0]), arguments
        columns = builder.shl(WORD((1 << FEW) - 1), builder.trunc(column, WORD))
        return _rows_with(builder, builder.gep(nonzero, [at]), columns, count)

    return types.uint64(nonzero, types.intp, types.intp, types.intp), generate


def _block_tn(n_rows: int, n_panels: int) -> Any:
    @intrinsic
    def block_tn(
        typing_context,
        rows,
        at,
        apart,
        a,
        a_start,
        b,
        b_start,
        b_stride,
        c,
        c_start,
        c_stride,
        depth,
        accumulate,
        n_vectors,
    ):
        """n_rows of n_panels of C = Aᵀ B or C += Aᵀ B, over `depth` rows of A's panel and of B's.

        at : where in `rows` are those of the first FEW columns, and `apart` further those of the next; n_vectors : in
        use of the last panel.
        """

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            _, at, apart, _, a_start, _, b_start, b_stride, _, c_start, c_stride, depth, accumulate, width = arguments
            rows, a, b, c = (first_entry(context, builder, signature.args[i], arguments[i]) for i in (0, 3, 5, 8))

            def generate_width(n_vectors: int) -> None:
                vectors = Vectors(builder, signature.args[3].dtype, n_vectors)
                block, at_once = Block(vectors, n_rows, n_panels), SIZE(ROWS_AT_ONCE)
                block.start_from_zero()
                turns = builder.udiv(builder.add(depth, builder.sub(at_once, SIZE(1))), at_once)
                with cgutils.for_range(builder, turns) as loop:
                    some, entry = ROWS_OF_BITS(0), builder.mul(loop.index, SIZE(ROWS_AT_ONCE * vectors.panel))
                    for i in range(n_rows // FEW):
                        word = vectors.pointer(rows, at, loop.index, *([apart] * i))
                        some = builder.or_(some, builder.load(word, align=8))
                    left, right = vectors.pointer(a, a_start, entry), vectors.pointer(b, b_start, entry)
                    block.add_products_where(some, left, 1, vectors.panel, right, b_stride)
                block.write_or_add(vectors.pointer(c, c_start), accumulate, c_stride)

            for_each_width(builder, width, generate_width)
            return context.get_dummy_value()

        size = types.intp
        matrices = a, size, b, size, size, c, size, size
        return types.void(rows, size, size, *matrices, size, types.boolean, size), generate

    return block_tn


_block_tn_of_one, _block_tn_of_two = _block_tn(FEW_OF_ONE, 1), _block_tn(FEW, PANELS_AT_ONCE)


@compiled
def gemm_nn_where(nonzero, A, B, C, shape, bias):
    """As `gemm_nn`: C = A B + bias, overwriting C; see `note_nonzero`."""
    (a, a_start, a_stride), (b, b_start, b_stride), (c, c_start, c_stride) = A, B, C
    (n_rows, depth, n_columns), (bias, bias_start, bias_step) = shape, bias
    panel = panel_width(a)
    words, step, of_a = a_start // panel, a_stride // panel, (depth + panel - 1) // panel
    n_panels = (n_columns + panel - 1) // panel
    for p in range(0, n_panels, PANELS_AT_ONCE):
        n = vectors_in_use(a, n_columns - (min(p + PANELS_AT_ONCE, n_panels) - 1) * panel)
        right, own_bias, to = b_start + p * b_stride, bias_start + p * bias_step, c_start + p * c_stride
        if p + PANELS_AT_ONCE <= n_panels:
            for r in range(0, n_rows, FEW):
                _block_nn_of_two(
                    nonzero,
                    words + r,
                    step,
                    a,
                    a_start + r * panel,
                    a_stride,
                    b,
                    right,
                    b_stride,
                    c,
                    to + r * panel,
                    c_stride,
                    of_a,
                    bias,
                    own_bias,
                    bias_step,
                    n,
                )
        else:
            for r in range(0, n_rows, FEW_OF_ONE):
                left, place = a_start + r * panel, to + r * panel
                _block_nn_of_one(
                    nonzero, words + r, step, a, left, a_stride, b, right, 0, c, place, 0, of_a, bias, own_bias, 0, n
                )


@compiled
def note_rows(nonzero, A, columns, n_rows, rows):
    """For every FEW of A's columns first … last − 1, which rows are not 0 in all of them; see `rows_words`."""
    (a, a_start, a_stride), (first, last) = A, columns
    panel, at = panel_width(a), 0
    for column in range(first, last, FEW):
        word = (a_start + column // panel * a_stride) // panel
        for k in range(0, n_rows, ROWS_AT_ONCE):
            rows[at] = _rows_not_0(nonzero, word + k, column % panel, n_rows - k)
            at += 1


@compiled
def gemm_tn_where(nonzero, A, columns, B, panels, C, shape, accumulate, rows, fresh, claimed):
    """As `gemm_tn`: panels first … last − 1 of C = Aᵀ B, for some columns of A, or of C += Aᵀ B; see `note_nonzero`.

    panels : (first, last); C : (array, where the first of these panels' row `first` begins, from panel to panel).
    rows : (·,) uint64, as many as `rows_words` says, overwritten if `fresh`: unless the last call with it was for the
    same rows and columns of A.
    """
    (a, a_start, a_stride), (b, b_start, b_stride), (c, c_start, c_stride) = A, B, C
    (first, last), (depth, n_columns), (first_panel, end), (w, w_start) = columns, shape, panels, claimed
    panel, words = panel_width(a), (depth + ROWS_AT_ONCE - 1) // ROWS_AT_ONCE
    if fresh:
        note_rows(nonzero, A, columns, depth, rows)
    for p in range(first_panel, end, PANELS_AT_ONCE):
        count = min(PANELS_AT_ONCE, end - p)
        n = vectors_in_use(a, n_columns - (p + count - 1) * panel)
        few, right, result = FEW_OF_ONE if count == 1 else FEW, b_start + p * b_stride, (p - first_panel) * c_stride
        for column in range(first, last, few):
            left, to = a_start + column // panel * a_stride + column % panel, result + (column - first) * panel
            for q in range(count):
                claim((w, w_start), to + q * c_stride, few, min(few, last - column - few))
            for k in range(0, depth, ROWS_OF_SUM):
                word, place = (column - first) // FEW * words + k // ROWS_AT_ONCE, c_start + to
                A_here, B_here, adds = left + k * panel, right + k * panel, accumulate or k > 0
                some = min(ROWS_OF_SUM, depth - k)
                if count == 1:
                    _block_tn_of_one(rows, word, words, a, A_here, b, B_here, 0, c, place, 0, some, adds, n)
                else:
                    _block_tn_of_two(
                        rows, word, words, a, A_here, b, B_here, b_stride, c, place, c_stride, some, adds, n
                    )
