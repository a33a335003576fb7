"""How far the processors are from each other, now.

A virtual machine's processors are threads of its host, which may move them at any moment: to two cores that share a
cache, or to two that do not. On two of a Zen 4, a cache line took 40 to 80 ns from one to the other for most of the
time, and 160 to 240 ns for some seconds. A forward and backward pass of `nn.Sequential` on network S, whose threads
wait for each other often, took 275 µs in the former and 430 to 590 µs in the latter; `FusedMLP` 262 and 272. Neither
processor time nor the time that the host takes away tells.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable

import numba
import numpy as np

from backprop_gpu.kernels.numba_cpu import team

__all__ = ["Distance", "handover_seconds"]

HANDOVERS, PARTS = 4000, 3
"""The fastest part of so many handovers counts, so that a thread that is interrupted does no harm. 3 to 4 ms in all,
most of them to start and bind the threads."""

NEAR = 50e-9
"""What a cache line takes at most, at its fastest, between cores that share a cache: 28 to 40 ns on Zen 4 and 5.
A run that begins while they share none has to know: one took 200 ns for near."""

PAUSE = 0.05
"""Seconds from one look to the next."""


@numba.njit(nogil=True)
def _hand_on(line, thread, n_threads, first, times):
    """Write to `line`, once in each of `times` rounds, as soon as the thread before has."""
    for i in range(first, first + times):
        turn = i * n_threads + thread
        here = team.load(line)
        while here != turn:
            if here < 0:
                return
            here = team.load(line)
        team.store(line, turn + 1)


def handover_seconds() -> float:
    """What it takes a cache line from one of this process's processors to the next; 0 where there is only one."""
    processors = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(processors) < 2:
        return 0.0
    line, parts, times = team.new_barrier(), np.full(PARTS, math.inf), max(1, HANDOVERS // len(processors))

    def work(thread: int) -> None:
        os.sched_setaffinity(0, {processors[thread]})  # of this thread alone
        for part in range(PARTS):
            start = time.perf_counter()
            _hand_on(line.ctypes.data, thread, len(processors), part * times, times)
            if thread == 0:
                parts[part] = time.perf_counter() - start

    others = [threading.Thread(target=work, args=(thread,)) for thread in range(1, len(processors))]
    try:
        for other in others:
            other.start()
        work(0)
    except BaseException:
        line[0] = team.STOPPED  # or they would wait for ever
        raise
    finally:
        os.sched_setaffinity(0, processors)
        for other in others:
            if other.ident is not None:
                other.join()
    return float(parts.min()) / (times * len(processors))


class Distance:
    """Tells whether the processors are farther apart than they are at their nearest, and waits for it to pass.

    Args:
        far: how many times as far as at their nearest they must be to be too far apart to measure anything.
        patience: for how many seconds to wait, in all of the run.
        near: seconds that they are apart at their nearest, at most; once there is no patience left, what has been seen
            counts instead, as there are machines whose processors share no cache.
    """

    def __init__(
        self, far: float, patience: float, measure: Callable[[], float] = handover_seconds, near: float = NEAR
    ) -> None:
        self.far, self.patience, self.measure, self.near = far, patience, measure, near
        self.nearest = math.inf

    def excess(self) -> float:
        """Over 1: too far apart."""
        seconds = self.measure()
        self.nearest = min(self.nearest, seconds)
        nearest = min(self.nearest, self.near) if self.patience > 0 else self.nearest
        return seconds / (self.far * nearest) if nearest else 0.0

    def wait_until_near(self) -> float:
        """The excess then: still over 1 when all patience is at an end."""
        while (excess := self.excess()) > 1 and self.patience > 0:
            time.sleep(PAUSE)
            self.patience -= PAUSE
        return excess
