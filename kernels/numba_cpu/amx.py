"""Products of float32 matrices by Intel's AMX, a unit that multiplies tiles of bfloat16: each is the sum of six.

See `thirds` for how the factors lie, and how exact it is. On one core of a Xeon it makes 400 to 460 GFLOP/s of float32
without the splitting, where fused multiply-adds of AVX-512 make 190.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from backprop_gpu.kernels.numba_cpu.compile import compiled
from backprop_gpu.kernels.numba_cpu.panels import first_entry
from backprop_gpu.kernels.numba_cpu.processor import HAS_AMX
from backprop_gpu.kernels.numba_cpu.thirds import LEFT_STEP, PANEL, RIGHT_STEP, ROWS, STEP, TILE, split_pair, steps_in

__all__ = [
    "LEAST_GAIN",
    "MOST_DEPTH",
    "PAIRS_MEANWHILE",
    "begin",
    "by_thirds",
    "end",
    "gain",
    "in_tiles",
    "may_split",
    "multiply",
]

SUMS, LEFT, RIGHT = (0, 2), (4, 5), (6, 7)
"""The tile registers: of the sums, two for each 16 rows; of the left and of the right factor."""

PRODUCTS = ((2, 0), (0, 0), (1, 0), (1, 1), (0, 1), (0, 2))
"""The thirds that are multiplied, in this order: so two tiles of the left factor stay for the next product."""


def may_split(x: Any) -> bool:
    """Whether products of arrays like x may be computed here; in compiled code a constant."""
    return bool(HAS_AMX and x.dtype == np.float32)


@overload(may_split, jit_options={"nogil": True})
def _may_split(x):
    result = HAS_AMX and x.dtype == types.float32
    return lambda x: result


def gain(n_rows: int, n_columns: int) -> float:
    """How many times as long a product of so many rows and columns takes by vectors, if its inner steps are whole.

    By measurements of 396 shapes on a Xeon: the factors have to be split first.
    """
    return 2.3 / (1 + 72 / n_columns + 40 / n_rows)


LEAST_GAIN = 1.1

_gain = compiled(gain)


@compiled
def by_thirds(x, n_rows, depth, n_columns):
    """Whether such a product of arrays like x, (n_rows, depth) by (depth, n_columns), is computed here."""
    return may_split(x) and _gain(n_rows, n_columns) * depth >= LEAST_GAIN * STEP * steps_in(depth)


MOST_DEPTH = 1024
"""Of the inner dimension, summed in one go: the left factor of 128 rows takes 768 KiB so, and a longer sum costs
digits. With 2048 columns of a_prev in one go, 128 rows took as long as by vectors."""

PAIRS_MEANWHILE = 4
"""Of each step of the next panel, of 16, that are split while 32 rows are multiplied: one after each product of thirds,
as the unit works by itself. A product of 128 rows, 1024 by 1024, takes 730 µs, and 1020 if its panels are split before.
"""

FEW_ROWS = 8
"""Rows beyond the last tile's that vectors multiply sooner than one more tile: this takes half as long as two."""


@compiled
def in_tiles(n_rows):
    """Of n_rows, those that are computed here."""
    return n_rows // ROWS * ROWS if n_rows % ROWS <= FEW_ROWS else n_rows


LINE = 64
"""Bytes of a row of a tile."""


def _configuration() -> Any:
    """All tile registers of 16 rows of 64 bytes, in the form of LDTILECFG."""
    table = np.zeros(LINE, np.uint8)
    table[0] = 1
    table[16:32].view(np.uint16)[:] = LINE
    table[48:56] = ROWS
    return table


CONFIGURATION = _configuration()


@compiled
def begin(x):
    """Tile registers for this thread's products of arrays like x, 50 ns; to be followed by `end`, or its return."""
    if may_split(x):
        _configure(CONFIGURATION)


@compiled
def end(x):
    """Give the tile registers up: the system has nothing of them to save then."""
    if may_split(x):
        _release()


@compiled
def multiply(
    thirds, left, steps, right, n_rows, c, start, bias, bias_start, accumulate, x, x_start, depth, to, first_pair
):
    """C = A B + bias, or C += A B, for n_rows, at most 32, of A and one panel of B; C is a panel.

    thirds : the factors, from `left` and `right` on, after a panel's block for C; bias : added to every row. Meanwhile
    the pairs from first_pair to first_pair + PAIRS_MEANWHILE, if there are any, of the whole steps of the next panel of
    B, at x_start in x, are split into thirds[to]: this takes no time. Returns the next such pair.
    """
    direct, splits = n_rows % ROWS == 0 and not accumulate, first_pair < ROWS < n_rows
    into, at = (c, start) if direct else (thirds, 0)
    factors, source = (thirds, left, right, steps), (x, x_start, depth, to, first_pair)
    if n_rows <= ROWS:
        _one_tile(factors, (into, at), (bias, bias_start), accumulate, source)
    elif splits:
        _two_tiles_and_split(factors, (into, at), (bias, bias_start), accumulate, source)
    else:
        _two_tiles(factors, (into, at), (bias, bias_start), accumulate, source)
    if accumulate:
        for i in range(n_rows * PANEL):
            c[start + i] += thirds[i]
    elif not direct:
        for i in range(n_rows * PANEL):
            c[start + i] = thirds[i]
    return first_pair + PAIRS_MEANWHILE if splits else first_pair


