"""JAX: the whole step as one jitted function, the parameters donated."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import numpy as np

from bench.cases import LEARNING_RATE, Case
from bench.contenders.contract import Contender, Parameters, Unsupported, Variants, Work
from bench.datasets import Fit
from bench.tasks import layer

__all__ = ["Jax"]

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


class Jax(Contender):
    """A jitted step per call, or `lax.scan` over the mini-batches of a pass in one call."""

    label = "JAX jit"
    packages = ("jax",)

    def __init__(self, platform: str = "cpu") -> None:
        self.platform = platform

    def missing(self) -> str | None:
        """Not installed, or not for this device."""
        absent = super().missing()
        if absent is None and self.platform == "cuda":
            import jax

            return None if jax.default_backend() == "gpu" else "JAX finds no CUDA device"
        return absent

    def set_up(self, threads: int) -> None:
        """Keep it off, or on, the GPU; it takes the processors that the process may run on."""
        os.environ["JAX_PLATFORMS"] = self.platform
        import jax  # noqa: F401

    def training(self, case: Case) -> Variants:
        """Both ways."""
        return {"one step a call": partial(_Steps, case), "scan over mini-batches": partial(_Scan, case)}

    def prediction(self, case: Case) -> Variants:
        """The jitted labels of all rows at once, and in pieces that stay in cache."""
        return {f"{rows} rows at a time": partial(_Prediction, case, rows) for rows in (case.n_rows, 8192)}

    def operation(self, name: str, case: Case) -> Variants:
        """Jitted."""
        if name not in _OPERATIONS:
            raise Unsupported(f"has no {name} of its own")
        return {"": partial(_Operation, name, case)}

    def fit(self, fit: Fit, epochs: int, seed: int) -> Iterator[tuple[float, Parameters]]:
        """A scan over the shuffled mini-batches of each epoch, taken by index within it; a smaller last one apart."""
        import jax
        from jax import numpy as jnp

        X, y = (jnp.asarray(x) for x in fit.data()[:2])
        rng, epoch = np.random.default_rng(seed), _epoch(fit.case.activation, fit.case.batch_size)
        state, spent = _initial_state(fit.case), 0.0
        for _ in range(epochs):
            start = time.perf_counter()
            state = jax.block_until_ready(epoch(state, X, y, jnp.asarray(rng.permutation(len(X)))))
            spent += time.perf_counter() - start
            yield spent, _parameters(state)


@cache
def _epoch(activation: str, size: int) -> Callable[..., Any]:
    """(state, X, y, order) → state after the steps of an epoch."""
    import jax

    step = _step(activation)

    def epoch(state: Any, X: Any, y: Any, order: Any) -> Any:
        whole = len(order) // size * size
        state, _ = jax.lax.scan(lambda s, i: step(s, (X[i], y[i])), state, order[:whole].reshape(-1, size))
        return step(state, (X[order[whole:]], y[order[whole:]]))[0] if whole < len(order) else state

    return jax.jit(epoch, donate_argnums=0)


def _sigma(name: str) -> Callable[[Any], Any]:
    from jax import nn, numpy

    gelu = partial(nn.gelu, approximate=False)
    return {"identity": nn.identity, "relu": nn.relu, "tanh": numpy.tanh, "gelu": gelu, "silu": nn.silu}[name]


def _forward(activation: str) -> Callable[[Any, Any], Any]:
    """(parameters, x) → z of the output layer."""
    sigma = _sigma(activation)

    def forward(P: Any, x: Any) -> Any:
        for W, b in P[:-1]:
            x = sigma(x @ W + b)
        return x @ P[-1][0] + P[-1][1]

    return forward


def _step(activation: str) -> Callable[[Any, Any], Any]:
    """(state, (x, y)) → (state, loss), with state = (parameters, m, v, t)."""
    import jax
    from jax import numpy as jnp

    forward = _forward(activation)

    def loss(P: Any, x: Any, y: Any) -> Any:
        return -jnp.take_along_axis(jax.nn.log_softmax(forward(P, x)), y[:, None], 1).mean()

    def step(state: Any, batch: Any) -> Any:
        P, m, v, t = state
        cost, gradients = jax.value_and_grad(loss)(P, *batch)
        t = t + 1
        c1, c2 = 1 - BETA1**t, 1 - BETA2**t
        m = jax.tree.map(lambda m, g: BETA1 * m + (1 - BETA1) * g, m, gradients)
        v = jax.tree.map(lambda v, g: BETA2 * v + (1 - BETA2) * g * g, v, gradients)
        P = jax.tree.map(lambda p, m, v: p - LEARNING_RATE * (m / c1) / (jnp.sqrt(v / c2) + EPSILON), P, m, v)
        return (P, m, v, t), cost

    return step


def _initial_state(case: Case) -> Any:
    import jax
    from jax import numpy as jnp

    P = [(jnp.array(W), jnp.array(b)) for W, b in zip(*case.initial(), strict=True)]
    state = P, jax.tree.map(jnp.zeros_like, P), jax.tree.map(jnp.zeros_like, P), jnp.zeros(())
    return jax.block_until_ready(state)


def _parameters(state: Any) -> Parameters:
    W, b = zip(*state[0], strict=True)
    return [np.array(w) for w in W], [np.array(x) for x in b]


class _Steps(Work):
    def __init__(self, case: Case) -> None:
        import jax
        from jax import numpy as jnp

        X, y = case.batches()
        self.case = case
        self.batches = [(jnp.asarray(x), jnp.asarray(t, jnp.int32)) for x, t in zip(X, y, strict=True)]
        self.step = jax.jit(_step(case.activation), donate_argnums=0)

    def reset(self) -> None:
        """The initial weights, and Adam's moments and step 0."""
        self.state = _initial_state(self.case)

    def run(self, n: int) -> None:
        """n steps, round and round the mini-batches."""
        import jax

        for i in range(n):
            self.state, _ = self.step(self.state, self.batches[i % len(self.batches)])
        jax.block_until_ready(self.state)

    def result(self) -> Parameters:
        """W and b."""
        return _parameters(self.state)


