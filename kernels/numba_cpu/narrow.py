"""The last columns of a product where they are few: outputs of one or two classes, or ten as a vector and two more.

    gemm_nn_narrow: C = A B + bias    scalar products of A's rows and B's columns, which are rows of Bᵀ
    gemm_tn_narrow: C += Aᵀ B         rows of Cᵀ = Bᵀ A, written as columns
    gemm_tn_turned: Cᵀ = Bᵀ A, or Cᵀ += Bᵀ A    where all columns of C are few

By `gemm` they take as long as a whole vector of columns: each of its products by an element of A has few numbers to
multiply. Here vectors lie along the other dimension, which is long.

A W whose columns are all few is kept as Wᵀ alone, and so are its gradient and the optimizer's state ("turned"): 1, 2 or
4 rows in place of panels that are padding for the most part, which the update would go through, and threads hand to
each other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from backprop_gpu.kernels.numba_cpu.block import SIZE, Block, Vectors
from backprop_gpu.kernels.numba_cpu.compile import compiled
from backprop_gpu.kernels.numba_cpu.gemm import ROWS_OF_SUM
from backprop_gpu.kernels.numba_cpu.panels import HALF_BLOCK_ROWS, VECTORS, first_entry, lanes, panel_width

__all__ = ["gemm_nn_narrow", "gemm_tn_narrow", "gemm_tn_turned", "n_narrow", "rows_turned"]

PART_OF_VECTOR = 4
"""Up to a quarter of a vector's columns are few.

One core of a Zen 4 with 100 rows, by `gemm` and here, in µs: 4 of 16 columns, 100 deep, z 2.74 and 1.03, ∂C/∂W 2.97 and
1.04; 2 of 8 in float64, 100 deep, z 2.79 and 1.00, ∂C/∂W 2.79 and 1.08. More than a quarter is not measured.
"""


def n_narrow(n_columns: int, dtype: Any) -> int:
    """How many of these columns are few in their vector, the last one: 0 where they are not."""
    few = n_columns % lanes(dtype)
    return few if few * PART_OF_VECTOR <= lanes(dtype) else 0


def rows_turned(n_columns: int) -> int:
    """Rows of a panel of Wᵀ, for a W of so few columns: the next power of two, as the products take so many."""
    return 1 << (n_columns - 1).bit_length()


def _for_each_count(builder: Any, vectors: Vectors, n_columns: Any, generate: Callable[[int], None]) -> None:
    """The code of `generate` for 1, 2, 4, … columns up to the most, and to be executed the first that is enough."""
    count = 1
    while count * PART_OF_VECTOR <= vectors.lanes:
        is_enough = builder.icmp_unsigned("<=", n_columns, SIZE(count))
        with builder.if_then(builder.and_(is_enough, builder.icmp_unsigned(">", n_columns, SIZE(count // 2)))):
            generate(count)
        count *= 2


def _sums_of_lanes(vectors: Vectors, rows: list[Any]) -> Any:
    """A vector whose lane i is the sum of the lanes of rows[i % n], for n vectors, a power of two up to the lanes.

    Two vectors become one, with half the lanes of each: first every other lane, then every other two, and so on.
    """
    builder, n, group = vectors.builder, vectors.lanes, 1
    while len(rows) > 1:
        firsts = [i for i in range(n) if i // group % 2 == 0]
        pairs = zip(rows[::2], rows[1::2], strict=True)
        rows = [
            builder.fadd(*(vectors.shuffle(x, y, _in_turn(firsts, group, n, shift)) for shift in (0, group)))
            for x, y in pairs
        ]
        group *= 2
    (total,) = rows
    distance = n // 2
    while distance >= group:
        other = vectors.shuffle(total, total, [(i + distance) % n for i in range(n)])
        total, distance = builder.fadd(total, other), distance // 2
    return total


def _in_turn(firsts: list[int], group: int, n: int, shift: int) -> list[int]:
    """`group` lanes of one vector, then as many of the other, whose lanes count from n on; all `shift` further on."""
    runs = [firsts[i : i + group] for i in range(0, len(firsts), group)]
    return [lane + shift + which * n for run in runs for which in (0, 1) for lane in run]


@intrinsic
def _block_nn_narrow(
    typing_context, a, a_start, a_stride, t, t_start, t_stride, c, c_start, n_panels, bias, bias_start, n_columns
):
    """HALF_BLOCK_ROWS of the last vector of C = A B + bias, A and T = Bᵀ in n_panels, n_columns of them not padding."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, a_start, a_stride, _, t_start, t_stride, _, c_start, n_panels, _, bias_start, n_columns = arguments
        a, t, c, bias = (first_entry(context, builder, signature.args[i], arguments[i]) for i in (0, 3, 6, 9))
        vectors = Vectors(builder, signature.args[0].dtype, VECTORS)
        panel = vectors.panel

        def generate_count(count: int) -> None:
            sums = [
                [cgutils.alloca_once_value(builder, vectors.zero) for _ in range(count)] for _ in range(HALF_BLOCK_ROWS)
            ]
            with cgutils.for_range(builder, n_panels) as loop:
                left = vectors.pointer(a, a_start, builder.mul(loop.index, a_stride))
                right = vectors.pointer(t, t_start, builder.mul(loop.index, t_stride))
                for at in range(0, panel, vectors.lanes):
                    columns = [vectors.load(vectors.pointer(right, j * panel + at)) for j in range(count)]
                    for i, slots in enumerate(sums):
                        row = vectors.load(vectors.pointer(left, i * panel + at))
                        for column, slot in zip(columns, slots, strict=True):
                            builder.store(vectors.multiply_add(row, column, builder.load(slot)), slot)
            totals = _sums_of_lanes(vectors, [builder.load(slot) for slots in sums for slot in slots])
            start = vectors.load(vectors.pointer(bias, bias_start))
            for i in range(HALF_BLOCK_ROWS):
                own = [i * count + j if j < count else vectors.lanes for j in range(vectors.lanes)]
                row = builder.fadd(start, vectors.shuffle(totals, vectors.zero, own))
                vectors.store(row, vectors.pointer(c, c_start, i * panel))

        _for_each_count(builder, vectors, n_columns, generate_count)
        return context.get_dummy_value()

    size = types.intp
    return types.void(a, size, size, t, size, size, c, size, size, bias, size, size), generate


