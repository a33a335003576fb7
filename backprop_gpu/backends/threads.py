"""How many threads may be used now, and running a function on that many."""

from __future__ import annotations

import _thread
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from backprop_gpu.checks import integer

__all__ = ["available", "run"]


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


# Running


def run(n_threads: int, work: Callable[[int], object], stop: Callable[[], object] = lambda: None) -> None:
    """work(t) for every t in range(n_threads) at the same time, t = 0 on the calling thread; back when all are done.

    Where one raises, `stop` is called, which has to make the others return, from a barrier too; and so it is where one
    is interrupted, or cannot be started. Then the first error is raised, and no thread is left at work.

    Threads are started for each call. Those that wait from call to call would save 25 of 70 µs (one thread beside the
    caller, 1 ms of work; `threading.Thread` costs another 25), but could not be forked: Python warns of it from 3.12
    on.
    """
    errors: list[BaseException] = []
    team = [_Member(work, t, errors, stop) for t in range(1, n_threads)]
    try:
        for member in team:
            _thread.start_new_thread(member.work_once, ())
        work(0)
        for member in team:
            member.done.acquire()
    except BaseException as error:
        errors.append(error)
        _call_off(team, stop)
    if errors:
        raise errors[0]


class _Member:
    """One thread's work, which begins once or is called off before it begins."""

    def __init__(
        self, work: Callable[[int], object], t: int, errors: list[BaseException], stop: Callable[[], object]
    ) -> None:
        self.work, self.t, self.errors, self.stop = work, t, errors, stop
        self.fate: dict[str, str] = {}
        self.done = _thread.allocate_lock()
        self.done.acquire()
        self.is_over = False

    def work_once(self) -> None:
        """The work, unless it has been called off."""
        if self.fate.setdefault("is", "begun") == "begun":
            try:
                self.work(self.t)
            except BaseException as error:
                self.errors.append(error)
                self.stop()
            finally:
                self.is_over = True
                self.done.release()

    def call_off(self) -> None:
        """Keep the work from beginning, or wait for its end.

        Interrupted anywhere, it can be called again, so it does not wait for `done`: that may have been taken.
        """
        while self.fate.setdefault("is", "called off") == "begun" and not self.is_over:
            time.sleep(0.001)


def _call_off(team: list[_Member], stop: Callable[[], object]) -> None:
    try:
        stop()
        for member in team:
            member.call_off()
    except BaseException:  # Ctrl-C once more: the arrays are still not the caller's
        _call_off(team, stop)
        raise
