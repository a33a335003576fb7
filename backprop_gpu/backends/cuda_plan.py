"""Which tile a product takes on a GPU, and in how many parts a batch's gradients are summed: by sizes and the device.

The names and sizes here are those of `kernels/cuda/gemm.cuh` and `tensor_cores.cuh`. `efficiency` is a tile's speed in
multiply-adds while all processors are busy, relative to the largest tile of its dtype: not yet measured, but put down
from the numbers that it reads from shared memory for each.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

__all__ = [
    "LAYOUTS",
    "NUMBERS",
    "RATES",
    "TILES",
    "Device",
    "Layout",
    "Number",
    "Parts",
    "Tile",
    "device",
    "parts",
    "tile",
]


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


# What a GPU can


class Rates(NamedTuple):
    """Multiply-adds per cycle of one processor, by the dtype of the operands; sums of narrow ones in float32."""

    float32: int
    float64: int
    tf32: int
    bfloat16: int
    float16: int


RATES = {
    75: Rates(64, 2, 0, 0, 512),
    80: Rates(64, 32, 512, 1024, 1024),
    86: Rates(128, 2, 256, 512, 512),
    89: Rates(128, 2, 256, 512, 512),
    90: Rates(128, 64, 644, 1288, 1288),
    100: Rates(128, 64, 512, 1024, 1024),
    120: Rates(128, 2, 256, 512, 512),
}
"""By compute capability, from documents that `kernels/README.md` names; nothing of it was measured here.

Ordinary cores: NVIDIA's table of arithmetic instructions in the CUDA C++ Programming Guide, now Best Practices Guide.
Tensor cores: with sums in float32, the dense TFLOPS of whitepapers and datasheets by two, processors and boost clock;
GeForce cards have half. For 9.0, 62.9 % of that, as `mma.sync` reaches it (Luo et al. 2025, arXiv:2501.12084); for
10.0, of which NVIDIA says only what other instructions reach, as for 8.0.
"""


class Device(NamedTuple):
    """What the plan asks of a GPU."""

    capability: int
    """Compute capability, times ten."""
    n_processors: int
    """Streaming multiprocessors."""
    shared_per_block: int
    """Bytes of shared memory that a block may ask for."""
    shared_per_processor: int
    """Bytes of shared memory that the blocks of a processor have together."""
    bytes_per_cycle: float
    """Of the GPU's memory, for each processor."""

    def rate(self, dtype: str) -> int:
        """Of the newest architecture in the table that is not newer."""
        known = max(capability for capability in RATES if capability <= self.capability)
        rate: int = getattr(RATES[known], dtype)
        return rate

    def holds(self, tile: Tile) -> bool:
        """Whether the tile's instructions are there, and its shared memory, in every layout."""
        there = self.capability >= NUMBERS[tile.dtype].oldest_capability
        return there and _most_shared_bytes(tile) <= self.shared_per_block

    def tiles(self, dtype: str) -> tuple[Tile, ...]:
        """All that it holds; ValueError where there are none."""
        held = tuple(tile for tile in TILES[dtype] if self.holds(tile))
        if not held:
            raise ValueError(
                f"there are no kernels for {dtype} on a GPU of compute capability {self.capability / 10} with "
                f"{self.shared_per_block} bytes of shared memory for a block; choose another dtype, or backend='cpu'"
            )
        return held


def device(capability: int, attributes: Mapping[str, int]) -> Device:
    """From what CUDA reports; clocks and the bus, where it does not, are taken to be an H100's."""
    n_processors = attributes["MultiProcessorCount"]
    clock, memory_clock = attributes.get("ClockRate", 0), attributes.get("MemoryClockRate", 0)  # kHz
    per_second = 2 * memory_clock * attributes.get("GlobalMemoryBusWidth", 0) / 8  # two transfers a cycle
    return Device(
        capability,
        n_processors,
        attributes["MaxSharedMemoryPerBlockOptin"],
        attributes["MaxSharedMemoryPerMultiprocessor"],
        per_second / clock / n_processors if clock and per_second else H100_BYTES_PER_CYCLE,
    )


H100_BYTES_PER_CYCLE = 13.0
"""3.35 TB/s, 132 processors, 1.98 GHz."""

STATIC_BYTES, BYTES_PER_BLOCK = 128, 1024
"""Shared memory beside a tile's: static variables, at most, and what CUDA takes for each block."""

