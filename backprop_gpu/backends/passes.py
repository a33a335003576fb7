"""What a forward pass and a backward pass of their own are told of a network: another library's autograd calls them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

__all__ = ["Dropout", "Network"]


@dataclass(frozen=True)
class Network:
    """What a pass computes, but for the numbers."""

    layer_sizes: tuple[int, ...]
    sigmas: tuple[str, ...]
    """σ of every layer, the output layer included: names of `ACTIVATIONS`."""

    @cached_property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of weight and bias of each layer in turn, in PyTorch's layout."""
        return tuple(shape for n_in, n_out in pairwise(self.layer_sizes) for shape in ((n_out, n_in), (n_out,)))


@dataclass(frozen=True)
class Dropout:
    """Which neurons a pass leaves out, by the rule in `contract.Dropout` with step 0: the same in both passes."""

    rates: tuple[float, ...]
    """For every layer, the probability that a neuron is left out; 0 for the output layer."""
    seed: int
