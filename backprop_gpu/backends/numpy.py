"""The NumPy backend: the specification of every operation, written to be read beside its formula.

Numerical rules that every backend follows:
- the formulas hold at |z| = 10⁴ in float32 and at ±∞, without an overflow and without a NaN made from finite input;
- NaN in, NaN out: no comparison silently turns a NaN into a number (so relu is `maximum`, and its derivative `sign`);
- sums over the rows of a mini-batch (C, db), and norms, are taken in float64;
- numbers that underflow to 0 do so in silence, whatever `numpy.seterr` says: exp(−|z|) is meant to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from backprop_gpu.activations import ACTIVATIONS, LEAKY_SLOPE, SELU_ALPHA, SELU_SCALE, Activation
from backprop_gpu.backends.contract import Array, Backend, Dropout
from backprop_gpu.losses import Huber, Loss
from backprop_gpu.optimizers import SGD, Adam, AdamW, Optimizer, RMSprop

__all__ = ["BACKEND", "NumpyBackend", "dropout_mask", "philox", "probe"]


def probe() -> str | None:
    """Why this backend does not work here: never."""
    return None


_underflow_is_meant = np.errstate(under="ignore")


class NumpyBackend(Backend):
    """The readable reference; runs wherever NumPy does."""

    name: ClassVar[str] = "numpy"
    dtypes: tuple[str, ...] = ("float32", "float64")

    def asarray(self, x: Any, dtype: str | None = None) -> Array:
        """`x` as a C-contiguous NumPy array."""
        return np.ascontiguousarray(x, dtype)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """A new array."""
        return np.empty(shape, dtype)

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """A new array of zeros."""
        return np.zeros(shape, dtype)

    def to_numpy(self, x: Array) -> Array:
        """`x` itself."""
        return x

    def sum_squares(self, x: Array) -> float:
        """Σ x², in float64; not by BLAS, whose threads took 6 ms for 17,000 numbers where this takes 15 µs."""
        x = x.reshape(-1)
        with np.errstate(over="ignore"):
            return float(np.einsum("i,i->", x, x, dtype=np.float64))

    @_underflow_is_meant
    def _dense_forward(
        self,
        a_prev: Array,
        W: Array,
        b: Array,
        activation: Activation,
        dropout: Dropout | None,
        a: Array,
        z: Array | None,
    ) -> None:
        z = np.matmul(a_prev, W, out=a if z is None else z)
        z += b
        a[...] = FORWARD[activation.name](z)
        if dropout is not None:
            a[...] = _drop(a, dropout)

    @_underflow_is_meant
    def _output_forward(self, z: Array, output_activation: str, a: Array) -> None:
        a[...] = OUTPUT_FORWARD[output_activation](z)

    @_underflow_is_meant
    def _output_delta(
        self,
        z: Array,
        target: Array,
        loss: Loss,
        output_activation: str,
        sample_weight: Array | None,
        delta: Array,
    ) -> float:
        w = np.ones(len(z)) if sample_weight is None else sample_weight.astype(np.float64)
        total = w.sum()
        share = w / total if total else w  # each row's part in the mean: 1/N enters here
        cost, dc_dz = COSTS[loss.name](loss, z, target, output_activation)
        present = share != 0  # a row of weight 0 is absent, also where its cost is infinite
        delta[...] = np.where(present[:, None], dc_dz, 0) * share.astype(z.dtype)[:, None]
        return float(np.dot(share[present], cost[present].astype(np.float64)))

    @_underflow_is_meant
    def _dense_backward(
        self,
        delta_next: Array,
        W_next: Array,
        kept: Array,
        activation: Activation,
        dropout: Dropout | None,
        delta: Array,
    ) -> None:
        dA = np.matmul(delta_next, W_next.T, out=delta)
        if dropout is not None:
            dA[...] = _drop(dA, dropout)
            if activation.derivative_from == "a":
                kept = kept * _dtype_of(kept)(1 - dropout.rate)  # a as it was before dropout
        delta *= DERIVATIVE[activation.name](kept)

    def _dense_gradients(
        self,
        a_prev: Array,
        delta: Array,
        W: Array | None,
        alpha: float,
        accumulate: bool,
        dW: Array,
        db: Array,
    ) -> None:
        new_dW = np.matmul(a_prev.T, delta, out=None if accumulate else dW)
        new_db = delta.sum(axis=0, dtype=np.float64, out=None if accumulate else db)
        if accumulate:
            dW += new_dW
            db += new_db.astype(db.dtype)
        if W is not None and alpha:
            dW += alpha * W

    def _update(
        self,
        parameters: Array,
        gradients: Array,
        state: Mapping[str, Array],
        optimizer: Optimizer,
        learning_rate: float,
        step: int,
        n_weights: int,
    ) -> None:
        if optimizer.clip_norm is not None:
            norm = math.sqrt(self.sum_squares(gradients))
            if not norm <= optimizer.clip_norm:  # a norm that is not finite makes every gradient NaN, and shows
                gradients *= optimizer.clip_norm / norm if math.isfinite(norm) else math.nan
        with np.errstate(over="ignore", under="ignore"):  # of g²: an infinite second moment makes an update of 0
            UPDATES[type(optimizer)](parameters, gradients, state, optimizer, learning_rate, step, n_weights)


# Activations: a = σ(z)


def sigmoid(z: Array) -> Array:
    """1 / (1 + exp(−z)), from exp(−|z|), which cannot overflow."""
    e = np.exp(-np.abs(z))
    return np.where(z < 0, e, 1) / (1 + e)


def softplus(z: Array) -> Array:
    """log(1 + exp(z)) = max(z, 0) + log(1 + exp(−|z|)), which cannot overflow."""
    return np.maximum(z, 0) + np.log1p(np.exp(-np.abs(z)))


def normal_cdf(z: Array) -> Array:
    """Φ(z) = ½ erfc(−z / √2), by the C library's erfc, one element at a time: NumPy has none."""
    return 0.5 * _erfc(z.astype(np.float64) * -math.sqrt(0.5)).astype(z.dtype)


