"""Starting the contenders' processes, asking them, and seeing whether anything else is running."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from bench.contenders import contender

__all__ = ["Failed", "Others", "Process", "Unsupported", "all_threads", "processes"]

ROOT = Path(__file__).parents[1]

THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMBA_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)

IDLE_POLL, IDLE_SHARE, IDLE_TIMEOUT = 0.003, 0.1, 0.2
"""A process is at rest when its threads spin for less than a tenth of 3 ms; OpenBLAS's spin for some 25 ms."""


class Unsupported(Exception):
    """A contender cannot do this work."""


class Failed(Exception):
    """A contender's process raised an error; the message is its traceback."""


def all_threads() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Process:
    """One contender's process."""

    def __init__(self, name: str, threads: int) -> None:
        self.name, self.threads = name, threads
        environment = {**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(threads))}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        with _restricted_to(threads):
            self.process = subprocess.Popen(
                [sys.executable, "-m", "bench.worker", name, str(threads)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                text=True,
            )

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """The answer to one request; raises `Unsupported` or `Failed`."""
        self.tell(do, **arguments)
        return self.hear()

    def tell(self, do: str, **arguments: Any) -> None:
        """A request, whose answer `hear` waits for."""
        with suppress(BrokenPipeError):
            print(json.dumps({"do": do, **arguments}), file=self.process.stdin, flush=True)

    def hear(self) -> dict[str, Any]:
        """The answer to what was told; raises `Unsupported` or `Failed`."""
        line = self.process.stdout.readline()
        if not line:
            raise Failed(f"the process of {self.name!r} ended with status {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "unsupported" in answer:
            raise Unsupported(answer["unsupported"])
        if "error" in answer:
            raise Failed(answer["error"])
        return answer

    def wait_until_idle(self) -> None:
        """Return when no thread of it spins any more."""
        deadline = time.perf_counter() + IDLE_TIMEOUT
        while time.perf_counter() < deadline:
            before = _cpu_seconds(self.process.pid)
            time.sleep(IDLE_POLL)
            if _cpu_seconds(self.process.pid) - before < IDLE_SHARE * IDLE_POLL:
                return

    def close(self) -> None:
        """End it."""
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


@contextmanager
def processes(names: Iterable[str], threads: int) -> Iterator[dict[str, Process]]:
    """A process for each contender that can take part here, by name."""
    started: dict[str, Process] = {}
    try:
        for name in names:
            if contender(name).missing() is None:
                started[name] = Process(name, threads)
        yield started
    finally:
        for process in started.values():
            process.close()


@contextmanager
def _restricted_to(threads: int) -> Iterator[None]:
    """What is started meanwhile may run on so many processors only, which every library respects."""
    if threads >= all_threads() or not hasattr(os, "sched_setaffinity"):
        yield
        return
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(allowed)[:threads])
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


# What else runs on the machine


def _cpu_seconds(pid: int) -> float:
    """Processor time of a process so far, to the nanosecond (Linux's clock of another process); 0 where unknown."""
    if sys.platform != "linux":
        return 0.0
    try:
        return time.clock_gettime((~pid << 3) | 2)
    except OSError:
        return 0.0


class Others:
    """Processor time that everything but one process takes, from the moment that this is made."""

    def __init__(self, process: Process) -> None:
        self.pid = process.process.pid
        self.each, self.all = self._each(), _busy_seconds() - _cpu_seconds(self.pid)

    def seconds(self) -> float:
        """So far: of those that ran throughout, or else of the whole machine, which has short-lived ones too."""
        each = sum(seconds - self.each.get(pid, seconds) for pid, seconds in self._each().items())
        return max(each, _busy_seconds() - _cpu_seconds(self.pid) - self.all - BUSY_RESOLUTION)

    def _each(self) -> dict[int, float]:
        if sys.platform != "linux":
            return {}
        pids = (int(entry) for entry in os.listdir("/proc") if entry.isdigit())
        return {pid: _cpu_seconds(pid) for pid in pids if pid != self.pid}


BUSY_RESOLUTION = 0.03
"""Linux counts the machine's busy time in ticks of 10 ms on each processor."""


def _busy_seconds() -> float:
    """Processor time of the whole machine so far, with what its host took away; 0 where unknown."""
    if sys.platform != "linux":
        return 0.0
    user, nice, system, _, _, irq, softirq, steal, *_ = map(int, Path("/proc/stat").read_text().split()[1:11])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
