"""σ and σ′ of every activation, by the formulas of `backprop_gpu.backends.numpy`, one number at a time.

An activation is one row of FORWARD and one of DERIVATIVE. A kernel is compiled for the one that it needs, so there is
no branch over activations on the device.
"""

from __future__ import annotations

import math
from typing import Any

from backprop_gpu.activations import LEAKY_SLOPE, SELU_ALPHA, SELU_SCALE
from backprop_gpu.kernels.numba_cuda.device import Function, cos, device, erfc, exp, expm1, log1p, sin, tanh

__all__ = ["DERIVATIVE", "FORWARD"]


# Device functions: what several activations share


@device
def sigmoid(z: Any) -> Any:
    """1 / (1 + exp(−z)), from exp(−|z|), which cannot overflow."""
    e = exp(-abs(z))
    return (e if z < type(z)(0) else type(z)(1)) / (type(z)(1) + e)


@device
def normal_cdf(z: Any) -> Any:
    """Φ(z) = ½ erfc(−z / √2)."""
    return type(z)(0.5) * type(z)(erfc(type(z)(-math.sqrt(0.5)) * z))


@device
def left_bounded(z: Any) -> Any:
    """max(z, −1000), for z · gate(z) with a gate that is 0 there, where −∞ would make ∞ · 0."""
    return type(z)(-1000) if z < type(z)(-1000) else z


@device
def bounded(z: Any) -> Any:
    """`z` within ±1000, for the derivatives of z · gate(z)."""
    z = left_bounded(z)
    return type(z)(1000) if z > type(z)(1000) else z


SQRT_8_OVER_PI = 2 * math.sqrt(2 / math.pi)


@device
def gelu_tanh_inner(z: Any) -> Any:
    """2u with u = √(2/π)(z + 0.044715 z³)."""
    return type(z)(SQRT_8_OVER_PI) * (z + type(z)(0.044715) * z * z * z)


@device
def tanh_softplus(z: Any) -> Any:
    """(numerator, denominator) of t = tanh(softplus(z)) = ((1 + e^z)² − 1) / ((1 + e^z)² + 1), and e = e^−|z|.

    For z > 0, both are divided by e^2z, which could overflow.
    """
    e = exp(-abs(z))
    left, right = e * (e + type(z)(2)), type(z)(1) + type(z)(2) * e
    numerator = left if z < type(z)(0) else right
    rest = type(z)(2) if z < type(z)(0) else type(z)(2) * e * e
    return numerator, numerator + rest, e


# Device functions: σ(z)


@device
def identity(z: Any) -> Any:
    """z."""
    return z


@device
def relu(z: Any) -> Any:
    """max(z, 0)."""
    return type(z)(0) if z < type(z)(0) else z


@device
def leaky_relu(z: Any) -> Any:
    """max(z, slope · z)."""
    return type(z)(LEAKY_SLOPE) * z if z < type(z)(0) else z


@device
def elu(z: Any) -> Any:
    """z where z > 0, else e^z − 1."""
    return z if z > type(z)(0) else expm1(z)


@device
def selu(z: Any) -> Any:
    """λz where z > 0, else λα(e^z − 1)."""
    return type(z)(SELU_SCALE) * (z if z > type(z)(0) else type(z)(SELU_ALPHA) * expm1(z))


@device
def hyperbolic_tangent(z: Any) -> Any:
    """tanh(z)."""
    return tanh(z)


@device
def softplus(z: Any) -> Any:
    """log(1 + e^z) = max(z, 0) + log(1 + e^−|z|), which cannot overflow."""
    return relu(z) + log1p(exp(-abs(z)))


@device
def silu(z: Any) -> Any:
    """z sigmoid(z)."""
    return left_bounded(z) * sigmoid(z)


@device
def gelu(z: Any) -> Any:
    """z Φ(z)."""
    return left_bounded(z) * normal_cdf(z)


@device
def gelu_tanh(z: Any) -> Any:
    """z sigmoid(2u)."""
    z = left_bounded(z)
    return z * sigmoid(gelu_tanh_inner(z))