_erfc: Callable[[Array], Array] = np.frompyfunc(math.erfc, 1, 1)


def normal_pdf(z: Array) -> Array:
    """φ(z) = exp(−z² / 2) / √(2π)."""
    return np.exp(-0.5 * z * z) * (1 / math.sqrt(2 * math.pi))


def gated(z: Array) -> Array:
    """`z` for the activations z · gate(z), where an infinite z would make ∞ · 0.

    Every gate is exactly 0 or 1 beyond ±1000, in float32 and in float64, so the formulas hold there unchanged;
    `clip` lets NaN through.
    """
    return np.clip(z, -1000, 1000)


def gelu_tanh_inner(z: Array) -> Array:
    """2u with u = √(2/π)(z + 0.044715 z³): ½(1 + tanh u) = sigmoid(2u), which keeps its digits on the left."""
    return 2 * math.sqrt(2 / math.pi) * (z + 0.044715 * z * z * z)


def sine(z: Array) -> Array:
    """sin(z); NaN at ±∞, where there is no limit."""
    with np.errstate(invalid="ignore"):
        return np.sin(z)


def cosine(z: Array) -> Array:
    """cos(z); NaN at ±∞."""
    with np.errstate(invalid="ignore"):
        return np.cos(z)


def elu(z: Array) -> Array:
    """z where z > 0, else exp(z) − 1."""
    return np.where(z > 0, z, np.expm1(np.minimum(z, 0)))