LARGEST_GRID = (2**31 - 1, 65_535, 65_535)
"""Blocks along x, y and z."""


# What a product costs

BLOCK_CYCLES = 1500
"""What a block waits beside its multiply-adds: for its first tiles, and in its epilogue."""

STAGE_CYCLES, SYNCHRONOUS_STAGE_CYCLES = 80, 500
"""At each stage: at the barrier; and where there is no `cp.async`, before 8.0, for the stage's tiles as well."""

CYCLES_PER_BYTE_OF_BLOCK = 1 / 64
"""What one processor alone reads of what others have just written."""


def _duration(tile: Tile, n_blocks: int, k: int, gpu: Device) -> float:
    """About how many cycles n_blocks blocks over k take."""
    rounds = math.ceil(n_blocks / gpu.n_processors)
    at_once = max(1, gpu.shared_per_processor // (_most_shared_bytes(tile) + BYTES_PER_BLOCK))
    work = rounds * tile.m * tile.n * k / (gpu.rate(tile.dtype) * tile.efficiency)
    stage = STAGE_CYCLES if gpu.capability >= 80 else SYNCHRONOUS_STAGE_CYCLES
    # Blocks that are there at once wait at once.
    return work + math.ceil(rounds / at_once) * (BLOCK_CYCLES + stage * math.ceil(k / tile.k))


def _most_shared_bytes(tile: Tile) -> int:
    return max(map(tile.shared_bytes, LAYOUTS.values())) + STATIC_BYTES


def _fits_grid(tile: Tile, m: int, n: int) -> bool:
    return math.ceil(m / tile.m) <= LARGEST_GRID[0] and math.ceil(n / tile.n) <= LARGEST_GRID[1]


def _too_large(m: int, n: int) -> ValueError:
    return ValueError(f"no grid of blocks is wide enough for a product of {m} x {n}; take at most 4 million outputs")


def tile(m: int, n: int, k: int, dtype: str, gpu: Device) -> Tile:
    """The tile with which the GPU is done soonest with an m x n product over k; ValueError where n is too large."""
    tiles = [tile for tile in gpu.tiles(dtype) if _fits_grid(tile, m, n)]
    if not tiles:
        raise _too_large(m, n)
    return min(tiles, key=lambda tile: _duration(tile, tile.blocks(m, n), k, gpu))


class Parts(NamedTuple):
    """How the rows of a batch are divided for dW and db."""

    tile: Tile
    n_parts: int
    rows_per_part: int


LEAST_ROWS_PER_PART, MOST_ROWS_PER_PART = 32, 1024
"""Longer float32 sums cost digits: over 16,384 rows in one, the gradient is off by 2e-6, not 1e-7."""


def parts(n_rows: int, n_in: int, n_out: int, dtype: str, gpu: Device, *, whole: bool = False) -> Parts:
    """Enough parts to give every processor work, of at least 32 and at most 1024 rows each where there are so many.

    whole : the kernel adds them up, one block for each tile, instead of the update
    """

    def divided(tile: Tile, wanted: int) -> Parts:
        longest = MOST_ROWS_PER_PART * math.ceil(n_rows / (MOST_ROWS_PER_PART * LARGEST_GRID[2]))
        least, most = math.ceil(n_rows / longest), math.ceil(n_rows / LEAST_ROWS_PER_PART)
        rows = math.ceil(n_rows / max(least, min(wanted, most)))
        rows = min(math.ceil(rows / tile.k) * tile.k, longest)
        return Parts(tile, math.ceil(n_rows / rows), rows)

    def duration(plan: Parts) -> float:
        blocks, size = plan.tile.blocks(n_in, n_out) * plan.n_parts, 8 if dtype == "float64" else 4
        # Every part is written once more and read again, in the update by all processors together.
        cycles = plan.n_parts * n_in * n_out * size / (gpu.n_processors * gpu.bytes_per_cycle)
        reading = plan.n_parts * plan.tile.m * plan.tile.n * size * CYCLES_PER_BYTE_OF_BLOCK if whole else cycles
        return _duration(plan.tile, blocks, plan.rows_per_part, gpu) + cycles + reading

    tiles = [tile for tile in gpu.tiles(dtype) if _fits_grid(tile, n_in, n_out)]
    if not tiles:
        raise _too_large(n_in, n_out)
    return min((divided(tile, n) for tile, n in product(tiles, (1, 2, 4, 8, 16, 32, 64))), key=duration)