@device
def mish(z: Any) -> Any:
    """z tanh(softplus(z))."""
    numerator, denominator, _ = tanh_softplus(z)
    return left_bounded(z) * (numerator / denominator)


@device
def sine(z: Any) -> Any:
    """sin(z)."""
    return sin(z)


@device
def exponential(z: Any) -> Any:
    """e^z, which only the output layer has."""
    return exp(z)


# Device functions: σ′ from a


@device
def identity_derivative(a: Any) -> Any:
    """1, but NaN where a is NaN."""
    return type(a)(1) if a == a else a


@device
def relu_derivative(a: Any) -> Any:
    """1 where a > 0, else a, which is 0 or NaN: relu has no a < 0."""
    return type(a)(1) if a > type(a)(0) else a


@device
def leaky_relu_derivative(a: Any) -> Any:
    """1 where a > 0, the slope where a ≤ 0, NaN where a is NaN."""
    left = type(a)(LEAKY_SLOPE) if a <= type(a)(0) else a
    return type(a)(1) if a > type(a)(0) else left


@device
def elu_derivative(a: Any) -> Any:
    """1 where a > 0, else e^z = a + 1."""
    return type(a)(1) if a > type(a)(0) else a + type(a)(1)


@device
def selu_derivative(a: Any) -> Any:
    """λ where a > 0, else λα e^z = a + λα."""
    return type(a)(SELU_SCALE) if a > type(a)(0) else a + type(a)(SELU_SCALE * SELU_ALPHA)


@device
def sigmoid_derivative(a: Any) -> Any:
    """a(1 − a)."""
    return a * (type(a)(1) - a)


@device
def tanh_derivative(a: Any) -> Any:
    """(1 − a)(1 + a)."""
    return (type(a)(1) - a) * (type(a)(1) + a)


# Device functions: σ′ from z


@device
def silu_derivative(z: Any) -> Any:
    """s + z s(1 − s), s = sigmoid(z), and 1 − s = sigmoid(−z)."""
    z = bounded(z)
    s = sigmoid(z)
    return s + z * s * sigmoid(-z)


@device
def gelu_derivative(z: Any) -> Any:
    """Φ(z) + z φ(z)."""
    z = bounded(z)
    return normal_cdf(z) + z * type(z)(1 / math.sqrt(2 * math.pi)) * exp(type(z)(-0.5) * z * z)


@device
def gelu_tanh_derivative(z: Any) -> Any:
    """s + z s(1 − s) 2u′, s = sigmoid(2u), 2u′ = 2√(2/π)(1 + 3 · 0.044715 z²)."""
    z = bounded(z)
    s, one_minus_s = sigmoid(gelu_tanh_inner(z)), sigmoid(-gelu_tanh_inner(z))
    return s + z * s * one_minus_s * (type(z)(SQRT_8_OVER_PI) * (type(z)(1) + type(z)(3 * 0.044715) * z * z))


@device
def mish_derivative(z: Any) -> Any:
    """t + z(1 − t²) sigmoid(z), t = tanh(softplus(z)).

    With t's denominator d, (1 − t²) sigmoid(z) = 4e^z(1 + e^z) / d²; for z > 0, both are divided by e^4z.
    """
    z = bounded(z)
    numerator, denominator, e = tanh_softplus(z)
    slope = type(z)(4) * (type(z)(1) + e) * (e if z < type(z)(0) else e * e)
    return (numerator + z * slope / denominator) / denominator


@device
def cosine(z: Any) -> Any:
    """cos(z)."""
    return cos(z)


FORWARD: dict[str, Function] = {
    "identity": identity,
    "relu": relu,
    "leaky_relu": leaky_relu,
    "elu": elu,
    "selu": selu,
    "sigmoid": sigmoid,
    "tanh": hyperbolic_tangent,
    "softplus": softplus,
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "mish": mish,
    "sine": sine,
    "exp": exponential,
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
    "sine": cosine,
}
"""σ′ by name, of what `derivative_from` says."""
