"""AMX's tile instructions in software, so that machines without the unit execute the products that are made of them.

A pytest plugin: `PYTHONPATH=tests pytest -p software_tiles -m amx`, on a processor with AVX-512. Once it is loaded,
`amx` is compiled to calls of the functions below, slow ones, which round as Intel's manual says TDPBF16PS does but for
numbers below the smallest normal one. Machine code with their addresses is of use to no other process:
$BACKPROP_GPU_CACHE_DIR must name a folder that is thrown away.
"""

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from backprop_gpu.kernels.numba_cpu import processor

processor.HAS_AMX = True

from backprop_gpu.kernels.numba_cpu import amx  # noqa: E402  (it reads HAS_AMX)

N_TILES, ROWS, PAIRS = 8, 16, 16
TILES, NUMBER = types.CPointer(types.uint32), types.int64


@numba.njit
def _floats(bits):
    return bits.view(np.float32)


@numba.cfunc(types.void(TILES, NUMBER, TILES, NUMBER))
def _load(tiles, tile, memory, stride):
    to = numba.carray(tiles, (N_TILES, ROWS, PAIRS))
    entries = numba.carray(memory, (ROWS * stride // 4 + PAIRS,))
    for row in range(ROWS):
        for i in range(PAIRS):
            to[tile, row, i] = entries[row * stride // 4 + i]


@numba.cfunc(types.void(TILES, NUMBER, TILES, NUMBER))
def _store(tiles, tile, memory, stride):
    source = numba.carray(tiles, (N_TILES, ROWS, PAIRS))
    entries = numba.carray(memory, (ROWS * stride // 4 + PAIRS,))
    for row in range(ROWS):
        for i in range(PAIRS):
            entries[row * stride // 4 + i] = source[tile, row, i]


@numba.cfunc(types.void(TILES, NUMBER))
def _zero(tiles, tile):
    numba.carray(tiles, (N_TILES, ROWS, PAIRS))[tile] = 0


@numba.cfunc(types.void(TILES, NUMBER, NUMBER, NUMBER))
def _multiply(tiles, sums, left, right):
    every = numba.carray(tiles, (N_TILES, ROWS, PAIRS))
    high = np.uint32(0xFFFF0000)
    # Copies, whose bits may be viewed as float32
    total, A, B = _floats(every[sums].copy()), every[left], every[right]
    a = _floats(A << np.uint32(16)), _floats(A & high)
    b = _floats(B << np.uint32(16)), _floats(B & high)
    for row in range(ROWS):
        for i in range(PAIRS):
            even, odd = np.float32(0), np.float32(0)
            for k in range(PAIRS):
                even += a[0][row, k] * b[0][k, i]
                odd += a[1][row, k] * b[1][k, i]
            total[row, i] += even + odd
    every[sums] = total.view(np.uint32)


INSTRUCTIONS = {"tileloadd64": _load, "tilestored64": _store, "tilezero": _zero, "tdpbf16ps": _multiply}
SETTINGS = {"ldtilecfg", "tilerelease"}
"""Of registers, which a block of sums has here on its stack."""


class SoftwareTiles(amx._Tiles):
    """The instructions, as calls of these functions."""

    def __init__(self, builder: Any) -> None:
        super().__init__(builder)
        self.memory = cgutils.alloca_once(builder, ir.IntType(32), size=N_TILES * ROWS * PAIRS)

    def call(self, name: str, *operands: Any) -> None:
        """See `_Tiles.call`."""
        if name in SETTINGS:
            return
        pointer = self.memory.type
        values = [amx.SIZE(operand) if isinstance(operand, int) else operand for operand in operands]
        values = [self.builder.bitcast(v, pointer) if isinstance(v.type, ir.PointerType) else v for v in values]
        kind = ir.FunctionType(ir.VoidType(), [pointer, *(value.type for value in values)])
        function = self.builder.inttoptr(amx.SIZE(INSTRUCTIONS[name].address), kind.as_pointer())
        self.builder.call(function, [self.memory, *values])


amx._Tiles = SoftwareTiles
