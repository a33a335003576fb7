"""The first layer's products without those by 0, for data that is mostly 0: images, one-hot columns, counts of words.

    note_nonzero:  which elements of A = X are not 0
    gemm_nn_where: C = A B + bias       z = X W + b, without the columns of A that are 0 in all of a few rows
    gemm_tn_where: C = Aᵀ B, or C += Aᵀ B    ∂C/∂W = Xᵀ δ, without the rows in which a few columns of A are all 0

A few are two, through two panels of B and C; with one panel, `FEW_OF_ONE`. What is left is summed in the order of
`gemm`, to the same bits, as x + 0 · w is x; but for a w that is not finite, whose product with 0 counts as 0 here.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from backprop_gpu.kernels.numba_cpu.block import SIZE, Block, Vectors, for_each_width
from backprop_gpu.kernels.numba_cpu.compile import compiled
from backprop_gpu.kernels.numba_cpu.gemm import ROWS_OF_SUM, claim, vectors_in_use
from backprop_gpu.kernels.numba_cpu.panels import HALF_BLOCK_ROWS, VECTORS, first_entry, panel_width, width

__all__ = ["PANELS_AT_ONCE", "ROWS_AT_ONCE", "gemm_nn_where", "gemm_tn_where", "n_together", "note_nonzero"]

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


def _block_tn(n_rows: int, n_panels: int) -> Any:
    @intrinsic
    def block_tn(
        typing_context,
        nonzero,
        at,
        a,
        a_start,
        column,
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

        at : of the first row's word in `nonzero`; column : the first of A's, in its panel; n_vectors : in use of the
        last panel.
        """

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            _, at, _, a_start, column, _, b_start, b_stride, _, c_start, c_stride, depth, accumulate, width = arguments
            nonzero, a, b, c = (first_entry(context, builder, signature.args[i], arguments[i]) for i in (0, 2, 5, 8))
            columns = builder.shl(WORD((1 << n_rows) - 1), builder.trunc(column, WORD))

            def generate_width(n_vectors: int) -> None:
                vectors = Vectors(builder, signature.args[2].dtype, n_vectors)
                block, at_once = Block(vectors, n_rows, n_panels), SIZE(ROWS_AT_ONCE)
                block.start_from_zero()
                turns = builder.udiv(builder.add(depth, builder.sub(at_once, SIZE(1))), at_once)
                with cgutils.for_range(builder, turns) as loop:
                    row = builder.mul(loop.index, at_once)
                    entry, words = builder.mul(row, SIZE(vectors.panel)), vectors.pointer(nonzero, at, row)
                    rows = _rows_with(builder, words, columns, builder.sub(depth, row))
                    left, right = vectors.pointer(a, a_start, column, entry), vectors.pointer(b, b_start, entry)
                    block.add_products_where(rows, left, 1, vectors.panel, right, b_stride)
                block.write_or_add(vectors.pointer(c, c_start), accumulate, c_stride)

            for_each_width(builder, width, generate_width)
            return context.get_dummy_value()

        size = types.intp
        return types.void(
            nonzero, size, a, size, size, b, size, size, c, size, size, size, types.boolean, size
        ), generate

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
def gemm_tn_where(nonzero, A, columns, B, panels, C, shape, accumulate, claimed):
    """As `gemm_tn`: panels first … last − 1 of C = Aᵀ B, for some columns of A, or of C += Aᵀ B; see `note_nonzero`.

    panels : (first, last); C : (array, where the first of these panels' row `first` begins, from panel to panel).
    """
    (a, a_start, a_stride), (b, b_start, b_stride), (c, c_start, c_stride) = A, B, C
    (first, last), (depth, n_columns), (first_panel, end) = columns, shape, panels
    panel, (w, w_start) = panel_width(a), claimed
    for p in range(first_panel, end, PANELS_AT_ONCE):
        count = min(PANELS_AT_ONCE, end - p)
        n = vectors_in_use(a, n_columns - (p + count - 1) * panel)
        few, right, result = FEW_OF_ONE if count == 1 else FEW, b_start + p * b_stride, (p - first_panel) * c_stride
        for column in range(first, last, few):
            left, to = a_start + column // panel * a_stride, result + (column - first) * panel
            for q in range(count):
                claim((w, w_start), to + q * c_stride, few, min(few, last - column - few))
            for k in range(0, depth, ROWS_OF_SUM):
                some, adds, here = min(ROWS_OF_SUM, depth - k), accumulate or k > 0, k * panel
                word, own = left // panel + k, column % panel
                if count == 1:
                    _block_tn_of_one(
                        nonzero, word, a, left + here, own, b, right + here, 0, c, c_start + to, 0, some, adds, n
                    )
                else:
                    _block_tn_of_two(
                        nonzero,
                        word,
                        a,
                        left + here,
                        own,
                        b,
                        right + here,
                        b_stride,
                        c,
                        c_start + to,
                        c_stride,
                        some,
                        adds,
                        n,
                    )
