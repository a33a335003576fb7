"""The activations that every backend serves: a = σ(z), and what its derivative σ′ is computed from.

This is the table, not the arithmetic: each backend implements every row of it, the NumPy one
(`backends/numpy.py`) as the specification. A new activation is one row here and one function per backend.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from backprop_gpu.checks import lookup

__all__ = ["ACTIVATIONS", "LEAKY_SLOPE", "SELU_ALPHA", "SELU_SCALE", "Activation", "get"]

LEAKY_SLOPE = 0.01
"""Slope of leaky_relu left of zero (Maas et al., 2013)."""

SELU_ALPHA = 1.6732632423543772
SELU_SCALE = 1.0507009873554805
"""selu's α and λ, the fixed point of mean 0 and variance 1 (Klambauer et al., 2017)."""


@dataclass(frozen=True)
class Activation:
    """One elementwise activation.

    `derivative_from` says which array the backward pass keeps: "a" where σ′ is cheaper from the activation,
    "z" where it needs the pre-activation. `has_kink`: σ or σ′ jumps at z = 0, so finite differences taken
    across that point say nothing. `initialization` is the rule that keeps the variance of a through a layer.
    """

    name: str
    formula: str
    derivative: str
    derivative_from: Literal["a", "z"]
    initialization: Literal["glorot", "he"] = "glorot"
    has_kink: bool = False


ACTIVATIONS: dict[str, Activation] = {
    activation.name: activation
    for activation in (
        Activation("identity", "z", "1", "a"),
        Activation("relu", "max(z, 0)", "1 if a > 0 else 0", "a", "he", has_kink=True),
        Activation("leaky_relu", "max(z, 0.01 z)", "1 if a > 0 else 0.01", "a", "he", has_kink=True),
        Activation("elu", "z if z > 0 else exp(z) − 1", "1 if a > 0 else a + 1", "a", "he", has_kink=True),
        Activation("selu", "λz if z > 0 else λα(exp(z) − 1)", "λ if a > 0 else a + λα", "a", has_kink=True),
        Activation("sigmoid", "1 / (1 + exp(−z))", "a(1 − a)", "a"),
        Activation("tanh", "tanh(z)", "(1 − a)(1 + a)", "a"),
        Activation("softplus", "log(1 + exp(z))", "sigmoid(z)", "z"),
        Activation("silu", "z sigmoid(z)", "s + z s(1 − s), s = sigmoid(z)", "z", "he"),
        Activation("gelu", "z Φ(z)", "Φ(z) + z φ(z)", "z", "he"),
        Activation("gelu_tanh", "z sigmoid(2u), u = √(2/π)(z + 0.044715 z³)", "s + 2z s(1 − s)u′", "z", "he"),
        Activation("mish", "z tanh(softplus(z))", "t + z(1 − t²) sigmoid(z), t = tanh(softplus(z))", "z", "he"),
        Activation("sine", "sin(z)", "cos(z)", "z"),
    )
}


def get(activation: str | Activation) -> Activation:
    """The activation of that name; an Activation is returned as it is."""
    if isinstance(activation, Activation):
        return activation
    return lookup("activation", activation, ACTIVATIONS)
