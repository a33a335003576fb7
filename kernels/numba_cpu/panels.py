"""How matrices lie in memory here: in column panels, as wide as a block of the product's result in registers.

Element (row r, column c) of an (n_rows, n_columns) matrix is at

    (c // PANEL) · stride + r · PANEL + c % PANEL

where `stride`, from one panel to the next, is at least n_rows · PANEL. Columns that fill up the last panel hold 0.
A row-major matrix is the case of one panel as wide as the matrix.

One layout serves every operand. As the right factor of a product, and as its result, a panel is read and written from
front to back; as a left factor, transposed or not, a block of it is a few consecutive lines. So nothing is packed
between the products of a step, σ and σ′ run over a panel as over a vector, and no stride is a power of two of pages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numba.extending import overload

from backprop_gpu.kernels.numba_cpu.processor import FEATURES, NAME, TRIPLE

__all__ = [
    "BLOCK_ROWS",
    "HALF_BLOCK_ROWS",
    "VECTORS",
    "VECTOR_BYTES",
    "first_entry",
    "lanes",
    "panel_width",
    "round_up",
    "width",
]


@dataclass(frozen=True)
class Registers:
    """The block of a product's result that a machine keeps in its vector registers."""

    vector_bytes: int
    rows: int
    vectors: int
    """Vectors in each row of the block."""


def registers_of(cpu_name: str, features: str, triple: str) -> Registers:
    """The block for the machine that Numba compiles for.

    Each step of the product loads `vectors` + `rows` operands for `rows` · `vectors` multiply-adds; at two of either
    in a cycle that keeps the multiply-adds busy, and there must be registers for all but the `rows` operands.
    Measured on one core of a Zen 5, in GFLOP/s of float32: AVX-512 with 8 × 2 vectors 270 (12 × 2: 270, 8 × 3: 272,
    8 × 1: 242); AVX2 with 4 × 3 vectors 137 (6 × 2: 137, 4 × 2: 120, 8 × 2, which spills: 79). On one of a Zen 3, AVX2
    with 4 × 3 vectors 98.
    """
    available = {feature[1:] for feature in features.split(",") if feature.startswith("+")}
    if "avx512f" in available:
        return Registers(64, rows=8, vectors=2)
    if {"avx", "fma"} <= available:
        return Registers(32, rows=4, vectors=3)
    if triple.startswith(("aarch64", "arm64")):
        return Registers(16, rows=4, vectors=4)  # 32 registers of 16 bytes
    return Registers(16, rows=4, vectors=2)


_REGISTERS = registers_of(NAME, FEATURES, TRIPLE)
VECTOR_BYTES, BLOCK_ROWS, VECTORS = _REGISTERS.vector_bytes, _REGISTERS.rows, _REGISTERS.vectors

HALF_BLOCK_ROWS = BLOCK_ROWS // 2
"""Rows are computed, and shared among threads, in so many: 200 are 100 for each of two, and not 96 and 104."""


def lanes(dtype: Any) -> int:
    """Numbers of `dtype` in a vector."""
    return VECTOR_BYTES // np.dtype(dtype).itemsize


def width(dtype: Any) -> int:
    """Columns of a panel of `dtype`."""
    return VECTORS * VECTOR_BYTES // np.dtype(dtype).itemsize


def panel_width(x: Any) -> int:
    """Columns of a panel of x's dtype; in compiled code a constant."""
    return width(x.dtype)


@overload(panel_width, jit_options={"nogil": True})
def _panel_width(x):
    columns = width(str(x.dtype))
    return lambda x: columns


def first_entry(context: Any, builder: Any, array_type: Any, array: Any) -> Any:
    """Code for the address of an array's first element."""
    return context.make_array(array_type)(context, builder, array).data


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple that is at least n."""
    return -(-n // multiple) * multiple
