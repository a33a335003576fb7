"""PyTorch's names for what this library computes: activations as functions and modules; a `Sequential` taken apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backprop_gpu.activations import ACTIVATIONS, LEAKY_SLOPE

__all__ = ["FUNCTIONS", "MODULES", "Layer", "Sine", "take_apart"]


class Sine(nn.Module):
    """a = sin(z), for which PyTorch has no module."""

    def forward(self, z: Tensor) -> Tensor:
        """sin(z), of any shape."""
        return torch.sin(z)


def _identity(z: Tensor) -> Tensor:
    return z


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": _identity,
    "relu": F.relu,
    "leaky_relu": lambda z: F.leaky_relu(z, LEAKY_SLOPE),
    "elu": F.elu,
    "selu": F.selu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softplus": F.softplus,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "mish": F.mish,
    "sine": torch.sin,
}
"""Every activation of `ACTIVATIONS` in PyTorch's operations, differentiable as often as one likes."""

MODULES: dict[str, Callable[[], nn.Module]] = {
    "identity": nn.Identity,
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(LEAKY_SLOPE),
    "elu": nn.ELU,
    "selu": nn.SELU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "softplus": nn.Softplus,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "mish": nn.Mish,
    "sine": Sine,
}
"""The same as modules."""

SETTINGS: dict[type[nn.Module], dict[str, object]] = {
    nn.LeakyReLU: {"negative_slope": LEAKY_SLOPE},
    nn.ELU: {"alpha": 1.0},
    nn.Softplus: {"beta": 1.0, "threshold": 20.0},
}
"""The settings with which a module is one of ours."""

NAMES: dict[type[nn.Module], str] = {
    nn.Identity: "identity",
    nn.ReLU: "relu",
    nn.LeakyReLU: "leaky_relu",
    nn.ELU: "elu",
    nn.SELU: "selu",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
    nn.Softplus: "softplus",
    nn.SiLU: "silu",
    nn.Mish: "mish",
    Sine: "sine",
}


@dataclass
class Layer:
    """One dense layer: the names of its modules among their parent's children."""

    linear: str
    n_in: int
    n_out: int
    activation: str = "identity"
    """A name of `ACTIVATIONS`."""
    sigma: str | None = None
    dropout: str | None = None


def take_apart(children: Iterable[tuple[str, nn.Module]]) -> list[Layer]:
    """The dense layers of a chain: each a Linear, then at most one activation, then at most one Dropout.

    Raises ValueError or TypeError for the first module that does not fit, by its name, with the way out.
    """
    layers: list[Layer] = []
    for name, module in children:
        where = f"layer {name} ({module})"
        if _is_linear(module):
            layers.append(_linear(name, where, module, layers))
        elif not layers:
            raise ValueError(f"{where}: the chain has to begin with a Linear; put other modules before the FusedMLP")
        elif type(module) is nn.Dropout:
            if layers[-1].dropout is not None:
                raise ValueError(f"{where}: there is a Dropout before it already; combine their rates in one")
            layers[-1].dropout = name
        else:
            _add_activation(name, where, module, layers[-1])
    if not layers:
        raise ValueError("there is no Linear in it, so there is nothing to compute")
    if layers[-1].dropout is not None:
        raise ValueError(
            f"layer {layers[-1].dropout} (Dropout): dropout of the outputs is not computed here; "
            "apply it to what the FusedMLP returns"
        )
    return layers


def _is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """A Linear that computes as Linear does; so is a parametrized one, whose class is made for it."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def _linear(name: str, where: str, module: nn.Linear, before: list[Layer]) -> Layer:
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        raise ValueError(f"{where}: its size is not known before its first call; call the module once, then convert it")
    n_out, n_in = module.out_features, module.in_features
    if min(n_in, n_out) < 1:
        raise ValueError(f"{where}: every layer needs at least 1 neuron")
    if before and before[-1].n_out != n_in:
        raise ValueError(f"{where} takes {n_in} features, and layer {before[-1].linear} gives {before[-1].n_out}")
    return Layer(name, n_in, n_out)


def _add_activation(name: str, where: str, module: nn.Module, layer: Layer) -> None:
    activation = _activation(module)
    if activation is None:
        raise TypeError(
            f"{where} is not supported: FusedMLP takes Linear, Dropout and the activations {', '.join(ACTIVATIONS)}, "
            f"with PyTorch's default settings{_difference(module)}; keep it outside, or keep the plain module"
        )
    if layer.dropout is not None:
        raise ValueError(f"{where}: comes after a Dropout; the order has to be Linear, activation, Dropout")
    if layer.sigma is not None:
        if activation == "identity":
            return
        raise ValueError(f"{where}: layer {layer.linear} has an activation already, {layer.activation}")
    layer.activation, layer.sigma = activation, name


def _activation(module: nn.Module) -> str | None:
    """The name of the activation that a module is."""
    if type(module) is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(module.approximate)
    return None if _difference(module) else NAMES.get(type(module))


def _difference(module: nn.Module) -> str:
    """Where a module of a known kind has settings that are not ours."""
    for setting, ours in SETTINGS.get(type(module), {}).items():
        theirs = getattr(module, setting)
        if not math.isclose(float(theirs), float(str(ours))):
            return f" ({setting}={ours}, not {theirs})"
    return ""