BYTE, SIZE = ir.IntType(8), ir.IntType(64)
POINTER = BYTE.as_pointer()


class _Tiles:
    """The instructions, as LLVM knows them."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder

    def call(self, name: str, *operands: Any) -> None:
        """Register numbers are constants in the instruction."""
        values = [BYTE(operand) if isinstance(operand, int) else operand for operand in operands]
        kind = ir.FunctionType(ir.VoidType(), [value.type for value in values])
        self.builder.call(cgutils.get_or_insert_function(self.builder.module, kind, f"llvm.x86.{name}"), values)

    def address(self, base: Any, *terms: Any) -> Any:
        """Of entry Σ terms of `base`."""
        for term in terms:
            base = self.builder.gep(base, [SIZE(term) if isinstance(term, int) else term])
        return self.builder.bitcast(base, POINTER)


def _block(n_tiles: int, n_pairs: int) -> Any:
    @intrinsic
    def block(typing_context, factors, C, bias, without_bias, following):
        """n_tiles of A by a panel of B, written whole; n_pairs of each whole step of the next panel are split."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            if not HAS_AMX or signature.args[1][0].dtype != types.float32:
                return context.get_dummy_value()

            def unpacked(i: int) -> Any:
                array, *numbers = cgutils.unpack_tuple(builder, arguments[i])
                return first_entry(context, builder, signature.args[i][0], array), *numbers

            (thirds, left, right, steps), (c, start) = unpacked(0), unpacked(1)
            (bias, bias_start), (x, x_start, depth, to, first_pair) = unpacked(2), unpacked(4)
            tiles, blocks = _Tiles(builder), [(r, half) for r in range(n_tiles) for half in range(2)]

            def step(index: Any, n_pairs: int) -> None:
                rows = [builder.mul(builder.add(builder.mul(steps, SIZE(r)), index), SIZE(LEFT_STEP)) for r in (0, 1)]
                column, before = builder.mul(index, SIZE(RIGHT_STEP)), (None, None)
                for number, (i, j) in enumerate(PRODUCTS):
                    for r in range(n_tiles) if i != before[0] else ():
                        tiles.call("tileloadd64", LEFT[r], tiles.address(thirds, left, rows[r], i * TILE), SIZE(LINE))
                    for half in range(2) if j != before[1] else ():
                        place = tiles.address(thirds, right, column, (2 * j + half) * TILE)
                        tiles.call("tileloadd64", RIGHT[half], place, SIZE(LINE))
                    for r, half in blocks:
                        tiles.call("tdpbf16ps", SUMS[r] + half, LEFT[r], RIGHT[half])
                    before = i, j
                    if number < n_pairs:
                        from_row = builder.add(x_start, builder.mul(index, SIZE(STEP * PANEL)))
                        pair = builder.add(first_pair, SIZE(number))
                        split_pair(builder, x, from_row, thirds, builder.add(to, column), pair)

            with builder.if_else(arguments[3]) as (without, with_bias):
                with without:
                    for r, half in blocks:
                        tiles.call("tilezero", SUMS[r] + half)
                with with_bias:
                    for r, half in blocks:  # every row is the same: the next one is 0 bytes away
                        tiles.call("tileloadd64", SUMS[r] + half, tiles.address(bias, bias_start, half * ROWS), SIZE(0))
            # The next panel has something in its last step too, but not 32 rows.
            whole = builder.udiv(depth, SIZE(STEP)) if n_pairs else steps
            with cgutils.for_range(builder, whole) as loop:
                step(loop.index, n_pairs)
            with builder.if_then(builder.icmp_unsigned("<", whole, steps)):
                step(whole, 0)
            for r, half in blocks:
                place = tiles.address(c, start, r * ROWS * PANEL + half * ROWS)
                tiles.call("tilestored64", SUMS[r] + half, place, SIZE(2 * LINE))
            return context.get_dummy_value()

        return types.void(factors, C, bias, without_bias, following), generate

    return block


_one_tile, _two_tiles, _two_tiles_and_split = _block(1, 0), _block(2, 0), _block(2, PAIRS_MEANWHILE)


@intrinsic
def _configure(typing_context, table):
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if HAS_AMX:
            tiles = _Tiles(builder)
            tiles.call("ldtilecfg", tiles.address(first_entry(context, builder, signature.args[0], arguments[0])))
        return context.get_dummy_value()

    return types.void(table), generate


@intrinsic
def _release(typing_context):
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if HAS_AMX:
            _Tiles(builder).call("tilerelease")
        return context.get_dummy_value()

    return types.void(), generate
