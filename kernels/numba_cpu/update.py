"""parameters ← optimizer(parameters, gradients, state), over a contiguous run of the flat vectors.

A run is all weights or all biases, so what touches weights alone is decided once. Slices of it begin at 0: an index
that numba cannot prove to be at least 0 takes a branch, and such a loop is not vectorised (1.6 instead of 0.1 ns per
parameter, Adam in float32 on a Zen 5).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from backprop_gpu.kernels.numba_cpu.compile import compiled
from backprop_gpu.kernels.numba_cpu.elementary import called, constant, inlined
from backprop_gpu.kernels.numba_cpu.output_delta import summing
from backprop_gpu.optimizers import SGD, Adam, AdamW, Optimizer, RMSprop

__all__ = ["CODES", "SUM", "add", "add_two", "settings", "sum_squares", "sum_squares_of_run", "update"]

CODES: dict[type[Optimizer], int] = {SGD: 0, Adam: 1, AdamW: 1, RMSprop: 2}
"""The code of every optimizer; Adam is AdamW without decay."""

_SGD, _ADAM, _RMSPROP = CODES[SGD], CODES[Adam], CODES[RMSprop]

SUM = 3
"""The code of none of them: the gradient is added to the first slot, and the parameters stay."""


def settings(optimizer: Optimizer) -> npt.NDArray[np.float64]:
    """What `update` reads of the optimizer, in the order in which the rules below take it."""
    return np.array(_settings(optimizer), np.float64)


def _settings(optimizer: Optimizer) -> list[float]:
    match optimizer:
        case SGD():
            return [optimizer.momentum, optimizer.nesterov]
        case Adam():
            decay = optimizer.weight_decay if isinstance(optimizer, AdamW) else 0
            return [optimizer.beta_1, optimizer.beta_2, optimizer.epsilon, decay, optimizer.epsilon_hat]
        case RMSprop():
            return [optimizer.decay, optimizer.epsilon]
    raise TypeError(
        f"no compiled update for {type(optimizer).__name__}; "
        f"there is one for {', '.join(known.__name__ for known in CODES)}"
    )


@compiled
def update(
    optimizer: Any,
    settings: Any,
    parameters: Any,
    gradients: Any,
    slot_1: Any,
    slot_2: Any,
    start: Any,
    stop: Any,
    learning_rate: Any,
    alpha: Any,
    scale: Any,
    step: Any,
    biases: Any,
) -> None:
    """One step, with g = (gradients + alpha · parameters) · scale, on the entries start … stop − 1 of every vector.

    Parameters
    ----------
    optimizer, settings : its code, and what `settings` makes of it
    parameters, slot_1, slot_2 : overwritten; an optimizer with fewer slots leaves the others alone
    alpha : the L2 penalty's, 0 for biases
    scale : what clipping multiplies the gradient by; 1 for none
    step : number of this update, from 1
    biases : whether these are biases, which weight decay leaves alone
    """
    w, g, first, second = parameters[start:stop], gradients[start:stop], slot_1[start:stop], slot_2[start:stop]
    alpha, scale = w.dtype.type(alpha), w.dtype.type(scale)
    if optimizer == _SGD:
        sgd(w, g, first, alpha, scale, settings, learning_rate)
    elif optimizer == _ADAM:
        adam(w, g, first, second, alpha, scale, settings, learning_rate, step, biases)
    elif optimizer == _RMSPROP:
        rmsprop(w, g, first, alpha, scale, settings, learning_rate)
    else:
        add_gradient(w, g, first, alpha, scale)


# The rules


@called
def sgd(w: Any, g: Any, velocity: Any, alpha: Any, scale: Any, settings: Any, learning_rate: Any) -> None:
    """v ← momentum · v − ηg, then w ← w + v, or with Nesterov's momentum w ← w + momentum · v − ηg."""
    momentum, rate, nesterov = w.dtype.type(settings[0]), w.dtype.type(learning_rate), settings[1] != 0
    for i in range(w.size):
        change = rate * total_gradient(g[i], w[i], alpha, scale)
        v = flushed(momentum * velocity[i] - change, smallest_normal(change))
        velocity[i] = v
        w[i] += momentum * v - change if nesterov else v


