"""cuBLAS products that a CUDA graph can capture: CuPy's own refuse to be, so the library is called directly.

A product is row-major here and column-major there: C = A B is Cᵀ = Bᵀ Aᵀ. Every stream has a handle and a workspace of
its own, without which cuBLAS allocates while it is captured, and need not repeat its bits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import CDLL
from functools import cached_property
from typing import Any

from backprop_gpu.backends.contract import Array

__all__ = ["Blas"]

WORKSPACE = 32 << 20
"""Bytes; what NVIDIA recommends for Hopper."""

N, T = 0, 1  # cublasOperation_t
TYPES = {"float32": 0, "float64": 1, "tf32": 0, "bfloat16": 14, "float16": 2}  # cudaDataType_t of the operands
COMPUTE = {"float32": 68, "float64": 70, "tf32": 77, "bfloat16": 68, "float16": 68}  # cublasComputeType_t
DEFAULT_ALGORITHM = -1


class Blas:
    """The products of the three layouts, on the current stream, which `prepare` has seen."""

    def __init__(self, cp: Any) -> None:
        self.cp = cp
        self._handles: dict[int, tuple[ctypes.c_void_p, Array]] = {}

    @cached_property
    def cublas(self) -> Any:
        """CuPy's, which loads it when asked for its own module: the system's loader does not look into wheels."""
        _ = self.cp.cuda.cublas
        major = self.cp.cuda.runtime.runtimeGetVersion() // 1000
        return CDLL(f"libcublas.so.{major}")

    def missing(self) -> str | None:
        """Why there is none, or None."""
        try:
            _ = self.cublas
        except (ImportError, OSError, RuntimeError) as error:
            return str(error)
        return None

    def prepare(self, stream: Any) -> None:
        """A handle and a workspace for `stream`; not while it is captured."""
        if stream.ptr in self._handles:
            return
        handle, workspace = ctypes.c_void_p(), self.cp.empty((WORKSPACE,), "uint8")
        self._call("cublasCreate_v2", ctypes.byref(handle))
        self._call("cublasSetStream_v2", handle, ctypes.c_void_p(stream.ptr))
        self._call("cublasSetWorkspace_v2", handle, _pointer(workspace), ctypes.c_size_t(WORKSPACE))
        self._handles[stream.ptr] = (handle, workspace)

    def nn(self, a: Array, b: Array, c: Array, dtype: str) -> Callable[[], None]:
        """c ← a b, of (m, k) and (k, n)."""
        return self._product(a, b, c, (N, N), (*c.shape, a.shape[1]), dtype)

    def nt(self, a: Array, b: Array, c: Array, dtype: str) -> Callable[[], None]:
        """c ← a bᵀ, of (m, k) and (n, k)."""
        return self._product(a, b, c, (N, T), (*c.shape, a.shape[1]), dtype)

    def tn(self, a: Array, b: Array, c: Array, dtype: str) -> Callable[[], None]:
        """c ← aᵀ b, of (k, m) and (k, n)."""
        return self._product(a, b, c, (T, N), (*c.shape, a.shape[0]), dtype)

    def _product(
        self, a: Array, b: Array, c: Array, transposed: tuple[int, int], sizes: tuple[int, int, int], dtype: str
    ) -> Callable[[], None]:
        m, n, k = sizes
        scalar = ctypes.c_double if dtype == "float64" else ctypes.c_float
        one, zero = scalar(1), scalar(0)
        operand, result = TYPES[dtype], TYPES["float64" if dtype == "float64" else "float32"]

        def launch() -> None:
            handle, _ = self._handles[self.cp.cuda.get_current_stream().ptr]
            self._call(
                "cublasGemmEx",
                *(handle, transposed[1], transposed[0], n, m, k, ctypes.byref(one)),
                *(_pointer(b), operand, b.shape[1], _pointer(a), operand, a.shape[1], ctypes.byref(zero)),
                *(_pointer(c), result, n, COMPUTE[dtype], DEFAULT_ALGORITHM),
            )

        return launch

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self.cublas, name)(*arguments)
        if status:
            raise RuntimeError(f"{name} of cuBLAS failed with status {status}")


def _pointer(x: Array) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data.ptr)