def _gate(gate: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """z · gate(z), with z itself where it is large: gate(z) = 1 there."""
    return lambda z: np.where(z > 1000, z, gated(z) * gate(gated(z)))


FORWARD: dict[str, Callable[[Array], Array]] = {
    "identity": lambda z: z,
    "relu": lambda z: np.maximum(z, 0),
    "leaky_relu": lambda z: np.maximum(z, LEAKY_SLOPE * z),
    "elu": elu,
    "selu": lambda z: SELU_SCALE * np.where(z > 0, z, SELU_ALPHA * np.expm1(np.minimum(z, 0))),
    "sigmoid": sigmoid,
    "tanh": np.tanh,
    "softplus": softplus,
    "silu": _gate(sigmoid),
    "gelu": _gate(normal_cdf),
    "gelu_tanh": _gate(lambda z: sigmoid(gelu_tanh_inner(z))),
    "mish": _gate(lambda z: np.tanh(softplus(z))),
    "sine": sine,
}


# Activations: σ′, from a or from z as `activations.ACTIVATIONS` says


def leaky_relu_derivative(a: Array) -> Array:
    """1 where a > 0, the slope where a ≤ 0, NaN where a is NaN."""
    return np.where(a <= 0, _dtype_of(a)(LEAKY_SLOPE), np.sign(a))


def identity_derivative(a: Array) -> Array:
    """1, but NaN where a is NaN."""
    return np.where(np.isnan(a), a, _dtype_of(a)(1))


def silu_derivative(z: Array) -> Array:
    """s + z s(1 − s), s = sigmoid(z), and 1 − s = sigmoid(−z)."""
    z = gated(z)
    s = sigmoid(z)
    return s + z * s * sigmoid(-z)


def gelu_derivative(z: Array) -> Array:
    """Φ(z) + z φ(z)."""
    z = gated(z)
    return normal_cdf(z) + z * normal_pdf(z)


def gelu_tanh_derivative(z: Array) -> Array:
    """s + z s(1 − s) 2u′, s = sigmoid(2u), 2u′ = 2√(2/π)(1 + 3 · 0.044715 z²)."""
    z = gated(z)
    s, one_minus_s = sigmoid(gelu_tanh_inner(z)), sigmoid(-gelu_tanh_inner(z))
    return s + z * s * one_minus_s * (2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * z * z))


def mish_derivative(z: Array) -> Array:
    """t + z(1 − t²) sigmoid(z), t = tanh(softplus(z))."""
    z = gated(z)
    t = np.tanh(softplus(z))
    return t + z * (1 - t) * (1 + t) * sigmoid(z)


DERIVATIVE: dict[str, Callable[[Array], Array]] = {
    "identity": identity_derivative,
    "relu": np.sign,  # a ≥ 0, so this is 1 where a > 0 and 0 where a = 0
    "leaky_relu": leaky_relu_derivative,
    "elu": lambda a: np.where(a > 0, _dtype_of(a)(1), a + 1),
    "selu": lambda a: np.where(a > 0, _dtype_of(a)(SELU_SCALE), a + SELU_SCALE * SELU_ALPHA),
    "sigmoid": lambda a: a * (1 - a),
    "tanh": lambda a: (1 - a) * (1 + a),
    "softplus": sigmoid,
    "silu": silu_derivative,
    "gelu": gelu_derivative,
    "gelu_tanh": gelu_tanh_derivative,
    "mish": mish_derivative,
    "sine": cosine,
}


# Output layer: σ alone, then c and ∂c/∂z of every row


def finite(z: Array) -> Array:
    """±∞ as the largest numbers whose differences are still finite: an infinite logit is one that always wins."""
    largest = np.finfo(z.dtype).max / 4
    return np.clip(z, -largest, largest)


def softmax(z: Array) -> Array:
    """exp(zₖ) / Σⱼ exp(zⱼ) over each row."""
    return softmax_and_log(z)[0]


def softmax_and_log(z: Array) -> tuple[Array, Array]:
    """softmax(z) and log softmax(z), both from z less its largest entry in the row, whose exp cannot overflow.

    An entry of +∞ takes all the probability, several share it; one of −∞ gets none, and a large finite cost.
    """
    largest = z.max(axis=1, keepdims=True)
    with np.errstate(over="ignore", invalid="ignore"):
        z = np.maximum(np.where(z == largest, 0, z - largest), np.finfo(z.dtype).min / 4)
    e = np.exp(z)
    total = e.sum(axis=1, keepdims=True)
    return e / total, z - np.log(total)


