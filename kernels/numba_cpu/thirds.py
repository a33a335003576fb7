"""float32 as the sum of three bfloat16, for a unit that multiplies tiles of these, and sums in float32.

    x = x₁ + x₂ + x₃        x₁ is x rounded to bfloat16, x₂ what is left, rounded, x₃ what is left then: exactly x
    x y ≈ x₁y₁ + x₁y₂ + x₂y₁ + x₁y₃ + x₂y₂ + x₃y₁

The three products that are left out are about 2⁻²⁴ of |x y| at most, one rounding of float32. That unit rounds a
sum once for 32 products of each kind, so a long sum is more exact than one of fused multiply-adds. An x whose x₃ is
below the smallest normal number (|x| < 2⁻¹⁰²) loses it; an infinite x, or one above 3.39e38, becomes NaN.

A tile is 16 rows of 16 pairs of bfloat16, each in 32 bits, one after the other. A step is 32 of the products' inner
dimension. Pair j of a step holds its numbers j (low) and j + 16 (high): any order is as good, if both factors have the
same, and this one takes no shuffles. From the first entry of a factor on, in tiles of TILE entries:

    left,  A:  tile (t, step, third) at (t · n_steps + step) · 3 + third    16 rows of A by the step
    right, B:  tile (step, third, half) at (step · 3 + third) · 2 + half    the step by 16 columns of a panel
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from backprop_gpu.kernels.numba_cpu.compile import compiled
from backprop_gpu.kernels.numba_cpu.panels import first_entry, round_up

__all__ = [
    "BLOCK",
    "LEFT_STEP",
    "PANEL",
    "RIGHT_STEP",
    "ROWS",
    "STEP",
    "TILE",
    "entries",
    "split_pair",
    "steps_in",
    "thirds_of_columns",
    "thirds_of_panel",
    "thirds_of_rows",
    "transposed",
]

ROWS, STEP = 16, 32
"""Of a tile; of the inner dimension."""

TILE = 256
"""Entries of a tile."""

THIRDS = 3
LEFT_STEP, RIGHT_STEP = THIRDS * TILE, 2 * THIRDS * TILE
"""Entries of a step of 16 rows of the left factor, and of a panel of the right one."""

PANEL = STEP
"""Columns of a panel of float32 on every processor that has such a unit: 2 vectors of 16."""


BLOCK = 2 * ROWS * PANEL
"""Entries before the factors: a block of the product."""


def entries(n_rows: int, depth: int) -> int:
    """Entries that a product takes: a block of it, a panel of its right factor, and n_rows of the left one."""
    steps = round_up(depth, STEP) // STEP
    return BLOCK + steps * (2 * RIGHT_STEP + round_up(n_rows, ROWS) // ROWS * LEFT_STEP)


@compiled
def steps_in(depth):
    """Steps of the inner dimension, of which the last may be filled up with zeros."""
    return (depth + STEP - 1) // STEP


@compiled
def thirds_of_rows(x, start, stride, n_rows, depth, thirds, to):
    """A = x, (n_rows, depth) in panels, as a left factor from thirds[to] on; nothing is written beyond."""
    steps = steps_in(depth)
    for s in range(steps):
        for r in range(n_rows):
            target = to + (r // ROWS * steps + s) * LEFT_STEP + r % ROWS * ROWS
            _split_row(x, start + s * stride + r * PANEL, depth - s * STEP, thirds, target)


@compiled
def thirds_of_columns(x, start, stride, first, last, depth, thirds, to):
    """A = xᵀ for the columns first … last − 1, multiples of 8, of `depth` rows of x, as a left factor."""
    steps = steps_in(depth)
    for column in range(first, last, ROWS):
        low = start + column // PANEL * stride + column % PANEL
        other = min(column + ROWS // 2, last - ROWS // 2)  # of which nothing is used where there is none
        high = start + other // PANEL * stride + other % PANEL
        for s in range(steps):
            target = to + ((column - first) // ROWS * steps + s) * LEFT_STEP
            row = s * STEP * PANEL
            _split_columns(x, low + row, high + row, depth - s * STEP, thirds, target)


@compiled
def thirds_of_panel(x, start, depth, first_pair, thirds, to):
    """B = `depth` rows of one panel of x, as a right factor; of whole steps only the pairs from first_pair on."""
    for s in range(depth // STEP if first_pair >= ROWS else 0, steps_in(depth)):
        count = depth - s * STEP
        first = first_pair if count >= STEP else 0
        _split_panel(x, start + s * STEP * PANEL, count, first, thirds, to + s * RIGHT_STEP)


# In registers

SIZE, LANE = ir.IntType(64), ir.IntType(32)
LANES = 16
FLOATS, BITS = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(LANE, LANES)
HALF = ir.VectorType(ir.FloatType(), LANES // 2)


def _all(value: int) -> Any:
    return ir.Constant(BITS, [value] * LANES)


def _in_thirds(builder: Any, x: Any) -> list[Any]:
    """The three parts of a vector, each in the upper half of its lanes; the lower one of the last may be anything."""
    parts = []
    for _ in range(THIRDS - 1):
        rounded = builder.add(builder.bitcast(x, BITS), _all(1 << 15))
        parts.append(builder.and_(rounded, _all(-1 << 16)))
        x = builder.fsub(x, builder.bitcast(parts[-1], FLOATS))
    return [*parts, builder.bitcast(x, BITS)]


def _in_pairs(builder: Any, low: Any, high: Any) -> list[Any]:
    """For each third, a vector of pairs."""
    return [
        builder.or_(builder.lshr(one, _all(16)), builder.and_(other, _all(-1 << 16)))
        for one, other in zip(_in_thirds(builder, low), _in_thirds(builder, high), strict=True)
    ]


class _Source:
    """The array that is split, and the one that is written to."""

    def __init__(self, builder: Any, x: Any, thirds: Any, to: Any) -> None:
        self.builder, self.x, self.thirds, self.to = builder, x, thirds, to

    def load(self, at: Any, kind: Any = FLOATS) -> Any:
        """The vector from x[at] on."""
        return self.builder.load(self.builder.bitcast(self.builder.gep(self.x, [at]), kind.as_pointer()), align=4)

    def store(self, pairs: Any, tile: int, row: Any) -> None:
        """A row of a tile."""
        at = self.builder.add(self.to, self.builder.add(SIZE(tile * TILE), self.builder.mul(row, SIZE(LANES))))
        pointer = self.builder.gep(self.thirds, [at])
        self.builder.store(pairs, self.builder.bitcast(pointer, BITS.as_pointer()), align=4)


def _whole_or_not(builder: Any, count: Any, generate: Callable[[bool], None]) -> None:
    """The code of `generate` for a whole step, and for one of `count` numbers."""
    with builder.if_else(builder.icmp_signed(">=", count, SIZE(STEP))) as (whole, part):
        with whole:
            generate(True)
        with part:
            generate(False)


def _of_float32(generate: Callable[[Any, _Source, Any], None]) -> Callable[..., Any]:
    """An intrinsic's code for float32: of nothing else is it ever run."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if signature.args[0].dtype == types.float32:
            x, thirds = (
                first_entry(context, builder, signature.args[i], arguments[i]) for i in (0, len(arguments) - 2)
            )
            generate(builder, _Source(builder, x, thirds, arguments[-1]), arguments)
        return context.get_dummy_value()

    return code


