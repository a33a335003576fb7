"""C = A B, C = A Bᵀ and C = Aᵀ B: one tiled product, specialised by layout, tile, dtype and what is done with C.

A block of threads computes a tile of C. It takes a panel of A and of B, `depth` deep, through shared memory at a time;
each thread holds its part of the tile in registers: rows y, y + threads_y, … and columns x, x + threads_x, …. So
neighbouring threads read neighbouring words of shared memory, and write neighbouring entries of C. While a panel is
multiplied, the next one is on its way from memory into registers.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np

from backprop_gpu.kernels.numba_cuda.device import Function, ceil_div, cuda, device

__all__ = ["TILES", "TILE_IN_SIMULATOR", "Tile", "gemm", "nothing", "shape"]


class Tile(NamedTuple):
    """The part of C that a block computes, and how."""

    threads_y: int
    threads_x: int
    rows_per_thread: int
    columns_per_thread: int
    depth: int
    """Entries of the sum that are in shared memory at a time."""

    @property
    def rows(self) -> int:
        """Of C."""
        return self.threads_y * self.rows_per_thread

    @property
    def columns(self) -> int:
        """Of C."""
        return self.threads_x * self.columns_per_thread

    @property
    def threads(self) -> int:
        """In a block."""
        return self.threads_y * self.threads_x


TILES = {
    "128x128": Tile(16, 16, 8, 8, depth=8),
    "64x64": Tile(16, 16, 4, 4, depth=16),
    "32x32": Tile(16, 16, 2, 2, depth=16),
    "128x16": Tile(16, 16, 8, 1, depth=16),
    "16x128": Tile(16, 16, 1, 8, depth=16),
}
"""Every tile that there is. Two panels of each are at most 36 KiB in float64, of the 48 that every GPU has."""

TILE_IN_SIMULATOR = Tile(2, 2, 8, 8, depth=8)
"""Of four threads, which the simulator can bear."""


# Device functions


def panel(real: Any, extent: int, tile: Tile, depth_first: bool) -> tuple[Function, Function, int]:
    """(fetch, place, width): a matrix's panel to registers, and from there to shared memory as [depth][width].

    `extent` of the panel's entries lie along C. With `depth_first`, the matrix's rows run along the sum and its columns
    along C, else the other way round; then a thread's neighbours write a column of shared memory, and a width of one
    more than the extent puts its entries into banks of their own.
    """
    depth, threads, zero = tile.depth, tile.threads, real(0)
    per_thread = extent * depth // threads
    if depth_first:

        @device
        def fetch(matrix: Any, start: Any, k: Any, stop: Any, thread: Any, registers: Any) -> None:
            """registers ← the panel at column `start` of C and place k of the sum; 0 beyond the matrix or `stop`."""
            for i in range(per_thread):
                row, column = k + (thread + i * threads) // extent, start + (thread + i * threads) % extent
                registers[i] = matrix[row, column] if row < stop and column < matrix.shape[1] else zero

        @device
        def place(shared: Any, buffer: Any, thread: Any, registers: Any) -> None:
            for i in range(per_thread):
                shared[buffer, (thread + i * threads) // extent, (thread + i * threads) % extent] = registers[i]

        return fetch, place, extent

    @device
    def fetch_across(matrix: Any, start: Any, k: Any, stop: Any, thread: Any, registers: Any) -> None:
        """As `fetch`."""
        for i in range(per_thread):
            row, column = start + (thread + i * threads) // depth, k + (thread + i * threads) % depth
            registers[i] = matrix[row, column] if row < matrix.shape[0] and column < stop else zero

    @device
    def place_across(shared: Any, buffer: Any, thread: Any, registers: Any) -> None:
        for i in range(per_thread):
            shared[buffer, (thread + i * threads) % depth, (thread + i * threads) // depth] = registers[i]

    return fetch_across, place_across, extent + 1


@device
def nothing(column: Any, value: Any, operands: Any) -> None:
    """No use for the column sums."""


@cache
def panels(real: Any, layout: str, tile: Tile, with_sums: bool) -> Function:
    """(A, B, first, stop, c, sums): a device function for all threads of a block, the walk along the sum.

    c ← the thread's part of the tile of C; sums ← its part of the sums of B's columns, in the first row of blocks and
    `with_sums`. Products that differ in their epilogues alone share it, and Numba compiles it once for them.
    """
    rows, columns, depth, threads = tile.rows, tile.columns, tile.depth, tile.threads
    threads_y, threads_x = tile.threads_y, tile.threads_x
    per_thread_y, per_thread_x = tile.rows_per_thread, tile.columns_per_thread
    fetch_a, place_a, a_width = panel(real, rows, tile, depth_first=layout[0] == "t")
    fetch_b, place_b, b_width = panel(real, columns, tile, depth_first=layout[1] == "n")
    n_a, n_b, n_sums = rows * depth // threads, columns * depth // threads, ceil_div(columns, threads)
    zero, float64 = real(0), np.float64

    @device
    def multiply(a: Any, b: Any, buffer: Any, y: Any, x: Any, c: Any) -> None:
        """c += the thread's part of the product of two panels."""
        for k in range(depth):
            for i in range(per_thread_y):
                a_ik = a[buffer, k, y + i * threads_y]
                for j in range(per_thread_x):
                    c[i, j] += a_ik * b[buffer, k, x + j * threads_x]

    @device
    def add_columns(b: Any, buffer: Any, thread: Any, sums: Any) -> None:
        """sums += the thread's columns of the panel: short sums in `real`, which are cheap, added up in float64."""
        for i in range(n_sums):
            if thread + i * threads < columns:
                short = zero
                for k in range(depth):
                    short += b[buffer, k, thread + i * threads]
                sums[i] += float64(short)

    @device
    def walk(A: Any, B: Any, first: Any, stop: Any, c: Any, sums: Any) -> None:
        a = cuda.shared.array((2, depth, a_width), real)
        b = cuda.shared.array((2, depth, b_width), real)
        a_next = cuda.local.array(n_a, real)
        b_next = cuda.local.array(n_b, real)
        thread = cuda.threadIdx.x
        y, x = thread // threads_x, thread % threads_x
        first_row, first_column = cuda.blockIdx.x * rows, cuda.blockIdx.y * columns
        for i in range(per_thread_y):
            for j in range(per_thread_x):
                c[i, j] = zero
        for i in range(n_sums):
            sums[i] = 0.0
        # A constant has a type of its own, for which Numba would compile what takes it once more; int(…) has not.
        start, buffer = int(first), int(False)
        fetch_a(A, first_row, start, stop, thread, a_next)
        fetch_b(B, first_column, start, stop, thread, b_next)
        for k in range(start, stop, depth):
            place_a(a, buffer, thread, a_next)
            place_b(b, buffer, thread, b_next)
            # The panel is complete: `multiply` and `add_columns` read what other threads have placed. One barrier for
            # each panel is enough. The next `place` writes the other buffer, which was last read before this barrier;
            # and this buffer is written again only after the next barrier, which no thread passes before all have
            # read it. All threads of a block come here equally often, since `start` and `stop` are the block's.
            cuda.syncthreads()
            fetch_a(A, first_row, k + depth, stop, thread, a_next)
            fetch_b(B, first_column, k + depth, stop, thread, b_next)
            multiply(a, b, buffer, y, x, c)
            if with_sums and first_row == 0:
                add_columns(b, buffer, thread, sums)
            buffer = 1 - buffer

    return walk


