"""A block of a product's result in vector registers, and the loops of fused multiply-adds over it.

LLVM's auto-vectoriser does not find this form, so it is written as LLVM's own vector operations, which it compiles for
whatever machine there is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from backprop_gpu.kernels.numba_cpu.panels import BLOCK_ROWS, VECTOR_BYTES, VECTORS

__all__ = ["SIZE", "UNROLL", "Block", "Vectors", "for_each_width"]

UNROLL = 4
"""Steps of the inner dimension per turn of the loop; 2, 4 and 8 measured alike, 1 slower."""

CACHE_LINE = 64

IN_FIRST_LEVEL, IN_SECOND_LEVEL = 3, 2
"""Of the caches: the localities of LLVM's prefetch."""

SIZE = ir.IntType(64)


class Vectors:
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
        """The vector that begins there."""
        return self.builder.load(self._to_vector(pointer), align=self.itemsize)

    def store(self, value: Any, pointer: Any) -> None:
        """Overwrite the vector that begins there."""
        self.builder.store(value, self._to_vector(pointer), align=self.itemsize)

    def splat(self, pointer: Any) -> Any:
        """The element there in every lane."""
        undefined = ir.Constant(self.vector, ir.Undefined)
        element = self.builder.load(pointer, align=self.itemsize)
        one = self.builder.insert_element(undefined, element, ir.IntType(32)(0))
        return self.shuffle(one, undefined, [0] * self.lanes)

    def shuffle(self, x: Any, y: Any, lanes: list[int]) -> Any:
        """These lanes of x, and of y from `self.lanes` on."""
        return self.builder.shuffle_vector(x, y, ir.Constant(ir.VectorType(ir.IntType(32), self.lanes), lanes))

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


class Block:
    """A block of C in registers: some rows of one panel, or of several; only the last may be in use in part."""

    def __init__(self, vectors: Vectors, n_rows: int = BLOCK_ROWS, n_panels: int = 1) -> None:
        self.vectors, self.builder = vectors, vectors.builder
        in_use = [VECTORS] * (n_panels - 1) + [vectors.n_vectors]
        self.places = [(p, v) for p, count in enumerate(in_use) for v in range(count)]
        # Stack slots, which LLVM turns into registers: so the loops below need no φ nodes.
        self.sums = [[cgutils.alloca_once(self.builder, vectors.vector) for _ in self.places] for _ in range(n_rows)]

    def row(self, base: Any, row: int, stride: Any = 0) -> list[Any]:
        """Addresses of the vectors of one row, in panels `stride` apart."""
        vectors = self.vectors
        return [vectors.pointer(base, row * vectors.panel + v * vectors.lanes, *([stride] * p)) for p, v in self.places]

    def start_from_zero(self) -> None:
        """Every row becomes 0."""
        self.start_from([self.vectors.zero] * len(self.places))

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

    def add_products_where(self, bits: Any, a: Any, row_step: int, k_step: int, b: Any, b_stride: Any) -> None:
        """C[i, :] += Σₖ a[i · row_step + k · k_step] · b[k, :], over those k whose bit is 1.

        b_stride : from one panel of b to the next.
        """
        builder, one = self.builder, ir.Constant(bits.type, 1)
        left = cgutils.alloca_once_value(builder, bits)
        with cgutils.for_range(builder, builder.zext(builder.ctpop(bits), SIZE)):
            now = builder.load(left)
            builder.store(builder.and_(now, builder.sub(now, one)), left)
            k = builder.zext(builder.cttz(now, ir.Constant(ir.IntType(1), 1)), SIZE)
            self._step(a, row_step, k_step, b, k, b_stride)

    def _step(self, a: Any, row_step: int, k_step: int, b: Any, k: Any, b_stride: Any = 0) -> None:
        vectors, builder = self.vectors, self.builder
        a = vectors.pointer(a, builder.mul(k, SIZE(k_step)))
        self.add_product(a, row_step, vectors.pointer(b, builder.mul(k, SIZE(vectors.panel))), b_stride)

    def add_product(self, a: Any, row_step: int, b: Any, b_stride: Any = 0) -> None:
        """C[i, :] += a[i · row_step] · b, one row in panels b_stride apart."""
        vectors, builder = self.vectors, self.builder
        b_row = [vectors.load(pointer) for pointer in self.row(b, 0, b_stride)]
        for i, sums in enumerate(self.sums):
            element = vectors.splat(vectors.pointer(a, i * row_step))
            for value, slot in zip(b_row, sums, strict=True):
                builder.store(vectors.multiply_add(element, value, builder.load(slot)), slot)

    def add_row(self, b: Any) -> None:
        """C[i, :] += b."""
        for sums in self.sums:
            for slot, pointer in zip(sums, self.row(b, 0), strict=True):
                self.builder.store(self.builder.fadd(self.builder.load(slot), self.vectors.load(pointer)), slot)

    def write_or_add(self, c: Any, accumulate: Any, stride: Any = 0) -> None:
        """Overwrite C, in panels `stride` apart, or add to it."""
        with self.builder.if_else(accumulate) as (adding, overwriting):
            with adding:
                self.add_to(c, stride)
            with overwriting:
                self.write(c, stride)
                self.clear_rest(c, stride)

    def clear_rest(self, c: Any, stride: Any = 0) -> None:
        """0 in the vectors of C's panels that are none of this block's: the padding of a gradient has to be 0."""
        vectors, (last, in_use) = self.vectors, self.places[-1]
        for i in range(len(self.sums)):
            for v in range(in_use + 1, VECTORS):
                at = i * vectors.panel + v * vectors.lanes
                vectors.store(vectors.zero, vectors.pointer(c, at, *([stride] * last)))

    def write(self, c: Any, stride: Any = 0) -> None:
        """Overwrite C."""
        for i, sums in enumerate(self.sums):
            for slot, pointer in zip(sums, self.row(c, i, stride), strict=True):
                self.vectors.store(self.builder.load(slot), pointer)

    def add_to(self, c: Any, stride: Any = 0) -> None:
        """Add to C."""
        for i, sums in enumerate(self.sums):
            for slot, pointer in zip(sums, self.row(c, i, stride), strict=True):
                total = self.builder.fadd(self.vectors.load(pointer), self.builder.load(slot))
                self.vectors.store(total, pointer)


def for_each_width(builder: Any, n_vectors: Any, generate: Callable[[int], None]) -> None:
    """The code of `generate` for as many vectors a row as are in use, of which each number has its own."""
    for width in range(1, VECTORS + 1):
        with builder.if_then(builder.icmp_unsigned("==", n_vectors, SIZE(width))):
            generate(width)
