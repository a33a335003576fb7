"""The `numba-cuda` backend: whether it works here. Its operations are in `numba_cuda_operations`, imported when needed.

So `backend="auto"` costs a machine without an NVIDIA driver no import of Numba's CUDA target.
"""

from __future__ import annotations

import ctypes
import os
import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from backprop_gpu.backends.contract import Backend

__all__ = ["BACKEND", "by_name_only", "probe"]

OLDEST = (7, 5)
"""Compute capability of the oldest GPUs that CUDA 13 compiles for (Turing, 2018)."""

INSTALL = "pip install 'numba-cuda[cu13]', or [cu12] for a driver of CUDA 12"


def BACKEND() -> Backend:
    """The backend; only where `probe` has found nothing in the way."""
    from backprop_gpu.backends.numba_cuda_operations import NumbaCudaBackend

    return NumbaCudaBackend()


def probe() -> str | None:
    """Why this backend does not work here, with the way out; None where it does, or runs in Numba's simulator."""
    if simulated():
        return None if find_spec("numba.cuda") else f"Numba-CUDA is not installed; {INSTALL}"
    if find_spec("numba_cuda") is None:
        return f"Numba-CUDA is not installed; {INSTALL}"
    return _no_driver() or _unusable()


def by_name_only() -> str | None:
    """Why `backend="auto"` passes this backend over although it works: it does so in Numba's simulator."""
    if not simulated():
        return None
    return "NUMBA_ENABLE_CUDASIM is set, so kernels run in Numba's simulator, thousands of times slower; unset it"


def simulated() -> bool:
    """Whether Numba is told to simulate CUDA, as Numba itself reads it."""
    from numba.core import config

    return bool(config.ENABLE_CUDASIM)  # type: ignore[attr-defined]


def _no_driver() -> str | None:
    """Looks for the driver's library alone, which is quick; where the user says where it is, Numba will look."""
    library = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    if "NUMBA_CUDA_DRIVER" in os.environ:
        return None
    try:
        ctypes.CDLL(library)
    except OSError:
        return f"no NVIDIA driver: {library} is not found; backend='cpu' needs none"
    return None


def _unusable() -> str | None:
    """What Numba finds wrong with the driver, the compiler or the GPU."""
    cuda: Any = import_module("numba.cuda")
    nvvm: Any = import_module("numba.cuda.cudadrv.nvvm")
    driver = import_module("numba.cuda.cudadrv.driver").driver
    if not driver.is_available:
        return f"the NVIDIA driver does not start ({driver.initialization_error}); nvidia-smi should list a GPU"
    if not nvvm.is_available():
        return f"Numba-CUDA finds no libNVVM, its compiler; {INSTALL}"
    gpu = cuda.get_current_device()
    if gpu.compute_capability < OLDEST:
        found, needed = (".".join(map(str, version)) for version in (gpu.compute_capability, OLDEST))
        return f"this GPU has compute capability {found}, below {needed} (Turing); backend='cpu' needs none"
    return None