def gemm(
    real: Any,
    layout: str,
    tile: Tile,
    epilogue: Function,
    column_epilogue: Function | None = None,
) -> Function:
    """(A, B, first, stop, n_rows, n_columns, operands): a device function for all threads of a block.

    Parameters
    ----------
    real : NumPy's scalar type, which the product accumulates in
    layout : "nn" for C = A B, "nt" for C = A Bᵀ, "tn" for C = Aᵀ B
    epilogue : (row, column, C[row, column], operands), called once for each entry of C
    column_epilogue : (column, Σ, operands) with Σ the float64 sum over first … stop − 1 of B's column, once for each
        column of C; needs a layout with B "n"

    The product: A and B as the layout says; first, stop : the part of the sum that is taken; (n_rows, n_columns) : the
    shape of C; operands : what the epilogues read and write.
    """
    rows, columns, threads = tile.rows, tile.columns, tile.threads
    threads_y, threads_x = tile.threads_y, tile.threads_x
    per_thread_y, per_thread_x, n_sums = tile.rows_per_thread, tile.columns_per_thread, ceil_div(columns, threads)
    with_sums, use_sum, float64 = column_epilogue is not None, column_epilogue or nothing, np.float64
    walk = panels(real, layout, tile, with_sums)

    @device
    def product(A: Any, B: Any, first: Any, stop: Any, n_rows: Any, n_columns: Any, operands: Any) -> None:
        c = cuda.local.array((per_thread_y, per_thread_x), real)
        sums = cuda.local.array(n_sums, float64)
        thread = cuda.threadIdx.x
        y, x = thread // threads_x, thread % threads_x
        first_row, first_column = cuda.blockIdx.x * rows, cuda.blockIdx.y * columns
        walk(A, B, first, stop, c, sums)
        for i in range(per_thread_y):
            for j in range(per_thread_x):
                row, column = first_row + y + i * threads_y, first_column + x + j * threads_x
                if row < n_rows and column < n_columns:
                    epilogue(row, column, c[i, j], operands)
        if with_sums and first_row == 0:
            for i in range(n_sums):
                column = thread + i * threads
                if column < columns and first_column + column < n_columns:
                    use_sum(first_column + column, sums[i], operands)

    return product


# The launch


def shape(tile: Tile, n_rows: int, n_columns: int, n_parts: int = 1) -> tuple[tuple[int, int, int], int]:
    """(grid, block) for C of (n_rows, n_columns): tiles of rows along x, which has no limit that matters."""
    return (ceil_div(n_rows, tile.rows), ceil_div(n_columns, tile.columns), n_parts), tile.threads