@intrinsic
def _split_row(typing_context, x, start, count, thirds, to):
    """One row of one step: 32 columns, of which `count` count."""

    def generate(builder: Any, source: _Source, arguments: Any) -> None:
        _, start, count, _, _ = arguments

        def step(whole: bool) -> None:
            halves = [source.load(builder.add(start, SIZE(half * LANES))) for half in range(2)]
            if not whole:
                halves = [_first(builder, half, i * LANES, count) for i, half in enumerate(halves)]
            for third, pairs in enumerate(_in_pairs(builder, *halves)):
                source.store(pairs, third, SIZE(0))

        _whole_or_not(builder, count, step)

    size = types.intp
    return types.void(x, size, size, thirds, size), _of_float32(generate)


def _first(builder: Any, x: Any, lane: int, count: Any) -> Any:
    """x, with 0 from lane `count` on; the vector's first is number `lane`."""
    lanes = ir.Constant(BITS, [lane + i for i in range(LANES)])
    return builder.select(builder.icmp_signed("<", lanes, _splat(builder, count)), x, ir.Constant(FLOATS, None))


def _splat(builder: Any, count: Any) -> Any:
    none = ir.Constant(BITS, ir.Undefined)
    one = builder.insert_element(none, builder.trunc(count, LANE), LANE(0))
    return builder.shuffle_vector(one, none, ir.Constant(BITS, [0] * LANES))