class _Scan(_Steps):
    def __init__(self, case: Case) -> None:
        super().__init__(case)
        import jax
        from jax import numpy as jnp

        X, y = case.batches()
        self.stacked = jnp.asarray(X), jnp.asarray(y, jnp.int32)
        step = _step(case.activation)
        self.step = jax.jit(lambda state, batches: jax.lax.scan(step, state, batches), donate_argnums=0)

    def run(self, n: int) -> None:
        """n steps, whole passes only."""
        import jax

        for _ in range(n // len(self.batches)):
            self.state, _ = self.step(self.state, self.stacked)
        jax.block_until_ready(self.state)


class _Prediction(Work):
    def __init__(self, case: Case, rows: int) -> None:
        import jax
        from jax import numpy as jnp

        forward = _forward(case.activation)
        self.P = _initial_state(case)[0]
        X = case.data()[0]
        self.pieces = [jnp.asarray(X[i : i + rows]) for i in range(0, len(X), rows)]
        self.labels_of = jax.jit(lambda P, x: forward(P, x).argmax(1))

    def run(self, n: int) -> None:
        """n times the labels of all rows."""
        for _ in range(n):
            labels = [self.labels_of(self.P, x) for x in self.pieces]
            self.labels = np.concatenate([np.asarray(x) for x in labels])

    def result(self) -> Any:
        """The labels."""
        return self.labels


class _Operation(Work):
    def __init__(self, name: str, case: Case) -> None:
        import jax
        from jax import numpy as jnp

        x = {key: jnp.asarray(value) for key, value in vars(layer(case)).items()}
        self.call = partial(jax.jit(partial(_OPERATIONS[name], _sigma(case.activation))), x)

    def run(self, n: int) -> None:
        """n times."""
        import jax

        for _ in range(n):
            self.written = self.call()
        jax.block_until_ready(self.written)

    def result(self) -> list[Any]:
        """What it gave."""
        return [np.asarray(x) for x in self.written]


def _dense_forward(sigma: Callable[[Any], Any], x: Any) -> list[Any]:
    return [sigma(x["a_prev"] @ x["W"] + x["b"])]


def _output_delta(sigma: Callable[[Any], Any], x: Any) -> list[Any]:
    import jax
    from jax import numpy as jnp

    def cost(z: Any) -> Any:
        return -jnp.take_along_axis(jax.nn.log_softmax(z), x["labels"][:, None], 1).mean()

    return [jax.grad(cost)(x["z"])]


def _dense_backward(sigma: Callable[[Any], Any], x: Any) -> list[Any]:
    """σ′ out of `kept` by differentiation: relu's is the same from a as from z."""
    import jax

    _, pull = jax.vjp(sigma, x["kept"])
    return list(pull(x["delta"] @ x["W"].T))


def _dense_gradients(sigma: Callable[[Any], Any], x: Any) -> list[Any]:
    return [x["a_prev"].T @ x["delta"], x["delta"].sum(0)]


_OPERATIONS = {
    "dense_forward": _dense_forward,
    "output_delta": _output_delta,
    "dense_backward": _dense_backward,
    "dense_gradients": _dense_gradients,
}
