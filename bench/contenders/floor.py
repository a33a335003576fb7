"""The floor: the matrix products in NumPy, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import numpy as np

from bench.cases import Case
from bench.contenders.contract import Contender, Unsupported, Variants, Work
from bench.tasks import COPY, layer

__all__ = ["Products"]


class Products(Contender):
    """a_prev W of every layer, a_prevᵀ δ of every layer, δ Wᵀ of every layer but the first, into allocated arrays."""

    label = "NumPy, products alone"

    def training(self, case: Case) -> Variants:
        """The products of a step."""
        return {"": partial(_Products, case)}

    def operation(self, name: str, case: Case) -> Variants:
        """Its product."""
        x = layer(case)
        if name == COPY:
            return {"": lambda: _Call(partial(np.copyto, np.empty_like(x.W), x.W))}
        operands = {
            "dense_forward": (x.a_prev, x.W),
            "dense_backward": (x.delta, x.W.T),
            "dense_gradients": (x.a_prev.T, x.delta),
        }
        if name not in operands:
            raise Unsupported("no product in it")
        out = np.matmul(*operands[name])
        return {"": lambda: _Call(partial(np.matmul, *operands[name], out=out))}


class _Call(Work):
    def __init__(self, call: Callable[[], object]) -> None:
        self.call = call

    def run(self, n: int) -> None:
        """n calls."""
        for _ in range(n):
            self.call()


class _Products(Work):
    def __init__(self, case: Case) -> None:
        rng = np.random.default_rng(0)

        def matrices(shapes):
            return [rng.standard_normal(shape, dtype=np.float32) for shape in shapes]

        layers = list(pairwise(case.layer_sizes))
        self.X = list(case.batches()[0])
        self.W, self.dW = matrices(layers), matrices(layers)
        self.a = matrices((case.batch_size, n_out) for _, n_out in layers)
        # A δ for each layer to read, and one to write below it: to write what is read next would make it grow.
        self.delta = matrices((case.batch_size, n_out) for _, n_out in layers)
        self.delta_prev = matrices((case.batch_size, n_in) for n_in, _ in layers[1:])

    def run(self, n: int) -> None:
        """The products of n steps."""
        for i in range(n):
            self._step(self.X[i % len(self.X)])

    def _step(self, x):
        W, a, delta = self.W, self.a, self.delta
        a_prev = [x, *a[:-1]]
        for i in range(len(W)):
            np.matmul(a_prev[i], W[i], out=a[i])
        for i in reversed(range(len(W))):
            np.matmul(a_prev[i].T, delta[i], out=self.dW[i])
            if i > 0:
                np.matmul(delta[i], W[i].T, out=self.delta_prev[i - 1])