@called
def adam(
    w: Any,
    g: Any,
    m: Any,
    v: Any,
    alpha: Any,
    scale: Any,
    settings: Any,
    learning_rate: Any,
    step: Any,
    biases: Any,
) -> None:
    """m ← β₁m + (1 − β₁)g, v ← β₂v + (1 − β₂)g², w ← w(1 − η · decay) − η m̂ / (√v̂ + ε).

    The bias correction of m joins the constant η, so an element takes one root and one division. ε is `Adam.epsilon_at`
    this step.
    """
    beta_1, beta_2, epsilon, decay, epsilon_hat = settings[0], settings[1], settings[2], settings[3], settings[4] != 0
    real = w.dtype.type
    beta_m, gain_m, beta_v, gain_v = real(beta_1), real(1 - beta_1), real(beta_2), real(1 - beta_2)
    rate, correction = learning_rate / (1 - math.pow(beta_1, step)), 1 / (1 - math.pow(beta_2, step))
    if epsilon_hat:
        epsilon *= math.sqrt(correction)
    floor = negligible(real(0), 1 - beta_2, epsilon)
    keep = real(1 if biases else 1 - learning_rate * decay)
    rate, correction, epsilon = real(rate), real(correction), real(epsilon)
    for i in range(w.size):
        x = total_gradient(g[i], w[i], alpha, scale)
        m_i = flushed(beta_m * m[i] + gain_m * x, smallest_normal(x))
        v_i = mean_square(v[i], x, beta_v, gain_v, floor)
        m[i], v[i] = m_i, v_i
        w[i] = keep * w[i] - rate * (m_i / (math.sqrt(v_i * correction) + epsilon))


@called
def rmsprop(w: Any, g: Any, v: Any, alpha: Any, scale: Any, settings: Any, learning_rate: Any) -> None:
    """v ← decay · v + (1 − decay)g², w ← w − ηg / (√v + ε)."""
    real = w.dtype.type
    decay, gain, epsilon, rate = real(settings[0]), real(1 - settings[0]), real(settings[1]), real(learning_rate)
    floor = negligible(real(0), 1 - settings[0], settings[1])
    for i in range(w.size):
        x = total_gradient(g[i], w[i], alpha, scale)
        v_i = mean_square(v[i], x, decay, gain, floor)
        v[i] = v_i
        w[i] -= rate * (x / (math.sqrt(v_i) + epsilon))


@called
def add_gradient(w: Any, g: Any, total: Any, alpha: Any, scale: Any) -> None:
    """total ← total + g."""
    for i in range(w.size):
        total[i] += total_gradient(g[i], w[i], alpha, scale)


# What they share

smallest_normal = constant(2.0**-126, 2.0**-1022)
rounding_error = constant(2.0**-24, 2.0**-53)


@inlined
def total_gradient(g: Any, w: Any, alpha: Any, scale: Any) -> Any:
    """(g + alpha · w) · scale; alpha = 0 leaves an infinite w out."""
    return (g + alpha * w if alpha != 0 else g) * scale


@inlined
def flushed(x: Any, floor: Any) -> Any:
    """0 where |x| < floor, else x; NaN stays.

    A moment that decays ends among the denormal numbers, and stays there: 0.9 of the smallest rounds to itself. They
    cost a Zen 5 three to five times the time of an update; this costs nothing that could be measured.
    """
    return type(x)(0) if abs(x) < floor else x


@inlined
def mean_square(v: Any, x: Any, decay: Any, gain: Any, floor: Any) -> Any:
    """decay · v + gain · x², with |x| < floor taken for 0, and so v < gain · floor²."""
    x = flushed(x, floor)
    return flushed(decay * v + gain * x * x, gain * floor * floor)


@inlined
def negligible(like: Any, gain: Any, epsilon: Any) -> Any:
    """A number whose square, times the gain, is normal, but which is lost when added to ε; 0 where ε is too small.

    v̂ is at most v / gain, so for gradients below this number, √v̂ + ε is rounded to ε.
    """
    smallest = math.sqrt(smallest_normal(like) / gain) * (1 + 2.0**-20)
    return type(like)(smallest if smallest <= rounding_error(like) * epsilon else 0)


# Over all gradients


@summing
def sum_squares(gradients: Any, parameters: Any, alpha: Any, start: Any, stop: Any) -> Any:
    """Σ (gradients + alpha · parameters)² over the entries start … stop − 1, in float64."""
    g, w = gradients[start:stop], parameters[start:stop]
    alpha, one = g.dtype.type(alpha), g.dtype.type(1)
    total = 0.0
    for i in range(g.size):
        x = np.float64(total_gradient(g[i], w[i], alpha, one))
        total += x * x
    return total


@summing
def sum_squares_of_run(x: Any, start: Any, stop: Any) -> Any:
    """Σ x² over some thousands of entries, in the dtype of x, or where that does not hold it in float64.

    For float32 a third of the time that float64 takes.
    """
    run = x[start:stop]
    total = x.dtype.type(0)
    for i in range(run.size):
        total += run[i] * run[i]
    return np.float64(total) if total < math.inf else sum_squares(x, x, 0.0, start, stop)


@compiled
def add(into: Any, other: Any, start: Any, stop: Any) -> None:
    """into += other, over the entries start … stop − 1."""
    x, y = into[start:stop], other[start:stop]
    for i in range(x.size):
        x[i] += y[i]


@compiled
def add_two(into: Any, x: Any, y: Any, start: Any, stop: Any) -> None:
    """into = x + y, neither of which it is, over the entries start … stop − 1."""
    total, a, b = into[start:stop], x[start:stop], y[start:stop]
    for i in range(total.size):
        total[i] = a[i] + b[i]
