"""Which tile a product takes on a GPU, and in how many parts a batch's gradients are summed: by sizes alone.

The names and numbers here are those of `kernels/cuda/gemm.cuh`. `efficiency` is a tile's speed in multiply-adds, all
processors busy, relative to the largest one: entries summed per number read from shared memory. Not yet measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

__all__ = ["CUDA_TYPES", "LAYOUTS", "TILES", "Layout", "Parts", "Tile", "parts", "tile"]

CUDA_TYPES = {"float32": "float", "float64": "double"}
"""Name in CUDA C++ of the kind of number that the operands of a product have."""

ITEMSIZE = {"float": 4, "double": 8}


class Layout(NamedTuple):
    """Along which dimension each operand is contiguous: "k", or the other one."""

    a: str
    b: str


LAYOUTS = {
    "dense_forward": Layout("k", "n"),
    "dense_backward": Layout("k", "k"),
    "dense_gradients": Layout("m", "n"),
}


@dataclass(frozen=True)
class Tile:
    """One `Math` of the kernels: the tile of C of a block, and how its threads divide it."""

    number: str
    m: int
    n: int
    k: int
    rows: int
    """Entries of C that a thread sums: rows x columns."""
    columns: int
    slices: int
    stages: int
    efficiency: float

    @property
    def expression(self) -> str:
        """Its type in CUDA C++."""
        sizes = (self.m, self.n, self.k, self.rows, self.columns, self.slices, self.stages)
        return f"Simt<{self.number}, {', '.join(map(str, sizes))}>"

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.m // self.rows * (self.n // self.columns) * self.slices

    def shared_bytes(self, layout: Layout) -> int:
        """Shared memory of a block: a ring of operand tiles, in which C passes through afterwards."""
        itemsize = ITEMSIZE[self.number]

        def entries(along: str, mn: int) -> int:
            rows, columns, padding = (mn, self.k, 16 // itemsize) if along == "k" else (self.k, mn, 8)
            return rows * (columns + padding)

        ring = self.stages * (entries(layout.a, self.m) + entries(layout.b, self.n)) * itemsize
        passes = 2 if self.rows * self.columns > 32 else 1
        return max(ring, self.slices * (self.m // passes) * (self.n + 4) * itemsize)

    def blocks(self, m: int, n: int) -> int:
        """Tiles in an m x n matrix."""
        return math.ceil(m / self.m) * math.ceil(n / self.n)


TILES = {
    "float32": (
        Tile("float", 128, 128, 16, 8, 8, 1, 3, 1.0),
        Tile("float", 64, 64, 16, 8, 4, 1, 3, 0.7),
        Tile("float", 32, 32, 32, 4, 4, 4, 3, 0.5),
        Tile("float", 64, 16, 32, 4, 4, 4, 3, 0.5),
        Tile("float", 16, 64, 32, 4, 4, 4, 3, 0.5),
    ),
    "float64": (
        Tile("double", 64, 64, 16, 4, 4, 1, 3, 1.0),
        Tile("double", 32, 32, 16, 4, 4, 4, 3, 0.9),
        Tile("double", 64, 16, 16, 4, 4, 4, 3, 0.9),
        Tile("double", 16, 64, 16, 4, 4, 4, 3, 0.9),
    ),
}
"""By dtype: a large tile for reuse, smaller and narrow ones for skinny matrices and small batches."""

LATENCY = 64
"""What a block costs beyond its multiply-adds, in steps of k: filling the ring, the epilogue."""

BLOCKS_PER_PROCESSOR = 2
"""How many blocks a processor works on side by side."""


def tile(m: int, n: int, k: int, dtype: str, n_processors: int) -> Tile:
    """The tile with which a GPU of so many processors is done soonest with an m x n product over k."""

    def duration(candidate: Tile) -> float:
        rounds = math.ceil(candidate.blocks(m, n) / n_processors)
        # A processor hides one block's waiting behind another's; alone, a block runs at half the speed.
        overlap = 1 if rounds >= BLOCKS_PER_PROCESSOR else 2
        work = candidate.m * candidate.n / candidate.efficiency
        return rounds * work * (k * overlap / math.sqrt(candidate.slices) + LATENCY)

    return min(TILES[dtype], key=duration)


class Parts(NamedTuple):
    """How the rows of a batch are divided for dW and db."""

    tile: Tile
    n_parts: int
    rows_per_part: int


MOST_ROWS_PER_PART = 1024
"""Longer float32 sums would cost digits: at 16,384 rows in one, the gradient was off by 2e-6, not 1e-7."""

LEAST_ROWS_PER_PART = 32


def parts(n_rows: int, n_in: int, n_out: int, dtype: str, n_processors: int) -> Parts:
    """Enough parts to give every processor blocks to work on, each of at least 32 and at most 1024 rows."""

    def divided(candidate: Tile, wanted: int) -> Parts:
        least = math.ceil(n_rows / MOST_ROWS_PER_PART)
        n_parts = max(least, min(wanted, math.ceil(n_rows / LEAST_ROWS_PER_PART)))
        rows = math.ceil(math.ceil(n_rows / n_parts) / candidate.k) * candidate.k
        return Parts(candidate, math.ceil(n_rows / rows), rows)

    def duration(plan: Parts) -> float:
        blocks = plan.tile.blocks(n_in, n_out) * plan.n_parts
        rounds = math.ceil(blocks / n_processors)
        overlap = 1 if rounds >= BLOCKS_PER_PROCESSOR else 2
        work = plan.tile.m * plan.tile.n / plan.tile.efficiency
        product_of_parts = rounds * work * (plan.rows_per_part * overlap / math.sqrt(plan.tile.slices) + LATENCY)
        # Every part is written and read once more: as long as eight multiply-adds for each number.
        return product_of_parts + 8 * plan.n_parts * n_in * n_out / n_processors

    wanted = [1, 2, 4, 8, 16, 32, 64]
    return min((divided(t, p) for t, p in product(TILES[dtype], wanted)), key=duration)
