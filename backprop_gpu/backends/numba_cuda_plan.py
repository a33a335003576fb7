"""How the `numba-cuda` backend divides a product among blocks: by sizes and the GPU alone, so the same bits each time.

The rules are of thumb: no GPU has measured them yet.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from numba import cuda

from backprop_gpu.kernels.numba_cuda.device import SIMULATED, ceil_div
from backprop_gpu.kernels.numba_cuda.gemm import TILE_IN_SIMULATOR, TILES, Tile

__all__ = ["Division", "division", "n_multiprocessors", "tile", "tiles"]

MOST_PARTS = 64
ROWS_PER_PART = 64
"""The fewest rows of a part, so that what it computes outweighs what it writes; in the simulator, 32."""


class Division(NamedTuple):
    """How the rows of a mini-batch are divided for ∂C/∂W."""

    tile: Tile
    n: int
    rows: int
    """Of each part but the last, which may have fewer."""


@cache
def n_multiprocessors() -> int:
    """Of the GPU; the simulator counts as one with two."""
    device: Any = None if SIMULATED else cuda
    return 2 if device is None else int(device.get_current_device().MULTIPROCESSOR_COUNT)


def tiles(dtype: str) -> tuple[Tile, ...]:
    """The tiles to choose from: 128 × 128 numbers of float64 would fill a thread's registers."""
    if SIMULATED:
        return (TILE_IN_SIMULATOR,)
    return tuple(tile for name, tile in TILES.items() if dtype != "float64" or name != "128x128")


def tile(shape: tuple[int, int], dtype: str) -> Tile:
    """The tile that takes the least time for C of this shape."""
    return min(tiles(dtype), key=lambda tile: _time(tile, _blocks(tile, shape)))


def division(shape: tuple[int, int], n_rows: int, dtype: str) -> Division:
    """Tile and parts that take the least time for ∂C/∂W of this shape.

    At most two blocks for each multiprocessor, and parts of whole panels of rows.
    """

    def divided(tile: Tile) -> Division:
        wanted, fewest = ceil_div(2 * n_multiprocessors(), _blocks(tile, shape)), 32 if SIMULATED else ROWS_PER_PART
        n = max(1, min(wanted, MOST_PARTS, n_rows // fewest))
        rows = ceil_div(ceil_div(n_rows, n), tile.depth) * tile.depth
        return Division(tile, ceil_div(n_rows, rows), rows)

    def time(d: Division) -> float:
        return d.rows * _time(d.tile, d.n * _blocks(d.tile, shape))

    return min(map(divided, tiles(dtype)), key=time)


def _blocks(tile: Tile, shape: tuple[int, int]) -> int:
    n: int = ceil_div(shape[0], tile.rows) * ceil_div(shape[1], tile.columns)
    return n


def _time(tile: Tile, n_blocks: int) -> float:
    """Rounds of blocks · entries of a tile · time of an entry: a multiplication, and its reads of shared memory."""
    entry = 1 + 4 / tile.rows_per_thread + 4 / tile.columns_per_thread
    rounds: int = ceil_div(n_blocks, n_multiprocessors())
    return float(rounds * tile.rows * tile.columns * entry)