def _products_tn(vectors: Vectors, count: int, a: Any, b: Any, depth: Any) -> Block:
    """`count` rows of Bᵀ A in registers, over `depth` rows of A's panel, and of B's from column `b` on."""
    block = Block(vectors, count)
    block.start_from_zero()
    block.add_products(b, 1, vectors.panel, a, depth)
    return block


@intrinsic
def _block_tn_narrow(typing_context, a, a_start, b, b_start, c, c_start, depth, low, high, n_columns):
    """C += Aᵀ B in rows low … high − 1 of C, which are columns of A's panel, for n_columns of B from b_start on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, a_start, _, b_start, _, c_start, depth, low, high, n_columns = arguments
        a, b, c = (first_entry(context, builder, signature.args[i], arguments[i]) for i in (0, 2, 4))
        vectors = Vectors(builder, signature.args[0].dtype, VECTORS)
        left, right = vectors.pointer(a, a_start), vectors.pointer(b, b_start)

        def generate_count(count: int) -> None:
            room = cgutils.alloca_once(builder, ir.ArrayType(vectors.scalar, count * vectors.panel))
            transposed = builder.bitcast(room, vectors.scalar.as_pointer())
            _products_tn(vectors, count, left, right, depth).write(transposed)
            with cgutils.for_range(builder, builder.sub(high, low)) as loop:
                row, column = vectors.zero, builder.add(low, loop.index)
                for j in range(count):
                    place = vectors.pointer(transposed, j * vectors.panel, column)
                    row = builder.insert_element(row, builder.load(place, align=vectors.itemsize), ir.IntType(32)(j))
                target = vectors.pointer(c, c_start, builder.mul(loop.index, SIZE(vectors.panel)))
                vectors.store(builder.fadd(vectors.load(target), row), target)

        _for_each_count(builder, vectors, n_columns, generate_count)
        return context.get_dummy_value()

    size = types.intp
    return types.void(a, size, b, size, c, size, size, size, size, size), generate


@intrinsic
def _block_tn_turned(typing_context, a, a_start, b, b_start, c, c_start, depth, accumulate, n_columns):
    """A panel of Cᵀ = Bᵀ A or Cᵀ += Bᵀ A, over `depth` rows of A's panel, and of n_columns of B from b_start on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, a_start, _, b_start, _, c_start, depth, accumulate, n_columns = arguments
        a, b, c = (first_entry(context, builder, signature.args[i], arguments[i]) for i in (0, 2, 4))
        vectors = Vectors(builder, signature.args[0].dtype, VECTORS)
        left, right = vectors.pointer(a, a_start), vectors.pointer(b, b_start)

        def generate_count(count: int) -> None:
            _products_tn(vectors, count, left, right, depth).write_or_add(vectors.pointer(c, c_start), accumulate)

        _for_each_count(builder, vectors, n_columns, generate_count)
        return context.get_dummy_value()

    size = types.intp
    return types.void(a, size, b, size, c, size, size, types.boolean, size), generate


