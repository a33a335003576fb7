"""CuPy, unfused: cuBLAS products and an elementwise kernel for everything else, as one translates NumPy code."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from bench.cases import LEARNING_RATE, Case
from bench.contenders.contract import Contender, Parameters, Unsupported, Variants, Work

__all__ = ["CuPy"]

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


class CuPy(Contender):
    """A step in CuPy's own operations, on mini-batches that are on the device beforehand."""

    label = "CuPy, unfused"
    packages = ("cupy",)

    def __init__(self, device: str = "cuda") -> None:
        self.device = device

    def missing(self) -> str | None:
        """Not installed, or no GPU."""
        absent = super().missing()
        if absent is None:
            import cupy

            try:
                cupy.cuda.runtime.getDeviceCount()
            except cupy.cuda.runtime.CUDARuntimeError as error:
                return f"CuPy finds no CUDA device: {error}"
        return absent

    def training(self, case: Case) -> Variants:
        """Networks of relu."""
        if case.activation != "relu":
            raise Unsupported(f"{case.activation} is not written in CuPy here")
        return {"": partial(_Steps, case)}


class _Steps(Work):
    def __init__(self, case: Case) -> None:
        import cupy

        X, y = case.batches()
        self.xp, self.start = cupy, [cupy.asarray(p) for p in (*case.initial()[0], *case.initial()[1])]
        self.batches = [(cupy.asarray(x), cupy.asarray(t)) for x, t in zip(X, y, strict=True)]

    def reset(self) -> None:
        """The initial weights, and Adam's moments and step 0."""
        self.P = [p.copy() for p in self.start]
        self.m, self.v = ([self.xp.zeros_like(p) for p in self.P] for _ in range(2))
        self.t = 0

    def run(self, n: int) -> float:
        """n steps, round and round the mini-batches; seconds between two events on the device."""
        return event_seconds(self.xp, lambda: [self._step(*self.batches[i % len(self.batches)]) for i in range(n)])

    def _step(self, x: Any, y: Any) -> None:
        L, xp = len(self.P) // 2, self.xp
        W, b = self.P[:L], self.P[L:]
        a_prev = [x]
        for layer in range(L - 1):
            a_prev.append(xp.maximum(a_prev[-1] @ W[layer] + b[layer], 0))
        z = a_prev[-1] @ W[-1] + b[-1]
        delta = xp.exp(z - z.max(axis=1, keepdims=True))
        delta /= delta.sum(axis=1, keepdims=True)
        delta[xp.arange(len(y)), y] -= 1
        delta /= len(y)
        dW, db = [None] * L, [None] * L
        for layer in reversed(range(L)):
            dW[layer], db[layer] = a_prev[layer].T @ delta, delta.sum(axis=0)
            if layer:
                delta = (delta @ W[layer].T) * (a_prev[layer] > 0)
        self._adam([*dW, *db])

    def _adam(self, gradients: list[Any]) -> None:
        self.t += 1
        c1, c2 = 1 - BETA1**self.t, 1 - BETA2**self.t
        for p, m, v, g in zip(self.P, self.m, self.v, gradients, strict=True):
            m += (1 - BETA1) * (g - m)
            v += (1 - BETA2) * (g * g - v)
            p -= LEARNING_RATE * (m / c1) / (self.xp.sqrt(v / c2) + EPSILON)

    def result(self) -> Parameters:
        """W and b."""
        values = [np.asarray(p.get()) for p in self.P]
        return values[: len(values) // 2], values[len(values) // 2 :]


def event_seconds(cupy: Any, work: Callable[[], object]) -> float:
    """Seconds of the device's time for `work`."""
    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(cupy.cuda.get_elapsed_time(start, end)) / 1e3
