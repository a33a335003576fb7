"""The processor that Numba compiles for."""

from __future__ import annotations

import ctypes
import sys

from numba.core.registry import cpu_target

__all__ = ["FEATURES", "HAS_AMX", "NAME", "TRIPLE"]

TRIPLE, NAME, FEATURES = cpu_target.target_context.codegen().magic_tuple()

ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA = 158, 0x1023, 18
"""Of Linux on x86-64: a system call, what it is to do, and for which part of a processor's state."""


def _may_use_tiles() -> bool:
    """Whether this process may use the tile registers of AMX, which Linux gives to those who ask.

    Asked once, for all threads, and for forked processes.
    """
    wanted = {"+amx-tile", "+amx-bf16", "+avx512f"}
    if not (sys.platform == "linux" and TRIPLE.startswith("x86_64") and wanted <= set(FEATURES.split(","))):
        return False
    return ctypes.CDLL(None).syscall(ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA) == 0


HAS_AMX = _may_use_tiles()
"""Whether there is a unit for products of bfloat16 tiles, see `amx`. NUMBA_CPU_FEATURES without it turns it off."""
