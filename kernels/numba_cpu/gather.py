"""Rows of the data into a tile, and parameters into panels and back."""

from __future__ import annotations

import numpy as np

from backprop_gpu.kernels.numba_cpu.compile import compiled
from backprop_gpu.kernels.numba_cpu.gemm import copy_vectors, prefetch_panel, prefetch_panel_early
from backprop_gpu.kernels.numba_cpu.panels import VECTORS, panel_width

__all__ = ["gather", "gather_run", "pack", "pack_turned", "panels_of", "unpack", "unpack_turned"]


AHEAD, AHEAD_OF_WIDE = 512, 2048
"""Elements of the rows that are asked for before they are copied: those of 16 short rows, or of two images.

784 columns in any order, from 188 MB, for a mini-batch of 200: 24 µs instead of 40 on each of two threads of a Zen 5,
with 512, 2048 and 6144 alike.
"""

WIDE = 128
"""Columns above which a row is asked for into the second level of the cache alone, which can wait for more at a time.

200 rows of 160 MB on one core of a Zen 4, in µs, 512 elements ahead into the first level, and 2048 into the second:
100 columns 14.5 and 12.5, 200 columns 22 and 15, 400 columns 42 and 27, 784 columns 73 and 51; but 64 columns 10 and
17, 128 columns 15 and 18.
"""


@compiled
def copy(source, source_start, target, target_start, count):
    """A run of elements, a panel's width at most."""
    lanes = panel_width(target) // VECTORS
    copy_vectors(source, source_start, target, target_start, count // lanes)
    for i in range(np.uintp(count // lanes * lanes), np.uintp(count)):
        target[np.uintp(target_start) + i] = source[np.uintp(source_start) + i]


@compiled
def gather(x, order, first, n_rows, tile, start, stride):
    """Rows order[first], …, order[first + n_rows − 1] of x, (·, n_columns), as the panels of a tile."""
    flat, n_columns = x.reshape(-1), x.shape[1]
    ahead = max(1, (AHEAD if n_columns <= WIDE else AHEAD_OF_WIDE) // n_columns)
    for r in range(n_rows):
        here, later = order[first + r] * n_columns, order[first + min(r + ahead, n_rows - 1)] * n_columns
        gather_row(flat, here, later, n_columns, tile, start + r * panel_width(tile), stride)


@compiled
def gather_run(x, first, n_rows, tile, start, stride):
    """Rows first, …, first + n_rows − 1 of x as the panels of a tile."""
    flat, n_columns = x.reshape(-1), x.shape[1]
    for r in range(n_rows):
        here = (first + r) * n_columns  # the processor sees for itself what comes next
        gather_row(flat, here, here, n_columns, tile, start + r * panel_width(tile), stride)


@compiled
def gather_row(x, here, later, n_columns, tile, start, stride):
    """The row from x[here] on into the panels of a tile, at `start` in the first; asks for the one from x[later] on."""
    panel = panel_width(tile)
    for p in range((n_columns + panel - 1) // panel):
        column = p * panel
        if n_columns <= WIDE:
            prefetch_panel(x, later + column)
        else:
            prefetch_panel_early(x, later + column)
        copy(x, here + column, tile, start + p * stride, min(panel, n_columns - column))


@compiled
def panels_of(thread, n_threads, n_columns, panel):
    """The first panel of a thread's columns, and the last + 1."""
    n_panels = (n_columns + panel - 1) // panel
    return thread * n_panels // n_threads, (thread + 1) * n_panels // n_threads


@compiled
def pack(thread, n_threads, flat, flat_start, n_rows, n_columns, packed, start, stride):
    """One thread's panels of a row-major matrix; padding is left as it is.

    Row by row: panel by panel, the rows of 1024 columns are whole pages apart, and take 1.3 times as long.
    """
    panel = panel_width(packed)
    low, high = panels_of(thread, n_threads, n_columns, panel)
    for r in range(n_rows):
        for p in range(low, high):
            column = p * panel
            count = min(panel, n_columns - column)
            copy(flat, flat_start + r * n_columns + column, packed, start + p * stride + r * panel, count)


@compiled
def unpack(thread, n_threads, packed, start, stride, n_rows, n_columns, flat, flat_start):
    """The inverse of `pack`."""
    panel = panel_width(packed)
    low, high = panels_of(thread, n_threads, n_columns, panel)
    for r in range(n_rows):
        for p in range(low, high):
            column = p * panel
            count = min(panel, n_columns - column)
            copy(packed, start + p * stride + r * panel, flat, flat_start + r * n_columns + column, count)


@compiled
def pack_turned(thread, n_threads, flat, flat_start, n_rows, n_columns, packed, start, stride):
    """One thread's panels of the transpose of a row-major matrix of few columns; padding is left as it is."""
    panel = panel_width(packed)
    low, high = panels_of(thread, n_threads, n_rows, panel)
    for r in range(low * panel, min(high * panel, n_rows)):
        to = start + r // panel * stride + r % panel
        for j in range(n_columns):
            packed[to + j * panel] = flat[flat_start + r * n_columns + j]


@compiled
def unpack_turned(thread, n_threads, packed, start, stride, n_rows, n_columns, flat, flat_start):
    """The inverse of `pack_turned`."""
    panel = panel_width(packed)
    low, high = panels_of(thread, n_threads, n_rows, panel)
    for r in range(low * panel, min(high * panel, n_rows)):
        where = start + r // panel * stride + r % panel
        for j in range(n_columns):
            flat[flat_start + r * n_columns + j] = packed[where + j * panel]
