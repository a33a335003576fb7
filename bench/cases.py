"""What is measured: networks, their data and their initial weights, the same for every contender."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import cycle, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

import backprop_gpu as bp

__all__ = ["LEARNING_RATE", "NETWORKS", "Case", "random_cases"]

LEARNING_RATE = 1e-3

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Case:
    """A classifier with softmax cross-entropy and the data to train it on: float32, `n_batches` mini-batches."""

    layer_sizes: tuple[int, ...]
    batch_size: int
    activation: str = "relu"
    n_batches: int = 4

    def __str__(self) -> str:
        name = next((name for name, case in NETWORKS.items() if case.shape == self.shape), None)
        shape = name or f"{'-'.join(map(str, self.layer_sizes))}, {self.batch_size}"
        return shape if self.activation == "relu" else f"{shape}, {self.activation}"

    @property
    def shape(self) -> tuple[tuple[int, ...], int]:
        """What a network and its batch are but for the activation."""
        return self.layer_sizes, self.batch_size

    @property
    def n_rows(self) -> int:
        """Rows of the data set."""
        return self.batch_size * self.n_batches

    @property
    def flops(self) -> float:
        """Of a step's products: a W and aᵀ δ of every layer, δ Wᵀ of all but the first, 2 N n_in n_out each."""
        products = [n_in * n_out for n_in, n_out in pairwise(self.layer_sizes)]
        return 2.0 * self.batch_size * (3 * sum(products) - products[0])

    @property
    def product_flops(self) -> float:
        """Operations of the forward products alone."""
        return 2.0 * self.batch_size * sum(n_in * n_out for n_in, n_out in pairwise(self.layer_sizes))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `Case.from_dict` reads it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Case:
        """The case that `to_dict` wrote down."""
        return cls(**{**values, "layer_sizes": tuple(values["layer_sizes"])})

    # The same numbers in every process: all are drawn from fixed seeds

    def data(self) -> tuple[Array, Array]:
        """X (n_rows, n_in) float32, standard normal, and labels y (n_rows,) int64."""
        rng = np.random.default_rng(0)
        X = rng.standard_normal((self.n_rows, self.layer_sizes[0]), dtype=np.float32)
        return X, rng.integers(0, self.layer_sizes[-1], self.n_rows)

    def order(self) -> Array:
        """The shuffled order of the rows, (n_rows,): mini-batch i is the i-th `batch_size` entries of it."""
        return np.random.default_rng(1).permutation(self.n_rows)

    def batches(self) -> tuple[Array, Array]:
        """The mini-batches as contiguous arrays: X (n_batches, batch_size, n_in) and y (n_batches, batch_size)."""
        X, y = self.data()
        order = self.order().reshape(self.n_batches, self.batch_size)
        return X[order], y[order]

    def d_out(self) -> Array:
        """∂C/∂out for one mini-batch, (batch_size, n_outputs) float32, standard normal."""
        return np.random.default_rng(2).standard_normal((self.batch_size, self.layer_sizes[-1]), dtype=np.float32)

    def network(self, backend: str = "numpy", dtype: str = "float32") -> bp.MLP:
        """A network with the initial weights, which are the same for every backend and dtype, to rounding."""
        return bp.MLP(self.layer_sizes, self.activation, backend=backend, dtype=dtype, seed=0)

    def initial(self) -> tuple[list[Array], list[Array]]:
        """The initial weights, each (n_in, n_out), and biases, float32."""
        net = self.network()
        return [np.array(W) for W in net.W], [np.array(b) for b in net.b]

    def loss(self, W: Sequence[Array], b: Sequence[Array]) -> float:
        """The loss of these parameters over the whole data set, in float64."""
        net = self.network(dtype="float64")
        for mine, given in zip((*net.W, *net.b), (*W, *b), strict=True):
            mine[...] = given
        return net.evaluate(*self.data())["loss"]

    def reference_loss(self, n_steps: int) -> float:
        """The loss after so many Adam steps of the NumPy reference in float64."""
        return _reference_loss(self, n_steps)


@cache
def _reference_loss(case: Case, n_steps: int) -> float:
    net, (X, y), order = case.network(dtype="float64"), case.data(), case.order()
    passes, rest = divmod(n_steps, case.n_batches)
    rows = np.concatenate([np.tile(order, passes), order[: rest * case.batch_size]])
    if n_steps:
        net.partial_fit(X[rows], y[rows], batch_size=case.batch_size, optimizer=bp.Adam(LEARNING_RATE))
    return case.loss(net.W, net.b)


NETWORKS = {
    "S": Case((30, 64, 64, 2), 200),
    "M": Case((784, 256, 128, 10), 128),
    "N": Case((32, 64, 64, 64, 64, 16), 16384),
    "L": Case((784, 1024, 1024, 10), 512),
}
"""Small, medium, narrow with a large batch, large."""

LARGEST_STEP = 3e9
"""Operations of the largest step in the sweep: some 20 ms on two cores."""


def random_cases(n: int, seed: int = 0) -> list[Case]:
    """`n` shapes, log-uniform: widths 1–2048, depths (weight matrices) 1–8, batches 1–4096, activations in turn."""
    rng = np.random.default_rng(seed)
    cases: list[Case] = []
    activations = cycle(("relu", "tanh", "gelu", "silu"))
    while len(cases) < n:
        depth = int(rng.integers(1, 9))
        sizes = np.exp2(rng.uniform(0, 11, depth + 1)).round().astype(int)
        sizes[-1] = max(2, sizes[-1])  # a classifier has two classes at least
        batch = round(float(np.exp2(rng.uniform(0, 12))))
        case = Case(tuple(sizes.tolist()), batch, next(activations))
        if case.flops <= LARGEST_STEP:
            cases.append(case)
    return cases
