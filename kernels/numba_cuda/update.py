"""parameters ← optimizer(parameters, gradients, state), over the flat vectors in one pass.

The gradient may still be in parts (see `dense_gradients.py`): g = (Σ_p parts[p] + alpha W) · scale is put together
here, in a fixed order, and never written to memory.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from backprop_gpu.kernels.numba_cuda.device import (
    Function,
    block_size,
    ceil_div,
    cuda,
    device,
    kernel,
    most_blocks,
    sqrt,
)
from backprop_gpu.kernels.numba_cuda.reductions import sum_of_parts
from backprop_gpu.optimizers import SGD, Adam, AdamW, Optimizer, RMSprop

__all__ = ["N_NUMBERS", "numbers", "shape", "update"]

THREADS = block_size(256)

N_NUMBERS = 9
"""Numbers of a step: alpha, and the rule's eight at most."""


# Device functions: (w, g, first slot, second slot, whether a weight, the step's numbers) → w and the slots anew


@device
def sgd(w: Any, g: Any, velocity: Any, unused: Any, weight: Any, s: Any) -> Any:
    """v ← momentum · v − ηg, then w ← w + v, or with Nesterov's momentum w ← w + momentum · v − ηg."""
    momentum, rate, nesterov = s[0], s[1], s[2]
    velocity = momentum * velocity - rate * g
    return w + (momentum * velocity - rate * g if nesterov != type(w)(0) else velocity), velocity, unused


@device
def adam(w: Any, g: Any, m: Any, v: Any, weight: Any, s: Any) -> Any:
    """m ← β₁m + (1 − β₁)g, v ← β₂v + (1 − β₂)g², w ← w(1 − η · decay) − η m̂ / (√v̂ + ε)."""
    beta_m, gain_m, beta_v, gain_v, rate, correction, epsilon, keep = s
    m = beta_m * m + gain_m * g
    v = beta_v * v + gain_v * g * g
    w = keep * w if weight else w
    return w - rate * (m / (sqrt(v * correction) + epsilon)), m, v


@device
def rmsprop(w: Any, g: Any, v: Any, unused: Any, weight: Any, s: Any) -> Any:
    """v ← decay · v + (1 − decay)g², w ← w − ηg / (√v + ε)."""
    decay, gain, rate, epsilon = s[0], s[1], s[2], s[3]
    v = decay * v + gain * g * g
    return w - rate * (g / (sqrt(v) + epsilon)), v, unused


RULES: dict[type[Optimizer], Function] = {SGD: sgd, Adam: adam, AdamW: adam, RMSprop: rmsprop}
"""Adam is AdamW without decay."""


def numbers(optimizer: Optimizer, learning_rate: float, alpha: float, step: int) -> list[float]:
    """The numbers of update `step`, from 1, in the order in which the kernel and the rules above read them."""
    rule = _numbers_of_step(optimizer, learning_rate, step)
    return [alpha, *rule, *[0.0] * (N_NUMBERS - 1 - len(rule))]


def _numbers_of_step(optimizer: Optimizer, rate: float, step: int) -> list[float]:
    match optimizer:
        case SGD():
            return [optimizer.momentum, rate, float(optimizer.nesterov)]
        case Adam():
            beta_1, beta_2 = optimizer.beta_1, optimizer.beta_2
            decay = optimizer.weight_decay if isinstance(optimizer, AdamW) else 0.0
            correction_1, correction_2 = 1 / (1 - beta_1**step), 1 / (1 - beta_2**step)
            moments = [beta_1, 1 - beta_1, beta_2, 1 - beta_2]
            return [*moments, rate * correction_1, correction_2, optimizer.epsilon_at(step), 1 - rate * decay]
        case RMSprop():
            return [optimizer.decay, 1 - optimizer.decay, rate, optimizer.epsilon]
    raise TypeError(
        f"no update for {type(optimizer).__name__}; there is one for {', '.join(known.__name__ for known in RULES)}"
    )


# The kernel


@cache
def update(real: Any, optimizer: type[Optimizer], clipped: bool) -> Any:
    """The kernel of one rule; blockIdx.y is a stretch: the weights or the biases of one layer.

    With `clipped`, gradients come from `reductions.total_gradients`: alpha W is in them already, and scale counts.

    parameters, slot_1, slot_2 : (n_parameters,), overwritten; slot_2 may be slot_1 where the rule has one
    parts : (most parts, n_parameters), the gradients in parts
    stretches : (gridDim.y, 4) int64 of first, stop, n_parts and whether they are weights, which alpha and decay touch
    scale : (1,) float64, what clipping multiplies the gradient by
    numbers : (> step, N_NUMBERS) float64; step : row of it
    """
    rule, two_slots, sum_parts_at = RULES[optimizer], len(optimizer.slots) == 2, sum_of_parts(real)

    @kernel
    def update(
        parameters: Any, slot_1: Any, slot_2: Any, parts: Any, stretches: Any, scale: Any, numbers: Any, step: Any
    ) -> None:
        stretch = cuda.blockIdx.y
        first, stop, n_parts = stretches[stretch, 0], stretches[stretch, 1], stretches[stretch, 2]
        weights = stretches[stretch, 3] != 0
        alpha = real(numbers[step, 0]) if weights and not clipped else real(0)
        factor = real(scale[0]) if clipped else real(1)
        s = (
            real(numbers[step, 1]),
            real(numbers[step, 2]),
            real(numbers[step, 3]),
            real(numbers[step, 4]),
            real(numbers[step, 5]),
            real(numbers[step, 6]),
            real(numbers[step, 7]),
            real(numbers[step, 8]),
        )
        for i in range(first + cuda.grid(1), stop, cuda.gridsize(1)):
            g = sum_parts_at(parts, i, n_parts, not weights)
            if alpha != real(0):
                g += alpha * parameters[i]
            w, one, two = rule(parameters[i], g * factor, slot_1[i], slot_2[i], weights, s)
            parameters[i], slot_1[i] = w, one
            if two_slots:
                slot_2[i] = two

    return update


# The launch


def shape(longest: int, n_stretches: int, n_multiprocessors: int) -> tuple[tuple[int, int], int]:
    """(grid, block) for stretches of `longest` parameters at most: at most 8 blocks for each multiprocessor."""
    return (max(1, min(ceil_div(longest, THREADS), most_blocks(8 * n_multiprocessors))), n_stretches), THREADS
