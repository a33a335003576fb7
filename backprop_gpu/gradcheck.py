"""Gradient checking: what backpropagation says against finite differences, in float64, on any backend."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from backprop_gpu.activations import ACTIVATIONS
from backprop_gpu.losses import Huber
from backprop_gpu.mlp import MLP

__all__ = ["GradCheck", "LayerCheck", "gradcheck"]

Floats = npt.NDArray[np.float64]

SMOOTH_STEP = 1e-3
KINK_STEP = 1e-5
"""Step h. The differences are of fourth order: they err by h⁴ f⁽⁵⁾ / 30 and by ε C / h, so a large h is best where the
cost is smooth; a small one keeps the two sides of a kink apart for all but a few of the rows."""


@dataclass(frozen=True)
class LayerCheck:
    """The worst relative error in one layer's gradients, and how many derivatives were compared.

    An error is |analytic − numeric| / the largest entry of that array's gradient.
    """

    dW: float
    db: float
    checked: int
    skipped: int
    """Derivatives left out because a kink (relu's, say, at z = 0) lay within the step."""

    @property
    def worst(self) -> float:
        """The larger of the two errors; NaN where one is."""
        return float(np.max([self.dW, self.db]))


@dataclass(frozen=True)
class GradCheck:
    """The report of `gradcheck`: one `LayerCheck` per layer."""

    layers: tuple[LayerCheck, ...]

    @property
    def worst(self) -> float:
        """The worst relative error of all layers; NaN where one is."""
        return float(np.max([layer.worst for layer in self.layers]))

    @property
    def checked(self) -> int:
        """Derivatives compared."""
        return sum(layer.checked for layer in self.layers)

    @property
    def skipped(self) -> int:
        """Derivatives left out, because a kink lay within the step."""
        return sum(layer.skipped for layer in self.layers)

    def __str__(self) -> str:
        lines = [f"layer {i}: dW {layer.dW:.1e}, db {layer.db:.1e}" for i, layer in enumerate(self.layers)]
        note = f" ({self.skipped} near a kink left out)" if self.skipped else ""
        return "\n".join([*lines, f"worst {self.worst:.1e} over {self.checked} derivatives{note}"])


def gradcheck(
    net: MLP,
    X: Any,
    y: Any,
    *,
    sample_weight: Any = None,
    dropout_step: int | None = None,
    max_entries: int = 50,
    seed: int = 0,
) -> GradCheck:
    """Compare `net.backprop(X, y)` with central differences of the cost, on a float64 copy on the same backend.

    For each W and b, the derivative along one random direction of all its entries, and along single entries:
    all of them, or `max_entries` drawn at random. A derivative is left out, and counted, where a kink of an activation
    or of the loss lies within the step.

    Parameters
    ----------
    X, y, sample_weight, dropout_step : as for `MLP.backprop`
    max_entries : int
        Single entries compared in each array.
    seed : int
        Seed of the directions and entries.

    Returns
    -------
    GradCheck
        ``.worst`` is the worst relative error, ``.layers[l].dW`` and ``.db`` that of each array. An array none of whose
        derivatives could be compared has error NaN: no evidence is not a good error.
    """
    net = net.copy(dtype="float64")
    cost = _Cost(net, X, y, sample_weight, dropout_step)
    grads = net.backprop(X, y, sample_weight=sample_weight, dropout_step=dropout_step)
    rng = np.random.default_rng(seed)
    layers = []
    for layer in range(net.architecture.n_layers):
        dW, db = (
            _check_array(cost, net.ops.to_numpy(gradient), offset, max_entries, rng)
            for gradient, offset in zip((grads.dW[layer], grads.db[layer]), _offsets(net, layer), strict=True)
        )
        layers.append(LayerCheck(dW[0], db[0], dW[1] + db[1], dW[2] + db[2]))
    return GradCheck(tuple(layers))


class _Cost:
    """C as a function of the flat parameters, and on which side of each kink every neuron stands."""

    def __init__(self, net: MLP, X: Any, y: Any, sample_weight: Any, dropout_step: int | None) -> None:
        self.net, self.dropout_step = net, dropout_step
        rows, target, w = net._take_in(X, y, sample_weight)
        self.X, self.target = net.ops.asarray(rows.take(slice(None))), net.ops.asarray(target)
        self.weight = None if w is None else net.ops.asarray(w)
        self.origin = np.array(net.ops.to_numpy(net.parameters))
        activations = net.architecture.activations
        self.kinked = [layer for layer, activation in enumerate(activations) if activation.has_kink]
        self.output_kinked = net.architecture.loss.has_kink or _output_has_kink(net)
        self.step = KINK_STEP if self.kinked or self.output_kinked else SMOOTH_STEP

    def __call__(self, parameters: Floats) -> tuple[float, list[npt.NDArray[np.bool_]]]:
        net, arch = self.net, self.net.architecture
        net.parameters[...] = net.ops.asarray(parameters)
        forward = net.forward(self.X, dropout_step=self.dropout_step, every_z=True)
        z = forward.z[-1]
        cost, _ = net.ops.output_delta(
            z, self.target, arch.loss, output_activation=arch.output_activation, sample_weight=self.weight
        )
        sides = [net.ops.to_numpy(forward.z[layer]) > 0 for layer in self.kinked]
        if self.output_kinked:
            sides += self._output_sides(z)
        return float(cost) + net._penalty(arch.alpha), sides

    def _output_sides(self, z: Any) -> list[npt.NDArray[np.bool_]]:
        net, loss = self.net, self.net.architecture.loss
        a = net.ops.to_numpy(net.ops.output_forward(z, net.architecture.output_activation))
        error = a - net.ops.to_numpy(self.target)
        bend = loss.threshold if isinstance(loss, Huber) else 0.0
        return [net.ops.to_numpy(z) > 0, error > bend, error < -bend]

    def derivative(self, direction: Floats) -> float | None:
        """(8(C₊ − C₋) − (C₊₊ − C₋₋)) / 12h along `direction`; None where a kink lies between the four points."""
        costs, sides = zip(*(self(self.origin + k * self.step * direction) for k in (-2, -1, 1, 2)), strict=True)
        here = sides[0]
        if any((s != h).any() for side in sides[1:] for s, h in zip(side, here, strict=True)):
            return None
        minus2, minus1, plus1, plus2 = costs
        return float((8 * (plus1 - minus1) - (plus2 - minus2)) / (12 * self.step))


def _output_has_kink(net: MLP) -> bool:
    activation = ACTIVATIONS.get(net.architecture.output_activation)
    return activation is not None and activation.has_kink


def _offsets(net: MLP, layer: int) -> tuple[int, int]:
    """Where W[layer] and b[layer] start in the flat vector."""
    W, b = net.architecture.views(np.arange(net.architecture.n_parameters))
    return int(W[layer][0, 0]), int(b[layer][0])


def _check_array(
    cost: _Cost, gradient: npt.NDArray[Any], offset: int, max_entries: int, rng: np.random.Generator
) -> tuple[float, int, int]:
    """(worst relative error, derivatives compared, derivatives left out) for one W or b."""
    g = gradient.ravel()
    pairs, skipped = [], 0
    for direction in _directions(g.size, max_entries, rng):
        whole = np.zeros(len(cost.origin))
        whole[offset : offset + g.size] = direction
        numeric = cost.derivative(whole)
        if numeric is None:
            skipped += 1
        else:
            pairs.append((float(g @ direction), numeric))
    if not pairs:
        return float("nan"), 0, skipped
    analytic, numeric_values = np.array(pairs).T
    largest = max(np.abs(g).max(), np.abs(numeric_values).max())
    error = np.abs(analytic - numeric_values).max()
    return float(error / largest) if largest > 0 else float(error), len(pairs), skipped


def _directions(size: int, max_entries: int, rng: np.random.Generator) -> Iterator[Floats]:
    """One random direction of length 1, then single entries."""
    random = rng.standard_normal(size)
    yield random / np.linalg.norm(random)
    for entry in rng.permutation(size)[:max_entries]:
        unit = np.zeros(size)
        unit[entry] = 1.0
        yield unit
