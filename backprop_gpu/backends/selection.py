"""Choosing a backend: the first that works on this machine, or the one asked for by name, or an error with the way out.

A backend is a module of this package with `probe()`, which returns None where it works and the reason where it does
not, and `BACKEND`, which makes it. Where it works but "auto" should pass it over, the module's `by_name_only()` says
why. It is imported only when it is asked for, so `import backprop_gpu` stays light.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec

from backprop_gpu.backends.contract import Backend
from backprop_gpu.checks import lookup

__all__ = ["MODULES", "BackendStatus", "backends", "get_backend", "select"]

logger = logging.getLogger("backprop_gpu")

MODULES = {"cuda": "cuda", "numba-cuda": "numba_cuda", "cpu": "cpu", "numpy": "numpy"}
"""Every backend by name, fastest first, and its module in this package."""


DEPENDENCY = {
    "cuda": "cupy-cuda12x 'cuda-toolkit[cudart,nvrtc]==12.*'",  # a driver of CUDA 13 runs it as well
    "numba-cuda": "'numba-cuda[cu13]'",
    "cpu": "numba",
    "numpy": "numpy",
}
"""What each backend imports beyond NumPy."""


@dataclass(frozen=True)
class BackendStatus:
    """Whether one backend works on this machine, and if not, why."""

    name: str
    works: bool
    reason: str
    """Why it does not work, or why "auto" passes it over; empty where neither is so."""

    @property
    def automatic(self) -> bool:
        """Whether "auto" may take it."""
        return self.works and not self.reason

    def __str__(self) -> str:
        if self.works and self.reason:
            return f"{self.name}: works, but only by name: {self.reason}"
        return f"{self.name}: {self.reason or 'works'}"


def backends() -> tuple[BackendStatus, ...]:
    """The state of every backend on this machine, in the order in which `backend="auto"` tries them."""
    return tuple(_status(name) for name in MODULES)


def get_backend(name: str = "auto") -> Backend:
    """The operations of the backend `name`, for a training loop of one's own; "auto" takes the first that works.

    Raises ValueError for an unknown name, RuntimeError where the backend cannot work here, with what is missing.
    """
    return select(name)[0]


def select(name: str, dtype: str | None = None) -> tuple[Backend, str]:
    """The backend `name` for networks of `dtype`, and why it was taken, in one sentence."""
    if name != "auto":
        lookup("backend", name, {"auto": "", **MODULES})
        return _named(name, dtype), "asked for by name"
    refusals: list[str] = []
    for status in backends():
        refusal = status.reason if not status.automatic else _dtype_refusal(status.name, dtype)
        if refusal is None:
            reason = "; ".join(["the first that works here", *refusals])
            logger.info("backend %s: %s", status.name, reason)
            return _computing_in(status.name, dtype), reason
        refusals.append(f"{status.name}: {refusal}")
    raise ValueError(f"no backend of this machine computes in {dtype} ({'; '.join(refusals)})")


def _named(name: str, dtype: str | None) -> Backend:
    status = _status(name)
    if not status.works:
        raise RuntimeError(f"backend {name!r} cannot work here: {status.reason}; backend='auto' takes one that can")
    refusal = _dtype_refusal(name, dtype)
    if refusal is not None:
        raise ValueError(f"backend {name!r} {refusal}")
    return _computing_in(name, dtype)


def _computing_in(name: str, dtype: str | None) -> Backend:
    backend = _instance(name)
    return backend if dtype is None else backend.computing_in(dtype)


@cache
def _status(name: str) -> BackendStatus:
    module = f"{__package__}.{MODULES[name]}"
    if find_spec(module) is None:
        return BackendStatus(name, False, "not part of this release of backprop_gpu")
    try:
        backend = import_module(module)
        reason = backend.probe()
        by_name_only = backend.by_name_only() if hasattr(backend, "by_name_only") else None
    except ImportError as error:
        return BackendStatus(name, False, f"{error}; pip install {DEPENDENCY[name]}")
    return BackendStatus(name, reason is None, reason or by_name_only or "")


@cache
def _instance(name: str) -> Backend:
    backend: Backend = import_module(f"{__package__}.{MODULES[name]}").BACKEND()
    return backend


def _dtype_refusal(name: str, dtype: str | None) -> str | None:
    dtypes = _instance(name).dtypes
    return None if dtype is None or dtype in dtypes else f"computes in {' and '.join(dtypes)}, not in {dtype}"
