"""What a network is, without its numbers: layer sizes, activations, loss, dropout, penalty, the parameters' layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from operator import index
from typing import Any

import numpy as np
import numpy.typing as npt

from backprop_gpu import activations, losses
from backprop_gpu.activations import Activation
from backprop_gpu.checks import fraction, lookup, not_negative
from backprop_gpu.losses import LOSSES, Loss

__all__ = ["Architecture"]


@dataclass(frozen=True)
class Architecture:
    """A network of L dense layers, L = len(layer_sizes) − 1; the last layer is the output layer.

    All parameters lie in one flat vector: W[0], …, W[L−1], each (n_in, n_out) and C-contiguous, then b[0], …, b[L−1],
    each (n_out,). The weights come first, so that "weights, never biases" is `index < n_weights`.
    """

    layer_sizes: tuple[int, ...]
    """Number of inputs, the width of every hidden layer, number of outputs."""
    activations: tuple[Activation, ...]
    """σ of each of the L − 1 hidden layers."""
    loss: Loss
    output_activation: str
    """σ of the output layer: an activation's name, or softmax or exp where the loss goes with it."""
    dropout: tuple[float, ...]
    """For each hidden layer, the probability that a neuron is left out of a training step."""
    alpha: float
    """L2 penalty: ½ alpha Σ W² is added to C, over the weights, never the biases."""

    @classmethod
    def build(
        cls,
        layer_sizes: Sequence[int],
        *,
        activation: str | Activation | Sequence[str | Activation] = "relu",
        loss: str | Loss = "cross_entropy",
        output_activation: str | None = None,
        dropout: float | Sequence[float] = 0.0,
        alpha: float = 0.0,
    ) -> Architecture:
        """An architecture from what a user writes; ValueError or TypeError says which argument is off and why."""
        sizes = _layer_sizes(layer_sizes)
        loss = losses.get(loss)
        if loss.name == "cross_entropy" and sizes[-1] < 2:
            raise ValueError(
                "cross_entropy needs at least 2 outputs, one per class; got 1 (loss='binary_cross_entropy' takes 1)"
            )
        not_negative("alpha", alpha)
        n_hidden = len(sizes) - 2
        return cls(
            sizes,
            tuple(activations.get(name) for name in _per_hidden_layer("activation", activation, n_hidden)),
            loss,
            losses.output_activation(loss, output_activation),
            tuple(_rate(rate) for rate in _per_hidden_layer("dropout", dropout, n_hidden)),
            float(alpha),
        )

    @property
    def n_layers(self) -> int:
        """L, the number of weight matrices."""
        return len(self.layer_sizes) - 1

    @property
    def sigmas(self) -> tuple[str, ...]:
        """Name of the activation of every layer, the output layer included."""
        return (*(activation.name for activation in self.activations), self.output_activation)

    @property
    def n_weights(self) -> int:
        """How many of the parameters are weights: the first ones."""
        return sum(n_in * n_out for n_in, n_out in pairwise(self.layer_sizes))

    @property
    def n_parameters(self) -> int:
        """Size of the flat vector of parameters."""
        return self.n_weights + sum(self.layer_sizes[1:])

    def views(self, flat: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """(W, b) as views into a flat vector of this layout: of parameters, gradients or optimizer state."""
        W, b, start = [], [], 0
        for n_in, n_out in pairwise(self.layer_sizes):
            W.append(flat[start : start + n_in * n_out].reshape(n_in, n_out))
            start += n_in * n_out
        for n_out in self.layer_sizes[1:]:
            b.append(flat[start : start + n_out])
            start += n_out
        return tuple(W), tuple(b)

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Names of the tensors of a model file, in the order of the flat vector: W.0, W.1, …, b.0, b.1, …."""
        return tuple(f"{kind}.{layer}" for kind in "Wb" for layer in range(self.n_layers))

    def tensors(self, flat: Any) -> dict[str, Any]:
        """A flat vector of this layout as the tensors of a model file."""
        W, b = self.views(flat)
        return dict(zip(self.tensor_names, (*W, *b), strict=True))

    def flatten(self, tensors: Mapping[str, Any]) -> npt.NDArray[Any]:
        """The flat vector out of a model file's tensors; ValueError or KeyError where they are not of this layout."""
        shapes = [*pairwise(self.layer_sizes), *((n_out,) for n_out in self.layer_sizes[1:])]
        for name, shape in zip(self.tensor_names, shapes, strict=True):
            if tensors[name].shape != shape:
                raise ValueError(f"tensor {name} has shape {tensors[name].shape}, the layer sizes say {shape}")
        return np.concatenate([tensors[name].ravel() for name in self.tensor_names])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values, for the metadata of a model file."""
        return {
            "layer_sizes": list(self.layer_sizes),
            "activation": [activation.name for activation in self.activations],
            "loss": self.loss.name,
            "loss_settings": asdict(self.loss),
            "output_activation": self.output_activation,
            "dropout": list(self.dropout),
            "alpha": self.alpha,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Architecture:
        """The architecture that `to_dict` wrote down, checked as if a user had written it."""
        settings = dict(values)
        settings["loss"] = lookup("loss", settings["loss"], LOSSES)(**settings.pop("loss_settings"))
        return cls.build(settings.pop("layer_sizes"), **settings)


def _layer_sizes(layer_sizes: Sequence[int]) -> tuple[int, ...]:
    try:
        sizes = tuple(index(size) for size in layer_sizes)
    except TypeError:
        raise TypeError(
            f"layer_sizes must be a sequence of integers, e.g. [784, 128, 10]; got {layer_sizes!r}"
        ) from None
    if len(sizes) < 2:
        raise ValueError(f"layer_sizes needs at least the number of inputs and of outputs; got {list(sizes)}")
    if min(sizes) < 1:
        raise ValueError(f"every layer needs at least 1 neuron; got layer_sizes={list(sizes)}")
    return sizes


def _per_hidden_layer(name: str, value: Any, n_hidden: int) -> list[Any]:
    """One value for all hidden layers, or one for each."""
    value = value.tolist() if isinstance(value, np.ndarray) else value
    if isinstance(value, str | Activation) or not isinstance(value, Sequence):
        return [value] * n_hidden if n_hidden else _check_unused(name, value)
    if len(value) != n_hidden:
        raise ValueError(f"{name} needs one value, or one for each of the {n_hidden} hidden layers; got {len(value)}")
    return list(value)


def _check_unused(name: str, value: Any) -> list[Any]:
    """A network without hidden layers still refuses an unknown name or rate."""
    _ = activations.get(value) if name == "activation" else _rate(value)
    return []


def _rate(rate: float) -> float:
    fraction("dropout", rate)
    return float(rate)
