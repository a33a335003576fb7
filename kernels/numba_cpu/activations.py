"""σ and σ′ of every activation over runs of numbers in memory, by the formulas of `backprop_gpu.backends.numpy`.

An activation is one row of FORWARD and one of DERIVATIVE, each a function of one number. Which one a run takes is
decided once, outside its loop, by a code: compiled functions know no strings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from backprop_gpu.activations import ACTIVATIONS, LEAKY_SLOPE, SELU_ALPHA, SELU_SCALE
from backprop_gpu.kernels.numba_cpu.compile import compiled
from backprop_gpu.kernels.numba_cpu.elementary import (
    Function,
    called,
    cos,
    exp,
    expm1,
    inlined,
    largest_angle,
    log1p_unit,
    normal_cdf,
    normal_cdf_and_pdf,
    sigmoid,
    sigmoid_pair,
    sin,
    tanh,
    written_anyway,
)

__all__ = ["CODES", "apply", "multiply_by_derivative"]

CODES = {name: code for code, name in enumerate([*ACTIVATIONS, "exp"])}
"""The code of every activation, and of exp, which only the output layer has."""


# σ(z)


@inlined
def identity(z: Any) -> Any:
    """z."""
    return z


@inlined
def relu(z: Any) -> Any:
    """max(z, 0)."""
    zero = type(z)(0)
    return written_anyway(zero if z < zero else z)


@inlined
def leaky_relu(z: Any) -> Any:
    """max(z, slope · z)."""
    return written_anyway(type(z)(LEAKY_SLOPE) * z if z < type(z)(0) else z)


@inlined
def elu(z: Any) -> Any:
    """z where z > 0, else e^z − 1."""
    u = expm1(z)
    return written_anyway(u if z < type(z)(0) else z)


@inlined
def selu(z: Any) -> Any:
    """λz where z > 0, else λα(e^z − 1)."""
    u = type(z)(SELU_ALPHA) * expm1(z)
    return type(z)(SELU_SCALE) * (z if z > type(z)(0) else u)


@inlined
def softplus(z: Any) -> Any:
    """log(1 + e^z) = max(z, 0) + log(1 + e^−|z|), which cannot overflow."""
    return relu(z) + log1p_unit(exp(-abs(z)))


@inlined
def left_bounded(z: Any) -> Any:
    """max(z, −1000), for z · gate(z) with a gate that is 0 there, where −∞ would make ∞ · 0."""
    bound = type(z)(-1000)
    return bound if z < bound else z


@inlined
def bounded(z: Any) -> Any:
    """`z` within ±1000, for the derivatives of z · gate(z)."""
    bound = type(z)(1000)
    z = left_bounded(z)
    return bound if z > bound else z


@inlined
def silu(z: Any) -> Any:
    """z sigmoid(z)."""
    return left_bounded(z) * sigmoid(z)


@inlined
def gelu(z: Any) -> Any:
    """z Φ(z)."""
    return left_bounded(z) * normal_cdf(z)


SQRT_8_OVER_PI = 2 * math.sqrt(2 / math.pi)


@inlined
def gelu_tanh_inner(z: Any) -> Any:
    """2u with u = √(2/π)(z + 0.044715 z³)."""
    return type(z)(SQRT_8_OVER_PI) * (z + type(z)(0.044715) * z * z * z)


@inlined
def gelu_tanh(z: Any) -> Any:
    """z sigmoid(2u)."""
    z = left_bounded(z)
    return z * sigmoid(gelu_tanh_inner(z))


@inlined
def tanh_softplus(z: Any) -> Any:
    """(numerator, denominator) of t = tanh(softplus(z)) = ((1 + e^z)² − 1) / ((1 + e^z)² + 1), and e = e^−|z|.

    For z > 0, both are divided by e^2z, which could overflow.
    """
    one, two = type(z)(1), type(z)(2)
    e = exp(-abs(z))
    left, right = e * (e + two), one + two * e
    return (left, left + two, e) if z < type(z)(0) else (right, right + two * e * e, e)


@inlined
def mish(z: Any) -> Any:
    """z tanh(softplus(z))."""
    numerator, denominator, _ = tanh_softplus(z)
    return left_bounded(z) * (numerator / denominator)


# σ′ from a


@inlined
def identity_derivative(a: Any) -> Any:
    """1, but NaN where a is NaN."""
    return type(a)(1) if a == a else a


@inlined
def relu_derivative(a: Any) -> Any:
    """1 where a > 0, else a, which is 0 or NaN: relu has no a < 0."""
    return type(a)(1) if a > type(a)(0) else a


@inlined
def leaky_relu_derivative(a: Any) -> Any:
    """1 where a > 0, the slope where a ≤ 0, NaN where a is NaN."""
    left = type(a)(LEAKY_SLOPE) if a <= type(a)(0) else a
    return type(a)(1) if a > type(a)(0) else left


@inlined
def elu_derivative(a: Any) -> Any:
    """1 where a > 0, else e^z = a + 1."""
    return type(a)(1) if a > type(a)(0) else a + type(a)(1)


@inlined
def selu_derivative(a: Any) -> Any:
    """λ where a > 0, else λα e^z = a + λα."""
    return type(a)(SELU_SCALE) if a > type(a)(0) else a + type(a)(SELU_SCALE * SELU_ALPHA)


@inlined
def sigmoid_derivative(a: Any) -> Any:
    """a(1 − a)."""
    return a * (type(a)(1) - a)


@inlined
def tanh_derivative(a: Any) -> Any:
    """(1 − a)(1 + a)."""
    return (type(a)(1) - a) * (type(a)(1) + a)


# σ′ from z


@inlined
def silu_derivative(z: Any) -> Any:
    """s + z s(1 − s), s = sigmoid(z)."""
    z = bounded(z)
    s, one_minus_s = sigmoid_pair(z)
    return s + z * s * one_minus_s


@inlined
def gelu_derivative(z: Any) -> Any:
    """Φ(z) + z φ(z)."""
    z = bounded(z)
    cdf, pdf = normal_cdf_and_pdf(z)
    return cdf + z * pdf


@inlined
def gelu_tanh_derivative(z: Any) -> Any:
    """s + z s(1 − s) 2u′, s = sigmoid(2u), 2u′ = 2√(2/π)(1 + 3 · 0.044715 z²)."""
    z = bounded(z)
    s, one_minus_s = sigmoid_pair(gelu_tanh_inner(z))
    return s + z * s * one_minus_s * (type(z)(SQRT_8_OVER_PI) * (type(z)(1) + type(z)(3 * 0.044715) * z * z))


@inlined
def mish_derivative(z: Any) -> Any:
    """t + z(1 − t²) sigmoid(z), t = tanh(softplus(z)).

    With t's denominator d, (1 − t²) sigmoid(z) = 4e^z(1 + e^z) / d²; for z > 0, both are divided by e^4z.
    """
    z = bounded(z)
    numerator, denominator, e = tanh_softplus(z)
    slope = type(z)(4) * (type(z)(1) + e) * (e if z < type(z)(0) else e * e)
    return (numerator + z * slope / denominator) / denominator


FORWARD: dict[str, Function] = {
    "identity": identity,
    "relu": relu,
    "leaky_relu": leaky_relu,
    "elu": elu,
    "selu": selu,
    "sigmoid": sigmoid,
    "tanh": tanh,
    "softplus": softplus,
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "mish": mish,
    "sine": sin,
    "exp": exp,
}
"""σ by name."""

DERIVATIVE: dict[str, Function] = {
    "identity": identity_derivative,
    "relu": relu_derivative,
    "leaky_relu": leaky_relu_derivative,
    "elu": elu_derivative,
    "selu": selu_derivative,
    "sigmoid": sigmoid_derivative,
    "tanh": tanh_derivative,
    "softplus": sigmoid,
    "silu": silu_derivative,
    "gelu": gelu_derivative,
    "gelu_tanh": gelu_tanh_derivative,
    "mish": mish_derivative,
    "sine": cos,
}
"""σ′ by name, of what `derivative_from` says."""


# Loops over runs of numbers in memory. Their indices are unsigned, to be spared Numba's indexing from an array's end,
# which would not vectorise.


def forward_run(f: Function) -> Function:
    """a[a_start + i] = f(a[a_start + i]) for i < count, where `copy` has put z."""

    @called
    def run(_z: Any, _z_start: Any, a: Any, a_start: Any, count: Any) -> None:
        a_start = np.uintp(a_start)
        for i in range(np.uintp(count)):
            a[a_start + i] = f(a[a_start + i])

    return run


@called
def copy(z: Any, z_start: Any, a: Any, a_start: Any, count: Any) -> None:
    """a[a_start + i] = z[z_start + i] for i < count.

    Without it, the loops would go from z to a, and LLVM runs those one number at a time where a is z: tanh at 2.6 ns
    instead of 0.17. The copy takes 0.03.
    """
    if z is not a or z_start != a_start:
        z_start, a_start = np.uintp(z_start), np.uintp(a_start)
        for i in range(np.uintp(count)):
            a[a_start + i] = z[z_start + i]


def backward_run(f: Function) -> Function:
    """delta[delta_start + i] *= f(scale · kept[kept_start + i]) for i < count."""

    @called
    def run(kept: Any, kept_start: Any, scale: Any, delta: Any, delta_start: Any, count: Any) -> None:
        kept_start, delta_start = np.uintp(kept_start), np.uintp(delta_start)
        scale = kept.dtype.type(scale)
        for i in range(np.uintp(count)):
            delta[delta_start + i] *= f(scale * kept[kept_start + i])

    return run


# One number at a time, and large angles by the C library. What a run holds beside a number must not change it: a tile's
# padding holds whatever was there before.


@inlined
def sin_of_any(x: Any) -> Any:
    """sin(x), for an angle of any size."""
    return sin(x) if abs(x) <= largest_angle(x) else type(x)(math.sin(x))


@inlined
def cos_of_any(x: Any) -> Any:
    """cos(x), for an angle of any size."""
    return cos(x) if abs(x) <= largest_angle(x) else type(x)(math.cos(x))


OF_ANY = {sin: sin_of_any, cos: cos_of_any}


def guarded(run_of: Callable[[Function], Function], f: Function) -> Function:
    """The run of f, or that of its slower counterpart where an angle is too large for f."""
    fast, slow = run_of(f), run_of(OF_ANY[f])

    @called
    def run(x: Any, x_start: Any, *others: Any) -> None:
        if any_beyond_largest_angle(x, np.uintp(x_start), np.uintp(others[-1])):
            slow(x, x_start, *others)
        else:
            fast(x, x_start, *others)

    return run


@called
def any_beyond_largest_angle(x: Any, start: Any, count: Any) -> bool:
    """Whether one of x[start : start + count] is beyond the range of `sin` and `cos`."""
    limit = largest_angle(x.dtype.type(0))
    beyond = False
    for i in range(count):
        beyond |= abs(x[start + i]) > limit
    return beyond


def switch(
    run_of: Callable[[Function], Function],
    functions: Mapping[str, Function],
    arguments: str,
    prepare: Function | None = None,
) -> Function:
    """(code, *arguments) → prepare(*arguments), then the run of the function with that code.

    Its source is put together here, since Numba has no loop over functions. A chain of compiled functions, each of one
    two-way branch, takes three times as long to compile: each of them is optimised again with all that it calls.
    """
    runs = {name: guarded(run_of, f) if f in OF_ANY else run_of(f) for name, f in functions.items()}
    source = [f"def choose_{run_of.__name__}(code, {arguments}):", *([f"    prepare({arguments})"] if prepare else [])]
    for name in runs:
        source += [f"    if code == {CODES[name]}:", f"        return {name}({arguments})"]
    source += ["    raise ValueError('no activation has this code')"]
    scope = {**runs, "prepare": prepare}
    exec("\n".join(source), scope)
    return compiled(scope[f"choose_{run_of.__name__}"])


apply = switch(forward_run, FORWARD, "z, z_start, a, a_start, count", prepare=copy)
"""(code, z, z_start, a, a_start, count): a[a_start + i] = σ(z[z_start + i]) for i < count, with the σ of that code.

z and a are vectors of one dtype, contiguous. They may be the same one; then the runs are the same too, or apart.
"""

multiply_by_derivative = switch(backward_run, DERIVATIVE, "kept, kept_start, scale, delta, delta_start, count")
"""(code, kept, kept_start, scale, delta, delta_start, count): delta[delta_start + i] *= σ′(scale kept[kept_start + i]).

`kept` is a or z, as `derivative_from` says. `scale` makes a of what dropout has left of it; where there is nothing to
undo it is 1, and costs nothing that shows. The runs are apart.
"""
