"""Sums and maxima over a run of numbers, in vector registers."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit
from numba.core import cgutils
from numba.extending import intrinsic

from backprop_gpu.kernels.numba_cpu.compile import compiled

__all__ = ["largest", "maximum", "summing", "total", "total_of_squares"]

# A sum may be taken in any order, which is what vectors need; only functions that do nothing but add may say so.
summing = njit(nogil=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz"})


@intrinsic
def maximum(typing_context, x, y):
    """The larger of two numbers, NaN where one is: a reduction with it is vectorised, one with `>` is not."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = arguments[0].type
        name = f"llvm.maximum.f{signature.args[0].bitwidth}"
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind, kind]), name)
        return builder.call(function, arguments)

    return x(x, x), generate


@compiled
def largest(x):
    """The largest entry, NaN where there is one."""
    result = x[0]
    for i in range(x.size):
        result = maximum(result, x[i])
    return result


@summing
def total(x):
    """Σ x."""
    result = x.dtype.type(0)
    for i in range(x.size):
        result += x[i]
    return result


@summing
def total_of_squares(x, y, alpha):
    """Σ (x + alpha · y)², accumulated in float64."""
    result = 0.0
    for i in range(x.size):
        g = float(x[i] + alpha * y[i])
        result += g * g
    return result