def exp(z: Array) -> Array:
    """exp(z); ∞ where that is too large for the dtype."""
    with np.errstate(over="ignore"):
        return np.exp(z)


OUTPUT_FORWARD: dict[str, Callable[[Array], Array]] = {**FORWARD, "softmax": softmax, "exp": exp}

Cost = tuple[Array, Array]


def cross_entropy(loss: Any, z: Array, target: Array, output_activation: str) -> Cost:
    """c = −Σₖ tₖ log softmax(z)ₖ, ∂c/∂z = softmax(z) − t, with t smoothed by ε: (1 − ε)t + ε/K."""
    t = one_hot(target, z) if target.ndim == 1 else target
    t = (1 - loss.label_smoothing) * t + loss.label_smoothing / z.shape[1]
    p, log_p = softmax_and_log(z)
    with np.errstate(over="ignore"):
        return -(t * log_p).sum(axis=1), p - t


def one_hot(labels: Array, z: Array) -> Array:
    """1 at each row's label and 0 elsewhere, of the shape and dtype of z."""
    t = np.zeros_like(z)
    t[np.arange(len(labels)), labels] = 1
    return t


def binary_cross_entropy(loss: Any, z: Array, y: Array, output_activation: str) -> Cost:
    """c = Σₖ log(1 + exp(zₖ)) − yₖzₖ, ∂c/∂z = sigmoid(z) − y.

    In the order max(z, 0) − yz + log(1 + exp(−|z|)), a confident right answer keeps its small cost.
    """
    bounded = finite(z)
    with np.errstate(over="ignore"):
        cost = np.maximum(bounded, 0) - y * bounded + np.log1p(np.exp(-np.abs(bounded)))
        return cost.sum(axis=1), sigmoid(z) - y


def poisson(loss: Any, z: Array, y: Array, output_activation: str) -> Cost:
    """c = Σₖ exp(zₖ) − yₖzₖ + yₖ log yₖ − yₖ, ∂c/∂z = exp(z) − y.

    With d = z − log y, a term is y(exp(d) − 1 − d): near a = y, that has no large numbers to cancel.
    """
    a = exp(z)
    d = finite(z) - np.log(np.where(y == 0, 1, y))
    with np.errstate(over="ignore", invalid="ignore"):
        return np.where(y == 0, a, y * (np.expm1(d) - d)).sum(axis=1), a - y


def _elementwise(
    cost_of_error: Callable[[Any, Array], Array], derivative: Callable[[Any, Array], Array]
) -> Callable[[Any, Array, Array, str], Cost]:
    """A loss of the error e = a − y under any elementwise σ: ∂c/∂z = ∂c/∂a ⊙ σ′(z)."""

    def cost(loss: Any, z: Array, y: Array, output_activation: str) -> Cost:
        a = FORWARD[output_activation](z)
        e = a - y
        kept = a if ACTIVATIONS[output_activation].derivative_from == "a" else z
        with np.errstate(over="ignore", invalid="ignore"):
            return cost_of_error(loss, e).sum(axis=1), derivative(loss, e) * DERIVATIVE[output_activation](kept)

    return cost


def huber(loss: Huber, e: Array) -> Array:
    """½ m² + t(|e| − m) with m = min(|e|, t)."""
    m = np.minimum(np.abs(e), loss.threshold)
    return 0.5 * m * m + loss.threshold * (np.abs(e) - m)


COSTS: dict[str, Callable[[Any, Array, Array, str], Cost]] = {
    "cross_entropy": cross_entropy,
    "binary_cross_entropy": binary_cross_entropy,
    "squared_error": _elementwise(lambda loss, e: 0.5 * e * e, lambda loss, e: e),
    "absolute_error": _elementwise(lambda loss, e: np.abs(e), lambda loss, e: np.sign(e)),
    "huber": _elementwise(huber, lambda loss, e: np.clip(e, -loss.threshold, loss.threshold)),
    "poisson": poisson,
}


