"""Which tile a product takes on a GPU, and in how many parts a batch's gradients are summed: by sizes alone.

The names and sizes here are those of `kernels/cuda/gemm.cuh` and `tensor_cores.cuh`. `efficiency` is a tile's speed in
multiply-adds while all processors are busy, relative to the largest tile of its dtype: not yet measured, but put down
from the numbers that it reads from shared memory for each.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

__all__ = ["LAYOUTS", "NUMBERS", "TILES", "Layout", "Number", "Parts", "Tile", "parts", "tile"]


class Number(NamedTuple):
    """How a dtype is stored where products read it."""

    cuda: str
    """Its name in CUDA C++."""
    array: str
    """The dtype of the arrays that hold it: CuPy has no bfloat16."""
    oldest_capability: int
    """The first compute capability whose cores have it."""

    @property
    def itemsize(self) -> int:
        """Bytes."""
        return {"float": 4, "double": 8}.get(self.cuda, 2)


NUMBERS = {
    "float32": Number("float", "float32", 75),
    "float64": Number("double", "float64", 75),
    "tf32": Number("float", "float32", 80),
    "bfloat16": Number("bfloat16", "uint16", 80),
    "float16": Number("float16", "uint16", 75),
}
"""By the dtype that a network computes in."""


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
class Tile(ABC):
    """One `Math` of the kernels: the m x n tile of C that a block computes, k at a time in a ring of stages."""

    dtype: str
    m: int
    n: int
    k: int
    stages: int
    efficiency: float
    slices = 1
    """Parts of the block that sum over different k."""

    @property
    @abstractmethod
    def expression(self) -> str:
        """Its type in CUDA C++."""

    @property
    @abstractmethod
    def threads(self) -> int:
        """Threads of a block."""

    @property
    @abstractmethod
    def passes(self) -> int:
        """In how many parts C goes through shared memory."""

    def shared_bytes(self, layout: Layout) -> int:
        """Shared memory of a block: a ring of operand tiles, in which C passes through afterwards."""
        itemsize = NUMBERS[self.dtype].itemsize

        def entries(along: str, mn: int) -> int:
            rows, columns, padding = (mn, self.k, 16 // itemsize) if along == "k" else (self.k, mn, 8)
            return rows * (columns + padding)

        ring = self.stages * (entries(layout.a, self.m) + entries(layout.b, self.n)) * itemsize
        return max(ring, self.slices * (self.m // self.passes) * (self.n + 4) * max(itemsize, 4))

    def blocks(self, m: int, n: int) -> int:
        """Tiles in an m x n matrix."""
        return math.ceil(m / self.m) * math.ceil(n / self.n)


@dataclass(frozen=True)
class SimtTile(Tile):
    """On the ordinary cores: a thread sums rows x columns entries of C."""

    rows: int
    columns: int
    slices: int

    @property
    def expression(self) -> str:
        """See `Tile.expression`."""
        sizes = (self.m, self.n, self.k, self.rows, self.columns, self.slices, self.stages)
        return f"Simt<{NUMBERS[self.dtype].cuda}, {', '.join(map(str, sizes))}>"

    @property
    def threads(self) -> int:
        """See `Tile.threads`."""
        return self.m // self.rows * (self.n // self.columns) * self.slices

    @property
    def passes(self) -> int:
        """See `Tile.passes`."""
        return 2 if self.rows * self.columns > 32 else 1


KINDS = {"tf32": "Tf32", "bfloat16": "Bf16", "float16": "F16"}


@dataclass(frozen=True)
class TensorTile(Tile):
    """On the tensor cores: warps_m x warps_n warps."""

    warps_m: int
    warps_n: int

    @property
    def expression(self) -> str:
        """See `Tile.expression`."""
        sizes = (self.m, self.n, self.k, self.warps_m, self.warps_n, self.stages)
        return f"TensorCores<{KINDS[self.dtype]}, {', '.join(map(str, sizes))}>"

    @property
    def threads(self) -> int:
        """See `Tile.threads`."""
        return 32 * self.warps_m * self.warps_n

    @property
    def passes(self) -> int:
        """See `Tile.passes`."""
        return 2 if self.m // self.warps_m * (self.n // self.warps_n) > 1024 else 1


def _tensor_tiles(dtype: str, k: int) -> tuple[Tile, ...]:
    """Tiles of a dtype of which k fill 64 bytes."""
    return (
        TensorTile(dtype, 128, 128, k, 3, 1.0, 2, 4),
        TensorTile(dtype, 64, 64, k, 3, 0.6, 2, 2),
        TensorTile(dtype, 32, 32, 2 * k, 3, 0.3, 2, 2),
        TensorTile(dtype, 64, 16, 2 * k, 3, 0.3, 4, 1),
        TensorTile(dtype, 16, 64, 2 * k, 3, 0.3, 1, 4),
    )


TILES: dict[str, tuple[Tile, ...]] = {
    "float32": (
        SimtTile("float32", 128, 128, 16, 3, 1.0, 8, 8, 1),
        SimtTile("float32", 64, 64, 16, 3, 0.85, 8, 4, 1),
        SimtTile("float32", 32, 32, 32, 3, 0.6, 4, 4, 4),
        SimtTile("float32", 64, 16, 32, 3, 0.6, 4, 4, 4),
        SimtTile("float32", 16, 64, 32, 3, 0.6, 4, 4, 4),
    ),
    "float64": (
        SimtTile("float64", 64, 64, 16, 3, 1.0, 4, 4, 1),
        SimtTile("float64", 32, 32, 16, 3, 0.9, 4, 4, 4),
        SimtTile("float64", 64, 16, 16, 3, 0.9, 4, 4, 4),
        SimtTile("float64", 16, 64, 16, 3, 0.9, 4, 4, 4),
    ),
    "tf32": _tensor_tiles("tf32", 16),
    "bfloat16": _tensor_tiles("bfloat16", 32),
    "float16": _tensor_tiles("float16", 32),
}
"""By dtype: a large tile for reuse, smaller and narrow ones for small batches and skinny matrices."""

RATES = {"float32": 128, "float64": 64, "tf32": 512, "bfloat16": 1024, "float16": 1024}
"""Multiply-adds per cycle of a processor of compute capability 9.0; others have their cores in like proportions."""

BLOCK_CYCLES, STAGE_CYCLES = 1500, 80
"""What a block waits beside its multiply-adds: for its first tiles and its epilogue, and at each stage's barrier."""


