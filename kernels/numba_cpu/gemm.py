"""Products of matrices in panels: one loop of fused multiply-adds behind every product of a training step.

    gemm_nn:  C = A B + bias        forward: z = a_prev W + b; backward: δ_next W_nextᵀ, from a transposed copy of W
    gemm_tn:  C = Aᵀ B, or C += Aᵀ B    ∂C/∂W = a_prevᵀ δ
    sum_rows: c = Σ_rows B              ∂C/∂b = Σ_rows δ

A block of C, BLOCK_ROWS × VECTORS vectors, stays in registers while the loop runs over the inner dimension: each step
loads a row of B's panel as vectors and BLOCK_ROWS single elements of A. LLVM's auto-vectoriser does not find this
form, so the loop is written as LLVM's own vector operations, which it compiles for whatever machine there is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from backprop_gpu.kernels.numba_cpu.amx import MOST_DEPTH, by_thirds, in_tiles, multiply
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
    "sum_rows",
    "transpose_square",
]

UNROLL = 4
"""Steps of the inner dimension per turn of the loop; 2, 4 and 8 measured alike, 1 slower."""

ROWS_OF_SUM = 256
"""Rows over which a block of Aᵀ B is summed in one go: a longer float32 sum costs digits."""

CACHE_LINE = 64

IN_FIRST_LEVEL, IN_SECOND_LEVEL = 3, 2
"""Of the caches: the localities of LLVM's prefetch."""

BLOCKS_AHEAD = VECTORS * VECTOR_BYTES * UNROLL // CACHE_LINE
"""Blocks of a panel's rows in which the whole of the next panel is asked for, at a cache line a turn of the loop.

The first block to read a panel waits for it, as weights come from afar: from the third-level cache, or from that of the
core that updated them. Two cores of a Xeon, in µs a step: network M 628 without and 587 with it, 256-256-256-10 with
256 rows 696 and 657, S 46.2 and 45.2; L 18.6 and 17.7 ms.
"""

SIZE = ir.IntType(64)


class _Vectors:
    """Vector operations on the elements of a 1-D array's type, in a block of `n_vectors` vectors a row."""

    def __init__(self, builder: Any, element: Any, n_vectors: int, lanes: int | None = None) -> None:
        self.builder, self.n_vectors = builder, n_vectors
        self.scalar = ir.FloatType() if element == types.float32 else ir.DoubleType()
        self.itemsize = element.bitwidth // 8
        self.panel = VECTORS * VECTOR_BYTES // self.itemsize
        self.lanes = lanes or VECTOR_BYTES // self.itemsize
        self.vector = ir.VectorType(self.scalar, self.lanes)
        self.zero = ir.Constant(self.vector, [0.0] * self.lanes)

    def pointer(self, base: Any, *terms: Any) -> Any:
        """The address of element Σ terms of `base`; a term is a value or a Python integer."""
        for term in terms:
            index = SIZE(term) if isinstance(term, int) else term
            base = self.builder.gep(base, [index])
        return base

    def _to_vector(self, pointer: Any) -> Any:
        return self.builder.bitcast(pointer, self.vector.as_pointer())

    def load(self, pointer: Any) -> Any:
        return self.builder.load(self._to_vector(pointer), align=self.itemsize)

    def store(self, value: Any, pointer: Any) -> None:
        self.builder.store(value, self._to_vector(pointer), align=self.itemsize)

    def splat(self, pointer: Any) -> Any:
        """The element there in every lane."""
        undefined = ir.Constant(self.vector, ir.Undefined)
        element = self.builder.load(pointer, align=self.itemsize)
        one = self.builder.insert_element(undefined, element, ir.IntType(32)(0))
        lanes = ir.Constant(ir.VectorType(ir.IntType(32), self.lanes), [0] * self.lanes)
        return self.builder.shuffle_vector(one, undefined, lanes)

    def multiply_add(self, x: Any, y: Any, z: Any) -> Any:
        """x · y + z, in one instruction where the machine has it."""
        kind = ir.FunctionType(self.vector, [self.vector] * 3)
        name = f"llvm.fmuladd.v{self.lanes}f{8 * self.itemsize}"
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, kind, name), [x, y, z])

    def prefetch(self, pointer: Any, locality: int) -> None:
        """Ask for the cache line there, to be read; nothing happens where there is none."""
        byte, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, flag, flag, flag])
        function = self.builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
        self.builder.call(function, [self.builder.bitcast(pointer, byte), flag(0), flag(locality), flag(1)])

    def row(self, base: Any, row: int) -> list[Any]:
        """Addresses of the vectors of one row of a block."""
        return [self.pointer(base, row * self.panel + v * self.lanes) for v in range(self.n_vectors)]