@intrinsic
def _split_panel(typing_context, x, start, count, first_pair, thirds, to):
    """One step of a panel, from a pair on: 32 rows, of which `count` count and may be read."""

    def generate(builder: Any, source: _Source, arguments: Any) -> None:
        _, start, count, first_pair, _, _ = arguments

        def step(whole: bool) -> None:
            with cgutils.for_range_slice(builder, first_pair, SIZE(ROWS), SIZE(1)) as (pair, _):
                _split_pair(builder, source, start, pair, None if whole else count)

        _whole_or_not(builder, count, step)

    size = types.intp
    return types.void(x, size, size, size, thirds, size), _of_float32(generate)


def split_pair(builder: Any, x: Any, start: Any, thirds: Any, to: Any, pair: Any) -> None:
    """Code for one pair of a whole step of a right factor, among other code."""
    _split_pair(builder, _Source(builder, x, thirds, to), start, pair, None)


def _split_pair(builder: Any, source: _Source, start: Any, pair: Any, count: Any) -> None:
    rows = [pair, builder.add(pair, SIZE(ROWS))]
    for half in range(2):
        at = builder.add(start, SIZE(half * LANES))
        low, high = (_row(builder, source, [at], r, count) for r in rows)
        for third, pairs in enumerate(_in_pairs(builder, low, high)):
            source.store(pairs, 2 * third + half, pair)


@intrinsic
def _split_columns(typing_context, x, start, other, count, thirds, to):
    """One step of 16 columns, 8 from `start` and 8 from `other` on: 32 rows, of which `count` count and may be read."""

    def generate(builder: Any, source: _Source, arguments: Any) -> None:
        _, start, other, count, _, _ = arguments

        def step(whole: bool) -> None:
            tiles: list[list[Any]] = [[] for _ in range(THIRDS)]
            for j in range(STEP // 2):
                low, high = (
                    _row(builder, source, [start, other], SIZE(r), None if whole else count) for r in (j, j + STEP // 2)
                )
                for rows, pairs in zip(tiles, _in_pairs(builder, low, high), strict=True):
                    rows.append(pairs)
            for third, rows in enumerate(tiles):
                for i, row in enumerate(transposed(builder, rows)):
                    source.store(row, third, SIZE(i))

        _whole_or_not(builder, count, step)

    size = types.intp
    return types.void(x, size, size, size, thirds, size), _of_float32(generate)


def _row(builder: Any, source: _Source, starts: list[Any], row: Any, count: Any) -> Any:
    """16 entries of a row, from one place or two halves from two; 0 in a row from `count` on."""
    exists = None if count is None else builder.icmp_signed("<", row, count)
    row = row if exists is None else builder.select(exists, row, SIZE(0))
    places = [builder.add(start, builder.mul(row, SIZE(PANEL))) for start in starts]
    if len(places) == 1:
        x = source.load(places[0])
    else:
        halves = [source.load(place, HALF) for place in places]
        x = builder.shuffle_vector(*halves, ir.Constant(BITS, list(range(LANES))))
    return x if exists is None else builder.select(exists, x, ir.Constant(FLOATS, None))


def transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """Code for the transpose of a square of vectors: log₂ n perfect shuffles of its n rows."""
    n, kind = len(rows), ir.VectorType(LANE, len(rows))
    lanes = [lane for i in range(n) for lane in (i, n + i)]
    low, high = ir.Constant(kind, lanes[:n]), ir.Constant(kind, lanes[n:])
    for _ in range((n // 2).bit_length()):
        pairs = zip(rows[: n // 2], rows[n // 2 :], strict=True)
        rows = [builder.shuffle_vector(x, y, mask) for x, y in pairs for mask in (low, high)]
    return rows
