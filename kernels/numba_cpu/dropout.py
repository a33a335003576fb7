"""Dropout masks by Philox4x32-10 (Salmon et al., 2011), by the rule in `backends.contract.Dropout`.

A mask is kept as factors, 1 / (1 − rate) or 0, for one tile: forward and backward pass multiply by the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from backprop_gpu.kernels.numba_cpu.compile import compiled
from backprop_gpu.kernels.numba_cpu.elementary import called, inlined

__all__ = ["keep_factors", "multiply"]

LOW, HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
MULTIPLIER_0, MULTIPLIER_1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
WEYL_0, WEYL_1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)


@inlined
def philox(c0: Any, c1: Any, c2: Any, c3: Any, seed: Any) -> Any:
    """The four 32-bit words of a counter of four 32-bit words, all as uint64."""
    k0, k1 = seed & LOW, seed >> HALF
    for _ in range(10):
        p0, p1 = c0 * MULTIPLIER_0, c2 * MULTIPLIER_1
        c0, c1, c2, c3 = (p1 >> HALF) ^ c1 ^ k0, p1 & LOW, (p0 >> HALF) ^ c3 ^ k1, p0 & LOW
        k0, k1 = (k0 + WEYL_0) & LOW, (k1 + WEYL_1) & LOW
    return c0, c1, c2, c3


@compiled
def keep_factors(
    factors: Any,
    start: Any,
    stride: Any,
    width: Any,
    n_rows: Any,
    n_columns: Any,
    first_row: Any,
    first_column: Any,
    rate: Any,
    seed: Any,
    layer: Any,
    step: Any,
) -> None:
    """1 / (1 − rate) where a neuron is kept, 0 where it is not, for the mini-batch from this row and column on.

    factors : (n_rows, n_columns) in panels of `width` columns, a multiple of 4 where there are several; overwritten,
    with 0 in the padding. first_column : a multiple of 4; seed : uint64.
    """
    for p in range((n_columns + width - 1) // width):
        at, block, columns = start + p * stride, (first_column + p * width) // 4, n_columns - p * width
        if width % 4 == 0:
            panel = factors[at : at + n_rows * width]
            fill_rows(panel, width, columns, block, first_row, rate, seed, layer, step)
        else:
            for r in range(n_rows):
                row = factors[at + r * width : at + r * width + width]
                fill_row(row, block, first_row + r, rate, seed, layer, step)


@called
def fill_rows(
    panel: Any,
    width: Any,
    n_columns: Any,
    first_block: Any,
    first_row: Any,
    rate: Any,
    seed: Any,
    layer: Any,
    step: Any,
) -> None:
    """Rows of a panel, in one loop over all their blocks of 4: many rows are narrower than the machine's vectors."""
    threshold, keep, zero = np.uint64(rate * 2.0**32), panel.dtype.type(1 / (1 - rate)), panel.dtype.type(0)
    layer, step = np.uint64(layer) & LOW, np.uint64(step) & LOW
    blocks, first_block, first_row = np.uint64(width // 4), np.uint64(first_block), np.uint64(first_row)
    inverse = (np.uint64(1) << HALF) // blocks + np.uint64(1)
    for t in range(panel.size // 4):
        row = (np.uint64(t) * inverse) >> HALF  # t // blocks, for t · blocks < 2³²
        block = np.uint64(t) - row * blocks
        words = philox((first_block + block) & LOW, (first_row + row) & LOW, layer, step, seed)
        for i in range(4):
            kept = words[i] >= threshold and 4 * np.int64(block) + i < n_columns
            panel[4 * t + i] = keep if kept else zero


@called
def fill_row(row: Any, first_block: Any, number: Any, rate: Any, seed: Any, layer: Any, step: Any) -> None:
    """One row that no padding makes a multiple of 4."""
    threshold, keep, zero = np.uint64(rate * 2.0**32), row.dtype.type(1 / (1 - rate)), row.dtype.type(0)
    for b in range((row.size + 3) // 4):
        counter = np.uint64(first_block + b), np.uint64(number), np.uint64(layer), np.uint64(step) & LOW
        words = philox(*counter, seed)
        for i in range(min(4, row.size - 4 * b)):
            row[4 * b + i] = keep if words[i] >= threshold else zero


@compiled
def multiply(x: Any, x_start: Any, factors: Any, factors_start: Any, count: Any) -> None:
    """x · factors over a run of `count` entries, in place; 0 where the factor is 0, whatever x is there."""
    x, factors = x[x_start : x_start + count], factors[factors_start : factors_start + count]
    for i in range(x.size):
        x[i] = x[i] * factors[i] if factors[i] != 0 else x.dtype.type(0)