class _Block:
    """A block of C in registers."""

    def __init__(self, vectors: _Vectors, n_rows: int = BLOCK_ROWS) -> None:
        self.vectors, self.builder = vectors, vectors.builder
        # Stack slots, which LLVM turns into registers: so the loops below need no φ nodes.
        self.sums = [
            [cgutils.alloca_once(self.builder, vectors.vector) for _ in range(vectors.n_vectors)] for _ in range(n_rows)
        ]

    def start_from(self, values: list[Any]) -> None:
        """Every row becomes this row of vectors."""
        for row in self.sums:
            for value, slot in zip(values, row, strict=True):
                self.builder.store(value, slot)

    def add_products(self, a: Any, row_step: int, k_step: int, b: Any, count: Any, ahead: Any = None) -> None:
        """C[i, :] += Σₖ a[i · row_step + k · k_step] · b[k, :], k < count; asks for a line a turn, from `ahead` on."""
        turns = self.builder.udiv(count, SIZE(UNROLL))
        with cgutils.for_range(self.builder, turns) as loop:
            first = self.builder.mul(loop.index, SIZE(UNROLL))
            if ahead is not None:
                line = self.builder.mul(loop.index, SIZE(CACHE_LINE // self.vectors.itemsize))
                self.vectors.prefetch(self.vectors.pointer(ahead, line), IN_SECOND_LEVEL)
            for k in range(UNROLL):
                self._step(a, row_step, k_step, b, self.builder.add(first, SIZE(k)))
        done = self.builder.mul(turns, SIZE(UNROLL))
        with cgutils.for_range(self.builder, self.builder.sub(count, done)) as loop:
            self._step(a, row_step, k_step, b, self.builder.add(done, loop.index))

    def _step(self, a: Any, row_step: int, k_step: int, b: Any, k: Any) -> None:
        vectors, builder = self.vectors, self.builder
        a = vectors.pointer(a, builder.mul(k, SIZE(k_step)))
        b = vectors.pointer(b, builder.mul(k, SIZE(vectors.panel)))
        b_row = [vectors.load(pointer) for pointer in vectors.row(b, 0)]
        for i, sums in enumerate(self.sums):
            element = vectors.splat(vectors.pointer(a, i * row_step))
            for value, slot in zip(b_row, sums, strict=True):
                builder.store(vectors.multiply_add(element, value, builder.load(slot)), slot)

    def add_row(self, b: Any) -> None:
        """C[i, :] += b."""
        for sums in self.sums:
            for slot, pointer in zip(sums, self.vectors.row(b, 0), strict=True):
                self.builder.store(self.builder.fadd(self.builder.load(slot), self.vectors.load(pointer)), slot)

    def write_or_add(self, c: Any, accumulate: Any) -> None:
        """Overwrite C, or add to it."""
        with self.builder.if_else(accumulate) as (adding, overwriting):
            with adding:
                self.add_to(c)
            with overwriting:
                self.write(c)
                self.clear_rest(c)

    def clear_rest(self, c: Any) -> None:
        """0 in the vectors of C's panel that are none of this block's: the padding of a gradient has to be 0."""
        vectors = self.vectors
        for i in range(len(self.sums)):
            for v in range(vectors.n_vectors, VECTORS):
                vectors.store(vectors.zero, vectors.pointer(c, i * vectors.panel + v * vectors.lanes))

    def write(self, c: Any) -> None:
        """Overwrite C."""
        for i, sums in enumerate(self.sums):
            for slot, pointer in zip(sums, self.vectors.row(c, i), strict=True):
                self.vectors.store(self.builder.load(slot), pointer)

    def add_to(self, c: Any) -> None:
        """Add to C."""
        for i, sums in enumerate(self.sums):
            for slot, pointer in zip(sums, self.vectors.row(c, i), strict=True):
                total = self.builder.fadd(self.vectors.load(pointer), self.builder.load(slot))
                self.vectors.store(total, pointer)


def _for_each_width(builder: Any, n_vectors: Any, generate: Callable[[int], None]) -> None:
    """The code of `generate` for as many vectors a row as are in use, of which each number has its own."""
    for width in range(1, VECTORS + 1):
        with builder.if_then(builder.icmp_unsigned("==", n_vectors, SIZE(width))):
            generate(width)


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
                vectors = _Vectors(builder, signature.args[0].dtype, width)
                panel = SIZE(vectors.panel)
                block = _Block(vectors, n_rows)
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

            _for_each_width(builder, n_vectors, generate_width)
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
            vectors = _Vectors(builder, signature.args[0].dtype, width)
            block = _Block(vectors)
            block.start_from([vectors.zero] * width)
            block.add_products(vectors.pointer(a, a_start), 1, vectors.panel, vectors.pointer(b, b_start), depth)
            block.write_or_add(vectors.pointer(c, c_start), accumulate)

        _for_each_width(builder, n_vectors, generate_width)
        return context.get_dummy_value()

    size = types.intp
    return types.void(a, size, b, size, c, size, size, types.boolean, size), generate


@intrinsic
def sum_rows(typing_context, x, x_start, sums, sums_start, n_rows, accumulate):
    """sums = Σ_rows x, or sums += Σ_rows x, over n_rows rows of one panel."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, x_start, _, sums_start, n_rows, accumulate = arguments
        x, sums = (first_entry(context, builder, signature.args[i], arguments[i]) for i in (0, 2))
        vectors = _Vectors(builder, signature.args[0].dtype, VECTORS)
        block = _Block(vectors, n_rows=1)
        block.start_from([vectors.zero] * VECTORS)
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
            vectors = _Vectors(builder, signature.args[0].dtype, width)
            source, target = (vectors.row(vectors.pointer(*at), 0) for at in ((x, x_start), (y, y_start)))
            for value, pointer in zip([vectors.load(pointer) for pointer in source], target, strict=True):
                vectors.store(value, pointer)

        _for_each_width(builder, n_vectors, generate_width)
        return context.get_dummy_value()

    return types.void(x, types.intp, y, types.intp, types.intp), generate


@intrinsic
def prefetch_panel(typing_context, x, start):
    """Ask for one panel's width of elements, to be read soon; nothing happens where there are none."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vectors = _Vectors(builder, signature.args[0].dtype, VECTORS)
        start = vectors.pointer(first_entry(context, builder, signature.args[0], arguments[0]), arguments[1])
        for pointer in vectors.row(start, 0):
            vectors.prefetch(pointer, IN_FIRST_LEVEL)
        return context.get_dummy_value()

    return types.void(x, types.intp), generate


@intrinsic
def claim_panel(typing_context, x, start):
    """Store 64 bits of every vector of one panel's width of elements again, which no other thread reads or writes.

    For that, other cores have to give up their copies, and this one computes meanwhile. To ask for the line (PREFETCHW)
    seems to do nothing on a Zen 4 that has a copy itself: network M with 32 rows takes 386 µs a step so, and 325 like
    this, on two cores that share no cache, and 241 and 235 on two that do. On a Zen 5 without a common cache it took
    M from 460 to 420 µs; claims are not measured there, nor on Intel.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vectors = _Vectors(builder, signature.args[0].dtype, VECTORS)
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
        vectors = _Vectors(builder, signature.args[0].dtype, 1, lanes=BLOCK_ROWS)
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
