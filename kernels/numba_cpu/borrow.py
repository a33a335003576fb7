"""Arrays without their reference count, for as long as their owner is known to live."""

from __future__ import annotations

from typing import Any

from numba.core import cgutils
from numba.extending import intrinsic

__all__ = ["borrowed"]


@intrinsic
def borrowed(typing_context, x):
    """The array `x` without its reference count, for use while the caller's `x` lives.

    Every slice of an array counts up and down, atomically, and threads that slice the same array fight over the count.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(x)(context, builder, arguments[0])
        array.meminfo = cgutils.get_null_value(array.meminfo.type)
        array.parent = cgutils.get_null_value(array.parent.type)
        return array._getvalue()

    return x(x), generate
