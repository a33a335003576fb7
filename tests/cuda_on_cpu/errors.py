"""The emulator's own error, and those that CuPy raises."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["CUDADriverError", "CUDARuntimeError", "CompileException", "EmulationError", "OutOfMemoryError"]

ERRORS = {
    1: ("cudaErrorInvalidValue", "invalid argument"),
    101: ("cudaErrorInvalidDevice", "invalid device ordinal"),
    400: ("cudaErrorInvalidResourceHandle", "invalid resource handle"),
    900: ("cudaErrorStreamCaptureUnsupported", "operation not permitted when stream is capturing"),
    901: ("cudaErrorStreamCaptureInvalidated", "operation failed due to a previous error during capture"),
    904: ("cudaErrorStreamCaptureUnjoined", "capturing stream has unjoined work"),
    905: ("cudaErrorStreamCaptureIsolation", "dependency created on uncaptured work in another stream"),
    906: (
        "cudaErrorStreamCaptureImplicit",
        "operation would make the legacy stream depend on a capturing blocking stream",
    ),
    907: ("cudaErrorCapturedEvent", "operation not permitted on an event last recorded in a capturing stream"),
}


class EmulationError(RuntimeError):
    """A kernel, or the way in which it was launched, is wrong."""


class CUDARuntimeError(RuntimeError):
    """What the CUDA runtime would have answered; `status` is its number."""

    def __init__(self, status: int, detail: str = "") -> None:
        self.status = status
        name, description = ERRORS[status]
        super().__init__(f"{name}: {description}" + (f" ({detail})" if detail else ""))


class OutOfMemoryError(MemoryError):
    """The device has not that much memory."""

    def __init__(self, size: int, total: int, limit: int = 0) -> None:
        self._size, self._total, self._limit = size, total, limit
        super().__init__(f"Out of memory allocating {size:,} bytes (allocated so far: {total:,} bytes).")


class CompileException(Exception):
    """As `cupy.cuda.compiler.CompileException`."""

    def __init__(self, msg: str, source: str, name: str, options: Sequence[str], backend: str = "nvrtc") -> None:
        self._msg, self.source, self.name, self.options, self.backend = msg, source, name, options, backend
        super().__init__(msg)

    def get_message(self) -> str:
        return self._msg


class CUDADriverError(RuntimeError):
    """As `cupy.cuda.driver.CUDADriverError`."""