# Optimizers


def sgd(w: Array, g: Array, state: Mapping[str, Array], o: SGD, rate: float, step: int, n_weights: int) -> None:
    """v ← momentum · v − ηg, then w ← w + v, or with Nesterov's momentum w ← w + momentum · v − ηg."""
    v = state["velocity"]
    v *= o.momentum
    v -= rate * g
    w += o.momentum * v - rate * g if o.nesterov else v


def adam(w: Array, g: Array, state: Mapping[str, Array], o: Adam, rate: float, step: int, n_weights: int) -> None:
    """m ← β₁m + (1 − β₁)g, v ← β₂v + (1 − β₂)g², w ← w − η m̂ / (√v̂ + ε), with ε of this step."""
    m, v = state["m"], state["v"]
    m *= o.beta_1
    m += (1 - o.beta_1) * g
    v *= o.beta_2
    v += (1 - o.beta_2) * g * g
    m_hat = m * (1 / (1 - o.beta_1**step))
    v_hat = v * (1 / (1 - o.beta_2**step))
    w -= rate * m_hat / (np.sqrt(v_hat) + o.epsilon_at(step))


def adamw(w: Array, g: Array, state: Mapping[str, Array], o: AdamW, rate: float, step: int, n_weights: int) -> None:
    """W ← W(1 − η · weight_decay), then Adam."""
    w[:n_weights] *= 1 - rate * o.weight_decay
    adam(w, g, state, o, rate, step, n_weights)


def rmsprop(w: Array, g: Array, state: Mapping[str, Array], o: RMSprop, rate: float, step: int, n_weights: int) -> None:
    """v ← decay · v + (1 − decay)g², w ← w − ηg / (√v + ε)."""
    v = state["v"]
    v *= o.decay
    v += (1 - o.decay) * g * g
    w -= rate * g / (np.sqrt(v) + o.epsilon)


UPDATES: dict[type[Optimizer], Callable[..., None]] = {SGD: sgd, Adam: adam, AdamW: adamw, RMSprop: rmsprop}


# Dropout


def philox(counter: tuple[Any, Any, Any, Any], key: int) -> Array:
    """Philox4x32-10 (Salmon et al., 2011): four 32-bit words for each counter, a function of counter and key alone.

    counter : four words, broadcast together; key : in [0, 2⁶⁴). Returns uint32 of the broadcast shape + (4,).
    """
    c0, c1, c2, c3 = (np.asarray(c, np.uint64) for c in np.broadcast_arrays(*counter))
    k0, k1 = key & _LOW, key >> 32
    for _ in range(10):
        p0, p1 = c0 * _PHILOX_M0, c2 * _PHILOX_M1
        c0, c1, c2, c3 = (
            (p1 >> _32) ^ c1 ^ np.uint64(k0),
            p1 & _MASK,
            (p0 >> _32) ^ c3 ^ np.uint64(k1),
            p0 & _MASK,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


_LOW = 0xFFFFFFFF
_MASK, _32 = np.uint64(_LOW), np.uint64(32)
_PHILOX_M0, _PHILOX_M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)


def dropout_mask(shape: tuple[int, int], dropout: Dropout) -> Array:
    """Which entries of an (N, n_out) activation are kept, by the rule in `Dropout`."""
    n_rows, n_columns = shape
    blocks = np.arange(-(-n_columns // 4))[None, :]
    words = philox((blocks, np.arange(n_rows)[:, None], dropout.layer, dropout.step & _LOW), dropout.seed)
    return words.reshape(n_rows, -1)[:, :n_columns] >= np.uint32(int(dropout.rate * 2**32))


def _drop(x: Array, dropout: Dropout) -> Array:
    return np.where(dropout_mask(x.shape, dropout), x * _dtype_of(x)(1 / (1 - dropout.rate)), 0)


def _dtype_of(x: Array) -> Any:
    """The scalar type of `x`, so that a constant does not widen float32 to float64."""
    return x.dtype.type


BACKEND = NumpyBackend
