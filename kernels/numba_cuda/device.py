"""What the kernels are written in: decorators, elementary functions and sizes, for a GPU and for Numba's simulator.

Numba's simulator (NUMBA_ENABLE_CUDASIM=1) runs every CUDA thread as a Python thread, on NumPy's numbers. So that the
same source runs in both,
- a constant takes the dtype of what it meets: `type(z)(0.5)`, for 0.5 alone would make float64 of a float32;
- elementary functions come from here: Python's own raise an error where a GPU gives infinity or NaN;
- two `cuda.shared.array` calls stand on two lines, since the simulator tells them apart by line and dtype;
- there are no warp shuffles, which it lacks.
"""

from __future__ import annotations

import functools
import math
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda as numba_cuda
from numba.core import config

__all__ = [
    "SIMULATED",
    "block_size",
    "ceil_div",
    "cos",
    "cuda",
    "device",
    "erfc",
    "exp",
    "expm1",
    "kernel",
    "log",
    "log1p",
    "most_blocks",
    "sin",
    "sqrt",
    "tanh",
    "word",
]

Function = Callable[..., Any]

SIMULATED = bool(config.ENABLE_CUDASIM)
"""Whether kernels run in Numba's simulator."""

exp, expm1, log, log1p, sin, cos, tanh, sqrt = (
    (np.exp, np.expm1, np.log, np.log1p, np.sin, np.cos, np.tanh, np.sqrt)
    if SIMULATED
    else (math.exp, math.expm1, math.log, math.log1p, math.sin, math.cos, math.tanh, math.sqrt)
)
erfc = math.erfc

if SIMULATED:
    from numba.cuda.simulator import kernelapi

    class Shared(kernelapi.FakeCUDAShared):  # type: ignore[misc]
        """Shared memory in the simulator, without the race in Numba's.

        There, threads that ask for an array at once may each get one of their own, and never see what others write.
        """

        lock = threading.Lock()
        new = staticmethod(np.empty)

        def array(self, shape: Any, dtype: Any) -> Any:
            """The array of this line and dtype, the same for all threads of a block."""
            caller = sys._getframe(1)
            place = caller.f_code.co_filename, caller.f_lineno, dtype
            with self.lock:
                if place not in self._allocations:
                    self._allocations[place] = self.new(shape, dtype)
                return self._allocations[place]

    kernelapi.FakeCUDAShared = Shared

    class Running:
        """What a kernel knows as `cuda`: its threads, blocks, barriers and memory.

        While a kernel runs, the simulator puts these in the place of `numba.cuda` in the module of the function that it
        starts, which is this one. It would do so for every device function too, at each call, and as of Numba 0.68
        without regard for other threads.
        """

        def __getattr__(self, name: str) -> Any:
            return getattr(numba_cuda, name)


cuda: Any = Running() if SIMULATED else numba_cuda
"""`numba.cuda`, for kernels."""

word = int if SIMULATED else np.uint64
"""An integer of 64 bits without a sign; Python's own are 20 times as fast in the simulator."""


def device(f: Function) -> Function:
    """Decorator: a function that kernels call, always inlined, so that its arrays of registers stay in registers."""
    if SIMULATED:
        return f
    jitted: Function = numba_cuda.jit(device=True, forceinline=True)(f)
    return jitted


def kernel(f: Function) -> Any:
    """Decorator: a kernel.

    In the simulator, infinity and NaN come as silently as on a GPU, and arrays are NumPy's own views of what the
    simulator wraps, whose entries are read ten times as fast.
    """
    if not SIMULATED:
        return numba_cuda.jit(f)

    @functools.wraps(f)
    def quiet(*args: Any) -> None:
        with np.errstate(all="ignore"):  # which belongs to a thread, and this is one
            f(*(np.asarray(x) if getattr(x, "shape", ()) else x for x in args))

    return numba_cuda.jit(quiet)


def block_size(threads: int) -> int:
    """So many threads in a block, a power of two; in the simulator, where a thread costs 0.1 ms, at most 4."""
    return min(threads, 4) if SIMULATED else threads


def most_blocks(blocks: int) -> int:
    """So many blocks at most, of a kernel whose threads go on to further elements; in the simulator, 2."""
    return min(blocks, 2) if SIMULATED else blocks


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)