def _duration(tile: Tile, n_blocks: int, k: int, n_processors: int) -> float:
    """About how many cycles n_blocks blocks over k take."""
    rounds = math.ceil(n_blocks / n_processors)
    work = rounds * tile.m * tile.n * k / (RATES[tile.dtype] * tile.efficiency)
    return work + BLOCK_CYCLES + STAGE_CYCLES * math.ceil(k / tile.k)


def tile(m: int, n: int, k: int, dtype: str, n_processors: int) -> Tile:
    """The tile with which a GPU of so many processors is done soonest with an m x n product over k."""
    return min(TILES[dtype], key=lambda tile: _duration(tile, tile.blocks(m, n), k, n_processors))


class Parts(NamedTuple):
    """How the rows of a batch are divided for dW and db."""

    tile: Tile
    n_parts: int
    rows_per_part: int


LEAST_ROWS_PER_PART, MOST_ROWS_PER_PART = 32, 1024
"""Longer float32 sums cost digits: over 16,384 rows in one, the gradient is off by 2e-6, not 1e-7."""


def parts(n_rows: int, n_in: int, n_out: int, dtype: str, n_processors: int) -> Parts:
    """Enough parts to give every processor work, of at least 32 and at most 1024 rows each where there are so many."""

    def divided(tile: Tile, wanted: int) -> Parts:
        least, most = math.ceil(n_rows / MOST_ROWS_PER_PART), math.ceil(n_rows / LEAST_ROWS_PER_PART)
        rows = math.ceil(n_rows / max(least, min(wanted, most)))
        rows = min(math.ceil(rows / tile.k) * tile.k, MOST_ROWS_PER_PART)
        return Parts(tile, math.ceil(n_rows / rows), rows)

    def duration(plan: Parts) -> float:
        blocks = plan.tile.blocks(n_in, n_out) * plan.n_parts
        # Every part is written once more and read again: 8 bytes for each number, 16 bytes a cycle and processor.
        moved = plan.n_parts * n_in * n_out / (2 * n_processors)
        return _duration(plan.tile, blocks, plan.rows_per_part, n_processors) + moved

    return min((divided(tile, n) for tile, n in product(TILES[dtype], (1, 2, 4, 8, 16, 32, 64))), key=duration)
