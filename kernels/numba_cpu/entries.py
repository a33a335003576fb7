"""The first layer's products with a sparse X, by what is stored of it (see `data.Entries`): there is no tile of X.

    gemm_nn_of_entries: C = A B + bias      z = X W + b, row by row
    by_columns:                             the entries of a mini-batch, column by column
    gemm_tn_of_entries: C = Aᵀ B            ∂C/∂W = Xᵀ δ, column by column

An entry is one multiply-add for each vector of a row of C. The sums are those of `gemm`, to the bit, as x + 0 · w is x,
where no element is stored in parts and w is finite.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from backprop_gpu.kernels.numba_cpu.block import SIZE, Block, Vectors
from backprop_gpu.kernels.numba_cpu.compile import compiled
from backprop_gpu.kernels.numba_cpu.gemm import ROWS_OF_SUM, claim, copy_vectors
from backprop_gpu.kernels.numba_cpu.panels import BLOCK_ROWS, VECTORS, first_entry, panel_width

__all__ = ["by_columns", "gemm_nn_of_entries", "gemm_tn_of_entries"]

MOST_PANELS = 4
"""Of a row of C that are summed together, in a register for each vector."""


@intrinsic
def _add_entries(
    typing_context, values, indices, low, high, b, b_start, b_stride, b_row, c, c_start, c_stride, panels, apart
):
    """c += Σ values[e] · b[indices[e], :], low ≤ e < high, in so many panels of a row of C, MOST_PANELS at the most.

    b_row : from one row of b to the next, as b_stride is from one panel to the next; apart : the sum is made by itself,
    and then added; else it begins with c.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, _, low, high, _, b_start, b_stride, b_row, _, c_start, c_stride, panels, apart = arguments
        values, indices, b, c = (first_entry(context, builder, signature.args[i], arguments[i]) for i in (0, 1, 4, 8))
        vectors = Vectors(builder, signature.args[0].dtype, VECTORS)
        b, c = vectors.pointer(b, b_start), vectors.pointer(c, c_start)

        def generate_panels(count: int) -> None:
            block = Block(vectors, 1, count)
            places = block.row(c, 0, c_stride)
            before = [vectors.load(to) for to in places]
            block.start_from([builder.select(apart, vectors.zero, x) for x in before])
            with cgutils.for_range_slice(builder, low, high, SIZE(1)) as (entry, _):
                index = builder.zext(builder.load(vectors.pointer(indices, entry)), SIZE)
                row = vectors.pointer(b, builder.mul(index, b_row))
                block.add_product(vectors.pointer(values, entry), 0, row, b_stride)
            for to, x, total in zip(places, before, block.sums[0], strict=True):
                made = builder.load(total)
                vectors.store(builder.select(apart, builder.fadd(x, made), made), to)

        for count in range(1, MOST_PANELS + 1):
            with builder.if_then(builder.icmp_unsigned("==", panels, ir.Constant(SIZE, count))):
                generate_panels(count)
        return context.get_dummy_value()

    size, flag = types.intp, types.boolean
    return types.void(values, indices, size, size, b, size, size, size, c, size, size, size, flag), generate


@compiled
def gemm_nn_of_entries(entries, order, first, B, C, shape, bias):
    """C = A B + bias, overwriting C, see `gemm.gemm_nn`, for the rows order[first], … of a sparse A.

    B : as for `gemm.gemm_nn`, and what is from one row to the next: a panel's width, or in a row-major matrix, of which
    a panel of columns is a panel's width further, the number of columns; what is read beyond its end makes C's padding.
    shape : (rows, those that are computed, columns of B); where more are computed, as rows of A that are 0.
    """
    (b, b_start, b_stride, b_row), (c, c_start, c_stride), (bias, bias_start, bias_step) = B, C, bias
    panel, starts, (n_rows, n_computed, n_columns) = panel_width(b), entries.starts, shape
    n_panels = (n_columns + panel - 1) // panel
    for r in range(n_computed):
        row, to = order[first + min(r, n_rows - 1)], c_start + r * panel
        low, high = starts[row], starts[row + 1] if r < n_rows else starts[row]
        for p in range(n_panels):
            copy_vectors(bias, bias_start + p * bias_step, c, to + p * c_stride, VECTORS)
        for p in range(0, n_panels, MOST_PANELS):
            some, right, here = min(MOST_PANELS, n_panels - p), b_start + p * b_stride, to + p * c_stride
            where = right, b_stride, b_row
            _add_entries(entries.values, entries.columns, low, high, b, *where, c, here, c_stride, some, False)


@compiled
def by_columns(entries, order, first, n_rows, n_columns, sorted_entries):
    """The entries of rows order[first], … of a sparse matrix, (·, n_columns), column by column, and by rows in each.

    sorted_entries : (ends, rows, values), overwritten: where the entries of each column end, and those of the next
    begin; the row of each, from 0; its value.
    """
    ends, rows, values = sorted_entries
    for c in range(n_columns):
        ends[c] = 0
    for r in range(n_rows):
        row = order[first + r]
        for e in range(entries.starts[row], entries.starts[row + 1]):
            ends[entries.columns[e]] += 1
    total = 0
    for c in range(n_columns):  # where each column begins, for now
        count = ends[c]
        ends[c] = total
        total += count
    for r in range(n_rows):
        row = order[first + r]
        for e in range(entries.starts[row], entries.starts[row + 1]):
            to = ends[entries.columns[e]]
            rows[to], values[to] = r, entries.values[e]
            ends[entries.columns[e]] = to + 1


@compiled
def gemm_tn_of_entries(sorted_entries, n_columns, columns, B, p, C, claimed):
    """As `gemm.gemm_tn`: panel p of C = Aᵀ B, for the columns first … last − 1, whole blocks, of (·, n_columns)."""
    (first, last), (b, b_start, b_stride), (c, c_start) = columns, B, C
    ends, rows, values = sorted_entries
    panel = panel_width(b)
    for column in range(first, last):
        to = c_start + (column - first) * panel
        if (column - first) % BLOCK_ROWS == 0:
            claim(claimed, to - c_start, BLOCK_ROWS, min(BLOCK_ROWS, last - column - BLOCK_ROWS))
        for i in range(panel):
            c[to + i] = 0
        e, end = ends[column - 1] if 0 < column < n_columns else 0, ends[column] if column < n_columns else 0
        while e < end:
            low, limit = e, (rows[e] // ROWS_OF_SUM + 1) * ROWS_OF_SUM
            while e < end and rows[e] < limit:
                e += 1
            _add_entries(values, rows, low, e, b, b_start + p * b_stride, 0, panel, c, to, 0, 1, True)