@compiled
def gemm_nn_narrow(A, T, C, shape, bias, few, turned):
    """The last `few` of C's columns in C = A B + bias, and 0 in the rest of their vector.

    A, C and shape : as `gemm_nn` takes them, n_rows whole half blocks, the padding of A finite; T : Bᵀ, in panels,
    whose padding is 0, of the last columns alone where it is `turned`; bias : (array, where it begins).
    """
    (a, a_start, a_stride), (t, t_start, t_stride), (c, c_start, c_stride) = A, T, C
    (n_rows, depth, n_columns), (bias, bias_start) = shape, bias
    panel, first = panel_width(a), n_columns - few
    n_panels, own = (depth + panel - 1) // panel, bias_start + first
    right = t_start + (0 if turned else first * panel)
    to = c_start + first // panel * c_stride + first % panel
    for r in range(0, n_rows * panel, HALF_BLOCK_ROWS * panel):
        _block_nn_narrow(a, a_start + r, a_stride, t, right, t_stride, c, to + r, n_panels, bias, own, few)


@compiled
def gemm_tn_narrow(A, columns, B, C, shape, few):
    """C += AᵀB in the last `few` of its columns, for the columns first … last − 1 of A; all but C as for `gemm_tn`.

    C : (array, where row `first` begins in the last panel).
    """
    (a, a_start, a_stride), (b, b_start, b_stride), (c, c_start) = A, B, C
    (first, last), (depth, n_columns) = columns, shape
    panel, own = panel_width(a), n_columns - few
    right, to = b_start + own // panel * b_stride + own % panel, c_start + own % panel
    for q in range(first // panel, (last + panel - 1) // panel):
        low, high = max(first - q * panel, 0), min(last - q * panel, panel)
        left, rows = a_start + q * a_stride, to + (q * panel + low - first) * panel
        for k in range(0, depth, ROWS_OF_SUM):
            some, here = min(ROWS_OF_SUM, depth - k), k * panel
            _block_tn_narrow(a, left + here, b, right + here, c, rows, some, low, high, few)


@compiled
def gemm_tn_turned(A, panels, B, C, n_rows, n_columns, accumulate):
    """Cᵀ = BᵀA, or Cᵀ += BᵀA, for A's panels first … last − 1 and B of n_columns, which are few, over n_rows rows.

    panels : (first, last); A and B as for `gemm_tn`; C : (array, where the first of these panels begins, from panel to
    panel).
    """
    (a, a_start, a_stride), (b, b_start, _), (c, c_start, c_stride) = A, B, C
    panel, (first, last) = panel_width(a), panels
    for q in range(first, last):
        left, rows = a_start + q * a_stride, c_start + (q - first) * c_stride
        for k in range(0, n_rows, ROWS_OF_SUM):
            some, here = min(ROWS_OF_SUM, n_rows - k), k * panel
            _block_tn_turned(a, left + here, b, b_start + here, c, rows, some, accumulate or k > 0, n_columns)
