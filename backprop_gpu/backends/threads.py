"""How many threads may be used now. They are started by compiled code, see `kernels/numba_cpu/team.py`."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from backprop_gpu.checks import integer

__all__ = ["available", "require"]


# How many


def available() -> int:
    """$BACKPROP_GPU_NUM_THREADS if it is set, else the least of what limits this process:

    the CPUs that it may run on; the share of them that its container has; $OMP_NUM_THREADS; and the threads of NumPy's
    BLAS, where threadpoolctl is in use, so that `threadpool_limits(1)` holds for this library too. Takes 5 µs.
    """
    chosen = os.environ.get(VARIABLE, "").strip()
    if chosen:
        return _chosen(chosen)
    limits = (_cpus(), _cpu_quota(), _openmp_threads(), _blas_threads())
    return max(1, min(limit for limit in limits if limit is not None))


VARIABLE = "BACKPROP_GPU_NUM_THREADS"


def _chosen(text: str) -> int:
    try:
        return integer(VARIABLE, int(text), at_least=1)
    except ValueError:
        raise ValueError(f"{VARIABLE} must be a number of threads, at least 1; got {text!r}") from None


def _cpus() -> int:
    """The CPUs that this thread may run on."""
    if hasattr(os, "process_cpu_count"):
        return os.process_cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _openmp_threads() -> int | None:
    """The outermost number of $OMP_NUM_THREADS, "4" or "4,2"; as OpenMP does, without complaint about others.

    joblib sets it in its worker processes, to their share of the CPUs.
    """
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(first) if first.isdecimal() and int(first) > 0 else None


def _blas_threads() -> int | None:
    """The limit on NumPy's BLAS. Only threadpoolctl can have set one, so it is not imported for this."""
    threadpoolctl = sys.modules.get("threadpoolctl")
    if threadpoolctl is None:
        return None
    return min((library.num_threads for library in _blas_libraries(threadpoolctl)), default=None)


@cache
def _blas_libraries(threadpoolctl: Any) -> list[Any]:
    """The BLAS libraries of this process: found in 200 µs, and asked for their number of threads in 1 µs.

    Not those that have one thread whatever the limit is, and not BLIS, which has one unless it is told otherwise.
    """
    libraries = threadpoolctl.ThreadpoolController().select(user_api="blas").lib_controllers
    return [
        library
        for library in libraries
        if library.internal_api != "blis" and getattr(library, "threading_layer", "") not in ("disabled", "sequential")
    ]


@cache
def _cpu_quota(root: Path = Path("/")) -> int | None:
    """The CPUs that this process's control groups (Linux, containers) pay for, rounded up; looked up once."""
    quotas = [quota for group in _control_groups(root) if (quota := _quota(group)) is not None]
    return math.ceil(min(quotas)) if quotas else None


def _control_groups(root: Path) -> Iterator[Path]:
    """The directories of this process's groups and of those above them, of version 2 and of version 1's `cpu`.

    A container may see its group's path in the host, and its own group where the host has the topmost one.
    """
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "" or "cpu" in controllers.split(","):
            group = PurePosixPath(path.lstrip("/"))
            for directory in (group, *group.parents):
                yield root / "sys/fs/cgroup" / ("cpu" if controllers else "") / directory


def _quota(group: Path) -> float | None:
    """CPU time over period, where there is a limit: "max", or −1 in version 1, is none."""
    version_1 = _read(group / "cpu.cfs_quota_us") + " " + _read(group / "cpu.cfs_period_us")
    match (_read(group / "cpu.max") or version_1).split():
        case [time, period] if time.isdecimal() and period.isdecimal():
            return int(time) / int(period)
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def require(started: bool) -> None:
    """RuntimeError unless all threads of a compiled function were started."""
    if not started:
        raise RuntimeError(
            f"the system starts no more threads for this process; end some, or have this library use one: {VARIABLE}=1"
        )
